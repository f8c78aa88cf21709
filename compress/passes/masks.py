"""Other attention masks in some layers, while a prompt is read."""

from collections.abc import Sequence
from typing import ClassVar, Literal

from compress.passes.base import Change, Evidence, Pass, Stage
from compress.smaller import Smaller
from compress.tokens.masking import MaskedAttention, refuse
from probe.errors import PassError
from probe.subject import Subject

Name = Literal["aki", "naavit", "croc", "unimodal"]


class MaskAttention(Change):
    """A mask on layers, as a ledger has it."""

    kind: ClassVar[str] = "mask-attention"
    runs: ClassVar[bool] = True
    method: Name
    layers: tuple[int, ...]

    def carry_out(self, smaller: Smaller) -> None:
        others = [one for one in smaller.attached if isinstance(one, MaskedAttention)]
        if both := sorted({layer for one in others for layer in one.layers} & set(self.layers)):
            raise PassError(f"layer {both[0]} has a mask already: a layer has one, put {self.method} on others")
        smaller.attached.append(MaskedAttention(smaller, self.method, self.layers))


class Masks(Pass):
    """An attention mask of the literature on a model that was trained with another one: training-free, and nothing says that it must work.

    `method`: `aki` (visual rows also see the question), `naavit` (no attention among visual tokens), `croc` (bidirectional within each block),
    `unimodal` (each modality to itself); formulas in `compress.tokens.pairs`. It stands on `layers`, or on those from `start` to before `stop`
    (default: all). Dense kernels compute every pair under a mask: no time is saved.
    """

    title: ClassVar[str] = "mask"
    stage: ClassVar[Stage] = "masks"
    repeatable: ClassVar[bool] = True
    method: Name
    layers: tuple[int, ...] | None = None
    start: int = 0
    stop: int | None = None

    def plan(self, subject: Subject, evidence: Evidence) -> Sequence[Change]:
        if self.layers is not None and (self.start or self.stop is not None):
            raise PassError("a mask stands on layers that are named, or on those from start to stop: not both")
        stop = subject.n_layers if self.stop is None else self.stop
        if not 0 <= self.start <= stop <= subject.n_layers:
            raise PassError(f"layers run from 0 to before {subject.n_layers}, not from {self.start} to before {stop}")
        chosen = tuple(range(self.start, stop)) if self.layers is None else tuple(sorted(set(self.layers)))
        if not chosen:
            return []
        refuse(subject, self.method, chosen)
        return [MaskAttention(method=self.method, layers=chosen)]
