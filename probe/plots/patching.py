"""Figures of activation patching: groups of positions by layer, the object beside its control, heads, exact beside estimated."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from probe.plots.panels import Line, Pair, colour, curves, noted, tables
from probe.plots.style import LAYOUT, styled, ticks

GROUPS = {
    "object": "object", "nudged": "object, equal change", "random": "random positions", "others": "all others", "context": "context", "word": "object's word",
    "question": "rest of question", "suffix": "suffix", "header": "header", "last": "last position",
}  # fmt: skip
POINTS = {
    "resid_pre": "residual stream", "attn_out": "attention", "mlp_out": "feed-forward", "z": "heads",
}  # fmt: skip
COLOURS = {
    "object": colour(1), "nudged": "#A03000", "random": colour(6), "others": colour(4), "last": colour(0), "word": colour(2), "question": colour(3),
    "suffix": colour(5), "header": "#7A5C3E", "context": "#8A8A8A",
}  # fmt: skip
BESIDE = ("others", "last", "object", "nudged", "random")  # drawn as curves; the others are in the heat maps
BANDS = "bands: 95 % bootstrap intervals over pairs"
STRONGEST = 10  # heads that are drawn with their intervals
Sites = Mapping[str, Mapping[str, Mapping[str, Any]]]  # point, group: a curve with `layers mean low high`


def sites(found: Sites, n: int, windowed: bool = False) -> Pair:
    """Mean effect of each group of positions at each layer (or window of layers), a heat map for each point."""
    groups = [group for group in GROUPS if any(group in one for one in found.values())]
    layers = next(iter(next(iter(found.values())).values()))["layers"]
    values = [
        np.array([one[group]["mean"] if group in one else [np.nan] * len(layers) for group in groups], dtype=float)
        for one in found.values()
    ]
    drawn = tables(
        [POINTS[point] for point in found], [_shown(table) for table in values], [GROUPS[group] for group in groups], [str(layer) for layer in layers],
        (-1.0, 1.0), "RdBu_r", "effect", across="centre of the window" if windowed else "layer",
    )  # fmt: skip
    return noted(drawn, f"n = {n} pairs, means")


def controlled(found: Sites, n: int, windowed: bool = False) -> Pair:
    """Effect of the object by layer beside both controls, all others, and the last position, with bands."""
    panels: list[tuple[str, list[Line]]] = []
    for point, one in found.items():
        lines = [(GROUPS[g], one[g], COLOURS[g], g in ("random", "nudged")) for g in BESIDE if g in one]
        panels.append((POINTS[point], lines))
    x = [next(iter(one.values()))["layers"] for one in found.values()]
    drawn = curves(panels, x, "centre of the window" if windowed else "layer", "effect (1: the whole fact)")
    return noted(drawn, f"n = {n} pairs; {BANDS}")


def agreement(found: Mapping[str, Mapping[str, Mapping[str, Any]]], n: int) -> Pair:
    """Correlation of the estimates with the exact effects by layer, a panel for each point (variant, point: a curve)."""
    styles = {"attribution": (colour(0), False), "integrated": (colour(2), True)}
    points = list(next(iter(found.values())))
    panels: list[tuple[str, list[Line]]] = [
        (POINTS[point], [(name, one[point], *styles[name]) for name, one in found.items()]) for point in points
    ]
    x = [next(iter(found.values()))[point]["layers"] for point in points]
    return noted(curves(panels, x, "layer", "correlation with the exact effect"), f"n = {n} pairs; {BANDS}")


def heads(found: Mapping[str, Any]) -> Pair:
    """Left, the mean effect of each head's output at the last position; right, the strongest with their intervals."""
    from plotly.subplots import make_subplots

    mean, low, high = (np.array(found[name], dtype=float) for name in ("mean", "low", "high"))
    reach = max(0.05, float(np.nanmax(np.abs(mean))))
    order = np.argsort(-mean, axis=None)[:STRONGEST]
    names = [f"{layer}.{head}" for layer, head in zip(*np.unravel_index(order, mean.shape), strict=True)]
    values, bars = mean.ravel()[order], np.abs(np.stack([low.ravel()[order], high.ravel()[order]]) - mean.ravel()[order])
    with styled() as figure_class:
        figure = figure_class(figsize=(8.6, max(3.2, 0.26 * mean.shape[1] + 1.4)))
        left, right = figure.subplots(1, 2, width_ratios=[1.3, 1])
        drawn = left.imshow(mean.T, vmin=-reach, vmax=reach, cmap="RdBu_r", aspect="auto")
        left.set(title="Heads at the last position", xlabel="layer", ylabel="head", xticks=ticks(list(range(len(mean)))))
        left.set_yticks(ticks(list(range(mean.shape[1]))))
        left.grid(False)
        figure.colorbar(drawn, ax=left, label="mean effect")
        right.errorbar(values, range(len(order)), xerr=bars, fmt="o", color=colour(0), capsize=2)
        right.axvline(0, color="#888888", linewidth=0.9, linestyle=":")
        right.set(title="The strongest (layer.head)", xlabel="effect", yticks=range(len(order)))
        right.set_yticklabels(names)
        right.invert_yaxis()
    page = make_subplots(rows=1, cols=2, subplot_titles=["Heads at the last position", "The strongest (layer.head)"])
    page.add_heatmap(z=mean.T, zmin=-reach, zmax=reach, colorscale="RdBu_r", showscale=False, row=1, col=1)
    page.add_scatter(
        x=values, y=names, mode="markers", marker={"color": colour(0)}, showlegend=False,
        error_x={"array": bars[1], "arrayminus": bars[0]}, row=1, col=2,
    )  # fmt: skip
    page.update_yaxes(type="category", autorange="reversed", col=2).update_xaxes(title_text="layer", col=1)
    page.update_layout(**{**LAYOUT, "hovermode": "closest"}, height=420)
    return noted((figure, page), f"n = {found['n']} pairs; bars: 95 % bootstrap intervals over pairs")


