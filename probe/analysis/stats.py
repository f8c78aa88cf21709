"""Intervals and correlations, the same everywhere."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from scipy import stats

RESAMPLES, BLOCK = 2000, 100


class Interval(NamedTuple):
    """A mean (or median) and the ends of its 95 % interval, each an array over the trailing dimensions."""

    value: np.ndarray | np.floating
    low: np.ndarray | np.floating
    high: np.ndarray | np.floating


def bootstrap_mean(values: Float[np.ndarray, "example *rest"], seed: int = 0, resamples: int = RESAMPLES) -> Interval:
    """Mean over the first axis with a 95 % percentile bootstrap interval; NaN entries are left out.

    `values` (example ...). With fewer than two examples the interval is the value itself.
    """
    mean = np.nanmean(values, axis=0)
    if len(values) < 2:
        return Interval(mean, mean, mean)
    draws = resampled_means(values, seed, resamples)
    low, high = np.nanpercentile(draws, [2.5, 97.5], axis=0)
    return Interval(mean, low, high)


def resampled_means(
    values: Float[np.ndarray, "example *rest"], seed: int = 0, resamples: int = RESAMPLES
) -> Float[np.ndarray, "resample *rest"]:
    """Means over resampled examples (resample ...): weights of a multinomial draw, one product for a block of resamples.

    Blocks, so that the memory of it does not grow with resamples times examples.
    """
    rng = np.random.default_rng(seed)
    count = len(values)
    flat = values.reshape(count, -1).astype(np.float64)
    known = (~np.isnan(flat)).astype(np.float64)
    flat = np.where(known > 0, flat, 0.0)
    even = np.full(count, 1 / count)
    means = np.empty((resamples, flat.shape[1]))
    for start in range(0, resamples, BLOCK):
        weights = rng.multinomial(count, even, size=min(BLOCK, resamples - start)).astype(np.float64)
        with np.errstate(invalid="ignore", divide="ignore"):
            means[start : start + BLOCK] = (weights @ flat) / (weights @ known)
    return means.reshape(resamples, *values.shape[1:])


def wilson(hits: int, n: int) -> tuple[float, float]:
    """The 95 % Wilson interval of a proportion."""
    if n == 0:
        return (0.0, 1.0)
    found = stats.binomtest(hits, n).proportion_ci(0.95, "wilson")
    return float(found.low), float(found.high)


def spearman(a: Float[np.ndarray, " n"], b: Float[np.ndarray, " n"]) -> float:
    """Rank correlation of two series; NaN where one of them is constant or shorter than three."""
    known = ~(np.isnan(a) | np.isnan(b))
    a, b = a[known], b[known]
    if len(a) < 3 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return float("nan")
    return float(stats.spearmanr(a, b).statistic)
