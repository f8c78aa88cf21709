"""A grid cut into windows, each averaged into one token that stands at the member nearest its middle."""

import torch
from jaxtyping import Float, Int
from torch import Tensor


def window_counts(rows: int, columns: int) -> list[int]:
    """How many windows a grid can be cut into, ascending."""
    return sorted({a * b for a in range(1, rows + 1) for b in range(1, columns + 1)})


def window_shape(rows: int, columns: int, count: int) -> tuple[int, int] | None:
    """Numbers of windows down and across whose product is the count, as near the grid's own shape as can be."""
    pairs = [(a, count // a) for a in range(1, rows + 1) if count % a == 0 and count // a <= columns]
    return min(pairs, key=lambda pair: abs(pair[0] * columns - pair[1] * rows)) if pairs else None


def pool_frame(
    states: Float[Tensor, "cell width"], rows: int, columns: int, count: int
) -> tuple[Int[Tensor, " window"], Float[Tensor, "window width"]]:  # fmt: skip
    """Places (ascending) and averages (float32) of `count` windows of a grid; the count must be one of `window_counts`."""
    shape = window_shape(rows, columns, count)
    assert shape is not None, (rows, columns, count)
    device = states.device
    down = torch.arange(rows, device=device) * shape[0] // rows
    across = torch.arange(columns, device=device) * shape[1] // columns
    window = (down[:, None] * shape[1] + across[None, :]).flatten()
    total = torch.zeros(count, states.shape[1], device=device).index_add_(0, window, states.float())
    size = torch.bincount(window, minlength=count)
    anchor = torch.stack([_middle(torch.nonzero(window == w)[:, 0], columns) for w in range(count)])
    order = anchor.argsort()
    return anchor[order], (total / size[:, None])[order]


def _middle(members: Int[Tensor, " n"], columns: int) -> Int[Tensor, ""]:
    """The member nearest the middle of its window; of equal ones the first."""
    at = torch.stack([members // columns, members % columns], 1).float()
    return members[(at - at.mean(0)).square().sum(1).argmin()]
