"""Which points lie on the frontier of accuracy and cost, and which of the others are surely beaten."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Bool

from probe.analysis.stats import paired_difference

Standing = Literal["frontier", "inseparable", "dominated"]


@dataclass(frozen=True)
class Point:
    """One configuration: which items it gets right, and its cost with an interval (three times the same where it is exact)."""

    name: str
    right: Bool[np.ndarray, " item"]
    cost: tuple[float, float, float]  # value, low, high

    @property
    def accuracy(self) -> float:
        return float(self.right.mean())


def standings(points: Sequence[Point], seed: int = 0) -> dict[str, Standing]:
    """`frontier` where no other point is as good in both and better in one; else `dominated` where one that is beats it for sure.

    For sure: the paired 95 % interval of the difference of accuracies does not reach below 0, the intervals of the costs do not overlap (or are
    equal and exact), and one of the two is a real gain. What is beaten by values alone is `inseparable`.
    """
    found: dict[str, Standing] = {}
    for one in points:
        better = [other for other in points if other is not one and _beats(other, one)]
        if not better:
            found[one.name] = "frontier"
        else:
            found[one.name] = "dominated" if any(_surely(other, one, seed) for other in better) else "inseparable"
    return found


def _beats(a: Point, b: Point) -> bool:
    no_worse = a.accuracy >= b.accuracy and a.cost[0] <= b.cost[0]
    return no_worse and (a.accuracy > b.accuracy or a.cost[0] < b.cost[0])


def _surely(a: Point, b: Point, seed: int) -> bool:
    low = float(paired_difference(a.right.astype(np.float64), b.right.astype(np.float64), seed).low)
    cheaper, same = a.cost[2] < b.cost[1], a.cost == b.cost and a.cost[1] == a.cost[2]
    return low >= 0 and (cheaper or same) and (low > 0 or cheaper)
