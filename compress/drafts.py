"""Drafts of a plan: what is taken of the steps that a model allows, what that costs in closed form, and the search for a cheap one."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from compress.allotment import left_of
from compress.budget import Budget
from compress.cost import Cost, cost
from compress.layer_cost import LayerSize, Ran, layer_sizes
from compress.passes.base import Pass, find_pass
from compress.passes.tokens import Pyramid, Tokens, Withdraw
from compress.passes.width import Width
from compress.prices import Price, narrow, skip
from compress.structure import units_of
from compress.tokens.media import find_media
from probe.subject import Encoded, Subject

KINDS = ("tokens", "withdraw", "freeze", "ffn", "narrow", "remove")
LAYERS = {"remove": "removed", "freeze": "frozen", "ffn": "ffn"}  # kinds that a draft has a set of layers for


@dataclass(frozen=True)
class Draft:
    """What is taken. Layers carry the dense model's numbers; visual tokens leave at `withdrawn` (the number of layers: never)."""

    withdrawn: int
    tokens: Price | None = None
    removed: frozenset[int] = frozenset()
    frozen: frozenset[int] = frozenset()
    ffn: frozenset[int] = frozenset()
    narrow: frozenset[tuple[int, float]] = frozenset()  # a layer, and the share of its neurons that goes
    score: str = "flap"  # which neurons these are
    seed: int = 0  # of neurons drawn at random

    def narrowed(self, layer: int, share: float) -> "Draft":
        """The draft with another share of a layer's neurons gone (0: none)."""
        others = frozenset(one for one in self.narrow if one[0] != layer)
        return replace(self, narrow=others | {(layer, share)} if share else others)

    def layers(self, kind: str) -> frozenset[int]:
        found: frozenset[int] = getattr(self, LAYERS[kind])
        return found

    def on(self, kind: str, layers: frozenset[int]) -> "Draft":
        """The draft with one kind of step at these layers."""
        match kind:
            case "remove":
                return replace(self, removed=layers, narrow=frozenset(one for one in self.narrow if one[0] not in layers))
            case "freeze":
                return replace(
                    self, frozen=layers, ffn=self.ffn - layers
                )  # what is frozen has no feed-forward block to pass by
        return replace(self, ffn=layers)

    def without(self, price: Price, n_layers: int) -> "Draft":
        """The draft less one of its steps."""
        if price.kind == "tokens":
            return replace(self, tokens=None)
        if price.kind == "withdraw":
            return replace(self, withdrawn=n_layers)
        if price.kind == "narrow":
            return self.narrowed(price.layer, 0.0)
        return self.on(price.kind, self.layers(price.kind) - {price.layer})

    def taken(self, prices: Mapping[str, Sequence[Price]]) -> list[Price]:
        """The prices of its steps; a layer that is gone has none but its own, and one without visual tokens none for them."""
        found = [self.tokens] if self.tokens else []
        found += [one for one in prices.get("withdraw", ()) if one.layer == self.withdrawn]
        found += [
            one for one in prices.get("narrow", ()) if (one.layer, one.share) in self.narrow and one.layer not in self.removed
        ]
        for kind in LAYERS:
            seen = range(self.withdrawn) if kind != "remove" else None
            gone = self.removed if kind != "remove" else frozenset()
            found += [
                one for one in prices.get(kind, ())
                if one.layer in self.layers(kind) - gone and (seen is None or one.layer in seen)
            ]  # fmt: skip
        return found


@dataclass(frozen=True)
class Prompt:
    """What one prompt costs the dense model, its positions that are no medium's, and the length of each medium."""

    dense: Cost
    text: int
    media: tuple[int, ...]

    @classmethod
    def of(cls, subject: Subject, encoded: Encoded) -> "Prompt":
        inputs = {key: value for key, value in encoded.inputs.items() if key != "input_ids"}
        media = tuple(len(medium) for medium in find_media(subject, encoded.inputs["input_ids"], inputs)[0])
        return cls(cost(subject, encoded), len(encoded.maps[0]) - sum(media), media)


