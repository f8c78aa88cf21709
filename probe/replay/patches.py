"""Patches in a replay: where the rows of their values stand among the rows that are run."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from probe.edits import Patch
from probe.tokens import TokenMap


@dataclass(frozen=True)
class Put:
    """A patch on one example: rows `of` its value, to be put at the positions `at`. Padding has no rows here."""

    patch: Patch
    of: Tensor
    at: Tensor
    positions: int  # how many the patch has, padding counted


def resolve_patch(patch: Patch, token_map: TokenMap) -> Put:
    """Raises EditError for a value that has not a row for each position."""
    positions = token_map.positions(patch.positions)
    patch.check(len(positions))
    kept = np.nonzero([token_map.segments[position] != "pad" for position in positions])[0]
    return Put(patch, torch.from_numpy(kept), torch.from_numpy(positions[kept]), len(positions))


def put_rows(entries: Sequence[Sequence[Put]], state: Tensor, first: int) -> Tensor:
    """`state` (entry row ...), its rows numbered from position `first`, with each entry's patches in their place."""
    if not any(entries):
        return state
    state = state.clone()
    for rows, puts in zip(state, entries, strict=True):
        for put in puts:
            run = (put.at >= first) & (put.at < first + len(rows))  # of the last layer only the last row is run to its end
            put.patch.put(rows, put.of[run], (put.at[run] - first).to(rows.device), put.positions)
    return state
