"""The attention-shift study's numbers, figures and words, made from its records."""

from typing import Any

import numpy as np
import pyarrow as pa

from probe.analysis.shift import MIN_LAYERS, correlations, shift, shift_of_others, shift_of_shuffled, standard
from probe.plots import shift as plots
from probe.surroundings import SETS
from studies.run import Run
from studies.study import Setting, Summary
from studies.telling import ranged
from studies.work import curve, interval, picked, refuse_nothing, skipped

Table = dict[str, np.ndarray]
KEYS = (*SETS, "first", "rest")
READINGS = {"with": "before", "without": "rest"}  # with the first position among the words before, or without it
NAMES = {"with": "with the first position", "without": "without the first position"}


def summarise(rows: pa.Table, layers: list[int], config: dict[str, Any]) -> Summary:
    """Everything that the report says, as numbers. Raises DataError when no example could be used."""
    own = picked(rows, what="laws")
    names = list(dict.fromkeys(own["example"].to_pylist()))
    refuse_nothing(rows, len(names))
    series: Table = {key: np.array(picked(own, key=key)["values"].to_pylist(), dtype=float) for key in KEYS}
    sizes = {key: np.array(picked(own, key=key)["n"].to_pylist()) for key in KEYS}
    series["rest"][sizes["rest"] == 0] = np.nan
    shifts = {name: _shift(series[key], series["after"], config["seed"]) for name, key in READINGS.items()}
    left = skipped(rows)
    return {
        "n": len(names), "n_skipped": len(left), "skipped": left, "rows": config["rows"], "per_pair": config["per_pair"],
        "n_layers": len(layers), "few_layers": len(layers) < MIN_LAYERS, "shift": shifts["with"], "shift_without_first": shifts["without"],
        "correlation": _pairs(series, config["seed"]), "laws": _curves(series, layers, config["seed"]),
        "courses": _courses(series, layers, config["seed"]),
        "positions": {key: float(found.mean()) for key, found in sizes.items()},
    }  # fmt: skip


def _shift(before: np.ndarray, after: np.ndarray, seed: int) -> dict[str, Any]:
    """Shift with its interval, and both nulls."""
    own = shift(before, after)
    others = shift_of_others(before, after)
    known = ~np.isnan(own)
    found = {**interval(own, seed), "n_constant": int((~known).sum())}
    shuffled = shift_of_shuffled(before, after, seed) if known.any() else np.array([np.nan])
    low, high = (float(end) for end in np.percentile(shuffled, [2.5, 97.5]))
    apart = np.abs(shuffled - 1) >= abs(float(np.nanmean(own)) - 1) - 1e-12 if known.any() else np.array([True])
    return {
        **found, "shuffled": {"value": float(shuffled.mean()), "low": low, "high": high},
        "p_value": float((1 + apart.sum()) / (1 + len(shuffled))) if known.any() else None,
        "others": interval(others, seed), "others_less_own": interval(others - own, seed),
    }  # fmt: skip


def _pairs(series: Table, seed: int) -> dict[str, Any]:
    """Correlations over layers of every two of the three series."""
    pairs = (("before", "after"), ("before", "shown"), ("shown", "after"))
    return {f"{a} and {b}": interval(correlations(series[a], series[b]), seed) for a, b in pairs}


def _curves(series: Table, layers: list[int], seed: int) -> dict[str, Any]:
    shown = {key: values for key, values in series.items() if np.nanmax(values, initial=0.0) > 0}
    return {key: curve(values, layers, seed) for key, values in shown.items()}


def _courses(series: Table, layers: list[int], seed: int) -> dict[str, Any]:
    return {key: curve(standard(series[key]), layers, seed) for key in ("before", "rest", "shown", "after")}


def figures(run: Run, summary: Summary) -> None:
    """The masses and their courses, and Shift beside its nulls."""
    run.figure("attention-by-layer", *plots.laws(summary))
    run.figure("attention-shift", *plots.shifts(summary))


