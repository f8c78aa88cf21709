"""The numbers, figures and words of the study `subnetworks`."""

import json
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np
import pyarrow as pa

from probe.analysis.overlap import chance_iou
from probe.analysis.stats import benjamini_hochberg, ends, mcnemar, paired_difference
from probe.plots.panels import GREY, Line, Series, curves, tables, values
from probe.plots.style import COLOURS
from studies.run import Run
from studies.subnetwork_groups import BESIDE, TOGETHER, Family
from studies.telling import bracketed
from studies.tradeoffs_report import surely_worse
from studies.work import interval

Points = Sequence[Mapping[str, Any]]
ASKED = {"shown": "Asked as the data show it", "words": "Asked in words alone"}
METHODS = ("magnitude", "wanda", "sparsegpt")
COLOUR = dict(zip((*METHODS, "owl", "ecoflap", "tamp"), COLOURS, strict=False))
FAMILY = {"modality": "masks of modalities", "kind": "masks of kinds of questions"}


# --- numbers --------------------------------------------------------------------------------------------------------


def summarise(
    points: Points, rows: pa.Table, families: Sequence[Family], shares: Sequence[float], seed: int
) -> dict[str, Any]:  # fmt: skip
    found = rows.to_pylist()
    words = next((p["text_only"].get("what", "") for p in points if p["baseline"] == "full"), "")
    return {
        "lines": _lines(points, shares), "words": words, "against_wanda": _against(points, found, shares, seed),
        "overlap": {f.by: _overlap(f, found) for f in families}, "cross": {f.by: _cross(f, found, seed) for f in families},
    }  # fmt: skip


def _accuracy(point: Mapping[str, Any], asked: str) -> Mapping[str, Any]:
    if asked == "shown":
        return {"value": point["accuracy"], "low": point["accuracy_low"], "high": point["accuracy_high"]}
    accuracy: Mapping[str, Any] = point["text_only"].get("accuracy", {"value": None, "low": None, "high": None})
    return accuracy


def _lines(points: Points, shares: Sequence[float]) -> dict[str, dict[str, Any]]:
    """Accuracy against the percentage that goes, of every method and allocation, from the dense model on."""
    by_name = {point["name"]: point for point in points}
    full, names = by_name["full"], [name for name in COLOUR if any(f"{name} {s:g}" in by_name for s in shares)]
    made: dict[str, dict[str, Any]] = {}
    for asked in ASKED:
        for name in names:
            there = [full, *(by_name.get(f"{name} {s:g}") for s in shares)]
            each = [_accuracy(p, asked) if p else {"value": None, "low": None, "high": None} for p in there]
            made.setdefault(asked, {})[name] = {
                "percent": [0, *(round(100 * s) for s in shares)],
                **{key: [one[side] for one in each] for key, side in (("mean", "value"), ("low", "low"), ("high", "high"))},
            }
    return made


def _against(points: Points, rows: Sequence[Mapping[str, Any]], shares: Sequence[float], seed: int) -> list[dict[str, Any]]:
    """Everything else at a sparsity against Wanda with even shares there, paired on the same questions; q over all of them."""
    right = _rights(rows)
    found = []
    for share in shares:
        base = right.get(f"wanda {share:g}")
        for name in (p["name"] for p in points if p["name"].partition(",")[0].endswith(f" {share:g}")):
            if base is not None and name != f"wanda {share:g}":
                found.append({"name": name, "sparsity": share, **_paired(right[name], base, seed)})
    return _with_q(found)


def _paired(these: np.ndarray, those: np.ndarray, seed: int) -> dict[str, float | None]:
    """How much more often these are right than those, on the same questions, and McNemar's p."""
    value, low, high = (float(x) for x in paired_difference(these.astype(np.float64), those.astype(np.float64), seed))
    low_end, high_end = ends(low, high)
    return {"value": value, "low": low_end, "high": high_end, "p": mcnemar(these, those)}


