"""Which modality an answer needs: the Modality Importance Score, its categories, paired tests, and Shapley shares."""

from collections.abc import Callable, Mapping, Sequence
from itertools import combinations

import numpy as np
from jaxtyping import Float

from probe.errors import EditError

Subset = frozenset[str]
CATEGORIES = ("complementary", "agnostic-correct", "agnostic-incorrect", "none")  # and `<modality>-biased` for each modality
ZERO = 1e-9


def subsets(modalities: Sequence[str]) -> list[Subset]:
    """The 2^k - 1 non-empty subsets of k modalities, smallest first, in the order of the modalities."""
    return [frozenset(one) for size in range(1, len(modalities) + 1) for one in combinations(modalities, size)]


def importance(scores: Mapping[Subset, float], modalities: Sequence[str]) -> dict[str, float]:
    """The Modality Importance Score of each modality for one question (arXiv 2408.12763, section 3).

    `scores` says for every non-empty subset how well the question was answered from it: 0 or 1, or the probability of the right
    answer. MIS of m is the mean over subsets that hold m, {m} itself left out, less the mean over those without m: in [-1, 1]. For two
    modalities that is both minus the other alone. Raises EditError for fewer than two modalities, or a subset without a score.
    """
    if len(modalities) < 2:
        raise EditError(f"a modality is important beside others: two or more are needed, not {len(modalities)}")
    wanted = subsets(modalities)
    if missing := [one for one in wanted if one not in scores]:
        raise EditError(f"the importance of a modality needs a score for every subset: {name_of(missing[0])} has none")
    return {
        m: float(
            np.mean([scores[s] for s in wanted if m in s and len(s) > 1]) - np.mean([scores[s] for s in wanted if m not in s])
        )
        for m in modalities
    }


def category(right: Mapping[Subset, float], modalities: Sequence[str]) -> str:
    """What kind of question it is, from which subsets it was answered rightly (1) or not (0): arXiv 2408.12763, section 3.

    `complementary`: every modality helps. `agnostic-correct` and `agnostic-incorrect`: none matters, and all subsets are right, or all
    wrong. `<m>-biased`: m does not hurt and no other helps, and they differ; of several such modalities (from three on) the
    one that scores highest, if it is one. Everything else, such as modalities that hurt each other, is `none`.
    """
    scores = importance(right, modalities)
    every = [right[one] for one in subsets(modalities)]
    if all(value > ZERO for value in scores.values()):
        return "complementary"
    if all(abs(value) <= ZERO for value in scores.values()):
        return "agnostic-correct" if min(every) > ZERO else "agnostic-incorrect" if max(every) <= ZERO else "none"
    fits = [
        m for m in modalities
        if scores[m] >= -ZERO and all(scores[other] <= ZERO for other in modalities if other != m)
    ]  # fmt: skip
    top = max((scores[m] for m in fits), default=0.0)
    best = [m for m in fits if scores[m] >= top - ZERO]
    return f"{best[0]}-biased" if len(best) == 1 else "none"


def name_of(subset: Subset) -> str:
    """A subset as words, `image+text`; `nothing` where it is empty."""
    return "+".join(sorted(subset)) or "nothing"


def orders(players: int, samples: int, seed: int) -> list[list[int]]:
    """Random orders of players, each followed by its reverse, which lowers the variance of what is averaged over them."""
    rng = np.random.default_rng(seed)
    found: list[list[int]] = []
    while len(found) < samples:
        order = [int(i) for i in rng.permutation(players)]
        found += [order, order[::-1]]
    return found[:samples]


def shapley(
    value: Callable[[list[frozenset[int]]], Sequence[float]], players: int, samples: int, seed: int = 0
) -> Float[np.ndarray, " player"]:
    """Shapley values of a game by Monte-Carlo over orders of its players: each one's mean gain as it joins those before it.

    `value` is asked once, for all coalitions that any order meets. They always sum to the value of all players less that of none.
    """
    drawn = orders(players, samples, seed)
    met = [[frozenset(order[:size]) for size in range(players + 1)] for order in drawn]
    asked = list(dict.fromkeys(one for row in met for one in row))
    found = dict(zip(asked, value(asked), strict=True))
    made = np.zeros(players)
    for order, row in zip(drawn, met, strict=True):
        for place, player in enumerate(order):
            made[player] += found[row[place + 1]] - found[row[place]]
    return made / max(1, len(drawn))


def shares(contributions: Float[np.ndarray, " player"], owners: Sequence[str]) -> dict[str, float]:
    """Each modality's share of the contributions, their absolute values summed (MM-SHAP, arXiv 2212.08158, equation 4).

    Shares sum to one; where nothing contributes, every modality has the same.
    """
    sizes = np.abs(contributions)
    total, names = float(sizes.sum()), list(dict.fromkeys(owners))
    if total <= ZERO:
        return {name: 1 / len(names) for name in names}
    return {name: float(sizes[[owner == name for owner in owners]].sum()) / total for name in names}
