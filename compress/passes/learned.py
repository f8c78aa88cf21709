"""What was learned: weights that another model has taught, as a ledger has them. The weights themselves are in the saved model."""

from collections.abc import Mapping
from typing import ClassVar

from compress.passes.base import Change
from compress.smaller import Smaller
from probe.errors import PassError


class Distilled(Change):
    """Parts of the model that were trained to say what a teacher says (`compress.healing.distil`); it is in the weights."""

    kind: ClassVar[str] = "distilled"
    teacher: str
    parts: tuple[str, ...]
    steps: int
    rate: float
    batch: int
    examples: int
    weights: Mapping[str, float]
    divergence: str
    answers: str
    last: Mapping[str, float]  # the losses of the last steps

    def carry_out(self, smaller: Smaller) -> None:
        raise PassError("what was learned is in the saved weights: to learn it anew, call compress.healing.distil")
