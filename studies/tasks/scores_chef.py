"""ChEF (arXiv 2311.02692): calibration, and how far accuracy moves with examples, corruption and other names for the options."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float

from probe.analysis.stats import RESAMPLES
from probe.errors import DataError
from studies.tasks.relabelling import Setting
from studies.tasks.scores import Score, average, from_draws, proportion

BINS = 10
EPSILON = 0.01  # how far above chance an accuracy must lie for a gain relative to it to mean anything


@dataclass(frozen=True)
class Bin:
    """A tenth of the items by confidence."""

    n: int
    confidence: float
    accuracy: float
    hits: int


def bins(
    confidence: Float[np.ndarray, " item"], right: Bool[np.ndarray, " item"], count: int = BINS
) -> list[Bin]:  # fmt: skip
    """Items sorted by confidence and cut into bins of equal mass; the first n mod `count` bins hold one more. Empty bins are left out."""
    order = np.argsort(confidence, kind="stable")
    parts = [part for part in np.array_split(order, count) if len(part)]
    return [Bin(len(p), float(confidence[p].mean()), float(right[p].mean()), int(right[p].sum())) for p in parts]


def _ece(confidence: np.ndarray, right: np.ndarray, count: int) -> float:
    return sum(one.n * abs(one.confidence - one.accuracy) for one in bins(confidence, right, count)) / len(confidence)


def ece(confidence: Sequence[float], right: Sequence[bool], seed: int = 0, count: int = BINS) -> Score:
    """Expected calibration error over `count` bins of equal mass; None without items. Raises DataError for a confidence that is none.

    The interval resamples items and bins them anew. Few items in a bin make the error look larger than it is, in the interval as in
    the value.
    """
    sure, hit = np.array(confidence, dtype=np.float64), np.array(right, dtype=bool)
    if not np.isfinite(sure).all() or (sure < 0).any() or (sure > 1 + 1e-9).any():
        raise DataError("a confidence lies between 0 and 1")
    n = len(sure)
    if not n:
        return Score("ECE", None, None, None, 0.0, 0.0, 0)
    value = _ece(sure, hit, count)
    rng = np.random.default_rng(seed)
    draws = np.array([_ece(sure[k], hit[k], count) for k in rng.integers(0, n, (RESAMPLES // 4, n))])
    return from_draws("ECE", value, draws, value * n, float(n), n)


def _paired(
    metric: str, changed: Sequence[bool], plain: Sequence[bool], floor: float, seed: int, ratio: Callable[..., np.ndarray]
) -> Score:
    """A ratio of two accuracies on the same items; None where the plain one is not above its floor by EPSILON."""
    a, b = np.array(changed, dtype=np.float64), np.array(plain, dtype=np.float64)
    if len(a) != len(b):
        raise DataError(f"{metric} compares the same items: {len(a)} and {len(b)} were given")
    if not len(a) or b.mean() < floor + EPSILON:
        return Score(metric, None, None, None, float(a.sum()), float(b.sum()), len(a))
    again = np.random.default_rng(seed).integers(0, len(a), (RESAMPLES, len(a)))
    means = a[again].mean(1), b[again].mean(1)
    with np.errstate(divide="ignore", invalid="ignore"):
        draws = np.where(means[1] >= floor + EPSILON, ratio(*means), np.nan)
    return from_draws(metric, float(ratio(a.mean(), b.mean())), draws, float(a.sum()), float(b.sum()), len(a))


def riam(with_examples: Sequence[bool], without: Sequence[bool], floor: float, seed: int = 0) -> Score:
    """Relative gain of in-context examples over the accuracy without them, both measured from chance: (ICL - plain) / (plain - floor)."""
    return _paired("RIAM", with_examples, without, floor, seed, lambda a, b: (a - b) / (b - floor))


def rrm(corrupted: Sequence[bool], plain: Sequence[bool], floor: float, seed: int = 0) -> Score:
    """What corruption leaves of the accuracy above chance, in per cent: 100 (corrupted - floor) / (plain - floor)."""
    return _paired("RRM", corrupted, plain, floor, seed, lambda a, b: 100 * (a - floor) / (b - floor))


def rr(corrupted: Sequence[bool], plain: Sequence[bool], seed: int = 0) -> Score:
    """What corruption leaves of the accuracy, in per cent: 100 corrupted / plain."""
    return _paired("RR", corrupted, plain, 0.0, seed, lambda a, b: 100 * a / b)


def mr(chosen: Sequence[int | None], original: Sequence[int | None]) -> Score:
    """How often the option chosen under other names is the one chosen before, right or wrong; unknown choices match nothing."""
    same = sum(a is not None and a == b for a, b in zip(chosen, original, strict=True))
    return proportion("MR", same, len(original))


def following(
    original: Sequence[int | None], chosen: Mapping[Setting, Sequence[int | None]], right: Sequence[int], seed: int = 0
) -> dict[str, dict[str, Score]]:
    """How well instructions to write other names are followed: `mr`, `accuracy` and `unknown` of each setting, each kind of names, and `all`.

    `chosen` has the index of the option chosen by every item under each setting of names, `original` under letters, `right` the right one. A
    kind is the mean over its settings, `all` that over kinds, as published: both with a bootstrap over items, since the answers to one
    item are not independent. `unknown` is the share of answers that give no name, which match and hit nothing. Raises DataError where settings have
    not the same items.
    """
    if len(right) != len(original):
        raise DataError(f"the choices under letters are of {len(original)} items, and right ones are given of {len(right)}")
    if wrong := next((name for name, one in chosen.items() if len(one) != len(original)), None):
        raise DataError(
            f"the choices under {wrong[0]} names {wrong[1]} are of {len(chosen[wrong])} items and not of {len(original)}"
        )
    tables = {
        "mr": {name: _hits(one, original) for name, one in chosen.items()}, "accuracy": {name: _hits(one, right) for name, one in chosen.items()},
        "unknown": {name: np.array([a is None for a in one], dtype=np.float64) for name, one in chosen.items()},
    }  # fmt: skip
    made: dict[str, dict[str, Score]] = {f"{kind} {which}": {} for kind, which in chosen}
    kinds = list(dict.fromkeys(kind for kind, _ in chosen))
    made |= {name: {} for name in (*kinds, "all")}
    for metric, table in tables.items():
        for (kind, which), hits in table.items():
            made[f"{kind} {which}"][metric] = proportion(_TITLES[metric], int(hits.sum()), len(hits))
        of_kind = [np.mean([hits for (kind, _), hits in table.items() if kind == name], axis=0) for name in kinds]
        for name, shares in zip((*kinds, "all"), (*of_kind, np.mean(of_kind, axis=0) if of_kind else np.empty(0)), strict=True):
            made[name][metric] = average(f"{_TITLES[metric]}, {name}", shares.tolist(), seed)
    return made


_TITLES = {"mr": "MR", "accuracy": "accuracy under other names", "unknown": "answers that give no name"}


def _hits(chosen: Sequence[int | None], other: Sequence[int | None]) -> Float[np.ndarray, " item"]:
    return np.array([a is not None and a == b for a, b in zip(chosen, other, strict=True)], dtype=np.float64)
