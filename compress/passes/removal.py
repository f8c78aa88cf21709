"""Heads, neurons and experts cut out of weights, or hidden while the model runs: the changes that passes over width plan.

Where every layer is left alike and the family's configuration can say so, the change is of the kind `...-evenly`: the configuration is told,
and plain transformers builds the shapes. Otherwise only the ledger knows them.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

import torch
from huggingface_hub.errors import StrictDataclassError
from pydantic import Field, PrivateAttr
from torch import Tensor, nn
from transformers import PreTrainedModel

from compress.passes.base import Change
from compress.smaller import Smaller
from compress.structure import UNIT, Kind, Units, parts_of
from probe.errors import PassError
from probe.subject import Subject


class RemoveUnits(Change):
    """Units of one kind, by layer and number, that are gone. The readers of `biased` layers have got a bias.

    `skipped` says why other layers keep all of theirs.
    """

    of: ClassVar[Kind]
    shapes: ClassVar[bool] = True
    units: dict[int, tuple[int, ...]]
    biased: tuple[int, ...] = ()
    skipped: dict[int, str] = Field(default_factory=dict)
    _means: dict[int, Tensor] = PrivateAttr(
        default_factory=dict
    )  # by layer, the mean input of the reader; a loaded model has the bias

    def carry_out(self, smaller: Smaller) -> None:
        found = chosen(smaller, self.of, self.units)
        for layer, (units, gone) in found.items():
            if layer in self.biased and units.reader.bias is None:
                units.reader.bias = nn.Parameter(units.reader.weight.detach().new_zeros(units.reader.out_features))
            if layer in self._means:
                _compensate(units, gone, self._means[layer])
            units.keep([i for i in range(units.count) if i not in set(gone)])
        if self.in_config:
            config = smaller.config.get_text_config()
            first, gone = next(iter(found.values()))
            for one in {id(config): config, id(smaller.decoder.config): smaller.decoder.config}.values():
                first.tell(one, first.count - len(gone))
        smaller.reshaped()

    def with_means(self, means: Mapping[int, Tensor]) -> "RemoveUnits":
        """The same change, which knows what the readers were given on the mean."""
        self._means.update(means)
        return self


class RemoveHeads(RemoveUnits):
    """Groups of heads: a key head and the query heads that read it. Layers differ afterwards, or the configuration cannot say it."""

    kind: ClassVar[str] = "remove-heads"
    of: ClassVar[Kind] = "heads"


class RemoveHeadsEvenly(RemoveHeads):
    """As many heads from every layer, and the configuration says so."""

    kind: ClassVar[str] = "remove-heads-evenly"
    in_config: ClassVar[bool] = True


class RemoveNeurons(RemoveUnits):
    """Neurons of feed-forward blocks. Layers differ afterwards, or the configuration cannot say it."""

    kind: ClassVar[str] = "remove-neurons"
    of: ClassVar[Kind] = "neurons"


class RemoveNeuronsEvenly(RemoveNeurons):
    """As many neurons from every layer, and the configuration says so."""

    kind: ClassVar[str] = "remove-neurons-evenly"
    in_config: ClassVar[bool] = True


class RemoveExperts(RemoveUnits):
    """Experts, and what the router knows of them. Layers differ afterwards, or the configuration cannot say it."""

    kind: ClassVar[str] = "remove-experts"
    of: ClassVar[Kind] = "experts"


class RemoveExpertsEvenly(RemoveExperts):
    """As many experts from every layer, and the configuration says so."""

    kind: ClassVar[str] = "remove-experts-evenly"
    in_config: ClassVar[bool] = True


class HideUnits(Change):
    """Heads or neurons silenced while the model runs: nothing is saved, and the answers are those of the smaller model."""

    kind: ClassVar[str] = "hide-units"
    runs: ClassVar[bool] = True
    of: Kind
    units: dict[int, tuple[int, ...]]

    def carry_out(self, smaller: Smaller) -> None:
        smaller.attached.append(Hidden(chosen(smaller, self.of, self.units).values()))


class Hidden:
    """Hooks that keep units from being heard."""

    def __init__(self, found: Any) -> None:
        self.handles = [units.reader.register_forward_pre_hook(partial(_silence, units.columns(gone))) for units, gone in found]

    def detach(self) -> None:
        for handle in self.handles:
            handle.remove()


def _silence(columns: Tensor, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return (args[0].index_fill(-1, columns.to(args[0].device), 0), *args[1:])


def chosen(subject: Subject, kind: Kind, asked: Mapping[int, Sequence[int]]) -> dict[int, tuple[Any, list[int]]]:
    """The units of each layer, and which of them are to go. Raises PassError for what the model lacks or cannot do without."""
    found, reasons = parts_of(subject, kind)
    for layer, gone in asked.items():
        if not 0 <= layer < subject.n_layers:
            raise PassError(f"layer {layer} does not exist: the model has layers 0 to {subject.n_layers - 1}")
        if layer in reasons:
            raise PassError(f"layer {layer} of this {subject.anatomy.family} can lose no {kind}: {reasons[layer]}")
        one = found[layer]
        if outside := [unit for unit in gone if not 0 <= unit < one.count]:
            raise PassError(f"layer {layer} has no {UNIT[kind]} {outside[0]}: it has 0 to {one.count - 1}")
        if one.count - len(set(gone)) < one.least:
            raise PassError(
                f"layer {layer} needs {one.least} of its {one.count} {kind}, and {len(set(gone))} are to go: remove fewer"
            )
    return {layer: (found[layer], sorted(set(gone))) for layer, gone in asked.items() if gone}


def _compensate(units: Units, gone: Sequence[int], means: Tensor) -> None:
    """The reader's bias takes the place of what the removed units gave it on the mean (FLAP, arXiv 2312.11983, eq. 3)."""
    weight, columns = units.reader.weight.detach(), units.columns(gone)
    given = weight[:, columns.to(weight.device)].double() @ means[columns].to(weight.device).double()
    with torch.no_grad():
        units.reader.bias.add_(given.to(weight.dtype))


