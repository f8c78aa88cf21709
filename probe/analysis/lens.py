"""What a lens says of objects: how many of their patches read as their word, and at which layer."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

# What an object's patches and word are held against.
OWN, OTHER_WORD, OTHER_PATCHES = "own", "a word of another scene", "other patches"


class Correspondence(NamedTuple):
    """The share of an object's patches that read as its word, layer by layer."""

    first: Float[np.ndarray, " layer"]  # whose likeliest token is the word
    among: Float[np.ndarray, " layer"]  # that have the word among the likeliest k tokens


def correspondence(
    top_ids: Int[np.ndarray, "layer position top"], patches: Int[np.ndarray, " patch"], ids: tuple[int, ...]
) -> Correspondence:
    """The share of patches whose likeliest tokens hold one of a word's token ids (arXiv 2410.07149, section 4).

    `patches` index the positions of `top_ids`, whose last dimension begins with the likeliest token. Without patches: NaN.
    """
    if not len(patches):
        nothing = np.full(len(top_ids), np.nan)
        return Correspondence(nothing, nothing)
    hit: Bool[np.ndarray, "layer patch top"] = np.isin(top_ids[:, patches], ids)
    return Correspondence(hit[..., 0].mean(1), hit.any(-1).mean(1))


def best_layer(shares: Float[np.ndarray, " layer"]) -> float:
    """The layer with the highest share, the first of several; NaN for a word that no layer reads."""
    return float(np.argmax(shares)) if len(shares) and np.nanmax(shares, initial=0.0) > 0 else float("nan")
