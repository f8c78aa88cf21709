"""Methods that choose before the decoder by what the vision tower attends to.

Where a method merges, it merges behind the connector: the published codes merge in front of it, which is the same thing for a linear
connector only. None of them feeds the class token to the decoder, as VisionZip's code does.
"""

from math import isqrt
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from compress.reducers.inside import unit
from compress.tokens.choice import Kept, Seen, best
from probe.errors import PassError


def fopru(seen: Seen, count: int, *, strategy: Literal["rank", "row"] = "rank") -> Kept:
    """FoPru (arXiv 2411.14164): significance is attention received or given between patches, whichever varies more.

    `row` keeps whole rows of the grid.
    """
    score = significance(seen.tower["tower_attention"])
    if strategy == "rank":
        return Kept(best(score, count))
    side = isqrt(len(seen))
    if side * side != len(seen):
        raise PassError(f"{len(seen)} tokens are no square grid: fopru keeps whole rows of one, use the strategy rank")
    if count % side:
        raise PassError(f"{count} tokens are no whole rows of {side}: keep {max(side, count // side * side)}")
    rows = best(score.view(side, side).sum(1), count // side)
    return Kept((rows[:, None] * side + torch.arange(side, device=rows.device)).flatten())


def significance(attention: Float[Tensor, "head n n"]) -> Float[Tensor, " n"]:
    """What a patch receives (column means) or gives (row means), whichever has the larger variance; equal ones: gives."""
    mean = attention.float().mean(0)
    received, given = mean.mean(0), mean.mean(1)
    return received if received.var(correction=0) > given.var(correction=0) + 1e-20 else given


def fastervlm(seen: Seen, count: int) -> Kept:
    """FasterVLM (arXiv 2412.01818): the patches that the class token attends to most."""
    return Kept(best(seen.tower["class_attention"].mean(0), count))


def visionzip(seen: Seen, count: int, *, contextual: float = 10 / 64, compat: str = "") -> Kept:
    """VisionZip (arXiv 2412.04467): dominant tokens by the class token's attention, the rest merged into evenly spaced ones.

    `contextual` is the merged share. A merged token is the mean of its members; with `compat="visionzip"` the published sum of the target
    and the mean of those assigned to it.
    """
    merged = min(count - 1, round(count * contextual)) if count > 1 else 0
    dominant = best(seen.tower["class_attention"].sum(0), count - merged)
    if not merged:
        return Kept(dominant)
    others = _without(len(seen), dominant)
    keys = unit(seen.tower["tower_keys"][others])
    at = torch.arange(0, len(others), max(1, len(others) // merged), device=others.device)[:merged]
    rest = _without(len(others), at)
    nearest = (keys[rest] @ keys[at].T).argmax(1)
    states = seen.states.float()
    total = torch.zeros(merged, states.shape[1], device=states.device).index_add_(0, nearest, states[others[rest]])
    size = torch.bincount(nearest, minlength=merged)[:, None]
    target = states[others[at]]
    made = target + total / size.clamp(min=1) if compat == "visionzip" else (target + total) / (size + 1)
    return _in_order(torch.cat([dominant, others[at]]), torch.cat([states[dominant], made]), seen)


def prumerge(seen: Seen, count: int, *, plus: bool = False, neighbours: int = 32, compat: str = "") -> Kept:
    """PruMerge (arXiv 2403.15388): tokens by the class token's attention, each taking in its nearest neighbours by key.

    `plus` takes half of them evenly spaced (PruMerge+). Neighbours are weighed by their attention, and the result is an average;
    with `compat="prumerge"` they are added unnormalised, as published. The count is given, not found from outliers.
    """
    weight = seen.tower["class_attention"].mean(0).float()
    even = torch.linspace(0, len(seen) - 1, count // 2, device=weight.device).round().long().unique() if plus else None
    score = weight if even is None else weight.index_fill(0, even, float("inf"))
    kept = best(score, count)
    alike = unit(seen.tower["tower_keys"])
    near = alike[kept] @ alike.T
    near[torch.arange(len(kept)), kept] = float("-inf")
    who = near.argsort(dim=1, descending=True, stable=True)[:, : min(neighbours, len(seen) - 1)]
    states = seen.states.float()
    added = (weight[who][..., None] * states[who]).sum(1)
    if compat == "prumerge":
        return Kept(kept, (states[kept] + added).to(seen.states.dtype))
    own = weight[kept][:, None]
    return Kept(kept, ((own * states[kept] + added) / (own + weight[who].sum(1, keepdim=True))).to(seen.states.dtype))


def vispruner(seen: Seen, count: int, *, important: float = 0.5) -> Kept:
    """VisPruner (arXiv 2412.01818): a share by the class token's attention, the rest by dropping what is doubled among the others."""
    weight = seen.tower["class_attention"].mean(0)
    first = best(weight, int(count * important))
    rest = _without(len(seen), first)
    rest = rest[weight[rest].float().argsort(descending=True, stable=True)]
    features = unit(seen.tower["tower_states"])[rest]
    alike = features @ features.T  # once for all rounds
    place = torch.arange(len(rest), device=rest.device)
    wanted = count - len(first)
    while len(rest) > wanted:
        even, odd = place[0::2], place[1::2]
        doubled = alike[even[:, None], odd].amax(1) if len(odd) else features.new_zeros(len(even))
        gone = doubled.argsort(descending=True, stable=True)[: min(8, len(rest) - wanted)]
        left = torch.ones(len(rest), dtype=torch.bool, device=rest.device)
        left[gone * 2] = False
        rest, place = rest[left], place[left]
    return Kept(torch.cat([first, rest]).sort().values)


def _without(n: int, gone: Int[Tensor, " m"]) -> Int[Tensor, " rest"]:
    left = torch.ones(n, dtype=torch.bool, device=gone.device)
    left[gone] = False
    return torch.nonzero(left)[:, 0]


def _in_order(index: Int[Tensor, " n"], states: Float[Tensor, "n width"], seen: Seen) -> Kept:
    order = index.argsort()
    return Kept(index[order], states[order].to(seen.states.dtype))