class Counter:
    """The share of the dense model's FLOPs of reading a prompt that a draft leaves; the mean over prompts."""

    def __init__(self, subject: Subject, prompts: Sequence[Encoded]) -> None:
        self.cross = subject.anatomy.cross
        self.sizes: list[LayerSize] = layer_sizes(subject)
        self.neurons = units_of(subject, "neurons")[0]
        alike: dict[Any, list[Prompt]] = {}
        for one in (Prompt.of(subject, encoded) for encoded in prompts):
            alike.setdefault((one.text, one.media, one.dense.total_macs), []).append(one)
        self.prompts = [(same[0], len(same) / len(prompts)) for same in alike.values()]  # with the share of prompts like it
        self.narrower: dict[tuple[int, float], LayerSize] = {}
        self.known: dict[Draft, float] = {}  # drafts of different kinds of steps have many beginnings in common

    def __call__(self, draft: Draft) -> float:
        if draft not in self.known:
            choosing = draft.tokens.choosing if draft.tokens else 0.0
            self.known[draft] = sum(part * self._share(draft, one) for one, part in self.prompts) + choosing
        return self.known[draft]

    def _share(self, draft: Draft, prompt: Prompt) -> float:
        left = prompt.dense.total_macs - sum(prompt.dense.layers)
        shares = dict(draft.narrow)
        for layer, size in enumerate(self.sizes):
            if layer in draft.removed:
                continue
            if self.cross[layer]:
                left += prompt.dense.layers[layer]
                continue
            visual = sum(tokens_at(draft, n, layer) for n in prompt.media)
            ran = Ran.all(prompt.text + visual)
            if layer in draft.frozen:
                ran = Ran.text_rows(prompt.text, visual, ffn=False)
            elif layer in draft.ffn:
                ran = Ran(prompt.text + visual, prompt.text + visual, prompt.text)
            left += self._narrowed(size, layer, shares.get(layer, 0.0)).macs(ran)
        return left / prompt.dense.total_macs

    def _narrowed(self, size: LayerSize, layer: int, share: float) -> LayerSize:
        if not share:
            return size
        if (layer, share) not in self.narrower:
            units = self.neurons[layer]
            gone = units.count - left_of(units.count, share, Width().round_to)
            self.narrower[layer, share] = replace(size, ffn=size.ffn - gone * units.weights)
        return self.narrower[layer, share]


class Watch:
    """The share of the dense model's time of reading a prompt that a draft leaves, as if every step saved what it saves alone."""

    def __init__(self, prices: Mapping[str, Sequence[Price]]) -> None:
        self.prices = prices

    def __call__(self, draft: Draft) -> float:
        return float(np.prod([one.time for one in draft.taken(self.prices)]))


def tokens_at(draft: Draft, n: int, layer: int) -> int:
    """How many tokens of a medium of n enter a layer."""
    if layer >= draft.withdrawn:
        return 0
    step = draft.tokens.step if draft.tokens else None
    if isinstance(step, Tokens):
        return step.budget.count(n) if layer >= (step.layer or 0) else n
    if isinstance(step, Pyramid):
        kept = [
            Budget(keep=k, rounding=step.rounding).count(n) for at, k in zip(step.at, step.keep, strict=True) if at <= layer
        ]
        return min([n, *kept])
    return n


def damage(draft: Draft, prices: Mapping[str, Sequence[Price]]) -> float:
    """The sum of the prices of its steps, in nats."""
    return sum(one.damage[0] for one in draft.taken(prices))


def cheapest(
    prices: Mapping[str, Sequence[Price]], kinds: Sequence[str], count: Callable[[Draft], float], n_layers: int, budget: float
) -> Draft | None:  # fmt: skip
    """The draft of some kinds of steps that meets a budget: steps are taken in the order of what they save for their damage.

    Every single step on the way that would meet the budget is a way to end; of each, steps that it can do without are given back. None where the
    kinds cannot meet the budget.
    """
    ends = [_trimmed(one, prices, count, n_layers, budget) for one in _ends(prices, kinds, count, n_layers, budget)]
    return min(ends, key=lambda one: (damage(one, prices), count(one)), default=None)


