"""Rows of a layer's input told apart, picked, and put back; and the cache that stands in while some of them do not ask."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

from compress.tokens import masks
from compress.tokens.masks import Index
from probe.errors import PassError


@dataclass(frozen=True)
class Rows:
    """Where the rows that run and those that rest stand in each example; -1 first where an example has fewer than others.

    What is asked of it in every layer is found out once: looking into a tensor makes a GPU wait.
    """

    running: Index
    resting: Index

    @classmethod
    def of(cls, resting: Bool[Tensor, "batch position"]) -> "Rows":
        return cls(masks.left_over(~resting), masks.left_over(resting))

    @cached_property
    def alike(self) -> bool:
        """Whether every example has them at the same places."""
        return bool((self.running == self.running[:1]).all()) and bool((self.running >= 0).all())

    @cached_property
    def segments(self) -> tuple[tuple[int, int], ...]:
        """The runs of running rows of the first example: (start, stop)."""
        places = self.running[0]
        cuts = (torch.nonzero(places[1:] != places[:-1] + 1)[:, 0] + 1).tolist()
        return tuple((int(run[0]), int(run[-1]) + 1) for run in torch.tensor_split(places, cuts))

    @cached_property
    def runs(self) -> tuple[Index, ...]:
        """The running rows of each segment, where all examples are alike."""
        return tuple(self.running.new_tensor(range(*ends)).expand(len(self.running), -1) for ends in self.segments)


def picked_arguments(kwargs: dict[str, Any], index: Index, length: int) -> dict[str, Any]:
    """A layer's arguments at some of its rows; the mask and the cache are the caller's to give."""
    made = {}
    for key, value in kwargs.items():
        if key == "position_embeddings" and isinstance(value, tuple):
            value = tuple(masks.gathered(part.expand(len(index), -1, -1), index) for part in value)
        elif key == "position_ids":
            value = None  # kernels take gaps in them for the ends of packed sequences
        elif isinstance(value, Tensor) and value.dim() > 1 and tuple(value.shape[:2]) == (len(index), length):
            value = masks.gathered(value, index)
        made[key] = value
    return made


def mask_of(mask: Any, index: Index, length: int) -> Any:
    """The rows of a layer's mask (batch 1 row key); where there is none, of the causal one."""
    if mask is None:
        return (torch.arange(length, device=index.device) <= index.clamp(min=0)[:, :, None])[:, None]
    if not isinstance(mask, Tensor) or mask.dim() != 4:
        kind = "mask of padding" if isinstance(mask, Tensor) else type(mask).__name__
        raise PassError(
            f"rows of a {kind} cannot be picked: encode examples one at a time, or load the model with "
            f'attn_implementation="sdpa"'
        )
    mask = mask.expand(len(index), -1, -1, -1)
    batch = torch.arange(len(index), device=mask.device)[:, None]
    return mask[batch, :, index.clamp(min=0)].transpose(1, 2)


def put(state: Tensor, index: Index, values: Tensor, full: bool = False) -> Tensor:
    """`state` (batch position ...), in place, with values (batch row ...) at the positions that an index names.

    `full` says that it names one in every place.
    """
    if full:
        state[torch.arange(len(index), device=index.device)[:, None], index] = values
        return state
    row, place = torch.nonzero(index >= 0, as_tuple=True)
    state[row, index[row, place]] = values[row, place]
    return state


class Joined:
    """Stands where a layer's cache would: the keys of rows that ask, put among the keys of those that do not.

    `stop` is where the keys end that the rows may see; None for the last call, which hands all keys to the cache.
    """

    def __init__(self, cache: Any, silent: tuple[Tensor, Tensor], rows: Rows, length: int) -> None:
        self.cache, self.full = cache, rows.alike
        self.keys, self.values = (_among(part, rows, length) for part in silent)
        self.index: Index = rows.running
        self.stop: int | None = None

    def update(self, keys: Tensor, values: Tensor, *layer: Any, **more: Any) -> tuple[Tensor, Tensor]:
        """What transformers' attention calls: (batch head row dim)."""
        for whole, new in ((self.keys, keys), (self.values, values)):
            put(whole.transpose(1, 2), self.index, new.transpose(1, 2), self.full)
        if self.stop is not None:
            return self.keys[:, :, : self.stop], self.values[:, :, : self.stop]
        return (self.keys, self.values) if self.cache is None else self.cache.update(self.keys, self.values, *layer, **more)


def _among(part: Tensor, rows: Rows, length: int) -> Tensor:
    """Keys (batch head row dim) at their places among all."""
    whole = part.new_zeros(part.shape[0], part.shape[1], length, part.shape[3])
    put(whole.transpose(1, 2), rows.resting, part.transpose(1, 2), rows.alike)
    return whole


class KeysAlone(Exception):  # noqa: N818 (a way out of the attention, not an error)
    """Keys and values are known; nobody asks for what the attention would give."""


class Taken:
    """Stands where a layer's cache would, takes the keys and values, and ends the attention there."""

    def __init__(self, cache: Any = None) -> None:
        self.cache = cache
        self.found: tuple[Tensor, Tensor] | None = None

    def update(self, keys: Tensor, values: Tensor, *layer: Any, **more: Any) -> tuple[Tensor, Tensor]:
        """What transformers' attention calls: (batch head row dim)."""
        self.found = (keys, values)
        if self.cache is not None:
            self.cache.update(keys, values, *layer, **more)
        raise KeysAlone
