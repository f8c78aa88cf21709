"""What every scoring rule gives back: a number with its interval, what it is a share of, and what was left out."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from probe.analysis.stats import bootstrap_mean, ends, wilson
from probe.errors import DataError


@dataclass(frozen=True)
class Score:
    """One metric on `n` items: `value` is `numerator / denominator` with its 95 % interval, None where that is not defined.

    Proportions have Wilson's interval, everything else a percentile bootstrap over items, which has no ends (None) where all draws agree.
    `n_dropped` items could not be scored and are
    part of no other number.
    """

    metric: str
    value: float | None
    low: float | None
    high: float | None
    numerator: float
    denominator: float
    n: int
    n_dropped: int = 0

    def __post_init__(self) -> None:
        for number in (self.value, self.low, self.high):
            if number is not None and not math.isfinite(number):
                raise DataError(f"the metric {self.metric} came out as {number}: where it is not defined it is None")

    def as_dict(self) -> dict[str, float | int | str | None]:
        return {
            "metric": self.metric, "value": self.value, "low": self.low, "high": self.high, "numerator": self.numerator,
            "denominator": self.denominator, "n": self.n, "n_dropped": self.n_dropped,
        }  # fmt: skip


def proportion(metric: str, hits: int, of: int, n: int | None = None, n_dropped: int = 0) -> Score:
    """`hits` out of `of`, with Wilson's interval; `n` items were looked at (as many as `of` unless more are named)."""
    count = of if n is None else n
    if not of:
        return Score(metric, None, None, None, float(hits), 0.0, count, n_dropped)
    low, high = wilson(hits, of)
    return Score(metric, hits / of, low, high, float(hits), float(of), count, n_dropped)


def average(metric: str, values: Sequence[float | None], seed: int = 0) -> Score:
    """The mean of one number for each item, with its bootstrap interval; items without one (None) are dropped and counted."""
    known = np.array([value for value in values if value is not None], dtype=np.float64)
    dropped = len(values) - len(known)
    if not len(known):
        return Score(metric, None, None, None, 0.0, 0.0, 0, dropped)
    value, *sides = (float(side) for side in bootstrap_mean(known, seed))
    low, high = ends(*sides)
    return Score(metric, value, low, high, float(known.sum()), float(len(known)), len(known), dropped)


def from_draws(metric: str, value: float | None, draws: np.ndarray, numerator: float, denominator: float, n: int) -> Score:
    """A number that is no mean, with the 95 % percentiles of its bootstrap `draws`; draws in which it is not defined are NaN."""
    known = draws[np.isfinite(draws)]
    if value is None or not len(known):
        return Score(metric, value, None, None, numerator, denominator, n)
    low, high = ends(*np.percentile(known, [2.5, 97.5]))
    return Score(metric, value, low, high, numerator, denominator, n)


def drawable(found: Mapping[str, Mapping[str, Any] | None]) -> dict[str, dict[str, float]]:
    """Scores (as dictionaries) by label, as figures take them: value and interval (NaN where there is none) alone, those that are not defined left out."""
    return {
        label: {side: float("nan") if one[side] is None else float(one[side]) for side in ("value", "low", "high")}
        for label, one in found.items() if one is not None and one["value"] is not None
    }  # fmt: skip
