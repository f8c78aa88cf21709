"""Slow, obvious versions of the statistics of measurements."""

from itertools import product
from math import comb, exp


def mcnemar(a, b):
    """Every way that the items on which two answerers differ could have fallen, counted."""
    differing = [(x, y) for x, y in zip(a, b, strict=True) if x != y]
    if not differing:
        return 1.0
    seen = sum(x for x, _ in differing)
    middle = len(differing) / 2
    falls = [sum(fall) for fall in product((0, 1), repeat=len(differing))]
    return sum(abs(fall - middle) >= abs(seen - middle) - 1e-9 for fall in falls) / len(falls)


def divergence(p, q):
    """KL(p || q) of two rows of log-probabilities, term by term."""
    return sum(exp(x) * (x - y) for x, y in zip(p, q, strict=True))


def median_ranks(n, level):
    """The innermost pair of ranks (from 1) between which a median lies with at least this certainty; None where there is none."""
    found = None
    for rank in range(1, n // 2 + 1):
        outside = 2 * sum(comb(n, k) for k in range(rank)) / 2**n
        if 1 - outside >= level:
            found = (rank, n + 1 - rank)
    return found


def standings(points):
    """Names of the points that no other one is as good as in accuracy and cost, and better in one."""
    return {
        name for name, accuracy, cost in points
        if not any(
            a >= accuracy and c <= cost and (a > accuracy or c < cost) for other, a, c in points if other != name
        )
    }  # fmt: skip
