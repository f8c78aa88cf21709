"""What a plan must beat: the same budget met without evidence."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np

from compress.budget import Budget
from compress.drafts import LAYERS, Draft, steps
from compress.passes.tokens import Tokens
from compress.prices import Price
from compress.recipe import Recipe

DRAWS = 3  # of everything that is drawn
BLIND = ("random", "uniform")


def rivals(
    draft: Draft, prices: Mapping[str, Sequence[Price]], count: Callable[[Draft], float], n_layers: int, budget: float, seed: int
) -> tuple[Recipe, ...]:  # fmt: skip
    """Recipes that meet a budget and know nothing of the model: tokens kept at random or evenly, layers removed at random, and the
    plan's own kinds of steps at layers drawn at random; those that can meet it.
    """
    found: dict[str, Draft | None] = {}
    if "tokens" in prices:
        found |= {f"{method} tokens": _tokens(method, count, n_layers, budget) for method in BLIND}
    for number in range(DRAWS):
        rng = np.random.default_rng([seed, number])
        if "remove" in prices:
            found[f"random layers {number}"] = _layers(prices, count, n_layers, budget, rng)
        found[f"same steps at random layers {number}"] = _moved(draft, prices, n_layers, rng)
    own = steps(draft, n_layers)
    made = {name: steps(one, n_layers) for name, one in found.items() if one is not None}
    return tuple(Recipe(tuple(passes), f"no evidence: {name}", seed=seed) for name, passes in made.items() if passes != own)


def _tokens(method: str, count: Callable[[Draft], float], n_layers: int, budget: float) -> Draft | None:
    """The largest share of tokens, in steps of 1/64, that the budget allows."""
    for part in range(63, 0, -1):
        step = Tokens(method=method, budget=Budget(keep=part / 64))
        draft = Draft(n_layers, Price("tokens", 0, (0.0, 0.0, 0.0), step))
        if count(draft) <= budget:
            return draft
    return None


def _layers(
    prices: Mapping[str, Sequence[Price]], count: Callable[[Draft], float], n_layers: int, budget: float, rng: np.random.Generator
) -> Draft | None:  # fmt: skip
    draft = Draft(n_layers)
    for layer in rng.permutation([one.layer for one in prices["remove"]])[: n_layers - 1]:
        draft = replace(draft, removed=draft.removed | {int(layer)})
        if count(draft) <= budget:
            return draft
    return None


def _moved(draft: Draft, prices: Mapping[str, Sequence[Price]], n_layers: int, rng: np.random.Generator) -> Draft:
    """As many layers of each kind, other ones."""
    taken: set[int] = set()
    for kind in LAYERS:
        free = [
            one.layer
            for one in prices.get(kind, ())
            if one.layer not in taken and (kind == "remove" or one.layer < draft.withdrawn)
        ]
        drawn = frozenset(int(layer) for layer in rng.permutation(free)[: len(draft.layers(kind))])
        taken |= drawn
        draft = draft.on(kind, drawn)
    return draft
