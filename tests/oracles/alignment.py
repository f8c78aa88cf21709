"""Implicit alignment the slow way: loops over tokens and examples, in float64."""

import numpy as np


def cos(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))


def every_pair(p: np.ndarray, t: np.ndarray) -> np.ndarray:
    return np.array([[cos(x, y) for y in t] for x in p])


def similarities(p: np.ndarray, t: np.ndarray) -> dict[str, float]:
    pairs = every_pair(p, t)
    length = np.linalg.norm(p, axis=1)
    calm = p[length <= length.mean() + 2 * length.std()]
    return {
        "avg": cos(p.mean(0), t.mean(0)), "avg_trimmed": cos(calm.mean(0), t.mean(0)), "max": pairs.max(), "min": pairs.min(),
        "mean": pairs.mean(), "median": float(np.median(pairs)), "max_mean": float(np.mean([row.max() for row in pairs])),
    }  # fmt: skip


def mean_over_pairs(a: np.ndarray, b: np.ndarray, unmatched: bool = False) -> float:
    found = [cos(x, y) for i, x in enumerate(a) for j, y in enumerate(b) if not (unmatched and i == j)]
    return float(np.mean(found))


def of_centroids(a: list[np.ndarray], b: list[np.ndarray]) -> float:
    """The cosine of the centroids of all tokens of all examples (token width), one token after the other."""
    centres = []
    for examples in (a, b):
        total, count = np.zeros(examples[0].shape[1]), 0
        for example in examples:
            for token in example:
                total, count = total + token.astype(np.float64), count + 1
        centres.append(total / count)
    return cos(*centres)


def wanda_kept(weight: np.ndarray, squares: np.ndarray, sparsity: float) -> np.ndarray:
    kept = np.ones(weight.shape, bool)
    for row in range(weight.shape[0]):
        score = [abs(weight[row, j]) * squares[j] ** 0.5 for j in range(weight.shape[1])]
        for j in sorted(range(weight.shape[1]), key=lambda j: score[j])[: int(weight.shape[1] * sparsity)]:
            kept[row, j] = False
    return kept
