"""Figures of the attention shift: what each set of positions receives by layer, and Shift beside its nulls."""

from collections.abc import Mapping
from typing import Any

from probe.plots import panels
from probe.plots.panels import GREY, Line, Pair
from probe.plots.style import COLOURS

Summary = Mapping[str, Any]
LINES = {
    "before": ("words before", COLOURS[0], False), "rest": ("words before, without the first position", COLOURS[5], True),
    "first": ("the first position alone", GREY, True), "shown": ("what is shown", COLOURS[2], False),
    "between": ("words between", COLOURS[3], False), "after": ("words after", COLOURS[1], False),
}  # fmt: skip


def laws(summary: Summary) -> Pair:
    """Left, the attention that each set receives; right, its course in standard deviations."""
    drawn = [(title, _lines(summary[key])) for key, title in (("laws", "Attention received"), ("courses", "Its course"))]
    layers = summary["laws"]["after"]["layers"]
    axis = "attention for each pair" if summary["per_pair"] else "share of attention"
    figure, page = panels.curves(drawn, [layers, layers], "layer", axis, share=False)
    figure.axes[1].set_ylabel("standard deviations over layers")
    page.update_yaxes(title_text="standard deviations over layers", col=2)
    figure.set_size_inches(9.0, 4.0)
    for text in figure.legends:
        text.set_ncols(3)
    return figure, page


def _lines(found: Mapping[str, Any]) -> list[Line]:
    known = [key for key in LINES if key in found and any(v is not None for v in found[key]["mean"])]
    return [(LINES[key][0], found[key], LINES[key][1], LINES[key][2]) for key in known]


def shifts(summary: Summary) -> Pair:
    """Shift with and without the first position, beside shuffled layers and other examples."""
    readings = {"with the first position": summary["shift"], "without it": summary["shift_without_first"]}
    kinds = (
        ("own", "the example's own", COLOURS[0]),
        ("others", "other examples", COLOURS[4]),
        ("shuffled", "shuffled layers", GREY),
    )
    series = []
    for key, name, colour in kinds:
        found = {label: one if key == "own" else one[key] for label, one in readings.items()}
        series.append((name, {label: one for label, one in found.items() if one["value"] is not None}, colour))
    figure, page = panels.values([("Shift", series)], "Shift (0 alike, 2 opposed)", line=1.0)
    figure.axes[0].set_xlim(-0.05, 2.05)
    page.update_xaxes(range=[-0.05, 2.05])
    return figure, page
