"""Evidence to plan: which steps, at which layers, for a budget of FLOPs; each with a number that speaks for it.

Every step is priced by what it does to the answer's distribution when it is made alone (`compress.prices`), and by what it saves in closed form
(`compress.drafts`). Steps are taken in the order of what they save for their damage until the budget is met, once for every set of kinds of steps
that can meet it; the drafts that look best are then applied to a copy and measured, since prices do not simply add up. What wins is a recipe.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from torch import Tensor

from compress.calibration import Calibration
from compress.damage import step_damage
from compress.drafts import KINDS, Counter, Draft, Watch, cheapest, damage, steps
from compress.measure import encode_all
from compress.passes.base import Evidence
from compress.prices import Interval, Price, Prices, Stopwatch, interval, prices, stopwatch, token_steps
from compress.recipe import Recipe
from compress.rivals import rivals
from probe.errors import PassError
from probe.example import Example
from probe.subject import Encoded, Subject
from probe.tracing import last_logits

MOST = 64  # examples that a plan rests on, drawn where there are more; no fewer than studies set apart, so that calibration has the same
SLACK = 1.02  # a measured time may lie so far above the budget
VERIFIED = 6  # drafts that are applied and measured
PROMPTS = 8  # prompts whose cost is counted
Cost = Literal["flops", "time"]
UNITS = {"flops": "FLOPs", "time": "time"}
WHY = {
    "remove": "removing it alone moves the answer's distribution by",
    "freeze": "in this layer alone, leaving what is shown as it entered moves the answer's distribution by",
    "ffn": "in this layer alone, what is shown passing the feed-forward block by moves the answer's distribution by",
    "withdraw": "hiding what is shown from this layer on moves the answer's distribution by",
    "narrow": "without them alone, the answer's distribution moves by",
    "tokens": "alone, it moves the answer's distribution by",
}
WHAT = {
    "remove": "layer {layer} goes",
    "freeze": "visual tokens pass layer {layer} by",
    "ffn": "visual tokens pass the feed-forward block of layer {layer} by",
    "withdraw": "visual tokens leave at layer {layer}",
    "narrow": "layer {layer} loses {share:.0%} of its neurons",
}
WAYS = {"tokens": "ways of keeping tokens", "narrow": "ways of narrowing a layer"}  # what a step is ranked among, where these are not layers  # fmt: skip


@dataclass(frozen=True)
class Choice:
    """A step of the plan in words: what is done and why, its damage alone in nats, and the share of the budget's unit that it saves beside the others."""

    what: str
    why: str
    damage: Interval
    saves: float


@dataclass(frozen=True)
class Tried:
    """A draft that was applied and measured: the kinds of its steps, predicted and measured damage in nats, its share of the dense FLOPs and time.

    `time_ratio` is None where the budget is one of FLOPs.
    """

    kinds: tuple[str, ...]
    predicted: float
    measured: Interval
    flops_ratio: float
    time_ratio: float | None = None

    def share(self, cost: Cost) -> float:
        """What it costs in the unit of the budget."""
        return self.time_ratio if cost == "time" and self.time_ratio is not None else self.flops_ratio


@dataclass(frozen=True)
class Plan:
    """A recipe that meets a budget, its reasons, and the drafts beside which it won; `notes` say what the model does not allow."""

    recipe: Recipe
    choices: tuple[Choice, ...]
    budget: float
    cost: Cost
    tried: tuple[Tried, ...]
    rivals: tuple[Recipe, ...]  # the same budget met without evidence
    evidence: Evidence = field(repr=False)
    notes: tuple[str, ...] = ()

    def told(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "budget": self.budget, "cost": self.cost, "recipe": self.recipe.dumped(), "choices": [vars(one) for one in self.choices],
            "tried": [vars(one) for one in self.tried], "rivals": {one.name: one.dumped() for one in self.rivals}, "notes": list(self.notes),
        }  # fmt: skip


def plan(
    subject: Subject, examples: Sequence[Example], budget: float = 0.7, evidence: Evidence | None = None, seed: int = 0,
    advance: Callable[[int], None] = lambda n: None, cost: Cost = "flops", rounds: int = 24,
) -> Plan:  # fmt: skip
    """The recipe of the least measured damage that reads a prompt at no more than `budget` of the dense model's `cost`: FLOPs, or measured time.

    Time is that of this machine, in `rounds` turns with the dense model, on prompts as long as these. Take other examples than those that the
    result is judged on. `evidence` may hold `withdrawal_kl` already. Raises PassError for a budget that no set of steps meets.
    """
    if not 0 < budget < 1:
        raise PassError(f"a budget is a share of the dense model's {UNITS[cost]} between 0 and 1, not {budget:g}")
    chosen = _drawn(examples, seed)
    batches = encode_all(subject, chosen, 8)
    clean = [last_logits(subject, one) for one in batches]
    prompts = [subject.encode(one) for one in chosen[:PROMPTS]]
    known = {"calibration": Calibration(tuple(chosen)), **(evidence or {})}
    watch = stopwatch(subject, prompts, rounds, known) if cost == "time" else None
    priced = prices(subject, chosen, batches, clean, known, seed, advance, watch)
    flops = Counter(subject, prompts)
    count = Watch(priced.of) if watch else flops
    drafts = _drafts(priced, count, subject.n_layers, budget, cost)
    tried, notes = _tried(subject, drafts, priced, flops, watch, batches, clean, seed, advance)
    meeting = [one for one in tried if one[0].share(cost) <= budget * SLACK]
    if not meeting:
        nearest = min(one.share(cost) for one, _ in tried)
        raise PassError(
            f"no plan reads a prompt in {budget:.0%} of the dense model's {UNITS[cost]} when it is measured: the nearest takes {nearest:.0%}"
        )
    best, draft = min(meeting, key=lambda one: one[0].measured[0])
    about = (
        f"planned for {budget:.0%} of the dense model's {UNITS[cost]} of reading a prompt: {best.share(cost):.1%}, moves the answer's distribution by "
        f"{best.measured[0]:.3g} nats [{best.measured[1]:.3g}, {best.measured[2]:.3g}] on the {len(chosen)} examples that it was chosen by, among {len(tried)} plans"
    )
    recipe = Recipe(tuple(steps(draft, subject.n_layers)), "evidence-plan", about, seed)
    every = tuple(sorted((one for one, _ in tried), key=lambda one: one.measured[0]))
    others = rivals(draft, priced.of, flops, subject.n_layers, flops(draft), seed)
    choices = _choices(draft, priced, count, subject.n_layers)
    return Plan(recipe, choices, budget, cost, every, others, priced.evidence, (*priced.notes, *notes))


