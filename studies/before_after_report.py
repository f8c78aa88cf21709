"""The before-after study's numbers, figures and words, made from its records."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa

from probe.analysis.flow import cutoff_layer
from probe.analysis.stats import benjamini_hochberg, bootstrap_mean, mcnemar, sign_flip, wilson
from probe.plots import panels
from probe.plots.style import COLOURS
from studies.run import Run
from studies.study import Setting, Summary
from studies.work import curve, refuse_nothing, skipped

LEVEL = 0.05
SHOWN_FLOWS = ("image->question", "image->last", "question->last")
MODELS = ("before", "after")
FROM = "image from here on"
NAMES = {"before": "dense", "after": "compressed"}


def summarise(rows: pa.Table, numbers: Mapping[str, Sequence[int]], seed: int) -> Summary:
    """Everything that the report says, as numbers. Raises DataError when no example could be used."""
    table = rows.to_pandas()
    told = {name: table[(table["what"] == "answer") & (table["model"] == name)].set_index("example") for name in MODELS}
    refuse_nothing(rows, len(told["before"]))
    ids = list(told["before"].index)
    both = [i for i in ids if told["before"]["text"][i] == told["after"]["text"][i]]
    flows = {
        flow: _compared(table, "flow", flow, both, numbers, seed) for flow in (*SHOWN_FLOWS, FROM)
    }  # of the same answer only: percent of two answers' probabilities say nothing of one another
    masses = {flow: _compared(table, "mass", flow, ids, numbers, seed) for flow in SHOWN_FLOWS}
    states = {name: [0, *(layer + 1 for layer in own)] for name, own in numbers.items()}
    alike = _compared(table, "alike", None, ids, states, seed)
    _correct([*flows.values(), *masses.values(), alike])
    return {
        "n": len(ids), "n_same": len(both), "n_skipped": len(skipped(rows)), "skipped": skipped(rows), "layers": dict(numbers),
        "answers": _answers(told, ids), "kept_tokens": float(told["after"]["n"].mean()),
        "flows": flows, "masses": masses, "alike": alike, "cutoff": {name: _cutoff(table, name, both, numbers[name], seed) for name in MODELS},
    }  # fmt: skip


def _matrix(
    table: pd.DataFrame, what: str, flow: str | None, name: str, ids: Sequence[str], layers: Sequence[int]
) -> np.ndarray:
    """Values (example layer) of one model."""
    own = table[(table["what"] == what) & (table["model"] == name)]
    own = own if flow is None else own[own["flow"] == flow]
    return (
        own.pivot_table(index="example", columns="layer", values="value")
        .reindex(index=list(ids), columns=list(layers))
        .to_numpy(float)
    )


def _compared(
    table: pd.DataFrame, what: str, flow: str | None, ids: Sequence[str], layers: Mapping[str, Sequence[int]], seed: int
) -> dict[str, Any]:
    """Both models' curves, and their paired difference at the layers that both have."""
    found = {name: _matrix(table, what, flow, name, ids, layers[name]) for name in MODELS}
    there = [layer for layer, column in zip(layers["after"], found["after"].T, strict=True) if not np.isnan(column).all()]
    both = [layer for layer in layers["before"] if layer in there]
    curves = {name: curve(found[name], layers[name], seed) for name in MODELS}
    if len(ids) < 2:
        return {
            **curves,
            "difference": {"layers": both, "mean": [None] * len(both), "low": None, "high": None, "p": [None] * len(both)},
        }
    gap = (
        found["after"][:, [list(layers["after"]).index(layer) for layer in both]]
        - found["before"][:, [list(layers["before"]).index(layer) for layer in both]]
    )
    mean, low, high = bootstrap_mean(gap, seed)
    p = np.minimum(1.0, 2 * np.minimum(sign_flip(gap, seed), sign_flip(-gap, seed)))
    lists = {name: np.asarray(side).tolist() for name, side in (("mean", mean), ("low", low), ("high", high), ("p", p))}
    return {**curves, "difference": {"layers": both, **lists}}


def _correct(every: Sequence[dict[str, Any]]) -> None:
    """q-values over all curves and layers at once."""
    p = [np.array(one["difference"]["p"], dtype=float) for one in every]
    q = np.split(benjamini_hochberg(np.concatenate(p)), np.cumsum([len(one) for one in p])[:-1])
    for one, own in zip(every, q, strict=True):
        one["difference"]["q"] = [None if np.isnan(value) else float(value) for value in own]


