"""The grounding study's figures: maps laid over pictures, scores beside baselines, and where in the model the maps are made."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from probe.plots.look import overlay
from probe.plots.panels import GREY, Pair, Series, colour, curves, noted, tables, values
from probe.plots.style import LAYOUT, styled
from probe.tokens import Grid

METRICS = {"iou": "IoU", "hit": "Acc@0.5", "pointing": "pointing game", "auc": "AUC"}
BOX = "#7CFC00"
# (what is asked, the picture, the phrase's boxes in its pixels, {method: map})
Shown = tuple[str, Image.Image, Sequence[Sequence[float]], Mapping[str, np.ndarray]]


def overlays(shown: Sequence[Shown]) -> Pair:
    """A row for each phrase: the picture with its boxes, then each method's map over it."""
    methods = list(shown[0][3])
    rows = [
        [picture.convert("RGB"), *(_lit(picture, maps[name]) for name in methods)] for _, picture, _, maps in shown
    ]  # fmt: skip
    return _overlays_on_paper(shown, methods, rows), _overlays_on_page(shown, methods, rows)


def _lit(picture: Image.Image, table: np.ndarray) -> Image.Image:
    area = (0.0, 0.0, float(picture.width), float(picture.height))
    return overlay(picture, Grid(0, np.zeros((1, *table.shape), dtype=np.int64), area), table - table.min())


def _overlays_on_paper(shown: Sequence[Shown], methods: Sequence[str], rows: Sequence[Sequence[Image.Image]]) -> Any:
    from matplotlib.patches import Rectangle

    with styled() as figure_class:
        figure = figure_class(figsize=(1.75 * (1 + len(methods)), 2.0 * len(rows)))
        axes = figure.subplots(len(rows), 1 + len(methods), squeeze=False)
        for i, (row, (asked, _, boxes, _)) in enumerate(zip(rows, shown, strict=True)):
            for axis, image, method in zip(axes[i], row, ["the picture", *methods], strict=True):
                axis.imshow(image, interpolation="nearest")
                axis.set_axis_off()
                if i == 0:
                    axis.set_title(method.replace(", ", ",\n"), fontsize=8, loc="center")
                for left, top, right, bottom in boxes:
                    axis.add_patch(
                        Rectangle((left - 0.5, top - 0.5), right - left, bottom - top, fill=False, edgecolor=BOX, linewidth=1.1)
                    )
            axes[i, 0].text(
                0.0, -0.03, _broken(asked), transform=axes[i, 0].transAxes, va="top", fontsize=7, parse_math=False
            )  # fmt: skip
    return figure


def _broken(asked: str, width: int = 30) -> str:
    from textwrap import wrap

    return "\n".join(wrap(asked, width)[:2])


def _overlays_on_page(shown: Sequence[Shown], methods: Sequence[str], rows: Sequence[Sequence[Image.Image]]) -> Any:
    from plotly.subplots import make_subplots

    titles = [asked if k == 0 else method for asked, *_ in shown for k, method in enumerate(["", *methods])]
    page = make_subplots(rows=len(rows), cols=1 + len(methods), subplot_titles=titles, vertical_spacing=0.05)
    for i, (row, (_, _, boxes, _)) in enumerate(zip(rows, shown, strict=True), 1):
        for j, image in enumerate(row, 1):
            page.add_image(z=np.asarray(image), row=i, col=j)
            for left, top, right, bottom in boxes:
                page.add_shape(
                    type="rect", x0=left - 0.5, x1=right - 0.5, y0=top - 0.5, y1=bottom - 0.5,
                    line={"color": BOX, "width": 2}, row=i, col=j,
                )  # fmt: skip
    page.update_xaxes(visible=False).update_yaxes(visible=False).update_annotations(font_size=10)
    return page.update_layout(**{**LAYOUT, "hovermode": "closest"}, height=80 + 230 * len(rows))


def scores(summary: Mapping[str, Any]) -> Pair:
    """Every method and baseline on every score, beside the same maps scored against another object's box."""
    panels: list[tuple[str, list[Series]]] = []
    for metric, title in METRICS.items():
        own = {name: found[metric] for name, found in summary["methods"].items()}
        other = {name: found[metric] for name, found in summary["null"].items()}
        panels.append((title, [("the phrase's box", own, colour(0)), ("another object's box", other, GREY)]))
    return noted(values(panels, "mean, 95 % interval", share=False), _counted(summary))


def _counted(summary: Mapping[str, Any]) -> str:
    return f"n = {summary['n_scenes']} scenes ({summary['n_phrases']} phrases)"


def heads(summary: Mapping[str, Any]) -> Pair:
    """AUC of every head's map, layer by layer, for both sources."""
    found = summary["heads"]
    layers = [str(layer) for layer in summary["layers"]]
    columns = [str(head) for head in range(summary["heads_per_layer"])]
    sources = list(found)
    drawn = tables(
        [SOURCES[source] for source in sources], [found[source]["auc"] for source in sources], layers, columns, (0.0, 1.0), "RdBu_r",
        "AUC (chance 0.5)", down="layer", across="head",
    )  # fmt: skip
    return noted(drawn, f"{_counted(summary)}, means")


SOURCES = {"word": "the word's own rows", "last": "the last position"}


def by_layer(summary: Mapping[str, Any]) -> Pair:
    """AUC by layer: the head that the other half of the scenes chose, the mean of all heads, and the null."""
    panels = [
        (SOURCES[source], [
            ("head chosen on the other half", found["best"], colour(0), False),
            ("mean of the layer's heads", found["mean"], colour(1), False),
            ("the same head, another object's box", found["null"], GREY, True),
        ])
        for source, found in summary["curves"].items()
    ]  # fmt: skip
    drawn = curves(panels, [summary["layers"]] * len(panels), "layer", "AUC")
    return noted(drawn, f"{_counted(summary)}; bands: 95 % bootstrap intervals over scenes")
