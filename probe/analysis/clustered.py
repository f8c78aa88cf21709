"""How well a number tells two kinds of cases apart, when several cases come from one example and are drawn together."""

import numpy as np
from jaxtyping import Bool, Float, Int

from probe.analysis.detection import auroc
from probe.analysis.stats import BLOCK, RESAMPLES, Interval


def auroc_of_cases(scores: Float[np.ndarray, " case"], present: Bool[np.ndarray, " case"]) -> float:
    """The chance that a present case scores above an absent one, ties by half; NaN where one kind is missing."""
    return auroc(scores, present) if present.any() and not present.all() else float("nan")


def auroc_over_examples(
    scores: Float[np.ndarray, " case"], present: Bool[np.ndarray, " case"], example: Int[np.ndarray, " case"], seed: int = 0
) -> Interval:
    """AUROC with a 95 % bootstrap interval over examples: all cases of an example are drawn together.

    Cases of one picture are not independent. Resamples that hold one kind only say nothing and are left out.
    """
    value = np.float64(auroc_of_cases(scores, present))
    if len(np.unique(example)) < 2 or np.isnan(value):
        return Interval(value, value, value)
    low, high = np.nanpercentile(auroc_draws(scores, present, example, seed), [2.5, 97.5])
    return Interval(value, low, high)


def auroc_draws(
    scores: Float[np.ndarray, " case"],
    present: Bool[np.ndarray, " case"],
    example: Int[np.ndarray, " case"],
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> Float[np.ndarray, " resample"]:
    """AUROC of resampled examples; NaN for a resample of one kind. Two scores of the same cases are resampled alike by one seed."""
    members, number = np.unique(example, return_inverse=True)
    order = np.argsort(scores, kind="stable")
    ranked, sort, number = scores[order], present[order], number[order]
    starts = np.flatnonzero(np.r_[True, ranked[1:] != ranked[:-1]])  # equal scores are one step
    rng = np.random.default_rng(seed)
    even, draws = np.full(len(members), 1 / len(members)), []
    for start in range(0, resamples, BLOCK):
        drawn = rng.multinomial(len(members), even, size=min(BLOCK, resamples - start))[:, number].astype(np.float64)
        hits, misses = (np.add.reduceat(drawn * side, starts, axis=1) for side in (sort, ~sort))
        below = np.cumsum(misses, 1) - misses / 2
        with np.errstate(invalid="ignore"):
            draws.append((hits * below).sum(1) / (hits.sum(1) * misses.sum(1)))
    return np.concatenate(draws)
