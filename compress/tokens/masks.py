"""Masks and states of what is left: columns picked, padded on the left where a row has fewer, hidden where they are simulated away.

An index (batch column) says which column of the wider tensor stands at each column of the narrower one, -1 where none does.
"""

from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from probe.errors import PassError

Index = Int[Tensor, "batch column"]


def picked(flags: Bool[Tensor, "batch position"], index: Index) -> Bool[Tensor, "batch column"]:
    """Flags of the columns that an index names; False where it names none."""
    return flags.gather(1, index.clamp(min=0)) & (index >= 0)


def follow(values: Int[Tensor, "batch position"], index: Index, empty: int = -1) -> Int[Tensor, "batch column"]:
    """Whole numbers of the columns that an index names; `empty` where it names none."""
    return torch.where(index >= 0, values.gather(1, index.clamp(min=0)), empty)


def gathered(state: Tensor, index: Index) -> Tensor:
    """States (batch position ...) of the columns that an index names; where it names none, those of the first."""
    return state[torch.arange(len(index), device=index.device)[:, None], index.clamp(min=0)]


def left_over(keep: Bool[Tensor, "batch column"]) -> Index:
    """The index of what is kept. Rows that lose more begin with -1, so that the distance to the end stays what it was."""
    longest = int(keep.sum(1).max())
    rows = [torch.nonzero(row)[:, 0] for row in keep]
    return torch.stack([torch.nn.functional.pad(row, (longest - len(row), 0), value=-1) for row in rows])


def among(first: Index, now: Index) -> Index:
    """Where the columns of `now` stand in `first`; both name columns of the whole prompt."""
    hit = now[:, :, None] == first[:, None, :]
    where = hit.int().argmax(-1)
    return torch.where((now >= 0) & hit.any(-1), where, -1)


def compact(mask: Any, index: Index) -> Any:
    """A layer's mask (batch 1 query key), or one of keys (batch key), for the columns that an index names.

    No mask at all is causal; where the index has gaps, it must be written out.
    """
    if mask is None:
        return None if bool((index >= 0).all()) else _causal(index)
    if not isinstance(mask, Tensor):
        raise PassError(
            f'a {type(mask).__name__} cannot be cut down to the tokens that are left: load with attn_implementation="sdpa"'
        )
    if mask.dim() == 2:
        return picked(mask.bool(), index).to(mask.dtype)
    mask = mask.expand(len(index), -1, -1, -1)
    batch = torch.arange(len(index), device=mask.device)[:, None, None]
    place = index.clamp(min=0)
    cut = mask[batch, :, place[:, :, None], place[:, None, :]].permute(0, 3, 1, 2)
    return close(cut, (index < 0)[:, None, None, :])


def after(mask: Any, real: Bool[Tensor, "batch column"], sizes: tuple[int, int], state: Tensor) -> Any:
    """The mask of generated tokens in a layer that holds other keys than the first one, in the form of the model's own `mask`.

    `real` are the columns that the prompt left in this layer's cache, `sizes` how many keys the cache gives and how many it
    has forgotten before them, `state` (batch query width) the queries.
    """
    keys, forgotten = sizes
    query = state.shape[1]
    if mask is None and query == 1 and bool(real.all()):
        return None
    seen = torch.nn.functional.pad(real, (0, keys + forgotten - real.shape[1]), value=True)[:, forgotten:]
    if mask is not None and mask.dim() == 2:
        return seen.to(mask.dtype)
    causal = torch.ones(query, keys, dtype=torch.bool, device=state.device).tril(keys - query)
    seen = (seen[:, None] & causal)[:, None]
    if mask is None or mask.dtype == torch.bool:
        return seen
    return torch.zeros_like(seen, dtype=mask.dtype).masked_fill(~seen, torch.finfo(mask.dtype).min)


def hide(mask: Any, hidden: Bool[Tensor, "batch column"], state: Tensor, keys: int | None = None) -> Tensor:
    """A mask under which nobody looks at hidden columns; a hidden column still looks at itself.

    `state` (batch query width) are the queries; with `keys` there are more keys than hidden columns, the last of them the queries.
    """
    query = state.shape[1]
    keys = hidden.shape[1] if keys is None else keys
    if mask is not None and mask.dim() != 4:
        raise PassError('dropping is simulated with masks: load the model with attn_implementation="sdpa" or "eager"')
    gone = torch.nn.functional.pad(hidden, (0, keys - hidden.shape[1]))[:, None, None, :]
    if mask is None:
        mask = torch.ones(query, keys, dtype=torch.bool, device=state.device).tril(keys - query)[None, None]
    own = torch.eye(query, keys, dtype=torch.bool, device=state.device)[None, None] if query == keys else torch.zeros_like(gone)
    return close(mask.expand(len(hidden), -1, -1, -1), gone & ~own)


def close(mask: Tensor, closed: Tensor) -> Tensor:
    """A mask, booleans or numbers to add, with more entries closed."""
    return mask & ~closed if mask.dtype == torch.bool else mask.masked_fill(closed, torch.finfo(mask.dtype).min)


def _causal(index: Index) -> Bool[Tensor, "batch 1 column column"]:
    count = index.shape[1]
    seen = torch.ones(count, count, dtype=torch.bool, device=index.device).tril()
    own = torch.eye(count, dtype=torch.bool, device=index.device)
    return ((seen & (index >= 0)[:, None, :]) | own)[:, None]