def report(summary: Summary, setting: Setting) -> str:
    """The report: the answer first, then the figures."""
    received = "attention for each visible pair" if summary["per_pair"] else "attention"
    rows = "the words after it" if summary["rows"] == "after" else "all positions"
    lines = [
        "# Attention shift", "",
        f"*Does attention to the words before and after what is shown move alike through the layers?* Model `{setting.subject.name}` "
        f"({summary['n_layers']} layers with attention), data `{setting.data.name}`, {summary['n']} examples; rows: {rows}.", "",
        "## The answer", "",
        *(f"- {_sentence(summary[key], NAMES[name])}" for key, name in (("shift", "with"), ("shift_without_first", "without"))),
        *_cautions(summary), "",
        "![attention shift](figures/attention-shift.png)", "",
        "Shift is one less the correlation, over layers, of the attention to the words before and to the words after: 0 where both take the same "
        "course, 2 where they take opposite ones. Shuffled: the layers of one series change places, in all examples alike. Other examples: an "
        "example's words before beside the words after of every other example; where that is as low, the course is the model's habit "
        "and not the example's own.", "",
        "| reading | Shift | shuffled layers | p | other examples | others less own | n | constant |", "|---|---|---|---|---|---|---|---|",
        *(_line(NAMES[name], summary[key]) for key, name in (("shift", "with"), ("shift_without_first", "without"))), "",
        "## Where attention goes", "", "![attention by layer](figures/attention-by-layer.png)", "",
        f"The {received} that each set of positions receives, heads averaged, mean over examples with a 95 % bootstrap interval; right, the same "
        "series with mean 0 and deviation 1 over the layers of each example, which is all that Shift sees.", "",
        "Correlation over layers: " + "; ".join(f"{name} {_number(found)}" for name, found in summary["correlation"].items()) + ".", "",
        "Positions of each set, on average: " + ", ".join(f"{name} {count:.1f}" for name, count in summary["positions"].items() if count) + ".", "",
    ]  # fmt: skip
    return "\n".join(lines)


def _sentence(found: dict[str, Any], name: str) -> str:
    if found["value"] is None:
        return f"{name.capitalize()}: nothing to correlate ({found['n_constant']} examples have nothing before, or a constant series)."
    inside = found["shuffled"]["low"] <= found["value"] <= found["shuffled"]["high"]
    if inside:
        verdict = "neither alike nor opposed: a shuffled order of layers gives as much"
    else:
        verdict = (
            "alike" if found["value"] < 1 else "opposed: where words before are looked at more, words after are looked at less"
        )
    return f"{name.capitalize()}: **{verdict}**. Shift {_number(found)}, n = {found['n']}, p = {found['p_value']:.3f}."


def _cautions(summary: Summary) -> list[str]:
    lines = []
    if summary["few_layers"]:
        lines.append(
            f"- {summary['n_layers']} layers are few (fewer than {MIN_LAYERS}): a correlation over them is hardly determined, whatever its interval over examples says."
        )
    for key, name in (("shift", "with"), ("shift_without_first", "without")):
        if count := summary[key]["n_constant"]:
            lines.append(f"- {NAMES[name].capitalize()}, {count} examples have a constant series, or none, and are left out.")
    if summary["n_skipped"]:
        lines.append(f"- {summary['n_skipped']} examples could not be used; the first: {summary['skipped'][0]}")
    return lines


def _line(name: str, found: dict[str, Any]) -> str:
    p = "-" if found["p_value"] is None else f"{found['p_value']:.3f}"
    return (
        f"| {name} | {_number(found)} | {_number(found['shuffled'])} | {p} | {_number(found['others'])} | "
        f"{_number(found['others_less_own'])} | {found['n']} | {found['n_constant']} |"
    )


def _number(found: dict[str, Any]) -> str:
    return "-" if found["value"] is None else ranged(found)
