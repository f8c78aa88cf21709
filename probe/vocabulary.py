"""What the unembedding makes of states, a tile of the vocabulary at a time: some words, and the likeliest tokens.

The probability of a few words needs the sum over all of them, but not all of them at once. No tensor here is larger than the
states that came in, the weights of a tile, or `TILE` logits, however long the vocabulary and however many the positions.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from probe.anatomy.readout import capped
from probe.errors import EditError
from probe.subject import Subject

NORMS = ("final", "none")
TILE = 2**24  # logits that are held at once: 64 MiB in float32
ROWS = 4096  # states that are read at once


class Reading(NamedTuple):
    """Natural-log probabilities of the wanted tokens, and the likeliest tokens with theirs (none where none were asked for)."""

    wanted: Float[Tensor, "batch row token"]
    top_ids: Int[Tensor, "batch row top"]
    top: Float[Tensor, "batch row top"]


class Vocabulary:
    """A subject's unembedding. `norm` is `final`, or `none`: every layer below the last is then read without the norm.

    Raises EditError for an unembedding that is no linear map, or whose weights are not in memory.
    """

    def __init__(self, subject: Subject, norm: str = "final") -> None:
        head = subject.unembedding
        if not isinstance(head, nn.Linear):
            raise EditError(
                f"the unembedding of this {subject.anatomy.family} model is a {type(head).__name__}, not a linear map"
            )
        if head.weight.is_meta:
            raise EditError(
                "the unembedding's weights are not in memory: keep it on a device (device_map) to read single words"
            )
        self.subject, self.norm, self.weight, self.bias = subject, norm, head.weight, head.bias

    @torch.no_grad()
    def read(
        self, layer: int, state: Float[Tensor, "batch row width"], wanted: Int[Tensor, "batch token"], top: int = 0
    ) -> Reading:
        """What the states that leave a layer say of each example's wanted tokens: the lens of `probe.recorders.Lens`.

        `state` (batch row width), `wanted` token ids (batch token). The log-probabilities are float32, over the whole vocabulary.
        """
        raw = self.norm == "none" and layer < self.subject.n_layers - 1
        rows = max(1, ROWS // len(state))
        pieces = []
        for piece in state.split(rows, dim=1) if state.shape[1] else [state]:
            read = piece if raw else self.subject.final_norm(piece)
            pieces.append(self._read(read.to(self.weight.device), wanted.to(self.weight.device), top))
        return Reading(*(torch.cat(parts, 1) for parts in zip(*pieces, strict=True)))

    def _read(self, state: Tensor, wanted: Tensor, top: int) -> Reading:
        batch, rows, _ = state.shape
        logits = state @ self.weight[wanted].transpose(1, 2)
        if self.bias is not None:
            logits = logits + self.bias[wanted][:, None]
        logits = capped(logits, self.subject.config).float()
        total = torch.full((batch, rows), -torch.inf, device=state.device)
        best, ids = state.new_empty(batch, rows, 0, dtype=torch.float32), wanted.new_empty(batch, rows, 0)
        width = max(1, TILE // max(1, batch * rows))
        for start in range(0, len(self.weight), width):
            tile = self._tile(state, slice(start, start + width))
            total = torch.logaddexp(total, tile.logsumexp(-1))
            if top:
                best, ids = _likeliest(best, ids, tile, start, top)
        return Reading(logits - total[..., None], ids, best - total[..., None])

    def _tile(self, state: Tensor, part: slice) -> Tensor:
        bias = None if self.bias is None else self.bias[part]
        return capped(nn.functional.linear(state, self.weight[part], bias), self.subject.config).float()


def _likeliest(best: Tensor, ids: Tensor, tile: Tensor, start: int, top: int) -> tuple[Tensor, Tensor]:
    """The best of those so far and of a tile."""
    values, found = tile.topk(min(top, tile.shape[-1]), -1)
    values, found = torch.cat([best, values], -1), torch.cat([ids, found + start], -1)
    values, order = values.topk(min(top, values.shape[-1]), -1)
    return values, found.gather(-1, order)
