"""Ratios that were measured, each with its interval and its goal: what the studies of cost share, one figure and one way of telling."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from compress.latency import Ratio, ratio
from probe.plots.panels import GREY, Pair, reach
from probe.plots.style import COLOURS, LAYOUT, styled
from studies.study import Summary

FIGURE = "ratios"
DECADES = 10.0  # values further apart than this want a logarithmic axis
RANDOM = "a model of this shape with random weights: --model, --data and --limit change nothing here"
OPEN, KEPT, MISSED, AIM = GREY, COLOURS[0], COLOURS[1], "#222222"


@dataclass(frozen=True)
class Goal:
    """What a number should be: `at most` its limit, or `at least`; `where` says under what condition."""

    limit: float
    most: bool = True
    where: str = ""

    def __str__(self) -> str:
        return f"at {'most' if self.most else 'least'} {self.limit:g}{' ' + self.where if self.where else ''}"

    def kept(self, value: float) -> bool:
        """Whether a value is what it should be."""
        return value <= self.limit if self.most else value >= self.limit


@dataclass(frozen=True)
class Measured:
    """A row of a table and of the figure. `low` and `high` are None where there are too few repetitions, or a thing is counted once."""

    name: str
    value: float
    low: float | None = None
    high: float | None = None
    goal: Goal | None = None

    def between(self) -> str:
        """The interval in brackets; empty where there is none."""
        return "" if self.low is None or self.high is None else f"[{self.low:.3g}, {self.high:.3g}]"

    @property
    def colour(self) -> str:
        """Blue for a value that keeps its goal, orange for one that misses it, grey where none is set."""
        if self.goal is None:
            return OPEN
        return KEPT if self.goal.kept(self.value) else MISSED

    @property
    def sure(self) -> bool:
        """Whether the whole interval says of the goal what the value says."""
        ends = [end for end in (self.low, self.high) if end is not None]
        return self.goal is None or all(self.goal.kept(end) == self.goal.kept(self.value) for end in ends)

    def told(self) -> str:
        """What stands beside the row in the figure."""
        aim = f"goal {'≤' if self.goal.most else '≥'} {self.goal.limit:g}" if self.goal else ""
        return "   ".join(part for part in (f"{self.value:.3g}", self.between(), aim) if part)


Panels = Sequence[tuple[str, Sequence[Measured]]]  # each with its title, which names what the axis counts


# --- numbers ---------------------------------------------------------------------------------------------------------


def over(seconds: Mapping[str, Sequence[float]], name: str, base: str) -> Ratio:
    """Median over rounds of the ratio within a round, which cancels what drifts from round to round, with its interval."""
    return ratio(seconds[name], seconds[base])


def bounds(found: Ratio) -> dict[str, float | None]:
    """What stands under a ratio's name in `intervals`: 95 % by order statistics, None with fewer than six rounds."""
    return {"low": found.low, "high": found.high}


def row(summary: Summary, key: str, name: str, goal: Goal | None = None) -> Measured:
    """A headline number of a summary, with its interval where `intervals` has one."""
    found = summary["intervals"].get(key, {})
    return Measured(name, summary[key], found.get("low"), found.get("high"), goal)


def head(summary: Summary) -> str:
    """The first lines of a table: what was measured."""
    shape = f"{summary['n_positions']} positions, {summary['layers']} layers, width {summary['width']}, {summary['dtype']} on {summary['device']}"
    return f"{shape}; {summary['n']} rounds\n{RANDOM}"


def lines(rows: Sequence[Measured]) -> list[str]:
    """Rows of a plain table: name, value, interval, goal."""
    return [f"{one.name:<58}{one.value:>10.3g}  {one.between():<18}{one.goal or ''}".rstrip() for one in rows]


# --- the figure ------------------------------------------------------------------------------------------------------


def figure(panels: Panels, note: str) -> Pair:
    """Panels below each other: ratios with intervals, a row each, goals as upright marks. An axis whose values span a decade is logarithmic.

    `note` says above them what was repeated how often.
    """
    return _on_paper(panels, note), _on_page(panels, note)


def logarithmic(rows: Sequence[Measured]) -> bool:
    """Whether values and goals span a decade, and can all be shown on such an axis."""
    values = _values(rows)
    return min(values) > 0 and max(values) / min(values) > DECADES


def _values(rows: Sequence[Measured]) -> list[float]:
    return [one.value for one in rows] + [one.goal.limit for one in rows if one.goal]


def _around_one(rows: Sequence[Measured]) -> bool:
    """Whether the line of 1, where nothing is lost or won, lies among the values: far from them it would only squeeze them."""
    return min(_values(rows)) <= 1 <= max(_values(rows))


