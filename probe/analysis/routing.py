"""How units (experts, or neurons) are shared between modalities: divergence, information, balance, and units never used.

Counts (modality unit) say how many tokens of a modality use a unit. Logarithms are natural.
"""

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy import stats

from probe.errors import EditError

Counts = Float[np.ndarray, "modality unit"]


def distributions(counts: Float[np.ndarray, "*rest unit"]) -> Float[np.ndarray, "*rest unit"]:
    """Where the uses of each modality go: counts over their sum; NaN for a modality without any."""
    total = counts.sum(-1, keepdims=True)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(total > 0, counts / total, np.nan)


def entropy(p: Float[np.ndarray, "*rest unit"]) -> Float[np.ndarray, "*rest"]:
    """Entropy of distributions over the last axis, in nats; ln(units) where all are used alike."""
    with np.errstate(divide="ignore", invalid="ignore"):
        terms = np.where(p > 0, p * np.log(p), 0.0)
    made: np.ndarray = np.where(np.isnan(p).any(-1), np.nan, -terms.sum(-1))
    return made


def balance(counts: Counts) -> Float[np.ndarray, " modality"]:
    """Entropy of each modality's uses over that of an even spread: 1 where all units are used alike, 0 where one is."""
    units = counts.shape[-1]
    return entropy(distributions(counts)) / np.log(units) if units > 1 else np.ones(counts.shape[:-1])


def jensen_shannon(counts: Float[np.ndarray, "*rest modality unit"]) -> Float[np.ndarray, "*rest"]:
    """Jensen-Shannon divergence between the modalities' distributions, each with the same weight, in [0, ln(modalities)] nats."""
    p = distributions(counts)
    return np.asarray(np.maximum(0.0, entropy(p.mean(-2)) - entropy(p).mean(-1)))


def mutual_information(counts: Float[np.ndarray, "*rest modality unit"]) -> Float[np.ndarray, "*rest"]:
    """Information in nats that a token's unit has about its modality: the divergence with weights as the uses fall.

    Over single uses: a token that uses k units counts k times. At most the entropy of the modalities.
    """
    total = np.asarray(counts.sum((-2, -1)))
    uses = counts.sum(-1)
    with np.errstate(invalid="ignore", divide="ignore"):
        joint = counts / total[..., None, None]
        weights = uses / total[..., None]
    apart = entropy(joint.sum(-2)) + entropy(weights)
    return np.asarray(np.maximum(0.0, apart - entropy(joint.reshape(*total.shape, -1))))


def count_uses(used: Bool[np.ndarray, "token unit"], labels: Int[np.ndarray, "*rest token"], modalities: int) -> np.ndarray:
    """Counts (... modality unit) of the tokens of each label that use a unit; `labels` may come in several orders."""
    hot = (labels[..., None, :] == np.arange(modalities)[:, None]).astype(np.float32)
    made: np.ndarray = (hot @ used.astype(np.float32)).astype(np.float64)
    return made


def rotations(labels: Int[np.ndarray, " token"], draws: int, seed: int | tuple[int, ...]) -> Int[np.ndarray, "draw token"]:
    """Labels moved along the sequence by random steps, the end coming back at the front: a null that keeps runs together.

    Neighbouring tokens are alike whatever their modality; labels shuffled one by one would call that specialisation. A step
    is never 0. Raises EditError for a sequence of fewer than two tokens.
    """
    count = len(labels)
    if count < 2:
        raise EditError(f"{count} tokens have no other order to compare theirs with")
    steps = np.random.default_rng(seed).integers(1, count, draws)
    return labels[(np.arange(count)[None] - steps[:, None]) % count]


def paired_differences(
    total: Float[np.ndarray, "*unit"], squares: Float[np.ndarray, "*unit"], n: int
) -> tuple[Float[np.ndarray, "*unit"], Float[np.ndarray, "*unit"]]:
    """Mean and two-sided p-value (t-test) of paired differences over n examples, from their sums and sums of squares.

    p is NaN for fewer than three examples; where every example differs alike, it is 0, or 1 if that difference is zero.
    """
    mean = total / max(1, n)
    if n < 3:
        return mean, np.full(total.shape, np.nan)
    variance = np.maximum(0.0, squares / n - mean**2) * n / (n - 1)
    error = np.sqrt(variance / n)
    tiny = error <= 1e-9 * np.maximum(1.0, np.abs(mean))
    with np.errstate(invalid="ignore", divide="ignore"):
        p = 2 * stats.t.sf(np.abs(mean) / error, n - 1)
    made: np.ndarray = np.where(tiny, np.where(np.abs(mean) <= 1e-9, 1.0, 0.0), p)
    return mean, made


def rule_of_three(n: int) -> float:
    """The 95 % upper bound of a rate that was never met in n independent trials: 3 / n, at most 1."""
    return 1.0 if n < 3 else 3.0 / n
