"""The baselines that every reducer is held against."""

import torch

from compress.reducers.windows import pool_frame, window_counts, window_shape
from compress.tokens.choice import Kept, Seen, best
from probe.errors import PassError


def at_random(seen: Seen, count: int) -> Kept:
    """Any `count` tokens, drawn by the seed of the pass, the words of the prompt and the number of the medium."""
    generator = torch.Generator().manual_seed(seen.seed)
    return Kept(best(torch.rand(len(seen), generator=generator).to(seen.states.device), count))


def uniform(seen: Seen, count: int) -> Kept:
    """Every n-th token, first and last among them; of one, the middle."""
    device = seen.states.device
    if count == 1:
        return Kept(torch.tensor([len(seen) // 2], device=device))
    return Kept(torch.linspace(0, len(seen) - 1, count, device=device).round().long())


def pooling(seen: Seen, count: int) -> Kept:
    """Averages over windows of the grid, as square as the count allows (InfMLLM's pool adapter, training-free).

    Each window stands at its token nearest the middle. Raises PassError where no windows of the grid make the count.
    """
    rows, columns = seen.square
    _refuse_count(rows, columns, count)
    index, states = pool_frame(seen.states, rows, columns, count)
    return Kept(index, states.to(seen.states.dtype))


def downsampling(seen: Seen, count: int) -> Kept:
    """The grid of states made smaller as a picture is, by bilinear interpolation with antialiasing; places as for pooling.

    It shrinks what the tower made of the picture. Shrinking the picture itself saves tokens in models of native resolution
    only, and is a matter of the data.
    """
    rows, columns = seen.square
    _refuse_count(rows, columns, count)
    shape = window_shape(rows, columns, count)
    assert shape is not None
    grid = seen.states.float().T.reshape(1, -1, rows, columns)
    small = torch.nn.functional.interpolate(grid, shape, mode="bilinear", antialias=True, align_corners=False)
    index, _ = pool_frame(seen.states, rows, columns, count)
    return Kept(index, small[0].flatten(1).T.to(seen.states.dtype))


def _refuse_count(rows: int, columns: int, count: int) -> None:
    if window_shape(rows, columns, count) is None:
        near = min(window_counts(rows, columns), key=lambda n: abs(n - count))
        raise PassError(f"a grid of {rows} x {columns} has no windows that make {count} tokens: keep {near}")
