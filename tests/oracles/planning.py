"""Slow, obvious versions of what plans are made of."""

from itertools import combinations


def least_damage(prices, counted, budget):
    """The least sum of damages over every set of layers whose cost meets the budget; None where none does."""
    layers = list(prices)
    sets = [set(one) for size in range(len(layers) + 1) for one in combinations(layers, size)]
    meeting = [one for one in sets if counted(one) <= budget]
    return min((sum(prices[layer] for layer in one) for one in meeting), default=None)
