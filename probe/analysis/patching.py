"""Activation patching: how much of a changed fact one activation carries.

Two runs that differ in one fact give two answers. An activation of the clean run, put into the corrupt run, brings back some of
the difference of their logits: the effect of NOTICE (arXiv 2406.16320), which is 0 where nothing came back and 1 where all of it did.

Paper or code: NOTICE takes the last token of the answers, and its published code writes a block's output into its parts where
no head is named; here the answers' first tokens are compared, since they are what the last position predicts, and each part is
given its own output. The published filter on pairs whose runs hardly differ is `least` in `effect`.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from torch import Tensor

from probe.analysis.stats import Interval, resampled_means


def logit_difference(logits: Float[Tensor, "*entry vocabulary"], clean: int, corrupt: int) -> Float[Tensor, "*entry"]:
    """Logit of the clean answer's token minus that of the corrupt answer's."""
    return logits[..., clean] - logits[..., corrupt]


def effect(patched: Float[np.ndarray, "*any"], clean: float, corrupt: float, least: float = 0.1) -> Float[np.ndarray, "*any"]:
    """(patched - corrupt) / (clean - corrupt) of logit differences; NaN where the two runs differ by `least` logits or less."""
    if abs(clean - corrupt) <= least:
        return np.full(patched.shape, np.nan)
    return (patched - corrupt) / (clean - corrupt)


def attribution(
    clean: Float[Tensor, "*site width"], corrupt: Float[Tensor, "*site width"], gradient: Float[Tensor, "*site width"]
) -> Float[Tensor, "*site"]:
    """First-order estimate of what patching each site does to the logit difference: (a_clean - a_corrupt) . dLD/da.

    With the gradient of the corrupt run it is attribution patching; with its mean along the path between the runs, EAP-IG.
    """
    return ((clean - corrupt) * gradient).sum(-1)


class Handover(NamedTuple):
    """The first layer from which one site carries more than another to the end, with its 95 % bootstrap interval over examples.

    It equals the number of layers where that never happens.
    """

    layer: int
    low: int
    high: int


def handover(source: Float[np.ndarray, "example layer"], target: Float[np.ndarray, "example layer"], seed: int = 0) -> Handover:
    """Where the fact leaves `source` for `target`: mean effects compared layer by layer, examples resampled together."""
    gap = target - source
    draws = resampled_means(gap, seed) if len(gap) > 1 else gap
    low, high = np.percentile([_overtakes(row) for row in draws], [2.5, 97.5])
    return Handover(_overtakes(np.nanmean(gap, 0)), int(np.floor(low)), int(np.ceil(high)))


def _overtakes(gap: Float[np.ndarray, " layer"]) -> int:
    behind = np.nonzero(~(gap > 0))[0]
    return int(behind[-1]) + 1 if len(behind) else 0


def agreement(
    exact: Float[np.ndarray, "example site layer"], estimate: Float[np.ndarray, "example site layer"], seed: int = 0
) -> Interval:
    """Pearson's correlation over examples and sites at each layer, with a 95 % bootstrap interval over examples.

    Sites of one example are not independent, so that whole examples are resampled. Entries that are NaN in either are left
    out; a layer where one of the two is constant is NaN.
    """
    known = ~(np.isnan(exact) | np.isnan(estimate))
    n = known.sum((0, 1))
    x, y = (np.where(known, values, 0.0) for values in (exact, estimate))
    with np.errstate(invalid="ignore", divide="ignore"):
        x, y = (np.where(known, values - values.sum((0, 1)) / n, 0.0) for values in (x, y))  # sums of squares keep their digits
    moments = np.stack([known.astype(np.float64), x, y, x * x, y * y, x * y], -1).sum(1)  # example layer moment
    value = _pearson(moments.mean(0))
    if len(moments) < 2:
        return Interval(value, value, value)
    draws = _pearson(resampled_means(moments, seed))
    blank = np.isnan(draws).all(0)
    low, high = (np.full(len(value), np.nan) for _ in range(2))
    if not blank.all():
        low[~blank], high[~blank] = np.nanpercentile(draws[:, ~blank], [2.5, 97.5], axis=0)
    return Interval(value, low, high)


def _pearson(moments: Float[np.ndarray, "*any moment"]) -> Float[np.ndarray, "*any"]:
    with np.errstate(invalid="ignore", divide="ignore"):
        _, x, y, xx, yy, xy = np.moveaxis(moments / moments[..., :1], -1, 0)
        spread = np.sqrt(np.maximum(xx - x * x, 0) * np.maximum(yy - y * y, 0))
        return np.where(spread > 1e-12, (xy - x * y) / spread, np.nan)
