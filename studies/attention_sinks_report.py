"""The attention-sinks study's numbers, figures and words, made from its records."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from probe.analysis.sinks import THRESHOLDS
from probe.analysis.stats import sign_flip
from probe.plots import sinks as plots
from studies.run import Run
from studies.study import Setting, Summary
from studies.telling import above, below, ranged
from studies.work import curve, interval, picked, refuse_nothing, skipped

KINDS = ("shown", "text", "control")
GROUPS = ("sinks", "highest")
EFFECTS = ("relative", "log_prob", "flip")


def summarise(rows: pa.Table, plan: Any, layers: Sequence[int], dimensions: Sequence[int], heads: int) -> Summary:
    """Everything that the report says, as numbers. Raises DataError when no example could be used."""
    names = list(dict.fromkeys(picked(rows, what="mass")["example"].to_pylist()))
    refuse_nothing(rows, len(names))
    left = skipped(rows)
    found = {kind: _values(rows, "count", kind) for kind in KINDS}
    at_tau = found["shown"][:, -1]
    shape = (len(names), len(layers), heads)
    centric = _values(rows, "centric", "").reshape(shape)
    return {
        "n": len(names), "n_skipped": len(left), "skipped": left, "tau": plan.tau, "dimensions": list(dimensions), "layers": list(layers),
        "n_with_sinks": int((at_tau > 0).sum()), "sinks": interval(at_tau, plan.seed), "shown": float(np.mean(_sizes(rows, "count", "shown"))),
        "first_position": interval(_values(rows, "first", "phi").max(1), plan.seed),
        "by_threshold": {kind: _by_threshold(rows, kind, found[kind], plan.seed) for kind in KINDS},
        "largest": {kind: curve(_values(rows, "largest", kind), layers, plan.seed) for kind in KINDS},
        "place": {group: _place(rows, group, plan.seed) for group in GROUPS},
        "received": {group: _received(rows, group, plan.seed) for group in GROUPS},
        "correlation": curve(_values(rows, "correlation", ""), layers, plan.seed),
        "centric": interval(centric.mean((1, 2)), plan.seed), "centric_by_layer": curve(centric.mean(2), layers, plan.seed),
        "heads": {
            "mass": _values(rows, "mass", "").reshape(shape).mean(0).tolist(), "centric": centric.mean(0).tolist(),
            "sink_share": _known_mean(_values(rows, "sink_share", "").reshape(shape)),
        },
        "min_mass": plan.min_mass, "max_share": plan.max_share, "count": plan.count, "draws": plan.draws,
        "cause": {name: _effect(rows, name, plan.seed) for name in ("everything", "nothing", *GROUPS)},
        "paired": {group: _paired(rows, group, plan.seed) for group in GROUPS},
    }  # fmt: skip


def _values(rows: pa.Table, what: str, key: str) -> np.ndarray:
    """(example value) of one sort of rows; what is not known is NaN. (0, 0) where there are none."""
    found = np.array(picked(rows, what=what, key=key)["values"].to_pylist(), dtype=float)
    return found if found.size else np.empty((0, 0))


def _sizes(rows: pa.Table, what: str, key: str) -> np.ndarray:
    return np.array(picked(rows, what=what, key=key)["n"].to_pylist(), dtype=float)


def _by_threshold(rows: pa.Table, kind: str, found: np.ndarray, seed: int) -> dict[str, Any]:
    """The share of positions above each threshold, in percent, layers averaged."""
    share = 100 * found[:, :-1] / _sizes(rows, "count", kind)[:, None]
    return curve(share, list(range(len(THRESHOLDS))), seed)


def _known_mean(table: np.ndarray) -> list[list[float | None]] | None:
    """Mean over the examples that have a number (layer head); None where no example has any."""
    known = ~np.isnan(table)
    if not known.any():
        return None
    total = np.where(known, table, 0.0).sum(0) / np.maximum(known.sum(0), 1)
    made: list[list[float | None]] = np.where(known.any(0), total, np.nan).tolist()
    return made


def _place(rows: pa.Table, group: str, seed: int) -> dict[str, Any]:
    found = _values(rows, "place", group)
    found = found[~np.isnan(found).any(1)] if found.size else np.empty((0, 2))  # no boxes, or no sinks
    gap = found[:, 0] - found[:, 1]
    above, below = (float(sign_flip(side, seed)) if len(gap) > 1 else None for side in (gap, -gap))
    return {
        **interval(found[:, 0], seed), "chance": interval(found[:, 1], seed), "difference": interval(gap, seed),
        "p_value": None if above is None or below is None else min(1.0, 2 * min(above, below)),
    }  # fmt: skip


def _received(rows: pa.Table, group: str, seed: int) -> dict[str, Any]:
    """Attention of one position of a group over that of one outside it."""
    found = _values(rows, "received", group)
    with np.errstate(invalid="ignore", divide="ignore"):
        ratio = np.where(found[:, 1] > 0, found[:, 0] / found[:, 1], np.nan)
    return {**interval(ratio, seed), "inside": interval(found[:, 0], seed), "outside": interval(found[:, 1], seed)}


def _effect(rows: pa.Table, name: str, seed: int) -> dict[str, Any] | None:
    found = _values(rows, "cause", name)
    if not found.size:
        return None
    made: dict[str, Any] = {effect: interval(found[:, i], seed) for i, effect in enumerate(EFFECTS)}
    return {**made, "positions": float(found[:, -1].mean()), "n": len(found)}


def _paired(rows: pa.Table, group: str, seed: int) -> dict[str, Any] | None:
    """A group's knock-out beside that of as many random positions, on the same examples."""
    own, other = _values(rows, "cause", group), _values(rows, "cause", f"random for {group}")
    if not own.size:
        return None
    gap = own - other
    both = [sign_flip(side, seed) if len(gap) > 1 else np.full(len(EFFECTS), np.nan) for side in (gap, -gap)]
    p = np.minimum(1.0, 2 * np.minimum(*both))
    return {
        effect: {
            "own": interval(own[:, i], seed), "random": interval(other[:, i], seed), "difference": interval(gap[:, i], seed),
            "p_value": None if np.isnan(p[i]) else float(p[i]),
        }
        for i, effect in enumerate(EFFECTS)
    }  # fmt: skip


