"""Visual attention sinks: positions with massive activations, and what falls on them (arXiv 2503.03321, sections 3 and 4).

Paper or code: a position is a sink from phi >= 20 on in the paper, above 20 in its code; here above. The root mean square is that of
the state alone, without the norm's learned weight, as in the code.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float
from torch import Tensor

from probe.analysis.stats import spearman

TAU, MIN_MASS, MAX_SHARE, FIRST_LAYER = 20.0, 0.2, 0.5, 2
THRESHOLDS = (1.0, 2.0, 3.0, 4.0, 5.0, 7.0, 10.0, 15.0, 20.0, 30.0, 50.0)
EPSILON = 1e-6


def relative(states: Float[Tensor, "*any width"]) -> Float[Tensor, "*any width"]:
    """The size of each dimension of a state beside the state's root mean square (... width), float32."""
    states = states.float()
    return states.abs() / (states.square().mean(-1, keepdim=True) + EPSILON).sqrt()


def sink_score(states: Float[Tensor, "*any width"], dimensions: Sequence[int]) -> Float[Tensor, "*any"]:
    """phi: the largest of the chosen dimensions beside the state's root mean square (...)."""
    return relative(states)[..., list(dimensions)].amax(-1)


def largest_dimensions(states: Float[Tensor, "layer width"], count: int = 2) -> tuple[int, ...]:
    """The dimensions in which a position is largest, beside its root mean square, on average over layers; largest first."""
    found: list[int] = relative(states).mean(0).topk(count).indices.tolist()
    return tuple(found)


def counts(
    phi: Float[np.ndarray, "layer position"], thresholds: Sequence[float] = THRESHOLDS
) -> Float[np.ndarray, " threshold"]:
    """How many positions are sinks at each threshold, averaged over layers."""
    return np.array([(phi > tau).sum(1).mean() for tau in thresholds])


def sink_share(
    attention: Float[np.ndarray, "layer head position"], sinks: Bool[np.ndarray, "layer position"]
) -> Float[np.ndarray, "layer head"]:
    """The share of the attention to what is shown that falls on sinks; 0 where nothing is looked at."""
    on = (attention * sinks[:, None]).sum(-1)
    return on / np.maximum(attention.sum(-1), EPSILON)


def image_centric(
    attention: Float[np.ndarray, "layer head position"],
    sinks: Bool[np.ndarray, "layer position"],
    min_mass: float = MIN_MASS,
    max_share: float = MAX_SHARE,
) -> Bool[np.ndarray, "layer head"]:
    """Heads that look at what is shown (at least `min_mass`) and not at its sinks (at most `max_share` of that)."""
    return (attention.sum(-1) >= min_mass) & (sink_share(attention, sinks) <= max_share)


def on_background(sinks: Bool[np.ndarray, "layer position"], background: Bool[np.ndarray, " position"]) -> tuple[float, float]:
    """The share of sinks that lie on the background, layers taken together, and the share that places drawn at random would have.

    NaN where there is no sink.
    """
    total = int(sinks.sum())
    return (float((sinks & background).sum() / total) if total else float("nan")), float(background.mean())


def attention_and_score(
    attention: Float[np.ndarray, "layer head position"], phi: Float[np.ndarray, "layer position"]
) -> Float[np.ndarray, " layer"]:
    """Rank correlation over positions of phi and the attention received, heads averaged; NaN where one is constant."""
    return np.array([spearman(seen, score) for seen, score in zip(attention.mean(1), phi, strict=True)])


def moved(
    sinks: Bool[np.ndarray, "layer position"], rng: np.random.Generator
) -> Bool[np.ndarray, "layer position"]:  # fmt: skip
    """As many positions in each layer, drawn from those that are never sinks; what is a sink in many layers stays in as many.

    Where more positions are sinks than not, the surplus has nowhere to go and is left out.
    """
    ever = np.nonzero(sinks.any(0))[0]
    never = rng.permutation(np.nonzero(~sinks.any(0))[0])
    made = np.zeros_like(sinks)
    for source, target in zip(ever, never, strict=False):
        made[:, target] = sinks[:, source]
    return made