def _on_paper(panels: Panels, note: str) -> Any:
    heights = [0.27 * len(rows) + 0.9 for _, rows in panels]
    with styled() as figure_class:
        drawn = figure_class(figsize=(9.2, sum(heights) + 0.7))
        axes = drawn.subplots(len(panels), 1, squeeze=False, height_ratios=heights)[:, 0]
        for place, (title, rows) in zip(axes, panels, strict=True):
            _draw(place, title, rows)
        drawn.suptitle(note, x=0.01, ha="left", fontsize=8, color="#555555")
        drawn.legend(handles=_handles(panels), loc="outside lower center", ncols=5)
    return drawn


def _draw(place: Any, title: str, rows: Sequence[Measured]) -> None:
    for at, one in enumerate(rows):
        error = [[side] for side in reach(vars(one))]
        fill = one.colour if one.sure else "white"
        place.errorbar(one.value, at, xerr=error, fmt="o", color=one.colour, markerfacecolor=fill, capsize=2, zorder=3)
        if one.goal:
            place.plot(one.goal.limit, at, marker="|", color=AIM, markersize=12, markeredgewidth=1.6, zorder=4)
        place.text(1.02, at, one.told(), transform=place.get_yaxis_transform(), va="center", fontsize=7.5)
    if logarithmic(rows):
        place.set_xscale("log")
    if _around_one(rows):
        place.axvline(1, color=OPEN, linewidth=0.9, linestyle=":", zorder=1)
    place.set_title(title)
    place.set_yticks(range(len(rows)), [one.name.strip() for one in rows])
    place.set_ylim(len(rows) - 0.4, -0.6)


def _handles(panels: Panels) -> list[Any]:
    """The legend: of what can be drawn, what occurs."""
    from matplotlib.lines import Line2D

    rows = [one for _, found in panels for one in found]
    marks = [
        ("no goal", OPEN, OPEN, any(one.goal is None for one in rows)), ("keeps its goal", KEPT, KEPT, any(one.colour == KEPT for one in rows)),
        ("misses its goal", MISSED, MISSED, any(one.colour == MISSED for one in rows)),
        ("hollow: not for sure", "#222222", "white", any(not one.sure for one in rows)),
    ]  # fmt: skip
    made = [
        Line2D([], [], color=edge, markerfacecolor=fill, marker="o", label=text) for text, edge, fill, occurs in marks if occurs
    ]  # fmt: skip
    if any(one.goal for one in rows):
        made.append(Line2D([], [], color=AIM, marker="|", markersize=12, markeredgewidth=1.6, linestyle="none", label="goal"))
    return made


def _on_page(panels: Panels, note: str) -> Any:
    from plotly.subplots import make_subplots

    counts = [len(rows) for _, rows in panels]
    height = 190 + 28 * (sum(counts) + 3 * len(panels))
    page = make_subplots(
        rows=len(panels), cols=1, subplot_titles=[title for title, _ in panels], row_heights=[n + 1 for n in counts], vertical_spacing=80 / height,
    )  # fmt: skip
    for k, (_, rows) in enumerate(panels, 1):
        _add(page, rows, {"row": k, "col": 1})
    page.update_layout(**{**LAYOUT, "hovermode": "closest"}, height=height, showlegend=False)
    title = {"text": note, "font": {"size": 12, "color": "#555555"}, "x": 0.01, "y": 1, "yanchor": "top", "pad": {"t": 8}}
    return page.update_layout(title=title, margin={"t": 90})


def _add(page: Any, rows: Sequence[Measured], where: Mapping[str, int]) -> None:
    down, up = zip(*(reach(vars(one)) for one in rows), strict=True)
    names = [one.name.strip() for one in rows]
    page.add_scatter(
        x=[one.value for one in rows], y=names, mode="markers", hovertext=[one.told() for one in rows],
        marker={"color": [one.colour for one in rows], "symbol": ["circle" if one.sure else "circle-open" for one in rows], "size": 9},
        error_x={"array": _known(up), "arrayminus": _known(down), "color": OPEN}, **where,
    )  # fmt: skip
    aims = [(one.name.strip(), one.goal) for one in rows if one.goal]
    page.add_scatter(
        x=[goal.limit for _, goal in aims], y=[name for name, _ in aims], mode="markers", hovertext=[f"goal: {goal}" for _, goal in aims],
        marker={"symbol": "line-ns", "line": {"width": 2, "color": AIM}, "size": 12}, **where,
    )  # fmt: skip
    if _around_one(rows):
        page.add_vline(x=1, line_dash="dot", line_color=OPEN, **where)
    page.update_xaxes(type="log" if logarithmic(rows) else "linear", **where)
    page.update_yaxes(categoryorder="array", categoryarray=list(reversed(names)), **where)


def _known(sides: Sequence[float]) -> list[float | None]:
    return [None if math.isnan(side) else side for side in sides]
