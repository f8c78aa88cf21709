"""Single weights of the decoder's linear maps set to zero: magnitude, Wanda and SparseGPT, unstructured or N:M, and subnetworks of several tasks.

Zeros are in the weights, and take as long as other numbers: what is saved is what a sparse kernel or a file format makes of them.
"""

from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from functools import partial
from hashlib import sha256
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, model_validator
from torch import Tensor, nn

from compress.allocation import Rule, allocated
from compress.calibration import Calibration, Maps, Side, sequential
from compress.passes.base import Change, Evidence, Pass, Stage
from compress.pruning import Pattern, magnitude, sparsegpt, wanda
from compress.smaller import Smaller
from compress.statistics import Gram, Squares
from probe.analysis.overlap import chance_iou, iou
from probe.calibration import linear_maps
from probe.errors import PassError, did_you_mean
from probe.example import Example
from probe.subject import Encoded, Subject

Weights = dict[str, Tensor]  # by map: what it becomes, or which of it stays


class PrunedMap(BaseModel):
    """One linear map (`LAYER.PATH`): its share of zeros, and a digest of where they are."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    name: str
    sparsity: float
    zeros: str


class PruneWeights(Change):
    """Weights that are zero. They are saved with the model, so that nothing is to be done when it is loaded.

    The ledger has where the zeros are as digests; the weights themselves travel with the plan. `groups`, `iou` and `chance` are those of
    subnetworks: the overlap of the masks that were combined, and what random masks of their sparsity would have.
    """

    kind: ClassVar[str] = "prune-weights"
    maps: tuple[PrunedMap, ...]
    sparsity: float  # of all maps together
    groups: tuple[str, ...] = ()
    iou: tuple[tuple[float, ...], ...] = ()
    chance: float | None = None
    _weights: Weights = PrivateAttr(default_factory=dict)

    @classmethod
    def of(cls, weights: Weights, **more: Any) -> "PruneWeights":
        """The change that puts these weights in place."""
        maps = tuple(PrunedMap(name=n, sparsity=float((w == 0).float().mean()), zeros=digest(w)) for n, w in weights.items())
        total = sum(int((w == 0).sum()) for w in weights.values()) / sum(w.numel() for w in weights.values())
        change = cls(maps=maps, sparsity=total, **more)
        change._weights.update(weights)
        return change

    def carry_out(self, smaller: Smaller) -> None:
        there = dict(linear_maps(smaller))
        for one in self.maps:
            if one.name not in there:
                raise PassError(f"there is no linear map {one.name!r} in this model: it was pruned as another one")
            weight = there[one.name].weight
            if one.name in self._weights:
                weight.data.copy_(self._weights[one.name])
            if digest(weight) != one.zeros:
                raise PassError(
                    f"the zeros of {one.name} are not those of the ledger, which does not hold them: prune the dense model again by its recipe"
                )


def digest(weight: Tensor) -> str:
    """Of where a matrix is zero, whatever its precision."""
    return sha256(np.packbits((weight.detach() != 0).cpu().numpy()).tobytes()).hexdigest()[:16]


class Targeted(Pass):
    """What passes over single weights share: how many go, of which maps."""

    stage: ClassVar[Stage] = "weights"
    needs: ClassVar[tuple[str, ...]] = ("calibration",)
    sparsity: float | None = Field(default=None, ge=0, lt=1)
    n_of_m: str | None = None
    targets: tuple[str, ...] = ("*",)

    @model_validator(mode="after")
    def _said_once(self) -> "Targeted":
        if (self.sparsity is None) == (self.n_of_m is None):
            raise ValueError("give either a sparsity (0.5) or a pattern n_of_m ('2:4')")
        return self

    @property
    def pattern(self) -> Pattern:
        """How much goes. Raises PassError for an n_of_m that is no pattern."""
        return Pattern.read(self.n_of_m) if self.n_of_m is not None else Pattern(self.sparsity or 0.0)


class Prune(Targeted):
    """Sets the least weights of the decoder's linear maps to zero.

    `method`: `magnitude`, `wanda` (arXiv 2306.11695) or `sparsegpt` (arXiv 2301.00774); the last two look at calibration examples (evidence
    `calibration`), the tokens of one `side` of them or both. `sparsity` is the share that goes of every output row (magnitude: matrix;
    sparsegpt: matrix), `n_of_m` instead how many of how many consecutive inputs. `targets` are patterns over `LAYER.PATH`: `*.mlp.*`.
    `allocation` shares a sparsity out over layers: `uniform`, `owl`, `ecoflap`, `tamp`. With `rerun`, as published, each layer is judged by what the
    pruned layers before it give, and runs twice; without, by what the dense ones give, and runs once.
    """

    title: ClassVar[str] = "prune"
    method: Literal["magnitude", "wanda", "sparsegpt"] = "wanda"
    allocation: Rule = "uniform"
    side: Side | None = None  # None: that of the calibration
    rerun: bool = True
    seed: int = 0  # of what ecoflap draws

    def asks(self) -> tuple[str, ...]:
        """Magnitudes need no examples, unless layers are told apart by some."""
        return () if self.method == "magnitude" and self.allocation == "uniform" else self.needs

    def plan(self, subject: Subject, evidence: Evidence) -> Sequence[Change]:
        pattern = self.pattern
        maps = targeted(subject, self.targets)
        if pattern.sparsity == 0:
            return []
        if pattern.of and self.allocation != "uniform":
            raise PassError(f"{self.n_of_m} takes the same share of every layer: leave allocation out, or set a sparsity")
        if not self.asks():
            made = {name: _only(module, magnitude(module.weight.detach(), pattern)) for name, module in maps.items()}
            return [PruneWeights.of(_checked(made, maps, dict.fromkeys(maps, pattern), whole=True))]
        calibration: Calibration = self.found(evidence, "calibration")
        batches, side = calibration.encoded(subject), self.side or calibration.side
        shares = allocated(
            self.allocation, subject, batches, _sizes(maps), pattern.sparsity, side, lambda i, n: f"{i}.{n}" in maps,
            self.seed,
        )  # fmt: skip
        patterns = {n: pattern if pattern.of else Pattern(shares[_layer(n)]) for n in maps}
        made = pruned(subject, batches, side, self.method, patterns, self.rerun)
        return [PruneWeights.of(_checked(made, maps, patterns, whole=self.method != "wanda"))]


class Subnet(Targeted):
    """alpha-SubNet (arXiv 2405.16700, section 6): Wanda's masks of several tasks or modalities, combined into one that serves them all.

    `by` says what has a mask of its own: the examples that show an image, a video, a sound, or text alone (`modality`), those of one kind of
    question (`kind`), or perceptual and textual tokens of the same examples (`side`). `groups` names which (all that there are, if empty).
    `combine`: `intersection` keeps what all keep (more goes than the sparsity), `union` what any keeps, `complement` what the first of two
    groups keeps and the second does not.
    """

    title: ClassVar[str] = "subnet"
    by: Literal["modality", "kind", "side"] = "modality"
    groups: tuple[str, ...] = ()
    combine: Literal["intersection", "union", "complement"] = "intersection"

    def plan(self, subject: Subject, evidence: Evidence) -> Sequence[Change]:
        pattern, maps = self.pattern, targeted(subject, self.targets)
        if pattern.sparsity == 0:
            return []
        calibrations = grouped(self.found(evidence, "calibration"), self.by, self.groups)
        names = tuple(calibrations)
        if len(names) < 2 or (self.combine == "complement" and len(names) != 2):
            wanted = "exactly two" if self.combine == "complement" else "at least two"
            raise PassError(
                f"a {self.combine} is of {wanted} groups, and the calibration examples have {', '.join(names) or 'none'} by {self.by}"
            )
        found = {name: masks(subject, one, pattern, tuple(maps)) for name, one in calibrations.items()}
        kept = combined([found[name] for name in names], self.combine)
        made = {name: _only(module, kept[name]) for name, module in maps.items()}
        if self.combine == "intersection":
            _checked(made, maps, dict.fromkeys(maps, pattern), whole=False)
        return [PruneWeights.of(
            {n: w.cpu() for n, w in made.items()}, groups=names, iou=overlaps([found[name] for name in names]),
            chance=chance_iou(pattern.sparsity),
        )]  # fmt: skip


# --- which maps -----------------------------------------------------------------------------------------------------


def targeted(subject: Subject, patterns: Sequence[str]) -> dict[str, nn.Linear]:
    """The linear maps of decoder layers that a pattern matches, by `LAYER.PATH`.

    Raises PassError for a pattern that matches none, and, where all maps are meant, for experts that are no linear maps.
    """
    there = dict(linear_maps(subject))
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in there):
            paths = dict.fromkeys(name.split(".", 1)[1] for name in there)
            raise PassError(
                f"the target {pattern!r} matches no linear map, as LAYER.PATH{did_you_mean(pattern.split('.', 1)[-1], paths)}"
            )
    if "*" in patterns and any(path is not None for path in subject.anatomy.experts):
        raise PassError(
            f"the experts of this {subject.anatomy.family} model are no linear maps of their own and would stay dense: name the maps to prune, "
            f"as in targets: ['*attn*']"
        )
    return {name: module for name, module in there.items() if any(fnmatchcase(name, pattern) for pattern in patterns)}


def _layer(name: str) -> int:
    return int(name.split(".", 1)[0])


def _sizes(maps: Mapping[str, nn.Linear]) -> dict[int, int]:
    found: dict[int, int] = {}
    for name, module in maps.items():
        found[_layer(name)] = found.get(_layer(name), 0) + module.weight.numel()
    return found


def _only(module: nn.Linear, kept: Tensor) -> Tensor:
    """A copy of the weights with nothing but these."""
    return module.weight.detach().masked_fill(~kept.to(module.weight.device), 0.0)


# --- pruning, layer by layer ----------------------------------------------------------------------------------------


def pruned(
    subject: Subject, batches: Sequence[Encoded], side: Side, method: str, patterns: Mapping[str, Pattern], rerun: bool = True,
    advance: Callable[[int], None] = lambda n: None,
) -> Weights:  # fmt: skip
    """What the named maps become, each layer judged by what the layers before it give, pruned (`rerun`) or dense. The model stays as it is."""
    made: Weights = {}

    def visit(index: int, layer: nn.Module, maps: Maps) -> None:
        for path, sums in maps.items():
            name, weight = f"{index}.{path}", layer.get_submodule(path).get_parameter("weight").data
            try:
                if method == "sparsegpt":
                    assert isinstance(sums, Gram)
                    weight.copy_(sparsegpt(weight, sums, patterns[name]))
                else:
                    kept = magnitude(weight, patterns[name]) if method == "magnitude" else wanda(weight, sums, patterns[name])
                    weight.masked_fill_(~kept, 0.0)
            except PassError as error:
                raise PassError(f"{name}: {error}") from error
            made[name] = weight.cpu()

    sequential(
        subject, batches, visit, side=side, statistic=Gram if method == "sparsegpt" else Squares,
        wanted=lambda index, path: f"{index}.{path}" in patterns, dense=not rerun, advance=advance,
    )  # fmt: skip
    return made


def masks(subject: Subject, calibration: Calibration, pattern: Pattern, maps: Sequence[str]) -> Weights:
    """Which weights Wanda keeps by these examples, as it goes through the layers."""
    found: Weights = {}

    def visit(index: int, layer: nn.Module, sums: Maps) -> None:
        for path, one in sums.items():
            weight = layer.get_submodule(path).get_parameter("weight").data
            kept = wanda(weight, one, pattern)
            weight.masked_fill_(~kept, 0.0)
            found[f"{index}.{path}"] = kept.cpu()

    sequential(
        subject,
        calibration.encoded(subject),
        visit,
        side=calibration.side,
        wanted=lambda index, path: f"{index}.{path}" in maps,
    )
    return found


def _checked(made: Weights, maps: Mapping[str, nn.Linear], patterns: Mapping[str, Pattern], whole: bool) -> Weights:
    """The weights, on the CPU. Raises PassError for a matrix that did not lose what it was to lose."""
    for name, module in maps.items():
        wanted = patterns[name].goes((module.weight.shape[0], module.weight.shape[1]), whole)
        got = int((made[name] == 0).sum()) if name in made else 0
        if got < wanted:
            why = "" if name in made else ", since no calibration token passed through it"
            raise PassError(f"{name} was to lose {wanted} of its {module.weight.numel()} weights and lost {got}{why}")
    return {name: weight.cpu() for name, weight in made.items()}


# --- subnetworks ----------------------------------------------------------------------------------------------------


def grouped(calibration: Calibration, by: str, groups: Sequence[str] = ()) -> dict[str, Calibration]:
    """The calibration of each group, in the order of `groups` (else of first appearance). Raises PassError for one without examples."""
    if by == "side":
        found = {"perceptual": calibration.of_side("perceptual"), "textual": calibration.of_side("textual")}
    else:
        label = _shown if by == "modality" else _kind
        names = dict.fromkeys(label(example) for example in calibration.examples)
        found = {name: calibration.only(partial(_labelled, label, name)) for name in names}
    for name in groups:
        if name not in found:
            raise PassError(f"no calibration example belongs to {name!r} by {by}{did_you_mean(name, found)}")
    return {name: found[name] for name in groups or found}


def _labelled(label: Callable[[Example], str], name: str, example: Example) -> bool:
    return label(example) == name


def _shown(example: Example) -> str:
    return "+".join(kind for kind, media in example.media.items() if media) or "text"


def _kind(example: Example) -> str:
    return example.tags.get("kind", "none")


def combined(found: Sequence[Weights], how: str) -> Weights:
    """One mask from several."""
    first, *others = found
    kept = {name: mask.clone() for name, mask in first.items()}
    for other in others:
        for name, mask in other.items():
            if how == "union":
                kept[name] |= mask
            else:
                kept[name] &= mask if how == "intersection" else ~mask
    return kept


def overlaps(found: Sequence[Weights]) -> tuple[tuple[float, ...], ...]:
    """Intersection over union of every pair of masks, over all their weights together."""
    whole = [torch.cat([mask.flatten() for mask in one.values()])[None] for one in found]
    return tuple(tuple(iou(a, b) for b in whole) for a in whole)
