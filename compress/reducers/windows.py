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
    anchor = _middles(window, size, columns)
    order = anchor.argsort()
    return anchor[order], (total / size[:, None])[order]


def _middles(window: Int[Tensor, " cell"], size: Int[Tensor, " window"], columns: int) -> Int[Tensor, " window"]:
    """The cell of each window nearest the window's middle; of equal ones the first."""
    cell = torch.arange(len(window), device=window.device)
    at = torch.stack([cell // columns, cell % columns], 1).float()
    middle = torch.zeros(len(size), 2, device=window.device).index_add_(0, window, at) / size[:, None]
    order = (at - middle[window]).square().sum(1).argsort(stable=True)
    order = order[window[order].argsort(stable=True)]  # window by window, nearest first
    return order[size.cumsum(0) - size]