def measurements(subject: Subject, n_examples: int) -> int:
    """How often `plan` advances at most: examples whose layers are changed, layers narrowed, token steps, drafts verified."""
    return min(n_examples, MOST) + subject.n_layers + len(token_steps(subject.n_layers)) + VERIFIED


def _drawn(examples: Sequence[Example], seed: int) -> list[Example]:
    if not examples:
        raise PassError("a plan rests on examples: give at least one")
    chosen = np.sort(np.random.default_rng(seed).permutation(len(examples))[:MOST])
    return [examples[i] for i in chosen]


def _drafts(
    priced: Prices, count: Callable[[Draft], float], n_layers: int, budget: float, cost: Cost
) -> dict[Draft, tuple[str, ...]]:
    """The draft of every set of kinds that can meet the budget, least damage first. Raises PassError where none can."""
    there = [kind for kind in KINDS if kind in priced.of]
    if not there:
        raise PassError(f"this model allows none of the steps that plans are made of: {'; '.join(priced.notes[:3])}")
    found: dict[Draft, tuple[str, ...]] = {}
    for number in range(1, 2 ** len(there)):
        kinds = tuple(kind for i, kind in enumerate(there) if number >> i & 1)
        draft = cheapest(priced.of, kinds, count, n_layers, budget)
        if draft is not None:
            found.setdefault(draft, kinds)
    if not found:
        raise PassError(
            f"no set of the steps that this model allows ({', '.join(there)}) reads a prompt with {budget:.0%} of its {UNITS[cost]}: take a larger budget"
        )
    return {one: found[one] for one in sorted(found, key=lambda one: (damage(one, priced.of), count(one)))}


def _tried(
    subject: Subject, drafts: dict[Draft, tuple[str, ...]], priced: Prices, flops: Counter, watch: Stopwatch | None, batches: Sequence[Encoded],
    clean: Sequence[Tensor], seed: int, advance: Callable[[int], None],
) -> tuple[list[tuple[Tried, Draft]], list[str]]:  # fmt: skip
    """The drafts that look best, measured; and those that this model refuses when their steps come together."""
    tried: list[tuple[Tried, Draft]] = []
    notes: list[str] = []
    for draft, kinds in drafts.items():
        if len(tried) == VERIFIED:
            break
        passes = steps(draft, subject.n_layers)
        try:
            each = step_damage(subject, passes, batches, clean, evidence=priced.evidence)
        except PassError as error:
            notes.append(f"{' and '.join(kinds)}: {error}")
            continue
        took = watch(passes) if watch else None
        tried.append((Tried(kinds, damage(draft, priced.of), interval(each, seed), flops(draft), took), draft))
        advance(1)
    if not tried:
        raise PassError(f"none of the plans can be applied: {notes[-1]}")
    return tried, notes


def _choices(draft: Draft, priced: Prices, count: Callable[[Draft], float], n_layers: int) -> tuple[Choice, ...]:
    """Each step with its reason, in the order of what it does."""
    share = count(draft)
    found = [_choice(one, priced, count(draft.without(one, n_layers)) - share) for one in draft.taken(priced.of)]
    return tuple(sorted(found, key=lambda one: -one.damage[0]))


def _choice(price: Price, priced: Prices, saves: float) -> Choice:
    others = priced.of[price.kind]
    rank = sum(one.damage[0] < price.damage[0] for one in others) + 1
    of = WAYS.get(price.kind, "layers")
    if price.step is not None:
        what = f"{price.step.title}: {price.step.model_dump(mode='json', exclude_defaults=True)}"
    else:
        what = WHAT[price.kind].format(layer=price.layer, share=price.share)
    value, low, high = price.damage
    why = f"{WHY[price.kind]} {value:.3g} nats [{low:.3g}, {high:.3g}], rank {rank} of {len(others)} {of}{_beside(price, priced.evidence)}"
    return Choice(what, why, price.damage, saves)


def _beside(price: Price, evidence: Evidence) -> str:
    """What runs say of the same layer: how much visual tokens change in it, how far both kinds use its weights, where pictures stop to matter."""
    if price.kind in ("freeze", "ffn") and evidence.get("drift"):
        return f"; they keep a cosine of {evidence['drift'][price.layer]:.3f} with themselves across it"
    if price.kind in ("remove", "narrow") and evidence.get("overlap"):
        return f"; visual tokens and words share {evidence['overlap'][price.layer]:.2f} of its weights"
    if price.kind == "withdraw" and evidence.get("withdrawal_from"):
        return f" ({evidence['withdrawal_from']}, whose cut-off is layer {evidence['cutoff']['layer']})"
    return ""
