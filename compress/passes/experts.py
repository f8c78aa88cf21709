"""Experts that few tokens are sent to, removed from mixtures of experts together with what the router knows of them."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from compress import allotment
from compress.calibration import Calibration, counted
from compress.mixture import Mixture
from compress.passes.base import Change, Evidence, Pass, Stage
from compress.passes.removal import removal
from compress.structure import mixtures_of
from probe.errors import PassError
from probe.routing import Use, read_use
from probe.subject import Subject

Side = Literal["perceptual", "textual", "both"]


class Experts(Pass):
    """Removes `count` experts, or a `share` of them, from every layer that is a mixture.

    Those go that get the least routing mass: the router's weights, summed over the tokens `of` one side of the calibration examples and divided by
    their number. `both` is the mean of the two sides, so that the many tokens of a picture do not outvote the words. `global` takes the share over all
    layers instead of in each. At least as many experts stay in a layer as a token visits.
    """

    title: ClassVar[str] = "experts"
    stage: ClassVar[Stage] = "weights"
    needs: ClassVar[tuple[str, ...]] = ("calibration",)
    count: int | None = None
    share: float | None = None
    of: Side = "both"
    allocation: Literal["uniform", "global"] = "uniform"

    def asks(self) -> tuple[str, ...]:
        return self.needs if self.count or self.share else ()

    def plan(self, subject: Subject, evidence: Evidence) -> Sequence[Change]:
        self._refuse()
        found, reasons = mixtures_of(subject)
        if not found:
            why = f"of layer {next(iter(reasons))}, {next(iter(reasons.values()))}"
            raise PassError(f"no layer of this {subject.anatomy.family} model can lose experts: {why}")
        if not (self.count or self.share):
            return []
        gone = self._gone(found, mass(subject, found, self.found(evidence, "calibration"), self.of))
        return [removal(subject, "experts", gone)]

    def _refuse(self) -> None:
        if (self.count is None) == (self.share is None):
            raise PassError("experts takes either a count for each layer or a share")
        if self.count is not None and (self.count < 0 or self.allocation == "global"):
            raise PassError("a count of experts is 0 or more, and the same in every layer: with allocation global give a share")
        if self.share is not None and not 0 <= self.share < 1:
            raise PassError(f"the share of experts that is removed is 0 or more and below 1: {self.share:g} is not")

    def _gone(self, found: Mapping[int, Mixture], scores: allotment.Scores) -> allotment.Gone:
        least = max(one.least for one in found.values())
        if self.share is not None and self.allocation == "global":
            gone = allotment.over_layers(scores, self.share, least=least)
        else:
            share = {layer: self.share if self.count is None else self.count / one.count for layer, one in found.items()}
            gone = {layer: allotment.even({layer: scores[layer]}, share[layer] or 0)[layer] for layer in found}
        for layer, one in found.items():
            if one.count - len(gone[layer]) < one.least:
                raise PassError(
                    f"{len(gone[layer])} of the {one.count} experts of layer {layer} cannot go: a token visits {one.visited}, and so many must stay"
                )
        if not any(gone.values()):
            raise PassError(
                f"{self.share:g} of {max(one.count for one in found.values())} experts is less than one: ask for more, or for none"
            )
        return gone


def mass(
    subject: Subject, found: Mapping[int, Mixture], calibration: Calibration, of: Side = "both"
) -> dict[int, Float[Tensor, " expert"]]:
    """The routing weight that each expert gets for each token of a side, on the mean over the calibration's tokens.

    Raises PassError for a side without tokens.
    """
    sides: tuple[Side, ...] = ("perceptual", "textual") if of == "both" else (of,)
    sums = {side: {layer: torch.zeros(one.count, dtype=torch.float64) for layer, one in found.items()} for side in sides}
    tokens = dict.fromkeys(sides, 0)
    for batch in calibration.encoded(subject):
        rows = {side: counted(batch, side) for side in sides}
        read_use(subject, batch, partial(_add, sums, rows))
        for side in sides:
            tokens[side] += int(rows[side].sum())
    if blank := [side for side in sides if not tokens[side]]:
        raise PassError(
            f"no calibration example has {blank[0]} tokens: calibrate on others, or remove experts by the other side"
        )
    return {
        layer: sum((sums[side][layer] / tokens[side] for side in sides), torch.zeros(one.count)) / len(sides)
        for layer, one in found.items()
    }


def _add(sums: Mapping[Side, dict[int, Tensor]], rows: Mapping[Side, Tensor], use: Use) -> None:
    for side, layers in sums.items():
        if use.layer in layers:
            layers[use.layer] += use.weight.cpu()[rows[side]].double().sum(0)
