"""What a reducer is shown of one medium, and what it answers."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Protocol

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from compress.tokens.media import Shape
from probe.attention import Call, RowAttention, attend_rows, score_rows
from probe.errors import PassError


@dataclass(frozen=True)
class Seen:
    """One medium of one example, where its tokens are to be chosen.

    `states` are its embeddings behind the connector, or its hidden states at the input of a layer; `text` those of the
    words after it (all words where none follow). `tower` holds what was recorded in the vision or audio tower, by name,
    one row for each token. `call` is the attention of the layer before (or of the layer itself, where that was asked for),
    of the whole row; `places` are the medium's columns there, `last` the column that predicts the answer.
    """

    states: Float[Tensor, "n width"]
    text: Float[Tensor, "m width"]
    grid: Shape | None
    layer: int
    n_layers: int
    kind: str = "image"
    tower: Mapping[str, Tensor] = field(default_factory=dict)
    call: Call | None = None
    row: int = 0
    places: Int[Tensor, " n"] | None = None
    words: Int[Tensor, " m"] | None = None
    alive: Bool[Tensor, " column"] | None = None  # columns that are neither padding nor hidden; all of them unless said
    last: int = -1
    seed: int = 0
    before: Float[Tensor, "column width"] | None = None  # the whole row as it entered the decoder, at the columns of now

    def __len__(self) -> int:
        return len(self.states)

    @cached_property
    def attention(self) -> Float[Tensor, "head n"]:
        """Attention of the last position to the medium's tokens, in every head."""
        return self.rows(torch.tensor([self.last], device=self.states.device))[:, 0]

    def rows(self, rows: Int[Tensor, " row"]) -> Float[Tensor, "head row n"]:
        """Attention of some columns of the prompt to the medium's tokens (float32, after the softmax over all keys)."""
        return self._attend(rows).probability[0][..., self.columns]

    def _attend(self, rows: Int[Tensor, " row"]) -> RowAttention:
        call = self._own_call
        visible, bias = call.visible(rows[None])
        return attend_rows(call, rows[None], visible, bias)

    @property
    def _own_call(self) -> Call:
        if self.call is None:
            raise PassError("this reducer needs attention, and was run where there is none")
        return one_row(self.call, self.row)

    @property
    def columns(self) -> Int[Tensor, " n"]:
        """The medium's columns in the whole row."""
        if self.places is None:
            raise PassError("this reducer looks at the whole prompt, and was shown one medium alone")
        return self.places

    @property
    def keys(self) -> Float[Tensor, "kv_head column dim"]:
        """The keys of the whole row."""
        return self._own_call.key[0]

    @cached_property
    def voters(self) -> Int[Tensor, " voter"]:
        """The columns that take part: padding and what is hidden do not, just as what was dropped cannot."""
        length = self._own_call.query.shape[2]
        if self.alive is None:
            return torch.arange(length, device=self.states.device)
        return torch.nonzero(self.alive[:length])[:, 0]

    def sharpened(self, temperature: float) -> Iterator[Float[Tensor, "head voter voter"]]:
        """Attention of every voter to every other at a temperature (float32), the heads of one key head at a time.

        Voters squared for each head: together they would be the largest tensor of the whole pass. A voter that sees nothing has zeros.
        """
        call, voters = self._own_call, self.voters
        rows = voters[None]
        visible, bias = call.visible(rows)
        each = call.query.shape[1] // call.key.shape[1]
        for group in range(call.key.shape[1]):
            heads = slice(group * each, (group + 1) * each)
            part = replace(call, query=call.query[:, heads], key=call.key[:, group : group + 1])
            shift = bias if bias is None or bias.shape[1] == 1 else bias[:, heads]
            own = visible if visible.shape[1] == 1 else visible[:, heads]
            weight = score_rows(part, rows, own, shift)[0].div_(temperature).softmax(-1)[..., voters]
            yield weight if bool(own.any(-1).all()) else weight.nan_to_num_(0.0)

    @property
    def entered(self) -> Float[Tensor, "n width"]:
        """The medium's embeddings, as they entered the decoder."""
        return self.states if self.before is None else self.before[self.columns]

    @property
    def entered_text(self) -> Float[Tensor, "m width"]:
        """The words' embeddings."""
        return self.text if self.before is None or self.words is None else self.before[self.words]

    @property
    def square(self) -> tuple[int, int]:
        """Rows and columns of a picture's grid. Raises PassError where the tokens lie in none."""
        if self.grid is None or self.grid[0] != 1:
            raise PassError(f"{len(self)} tokens of this {self.kind} lie in no grid of one frame, which this reducer needs")
        return self.grid[1], self.grid[2]


def one_row(call: Call, row: int) -> Call:
    """An attention call of one row of its batch."""
    mask = call.mask
    if isinstance(mask, Tensor):
        mask = mask[row : row + 1] if len(mask) > 1 else mask
    return Call(
        call.module, call.query[row : row + 1], call.key[row : row + 1], call.value[row : row + 1], mask, call.options,
        call.kernel,
    )  # fmt: skip


@dataclass(frozen=True)
class Kept:
    """What stays: indices among the medium's tokens, ascending, and new states for them where they were merged."""

    index: Int[Tensor, " kept"]
    states: Float[Tensor, "kept width"] | None = None


class Selector(Protocol):
    """Chooses what stays of a medium. Nothing else: guards, quotas, compaction and positions are not its business."""

    def __call__(self, seen: Seen, count: int) -> Kept: ...


def best(score: Float[Tensor, " n"], count: int) -> Int[Tensor, " kept"]:
    """The `count` highest scores, ascending by place; of equal ones the earlier first."""
    order = torch.argsort(-score.float(), stable=True)
    return order[:count].sort().values