# --- what a configuration can say ------------------------------------------------------------------------------------


def removal(
    subject: Subject, kind: Kind, units: Mapping[int, Sequence[int]], means: Mapping[int, Tensor] | None = None
) -> RemoveUnits:  # fmt: skip
    """The change that removes these units, told to the configuration where that can be.

    `means` (by layer, the mean input of each reader) are what the removed units are made up for by.
    """
    found, skipped = parts_of(subject, kind)
    data = {layer: tuple(sorted(set(gone))) for layer, gone in sorted(units.items()) if gone}
    biased = tuple(layer for layer in data if means and found[layer].reader.bias is None)
    left = {layer: one.count - len(data.get(layer, ())) for layer, one in found.items()}
    alike = not skipped and not biased and len({(left[layer], *one.form) for layer, one in found.items()}) == 1
    known = alike and config_says(subject, kind, left[0], found[0])
    return _CHANGES[kind][known](units=data, biased=biased, skipped=skipped).with_means(means or {})


_CHANGES: dict[Kind, tuple[type[RemoveUnits], type[RemoveUnits]]] = {
    "heads": (RemoveHeads, RemoveHeadsEvenly), "neurons": (RemoveNeurons, RemoveNeuronsEvenly),
    "experts": (RemoveExperts, RemoveExpertsEvenly),
}  # fmt: skip


def config_says(subject: Subject, kind: Kind, left: int, like: Any) -> bool:
    """Whether transformers builds layers with so many units from the configuration alone: it is asked to, without weights."""
    built = without_weights(subject, lambda config: like.tell(config, left))
    if built is None:
        return False
    found, reasons = parts_of(Subject(built, subject.processor, subject.anatomy), kind)
    return not reasons and {one.form for one in found.values()} == {(left, *like.form[1:])}


def without_weights(subject: Subject, change: Callable[[Any], None]) -> PreTrainedModel | None:
    """The model that transformers builds, on no device, from a changed copy of the text configuration; None where it refuses to."""
    config = copy.deepcopy(subject.config)
    change(config.get_text_config())
    try:
        again = type(config).from_dict(config.to_dict())
        with torch.device("meta"):
            return type(subject.model)._from_config(again)
    except (StrictDataclassError, ValueError, TypeError, RuntimeError):  # a width that heads do not divide, say
        return None
