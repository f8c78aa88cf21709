"""MM-BigBench (arXiv 2310.09036): models and instructions judged from one table of accuracies."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from probe.errors import DataError


@dataclass(frozen=True)
class BigBench:
    """What a table `accuracy` (model dataset instruction), in per cent, says.

    `best` (model dataset) over instructions and `best_instruction` its index. `gain_of_model` (model dataset) is the mean over
    instructions of how far, in per cent, a model lies above the mean of all models under the same instruction; `gain_of_instruction`
    (instruction dataset) the mean over models likewise. `spread_of_model` and `spread_of_instruction` are standard
    deviations of the population, over instructions and over models: the less, the more stable. `hit_ratio` (model
    instruction): of the slots for the K best instructions on each data set, the share in per cent that each takes.
    """

    best: Float[np.ndarray, "model dataset"]
    best_instruction: np.ndarray
    gain_of_model: Float[np.ndarray, "model dataset"]
    gain_of_instruction: Float[np.ndarray, "instruction dataset"]
    spread_of_model: Float[np.ndarray, "model dataset"]
    spread_of_instruction: Float[np.ndarray, "instruction dataset"]
    hit_ratio: Float[np.ndarray, "model instruction"]


def bigbench(accuracy: Float[np.ndarray, "model dataset instruction"], top: int = 3) -> BigBench:
    """All of it at once. Ties for a slot go to the instruction with the higher index, as in the published code (a reversed argsort).

    Where all models (or all instructions) are at zero there is no relative gain, and it is 0: the published 1e-6 below the line of
    a model's gain would do the same. Raises DataError for a table with gaps, or fewer instructions than `top`.
    """
    if not np.isfinite(accuracy).all() or accuracy.size == 0:
        raise DataError("the table of accuracies has gaps: every model answers every data set under every instruction")
    if not 1 <= top <= accuracy.shape[2]:
        raise DataError(f"the {top} best of {accuracy.shape[2]} instructions cannot be named")
    of_model = _gain(accuracy, accuracy.mean(0, keepdims=True)).mean(2)
    of_instruction = _gain(accuracy, accuracy.mean(2, keepdims=True)).mean(0).T
    order = np.argsort(accuracy, axis=2, kind="stable")[:, :, ::-1][:, :, :top]
    slots = accuracy.shape[1] * top
    hits = np.stack([(order == i).sum((1, 2)) for i in range(accuracy.shape[2])], 1)
    best = accuracy.argmax(2)
    return BigBench(
        accuracy.max(2), best, of_model, of_instruction, accuracy.std(2), accuracy.std(0).T, 100 * hits / slots
    )  # fmt: skip


def _gain(accuracy: np.ndarray, reference: np.ndarray) -> np.ndarray:
    safe = np.where(reference == 0, 1.0, reference)
    made: np.ndarray = np.where(reference == 0, 0.0, 100 * (accuracy - reference) / safe)
    return made
