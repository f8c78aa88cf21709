"""What enters the linear maps of the decoder, summed over calibration tokens: what Wanda and its kin ask for."""

from collections.abc import Sequence
from contextlib import ExitStack

import numpy as np
import torch
from torch import Tensor, nn

from probe.alignment import SIDES, Sides
from probe.subject import Subject


class InputSquares:
    """Sums of the squared inputs of every linear map of the decoder, perceptual and textual tokens apart: what Wanda asks for.

    Maps that read the same tensor (q, k and v) share one sum.
    """

    def __init__(self, subject: Subject, sides: Sequence[Sides | None]) -> None:
        self.subject, self.sides = subject, sides
        self.totals: dict[tuple[str, str], np.ndarray] = {}
        self.stack = ExitStack()
        self.seen: Tensor | None = None

    def __enter__(self) -> "InputSquares":  # noqa: PYI034  beartype takes Self in decorated classes only
        if any(self.sides):
            for name, module in linear_maps(self.subject):
                self.stack.callback(
                    module.register_forward_pre_hook(lambda _, args, name=name: self._take(name, args[0])).remove
                )
        return self

    def __exit__(self, *_: object) -> None:
        self.seen = None
        self.stack.close()

    def _take(self, name: str, entering: Tensor) -> None:
        if entering is self.seen or entering.dim() != 3:
            return
        self.seen = entering
        for i, sides in enumerate(self.sides):
            if sides is None:
                continue
            for side, positions in zip(SIDES, (sides.perceptual, sides.textual), strict=True):
                picked = entering[i, torch.from_numpy(positions).to(entering.device)].detach().float()
                found = picked.square().sum(0).double().cpu().numpy()
                self.totals[side, name] = self.totals.get((side, name), 0.0) + found


def linear_maps(subject: Subject) -> list[tuple[str, nn.Linear]]:
    """The linear maps of the decoder layers, in the order in which a layer holds them: `LAYER.PATH`."""
    return [
        (f"{i}.{path}", module)
        for i, layer in enumerate(subject.layers) for path, module in layer.named_modules() if isinstance(module, nn.Linear)
    ]  # fmt: skip
