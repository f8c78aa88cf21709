"""Methods for clips, whose tokens lie in a grid of frames, rows and columns."""

from itertools import product

import torch
from jaxtyping import Float, Int
from torch import Tensor

from compress.reducers.inside import unit
from compress.reducers.windows import pool_frame, window_counts
from compress.tokens.choice import Kept, Seen
from probe.errors import PassError


def _frames(seen: Seen) -> tuple[Float[Tensor, "t cell width"], tuple[int, int, int]]:
    """The states frame by frame. Raises PassError where the tokens lie in no grid of several frames."""
    if seen.grid is None or seen.grid[0] < 2:
        raise PassError(f"{len(seen)} tokens of this {seen.kind} lie in no grid of several frames, which this reducer needs")
    t, h, w = seen.grid
    return seen.states.view(t, h * w, -1), (t, h, w)


def evs(seen: Seen, count: int) -> Kept:
    """Efficient video sampling (as vLLM has it): cells that changed since the frame before; the first frame first of all."""
    states, (_, h, w) = _frames(seen)
    now, before = unit(states[1:].flatten(0, 1)), unit(states[:-1].flatten(0, 1))
    change = 1 - (now * before).sum(-1)
    score = torch.cat([change.new_full((h * w,), 255.0), change])
    order = score.argsort(descending=True, stable=True)
    return Kept(order[:count].sort().values)


def progressive(seen: Seen, count: int, *, group: int = 4) -> Kept:
    """Progressive pooling over frames (arXiv 2409.20018, read from its abstract): the first frame of each group keeps finer windows.

    Raises PassError, with the nearest count, where no two sizes of windows make the count.
    """
    states, (t, h, w) = _frames(seen)
    first = [i % group == 0 for i in range(t)]
    sizes = window_counts(h, w)
    found = [(fine, coarse) for fine, coarse in product(sizes, sizes) if coarse <= fine]
    total = {pair: sum(pair[0] if one else pair[1] for one in first) for pair in found}
    fit = [pair for pair in found if total[pair] == count]
    if not fit:
        near = min(set(total.values()), key=lambda n: (abs(n - count), n))
        raise PassError(f"{t} frames of {h} x {w} have no windows that make {count} tokens in groups of {group}: keep {near}")
    fine, coarse = min(fit, key=lambda pair: (abs(pair[0] / pair[1] - 4), pair))
    index, made = [], []
    for number, frame in enumerate(states):
        at, pooled = pool_frame(frame, h, w, fine if first[number] else coarse)
        index.append(at + number * h * w)
        made.append(pooled)
    return Kept(torch.cat(index), torch.cat(made).to(seen.states.dtype))


def thumbnail_and_sampling(seen: Seen, count: int, *, thumbnails: int = 6) -> Kept:
    """TS-LLaVA's idea (arXiv 2411.11066) on tokens: some frames as thumbnails, averaged; the rest of the budget sampled evenly.

    The published method composes the thumbnail of pixels and encodes it anew; here each of `thumbnails` evenly spaced frames is
    pooled, all of them together to about half of the count.
    """
    states, (t, h, w) = _frames(seen)
    frames = torch.linspace(0, t - 1, min(thumbnails, t)).round().long().unique().tolist()
    sizes = [n for n in window_counts(h, w) if n * len(frames) <= max(len(frames), count // 2)]
    if not sizes or len(frames) > count:
        raise PassError(f"{count} tokens hold no thumbnails of {len(frames)} frames: keep more, or name fewer thumbnails")
    kept: dict[int, Tensor] = {}
    for number in frames:
        at, pooled = pool_frame(states[number], h, w, sizes[-1])
        kept |= {int(place) + number * h * w: state for place, state in zip(at, pooled, strict=True)}
    left = [i for i in range(len(seen)) if i not in kept]
    pick = torch.linspace(0, len(left) - 1, count - len(kept)).round().long().tolist()
    kept |= {left[i]: seen.states[left[i]].float() for i in pick}
    return _sorted(kept, seen)


def _sorted(kept: dict[int, Tensor], seen: Seen) -> Kept:
    index: Int[Tensor, " n"] = torch.tensor(sorted(kept), device=seen.states.device)
    return Kept(index, torch.stack([kept[int(i)] for i in index]).to(seen.states.dtype))
