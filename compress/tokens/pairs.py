"""Which pairs of a query and a key a mask closes or opens: one pure function for each published mask.

What a mask neither opens nor closes stays as the model has it. Every row keeps itself.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

from compress.tokens.masks import Index, close
from compress.tokens.spans import Spans
from probe.errors import PassError


@dataclass(frozen=True)
class Pairs:
    """Pairs of a query and a key that a mask opens or closes; None where there are none."""

    opened: Bool[Tensor, "batch query key"] | None = None
    closed: Bool[Tensor, "batch query key"] | None = None

    @property
    def _any(self) -> Tensor:
        return next(part for part in (self.opened, self.closed) if part is not None)

    @property
    def shape(self) -> torch.Size:
        return self._any.shape

    @property
    def device(self) -> torch.device:
        return self._any.device

    def at(self, index: Index) -> "Pairs":
        """The pairs of the columns that an index names; where it names none, nothing is changed."""
        place = index.clamp(min=0)
        batch = torch.arange(len(index), device=index.device)[:, None, None]
        there = (index >= 0)[:, :, None] & (index >= 0)[:, None, :]
        return Pairs(*(
            None if part is None else part[batch, place[:, :, None], place[:, None, :]] & there for part in (self.opened, self.closed)
        ))  # fmt: skip

    def count(self, real: Bool[Tensor, "batch position"]) -> int:
        """How many pairs of real positions they leave of a causal mask."""
        left = (real[:, :, None] & real[:, None, :]).tril()
        left = left if self.closed is None else left & ~self.closed
        return int((left if self.opened is None else left | self.opened).sum())


def aki(spans: Spans) -> Pairs:
    """Modality-mutual attention (AKI, arXiv 2503.02597): a visual row also sees the words of the question that follows its block.

    Several blocks, an extension: each sees all words between it and the answer's header, and no block that comes later.
    """
    at = torch.arange(spans.block.shape[1], device=spans.block.device)
    asked = spans.words[:, None, :] & (at > at[:, None]) & (at < spans.until[:, :, None])
    return Pairs(opened=asked & spans.shown[:, :, None])


def naavit(spans: Spans) -> Pairs:
    """No attention among visual tokens (NAAViT, arXiv 2502.02458): a visual row sees words before it, and itself."""
    own = torch.eye(spans.block.shape[1], dtype=torch.bool, device=spans.block.device)
    return Pairs(closed=spans.shown[:, :, None] & spans.shown[:, None, :] & ~own)


def croc(spans: Spans) -> Pairs:
    """Bidirectional attention within each block of visual tokens (Croc, arXiv 2410.14332)."""
    return Pairs(opened=(spans.block[:, :, None] == spans.block[:, None, :]) & spans.shown[:, :, None])


def unimodal(spans: Spans) -> Pairs:
    """Each modality to itself (arXiv 2405.16700): visual rows see visual tokens only, words see words only; what the model writes sees all."""
    apart = spans.shown[:, :, None] != spans.shown[:, None, :]
    return Pairs(closed=apart & spans.prompt[:, :, None] & spans.real[:, None, :])


@dataclass(frozen=True)
class Mask:
    """A published mask: its pairs, whether it must know where the question ends, and its source."""

    pairs: Callable[[Spans], Pairs]
    asks: bool
    source: str


MASKS: dict[str, Mask] = {
    "aki": Mask(aki, True, "arXiv 2503.02597"),
    "naavit": Mask(naavit, False, "arXiv 2502.02458"),
    "croc": Mask(croc, False, "arXiv 2410.14332"),
    "unimodal": Mask(unimodal, False, "arXiv 2405.16700"),
}


def changed(mask: Any, pairs: Pairs) -> Tensor:
    """A layer's mask (batch 1 query key, or none at all: causal) with pairs opened and closed.

    Raises PassError for a mask that has no entry for each pair.
    """
    if mask is not None and not (isinstance(mask, Tensor) and mask.dim() == 4):
        raise PassError(
            'a mask of pairs needs attention that takes one: load the model with attn_implementation="sdpa" or "eager"'
        )
    if mask is None:
        mask = torch.ones(1, 1, *pairs.shape[1:], dtype=torch.bool, device=pairs.device).tril()
    mask = mask.expand(pairs.shape[0], -1, -1, -1)
    if pairs.closed is not None:
        mask = close(mask, pairs.closed[:, None])
    if pairs.opened is not None:
        opened = pairs.opened[:, None]
        mask = mask | opened if mask.dtype == torch.bool else mask.masked_fill(opened, 0.0)
    return mask
