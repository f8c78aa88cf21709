"""Accuracy against cost, with intervals on both axes, baselines marked, and the line of the frontier."""

from collections.abc import Mapping, Sequence
from typing import Any

from probe.plots.panels import GREY, Pair
from probe.plots.style import COLOURS, LAYOUT, styled

# A point: `name`, `x`, `x_low`, `x_high`, `y`, `y_low`, `y_high`, `baseline` (its kind or empty), `standing`, and perhaps `plan`.
Points = Sequence[Mapping[str, Any]]
_SIDES = ("x", "x_low", "x_high", "y", "y_low", "y_high")
_MARKS = {"full": "*", "random": "s", "pooling": "D", "down-sampling": "v", "plan": "P"}
_SYMBOLS = {"full": "star", "random": "square", "pooling": "diamond", "down-sampling": "triangle-down", "plan": "cross"}


def frontier(panels: Sequence[tuple[str, str, Points]], axis: str) -> Pair:
    """Panels (title, name of the x axis, points) side by side under one axis of accuracy.

    Baselines and plans have marks of their own; other points are full on the frontier, hollow where they are beaten by values alone, and grey where they are
    beaten for sure.
    """
    return _on_paper(panels, axis), _on_page(panels, axis)


def _kind(point: Mapping[str, Any]) -> str:
    """What has a mark of its own: a baseline, or a plan from evidence."""
    return str(point["baseline"]) or ("plan" if point.get("plan") else "")


def _colour(point: Mapping[str, Any]) -> str:
    if kind := _kind(point):
        return COLOURS[1 + list(_MARKS).index(kind)]
    return GREY if point["standing"] == "dominated" else COLOURS[0]


def _reach(point: Mapping[str, Any], side: str) -> list[list[float]]:
    return [[max(0.0, point[side] - point[f"{side}_low"])], [max(0.0, point[f"{side}_high"] - point[side])]]


def _on_paper(panels: Sequence[tuple[str, str, Points]], axis: str) -> Any:
    with styled() as figure_class:
        figure = figure_class(figsize=(4.6 * len(panels) + 0.4, 4.4))
        axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
        handles: dict[str, Any] = {}
        for place, (title, label, points) in zip(axes, panels, strict=True):
            for point in points:
                colour, kind = _colour(point), _kind(point)
                drawn = place.errorbar(
                    point["x"], point["y"], xerr=_reach(point, "x"), yerr=_reach(point, "y"), color=colour, elinewidth=0.6,
                    marker=_MARKS.get(kind, "o"), markersize={"full": 11, "plan": 9}.get(kind, 5.5), linestyle="none", alpha=0.9, zorder=4 if kind == "plan" else 3 if kind else 2,
                    markerfacecolor="white" if not kind and point["standing"] == "inseparable" else colour,
                )  # fmt: skip
                handles.setdefault(_legend(point), drawn)
            line = _line(points)
            (drawn,) = place.step(
                [p["x"] for p in line], [p["y"] for p in line], where="post", color="#222222", linewidth=1.1, zorder=1
            )
            handles.setdefault("frontier (by values)", drawn)
            place.set(title=title, xlabel=label)
        axes[0].set_ylabel(axis)
        figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4)
    return figure


def _legend(point: Mapping[str, Any]) -> str:
    names = {"frontier": "on the frontier", "inseparable": "beaten by values alone", "dominated": "beaten for sure"}
    if _kind(point) == "plan":
        return "plan from evidence"
    return f"baseline: {point['baseline']}" if point["baseline"] else names[point["standing"]]


def _line(points: Points) -> list[Mapping[str, Any]]:
    """The points that no cheaper one is as accurate as, from cheap to dear."""
    found: list[Mapping[str, Any]] = []
    for point in sorted(points, key=lambda p: (p["x"], -p["y"])):
        if not found or point["y"] > found[-1]["y"]:
            found.append(point)
    return found


def _on_page(panels: Sequence[tuple[str, str, Points]], axis: str) -> Any:
    from plotly.subplots import make_subplots

    page = make_subplots(rows=1, cols=len(panels), subplot_titles=[title for title, _, _ in panels], shared_yaxes=True)
    seen: set[str] = set()
    for column, (_, label, points) in enumerate(panels, 1):
        groups: dict[str, list[Mapping[str, Any]]] = {}
        for point in points:
            groups.setdefault(_legend(point), []).append(point)
        for name, group in groups.items():
            x, x_low, x_high, y, y_low, y_high = ([p[side] for p in group] for side in _SIDES)
            first = group[0]
            hollow = not _kind(first) and first["standing"] == "inseparable"
            page.add_scatter(
                x=x, y=y, mode="markers", name=name, legendgroup=name, showlegend=name not in seen, text=[p["name"] for p in group],
                hovertemplate="%{text}<br>%{x:.4g}, %{y:.3f}<extra></extra>",
                marker={"color": _colour(first), "size": 9, "symbol": _SYMBOLS.get(_kind(first), "circle-open" if hollow else "circle")},
                error_x=_bars(x, x_low, x_high), error_y=_bars(y, y_low, y_high), row=1, col=column,
            )  # fmt: skip
            seen.add(name)
        line = _line(points)
        page.add_scatter(
            x=[p["x"] for p in line], y=[p["y"] for p in line], mode="lines", name="frontier (by values)", legendgroup="line",
            showlegend=column == 1, line={"color": "#222222", "width": 1, "shape": "hv"}, hoverinfo="skip", row=1, col=column,
        )  # fmt: skip
        page.update_xaxes(title_text=label, col=column)
    page.update_yaxes(title_text=axis, col=1)
    return page.update_layout(**{**LAYOUT, "hovermode": "closest"}, height=520, legend={"orientation": "h", "y": -0.2})


def _bars(value: list[float], low: list[float], high: list[float]) -> dict[str, Any]:
    up = [max(0.0, b - a) for a, b in zip(value, high, strict=True)]
    down = [max(0.0, a - b) for a, b in zip(value, low, strict=True)]
    return {"array": up, "arrayminus": down, "thickness": 0.7, "width": 0}
