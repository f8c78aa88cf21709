"""Layers made narrower: whole groups of heads and neurons of feed-forward blocks, chosen by a score and cut out."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import ClassVar, Literal

from compress import allotment, width_scores
from compress.calibration import Side
from compress.passes.base import Change, Evidence, Pass, Stage
from compress.passes.removal import HideUnits, removal
from compress.statistics import Moments
from compress.structure import UNIT, Kind, Units, units_of
from probe.errors import PassError
from probe.subject import Subject

Parts = dict[Kind, dict[int, Units]]


class Width(Pass):
    """Removes a share of the head groups (a key head with the query heads that read it) and of the neurons of the decoder's layers.

    `heads` and `neurons` are shares of their number, of neurons also one for each layer; `share` is one share of the weights of both, chosen in one order (FLAP's AL-AM).
    Scores: `flap` (arXiv 2312.11983: how much what a unit gives fluctuates over calibration tokens, times the weights that read it),
    `taylor` (LLM-Pruner, arXiv 2305.11627: the sum of |weight * gradient| of the answers' loss), `magnitude` and `random`. The lowest go, in every
    layer as many (`uniform`) or over all layers (`global`). Neurons stay in multiples of `round_to`, which keeps products fast.
    `compensate` gives the maps that read the removed units a bias: what those gave on the mean. Fluctuation and mean are those of the tokens of one
    `side` (`both`, `perceptual`, `textual`; the calibration's own unless said).
    """

    title: ClassVar[str] = "width"
    stage: ClassVar[Stage] = "weights"
    heads: float = 0.0
    neurons: float | tuple[float, ...] = 0.0
    share: float = 0.0
    score: Literal["flap", "taylor", "magnitude", "random"] = "flap"
    allocation: Literal["uniform", "global"] = "uniform"
    round_to: int = 8
    compensate: bool = False
    side: Side | None = None
    seed: int = 0
    simulated: bool = False

    def asks(self) -> tuple[str, ...]:
        idle = not any(most(share) for share in (self.heads, self.neurons, self.share))
        return () if idle or (self.score in ("magnitude", "random") and not self.compensate) else ("calibration",)

    def plan(self, subject: Subject, evidence: Evidence) -> Sequence[Change]:
        self._refuse()
        parts = {kind: _units(subject, kind) for kind, share in self._shares().items() if most(share)}
        if not parts:
            return []
        self._refuse_layers(subject, parts)
        moments = self._moments(subject, parts, evidence)
        gone = self._gone(parts, self._scores(subject, parts, moments, evidence))
        if self.simulated:
            return [HideUnits(of=kind, units=units) for kind, units in gone.items() if units]
        means = {kind: {layer: one.mean.cpu() for layer, one in each.items()} for kind, each in moments.items()}
        return [
            removal(subject, kind, units, means[kind] if self.compensate else None) for kind, units in gone.items() if units
        ]

    def _shares(self) -> dict[Kind, float | tuple[float, ...]]:
        return {"heads": self.heads or self.share, "neurons": self.neurons if most(self.neurons) else self.share}

    def _refuse(self) -> None:
        every = self.neurons if isinstance(self.neurons, tuple) else (self.neurons,)
        for name, value in (("heads", self.heads), *(("neurons", one) for one in every), ("share", self.share)):
            if not 0 <= value < 1:
                raise PassError(f"{name} is the share that is removed, 0 or more and below 1: {value:g} is not")
        if self.share and (self.heads or most(self.neurons)):
            raise PassError("width takes shares of heads and neurons, or one share of both: not all three")
        if self.share and self.score != "flap":
            raise PassError(
                f"only the score flap compares heads with neurons: with {self.score} give heads and neurons shares of their own"
            )
        if isinstance(self.neurons, tuple) and self.allocation == "global":
            raise PassError(
                "neurons has a share for each layer, which leaves nothing to allocate: leave allocation out, or give one share"
            )
        if self.round_to < 1:
            raise PassError(f"neurons stay in multiples of round_to, 1 or more: {self.round_to} is not")
        if self.simulated and self.compensate:
            raise PassError("a simulated width hides units and gives no bias: leave compensate out")

    def _refuse_layers(self, subject: Subject, parts: Parts) -> None:
        if not isinstance(self.neurons, tuple):
            return
        if len(self.neurons) != subject.n_layers:
            raise PassError(
                f"neurons has {len(self.neurons)} shares and the model {subject.n_layers} layers: give one for each, or one for all"
            )
        for layer, share in enumerate(self.neurons):
            if share and layer not in parts["neurons"]:
                raise PassError(
                    f"layer {layer} can lose no neurons ({units_of(subject, 'neurons')[1][layer]}): give it a share of 0"
                )

    def _moments(self, subject: Subject, parts: Parts, evidence: Evidence) -> dict[Kind, dict[int, Moments]]:
        if self.score != "flap" and not self.compensate:
            return {}
        calibration = self.found(evidence, "calibration")
        return width_scores.entering(subject, parts, replace(calibration, side=self.side or calibration.side))

    def _scores(
        self, subject: Subject, parts: Parts, moments: Mapping[Kind, Mapping[int, Moments]], evidence: Evidence
    ) -> dict[Kind, width_scores.Scores]:  # fmt: skip
        if self.score == "taylor":
            return width_scores.taylor(subject, parts, self.found(evidence, "calibration"))
        if self.score == "flap":
            return {kind: width_scores.flap(found, moments[kind]) for kind, found in parts.items()}
        if self.score == "magnitude":
            return {kind: width_scores.magnitude(found) for kind, found in parts.items()}
        return {kind: width_scores.at_random(found, self.seed) for kind, found in parts.items()}

    def _gone(self, parts: Parts, scores: Mapping[Kind, width_scores.Scores]) -> dict[Kind, allotment.Gone]:
        multiples = {kind: self.round_to if kind == "neurons" else 1 for kind in parts}
        if self.share:
            found = allotment.jointly(list(scores.values()), list(parts.values()), self.share, list(multiples.values()))
            gone = dict(zip(parts, found, strict=True))
            if not any(units for each in gone.values() for units in each.values()):
                raise PassError(f"a share of {self.share:g} is less than one unit: nothing would be removed, ask for more")
            return {kind: _without_none(each) for kind, each in gone.items()}
        gone = {kind: self._chosen(scores[kind], self._shares()[kind], multiples[kind]) for kind in parts}
        for kind, each in gone.items():
            if not any(each.values()):
                counts = [one.count for one in parts[kind].values()]
                at_least = f", and {self.round_to} stay together" if kind == "neurons" and self.round_to > 1 else ""
                raise PassError(
                    f"{most(self._shares()[kind]):g} of {max(counts)} {UNIT[kind]}s in a layer is less than one{at_least}: ask for more, or for none"
                )
        return {kind: _without_none(each) for kind, each in gone.items()}

    def _chosen(self, scores: width_scores.Scores, share: float | tuple[float, ...], multiple: int) -> allotment.Gone:
        if isinstance(share, tuple) or self.allocation == "uniform":
            return allotment.even(scores, share, multiple)
        return allotment.over_layers(scores, share, multiple)


def most(share: float | tuple[float, ...]) -> float:
    """The largest of the shares of layers."""
    return max(share, default=0.0) if isinstance(share, tuple) else share


def _units(subject: Subject, kind: Kind) -> dict[int, Units]:
    """Units of every layer that has some. Raises PassError where none has, with the first reason."""
    found, reasons = units_of(subject, kind)
    if not found:
        layer, why = next(iter(reasons.items()))
        raise PassError(f"no layer of this {subject.anatomy.family} model can lose {kind}: of layer {layer}, {why}")
    return found


def _without_none(units: allotment.Gone) -> allotment.Gone:
    return {layer: gone for layer, gone in units.items() if gone}
