"""Attention shift: do attention to the words before and after what is shown move alike through the layers?

MLLM-LAWS of Wings (arXiv 2406.03496, section 2): the attention that a set of tokens receives, layer by layer, and Shift, one less
the correlation of two such series. Paper or code: the paper leaves open which rows are summed and how they are normalised, and
its code does not hold the measure. Here heads and rows are averaged, so that the masses of all sets sum to one.
"""

import numpy as np
from jaxtyping import Float, Int

Series = Float[np.ndarray, "example layer"]
MIN_LAYERS = 8  # a correlation over fewer layers is hardly determined
CONSTANT = 1e-6  # a series that varies by less than this share of its largest value is constant to rounding


def densities(
    mass: Float[np.ndarray, "layer set"], rows: int, pairs: Int[np.ndarray, "layer set"]
) -> Float[np.ndarray, "layer set"]:
    """Attention for each visible (row, column) pair, from mean masses over `rows` rows; 0 where no pair is visible.

    Takes the causal bias away: words before a picture are visible to more rows than those after it.
    """
    return np.where(pairs > 0, mass * rows / np.maximum(pairs, 1), 0.0)


def standard(series: Series) -> Series:
    """Each example's series with mean 0 and standard deviation 1 over layers; NaN for one that is constant to rounding."""
    constant = np.ptp(series, axis=1) <= CONSTANT * np.abs(series).max(1)
    with np.errstate(invalid="ignore", divide="ignore"):
        made = (series - series.mean(1, keepdims=True)) / series.std(1, keepdims=True)
    made[constant] = np.nan
    return made


def correlations(a: Series, b: Series) -> Float[np.ndarray, " example"]:
    """Pearson's correlation of two series over layers, for each example; NaN where one is constant."""
    return np.clip((standard(a) * standard(b)).mean(1), -1.0, 1.0)


def shift(before: Series, after: Series) -> Float[np.ndarray, " example"]:
    """Shift of each example, 0 (the same course) to 2 (the opposite one); NaN where one of its series is constant."""
    return 1 - correlations(before, after)


def shift_of_shuffled(
    before: Series, after: Series, seed: int = 0, shuffles: int = 2000
) -> Float[np.ndarray, " shuffle"]:  # fmt: skip
    """The mean Shift over examples when the layers of `after` change places, in all examples alike: what no order would give.

    One order for all examples, because they share most of their course: their Shifts are no independent draws.
    """
    a, b = standard(before), standard(after)
    known = ~np.isnan(a + b).any(1)
    cross = a[known].T @ b[known] / (max(1, known.sum()) * before.shape[1])  # every layer with every other, summed
    rng = np.random.default_rng(seed)
    layers = np.arange(before.shape[1])
    return np.array([1 - cross[layers, rng.permutation(len(layers))].sum() for _ in range(shuffles)])


def shift_of_others(before: Series, after: Series) -> Float[np.ndarray, " example"]:
    """Each example's `before` beside the `after` of every other example, averaged: what is no doing of the example's own.

    NaN where a series is constant, or where there is no other example.
    """
    a, b = standard(before), standard(after)
    with_known = ~np.isnan(b).any(1)
    each = a @ b[with_known].T / before.shape[1]
    own = np.where(with_known, (a * b).mean(1), 0.0)
    others = with_known.sum() - with_known
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(others > 0, 1 - (each.sum(1) - own) / others, np.nan)
