"""A bootstrap over groups, one resample after the other."""

from collections.abc import Hashable, Sequence

import numpy as np


def grouped_interval(values: np.ndarray, groups: Sequence[Hashable], resamples: int = 3000) -> tuple[float, float]:
    names = sorted(set(groups), key=str)
    members = {name: [v for v, g in zip(values, groups, strict=True) if g == name] for name in names}
    rng = np.random.default_rng(99)
    means = []
    for _ in range(resamples):
        drawn = [v for i in rng.integers(0, len(names), len(names)) for v in members[names[i]]]
        means.append(np.mean(drawn))
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)