def _trimmed(
    draft: Draft, prices: Mapping[str, Sequence[Price]], count: Callable[[Draft], float], n_layers: int, budget: float
) -> Draft:
    """The draft less every step without which it still meets the budget, dearest first; and its tokens kept in the way that does least."""
    for price in sorted(draft.taken(prices), key=lambda one: -one.damage[0]):
        less = draft.without(price, n_layers)
        if count(less) <= budget:
            draft = less
    if draft.tokens is not None:
        others = [replace(draft, tokens=one) for one in prices["tokens"] if one.damage[0] < draft.tokens.damage[0]]
        draft = min([draft, *(one for one in others if count(one) <= budget)], key=lambda one: damage(one, prices))
    return draft


def _ends(
    prices: Mapping[str, Sequence[Price]], kinds: Sequence[str], count: Callable[[Draft], float], n_layers: int, budget: float
) -> list[Draft]:  # fmt: skip
    """Every draft that meets the budget with one step more than one on the greedy way to it."""
    draft = Draft(n_layers)
    ends: list[Draft] = []
    while True:
        share, done = count(draft), damage(draft, prices)
        if share <= budget:
            return [*ends, draft]
        best, worth = None, 0.0
        for move in _moves(draft, prices, kinds, n_layers):
            saved = share - count(move)
            if saved <= 1e-9:
                continue
            if share - saved <= budget:
                ends.append(move)
            value = saved / max(damage(move, prices) - done, 1e-6)
            if value > worth:
                best, worth = move, value
        if best is None:
            return ends
        draft = best


def _moves(draft: Draft, prices: Mapping[str, Sequence[Price]], kinds: Sequence[str], n_layers: int) -> list[Draft]:
    """Every draft that one more step gives."""
    moves = []
    if "withdraw" in kinds:
        moves += [replace(draft, withdrawn=one.layer) for one in prices["withdraw"] if one.layer < draft.withdrawn]
    if "tokens" in kinds:
        moves += [replace(draft, tokens=one) for one in prices["tokens"] if one is not draft.tokens]
    if "remove" in kinds and len(draft.removed) < n_layers // 2:
        free = [one.layer for one in prices["remove"] if one.layer not in draft.removed]
        moves += [draft.on("remove", draft.removed | {layer}) for layer in free]
    if "narrow" in kinds:
        shares = dict(draft.narrow)
        moves += [
            draft.narrowed(one.layer, one.share) for one in prices["narrow"]
            if one.layer not in draft.removed and one.share > shares.get(one.layer, 0.0)
        ]  # fmt: skip
    for kind in ("freeze", "ffn"):
        if kind in kinds:
            taken = draft.layers(kind) | draft.removed | draft.frozen
            free = [one.layer for one in prices[kind] if one.layer not in taken and one.layer < draft.withdrawn]
            moves += [draft.on(kind, draft.layers(kind) | {layer}) for layer in free]
    return moves


def steps(draft: Draft, n_layers: int) -> list[Pass]:
    """The passes of a draft in order. What follows removed layers names layers by their new numbers."""
    left = [layer for layer in range(n_layers) if layer not in draft.removed]

    def now(layer: int) -> int:
        return sum(one < layer for one in left)

    found: list[Pass] = []
    if draft.removed:
        found.append(find_pass("remove-layers").model_validate({"layers": tuple(sorted(draft.removed))}))
    shares = dict(draft.narrow)
    if any(layer in shares for layer in left):
        found.append(narrow([shares.get(layer, 0.0) for layer in left], score=draft.score, seed=draft.seed))
    for kind, layers in (("ffn", draft.ffn), ("freeze", draft.frozen)):
        own = tuple(now(layer) for layer in sorted(layers - draft.removed) if layer < draft.withdrawn)
        found += [skip(kind, own)] if own else []
    step = draft.tokens.step if draft.tokens else None
    if isinstance(step, Tokens) and step.layer:
        step = step.model_copy(update={"layer": max(1, now(step.layer))})
    elif isinstance(step, Pyramid):
        step = step.model_copy(update={"at": tuple(float(max(1, now(int(at)))) for at in step.at)})
    found += [step] if step else []
    if now(draft.withdrawn) < len(left):
        found.append(Withdraw(layer=max(1, now(draft.withdrawn))))
    return found
