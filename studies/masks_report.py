"""The masks study's numbers, figures and words, made from its records."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa

from compress.measure import Share
from compress.passes.masks import Masks
from compress.tokens.pairs import MASKS
from probe.plots import panels
from probe.plots.panels import GREY, Line, Pair, Series
from studies.bench import Configuration
from studies.points import sentence
from studies.run import Run
from studies.study import Setting, Summary
from studies.telling import bracketed
from studies.tradeoffs_report import surely_worse
from studies.work import curve

FLOWS = {
    # name: (title of its panel, in words)
    "image->image": ("visual rows to the picture", "visual rows give the picture"),
    "question->image": ("visual rows to the question", "visual rows give the question"),
    "image->question": ("question to the picture", "the question gives the picture"),
    "image->last": ("last position to the picture", "the last position gives the picture"),
}


OF_VISUAL_ROWS = ("image->image", "question->image")


def summarise(rows: pa.Table, points: list[dict[str, Any]], asked: Sequence[Configuration], seed: int) -> Summary:
    """Everything that the report says, as numbers: `n n_existence points masses dense`."""
    table = rows.to_pandas()
    by_name = {point["name"]: point for point in points}
    made = []
    for one in asked:
        point, own = by_name[one.name], table[table["name"] == one.name]
        method, _, layers = one.name.partition(" ")
        point |= {
            "method": "" if one.baseline else method, "layers": layers, "yes": _yes(own[own["what"] == "exist"]),
            "pairs": next(iter(own[own["what"] == "pairs"]["mass"]), None),
        }  # fmt: skip
        made.append(point)
    masses = {
        one.name: _masses(_attending(one, table[(table["name"] == one.name) & (table["what"] == "mass")]), seed)
        for one in asked
    }
    dense = next(point for point in made if point["baseline"] == "full")
    return {
        "n": dense["n"], "n_existence": dense["yes"]["said"]["n"], "n_looked": len(set(table[table["what"] == "mass"]["example"])),
        "dense": dense["name"], "points": made, "masses": masses,
    }  # fmt: skip


def _attending(one: Configuration, table: pd.DataFrame) -> pd.DataFrame:
    """The masses with 0 where visual rows do not attend: a trace shows what they would have looked at."""
    first = one.recipe.passes[0] if one.recipe else None
    if first is None or isinstance(first, Masks):
        return table
    silent = table["flow"].isin(OF_VISUAL_ROWS) & table["layer"].isin(list(getattr(first, "layers", None) or ()))
    return table.assign(mass=table["mass"].where(~silent, 0.0))


def _yes(table: pd.DataFrame) -> dict[str, Any]:
    """How often yes is said: to all questions of existence, where the thing is there, and where it is not; accuracy; and how often it is there."""
    yes = table["said"].str.lower().str.startswith("yes").to_numpy(bool)
    there = (table["kind"] == "yes").to_numpy(bool)
    right = table["right"].to_numpy(bool)
    found = {"said": yes, "present": yes[there], "absent": yes[~there], "right": right, "there": there}
    return {name: vars(Share.of(hits)) for name, hits in found.items()}


def _masses(table: pd.DataFrame, seed: int) -> dict[str, Any]:
    """A curve over layers for each flow."""
    return {
        str(flow): curve(own.pivot_table(index="example", columns="layer", values="mass").to_numpy(float), seed=seed)
        for flow, own in table.groupby("flow", observed=True)
    }  # fmt: skip


# --- figures ---------------------------------------------------------------------------------------------------------


def figures(run: Run, summary: Summary) -> None:
    """Accuracy and yes by mask and layers; attention masses of the dense model and of the masks on all layers."""
    for name, points in accuracy_figures(summary).items():
        run.figure(name, *accuracies(summary, points))
    run.figure("attention", *attention(summary))


def accuracy_figures(summary: Mapping[str, Any]) -> dict[str, list[Mapping[str, Any]]]:
    """The figures of accuracy, and the points of each, the dense one first: masks, and passes that skip attention."""
    dense, *steps = sorted(summary["points"], key=lambda point: bool(point["method"]))
    parts = {"accuracy": [p for p in steps if p["method"] in MASKS], "skips": [p for p in steps if p["method"] not in MASKS]}
    return {name: [dense, *part] for name, part in parts.items() if part}


def accuracies(summary: Mapping[str, Any], points: Sequence[Mapping[str, Any]]) -> Pair:
    """A panel for each mask: right answers and answers of yes, by the layers that it stands on, the dense model above them."""
    dense = next(point for point in points if not point["method"])
    shown: list[tuple[str, Callable[[Mapping[str, Any]], Mapping[str, float]]]] = [("right answers", _accuracy)]
    if summary["n_existence"]:
        shown.append(("says yes to whether something is there", lambda point: point["yes"]["said"]))
    made = []
    for method in dict.fromkeys(point["method"] for point in points if point["method"]):
        own = {"none (dense)": dense, **{_where(point): point for point in points if point["method"] == method}}
        series: list[Series] = [
            (name, {where: read(point) for where, point in own.items()}, panels.colour(k)) for k, (name, read) in enumerate(shown)
        ]  # fmt: skip
        made.append((method, series))
    return panels.values(made, "share of questions", share=True)


def _accuracy(point: Mapping[str, Any]) -> dict[str, float]:
    return {"value": point["accuracy"], "low": point["accuracy_low"], "high": point["accuracy_high"]}


def _where(point: Mapping[str, Any]) -> str:
    first, _, last = point["layers"].partition("-")
    return f"layer {first}" if first == last else f"layers {first} to {last}"


def attention(summary: Mapping[str, Any]) -> Pair:
    """A panel for each flow: mass by layer, the dense model beside every mask on all layers."""
    whole = widest(summary)
    made = []
    for flow, (title, _) in FLOWS.items():
        lines: list[Line] = [
            (p["method"], summary["masses"][p["name"]][flow], panels.colour(k), False) for k, p in enumerate(whole)
        ]
        lines.append(("dense", summary["masses"][summary["dense"]][flow], GREY, True))
        made.append((title, lines))
    layers = list(range(summary["n_layers"]))
    return panels.curves(made, [layers] * len(made), "layer", "share of attention")


def widest(summary: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The point of each mask that stands on most layers."""
    found: dict[str, Mapping[str, Any]] = {}
    for point in summary["points"]:
        if point["method"] and (point["method"] not in found or _count(point) > _count(found[point["method"]])):
            found[point["method"]] = point
    return list(found.values())


