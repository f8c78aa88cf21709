"""Slow, obvious scoring rules."""

from itertools import combinations


def vqa_by_subsets(said: str, humans: list[str]) -> float:
    """VQA accuracy over every subset that leaves one person out, written as the paper has it."""
    sets = list(combinations(range(len(humans)), len(humans) - 1))
    return sum(min(sum(humans[i] == said for i in chosen) / 3, 1.0) for chosen in sets) / len(sets)


def ece_by_hand(confidence: list[float], right: list[bool], count: int) -> float:
    """Equal-mass bins dealt out one item at a time, the first ones longer."""
    items = sorted(zip(confidence, right, strict=True), key=lambda item: item[0])
    sizes = [len(items) // count + (i < len(items) % count) for i in range(count)]
    total = 0.0
    for size in sizes:
        part, items = items[:size], items[size:]
        if part:
            total += size * abs(sum(c for c, _ in part) / size - sum(r for _, r in part) / size)
    return total / len(confidence)


def area_by_pairs(scores: list[float], there: list[bool]) -> float:
    """AUROC: every pair of a present and an absent thing."""
    above = [s for s, t in zip(scores, there, strict=True) if t]
    below = [s for s, t in zip(scores, there, strict=True) if not t]
    return sum((a > b) + 0.5 * (a == b) for a in above for b in below) / (len(above) * len(below))
