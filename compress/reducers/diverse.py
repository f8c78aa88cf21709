"""Methods that keep what differs, and methods that merge what is alike; before the decoder, without attention.

Distances are computed in float32 (the published DivPrune uses half precision), and what is chosen is never chosen again.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from compress.reducers.inside import unit
from compress.tokens.choice import Kept, Seen
from probe.errors import PassError


def divprune(seen: Seen, count: int, *, cen: bool = False) -> Kept:
    """DivPrune (arXiv 2503.02175): the set whose least distance is largest, greedily; O(count x n).

    `cen` corrects the bias to positive similarity (Cen-Prune): cosines of centred states, and each token's distinctiveness as a factor.
    """
    alike = unit(seen.states) @ unit(seen.states).T
    first = _farthest_from_its_nearest(1 - alike)
    if not cen:
        return Kept(max_min(1 - alike, first, count))
    return Kept(max_min(1 - centred(seen.states), first, count, distinctiveness(alike)))


def _farthest_from_its_nearest(distance: Float[Tensor, "n n"]) -> int:
    others = distance + torch.diag(distance.new_full((len(distance),), float("inf")))
    return int(others.amin(1).argmax()) if len(distance) > 1 else 0


def max_min(
    distance: Float[Tensor, "n n"], first: int, count: int, factor: Float[Tensor, " n"] | None = None
) -> Int[Tensor, " kept"]:
    """Greedy choice: each time the token farthest from all chosen ones (times a factor of its own), in ascending order."""
    chosen = torch.empty(count, dtype=torch.long, device=distance.device)
    chosen[0] = first
    nearest = distance[first].clone()
    nearest[first] = float("-inf")
    weight = torch.ones_like(nearest) if factor is None else factor
    for i in range(1, count):
        nxt = torch.where(nearest.isneginf(), nearest, nearest * weight).argmax()
        chosen[i] = nxt
        nearest = torch.minimum(nearest, distance[nxt])
        nearest[nxt] = float("-inf")
    return chosen.sort().values


def centred(states: Float[Tensor, "n width"]) -> Float[Tensor, "n n"]:
    """Cosines of the states without their mean."""
    around = unit(states.float() - states.float().mean(0))
    return around @ around.T


def distinctiveness(alike: Float[Tensor, "n n"]) -> Float[Tensor, " n"]:
    """How unlike the others each token is, scaled to [0, 1]; all equal: 1."""
    mean = (alike.sum(1) - alike.diagonal()) / max(1, len(alike) - 1)
    return scaled(-mean)


def scaled(values: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
    """Least to 0, largest to 1; all equal: 1."""
    low, high = values.amin(), values.amax()
    return torch.ones_like(values) if bool(high - low < 1e-12) else (values - low) / (high - low)


def cdpruner(seen: Seen, count: int, *, relevance: float = 0.5, negative: bool = False, cen: bool = False) -> Kept:
    """CDPruner (arXiv 2506.10967) with the words' own embeddings: a determinantal process over what is relevant and unlike.

    Relevance is the cosine with the mean of the words' embeddings, as in OpenVINO's port, which needs no text tower; `relevance` in [0, 1)
    is its weight (the exponent w / (2 (1 - w))), `negative` turns its sign, as CLIP's own patches want. `cen` is Cen-Prune's kernel.
    """
    if not 0 <= relevance < 1:
        raise PassError(f"the weight of relevance lies in [0, 1), not at {relevance:g}")
    likeness = unit(seen.states) @ unit(seen.text.float().mean(0, keepdim=True))[0]
    wanted = scaled(-likeness if negative else likeness)
    quality = (relevance / (2 * (1 - relevance)) * wanted).exp()
    alike = unit(seen.states) @ unit(seen.states).T
    if cen:
        quality = quality * distinctiveness(alike)
        alike = centred(seen.states)
    return Kept(greedy_dpp(quality[:, None] * alike * quality[None, :], count))


def greedy_dpp(kernel: Float[Tensor, "n n"], count: int) -> Int[Tensor, " kept"]:
    """The greedy most likely set of a determinantal point process (arXiv 1709.05135), by Cholesky updates; ascending."""
    gain = kernel.diagonal().clone().float()
    rows = kernel.new_zeros(count, len(kernel)).float()
    chosen = torch.empty(count, dtype=torch.long, device=kernel.device)
    for i in range(count):
        pick = gain.argmax()
        chosen[i] = pick
        row = (kernel[pick].float() - rows[:i, pick] @ rows[:i]) / gain[pick].clamp(min=1e-12).sqrt()
        rows[i] = row
        gain = (gain - row.square()).clamp(min=0)
        gain[chosen[: i + 1]] = float("-inf")
    return chosen.sort().values


def aim_merge(seen: Seen, count: int) -> Kept:
    """AIM's merging (arXiv 2412.03248): rounds of bipartite matching, the best-matched even token averaged into an odd one.

    Averages are unweighted, as published: a token that stands for several counts as one. What is left stands in order; the
    published code scrambles it in rounds that do not halve, and positions would lie.
    """
    states, place = seen.states.float(), torch.arange(len(seen), device=seen.states.device)
    while len(states) > count:
        states, place = merge_round(states, place, min(len(states) - count, len(states) // 2))
    return Kept(place, states.to(seen.states.dtype))


def merge_round(
    states: Float[Tensor, "n width"], place: Int[Tensor, " n"], pairs: int
) -> tuple[Float[Tensor, "m width"], Int[Tensor, " m"]]:
    """One round: the `pairs` even tokens most like an odd one are averaged into it, the odd one itself taking part."""
    source, target = states[0::2], states[1::2]
    like, to = (unit(source) @ unit(target).T).max(1)
    gone = like.argsort(descending=True, stable=True)[:pairs]
    total = target.clone().index_add_(0, to[gone], source[gone])
    size = torch.ones(len(target), device=states.device).index_add_(0, to[gone], torch.ones(pairs, device=states.device))
    left = torch.ones(len(source), dtype=torch.bool, device=states.device)
    left[gone] = False
    merged = torch.cat([source[left], total / size[:, None]])
    at = torch.cat([place[0::2][left], place[1::2]])
    order = at.argsort()
    return merged[order], at[order]


def dpc_knn(seen: Seen, count: int, *, neighbours: int = 5) -> Kept:
    """Chat-UniVi's density peaks (arXiv 2311.08046): dense tokens far from denser ones are centres, the rest is averaged into them.

    The published code breaks ties with noise; here the earlier token is the denser one.
    """
    states = seen.states.float()
    distance = torch.cdist(states, states) / states.shape[1] ** 0.5
    k = min(neighbours if neighbours <= count else min(3, max(count // 2, 1)), len(states))
    density = (-distance.topk(k, 1, largest=False).values.square().mean(1)).exp()
    rank = torch.empty_like(density, dtype=torch.long)
    rank[density.argsort(descending=True, stable=True)] = torch.arange(len(density), device=density.device)
    denser = rank[None, :] < rank[:, None]
    peak = torch.where(denser, distance, float("inf")).amin(1)
    peak = torch.where(peak.isinf(), distance.amax(), peak)
    centres = (density * peak).argsort(descending=True, stable=True)[:count].sort().values
    nearest = distance[:, centres].argmin(1)
    nearest[centres] = torch.arange(count, device=centres.device)
    total = torch.zeros(count, states.shape[1], device=states.device).index_add_(0, nearest, states)
    size = torch.bincount(nearest, minlength=count)[:, None]
    return Kept(centres, (total / size).to(seen.states.dtype))
