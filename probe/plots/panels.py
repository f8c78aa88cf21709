"""What figures are made of: panels of curves, tables as heat maps, values with their intervals; each for paper and for a page."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from probe.plots.style import COLOURS, LAYOUT, band, styled, ticks

Pair = tuple[Any, Any]  # matplotlib's figure, plotly's figure
# (a line's name, its curve with `mean` and perhaps `low` and `high`, colour, dashed)
Line = tuple[str, Mapping[str, Any], str, bool]
# (a series' name, {`value low high` by label}, colour)
Series = tuple[str, Mapping[str, Mapping[str, float]], str]
GREY = "#8A8A8A"


def noted(pair: Pair, text: str) -> Pair:
    """The figure with a line above its panels: how many were counted, and what intervals are over."""
    figure, page = pair
    figure.suptitle(text, x=0.01, ha="left", fontsize=8, color="#555555")
    top = page.layout.margin.t or 60
    page.update_layout(
        title={"text": text, "font": {"size": 12, "color": "#555555"}, "x": 0.01, "y": 1, "yanchor": "top", "yref": "container", "pad": {"t": 8}},
        margin={"t": top + 24},
    )  # fmt: skip
    return figure, page


def curves(
    panels: Sequence[tuple[str, Sequence[Line]]], x: Sequence[Sequence[int]], label: str, axis: str, share: bool = True
) -> Pair:
    """Panels of curves with bands side by side, and one legend below them all.

    `x` are the places of each panel's points, `label` and `axis` name the axes; with `share` all panels have one y axis.
    """
    return _curves_on_paper(panels, x, label, axis, share), _curves_on_page(panels, x, label, axis, share)


def _curves_on_paper(
    panels: Sequence[tuple[str, Sequence[Line]]], x: Sequence[Sequence[int]], label: str, axis: str, share: bool
) -> Any:
    with styled() as figure_class:
        figure = figure_class(figsize=(max(4.2, 3.0 * len(panels) + 0.6), 3.4))
        axes = figure.subplots(1, len(panels), sharey=share, squeeze=False)[0]
        handles: dict[str, Any] = {}
        for place, (title, lines), at in zip(axes, panels, x, strict=True):
            for name, curve, colour, dashed in lines:
                mean = np.array(curve["mean"], dtype=float)
                (drawn,) = place.plot(at, mean, color=colour, linestyle="--" if dashed else "-", marker="o", label=name)
                if curve.get("low") is not None:
                    low, high = (np.array(curve[side], dtype=float) for side in ("low", "high"))
                    place.fill_between(at, low, high, color=colour, alpha=0.15, linewidth=0)
                handles.setdefault(name, drawn)
            place.set(title=title, xlabel=label)
            place.set_xticks(ticks(list(at)))
        axes[0].set_ylabel(axis)
        figure.legend(
            handles.values(), handles.keys(), loc="outside lower center", ncols=min(4, len(handles)), handlelength=3.2
        )
    return figure


def _curves_on_page(
    panels: Sequence[tuple[str, Sequence[Line]]], x: Sequence[Sequence[int]], label: str, axis: str, share: bool
) -> Any:
    from plotly.subplots import make_subplots

    figure = make_subplots(rows=1, cols=len(panels), subplot_titles=[title for title, _ in panels], shared_yaxes=share)
    seen: set[str] = set()
    for column, ((_, lines), at) in enumerate(zip(panels, x, strict=True), 1):
        for name, curve, colour, dashed in lines:
            figure.add_scatter(
                x=list(at), y=curve["mean"], name=name, legendgroup=name, showlegend=name not in seen, mode="lines+markers",
                line={"color": colour, "dash": "dash" if dashed else "solid"}, hovertemplate="%{y:.3f}", row=1, col=column,
            )  # fmt: skip
            if curve.get("low") is not None:
                figure.add_scatter(
                    x=[*at, *reversed(at)], y=[*curve["high"], *reversed(curve["low"])], mode="lines", fill="toself", fillcolor=band(colour, 0.15),
                    line={"width": 0}, hoverinfo="skip", showlegend=False, legendgroup=name, row=1, col=column,
                )  # fmt: skip
            seen.add(name)
    figure.update_xaxes(title_text=label).update_yaxes(title_text=axis, col=1)
    return figure.update_layout(**LAYOUT, height=420, legend={"orientation": "h", "y": -0.25})


def tables(
    titles: Sequence[str],
    values: Sequence[Any],
    rows: Sequence[str],
    columns: Sequence[str],
    limits: tuple[float, float],
    colours: str,
    label: str,
    write: bool | None = None,
    down: str = "",
    across: str = "",
) -> Pair:
    """Tables (row column) as heat maps side by side, under one scale of colours.

    `write` puts each number into its cell (by default where there are at most 12 columns). `down` and `across` name the
    axes. Diverging scales (`RdBu_r`) want `limits` around their neutral value.
    """
    found = [np.array(table, dtype=float) for table in values]
    write = len(columns) <= 12 if write is None else write
    wide = max(0.42 if write else 0.2, 2.4 / len(columns)) * len(columns)
    tall = max(0.42 if write else 0.2, 1.6 / len(rows)) * len(rows)
    with styled() as figure_class:
        figure = figure_class(figsize=((wide + 0.7) * len(found) + 2.0, tall + 1.9))
        axes = figure.subplots(1, len(found), squeeze=False)[0]
        for k, (axis, title, table) in enumerate(zip(axes, titles, found, strict=True)):
            drawn = axis.imshow(table, vmin=limits[0], vmax=limits[1], cmap=colours, aspect="auto")
            if write:
                _write_numbers(axis, table, limits, diverging=colours.startswith("RdBu"))
            axis.set(title=title, xlabel=across, ylabel=down if k == 0 else "")
            _name(axis, rows if k == 0 else [""] * len(rows), columns)
            axis.grid(False)
        figure.colorbar(drawn, ax=axes, shrink=0.8, label=label)
    return figure, _tables_on_page(titles, found, rows, columns, limits, colours, write)


def _write_numbers(axis: Any, table: np.ndarray, limits: tuple[float, float], diverging: bool) -> None:
    low, high = limits
    for i, j in np.argwhere(np.isfinite(table)):
        share = (table[i, j] - low) / (high - low)
        dark = abs(share - 0.5) > 0.35 if diverging else share > 0.6
        axis.text(
            j, i, f"{table[i, j]:.2f}", ha="center", va="center", fontsize=6.5, color="white" if dark else "#222222"
        )  # fmt: skip


def _name(axis: Any, rows: Sequence[str], columns: Sequence[str]) -> None:
    """Names beside rows and below columns; where there are many, every second or third."""
    for names, set_ticks, set_labels, turn in (
        (rows, axis.set_yticks, axis.set_yticklabels, 0), (columns, axis.set_xticks, axis.set_xticklabels, 90),
    ):  # fmt: skip
        step = -(-len(names) // 24)
        shown = range(0, len(names), step)
        set_ticks(list(shown))
        short = all(len(names[i]) <= 2 for i in shown)
        set_labels([names[i] for i in shown], rotation=0 if short else turn)


def _tables_on_page(
    titles: Sequence[str], values: Sequence[np.ndarray], rows: Sequence[str], columns: Sequence[str],
    limits: tuple[float, float], colours: str, write: bool,
) -> Any:  # fmt: skip
    from plotly.subplots import make_subplots

    page = make_subplots(rows=1, cols=len(values), subplot_titles=list(titles), shared_yaxes=True)
    for column, table in enumerate(values, 1):
        page.add_heatmap(
            z=table, x=list(columns), y=list(rows), zmin=limits[0], zmax=limits[1],
            colorscale="RdBu_r" if colours.startswith("RdBu") else colours, texttemplate="%{z:.2f}" if write else None,
            showscale=column == len(values), row=1, col=column,
        )  # fmt: skip
    page.update_yaxes(autorange="reversed", type="category").update_xaxes(type="category")
    return page.update_layout(**{**LAYOUT, "hovermode": "closest"}, height=220 + 34 * len(rows))


def values(panels: Sequence[tuple[str, Sequence[Series]]], axis: str, share: bool = True, line: float | None = None) -> Pair:
    """Panels of labelled values with their intervals: a row of each label, a mark for each series.

    `line` draws what chance or nothing would give. Labels read from the top down, in the order of the first series.
    """
    names = list(dict.fromkeys(label for _, series in panels for _, found, _ in series for label in found))
    with styled() as figure_class:
        figure = figure_class(figsize=(max(4.8, 3.1 * len(panels) + 1.6), 0.34 * len(names) + 1.6))
        axes = figure.subplots(1, len(panels), sharey=True, sharex=share, squeeze=False)[0]
        handles: dict[str, Any] = {}
        for place, (title, series) in zip(axes, panels, strict=True):
            for k, (name, found, colour) in enumerate(series):
                at = np.array([names.index(label) for label in found]) + 0.22 * (k - (len(series) - 1) / 2)
                middle = np.array([one["value"] for one in found.values()], dtype=float)
                drawn = place.errorbar(
                    middle,
                    at,
                    xerr=np.array([reach(one) for one in found.values()]).reshape(-1, 2).T,
                    fmt="o",
                    color=colour,
                    capsize=2,
                )
                handles.setdefault(name, drawn)
            if line is not None:
                place.axvline(line, color="#888888", linewidth=0.9, linestyle=":")
            place.set(title=title, xlabel=axis, yticks=range(len(names)))
            place.set_yticklabels(names)
        axes[0].set_ylim(len(names) - 0.5, -0.5)
        if len(handles) > 1:
            figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=min(4, len(handles)))
    return figure, _values_on_page(panels, names, axis, share, line)


def _values_on_page(
    panels: Sequence[tuple[str, Sequence[Series]]], names: Sequence[str], axis: str, share: bool, line: float | None
) -> Any:
    from plotly.subplots import make_subplots

    page = make_subplots(
        rows=1, cols=len(panels), subplot_titles=[title for title, _ in panels], shared_yaxes=True,
        shared_xaxes="all" if share else False,
    )  # fmt: skip
    seen: set[str] = set()
    for column, (_, series) in enumerate(panels, 1):
        for name, found, colour in series:
            middle = [one["value"] for one in found.values()]
            page.add_scatter(
                x=middle, y=list(found), mode="markers", name=name, legendgroup=name, showlegend=name not in seen,
                marker={"color": colour, "size": 9}, error_x={
                    "array": [reach(one)[1] for one in found.values()], "arrayminus": [reach(one)[0] for one in found.values()],
                }, row=1, col=column,
            )  # fmt: skip
            seen.add(name)
        if line is not None:
            page.add_vline(x=line, line_dash="dot", line_color=GREY, row=1, col=column)
    page.update_xaxes(title_text=axis).update_yaxes(categoryorder="array", categoryarray=list(reversed(names)))
    return page.update_layout(**{**LAYOUT, "hovermode": "closest"}, height=200 + 30 * len(names))


def reach(one: Mapping[str, Any]) -> tuple[float, float]:
    """How far the interval of a value goes down and up from it; NaN, which draws no bar, where it has none."""
    if one["low"] is None or one["low"] != one["low"]:
        return float("nan"), float("nan")
    return max(0.0, one["value"] - one["low"]), max(0.0, one["high"] - one["value"])


def colour(number: int) -> str:
    """The colour of the n-th series."""
    return COLOURS[number % len(COLOURS)]
