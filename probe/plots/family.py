"""Figures of a family of models: the IMA score of each beside what it can do, and both along a training. Each takes the summary of the study."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from probe.plots import panels
from probe.plots.panels import Line, Pair, reach
from probe.plots.style import COLOURS, LAYOUT, styled

Summary = Mapping[str, Any]


def members(summary: Summary) -> Pair:
    """The score of each model of a family beside what it can do: accuracy on top, invented things below."""
    found = summary["members"]
    skills = [
        (s, t)
        for s, t in (("accuracy", "questions answered"), ("hallucination", "absent things affirmed"))
        if all(m.get(s) for m in found)
    ]
    readings = [("input", "tokens as they enter the model"), ("same", "tokens of the same layer")]
    with styled() as figure_class:
        figure = figure_class(figsize=(8.8, 3.5 * len(skills) + 0.5))
        axes = figure.subplots(len(skills), 2, sharey="row", squeeze=False)
        for row, (skill, title) in enumerate(skills):
            for column, (reading, meant) in enumerate(readings):
                _scatter(axes[row, column], found, reading, skill)
                line = summary["correlation"][f"{reading} and {skill}"]
                axes[row, column].set(
                    title=_sentence(line),
                    xlabel=f"IMA score: {meant}" if row == len(skills) - 1 else "",
                    ylabel=title if column == 0 else "",
                )
    return figure, _members_page(found, skills, readings)


def growth(summary: Summary) -> Pair:
    """Along each training of which steps were saved: the score in both readings, and beside it what the model can do."""
    drawn: list[tuple[str, list[Line]]] = []
    steps: list[list[str]] = []
    for name, one in summary["growth"].items():
        for title, told in ((f"IMA score of {name}", SCORED), (f"What {name} can do", SKILLED)):
            known = [(label, one[key], tint, dashed) for key, label, tint, dashed in told if one[key] is not None]
            if known:
                drawn.append((title, known))
                steps.append(one["steps"])
    figure, page = panels.curves(drawn, [list(range(len(own))) for own in steps], "step of training", "", share=False)
    for column, (axis, own, (_, lines)) in enumerate(zip(figure.axes, steps, drawn, strict=True), 1):
        label = "share of questions" if lines[0][0] in {told for _, told, *_ in SKILLED} else "cosine of mean tokens"
        axis.set_xticks(range(len(own)), own, rotation=45 if len(own) > 6 else 0)
        axis.set_ylabel(label)
        page.update_xaxes(tickvals=list(range(len(own))), ticktext=own, col=column).update_yaxes(title_text=label, col=column)
    figure.set_size_inches(4.3 * len(drawn), 3.7)
    return panels.noted((figure, page), f"{_asked(summary)}; bands: 95 % intervals; steps of one training are not independent")


# what is drawn of a training: key in the summary, label, colour, dashed
SCORED = (("input", "score: tokens as they enter", COLOURS[0], False), ("same", "score: the same layer", COLOURS[1], False))
SKILLED = (
    ("accuracy", "questions answered", COLOURS[2], True), ("hallucination", "absent things affirmed", COLOURS[3], True),
)  # fmt: skip


def _asked(summary: Summary) -> str:
    """How many examples and questions each model of a training was given."""
    one = next(iter(summary["growth"].values()))
    counts = [(one["input"], "examples"), (one["hallucination"], "questions about absent things")]
    return "n = " + ", ".join(f"{curve['n']} {of}" for curve, of in counts if curve is not None)


def _sentence(line: Mapping[str, Any]) -> str:
    if line["pearson"] is None:
        return f"r: not defined (n = {line['n']})"
    return (
        f"r = {line['pearson']:.2f} [{line['low']:.2f}, {line['high']:.2f}]\np = {line['p_value']:.3f}, n = {line['n']} models"
    )


def _scatter(axis: Any, found: Sequence[Mapping[str, Any]], reading: str, skill: str) -> None:
    for member in found:
        x, y = member[reading], member[skill]
        axis.errorbar(
            x["value"], y["value"], xerr=[[side] for side in reach(x)], yerr=[[side] for side in reach(y)], fmt="o", color=COLOURS[0], ecolor="#BBBBBB", capsize=2,
        )  # fmt: skip
    axis.margins(0.2)
    axis.autoscale_view()
    bottom, top = axis.get_ylim()
    axis.set_ylim(max(bottom, -0.08), min(top, 1.08))  # shares: nothing lies beyond 0 and 1
    named = [(m[reading]["value"], m[skill]["value"], m["name"].removeprefix("demo:")) for m in found]
    _name_points(axis, named, [(m[reading], m[skill]) for m in found])


def _name_points(
    axis: Any, points: Sequence[tuple[float, float, str]], bars: Sequence[tuple[Mapping[str, float], Mapping[str, float]]]
) -> None:
    """Names beside points, each where it covers no point, no interval and no name before it."""
    (left, right), (bottom, top) = axis.get_xlim(), axis.get_ylim()
    # Shares of the axis: a letter of 7 points is about 0.017 of it wide, and a line 0.06 high.
    spots = [((x - left) / (right - left), (y - bottom) / (top - bottom), name) for x, y, name in points]
    taken = [(u - 0.012, v - 0.02, u + 0.012, v + 0.02) for u, v, _ in spots]
    for (u, v, _), (x, y) in zip(spots, bars, strict=True):
        (less, more), (down, up) = np.nan_to_num(reach(x)) / (right - left), np.nan_to_num(reach(y)) / (top - bottom)
        taken += [(u - less, v - 0.01, u + more, v + 0.01), (u - 0.006, v - down, u + 0.006, v + up)]
    for u, v, name in sorted(spots, key=lambda spot: spot[1]):
        wide, high = 0.017 * len(name) + 0.01, 0.06
        tries = [
            (u + 0.02 if side > 0 else u - 0.02 - wide, v + 0.03 + shift * high - high / 2)
            for shift in (0, -1, 1, -2, 2, -3, 3, -4, 4, -5, 5, -6, 6) for side in (1, -1)
        ]  # fmt: skip
        free = [
            (x, y)
            for x, y in tries
            if 0 <= x <= 1 - wide and 0 <= y <= 1 - high and not any(_meet((x, y, x + wide, y + high), box) for box in taken)
        ]
        x, y = free[0] if free else tries[0]
        taken.append((x, y, x + wide, y + high))
        axis.annotate(
            name, (left + u * (right - left), bottom + v * (top - bottom)), xytext=(x, y + high / 2), textcoords="axes fraction", fontsize=7,
            va="center", arrowprops={"arrowstyle": "-", "color": "#BBBBBB", "linewidth": 0.5, "shrinkA": 0, "shrinkB": 2},
        )  # fmt: skip


def _meet(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
    return bool(a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3])


def _members_page(
    found: Sequence[Mapping[str, Any]], skills: Sequence[tuple[str, str]], readings: Sequence[tuple[str, str]]
) -> Any:
    from plotly.subplots import make_subplots

    page = make_subplots(rows=len(skills), cols=2, shared_yaxes=True)
    for row, (skill, title) in enumerate(skills, 1):
        for column, (reading, meant) in enumerate(readings, 1):
            page.add_scatter(
                x=[m[reading]["value"] for m in found], y=[m[skill]["value"] for m in found], text=[m["name"] for m in found], mode="markers+text",
                textposition="top center", marker={"color": COLOURS[0], "size": 9}, showlegend=False, row=row, col=column,
            )  # fmt: skip
            page.update_xaxes(title_text=f"IMA score: {meant}", row=row, col=column)
        page.update_yaxes(title_text=title, row=row, col=1)
    return page.update_layout(**{**LAYOUT, "hovermode": "closest"}, height=380 * len(skills))
