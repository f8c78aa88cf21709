"""Cross-modal information flow: what a knock-out does to the answer, layer by layer (arXiv 2411.18620).

Paper or code: the paper quotes a window of 9 layers, its published plots of 32-layer models use 7; `default_window`
follows the plots. The answer's first token is the model's own, as in the published code.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from torch import Tensor

from probe.analysis.stats import resampled_means
from probe.errors import EditError, did_you_mean

FLOWS: dict[str, tuple[str, str]] = {
    # name: (rows that may no longer look, columns that they look at); an image is all positions of its run
    "image->question": ("question", "media"),
    "image->last": ("last", "media"),
    "question->last": ("last", "question"),
    "last->last": ("last", "last"),
    "related->question": ("question", "related"),
    "other->question": ("question", "other"),
}
METRICS = ("relative", "logit", "log_prob", "flip", "kl")


def flow_edges(name: str) -> tuple[str, str]:
    """Rows and columns of a flow. Raises EditError for a flow that does not exist."""
    if name not in FLOWS:
        raise EditError(f"there is no flow {name!r}{did_you_mean(name, FLOWS)}")
    return FLOWS[name]


def default_window(n_layers: int) -> int:
    """9 layers from 40 up, 7 from 28 up (the published settings), else the odd number next to 0.22 of the layers, at least 3."""
    if n_layers >= 40:
        return 9
    if n_layers >= 28:
        return 7
    return min(n_layers, max(3, 2 * int(0.22 * n_layers / 2) + 1))


class Change(NamedTuple):
    """What an edit did to the answer's first token; every field is (entry)."""

    p_before: np.ndarray
    p_after: np.ndarray
    relative: np.ndarray  # 100 (p_after - p_before) / p_before, percent
    logit: np.ndarray  # after - before
    log_prob: np.ndarray  # after - before, nats
    flip: np.ndarray  # 1 where the most likely token is another one
    kl: np.ndarray  # KL(before || after) over the vocabulary, nats


def change(clean: Float[Tensor, " vocabulary"], edited: Float[Tensor, "entry vocabulary"], token: int) -> Change:
    """Compares the logits of edited runs (entry vocabulary) with the clean run's (vocabulary) at one token."""
    clean, edited = clean.double(), edited.double()
    log_before, log_after = clean.log_softmax(-1), edited.log_softmax(-1)
    before, after = log_before[token].exp(), log_after[:, token].exp()
    kl = (log_before.exp() * (log_before - log_after)).sum(-1)
    fields = (
        before.expand(len(edited)), after, 100 * (after - before) / before, edited[:, token] - clean[token],
        log_after[:, token] - log_before[token], (edited.argmax(-1) != clean.argmax()).double(), kl.clamp(min=0),
    )  # fmt: skip
    return Change(*(field.cpu().numpy() for field in fields))


@dataclass(frozen=True)
class Cutoff:
    """The first layer from which hiding the image no longer matters, with a 95 % bootstrap interval over examples.

    `layer` equals the number of layers where it matters to the very end.
    """

    layer: int
    low: int
    high: int
    tolerance: float


def cutoff_layer(relative: Float[np.ndarray, "example layer"], tolerance: float = 2.0, seed: int = 0) -> Cutoff:
    """The cumulative cut-off depth.

    `relative` (example layer): percent change of the answer's probability when the image is hidden from layer l on. The
    cut-off is the first layer from which the mean change stays within `tolerance` percent at this and every later
    start.
    """
    draws = resampled_means(relative, seed) if len(relative) > 1 else relative
    found = np.array([_first_quiet(row, tolerance) for row in draws])
    low, high = np.percentile(found, [2.5, 97.5])
    return Cutoff(_first_quiet(relative.mean(0), tolerance), int(np.floor(low)), int(np.ceil(high)), tolerance)


def _first_quiet(change: Float[np.ndarray, " layer"], tolerance: float) -> int:
    loud = np.nonzero(np.abs(change) > tolerance)[0]
    return int(loud[-1]) + 1 if len(loud) else 0


def window_mean(mass: Float[np.ndarray, "*any layer"], windows: list[range]) -> Float[np.ndarray, "*any window"]:
    """Per-layer masses (... layer) averaged over each window's layers (... window)."""
    return np.stack([mass[..., list(layers)].mean(-1) for layers in windows], -1)
