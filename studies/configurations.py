"""What the study of tradeoffs measures: baselines, every method and pass at several strengths, and some together."""

from collections.abc import Sequence

from compress.budget import Budget
from compress.passes import PASSES
from compress.passes.base import Pass
from compress.passes.layers import RemoveLayers
from compress.passes.masks import Masks
from compress.passes.prune import Prune
from compress.passes.skips import Composite, ShortV, Skip
from compress.passes.tokens import Pyramid, Tokens, Withdraw
from compress.passes.width import Width
from compress.recipe import Recipe
from probe.subject import Subject
from studies.bench import Configuration

BASE = ("random", "pooling")
DRAWS = 3  # of random tokens
MANY = 8  # of more methods than these each is measured at the first two shares only


def configurations(subject: Subject, shares: Sequence[float], methods: Sequence[str]) -> list[Configuration]:
    """Baselines, every method at every share, every other pass, layers, and layers with tokens; names are unique."""
    found = [Configuration("full", baseline="full")]
    for share in shares:
        found.append(Configuration(f"down-sampling {share:g}", baseline="down-sampling", side=share**0.5))
    for method in dict.fromkeys([*BASE, *methods]):
        base = method if method in BASE else ""
        at = shares if base or len(methods) <= MANY else shares[:2]
        found += [_recipe(f"{method} {share:g}", _reduced(method, share), baseline=base) for share in at]
    for share in shares:  # one draw can be lucky
        for draw in range(1, DRAWS):
            found.append(_recipe(f"random {share:g}, draw {draw}", _reduced("random", share, draw), baseline="random"))
    for layer in range(subject.n_layers) if subject.n_layers <= 12 else range(0, subject.n_layers, subject.n_layers // 8):
        found.append(_recipe(f"without layer {layer}", RemoveLayers(layers=(layer,))))
    middle = subject.n_layers // 2
    for count in (2, 3):
        if count < subject.n_layers - middle:
            found.append(_recipe(f"without {count} middle layers", RemoveLayers(layers=tuple(range(middle, middle + count)))))
    for share in shares:
        found.append(
            _recipe(f"without layer {middle}, pooling {share:g}", RemoveLayers(layers=(middle,)), _reduced("pooling", share))
        )
    return [*found, *_others(subject)]


def _others(subject: Subject) -> list[Configuration]:
    """Every pass that is neither layers nor tokens of one place, at a strength that its paper would call mild and one that it would not."""
    half = subject.n_layers // 2
    return [
        _recipe("pyramid", Pyramid()), _recipe("withdrawn half way", Withdraw(layer=half)), _recipe("withdrawn where it is quiet", Withdraw()),
        _recipe("wanda 0.5", Prune(sparsity=0.5)), _recipe("wanda 2:4", Prune(n_of_m="2:4")), _recipe("magnitude 0.5", Prune(method="magnitude", sparsity=0.5)),
        _recipe("neurons 0.25", Width(neurons=0.25)), _recipe("neurons 0.5", Width(neurons=0.5)), _recipe("heads 0.25, over layers", Width(heads=0.25, allocation="global", score="taylor")),
        _recipe("shortv, half of the layers", ShortV(count=half)), _recipe("shortv, all layers", ShortV(count=subject.n_layers)),
        _recipe("every other feed-forward block skipped by the picture", Skip(mode="ffn")), _recipe("every other layer skipped by all", Skip(rows="all")),
        _recipe("composite", Composite()), _recipe("naavit", Masks(method="naavit")),
    ]  # fmt: skip


def _recipe(name: str, *passes: Pass, baseline: str = "") -> Configuration:
    return Configuration(name, Recipe(passes, name), baseline)


def _reduced(method: str, share: float, seed: int = 0) -> Tokens:
    return Tokens(method=method, budget=Budget(keep=share), seed=seed)


def left_out() -> dict[str, str]:
    """Passes that are not among the configurations, and why."""
    reasons = {"subnet": "combines the masks of several groups of examples: the study subnetworks"}
    measured = {"remove-layers", "tokens", "pyramid", "withdraw", "prune", "width", "shortv", "skip", "composite", "mask"}
    return {kind.title: reasons.get(kind.title, "is not measured here") for kind in PASSES if kind.title not in measured}