def _with_q(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    q = benjamini_hochberg(np.array([one["p"] for one in found], dtype=np.float64))
    return [{**one, "q": float(value)} for one, value in zip(found, q, strict=True)]


def _rights(rows: Sequence[Mapping[str, Any]]) -> dict[str, np.ndarray]:
    made: dict[str, list[bool]] = {}
    for row in rows:
        if row["what"] == "item":
            made.setdefault(row["name"], []).append(row["right"])
    return {name: np.array(values, dtype=bool) for name, values in made.items()}


def _overlap(family: Family, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    mine = [row for row in rows if row["what"] == "overlap" and row["text"] == family.by]
    whole = {(row["name"], row["other"]): row["value"] for row in mine if not row["example"]}
    names = [*family.names, "magnitude"]
    matrix = [[1.0 if a == b else whole.get((a, b), whole.get((b, a))) for b in names] for a in names]
    layers: dict[str, list[float]] = {}
    for row in mine:
        if row["example"]:
            layers.setdefault(f"{row['name']} and {row['other']}", []).append(row["value"])
    return {"groups": family.names, "masks": names, "iou": matrix, "chance": chance_iou(family.sparsity), "layers": layers}


def _cross(family: Family, rows: Sequence[Mapping[str, Any]], seed: int) -> dict[str, Any]:
    """Accuracy of every mask (row) on every group's questions (column), and each mask against the group's own."""
    right: dict[tuple[str, str], list[bool]] = {}
    for row in rows:
        if row["what"] == "cross" and row["text"] == family.by:
            right.setdefault((row["name"], row["other"]), []).append(row["right"])
    table = {key: np.array(value, dtype=bool) for key, value in right.items()}
    paired = []
    for column in family.names:
        own = table[column, column]
        for mask in (name for name in family.rows if name != column):
            paired.append({"mask": mask, "asked": column, **_paired(table[mask, column], own, seed)})
    return {
        "masks": family.rows, "groups": family.names, "n": [len(table[c, c]) for c in family.names],
        "calibration": [len(g.calibration) for g in family.groups],
        "accuracy": [[float(table[mask, column].mean()) for column in family.names] for mask in family.rows],
        "sparsity": {r["name"]: r["value"] for r in rows if r["what"] == "sparsity" and r["text"] == family.by},
        "against_own": _with_q(paired), "own_advantage": _own_advantage(family, table, seed),
    }  # fmt: skip


def _own_advantage(family: Family, table: Mapping[tuple[str, str], np.ndarray], seed: int) -> dict[str, Any]:
    """Right with the group's own mask, less the mean of right with the other groups', over all questions."""
    gains = [
        table[c, c].astype(float) - np.mean([table[r, c].astype(float) for r in family.names if r != c], 0)
        for c in family.names
    ]
    return interval(np.concatenate(gains), seed)


# --- figures --------------------------------------------------------------------------------------------------------


def figures(run: Run, summary: Mapping[str, Any]) -> None:
    panels: list[tuple[str, list[Line]]] = []
    for asked, lines in summary["lines"].items():
        drawn: list[Line] = [  # bands of the methods alone: six would hide one another
            (name, one if name in METHODS else {"mean": one["mean"]}, COLOUR[name], name not in METHODS)
            for name, one in lines.items()
        ]
        panels.append((ASKED[asked], drawn))
    percent = next(iter(summary["lines"]["shown"].values()))["percent"]
    run.figure("sparsity", *curves(panels, [percent] * len(panels), "weights that went, %", "accuracy"))
    run.figure("budget", *_budget(summary))
    for by, overlap in summary["overlap"].items():
        title = f"Overlap of {FAMILY[by]}"
        limits = (overlap["chance"], 1.0)
        run.figure(
            f"overlap-{by}",
            *tables(
                [title],
                [overlap["iou"]],
                overlap["masks"],
                overlap["masks"],
                limits,
                "Blues",
                f"IoU; {overlap['chance']:.2f} is chance",
            ),
        )
        cross = summary["cross"][by]
        rows = [f"{name} ({cross['sparsity'][name]:.0%})" for name in cross["masks"]]
        run.figure(f"cross-{by}", *tables(
            ["Accuracy"], [cross["accuracy"]], rows, cross["groups"], (0.0, 1.0), "Blues", "accuracy", down="pruned with the mask of (sparsity)",
            across="asked",
        ))  # fmt: skip
    if summary["overlap"]:
        run.figure("overlap-layers", *_by_layer(summary["overlap"]))


def _budget(summary: Mapping[str, Any]) -> Any:
    """What every configuration of one budget costs, against the dense model."""
    at = summary["at"]
    here = [
        p for p in summary["points"] if p["name"].partition(",")[0].endswith((f" {at:g}", " 2:4" if at == 0.5 else " none"))
    ]
    shown: list[Series] = [("", {p["name"]: p["difference"] for p in here if p.get("difference")}, COLOURS[0])]
    panels: list[tuple[str, list[Series]]] = [("Asked as the data show it", shown)]
    words = {p["name"]: p["text_only"]["difference"] for p in here if p["text_only"].get("difference")}
    if words:
        panels.append(("Asked in words alone", [("", words, COLOURS[0])]))
    return values(panels, "accuracy less the dense model's", line=0.0)


def _by_layer(overlap: Mapping[str, Any]) -> Any:
    panels, places = [], []
    for by, found in overlap.items():
        count = len(next(iter(found["layers"].values())))
        each = np.array(list(found["layers"].values()))
        if len(each) <= 6:
            lines: list[Line] = [
                (pair, {"mean": v}, COLOURS[k % len(COLOURS)], False) for k, (pair, v) in enumerate(found["layers"].items())
            ]
        else:
            spread = {"mean": each.mean(0).tolist(), "low": each.min(0).tolist(), "high": each.max(0).tolist()}
            lines = [(f"mean and range of {len(each)} pairs of kinds", spread, COLOURS[1], False)]
        lines.append(("chance", {"mean": [found["chance"]] * count}, GREY, True))
        panels.append((FAMILY[by].capitalize(), lines))
        places.append(list(range(count)))
    return curves(panels, places, "layer", "IoU of what is kept")


# --- words ----------------------------------------------------------------------------------------------------------


def report(summary: Mapping[str, Any]) -> str:
    full = next(p for p in summary["points"] if p["baseline"] == "full")
    steps = [p for p in summary["points"] if not p["baseline"]]
    lines = [
        "# Subnetworks", "", "*Which weights does the model need, and do tasks and modalities need the same ones?*", "", _answer(summary, full, steps), "",
        "![accuracy against sparsity](figures/sparsity.png)", "",
        f"Accuracy against the share of the decoder's linear weights that went; bands are 95 % Wilson intervals over {summary['n']} questions. Dashed lines: "
        f"Wanda with layers given different shares of the same budget. Words alone: {summary['words'] or 'not asked'}. "
        f"{summary['calibration']} other examples calibrated.", "",
        f"![at {summary['at']:g}](figures/budget.png)", "",
        f"What {summary['at']:.0%} of the weights cost in the figure, and every configuration in the table; differences to the dense model are paired, with 95 % bootstrap intervals.", "",
        _table(steps), "", _compared(summary), "",
    ]  # fmt: skip
    worse = surely_worse(steps)
    lines += [
        f"{len(worse)} of {len(steps)} configurations surely lost accuracy (McNemar, false discovery rate 5 % over all of them).",
        "",
    ]
    for by in summary["overlap"]:
        lines += _family_told(by, summary["overlap"][by], summary["cross"][by])
    if summary["overlap"]:
        lines += [
            "![overlap by layer](figures/overlap-layers.png)",
            "",
            "The overlap of each layer's masks by itself; dashed: two random masks of this sparsity.",
            "",
        ]
    if summary["skipped"]:
        lines += ["## What was refused", "", *(f"- {name}: {why}" for name, why in summary["skipped"].items()), ""]
    return "\n".join(lines)


def _answer(summary: Mapping[str, Any], full: Mapping[str, Any], steps: Points) -> str:
    text = f"The dense model answers {full['accuracy']:.1%} of {summary['n']} questions. "
    kept = [p for p in steps if p.get("difference") and _low(p["difference"]) > -0.05]
    shares = {p["name"]: _share(p) for p in kept}
    if shares:
        best = max(shares.values())
        names = [name for name, share in shares.items() if share == best]
        text += f"Up to {best:.0%} of the weights went at a loss below 5 points by its interval ({', '.join(names)}). "
    else:
        text += "No configuration lost less than 5 points by its interval. "
    for by, overlap in summary["overlap"].items():
        pairs = [overlap["iou"][i][j] for i, j in combinations(range(len(overlap["groups"])), 2)]
        gain = summary["cross"][by]["own_advantage"]
        text += (
            f"Two {FAMILY[by]} share {_span(pairs)} of what either keeps (chance {overlap['chance']:.2f}; with the mask of the least weights, which knows nothing "
            f"of inputs, each shares {_span([row[-1] for row in overlap['iou'][:-1]])}); a group's own mask gives {bracketed(gain, '+.1%')} right answers beside the "
            f"other groups' masks. "
        )
    return text


def _span(found: Sequence[float]) -> str:
    low, high = f"{min(found):.2f}", f"{max(found):.2f}"
    return low if low == high else f"{low} to {high}"


def _share(point: Mapping[str, Any]) -> float:
    settings = json.loads(point["recipe"])[0]["prune"]
    if "n_of_m" in settings:
        gone, of = map(int, settings["n_of_m"].split(":"))
        return gone / of
    return float(settings["sparsity"])


def _table(steps: Points) -> str:
    lines = ["| configuration | accuracy | against dense | in words alone | against dense |", "|---|---|---|---|---|"]
    for p in steps:
        change, words = p.get("difference"), p["text_only"]
        told = [_told(change), _told(words.get("difference"))]
        value = (words.get("accuracy") or {}).get("value")
        lines.append(
            f"| {p['name']} | {p['accuracy']:.1%} | {told[0]} | {'' if value is None else f'{value:.1%}'} | {told[1]} |"
        )
    return "\n".join(lines)


def _told(change: Mapping[str, Any] | None) -> str:
    """A difference with its interval, where it has one."""
    if change is None:
        return ""
    return f"{change['value']:+.1%}" + ("" if change["low"] is None else f" [{change['low']:+.1%}, {change['high']:+.1%}]")


def _low(change: Mapping[str, Any]) -> float:
    return float(change["value"] if change["low"] is None else change["low"])


def _compared(summary: Mapping[str, Any]) -> str:
    sure = [one for one in summary["against_wanda"] if one["q"] < 0.05]
    if not summary["against_wanda"]:
        return ""
    told = "; ".join(f"{one['name']} {_told(one)}" for one in sure) or "none"
    return (
        f"Against Wanda with even shares at the same sparsity, paired on the same questions ({len(summary['against_wanda'])} comparisons, false discovery rate "
        f"5 %), these differ: {told}."
    )


def _family_told(by: str, overlap: Mapping[str, Any], cross: Mapping[str, Any]) -> list[str]:
    sure = [one for one in cross["against_own"] if one["q"] < 0.05 and one["mask"] in cross["groups"]]
    pairs = len(cross["groups"]) * (len(cross["groups"]) - 1)
    together = "; ".join(f"{name} {cross['sparsity'][name]:.0%}" for name in TOGETHER)
    told = ", ".join(
        f"{n} ({c} calibrated, {a} asked)" for n, c, a in zip(cross["groups"], cross["calibration"], cross["n"], strict=True)
    )
    lines = [
        f"## {FAMILY[by].capitalize()}", "", f"![overlap](figures/overlap-{by}.png)", "",
        f"Intersection over union of what Wanda keeps for {told}; two random masks share {overlap['chance']:.2f}. All masks see the same weights, "
        f"hence the last row: the least weights of each row, whatever enters.", "",
        f"![pruned with one, asked another](figures/cross-{by}.png)", "",
        f"Rows: whose mask the model was pruned with (in brackets how much is gone; together: {together}); columns: what it was asked. *{BESIDE[1]}* takes "
        f"the least weights of each row, *{BESIDE[2]}* any. Of {pairs} pairs of another group's mask and the group's own, {len(sure)} differ surely (McNemar, false "
        f"discovery rate 5 % over the whole table).", "",
    ]  # fmt: skip
    lines += [f"- asked {one['asked']} with the mask of {one['mask']}: {_told(one)} against its own" for one in sure]
    return [*lines, ""] if sure else lines
