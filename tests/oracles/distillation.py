"""Distillation losses as they are written on paper: loops over positions and words, in float64."""

import math


def softmax(logits):
    top = max(logits)
    weights = [math.exp(x - top) for x in logits]
    return [w / sum(weights) for w in weights]


def kl(p, q):
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a > 0)


def divergence(teacher, student, kind):
    t, s = softmax(teacher), softmax(student)
    if kind == "forward":
        return kl(t, s)
    if kind == "reverse":
        return kl(s, t)
    middle = [(a + b) / 2 for a, b in zip(t, s, strict=True)]
    return (kl(t, middle) + kl(s, middle)) / 2


def response_kl(teacher, student, where, kind="forward"):
    """Nested lists (batch position vocabulary) and booleans (batch position)."""
    found = [
        divergence(teacher[i][j], student[i][j], kind) for i, row in enumerate(where) for j, there in enumerate(row) if there
    ]
    return sum(found) / len(found)


def relation(teacher, student):
    """1 - cosine of two Gram matrices, entry by entry; states as lists (token width)."""
    n = len(teacher)
    first, second = (
        [sum(a * b for a, b in zip(one[i], one[j], strict=True)) for i in range(n) for j in range(n)]
        for one in (teacher, student)
    )
    dot = sum(a * b for a, b in zip(first, second, strict=True))
    return 1 - dot / math.sqrt(sum(a * a for a in first)) / math.sqrt(sum(b * b for b in second))