def figures(run: Run, summary: Summary) -> None:
    """Scores, heads, and what hiding does."""
    run.figure("sink-scores", *plots.scores(summary))
    run.figure("heads", *plots.heads(summary))
    run.figure("hiding", *plots.hiding(summary))


# --- words -----------------------------------------------------------------------------------------------------------


def report(summary: Summary, setting: Setting) -> str:
    """The report: the answer first, then the figures."""
    dims = ", ".join(map(str, summary["dimensions"]))
    lines = [
        "# Attention sinks", "",
        f"*Which tokens of what is shown are sinks, and does it matter where their attention goes?* Model `{setting.subject.name}`, data "
        f"`{setting.data.name}`, {summary['n']} examples with {summary['shown']:.1f} positions shown; layers {summary['layers'][0]} to "
        f"{summary['layers'][-1]}, dimensions {dims}.", "",
        "## The answer", "",
        *(f"- {line}" for line in (*_found(summary), *_where(summary), *_matters(summary), *_heads(summary))),
        *([f"- {summary['n_skipped']} examples could not be used; the first: {summary['skipped'][0]}"] if summary["n_skipped"] else []), "",
        "## How many there are depends on the threshold", "", "![sink scores](figures/sink-scores.png)", "",
        "Left, the share of positions whose score is above a threshold, layers averaged; right, the largest score of a position, by layer. The score is "
        "the largest of the chosen dimensions of what enters a layer, beside the state's root mean square. Control: the shown positions in as "
        "many other dimensions, drawn at random: what any dimensions would give.", "",
        "Rank correlation, over positions, of the score and the attention from the last row, by layer: "
        + ", ".join(f"{layer}: {_number(_at(summary['correlation'], i))}" for i, layer in enumerate(summary["correlation"]["layers"])) + ".", "",
        "## Does it matter", "", "![hiding](figures/hiding.png)", "",
        f"Positions hidden from all words after them, before the softmax, in the layers where they are sinks (or in all, for the {summary['count']} positions of the "
        f"highest score, which need not be sinks); beside it, {summary['draws']} random sets of as many positions that are none. Change of the "
        "log-probability of the model's own first answer token, nats.", "",
        *_table(summary),
        "## Heads", "", "![heads](figures/heads.png)", "",
        f"Left, the attention of the last row to what is shown; right, how often a head is image-centric: at least {summary['min_mass']:g} of its attention "
        f"goes to what is shown, and at most {summary['max_share']:g} of that to sinks.", "",
        "The redistribution of the paper moves attention after the softmax; edits here act before it, so it is not carried out.", "",
    ]  # fmt: skip
    return "\n".join(lines)


