"""The single steps that a plan may take on a model, each with what it does to the answer's distribution when it is made alone."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from torch import Tensor

from compress.allotment import even
from compress.budget import Budget
from compress.calibration import Calibration
from compress.cost import cost
from compress.damage import KINDS, hidden_damage, layer_damage, step_damage
from compress.evidence import gather
from compress.latency import ratio, take_turns
from compress.passes.base import Evidence, Pass, find_pass
from compress.passes.layers import RemoveLayers, refuse_layers
from compress.passes.tokens import Pyramid, Tokens, Withdraw, place
from compress.passes.width import Width
from compress.recipe import compress
from compress.structure import units_of
from compress.width_scores import entering, flap
from probe.analysis.stats import bootstrap_mean
from probe.errors import PassError, ReplayError
from probe.example import Example
from probe.subject import Encoded, Subject

SHARES = (0.75, 0.5, 0.25, 0.125)
BEFORE = (
    "divprune",
    "visionzip",
    "pooling",
    "uniform",
)  # methods before the decoder that are priced, where the model has what they need
INSIDE = (0.125, 0.25, 0.5)  # shares of the depth at which tokens are dropped by the attention of the last word
NARROW = (0.25, 0.5)  # shares of the neurons of one layer's feed-forward block that go
Stopwatch = Callable[[Sequence[Pass]], float]  # steps -> time of reading a prompt, over the dense model's
Interval = tuple[float, float, float]  # mean over examples, and the ends of its 95 % bootstrap interval; nats


@dataclass(frozen=True, eq=False)
class Price:
    """A step by itself. `kind` is `remove`, `freeze`, `ffn`, `withdraw` or `narrow` (by a share) at a layer, or `tokens` by a pass of its own."""

    kind: str
    layer: int
    damage: Interval
    step: Pass | None = None
    choosing: float = 0.0  # what choosing tokens costs, as a share of the dense FLOPs of reading a prompt
    time: float = (
        1.0  # measured time of reading a prompt with this step alone, over the dense model's; 1 where it was not measured
    )
    share: float = 0.0  # of the layer's neurons, that goes


@dataclass(frozen=True)
class Prices:
    """Every step that a model allows, by kind; the evidence that they come from; and what it does not allow, with the reason."""

    of: dict[str, list[Price]]
    evidence: Evidence
    notes: tuple[str, ...]


def prices(
    subject: Subject, examples: Sequence[Example], batches: Sequence[Encoded], clean: Sequence[Tensor], evidence: Evidence, seed: int,
    advance: Callable[[int], None] = lambda n: None, stopwatch: Stopwatch | None = None,
) -> Prices:  # fmt: skip
    """Measures every step alone on the examples, of which `batches` are the encoded ones and `clean` the dense model's last logits.

    `evidence` may hold `withdrawal_kl` already, which is then not measured again, and a `calibration` other than these examples. With a `stopwatch`
    every step is timed, of removed layers, skips and narrower layers one in the middle for all.
    """
    found: dict[str, list[Price]] = {}
    known: dict[str, Any] = {"calibration": Calibration(tuple(examples)), **evidence}
    notes: list[str] = []
    last = subject.n_layers - 1
    kinds = ["remove", *(kind for kind in KINDS if kind != "remove" and _allowed(subject, skip(kind, (last,)), kind, notes))]
    for kind, each in layer_damage(subject, examples, kinds, advance).items():
        own = [Price(kind, layer, interval(each[:, layer], seed)) for layer in range(subject.n_layers)]
        known[f"{kind}_kl"] = [one.damage[0] for one in own]
        found[kind] = [one for one in own if kind != "remove" or _removable(subject, one.layer)]
        if stopwatch and found[kind]:
            middle = found[kind][len(found[kind]) // 2].layer
            took = stopwatch([skip(kind, (middle,)) if kind != "remove" else RemoveLayers(layers=(middle,))])
            found[kind] = [replace(one, time=took) for one in found[kind]]
    if _allowed(subject, Withdraw(layer=last), "withdraw", notes):
        if "withdrawal_kl" not in known:
            known |= gather(subject, examples, ["withdrawal_kl"], seed)
        found["withdraw"] = _withdrawals(subject, known)
    found["narrow"] = _narrowings(subject, known["calibration"], batches, clean, seed, notes, advance)
    if stopwatch:
        found["narrow"] = _timed(found["narrow"], subject.n_layers, stopwatch)
    found["tokens"] = _tokens(subject, batches, clean, seed, notes, advance)
    if stopwatch:
        found["withdraw"] = [replace(one, time=stopwatch([Withdraw(layer=one.layer)])) for one in found.get("withdraw", ())]
        found["tokens"] = [replace(one, time=stopwatch([one.step])) for one in found["tokens"] if one.step]
    return Prices({kind: own for kind, own in found.items() if own}, known, tuple(dict.fromkeys(notes)))


def stopwatch(subject: Subject, prompts: Sequence[Encoded], rounds: int, evidence: Evidence) -> Stopwatch:
    """Times copies with some steps made in turns with the dense model: the median ratio of the time of reading a prompt."""

    def ratio_of(steps: Sequence[Pass]) -> float:
        smaller = compress(subject, list(steps), evidence)
        try:
            found = take_turns({"dense": (subject, prompts), "this": (smaller, prompts)}, rounds, 1)
        finally:
            smaller.detach()
        return ratio([one.prefill for one in found["this"]], [one.prefill for one in found["dense"]]).value

    return ratio_of


def skip(kind: str, layers: Sequence[int]) -> Pass:
    """The pass by which visual tokens pass layers by: as they entered (`freeze`), or their feed-forward blocks alone (`ffn`)."""
    if kind == "freeze":
        return find_pass("shortv").model_validate({"layers": tuple(layers)})
    return find_pass("skip").model_validate({"mode": "ffn", "rows": "perceptual", "layers": tuple(layers)})


def narrow(shares: Sequence[float], **how: Any) -> Pass:
    """The pass by which each layer loses a share of its neurons."""
    return find_pass("width").model_validate({"neurons": tuple(shares), **how})


def interval(each: np.ndarray, seed: int) -> Interval:
    """The mean over examples with its interval; infinite where no example says anything."""
    known = each[~np.isnan(each)]
    if not len(known):
        return (float("inf"), float("inf"), float("inf"))
    value, low, high = (float(side) for side in bootstrap_mean(known, seed))
    return value, low, high


def _allowed(subject: Subject, step: Pass, kind: str, notes: list[str]) -> bool:
    try:
        step.plan(subject, {})
    except PassError as error:
        notes.append(f"{kind}: {error}")
        return False
    return True


def _removable(subject: Subject, layer: int) -> bool:
    try:
        refuse_layers(subject, (layer,))
    except PassError:
        return False
    return True


def _withdrawals(subject: Subject, known: Evidence) -> list[Price]:
    means = known["withdrawal_kl"]
    ends = known.get("withdrawal_kl_interval", {"low": means, "high": means})
    return [
        Price("withdraw", layer, (means[layer], ends["low"][layer], ends["high"][layer]))
        for layer in range(1, subject.n_layers) if _allowed(subject, Withdraw(layer=layer), "withdraw", [])
    ]  # fmt: skip


def _narrowings(
    subject: Subject, calibration: Calibration, batches: Sequence[Encoded], clean: Sequence[Tensor], seed: int, notes: list[str],
    advance: Callable[[int], None],
) -> list[Price]:  # fmt: skip
    """Each layer without some of its neurons, those of the least FLAP score in the dense model; hidden while it runs."""
    parts, reasons = units_of(subject, "neurons")
    try:
        if not parts:
            raise PassError(f"no layer can lose neurons: {next(iter(reasons.values()))}")
        scores = flap(parts, entering(subject, {"neurons": parts}, calibration)["neurons"])
    except (PassError, ReplayError) as error:  # an example whose answer cannot follow its prompt is no calibration
        notes.append(f"narrow: {error}")
        return []
    found = []
    for layer, score in scores.items():
        for share in NARROW:
            gone = even({layer: score}, share, Width().round_to)
            if gone[layer]:
                damage = interval(hidden_damage(subject, "neurons", gone, batches, clean), seed)
                found.append(Price("narrow", layer, damage, share=share))
        advance(1)
    return found


def _timed(narrowings: Sequence[Price], n_layers: int, stopwatch: Stopwatch) -> list[Price]:
    """One layer in the middle stands for all, share by share."""
    took: dict[float, float] = {}
    for share in {one.share for one in narrowings}:
        layers = [one.layer for one in narrowings if one.share == share]
        middle = layers[len(layers) // 2]
        took[share] = stopwatch([narrow([share * (layer == middle) for layer in range(n_layers)])])
    return [replace(one, time=took[one.share]) for one in narrowings]


def _tokens(
    subject: Subject, batches: Sequence[Encoded], clean: Sequence[Tensor], seed: int, notes: list[str], advance: Callable[[int], None]
) -> list[Price]:  # fmt: skip
    found = []
    for step in token_steps(subject.n_layers):
        try:
            damage = interval(step_damage(subject, [step], batches, clean, in_place=True), seed)
            found.append(Price("tokens", 0, damage, step, _choosing(subject, step, batches[0])))
        except PassError as error:
            notes.append(f"tokens: {error}")
        advance(1)
    return found


def _choosing(subject: Subject, step: Pass, batch: Encoded) -> float:
    """What choosing costs on the first prompt of a batch; what has no closed form counts for nothing."""
    prompt = subject.encode(batch.examples[0])
    dense = cost(subject, prompt).total_macs
    smaller = compress(subject, [step], in_place=True)
    try:
        return (cost(smaller, prompt).macs["selector"] or 0.0) / dense
    finally:
        smaller.detach()


def token_steps(n_layers: int) -> list[Pass]:
    """The reducers of visual tokens that are priced for a model of so many layers."""
    inside = sorted({place(share, n_layers) for share in INSIDE})
    steps: list[Pass] = [Tokens(method=name, budget=Budget(keep=share)) for name in BEFORE for share in SHARES]
    steps += [Tokens(method="pdrop", budget=Budget(keep=s), layer=at, positions="preserve") for at in inside for s in SHARES]
    at = Pyramid().at
    if len({place(share, n_layers) for share in at}) == len(at):
        steps += [
            Pyramid(at=tuple(place(share, n_layers) for share in at), keep=(s, s / 2, s / 4), positions="preserve") for s in SHARES[:3]
        ]  # fmt: skip
    return steps
