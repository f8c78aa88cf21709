"""Figures of clips and sounds: attention frame by frame over the frames, second by second over the wave form."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from probe.media import Clip, Wave
from probe.plots.look import overlay
from probe.plots.style import LAYOUT, styled
from probe.tokens import Grid

Bands = Sequence[tuple[str, np.ndarray]]  # name of a band of layers, its weights (frame row column)
COLOURS = ("#56B4E9", "#009E73", "#D55E00")  # early, middle, late layers
POINTS = 2000  # of a wave form, at most


def share_of_frames(weights: np.ndarray) -> np.ndarray:
    """Each frame's share of the weights that fall on the clip (frame), from (frame row column)."""
    total = weights.sum()
    return weights.sum((1, 2)) / total if total > 0 else weights.sum((1, 2))


def clip_figure(clip: Clip, grid: Grid, bands: Bands) -> Any:
    """One row of frames for each band of layers, each frame lit where it is looked at, with its share (matplotlib)."""
    with styled() as figure_class:
        count = len(grid.times)
        figure = figure_class(figsize=(1.7 * count, 1.9 * len(bands) + 0.3))
        axes = figure.subplots(len(bands), count, squeeze=False)
        for line, (name, weights) in zip(axes, bands, strict=True):
            shares, peak = share_of_frames(weights), float(weights.max())
            for i, axis in enumerate(line):
                axis.imshow(_lit(clip, grid, weights, i, peak), interpolation="nearest")
                axis.set_title(f"{grid.times[i][0]:.2g} s: {shares[i]:.0%}", fontsize=8)
                axis.set(xticks=[], yticks=[])
                axis.grid(False)
            line[0].set_ylabel(name)
    return figure


def clip_page(clip: Clip, grid: Grid, bands: Bands) -> Any:
    """The same as a plotly page."""
    from plotly.subplots import make_subplots

    titles = [
        f"{name}, {grid.times[i][0]:.2g} s: {share:.0%}" for name, weights in bands for i, share in enumerate(share_of_frames(weights))
    ]  # fmt: skip
    figure = make_subplots(rows=len(bands), cols=len(grid.times), subplot_titles=titles)
    for row, (_, weights) in enumerate(bands, 1):
        for i in range(len(grid.times)):
            figure.add_image(z=np.asarray(_lit(clip, grid, weights, i, float(weights.max()))), row=row, col=i + 1)
    figure.update_xaxes(visible=False).update_yaxes(visible=False)
    return figure.update_layout(**{**LAYOUT, "hovermode": "closest"}, height=240 * len(bands))


def _lit(clip: Clip, grid: Grid, weights: np.ndarray, index: int, peak: float) -> Any:
    """A frame (the first of its group) with its weights on the clip's common scale."""
    shown = clip.frames[min(index * (len(clip.frames) // len(grid.times) or 1), len(clip.frames) - 1)]
    return overlay(shown, grid, weights[index], peak=peak)


def sound_figure(wave: Wave, grid: Grid, bands: Bands) -> Any:
    """The wave form, and above it the attention that each second gets, one line for each band of layers (matplotlib)."""
    with styled() as figure_class:
        figure = figure_class(figsize=(7.5, 3.4))
        above, below = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))
        edges = [start for start, _ in grid.times] + [grid.times[-1][1]]
        for (name, weights), colour in zip(bands, COLOURS, strict=False):
            above.stairs(weights[:, 0, 0], edges, label=name, color=colour, linewidth=1.6)
        above.set(title="Where the last position listens", ylabel="attention", ylim=(0, None))
        above.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
        seconds, samples = _thinned(wave)
        below.plot(seconds, samples, color="#4D4D4D", linewidth=0.5)
        below.set(xlabel="second", ylabel="sound", yticks=[], xlim=(0, wave.seconds))
        below.grid(False)
    return figure


def sound_page(wave: Wave, grid: Grid, bands: Bands) -> Any:
    """The same as a plotly page."""
    from plotly.subplots import make_subplots

    figure = make_subplots(rows=2, cols=1, shared_xaxes=True, row_heights=(0.65, 0.35), vertical_spacing=0.05)
    middles = [(start + stop) / 2 for start, stop in grid.times]
    for (name, weights), colour in zip(bands, COLOURS, strict=False):
        figure.add_scatter(
            x=middles, y=weights[:, 0, 0], name=name, mode="lines", line={"shape": "hvh", "color": colour}, row=1, col=1
        )
    seconds, samples = _thinned(wave)
    figure.add_scatter(
        x=seconds, y=samples, mode="lines", showlegend=False, line={"color": "#4D4D4D", "width": 1}, row=2, col=1
    )
    figure.update_yaxes(title_text="attention", rangemode="tozero", row=1, col=1)
    figure.update_xaxes(title_text="second", row=2, col=1)
    return figure.update_layout(**LAYOUT, height=420)


def _thinned(wave: Wave) -> tuple[np.ndarray, np.ndarray]:
    """Seconds and samples, every so many, so that a figure stays small: of each stretch its loudest sample."""
    step = max(1, len(wave.samples) // POINTS)
    count = len(wave.samples) // step
    stretches = wave.samples[: count * step].reshape(count, step)
    loudest = np.abs(stretches).argmax(1)
    return (np.arange(count) * step + loudest) / wave.rate, stretches[np.arange(count), loudest]
