"""Figures of one example: attention laid over the picture, mass by layer, and the lens."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from probe.plots.style import LAYOUT, styled, ticks
from probe.tokens import Grid

_SEGMENT_COLOURS = {
    "bos": "#4D4D4D", "system": "#999999", "image": "#0072B2", "separator": "#D9D9D9", "context": "#56B4E9", "question": "#D55E00",
    "options": "#CC79A7", "suffix": "#E69F00", "header": "#009E73", "answer": "#000000", "pad": "#FFFFFF", "video": "#0072B2",
    "audio": "#0072B2",
}  # fmt: skip


def overlay(
    picture: Image.Image, grid: Grid, weights: np.ndarray, strength: float = 0.78, peak: float | None = None
) -> Image.Image:
    """The picture dimmed where a grid of weights (row column) is low, each cell where the original shows it.

    Weights are scaled by their maximum, or by a `peak` that several pictures share; a grid that is all zero leaves the
    picture dim.
    """
    frame = picture.convert("RGB")
    most = float(weights.max()) if peak is None else float(peak)
    scaled = weights / most if most > 0 else weights
    left, top, right, bottom = grid.area
    mask = np.zeros((frame.height, frame.width), dtype=np.float32)
    ys = (np.arange(frame.height) + 0.5 - top) / (bottom - top) * scaled.shape[0]
    xs = (np.arange(frame.width) + 0.5 - left) / (right - left) * scaled.shape[1]
    inside_y, inside_x = (ys >= 0) & (ys < scaled.shape[0]), (xs >= 0) & (xs < scaled.shape[1])
    rows, columns = np.nonzero(inside_y)[0], np.nonzero(inside_x)[0]
    mask[np.ix_(rows, columns)] = scaled[np.ix_(ys[rows].astype(int), xs[columns].astype(int))]
    pixels = np.asarray(frame, np.float32)
    warm = np.array([255.0, 196.0, 60.0], np.float32)
    lit = pixels * (1 - strength * (1 - mask[..., None])) + 0.28 * mask[..., None] * (warm - pixels)
    return Image.fromarray(np.uint8(np.clip(lit, 0, 255)))


def overlay_figure(picture: Image.Image, panels: Sequence[tuple[str, Image.Image]]) -> Any:
    """The picture, and beside it one overlay for each band of layers (matplotlib)."""
    with styled() as figure_class:
        figure = figure_class(figsize=(2.6 * (1 + len(panels)), 3.0))
        axes = figure.subplots(1, 1 + len(panels), squeeze=False)[0]
        for axis, (title, shown) in zip(axes, [("the picture", picture), *panels], strict=True):
            axis.imshow(shown, interpolation="nearest")
            axis.set_title(title)
            axis.set_axis_off()
    return figure


def overlay_page(picture: Image.Image, panels: Sequence[tuple[str, Image.Image]]) -> Any:
    """The same as a plotly page."""
    from plotly.subplots import make_subplots

    shown = [("the picture", picture), *panels]
    figure = make_subplots(rows=1, cols=len(shown), subplot_titles=[title for title, _ in shown])
    for column, (_, image) in enumerate(shown, 1):
        figure.add_image(z=np.asarray(image.convert("RGB")), row=1, col=column)
    figure.update_xaxes(visible=False).update_yaxes(visible=False)
    return figure.update_layout(**{**LAYOUT, "hovermode": "closest"}, height=340)


def mass_figure(mass: np.ndarray, groups: Sequence[str]) -> Any:
    """Attention of the last position by layer, stacked by group (layer group) (matplotlib)."""
    with styled() as figure_class:
        figure = figure_class(figsize=(5.2, 3.2))
        axis = figure.subplots()
        layers = list(range(len(mass)))
        axis.stackplot(layers, mass.T, labels=groups, colors=[_SEGMENT_COLOURS[name] for name in groups], linewidth=0)
        axis.set(
            title="Where the last position looks",
            xlabel="layer",
            ylabel="share of attention",
            ylim=(0, 1),
            xlim=(0, len(mass) - 1),
        )
        axis.set_xticks(ticks(layers))
        axis.grid(False)
        axis.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def mass_page(mass: np.ndarray, groups: Sequence[str]) -> Any:
    """The same as a plotly page."""
    import plotly.graph_objects as go

    figure = go.Figure()
    for index, name in enumerate(groups):
        figure.add_bar(
            x=list(range(len(mass))), y=mass[:, index], name=name, marker_color=_SEGMENT_COLOURS[name], hovertemplate="%{y:.3f}"
        )
    return figure.update_layout(
        **LAYOUT, barmode="stack", bargap=0.05, xaxis_title="layer", yaxis_title="share of attention", height=420
    )


def lens_figure(words: Sequence[Sequence[str]], probs: np.ndarray) -> Any:
    """The lens at the last position: the likeliest tokens of each layer (layer top), darker where likelier (matplotlib)."""
    with styled() as figure_class:
        layers, top = probs.shape
        figure = figure_class(figsize=(1.15 * top + 1.2, 0.34 * layers + 0.9))
        axis = figure.subplots()
        axis.imshow(probs, aspect="auto", cmap="Blues", vmin=0, vmax=1, origin="lower")
        for layer in range(layers):
            for rank in range(top):
                colour = "white" if probs[layer, rank] > 0.55 else "#222222"
                axis.text(
                    rank,
                    layer,
                    f"{words[layer][rank]}  {probs[layer, rank]:.2f}",
                    ha="center",
                    va="center",
                    fontsize=7,
                    parse_math=False,
                    color=colour,
                )
        axis.set(
            title="What each layer would answer",
            xlabel="rank",
            ylabel="layer",
            xticks=range(top),
            yticks=ticks(list(range(layers))),
        )
        axis.set_xticklabels([str(rank + 1) for rank in range(top)])
        axis.grid(False)
    return figure


def lens_page(words: Sequence[Sequence[str]], probs: np.ndarray) -> Any:
    """The same as a plotly page."""
    import plotly.graph_objects as go

    text = [[f"{word}<br>{p:.2f}" for word, p in zip(row, line, strict=True)] for row, line in zip(words, probs, strict=True)]
    figure = go.Figure(
        go.Heatmap(z=probs, text=text, texttemplate="%{text}", colorscale="Blues", zmin=0, zmax=1, showscale=False)
    )
    figure.update_layout(
        **{**LAYOUT, "hovermode": "closest"}, xaxis_title="rank", yaxis_title="layer", height=120 + 44 * len(probs)
    )
    return figure


def answer_figure(
    written: Sequence[str], mass: np.ndarray, groups: Sequence[str], words: Sequence[Sequence[str]], probs: np.ndarray
) -> Any:
    """An answer token by token: what each position looks at (step group), and the lens's first word (layer step) (matplotlib)."""
    with styled() as figure_class:
        layers, steps = probs.shape
        figure = figure_class(figsize=(max(4.4, 0.85 * steps + 2.0), 1.5 + 0.26 * layers + 1.0))
        above, below = figure.subplots(2, 1, sharex=True, height_ratios=[1.5, 0.26 * layers + 0.4])
        base = np.zeros(steps)
        for index, name in enumerate(groups):
            above.bar(range(steps), mass[:, index], bottom=base, color=_SEGMENT_COLOURS[name], label=name, width=0.8)
            base += mass[:, index]
        above.set(title="The answer, token by token", ylabel="share of attention", ylim=(0, 1))
        above.grid(False)
        above.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
        drawn = below.imshow(probs, aspect="auto", cmap="Blues", vmin=0, vmax=1, origin="lower")
        for layer in range(layers):
            for step in range(steps):
                colour = "white" if probs[layer, step] > 0.55 else "#222222"
                word = words[layer][step]
                shown = word if len(word) <= 9 else word[:8] + "\N{HORIZONTAL ELLIPSIS}"
                below.text(step, layer, shown, ha="center", va="center", fontsize=7, parse_math=False, color=colour)
        figure.colorbar(drawn, ax=below, label="probability of the token", pad=0.02)
        below.set(ylabel="layer", xlabel="token written", yticks=ticks(list(range(layers))), xticks=range(steps))
        below.set_xticklabels(written, rotation=0 if steps <= 12 else 45, parse_math=False)
        below.grid(False)
    return figure


