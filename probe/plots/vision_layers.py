"""Figures of a tower: what its layers carry, the connector's layers marked, and what merging them gives."""

from collections.abc import Mapping, Sequence
from typing import Any

from probe.plots.panels import GREY, Pair, colour, values
from probe.plots.probing import Found, accuracy


def layers(found: Found, read: Sequence[int]) -> Pair:
    """Accuracy by state of the tower, a panel for each fact; a dotted line marks what the connector reads."""
    paper, page = accuracy(found, label="state of the tower")
    for axis in paper.axes:
        for state in read:
            axis.axvline(state, color=GREY, linestyle=":", linewidth=1.2)
    for state in read:
        page.add_vline(x=state, line_dash="dot", line_color=GREY)
    return paper, page


def merged(found: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> Pair:
    """What merged layers gain on the best single layer, a panel for each fact."""
    panels = []
    for i, (fact, ways) in enumerate(found.items()):
        gains = {name: one["gain"] for name, one in ways.items() if "gain" in one}
        panels.append((fact, [("gain", gains, colour(i))]))
    return values(panels, "gain in accuracy", line=0.0)
