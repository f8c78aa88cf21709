"""Figures of probes: accuracy by state and token group, selectivity, and from which state on a fact is readable."""

from collections.abc import Mapping, Sequence
from typing import Any

from probe.plots.panels import GREY, Pair, colour, curves, values

Found = Mapping[str, Mapping[str, Mapping[str, Any]]]  # fact, token group, what was found
MARKS = {"other": GREY}  # the contrast is grey wherever it is


def accuracy(found: Found, key: str = "accuracy", axis: str = "held-out accuracy", label: str = "state") -> Pair:
    """A panel for each fact, a line for each token group; the most frequent class is dashed where accuracy is drawn."""
    names = _names(found)
    panels, x = [], []
    for fact, groups in found.items():
        lines = [(group, one[key], MARKS.get(group, colour(names.index(group))), False) for group, one in groups.items()]
        first = next(iter(groups.values()))
        count = len(first[key]["mean"])
        if key == "accuracy":
            lines.append(("most frequent class", {"mean": [first["majority"]["value"]] * count}, "#222222", True))
        panels.append((fact, lines))
        x.append(list(range(count)))
    return curves(panels, x, label, axis)


def onsets(found: Found, label: str = "state") -> Pair:
    """From which state on each fact is readable, with its interval; a panel for each token group that reads any."""
    panels = []
    for i, group in enumerate(_names(found)):
        own = {
            fact: {end: float(groups[group]["onset"][key]) for end, key in (("value", "state"), ("low", "low"), ("high", "high"))}
            for fact, groups in found.items() if group in groups and groups[group]["onset"] is not None
        }  # fmt: skip
        if own:
            panels.append((group, [(group, own, MARKS.get(group, colour(i)))]))
    return values(panels, label)


def _names(found: Found) -> Sequence[str]:
    return list(dict.fromkeys(group for groups in found.values() for group in groups))
