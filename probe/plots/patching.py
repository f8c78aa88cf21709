"""Figures of activation patching: groups of positions by layer, the object beside its control, heads, exact beside estimated."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from probe.plots.panels import Line, Pair, colour, curves, tables
from probe.plots.style import LAYOUT, styled

GROUPS = {
    "object": "object", "random": "random control", "others": "all others", "context": "context", "word": "object's word",
    "question": "rest of question", "suffix": "suffix", "header": "header", "last": "last position",
}  # fmt: skip
POINTS = {
    "resid_pre": "residual stream", "attn_out": "attention", "mlp_out": "feed-forward", "z": "heads",
}  # fmt: skip
COLOURS = {
    "object": colour(1), "random": colour(6), "others": colour(4), "last": colour(0), "word": colour(2), "question": colour(3),
    "suffix": colour(5), "header": "#7A5C3E", "context": "#8A8A8A",
}  # fmt: skip
BESIDE = ("object", "random", "others", "last")  # drawn as curves; the others are in the heat maps
Sites = Mapping[str, Mapping[str, Mapping[str, Any]]]  # point, group: a curve with `layers mean low high`


def sites(found: Sites, windowed: bool = False) -> Pair:
    """Mean effect of each group of positions at each layer (or window of layers), a heat map for each point."""
    groups = [group for group in GROUPS if any(group in one for one in found.values())]
    layers = next(iter(next(iter(found.values())).values()))["layers"]
    values = [
        np.array([one[group]["mean"] if group in one else [np.nan] * len(layers) for group in groups], dtype=float)
        for one in found.values()
    ]
    return tables(
        [POINTS[point] for point in found], [_shown(table) for table in values], [GROUPS[group] for group in groups], [str(layer) for layer in layers],
        (-1.0, 1.0), "RdBu_r", "effect", across="centre of the window" if windowed else "layer",
    )  # fmt: skip


def controlled(found: Sites, windowed: bool = False) -> Pair:
    """Effect of the object by layer beside as many random positions of its kind, all others, and the last position, with bands."""
    panels: list[tuple[str, list[Line]]] = []
    for point, one in found.items():
        lines = [(GROUPS[g], one[g], COLOURS[g], g == "random") for g in BESIDE if g in one]
        panels.append((POINTS[point], lines))
    x = [next(iter(one.values()))["layers"] for one in found.values()]
    return curves(panels, x, "centre of the window" if windowed else "layer", "effect (1: the whole fact)")


def agreement(found: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> Pair:
    """Correlation of the estimates with the exact effects by layer, a panel for each point (variant, point: a curve)."""
    styles = {"attribution": (colour(0), False), "integrated": (colour(2), True)}
    points = list(next(iter(found.values())))
    panels: list[tuple[str, list[Line]]] = [
        (POINTS[point], [(name, one[point], *styles[name]) for name, one in found.items()]) for point in points
    ]
    x = [next(iter(found.values()))[point]["layers"] for point in points]
    return curves(panels, x, "layer", "correlation with the exact effect")


def heads(table: Sequence[Sequence[float | None]]) -> Pair:
    """Mean effect of each head's output at the last position (layer head)."""
    values = np.array(table, dtype=float).T
    reach = max(0.05, float(np.nanmax(np.abs(values))))
    return tables(
        ["heads at the last position"], [_shown(values)], [str(i) for i in range(len(values))],
        [str(i) for i in range(values.shape[1])], (-reach, reach), "RdBu_r", "effect", down="head", across="layer",
    )  # fmt: skip


def scatter(found: Mapping[str, Mapping[str, Sequence[Sequence[float]]]]) -> Pair:
    """Exact effect against the estimate, a mark for each layer (mean over pairs), a colour for each group, a panel for each point."""
    from plotly.subplots import make_subplots

    page = make_subplots(rows=1, cols=len(found), subplot_titles=[POINTS[point] for point in found])
    with styled() as figure_class:
        figure = figure_class(figsize=(3.1 * len(found) + 0.6, 3.9))
        axes = figure.subplots(1, len(found), squeeze=False)[0]
        handles: dict[str, Any] = {}
        for column, (axis, (point, groups)) in enumerate(zip(axes, found.items(), strict=True), 1):
            for name, (exact, estimate) in groups.items():
                label, shade = GROUPS[name], COLOURS[name]
                drawn = axis.scatter(estimate, exact, color=shade, s=18, alpha=0.8, linewidths=0)
                shown = label not in handles
                handles.setdefault(label, drawn)
                page.add_scatter(
                    x=list(estimate), y=list(exact), mode="markers", name=label, legendgroup=label, showlegend=shown,
                    marker={"color": shade}, row=1, col=column,
                )  # fmt: skip
            ends = _ends(groups)
            axis.plot(ends, ends, color="#888888", linewidth=0.9, linestyle=":")
            page.add_scatter(x=ends, y=ends, mode="lines", line={"color": "#888888", "dash": "dot"}, showlegend=False, row=1, col=column)  # fmt: skip
            axis.set(title=POINTS[point], xlabel="first-order estimate")
        axes[0].set_ylabel("exact effect")
        figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=min(5, len(handles)))
    page.update_xaxes(title_text="first-order estimate").update_yaxes(title_text="exact effect", col=1)
    return figure, page.update_layout(**{**LAYOUT, "hovermode": "closest"}, height=440, legend={"orientation": "h", "y": -0.25})


def _ends(groups: Mapping[str, Sequence[Sequence[float]]]) -> list[float]:
    every = [value for both in groups.values() for side in both for value in side]
    return [min(every), max(every)]


def _shown(values: np.ndarray) -> np.ndarray:
    """Without the signs of what rounds to zero."""
    return np.where(np.abs(values) < 0.005, 0.0, values)