def _count(point: Mapping[str, Any]) -> int:
    first, _, last = point["layers"].partition("-")
    return int(last) - int(first) + 1


# --- words -----------------------------------------------------------------------------------------------------------


def report(summary: Summary, setting: Setting) -> str:
    """The report: the answer first, then the figures and every number."""
    dense = next(point for point in summary["points"] if not point["method"])
    lines = [
        "# Masks", "",
        f"*What does each attention mask do to a model that was trained without it?* Model `{setting.subject.name}`, data `{setting.data.name}`, "
        f"{summary['n']} questions; nothing is trained.", "", "## The answer", "",
        f"The dense model answers {dense['accuracy']:.1%} [{dense['accuracy_low']:.1%}, {dense['accuracy_high']:.1%}].", "",
        *(f"- {_told(summary, point, dense)}" for point in widest(summary)), "", *_least(summary), "",
        *(line for name in accuracy_figures(summary) for line in (f"![accuracy](figures/{name}.png)", "")),
        "Each mask on each part of the depth: right answers"
        + (f", and how often {summary['n_existence']} questions of existence are answered with yes (the thing is there in "
           f"{dense['yes']['there']['value']:.0%})" if summary["n_existence"] else "")
        + ". Bars are 95 % Wilson intervals.", "",
        "## Where attention goes", "", "![attention](figures/attention.png)", "",
        f"Share of attention by layer, heads averaged, over {summary['n_looked']} prompts with a 95 % bootstrap interval: the dense model, and each mask "
        f"on as many layers as it was put on. Rows that do not attend give nothing.", "",
        *(f"- {_flows(summary, point)}" for point in widest(summary)), "",
        "## Every configuration", "", _table(summary["points"]), "", *_surely(summary), "", *_words(summary),
    ]  # fmt: skip
    if summary["skipped"]:
        lines += ["", "## What was refused", "", *(f"- {name}: {why}" for name, why in summary["skipped"].items())]
    if summary["unused"]:
        lines += ["", f"## Examples that could not be used ({len(summary['unused'])})", ""]
        lines += [f"- {name}: {why}" for name, why in list(summary["unused"].items())[:20]]
    return "\n".join([*lines, ""])