def _found(summary: Summary) -> list[str]:
    if summary["n_with_sinks"]:
        first = (
            f"{_number(summary['sinks'], 2)} of {summary['shown']:.1f} positions shown are sinks in a layer (score above {summary['tau']:g}); "
            f"{summary['n_with_sinks']} of {summary['n']} examples have one."
        )
    else:
        best = max(summary["largest"]["shown"]["mean"])
        first = (
            f"**No sinks**: no position of what is shown scores above {summary['tau']:g} in any of {summary['n']} examples (the largest, on average over "
            f"examples, is {best:.1f} in its best layer)."
        )
    massive = summary["first_position"]["value"]
    second = f"The first position itself reaches {_number(summary['first_position'], 1)}" + (
        "." if massive > summary["tau"] else ": this model has no massive activations, and its dimensions are not special ones."
    )
    return [first, second]


def _where(summary: Summary) -> list[str]:
    lines = []
    for group, name in (("sinks", "Sinks"), ("highest", f"The {summary['count']} positions of the highest score")):
        found, ratio = summary["place"][group], summary["received"][group]
        if found["value"] is not None:
            lines.append(
                f"{name} lie on the background {_percent(found)} of the time, where chance is {found['chance']['value']:.0%}: "
                f"{_points(found['difference'])}, "
                f"n = {found['n']}{_p(found)}."
            )
        if ratio["value"] is not None:
            lines.append(f"{name} receive {_number(ratio, 2)} times the attention of another position shown, n = {ratio['n']}.")
    return lines


def _matters(summary: Summary) -> list[str]:
    lines = []
    for group, name in (
        ("sinks", "Hiding the sinks"),
        ("highest", f"Hiding the {summary['count']} positions of the highest score"),
    ):
        paired = summary["paired"][group]
        if paired is not None:
            one = paired["log_prob"]
            gap = one["difference"]
            apart = above(gap) or below(gap)
            verdict = (
                f"**matters {'less' if gap['value'] > 0 else 'more'}** than hiding as many other positions"
                if apart
                else "**cannot be told from** hiding as many other positions"
            )
            lines.append(
                f"{name} {verdict}: the answer's log-probability changes by {_number(one['own'])} against "
                f"{_number(one['random'])}, a paired difference of {_number(gap)}, n = {gap['n']}{_p(one)}."
            )
    tested = summary["cause"]["sinks"]["n"] if summary["cause"]["sinks"] else 0
    if left := summary["n_with_sinks"] - tested:
        lines.append(
            f"In {left} examples more positions are sinks than not in a layer: there are not as many others to hide instead."
        )
    everything = summary["cause"]["everything"]["log_prob"]
    return [
        *lines,
        f"For scale: hiding all that is shown changes it by {_number(everything)}, hiding nothing by {summary['cause']['nothing']['log_prob']['value']:.1e}.",
    ]


def _heads(summary: Summary) -> list[str]:
    return [f"{_percent(summary['centric'])} of the heads are image-centric on an example, layers taken together."]


def _table(summary: Summary) -> list[str]:
    lines = [
        "| hidden | positions | log-probability | probability, percent | answers changed | n |",
        "|---|---|---|---|---|---|",
    ]
    for name, found in summary["cause"].items():
        if found is not None:
            lines.append(
                f"| {name} | {found['positions']:.1f} | {_number(found['log_prob'])} | {_number(found['relative'], 1)} | {_percent(found['flip'])} | {found['n']} |"
            )
        if name in GROUPS and (paired := summary["paired"][name]) is not None:
            cells = f"{_number(paired['log_prob']['random'])} | {_number(paired['relative']['random'], 1)} | {_percent(paired['flip']['random'])}"
            lines.append(f"| random for {name} | {found['positions']:.1f} | {cells} | {found['n']} |")
    return [*lines, ""]


def _at(found: dict[str, Any], i: int) -> dict[str, Any]:
    return {"value": found["mean"][i], "low": found["low"][i], "high": found["high"][i]}


def _p(found: dict[str, Any]) -> str:
    return "" if found["p_value"] is None else f", p = {found['p_value']:.3f}"


def _points(found: dict[str, Any]) -> str:
    scaled = {side: None if found[side] is None else 100 * found[side] for side in ("value", "low", "high")}
    return f"{ranged({**found, **scaled}, '+.1f')} points"


def _percent(found: dict[str, Any]) -> str:
    return "-" if found["value"] is None else ranged(found, ".1%")


def _number(found: dict[str, Any], digits: int = 3) -> str:
    if found["value"] is None:
        return "-"
    return ranged(found, f".{digits}f")
