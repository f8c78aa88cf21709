"""How many units each layer loses, and which: the lowest scores in every layer, over all layers, or of heads and neurons together.

Ties go to the lower layer and number first. What is asked for is never exceeded, except that a joint choice comes as near to it as it can.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from compress.structure import Units

Scores = Mapping[int, Float[Tensor, " unit"]]  # by layer, low where a unit does little
Gone = dict[int, tuple[int, ...]]


def even(scores: Scores, share: float | Sequence[float], multiple: int = 1) -> Gone:
    """int(share * n) of the n units of every layer, rounded so that a multiple of so many stays; `share` may be one for each layer, by its number."""
    own = {layer: share[layer] if isinstance(share, Sequence) else share for layer in scores}
    return {layer: _lowest(one, left_of(len(one), own[layer], multiple)) for layer, one in scores.items()}


def left_of(count: int, share: float, multiple: int = 1) -> int:
    """How many of `count` units stay where a share of them goes."""
    return _left(count, int(share * count + 1e-9), multiple)


def over_layers(scores: Scores, share: float, multiple: int = 1, least: int = 1) -> Gone:
    """int(share * n) of the n units of all layers, with at least a multiple (or `least`) left in each; each layer is rounded as in `even`."""
    wanted = int(share * sum(map(len, scores.values())) + 1e-9)
    counts = dict.fromkeys(scores, 0)
    for _, layer in _ascending(scores):
        if not wanted:
            break
        if counts[layer] < len(scores[layer]) - min(max(multiple, least), len(scores[layer])):
            counts[layer] += 1
            wanted -= 1
    return {layer: _lowest(one, _left(len(one), counts[layer], multiple)) for layer, one in scores.items()}


def jointly(
    scores: Sequence[Scores], found: Sequence[Mapping[int, Units]], share: float, multiples: Sequence[int]
) -> list[Gone]:
    """Heads and neurons in one order, as many as come nearest to a share of their weights (FLAP's AL-AM, arXiv 2312.11983).

    A unit weighs what its matrices hold: 512 / 3 neurons for one of LLaMA's heads, as published, and more for a group of heads. At least
    a multiple stays in each layer. (The published code also drops the unit that stands on the threshold.)
    """
    every = sorted(
        (float(value), kind, layer, unit)
        for kind, by_layer in enumerate(scores) for layer, one in by_layer.items() for unit, value in enumerate(one.tolist())
    )  # fmt: skip
    target = share * sum(one.count * one.weights for each in found for one in each.values())
    counts: list[dict[int, int]] = [dict.fromkeys(by_layer, 0) for by_layer in scores]
    gone = 0.0
    for _, kind, layer, _ in every:
        one, weights = len(scores[kind][layer]), found[kind][layer].weights
        if abs(gone + weights - target) >= abs(gone - target) and gone + weights > target:
            break
        if counts[kind][layer] < one - min(multiples[kind], one):
            counts[kind][layer] += 1
            gone += weights
    return [
        {layer: _lowest(one, _left(len(one), count[layer], multiple)) for layer, one in by_layer.items()}
        for by_layer, count, multiple in zip(scores, counts, multiples, strict=True)
    ]


def _ascending(scores: Scores) -> list[tuple[float, int]]:
    return sorted((float(value), layer) for layer, one in scores.items() for value in one.tolist())


def _left(count: int, gone: int, multiple: int) -> int:
    """How many stay of `count`: all but `gone`, rounded up to a multiple."""
    return min(count, -(-(count - gone) // multiple) * multiple) if gone else count


def _lowest(scores: Float[Tensor, " unit"], left: int) -> tuple[int, ...]:
    """All but the `left` highest; of equal scores the lower number goes first."""
    order: list[Any] = torch.sort(scores.double(), stable=True).indices.tolist()
    return tuple(sorted(order[: len(order) - left]))