def answer_page(
    written: Sequence[str], mass: np.ndarray, groups: Sequence[str], words: Sequence[Sequence[str]], probs: np.ndarray
) -> Any:
    """The same as a plotly page."""
    from plotly.subplots import make_subplots

    labels = [f"{step + 1}. {word}" for step, word in enumerate(written)]  # a word may be written twice
    figure = make_subplots(rows=2, cols=1, shared_xaxes=True, row_heights=[0.35, 0.65], vertical_spacing=0.05)
    for index, name in enumerate(groups):
        figure.add_bar(
            x=labels, y=mass[:, index], name=name, marker_color=_SEGMENT_COLOURS[name], hovertemplate="%{y:.3f}", row=1, col=1
        )
    figure.add_heatmap(
        x=labels, y=list(range(len(probs))), z=probs, text=words, texttemplate="%{text}", colorscale="Blues", zmin=0, zmax=1,
        showscale=False, hovertemplate="layer %{y}: %{text} %{z:.2f}<extra></extra>", row=2, col=1,
    )  # fmt: skip
    figure.update_yaxes(title_text="share of attention", row=1, col=1).update_yaxes(title_text="layer", row=2, col=1)
    return figure.update_layout(**{**LAYOUT, "hovermode": "closest"}, barmode="stack", height=280 + 30 * len(probs))


def tokens_figure(spans: Sequence[tuple[str, int, int]]) -> Any:
    """How the positions of a prompt lie: one bar, a colour for each segment (matplotlib)."""
    with styled() as figure_class:
        figure = figure_class(figsize=(8.5, 1.3))
        axis = figure.subplots()
        for segment, start, stop in spans:
            axis.barh(
                0, stop - start, left=start, color=_SEGMENT_COLOURS[segment], edgecolor="white", linewidth=0.6, label=segment
            )
        handles, labels = axis.get_legend_handles_labels()
        unique = dict(zip(labels, handles, strict=True))
        axis.legend(
            unique.values(),
            unique.keys(),
            ncols=len(unique),
            loc="upper center",
            bbox_to_anchor=(0.5, 1.45),
            columnspacing=1.2,
            handlelength=1,
        )
        axis.set(xlabel="position", yticks=[], xlim=(spans[0][1], spans[-1][2]))
        axis.grid(False)
        axis.spines["left"].set_visible(False)
    return figure


def tokens_page(spans: Sequence[tuple[str, int, int]]) -> Any:
    """The same as a plotly page."""
    import plotly.graph_objects as go

    figure = go.Figure()
    seen: set[str] = set()
    for segment, start, stop in spans:
        figure.add_bar(
            x=[stop - start], y=["prompt"], base=[start], orientation="h", name=segment, legendgroup=segment, showlegend=segment not in seen,
            marker_color=_SEGMENT_COLOURS[segment], hovertemplate=f"{segment}: {start} to {stop - 1}<extra></extra>",
        )  # fmt: skip
        seen.add(segment)
    return figure.update_layout(**{**LAYOUT, "hovermode": "closest"}, barmode="overlay", height=220, xaxis_title="position")
