"""Figures of how alike representations are: grids of states, the same depth beside its null, and all pairs at a glance."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from probe.analysis.similarity import METRICS, same_depth
from probe.plots.panels import GREY, Pair, colour, curves, tables, values

NAMES = {"cka": "CKA", "cknna": "CKNNA", "knn": "mutual kNN"}


def grids(pairs: Mapping[str, Mapping[str, Any]], axes: tuple[str, str], metric: str = "cka") -> Pair:
    """One metric of every state against every state, a panel for each pair of token groups."""
    found = [np.array(one[metric]["grid"]["value"], dtype=float) for one in pairs.values()]
    rows, columns = (str(i) for i in range(found[0].shape[0])), (str(i) for i in range(found[0].shape[1]))
    return tables(
        list(pairs), found, list(rows), list(columns), (0.0, 1.0), "Blues", NAMES[metric], down=axes[0], across=axes[1]
    )


def depth(pairs: Mapping[str, Mapping[str, Any]]) -> Pair:
    """Every metric at the same depth, beside what permuted pairs give; a panel for each pair of token groups."""
    panels, x = [], []
    for title, one in pairs.items():
        shape = np.shape(one["cka"]["grid"]["value"])
        cells = tuple(np.array(same_depth(*shape)).T)
        lines = []
        for i, metric in enumerate(METRICS):
            grid = {name: np.array(side, dtype=float)[cells] for name, side in one[metric]["grid"].items()}
            lines.append((NAMES[metric], {"mean": grid["value"], "low": grid["low"], "high": grid["high"]}, colour(i), False))
            null = {"mean": grid["null"], "low": grid["null_low"], "high": grid["null_high"]}
            lines.append((f"{NAMES[metric]}, permuted", null, colour(i), True))
        panels.append((title, lines))
        x.append(list(range(shape[0])))
    return curves(panels, x, "state", "similarity")


def overview(pairs: Mapping[str, Mapping[str, Any]]) -> Pair:
    """Each pair's mean over states of the same depth with its interval, beside 95 % of the permutations; a panel for each metric."""
    panels = []
    for metric in METRICS:
        known = {title: one[metric]["along"] for title, one in pairs.items() if one[metric]["along"]["value"] is not None}
        null = {title: {"value": one["null"], "low": one["null_low"], "high": one["null_high"]} for title, one in known.items()}
        panels.append((NAMES[metric], [("matched", known, colour(0)), ("permuted", null, GREY)]))
    return values(panels, "mean over states")