def _cutoff(table: pd.DataFrame, name: str, ids: Sequence[str], layers: Sequence[int], seed: int) -> dict[str, Any] | None:
    """From which layer of the dense model's the picture no longer matters."""
    if not ids:
        return None
    found = cutoff_layer(_matrix(table, "flow", FROM, name, ids, layers), seed=seed)
    number = [*layers, layers[-1] + 1]
    return {"layer": number[found.layer], "low": number[found.low], "high": number[found.high], "tolerance": found.tolerance}


def _answers(told: Mapping[str, pd.DataFrame], ids: Sequence[str]) -> dict[str, Any]:
    """Accuracies, McNemar's test, and the items that broke and were mended by kind of question."""
    right = {name: told[name].loc[list(ids), "right"].to_numpy(bool) for name in MODELS}
    kinds = told["before"].loc[list(ids), "kind"].to_numpy(str)
    by_kind = {}
    for kind in sorted(set(kinds)):
        own = kinds == kind
        broke, mended = right["before"] & ~right["after"] & own, right["after"] & ~right["before"] & own
        by_kind[kind or "all"] = {
            "n": int(own.sum()), "before": int(right["before"][own].sum()), "after": int(right["after"][own].sum()),
            "broke": [_item(told, ids[i]) for i in np.flatnonzero(broke).tolist()], "mended": [_item(told, ids[i]) for i in np.flatnonzero(mended).tolist()],
        }  # fmt: skip
    return {name: _share(right[name]) for name in MODELS} | {"p": mcnemar(right["before"], right["after"]), "by_kind": by_kind}


def _share(right: np.ndarray) -> dict[str, float]:
    low, high = wilson(int(right.sum()), len(right))
    return {"value": float(right.mean()), "low": low, "high": high}


def _item(told: Mapping[str, pd.DataFrame], name: str) -> dict[str, str]:
    return {"example": name, "before": str(told["before"]["said"][name]), "after": str(told["after"]["said"][name])}


# --- figures ---------------------------------------------------------------------------------------------------------


def figures(run: Run, summary: Summary) -> None:
    """Flows, attention and likeness of both models over the dense model's layers."""
    layers = summary["layers"]["before"]
    if summary["n_same"]:
        shown = [(name, _lines(summary["flows"][name], layers)) for name in (*SHOWN_FLOWS, FROM)]
        run.figure(
            "flow", *panels.curves(shown, [layers] * len(shown), "layer of the dense model", "answer's probability, % change")
        )
    masses = [(f"{name}, attention", _lines(summary["masses"][name], layers)) for name in SHOWN_FLOWS]
    run.figure("attention", *panels.curves(masses, [layers] * len(masses), "layer of the dense model", "attention mass"))
    states = [0, *(layer + 1 for layer in layers)]
    title = "what stays of the picture, and the words"
    run.figure(
        "alignment", *panels.curves([(title, _lines(summary["alike"], states))], [states], "state of the dense model", "SimAvg")
    )


def _lines(found: Mapping[str, Any], places: Sequence[int]) -> list[panels.Line]:
    """A line for each model; nothing where a layer is gone."""
    return [(NAMES[name], _spread(found[name], places), COLOURS[k], name == "after") for k, name in enumerate(MODELS)]


def _spread(own: Mapping[str, Any], places: Sequence[int]) -> dict[str, list[float]]:
    at = {layer: k for k, layer in enumerate(own["layers"])}
    return {
        side: [float("nan") if layer not in at or own[side][at[layer]] is None else own[side][at[layer]] for layer in places]
        for side in ("mean", "low", "high")
    }


# --- words -----------------------------------------------------------------------------------------------------------


