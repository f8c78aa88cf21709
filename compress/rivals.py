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
    plan's own kinds of steps drawn at random until it is met; those that can meet it. Whole layers may save somewhat more than is asked.
    """
    found: dict[str, Draft | None] = {}
    if "tokens" in prices:
        found |= {f"{method} tokens": _tokens(method, count, n_layers, budget) for method in BLIND}
    for number in range(DRAWS):
        rng = np.random.default_rng([seed, number])
        if "remove" in prices:
            found[f"random layers {number}"] = _layers(prices, count, n_layers, budget, rng)
        found[f"its kinds of steps at random {number}"] = _blind(draft, prices, count, n_layers, budget, rng)
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


def _blind(
    draft: Draft, prices: Mapping[str, Sequence[Price]], count: Callable[[Draft], float], n_layers: int, budget: float, rng: np.random.Generator
) -> Draft | None:  # fmt: skip
    """Steps of the kinds that a draft has, in a random order until the budget is met: other layers, random tokens of the same share."""
    share = getattr(getattr(draft.tokens and draft.tokens.step, "budget", None), "keep", 0.5)
    made = Draft(n_layers)
    if draft.tokens is not None:
        made = replace(made, tokens=Price("tokens", 0, (0.0, 0.0, 0.0), Tokens(method="random", budget=Budget(keep=share))))
    if draft.withdrawn < n_layers:
        made = replace(made, withdrawn=int(rng.choice([one.layer for one in prices["withdraw"]])))
    steps = [(kind, one.layer, 0.0) for kind in LAYERS if draft.layers(kind) for one in prices.get(kind, ())]
    if draft.narrow:
        steps += [("narrow", one.layer, one.share) for one in prices["narrow"]]
        made = replace(made, score="random", seed=int(rng.integers(2**31)))
    for number in rng.permutation(len(steps)):
        if count(made) <= budget:
            return made
        kind, layer, share = steps[number]
        if kind == "narrow":
            made = made.narrowed(layer, max(share, dict(made.narrow).get(layer, 0.0)))
        elif layer not in made.removed:
            made = made.on(kind, made.layers(kind) | {layer})
    return made if count(made) <= budget else None
