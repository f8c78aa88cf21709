"""Figures of the lens study. Each takes its summary and gives the figure twice: for paper, and for a page."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from probe.analysis.lens import OTHER_PATCHES, OTHER_WORD
from probe.plots import panels
from probe.plots.panels import GREY, Line, Pair, Series
from probe.plots.style import COLOURS, LAYOUT, styled, ticks

Summary = Mapping[str, Any]


def correspondence(summary: Summary) -> Pair:
    """Share of an object's patches that read as its word by layer, beside both nulls; a panel for each role."""
    drawn: list[tuple[str, list[Line]]] = []
    x = []
    for role, found in summary["correspondence"].items():
        lines: list[Line] = [
            ("its word, among the likeliest", found["among"]["own"], COLOURS[0], False),
            ("its word, the likeliest", found["first"]["own"], COLOURS[2], False),
        ]
        for name, colour in ((OTHER_WORD, GREY), (OTHER_PATCHES, COLOURS[1])):
            if found["among"][name]:
                lines.append((f"{name}, among", found["among"][name]["curve"], colour, True))
        drawn.append((f"{role.capitalize()}s ({found['n_objects']} objects, {found['among']['own']['n']} pictures)", lines))
        x.append(found["among"]["own"]["layers"])
    made = panels.curves(drawn, x, "layer", "share of patches")
    return panels.noted(made, "objects of a picture are averaged first; bands: 95 % bootstrap intervals over pictures")


def confidence(summary: Summary) -> Pair:
    """AUROC of confidence for present against absent words, by role and norm, beside the confidence of another picture."""
    own: dict[str, Any] = {}
    strange: dict[str, Any] = {}
    for norm, roles in summary["confidence"].items():
        for role, found in roles.items():
            if found:
                own[f"{role}s, norm {norm}"] = found["auroc"]
                if found["strange"]:
                    strange[f"{role}s, norm {norm}"] = found["strange"]
    series: list[Series] = [("the picture's own", own, COLOURS[0]), ("another picture's", strange, GREY)]
    made = panels.values([("Present or absent?", [one for one in series if one[1]])], "AUROC", line=0.5)
    return panels.noted(
        made,
        f"n = {' or '.join(str(n) for n in sorted({one['n'] for one in own.values()}))} pictures; bars: 95 % bootstrap intervals over pictures",
    )


def erasing(summary: Summary) -> Pair:
    """Change of the log-odds of yes by the layer after which a word is erased."""
    found = summary["erasure"]
    own, *others = found["curves"].items()
    lines: list[Line] = [("the object's own word", own[1], COLOURS[0], False)]
    lines += [(name, one, colour, True) for (name, one), colour in zip(others, (COLOURS[1], GREY), strict=False)]
    made = panels.curves([("A word erased", lines)], [found["layers"]], "erased after layer", "change of log-odds of yes")
    counts = ", ".join(f"{one['n']} ({name})" for name, one in found["curves"].items())
    return panels.noted(made, f"n = {counts};\nbands: 95 % bootstrap intervals over pictures")


def words(objects: Sequence[Mapping[str, Any]]) -> Pair:
    """What some patches of an object read as at each layer (layer patch), a panel for each object."""
    chances = [np.array(one["chances"], dtype=float) for one in objects]
    layers = len(chances[0])
    wide = [one.shape[1] for one in chances]
    with styled() as figure_class:
        figure = figure_class(figsize=(0.62 * sum(wide) + 0.8, 0.3 * layers + 1.2))
        axes = figure.subplots(1, len(objects), squeeze=False, width_ratios=wide)[0]
        for k, (axis, one, table) in enumerate(zip(axes, objects, chances, strict=True)):
            drawn = axis.imshow(table, aspect="auto", cmap="Blues", vmin=0, vmax=1, origin="lower")
            for i, j in np.ndindex(table.shape):
                colour = "white" if table[i, j] > 0.55 else "#222222"
                axis.text(
                    j, i, _short(one["texts"][i][j]), ha="center", va="center", fontsize=6, color=colour, parse_math=False
                )
            axis.set(title=one["label"], xlabel="patch", xticks=range(table.shape[1]), yticks=ticks(list(range(layers))))
            axis.grid(False)
            if k == 0:
                axis.set_ylabel("layer")
        figure.colorbar(drawn, ax=axes, label="probability of the token", aspect=30)
    return figure, _words_page(objects, chances)


def _short(word: str) -> str:
    """A token as a cell has room for it: what cannot be printed becomes a dot."""
    shown = "".join(c if c.isprintable() and c != "\N{REPLACEMENT CHARACTER}" else "·" for c in word) or "·"
    return shown if len(shown) <= 8 else shown[:7] + "\N{HORIZONTAL ELLIPSIS}"


def _words_page(objects: Sequence[Mapping[str, Any]], chances: Sequence[np.ndarray]) -> Any:
    from plotly.subplots import make_subplots

    page = make_subplots(rows=1, cols=len(objects), subplot_titles=[one["label"] for one in objects])
    for column, (one, table) in enumerate(zip(objects, chances, strict=True), 1):
        page.add_heatmap(
            z=table, text=one["texts"], texttemplate="%{text}", colorscale="Blues", zmin=0, zmax=1, showscale=False,
            hovertemplate="layer %{y}, patch %{x}: %{text} %{z:.2f}<extra></extra>", row=1, col=column,
        )  # fmt: skip
    page.update_xaxes(title_text="patch").update_yaxes(title_text="layer", col=1)
    return page.update_layout(**{**LAYOUT, "hovermode": "closest"}, height=160 + 34 * len(chances[0]))