def report(summary: Summary, setting: Setting) -> str:
    """The report as Markdown."""
    answers = summary["answers"]
    lines = [
        "# Before and after", "", "*What does compression change inside a model?*", "", _headline(summary), "",
        f"Compressed by: {'; '.join(_step(step) for step in summary['steps'])}. Data: {setting.data.name}, {summary['n']} examples"
        f"{', ' + str(summary['n_skipped']) + ' could not be used' if summary['n_skipped'] else ''}.", "",
        "## Where the answer's information flows", "",
    ]  # fmt: skip
    if summary["n_same"]:
        lines += [
            "![flow](figures/flow.png)", "",
            f"Change of the answer's probability when an edge is cut in a window of {summary['width']} layers, and (last panel) when the picture is "
            f"hidden from a layer on; mean and 95 % bootstrap interval over the {summary['n_same']} examples that both models answer alike. What is left "
            f"out is hidden by masks here, which changes no number; layers that are gone have no point.", "",
            *_cutoffs(summary), "", *_changed(summary["flows"], "percent"), "",
        ]  # fmt: skip
    else:
        lines += ["No example is answered alike by both: percent of two answers' probabilities say nothing of one another.", ""]
    lines += [
        "## Where attention goes", "", "![attention](figures/attention.png)", "", *_changed(summary["masses"], "of the mass"), "",
        "## How alike what is shown and the words are", "", "![alignment](figures/alignment.png)", "",
        f"Cosine of the mean token of what stays of the picture ({summary['kept_tokens']:.1f} tokens on average; the same positions in both models; where all leave in the end, up to there) and of the "
        f"mean word, of one example.", "", *_changed({"likeness": summary["alike"]}, "of cosine"), "",
        "## Which questions broke", "", _broken(answers["by_kind"]), "",
    ]  # fmt: skip
    if summary["skipped"]:
        lines += ["## Examples that could not be used", "", *(f"- {one}" for one in summary["skipped"][:20]), ""]
    return "\n".join(lines)


def _headline(summary: Summary) -> str:
    answers = summary["answers"]
    shares = " and ".join(
        f"the {NAMES[name]} model {answers[name]['value']:.1%} [{answers[name]['low']:.1%}, {answers[name]['high']:.1%}]"
        for name in MODELS
    )
    every = {**summary["flows"], **{f"attention {k}": v for k, v in summary["masses"].items()}, "likeness": summary["alike"]}
    sure, tests = (sum(one) for one in zip(*(_count(found["difference"]) for found in every.values()), strict=True))
    return (
        f"Of {summary['n']} questions {shares} answers right (McNemar p = {answers['p']:.3g}). Of {tests} paired comparisons inside (flows, attention and "
        f"likeness by layer) {sure} differ at a false discovery rate of 5 %."
    )


def _count(difference: Mapping[str, Any]) -> tuple[int, int]:
    known = [q for q in difference["q"] if q is not None]
    return sum(q < LEVEL for q in known), len(known)


def _cutoffs(summary: Summary) -> list[str]:
    found = summary["cutoff"]
    told = [
        f"{NAMES[name]}: from layer {one['layer']} [{one['low']}, {one['high']}]" for name, one in found.items() if one is not None
    ]  # fmt: skip
    return [f"The picture no longer matters (within {found['before']['tolerance']:g} %): {'; '.join(told)}."]


def _changed(every: Mapping[str, Mapping[str, Any]], unit: str) -> list[str]:
    """The largest sure difference of each curve."""
    lines = []
    for name, found in every.items():
        gap = found["difference"]
        sure = [k for k, q in enumerate(gap["q"]) if q is not None and q < LEVEL]
        if not sure:
            lines.append(f"- {name}: no layer differs for sure.")
            continue
        k = max(sure, key=lambda i: abs(gap["mean"][i]))
        lines.append(
            f"- {name}: {len(sure)} of {len(gap['layers'])} layers differ; most at layer {gap['layers'][k]}: {gap['mean'][k]:+.3g} "
            f"[{gap['low'][k]:.3g}, {gap['high'][k]:.3g}] {unit} (q = {gap['q'][k]:.2g})."
        )
    return lines


def _step(step: Mapping[str, Any]) -> str:
    settings = ", ".join(
        f"{key} {value}" for key, value in step["settings"].items() if value not in (None, "", {}, [], False, 0)
    )
    return f"**{step['title']}** ({settings})" if settings else f"**{step['title']}**"


def _broken(by_kind: Mapping[str, Mapping[str, Any]]) -> str:
    lines = [
        "| kind | n | right before | right after | broke | mended | which broke (said before, after) |",
        "|---|---|---|---|---|---|---|",
    ]
    for kind, one in by_kind.items():
        which = "; ".join(f"{item['example']} ({item['before']}, {item['after']})" for item in one["broke"][:6])
        more = f" and {len(one['broke']) - 6} more" if len(one["broke"]) > 6 else ""
        lines.append(
            f"| {kind} | {one['n']} | {one['before']} | {one['after']} | {len(one['broke'])} | {len(one['mended'])} | {which}{more} |"
        )
    return "\n".join(lines)