def _told(summary: Mapping[str, Any], point: Mapping[str, Any], dense: Mapping[str, Any]) -> str:
    """One mask on all layers in words."""
    text = f"**{point['method']}**, {_where(point)}: {sentence({**point, 'verdict': None}).partition(': ')[2]}"
    if summary["n_existence"]:
        text += (
            f" It says yes to {point['yes']['said']['value']:.0%} of the questions of existence (dense {dense['yes']['said']['value']:.0%}), to "
            f"{point['yes']['absent']['value']:.0%} of those about things that are not there (dense {dense['yes']['absent']['value']:.0%})."
        )
    broke = {kind: len(k["broke"]) for kind, k in point["by_kind"].items() if k["broke"]}
    lost = ", ".join(
        f"{n} of {point['by_kind'][kind]['n']} {kind}" for kind, n in sorted(broke.items(), key=lambda one: -one[1])
    )
    return f"{text} Right before and wrong now: {lost or 'none'}."


def _least(summary: Mapping[str, Any]) -> list[str]:
    """For each mask, the widest part of the depth that it can stand on while losing less than 5 points by its interval."""
    found = []
    for method in dict.fromkeys(p["method"] for p in summary["points"] if p["method"]):
        kept = [p for p in summary["points"] if p["method"] == method and p["difference"]["low"] > -0.05]
        best = max(kept, key=_count, default=None)
        found.append(f"{method}: {_where(best) if best else 'no part'}")
    return [f"The widest part on which each loses less than 5 points by its interval: {'; '.join(found)}. It was picked on the questions that it is "
            f"judged by."]  # fmt: skip


def _flows(summary: Mapping[str, Any], point: Mapping[str, Any]) -> str:
    """What a mask does to each flow, averaged over layers."""
    parts = []
    for flow, (_, words) in FLOWS.items():
        before, after = (np.mean(summary["masses"][name][flow]["mean"]) for name in (summary["dense"], point["name"]))
        parts.append(
            f"{words} {after:.2f} of their attention (dense {before:.2f})"
            if "rows" in words
            else f"{words} {after:.2f} (dense {before:.2f})"
        )
    return f"**{point['method']}**, mean over layers: {'; '.join(parts)}."


def _table(points: Sequence[Mapping[str, Any]]) -> str:
    head = "| mask | layers | accuracy | against dense | KL, nats | says yes | yes, not there | pairs | FLOPs |\n|---|---|---|---|---|---|---|---|---|"
    return "\n".join([head, *(_row(point) for point in points)])


def _row(point: Mapping[str, Any]) -> str:
    change, yes = point["difference"], point["yes"]
    said, absent = (
        "" if yes[key]["value"] is None else f"{yes[key]['value']:.0%}" for key in ("said", "absent")
    )  # fmt: skip
    pairs = "" if point["pairs"] is None else f"{point['pairs']:.0%}"
    return (
        f"| {point['method'] or 'none (dense)'} | {point['layers']} | {point['accuracy']:.1%} [{point['accuracy_low']:.1%}, {point['accuracy_high']:.1%}] | "
        f"{bracketed(change, '+.1%')} | {point['divergence']['value']:.3f} | {said} | {absent} | {pairs} | "
        f"{point['flops_ratio']:.0%} |"
    )


def _surely(summary: Mapping[str, Any]) -> list[str]:
    steps = [point for point in summary["points"] if point["method"]]
    worst = surely_worse(steps)
    return [
        f"Of {len(steps)} configurations {len(worst)} surely cost accuracy by McNemar's test at a false discovery rate of 5 %. `pairs` is the share of "
        f"the causal query-key pairs that is left, over all layers; dense kernels compute every pair under a mask, so that a mask leaves FLOPs and "
        f"times what they were; passes that skip attention save what stands under FLOPs. Keys and values are all kept: a written token costs what it did."
    ]


def _words(summary: Mapping[str, Any]) -> list[str]:
    """What happened to answers where nothing is shown."""
    found = [point["text_only"] for point in summary["points"] if point["method"]]
    known = [one for one in found if "refused" not in one]
    if not known:
        return [f"Without a picture: {found[0]['refused']}"] if found else []
    same = [one for one in known if one["agreement"]["value"] == 1.0]
    dense = next(point for point in summary["points"] if not point["method"])["text_only"]["accuracy"]
    return [
        f"Without a picture ({known[0]['what']}, {dense['n']} questions, {dense['value']:.1%} right): {len(same)} of {len(known)} configurations say what the "
        f"dense model says to every question. A mask of visual tokens finds none there."
    ]
