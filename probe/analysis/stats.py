"""Intervals and correlations, the same everywhere."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float
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


def ends(low: float, high: float) -> tuple[float, float] | tuple[None, None]:
    """The ends of a bootstrap interval; None twice where they are one. Draws that all agree say nothing of how sure a number is."""
    return (float(low), float(high)) if high - low > 1e-12 * max(1.0, abs(low), abs(high)) else (None, None)


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


def sign_flip(
    differences: Float[np.ndarray, "example *rest"], seed: int = 0, flips: int = RESAMPLES
) -> Float[np.ndarray, "*rest"]:
    """One-sided p-values that paired differences are above zero: a permutation test that swaps the members of each pair.

    The share of random sign patterns, the observed one among them, whose mean is as large. NaN entries are left out of their column; a column
    with fewer than two others is NaN.
    """
    flat = differences.reshape(len(differences), -1).astype(np.float64)
    known = (~np.isnan(flat)).sum(0)
    flat = np.where(np.isnan(flat), 0.0, flat)  # what is not known moves no sum, whatever its sign
    rng = np.random.default_rng(seed)
    count = np.maximum(known, 1)
    observed, larger = flat.sum(0) / count, np.ones(flat.shape[1])
    for start in range(0, flips, BLOCK):
        signs = rng.choice([-1.0, 1.0], size=(min(BLOCK, flips - start), len(flat)))
        larger += (signs @ flat / count >= observed - 1e-12).sum(0)
    return np.where(known < 2, np.nan, larger / (flips + 1)).reshape(differences.shape[1:])


def benjamini_hochberg(p: Float[np.ndarray, "*any"]) -> Float[np.ndarray, "*any"]:
    """q-values of many tests: the least false discovery rate at which each would be called (Benjamini and Hochberg 1995).

    NaN stays NaN and is no test.
    """
    known = ~np.isnan(p)
    made = np.full(p.shape, np.nan)
    if known.any():
        made[known] = stats.false_discovery_control(p[known])
    return made


class Correlation(NamedTuple):
    """A correlation over a few members, its 95 % bootstrap interval over them, and its permutation p-value (two-sided)."""

    value: float
    low: float
    high: float
    p: float
    n: int


def correlate(a: Float[np.ndarray, " n"], b: Float[np.ndarray, " n"], rank: bool = False, seed: int = 0) -> Correlation:
    """Pearson's correlation (Spearman's with `rank`) of two series; all NaN where one is constant or shorter than four."""
    if rank:
        a, b = stats.rankdata(a), stats.rankdata(b)
    n = len(a)
    if n < 4 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return Correlation(float("nan"), float("nan"), float("nan"), float("nan"), n)
    rng = np.random.default_rng(seed)
    value = _pearson(a[None], b[None])[0]
    again = rng.integers(0, n, (RESAMPLES, n))
    drawn = _pearson(a[again], b[again])
    low, high = np.nanpercentile(drawn, [2.5, 97.5])  # a resample of one member alone has no correlation
    shuffled = _pearson(a[None], np.stack([b[rng.permutation(n)] for _ in range(RESAMPLES)]))
    p = (1 + (np.abs(shuffled) >= abs(value) - 1e-12).sum()) / (RESAMPLES + 1)
    return Correlation(float(value), float(low), float(high), float(p), n)


def _pearson(a: Float[np.ndarray, "#any n"], b: Float[np.ndarray, "#any n"]) -> Float[np.ndarray, " _"]:
    a, b = a - a.mean(1, keepdims=True), b - b.mean(1, keepdims=True)
    with np.errstate(invalid="ignore", divide="ignore"):
        found: np.ndarray = (a * b).sum(1) / np.sqrt((a**2).sum(1) * (b**2).sum(1))
    return found


def mcnemar(a: Bool[np.ndarray, " item"], b: Bool[np.ndarray, " item"]) -> float:
    """Exact two-sided p-value that two answerers of the same items are equally often right (McNemar 1947).

    Only the items that one has right and the other wrong say anything: under the null they fall to either side like coins. 1 where
    there are none.
    """
    only_a, only_b = int((a & ~b).sum()), int((b & ~a).sum())
    return float(stats.binomtest(only_a, only_a + only_b).pvalue) if only_a + only_b else 1.0


def paired_difference(a: Float[np.ndarray, " item"], b: Float[np.ndarray, " item"], seed: int = 0) -> Interval:
    """The mean of a - b over the same items, with its 95 % bootstrap interval over items; items where either is NaN are left out.

    All three are NaN where no item is left.
    """
    differences = np.asarray(a, dtype=np.float64) - np.asarray(b, dtype=np.float64)
    differences = differences[~np.isnan(differences)]
    if not len(differences):
        return Interval(np.float64("nan"), np.float64("nan"), np.float64("nan"))
    return bootstrap_mean(differences, seed)
