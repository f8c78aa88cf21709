"""Figures of image attention: where a model looks, how well that tells wrong answers, and which heads differ."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from probe.plots import panels
from probe.plots.panels import GREY, Line, Pair
from probe.plots.style import COLOURS, LAYOUT, styled

Summary = Mapping[str, Any]
SIDES = {"invented": ("not there", "there"), "wrong": ("wrong", "right")}
TITLES = {"invented": "Things said to be there", "wrong": "Wrong answers"}


def ratios(summary: Summary, name: str | None) -> Pair:
    """Left, the attention to what is shown by layer; right, how the answers that are compared differ in it."""
    drawn: list[tuple[str, list[Line]]] = [
        ("Attention to what is shown", [("all answers", summary["ratio"], COLOURS[2], False)])
    ]
    if name is not None:
        found = summary["comparisons"][name]
        title = f"{SIDES[name][0].capitalize()} ({found['n_detected']}) less {SIDES[name][1]} ({found['n_beside']})"
        drawn.append((title, [("difference", found["by_layer"], COLOURS[0], False)]))
    figure, page = panels.curves(drawn, [summary["layers"]] * len(drawn), "layer", "share of attention", share=False)
    figure.set_size_inches(4.3 * len(drawn), 3.6)
    start, stop = summary["windows"].get("middle", summary["windows"]["all"])
    for column, axis in enumerate(figure.axes, 1):
        axis.axvspan(start - 0.25, stop + 0.25, color="#F2F2F2", zorder=0, linewidth=0)
        page.add_vrect(x0=start - 0.25, x1=stop + 0.25, fillcolor="#F2F2F2", layer="below", line_width=0, row=1, col=column)
    if name is not None:
        figure.axes[1].axhline(0, color=GREY, linewidth=0.9, linestyle=":")
        page.add_hline(y=0, line_dash="dot", line_color=GREY, row=1, col=2)
    return figure, page


def detection(summary: Summary, names: Sequence[str]) -> Pair:
    """AUROC of SVAR in each window and of the answer's own probability, beside permuted labels."""
    drawn = []
    for name in names:
        found = summary["comparisons"][name]["detected"]
        label = {sign: "answer's probability" if sign == "answer" else f"SVAR, {sign}" for sign in found}
        own = {label[sign]: {"value": one["auroc"], "low": one["low"], "high": one["high"]} for sign, one in found.items()}
        null = {label[sign]: {"value": 0.5, "low": one["null_low"], "high": one["null_high"]} for sign, one in found.items()}
        drawn.append((TITLES[name], [("AUROC", own, COLOURS[0]), ("permuted labels", null, GREY)]))
    return panels.values(drawn, "AUROC", line=0.5)


def heads(summary: Summary, names: Sequence[str]) -> Pair:
    """Attention to what is shown by layer and head; beside it, what differs, heads that do at a low false discovery rate marked."""
    mass = np.array(summary["heads"])
    rows, columns = [str(layer) for layer in summary["layers"]], [str(head) for head in range(mass.shape[1])]
    if not names:
        return panels.tables(
            ["Attention to what is shown"], [mass], rows, columns, (0.0, 1.0), "Blues", "share", down="layer", across="head"
        )
    found = summary["comparisons"][names[0]]
    gap, clear = np.array(found["difference"]), np.array(found["q"], dtype=float) < 0.05
    reach = float(np.abs(gap).max()) or 1.0
    title = f"{SIDES[names[0]][0].capitalize()} less {SIDES[names[0]][1]} (boxed: q < 0.05)"
    with styled() as figure_class:
        wide, tall = max(2.6, 0.26 * len(columns)), max(2.4, 0.26 * len(rows))
        figure = figure_class(figsize=(2 * wide + 3.0, tall + 1.0))
        axes = figure.subplots(1, 2)
        for axis, table, name, limits, colours in (
            (axes[0], mass, "Attention to what is shown", (0, 1), "Blues"), (axes[1], gap, title, (-reach, reach), "RdBu_r"),
        ):  # fmt: skip
            image = axis.imshow(table, vmin=limits[0], vmax=limits[1], cmap=colours, aspect="auto")
            figure.colorbar(image, ax=axis, shrink=0.9)
            axis.set(title=name, xlabel="head", ylabel="layer")
            for places, labels, put in (
                (range(len(columns)), columns, axis.set_xticks),
                (range(len(rows)), rows, axis.set_yticks),
            ):
                step = -(-len(labels) // 16)
                put(list(places)[::step], list(labels)[::step])
            axis.grid(False)
        for i, j in np.argwhere(clear):
            axes[1].add_patch(_box(i, j))
    return figure, _heads_page(mass, gap, clear, rows, columns, reach, title)


def _box(row: int, column: int) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle((column - 0.46, row - 0.46), 0.92, 0.92, fill=False, edgecolor="#222222", linewidth=1.2)


def _heads_page(
    mass: np.ndarray, gap: np.ndarray, clear: np.ndarray, rows: Sequence[str], columns: Sequence[str], reach: float, title: str
) -> Any:
    from plotly.subplots import make_subplots

    page = make_subplots(rows=1, cols=2, subplot_titles=["Attention to what is shown", title], shared_yaxes=True)
    page.add_heatmap(z=mass, x=list(columns), y=list(rows), zmin=0, zmax=1, colorscale="Blues", showscale=False, row=1, col=1)
    page.add_heatmap(
        z=gap, x=list(columns), y=list(rows), zmin=-reach, zmax=reach, colorscale="RdBu_r", text=np.where(clear, "q < 0.05", ""),
        texttemplate="%{text}", row=1, col=2,
    )  # fmt: skip
    page.update_yaxes(autorange="reversed", type="category").update_xaxes(type="category")
    return page.update_layout(**{**LAYOUT, "hovermode": "closest"}, height=220 + 30 * len(rows))
