"""How well a number tells two kinds of cases apart."""

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy import stats

from probe.analysis.stats import RESAMPLES, Interval


def auroc(scores: Float[np.ndarray, " case"], present: Bool[np.ndarray, " case"]) -> float:
    """The chance that a present case scores above an absent one, ties by half; NaN where one kind is missing."""
    hits, misses = int(present.sum()), int((~present).sum())
    if not hits or not misses:
        return float("nan")
    ranks = stats.rankdata(scores)
    return float((ranks[present].sum() - hits * (hits + 1) / 2) / (hits * misses))


def auroc_over_examples(
    scores: Float[np.ndarray, " case"],
    present: Bool[np.ndarray, " case"],
    example: Int[np.ndarray, " case"],
    seed: int = 0,
    resamples: int = RESAMPLES // 4,
) -> Interval:
    """AUROC with a 95 % bootstrap interval over examples: all cases of an example are drawn together.

    Cases of one picture are not independent. Resamples that hold one kind only say nothing and are left out.
    """
    value = auroc(scores, present)
    members = [np.nonzero(example == one)[0] for one in np.unique(example)]
    if len(members) < 2 or np.isnan(value):
        return Interval(np.float64(value), np.float64(value), np.float64(value))
    rng = np.random.default_rng(seed)
    draws = np.full(resamples, np.nan)
    for i in range(resamples):
        drawn = np.concatenate([members[k] for k in rng.integers(0, len(members), len(members))])
        draws[i] = auroc(scores[drawn], present[drawn])
    low, high = np.nanpercentile(draws, [2.5, 97.5])
    return Interval(np.float64(value), low, high)