def scatter(found: Mapping[str, Mapping[str, Mapping[str, Any]]], n: int) -> Pair:
    """Exact effect against the estimate, a mark for each layer (mean over pairs), a colour for each group, a panel for each point."""
    from plotly.subplots import make_subplots

    page = make_subplots(rows=1, cols=len(found), subplot_titles=[POINTS[point] for point in found])
    with styled() as figure_class:
        figure = figure_class(figsize=(3.1 * len(found) + 0.6, 4.1))
        axes = figure.subplots(1, len(found), squeeze=False)[0]
        handles: dict[str, Any] = {}
        for column, (axis, (point, groups)) in enumerate(zip(axes, found.items(), strict=True), 1):
            for name, one in groups.items():
                label, shade, (exact, estimate) = GROUPS[name], COLOURS[name], one["mean"]
                bars = np.abs(np.array([one["low"][0], one["high"][0]]) - np.array(exact))
                drawn = axis.errorbar(estimate, exact, yerr=bars, fmt="o", color=shade, markersize=4, elinewidth=0.7, alpha=0.8)
                shown = label not in handles
                handles.setdefault(label, drawn)
                page.add_scatter(
                    x=list(estimate), y=list(exact), mode="markers", name=label, legendgroup=label, showlegend=shown,
                    marker={"color": shade}, error_y={"array": bars[1], "arrayminus": bars[0], "thickness": 1}, row=1, col=column,
                )  # fmt: skip
            ends = _ends(groups)
            axis.plot(ends, ends, color="#888888", linewidth=0.9, linestyle=":")
            page.add_scatter(x=ends, y=ends, mode="lines", line={"color": "#888888", "dash": "dot"}, showlegend=False, row=1, col=column)  # fmt: skip
            axis.set(title=POINTS[point], xlabel="first-order estimate")
        axes[0].set_ylabel("exact effect")
        figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=min(5, len(handles)))
    page.update_xaxes(title_text="first-order estimate").update_yaxes(title_text="exact effect", col=1)
    page.update_layout(**{**LAYOUT, "hovermode": "closest"}, height=440, legend={"orientation": "h", "y": -0.25})
    return noted((figure, page), f"n = {n} pairs, means; bars: 95 % bootstrap intervals of the exact effect over pairs")


def _ends(groups: Mapping[str, Mapping[str, Any]]) -> list[float]:
    every = [value for one in groups.values() for side in one["mean"] for value in side]
    return [min(every), max(every)]


def _shown(values: np.ndarray) -> np.ndarray:
    """Without the signs of what rounds to zero."""
    return np.where(np.abs(values) < 0.005, 0.0, values)
