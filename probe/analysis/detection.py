"""Does a number tell two kinds of answers apart? AUROC and average precision with intervals, nulls, and maps of differences."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy.stats import rankdata

from probe.analysis.stats import BLOCK, RESAMPLES
from probe.errors import DataError

Scores = Float[np.ndarray, " example"]
Flags = Bool[np.ndarray, " example"]
Strata = Int[np.ndarray, " example"]


class Detection(NamedTuple):
    """How well a score finds the positives: AUROC and average precision with 95 % bootstrap intervals (within the classes).

    `null_low` to `null_high` hold 95 % of the AUROCs of permuted labels, `p` is two-sided, and `base` is the share of
    positives, the average precision of a score that knows nothing.
    """

    auroc: float
    low: float
    high: float
    ap: float
    ap_low: float
    ap_high: float
    base: float
    null_low: float
    null_high: float
    p: float


def auroc(scores: Scores, positive: Flags, strata: Strata | None = None) -> float:
    """The share of (positive, negative) pairs in which the positive has the higher score, ties counting half.

    With `strata`, pairs within one stratum alone. Raises DataError where there is no such pair.
    """
    wins, pairs = _pairs(scores, positive, strata)
    return float((wins * pairs).sum() / pairs.sum())


def _pairs(scores: Scores, positive: Flags, strata: Strata | None) -> tuple[np.ndarray, np.ndarray]:
    """(positive negative): 1, 1/2 or 0 for who wins, and 1 where the two may be compared."""
    own, other = scores[positive], scores[~positive]
    wins = (own[:, None] > other[None]) + 0.5 * (own[:, None] == other[None])
    pairs = np.ones_like(wins) if strata is None else (strata[positive][:, None] == strata[~positive][None]).astype(float)
    if not pairs.sum():
        raise DataError("no two examples can be compared: there must be both sorts of answers, to the same kind of question")
    return wins, pairs


def average_precision(scores: Scores, positive: Flags) -> float:
    """Precision averaged over the steps of recall, one step for each distinct score. Raises DataError without a positive."""
    if not positive.any():
        raise DataError("average precision needs at least one positive")
    return float(_weighted_precision(scores, positive, np.ones((1, len(scores))))[0])


def _weighted_precision(scores: Scores, positive: Flags, weights: np.ndarray) -> np.ndarray:
    """Average precision of each row of example weights (row example)."""
    order = np.argsort(-scores, kind="stable")
    ends = np.append(np.nonzero(np.diff(scores[order]))[0], len(scores) - 1)  # the last of each run of equal scores
    hits = np.cumsum(weights[:, order] * positive[order], 1)[:, ends]
    found = np.cumsum(weights[:, order], 1)[:, ends]
    steps = np.diff(hits, axis=1, prepend=0)
    return (steps * hits / np.maximum(found, 1e-12)).sum(1) / hits[:, -1]


def resampled_auroc(
    scores: Scores, positive: Flags, strata: Strata | None = None, seed: int = 0, resamples: int = RESAMPLES
) -> Float[np.ndarray, " resample"]:
    """AUROCs of resampled examples; the same seed gives the same resamples, so that two scores can be compared in pairs.

    Positives and negatives are resampled apart. NaN for a resample without a pair.
    """
    wins, pairs = _pairs(scores, positive, strata)
    ours, theirs = _weights(positive, seed, resamples)
    with np.errstate(invalid="ignore", divide="ignore"):
        return ((ours @ (wins * pairs)) * theirs).sum(1) / ((ours @ pairs) * theirs).sum(1)


def _weights(positive: Flags, seed: int, resamples: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    counts = (int(positive.sum()), int((~positive).sum()))
    ours, theirs = (rng.multinomial(n, np.full(n, 1 / n), size=resamples).astype(float) for n in counts)
    return ours, theirs


def permuted_labels(positive: Flags, strata: Strata | None = None, seed: int = 0, permutations: int = RESAMPLES) -> np.ndarray:
    """Labels that have changed places (permutation example), within strata where there are any."""
    rng = np.random.default_rng(seed)
    groups = np.zeros(len(positive)) if strata is None else np.unique(strata, return_inverse=True)[1]
    places = np.argsort(groups, kind="stable")
    drawn = np.argsort(groups + rng.random((permutations, len(positive))), axis=1)
    labels = np.empty((permutations, len(positive)), dtype=bool)
    labels[:, places] = positive[drawn]
    return labels


def null_auroc(scores: Scores, positive: Flags, strata: Strata | None = None, seed: int = 0) -> Float[np.ndarray, " draw"]:
    """AUROCs of permuted labels."""
    groups = np.zeros(len(scores), dtype=int) if strata is None else strata
    ranks = np.empty(len(scores))
    pairs = least = 0.0
    for group in np.unique(groups):
        own = groups == group
        ranks[own] = rankdata(scores[own])
        n = int(positive[own].sum())
        pairs, least = pairs + n * (own.sum() - n), least + n * (n + 1) / 2
    found: np.ndarray = (permuted_labels(positive, strata, seed) @ ranks - least) / pairs
    return found


def detect(scores: Scores, positive: Flags, strata: Strata | None = None, seed: int = 0) -> Detection:
    """How well a score finds the positives. Raises DataError where no pair can be compared."""
    value = auroc(scores, positive, strata)
    low, high = np.nanpercentile(resampled_auroc(scores, positive, strata, seed), [2.5, 97.5])
    null = null_auroc(scores, positive, strata, seed)
    ours, theirs = _weights(positive, seed, RESAMPLES)
    weights = np.empty((RESAMPLES, len(scores)))
    weights[:, positive], weights[:, ~positive] = ours, theirs
    ap_low, ap_high = np.percentile(_weighted_precision(scores, positive, weights), [2.5, 97.5])
    p = (1 + (np.abs(null - 0.5) >= abs(value - 0.5) - 1e-12).sum()) / (len(null) + 1)
    ends = np.percentile(null, [2.5, 97.5])
    found = (value, low, high, average_precision(scores, positive), ap_low, ap_high, positive.mean(), *ends, p)
    return Detection(*(float(number) for number in found))


def difference(
    values: Float[np.ndarray, "example *rest"], positive: Flags, strata: Strata | None = None, seed: int = 0
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """How the positives differ from the negatives of their own stratum: the mean, its interval, and two-sided p-values (... each).

    Strata weigh as many positives as they have; one that lacks a sort is left out. The interval is a bootstrap within the classes,
    the p-values are those of labels that change places within strata. Raises DataError where nothing can be compared.
    """
    groups = np.zeros(len(values), dtype=int) if strata is None else strata
    _pairs(np.zeros(len(values)), positive, strata)  # refuses what cannot be compared
    flat = values.reshape(len(values), -1).astype(np.float64)
    observed = _gaps(flat, positive[None].astype(float), (~positive[None]).astype(float), groups)[0]
    draws, larger = np.empty((RESAMPLES, flat.shape[1])), np.ones(flat.shape[1])
    ours, theirs = np.zeros((2, RESAMPLES, len(flat)))
    ours[:, positive], theirs[:, ~positive] = _weights(positive, seed, RESAMPLES)
    labels = permuted_labels(positive, strata, seed)
    for start in range(0, RESAMPLES, BLOCK):
        part = slice(start, start + BLOCK)
        draws[part] = _gaps(flat, ours[part], theirs[part], groups)
        null = _gaps(flat, labels[part].astype(float), (~labels[part]).astype(float), groups)
        larger += (np.abs(null) >= np.abs(observed) - 1e-12).sum(0)
    low, high = np.nanpercentile(draws, [2.5, 97.5], axis=0)
    shape = values.shape[1:]
    return observed.reshape(shape), low.reshape(shape), high.reshape(shape), (larger / (RESAMPLES + 1)).reshape(shape)


def _gaps(flat: np.ndarray, ours: np.ndarray, theirs: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """(draw column): weighted mean of the positives less that of the negatives, stratum by stratum."""
    total, weight = np.zeros((len(ours), flat.shape[1])), np.zeros((len(ours), 1))
    for group in np.unique(groups):
        own = groups == group
        a, b = ours[:, own], theirs[:, own]
        n, m = a.sum(1, keepdims=True), b.sum(1, keepdims=True)
        gap = (a @ flat[own]) / np.maximum(n, 1) - (b @ flat[own]) / np.maximum(m, 1)
        total += np.where(m > 0, n * gap, 0.0)
        weight += np.where(m > 0, n, 0.0)
    with np.errstate(invalid="ignore", divide="ignore"):
        return total / weight
