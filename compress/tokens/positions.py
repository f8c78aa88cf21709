"""Which position ids the tokens that stay carry: the decision that separates token reducers silently.

`preserve` keeps everyone's original id, and what is generated goes on where the whole prompt ended. `reindex` counts on without
gaps, on every axis of a multi-axis embedding alike (which flattens a picture's grid). `rebase` leaves the kept tokens of a
medium where they stand from its first one on, and lets what follows begin right after the furthest of them. `rebase_grid`
lets it begin after the whole grid, whichever tokens survive: under transformers' numbering that is `preserve`.
"""

import itertools
from typing import Literal

import torch
from jaxtyping import Int
from torch import Tensor

Policy = Literal["preserve", "reindex", "rebase", "rebase_grid"]


def moved(policy: Policy, ids: Int[Tensor, "axis kept"], media: Int[Tensor, " kept"]) -> Int[Tensor, "axis kept"]:
    """New ids of one example's kept tokens, in order.

    `ids` (axis kept) are the original ones, `media` (kept) the number of the medium that each belongs to, -1 for text. Of four
    axes the first counts tokens, whatever they are, and is renumbered by itself.
    """
    if len(ids) == 4:
        return torch.cat([moved(policy, ids[:1], media), moved(policy, ids[1:], media)])
    if policy in ("preserve", "rebase_grid") or not ids.shape[1]:
        return ids
    if policy == "reindex":
        start = ids[:, :1].amin()
        return (start + torch.arange(ids.shape[1], device=ids.device)).expand_as(ids)
    return _rebased(ids, media)


def _rebased(ids: Int[Tensor, "axis kept"], media: Int[Tensor, " kept"]) -> Int[Tensor, "axis kept"]:
    """Runs of one medium or of text, each shifted as far as everything before it was."""
    made, shift = ids.clone(), 0
    starts = [0, *(torch.nonzero(media[1:] != media[:-1])[:, 0] + 1).tolist(), ids.shape[1]]
    for number, (start, stop) in enumerate(itertools.pairwise(starts)):
        run = ids[:, start:stop]
        if number and int(media[start]) < 0:  # text after a medium begins after the furthest kept token
            shift = int(made[:, :start].amax()) + 1 - int(run[:, 0].amin())
        made[:, start:stop] = run + shift
    return made


def next_ids(
    ids: Int[Tensor, "axis kept"], original: Int[Tensor, "axis all"], policy: Policy
) -> Int[Tensor, " axis"]:  # fmt: skip
    """The ids of the first generated token: after the whole prompt where ids are preserved, else after the last kept one."""
    source = original if policy in ("preserve", "rebase_grid") else ids
    parts = [source[:1], source[1:]] if len(source) == 4 else [source]
    return torch.cat([(part.amax() + 1).expand(len(part)) for part in parts])
