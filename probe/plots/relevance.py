"""Figures of the relevance study. Each gives the figure twice: for paper, and for a page."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from probe.example import Region
from probe.plots import panels
from probe.plots.look import overlay, overlay_figure, overlay_page
from probe.plots.panels import GREY, Line, Pair, Series
from probe.plots.style import COLOURS
from probe.tokens import Grid

Summary = Mapping[str, Any]
INTERVALS = "95 % bootstrap intervals over examples"


def mass(summary: Summary) -> Pair:
    """What each method puts on the object beyond its area, beside the same for the mirrored box."""
    known = {method: found for method, found in summary["mass"].items() if found}
    own = {method: found["gain"] for method, found in known.items()}
    other = {method: f["mirrored_gain"] for method, f in known.items() if f["mirrored_gain"]["value"] is not None}
    series: list[Series] = [("the object", own, COLOURS[0])]
    if other:
        series.append(("the mirrored box", other, GREY))
    counted = max((one["n"] for one in own.values()), default=0)
    drawn = panels.values([("Pointing at the object", series)], "share of relevance beyond the area", line=0.0)
    return panels.noted(drawn, f"n = {counted} with an object; bars: {INTERVALS}")


def deletion(summary: Summary) -> Pair:
    """Drop of the answer's probability by the share of positions taken away, a line for each method; random dashed."""
    shares, found = summary["shares"], summary["deletion"]
    percent = [round(100 * share) for share in shares]
    drawn = []
    for order in ("highest", "lowest"):
        lines: list[Line] = [
            (method, _line([found[method][str(share)][order] for share in shares]), COLOURS[k], False)
            for k, method in enumerate(summary["mass"])
        ]
        drawn.append(
            (f"{order.capitalize()} first", [*lines, ("random", _line([found["random"][str(s)] for s in shares]), GREY, True)])
        )
    pair = panels.curves(drawn, [percent, percent], "percent taken away", "drop of p(answer)")
    return panels.noted(pair, f"n = {summary['n']}; bands: {INTERVALS}")


def _line(points: Sequence[Mapping[str, Any]]) -> dict[str, list[float]]:
    return {name: [point[key] for point in points] for name, key in (("mean", "value"), ("low", "low"), ("high", "high"))}


def segments(summary: Summary) -> Pair:
    """Share of relevance by segment of the prompt (method segment)."""
    found = summary["segments"]
    names = list(dict.fromkeys(name for each in found.values() for name in each))
    table = [
        [np.nan if each.get(name, {}).get("value") is None else each[name]["value"] for name in names]
        for each in found.values()
    ]
    pair = panels.tables(
        ["Where relevance lies"], [table], list(found), names, (0.0, 1.0), "Blues", "share of positive relevance"
    )
    return panels.noted(pair, f"n = {summary['n']}, means")


def over_picture(
    picture: Image.Image, grid: Grid, maps: Sequence[tuple[str, np.ndarray]], title: str, regions: Sequence[Region]
) -> Pair:
    """Maps (row column) of several methods laid over one picture, with frames around what the question is about."""
    shown = [(name, overlay(picture, grid, weights)) for name, weights in maps]
    framed = [(name, _framed(image, regions)) for name, image in shown]
    paper = overlay_figure(picture, framed)
    paper.suptitle(title, fontsize=9)
    return paper, overlay_page(picture, framed).update_layout(title=title)


def _framed(image: Image.Image, regions: Sequence[Region]) -> Image.Image:
    from PIL import ImageDraw

    made = image.copy()
    pen = ImageDraw.Draw(made)
    for region in (one for one in regions if one.picture == 0):
        pen.rectangle(region.box, outline=(255, 255, 255), width=max(1, made.width // 128))
    return made
