"""A measure against a budget, on a logarithmic axis: panels of lines that need not share their places."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from probe.plots.panels import Pair
from probe.plots.style import LAYOUT, band, styled

# (a line's name, its points with `x mean low high` (None where there is no interval), colour, dashed)
Line = tuple[str, Mapping[str, Sequence[Any]], str, bool]


def budgets(panels: Sequence[tuple[str, Sequence[Line]]], label: str, axis: str) -> Pair:
    """Panels side by side, each with its own legend below it; bands are intervals. `label` and `axis` name the axes."""
    return _on_paper(panels, label, axis), _on_page(panels, label, axis)


def _on_paper(panels: Sequence[tuple[str, Sequence[Line]]], label: str, axis: str) -> Any:
    rows = max(len(lines) for _, lines in panels)
    with styled() as figure_class:
        figure = figure_class(figsize=(2.7 * len(panels) + 0.6, 3.1 + 0.17 * rows))
        axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
        for place, (title, lines) in zip(axes, panels, strict=True):
            for name, points, colour, dashed in lines:
                x = np.array(points["x"], dtype=float)
                place.plot(x, points["mean"], color=colour, linestyle="--" if dashed else "-", marker="o", label=name)
                low, high = (np.array(points[side], dtype=float) for side in ("low", "high"))
                place.fill_between(x, low, high, color=colour, alpha=0.10, linewidth=0)
            place.set(title=title, xlabel=label)
            place.set_xscale("log", base=2)
            _name_counts(place, [x for _, points, _, _ in lines for x in points["x"]])
            place.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), handlelength=2.4, ncols=1 if rows <= 3 else 2)
        axes[0].set_ylabel(axis)
    return figure


def _name_counts(place: Any, found: Sequence[float]) -> None:
    """The counts that most lines have come first; those too close to one that is named have no name."""
    times = Counter(found)
    shown: list[float] = []
    for count in sorted(times, key=lambda count: (-times[count], count)):
        if all(max(count, other) / min(count, other) > 1.3 for other in shown):
            shown.append(count)
    place.set_xticks(shown)
    place.set_xticklabels([f"{count:.0f}" for count in shown])
    place.minorticks_off()


def _on_page(panels: Sequence[tuple[str, Sequence[Line]]], label: str, axis: str) -> Any:
    from plotly.subplots import make_subplots

    page = make_subplots(rows=1, cols=len(panels), subplot_titles=[title for title, _ in panels], shared_yaxes=True)
    seen: set[str] = set()
    for column, (title, lines) in enumerate(panels, 1):
        for name, points, colour, dashed in lines:
            page.add_scatter(
                x=list(points["x"]), y=list(points["mean"]), name=name, legendgroup=name, showlegend=name not in seen, mode="lines+markers",
                legendgrouptitle_text=title if lines[-1][0] == name else None, line={"color": colour, "dash": "dash" if dashed else "solid"},
                row=1, col=column,
            )  # fmt: skip
            page.add_scatter(
                x=[*points["x"], *reversed(points["x"])], y=[*points["high"], *reversed(points["low"])], mode="lines", fill="toself",
                fillcolor=band(colour, 0.10), line={"width": 0}, hoverinfo="skip", showlegend=False, legendgroup=name, row=1, col=column,
            )  # fmt: skip
            seen.add(name)
    page.update_xaxes(title_text=label, type="log").update_yaxes(title_text=axis, col=1)
    return page.update_layout(**{**LAYOUT, "hovermode": "closest"}, height=520)
