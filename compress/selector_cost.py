"""What choosing tokens costs: the matrix products of every method, in closed form. Sums, norms and sorts are not multiply-adds."""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Choosing:
    """The sizes that a choice is made at.

    `n` tokens of which `kept` stay; `words` that a method may look at, `positions` of the whole prompt there; `width` of the states, `heads` of the
    decoder and `mixed`, the width of all of them together; of the vision tower, its `patches` with the class token, its width, and one head's.
    """

    n: int
    kept: int
    words: int
    positions: int
    width: int
    heads: int
    mixed: float
    patches: int
    tower_width: int
    tower_head: int


def row_of_attention(size: Choosing) -> float:
    """One query with every key, in all heads."""
    return size.positions * size.mixed


def tower_attention(size: Choosing) -> float:
    """Every patch with every other, in all heads of one layer."""
    return float(size.patches**2 * size.tower_width)


def _visionzip(size: Choosing) -> float:
    merged = min(size.kept - 1, round(size.kept * 10 / 64))
    others = size.n - (size.kept - merged)
    return float((others - merged) * merged * size.tower_head) if merged > 0 else 0.0


def _vispruner(size: Choosing) -> float:
    first = size.kept // 2
    return float((size.n - first) ** 2 * size.tower_width)


def _aim_merge(size: Choosing) -> float:
    left, pairs = size.n, 0
    while left > size.kept:
        pairs += (left - left // 2) * (left // 2)
        left -= min(left - size.kept, left // 2)
    return float(pairs * size.width)


def _nothing(size: Choosing) -> float:
    return 0.0


ARITHMETIC: dict[str, Callable[[Choosing], float]] = {
    **dict.fromkeys(
        (
            "random",
            "uniform",
            "pooling",
            "downsampling",
            "fopru",
            "fastervlm",
            "evs",
            "progressive-pooling",
            "thumbnail-and-sampling",
        ),
        _nothing,
    ),
    "visionzip": _visionzip,
    "prumerge": lambda size: float(size.kept * size.n * size.tower_head),
    "vispruner": _vispruner,
    "divprune": lambda size: float(size.n**2 * size.width),
    "cdpruner": lambda size: float(size.n**2 * size.width + size.n * size.width + size.n * size.kept * (size.kept - 1) / 2),
    "aim-merge": _aim_merge,
    "dpc-knn": lambda size: float(size.n**2 * size.width),
    "fastv": row_of_attention,
    "pdrop": row_of_attention,
    # How many words rate is found in the prompt: all of them are counted.
    "sparsevlm": lambda size: float(size.n * size.words * size.width) + size.words * row_of_attention(size),
    "aim": lambda size: size.positions * row_of_attention(size) + 5.0 * size.heads * size.positions**2,
    "dart": lambda size: float((min(4, size.kept) + min(4, size.words)) * size.n * size.width),
}
