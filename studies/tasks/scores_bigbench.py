"""MM-BigBench (arXiv 2310.09036): models and instructions judged from one table of accuracies."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from probe.analysis.stats import resampled_means, wilson
from probe.errors import DataError
from studies.tasks.scores import Score, from_draws

Scores = tuple[tuple[Score, ...], ...]  # by row and column


@dataclass(frozen=True)
class BigBench:
    """What a table `accuracy` (model dataset instruction), in per cent, says: rows of Scores in per cent.

    `best` (model dataset) over instructions and `best_instruction` its index. `gain_of_model` (model dataset) is the mean over
    instructions of how far, in per cent, a model lies above the mean of all models under the same instruction; `gain_of_instruction`
    (instruction dataset) the mean over models likewise. `spread_of_model` and `spread_of_instruction` are standard
    deviations of the population, over instructions and over models: the less, the more stable. `hit_ratio` (model
    instruction): of the slots for the K best instructions on each data set, the share in per cent that each takes.

    Gains and spreads have a bootstrap over what they are taken over (instructions for a model, models for an instruction), hit ratios
    Wilson's interval over data sets, each of which an instruction takes one slot of or none. `best` has Wilson's interval where the data sets' numbers of items
    are known, and no interval where they are not; it is that of one instruction, and the best of several by chance lies above what it would be again.
    """

    best: Scores
    best_instruction: np.ndarray
    gain_of_model: Scores
    gain_of_instruction: Scores
    spread_of_model: Scores
    spread_of_instruction: Scores
    hit_ratio: Scores


def bigbench(
    accuracy: Float[np.ndarray, "model dataset instruction"], top: int = 3, items: Sequence[int] | None = None, seed: int = 0
) -> BigBench:
    """All of it at once; `items` is how many each data set has. Ties for a slot go to the instruction with the higher index, as in the published code (a reversed argsort).

    Where all models (or all instructions) are at zero there is no relative gain, and it is 0: the published 1e-6 below the line of
    a model's gain would do the same. Raises DataError for a table with gaps or with what is no percentage, fewer instructions than `top`, or other than one
    number of items for each data set.
    """
    _check(accuracy, top, items)
    per_instruction = np.moveaxis(_gain(accuracy, accuracy.mean(0, keepdims=True)), 2, 0)  # (instruction model dataset)
    per_model = np.swapaxes(_gain(accuracy, accuracy.mean(2, keepdims=True)), 1, 2)  # (model instruction dataset)
    order = np.argsort(accuracy, axis=2, kind="stable")[:, :, ::-1][:, :, :top]
    hits = np.stack([(order == i).sum((1, 2)) for i in range(accuracy.shape[2])], 1)
    return BigBench(
        _best(accuracy.max(2), items, accuracy.shape[2]), accuracy.argmax(2), _means("mean relative gain", per_instruction, seed),
        _means("mean relative gain", per_model, seed), _spreads(np.moveaxis(accuracy, 2, 0), seed),
        _spreads(np.swapaxes(accuracy, 1, 2), seed), _ratios(hits, accuracy.shape[1], top),
    )  # fmt: skip


def _check(accuracy: np.ndarray, top: int, items: Sequence[int] | None) -> None:
    if not np.isfinite(accuracy).all() or accuracy.size == 0:
        raise DataError("the table of accuracies has gaps: every model answers every data set under every instruction")
    if (accuracy < 0).any() or (accuracy > 100).any():
        raise DataError("the table of accuracies is in per cent: each lies between 0 and 100")
    if not 1 <= top <= accuracy.shape[2]:
        raise DataError(f"the {top} best of {accuracy.shape[2]} instructions cannot be named")
    if items is not None and (len(items) != accuracy.shape[1] or min(items) < 1):
        raise DataError(f"each of the {accuracy.shape[1]} data sets has a number of items, and {list(items)} is not that")


def _gain(accuracy: np.ndarray, reference: np.ndarray) -> np.ndarray:
    safe = np.where(reference == 0, 1.0, reference)
    made: np.ndarray = np.where(reference == 0, 0.0, 100 * (accuracy - reference) / safe)
    return made


def _best(best: Float[np.ndarray, "model dataset"], items: Sequence[int] | None, instructions: int) -> Scores:
    def one(value: float, d: int) -> Score:
        if items is None:
            return Score("best performance", value, None, None, value, 1.0, instructions)
        low, high = wilson(round(value * items[d] / 100), items[d])
        return Score("best performance", value, 100 * low, 100 * high, value * items[d], float(items[d]), items[d])

    return tuple(tuple(one(float(value), d) for d, value in enumerate(row)) for row in best)


def _means(metric: str, values: Float[np.ndarray, "over row column"], seed: int) -> Scores:
    return _scores(metric, values.mean(0), resampled_means(values, seed), len(values))


def _spreads(values: Float[np.ndarray, "over row column"], seed: int) -> Scores:
    """Standard deviations over the first axis; the draws of each from those of its mean and its mean square, which are drawn alike."""
    apart = values - values.mean(0)
    draws = np.sqrt(np.maximum(resampled_means(apart**2, seed) - resampled_means(apart, seed) ** 2, 0.0))
    return _scores("stability", values.std(0), draws, len(values))


def _scores(
    metric: str, found: Float[np.ndarray, "row column"], draws: Float[np.ndarray, "resample row column"], n: int
) -> Scores:
    return tuple(
        tuple(
            from_draws(metric, float(value), draws[:, r, c], float(n * value), float(n), n) for c, value in enumerate(found[r])
        )
        for r in range(len(found))
    )


def _ratios(hits: np.ndarray, datasets: int, top: int) -> Scores:
    def one(count: int) -> Score:
        low, high = wilson(count, datasets)
        slots = datasets * top
        return Score("hit ratio", 100 * count / slots, 100 * low / top, 100 * high / top, 100.0 * count, float(slots), datasets)

    return tuple(tuple(one(int(count)) for count in row) for row in hits)
