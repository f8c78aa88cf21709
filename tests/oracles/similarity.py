"""Similarity of representations, spelled out: HSIC from its definition, neighbours from a loop."""

import numpy as np


def hsic_biased(k: np.ndarray, l: np.ndarray) -> float:  # noqa: E741
    h = np.eye(len(k)) - 1 / len(k)
    return float(np.trace(k @ h @ l @ h))


def hsic_unbiased(k: np.ndarray, l: np.ndarray) -> float:  # noqa: E741
    """Song et al. (2012), equation 5, from sums over all different i, j, q, r."""
    m = len(k)
    k, l = k.copy(), l.copy()  # noqa: E741
    np.fill_diagonal(k, 0)
    np.fill_diagonal(l, 0)
    one = np.ones(m)
    total = (
        np.trace(k @ l) + (one @ k @ one) * (one @ l @ one) / ((m - 1) * (m - 2)) - 2 * (one @ k @ l @ one) / (m - 2)
    )  # fmt: skip
    return float(total / (m * (m - 3)))


def cka(a: np.ndarray, b: np.ndarray, unbiased: bool) -> float:
    hsic = hsic_unbiased if unbiased else hsic_biased
    k, l = a @ a.T, b @ b.T  # noqa: E741
    return hsic(k, l) / np.sqrt(hsic(k, k) * hsic(l, l))


def nearest(a: np.ndarray, k: int) -> list[list[int]]:
    kernel = a @ a.T
    return [sorted((j for j in range(len(a)) if j != i), key=lambda j: (-kernel[i, j], j))[:k] for i in range(len(a))]


def mutual_knn(a: np.ndarray, b: np.ndarray, k: int) -> float:
    return float(np.mean([len(set(x) & set(y)) / k for x, y in zip(nearest(a, k), nearest(b, k), strict=True)]))


def cknna(a: np.ndarray, b: np.ndarray, k: int) -> float:
    def masked(x: np.ndarray, y: np.ndarray) -> float:
        mask = np.zeros((len(x), len(x)))
        for i, (one, other) in enumerate(zip(nearest(x, k), nearest(y, k), strict=True)):
            for j in set(one) & set(other):
                mask[i, j] = 1
        return hsic_unbiased(mask * (x @ x.T), mask * (y @ y.T))

    return masked(a, b) / np.sqrt(masked(a, a) * masked(b, b))
