"""How much heads and neurons matter: FLAP's fluctuation, Taylor's first order, magnitude, and chance."""

import zlib
from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from compress.structure import Units

Found = Mapping[int, Units]
Scores = dict[int, Float[Tensor, " unit"]]


def magnitude(found: Found) -> Scores:
    """The sum of the absolute weights of each unit: rows that write it, columns that read it."""
    return {
        layer: one.summed({part: part.weight.detach().float().abs() for part in one.parts}).cpu()
        for layer, one in found.items()
    }


def at_random(found: Found, seed: int) -> Scores:
    """Numbers drawn by a seed, for each layer and kind its own."""
    scores = {}
    for layer, one in found.items():
        generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}/{one.kind}/{layer}".encode()))
        scores[layer] = torch.rand(one.count, generator=generator)
    return scores
