"""Modality importance by its definition, spelt out, and Shapley values over every order of the players."""

from itertools import permutations


def importance(right, modalities):
    """`right` by the subset as a sorted string of one-letter modalities: mean over subsets with m but {m}, less mean without m."""
    made = {}
    for m in modalities:
        with_m, without_m = [], []
        for subset, value in right.items():
            if m in subset:
                if subset != m:
                    with_m.append(value)
            else:
                without_m.append(value)
        made[m] = sum(with_m) / len(with_m) - sum(without_m) / len(without_m)
    return made


def shapley(value, players):
    """Exact: the mean gain of each player over all orders."""
    orders = list(permutations(range(players)))
    made = [0.0] * players
    for order in orders:
        for place, player in enumerate(order):
            made[player] += value(frozenset(order[: place + 1])) - value(frozenset(order[:place]))
    return [gain / len(orders) for gain in made]
