"""What enters the linear maps of the decoder, summed over calibration tokens: what Wanda and its kin ask for."""

from collections.abc import Sequence
from contextlib import ExitStack

import numpy as np
from torch import Tensor, nn

from probe.alignment import SIDES, Sides, span
from probe.subject import Subject


class InputSquares:
    """Sums of the squared inputs of every linear map of the decoder, perceptual and textual tokens apart: what Wanda asks for.

    Maps that read the same tensor (q, k and v) share one sum.
    """

    def __init__(self, subject: Subject, sides: Sequence[Sides | None]) -> None:
        self.subject = subject
        self.at = [() if one is None else (span(one.perceptual), span(one.textual)) for one in sides]
        self.sums: dict[tuple[str, str], Tensor] = {}
        self.stack = ExitStack()
        self.seen: Tensor | None = None

    def __enter__(self) -> "InputSquares":  # noqa: PYI034  beartype takes Self in decorated classes only
        if any(self.at):
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
        for state, at in zip(entering.detach(), self.at, strict=True):
            for side, positions in zip(SIDES, at, strict=False):  # of an example that is left out, none
                found = state[positions].float().square().sum(0).double()
                known = self.sums.get((side, name))
                self.sums[side, name] = found if known is None else known + found

    @property
    def totals(self) -> dict[tuple[str, str], np.ndarray]:
        """The sums by side and name of the map (width); they leave the device here, and not while the pass runs."""
        return {key: total.cpu().numpy() for key, total in self.sums.items()}


def linear_maps(subject: Subject) -> list[tuple[str, nn.Linear]]:
    """The linear maps of the decoder layers, in the order in which a layer holds them: `LAYER.PATH`."""
    return [
        (f"{i}.{path}", module)
        for i, layer in enumerate(subject.layers) for path, module in layer.named_modules() if isinstance(module, nn.Linear)
    ]  # fmt: skip
