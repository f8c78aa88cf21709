"""Groups of examples with a mask each: which groups a model and its data have, what their masks share, and what each mask can do elsewhere."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import combinations
from typing import Any

import torch

from compress.calibration import Calibration
from compress.measure import answer, encode_all
from compress.passes.prune import Weights, combined, masks, targeted
from compress.pruning import Pattern, magnitude
from compress.smaller import Smaller
from probe.analysis.overlap import iou
from probe.calibration import linear_maps
from probe.example import Example
from probe.subject import Subject
from studies.data import TELLINGS, Data, apart, load_data
from studies.modalities import parts_of
from studies.study import Setting

Rows = list[dict[str, Any]]
FEWEST = 4  # a group of fewer examples, to calibrate on or to ask, is left out
BESIDE = ("dense", "magnitude", "random")  # what is asked beside the groups' masks
TOGETHER = ("intersection", "union")


@dataclass(frozen=True)
class Group:
    """Examples of one kind: those that make its mask, those that are asked, and the model that is shown them."""

    name: str
    subject: Subject
    calibration: tuple[Example, ...]
    asked: tuple[Example, ...]


def by_modality(setting: Setting, asked: Data, calibration: Sequence[Example], most: int) -> list[Group]:
    """What is shown: of demo:frozen all that the demo models have, around one language model; else what the data hold, and their text twins."""
    if setting.subject.name == "demo:frozen" and setting.data.name == "demo":
        others = [part for part in parts_of(setting, "auto") if part.modality != "image"]
        ours = Group("image", setting.subject, tuple(calibration), asked.examples[:most])
        return _enough(
            [ours, *(Group(part.modality, part.subject, *_parted(part.data, len(calibration), most)) for part in others)]
        )
    names = dict.fromkeys(shown(example) for example in (*calibration, *asked.examples))
    found = [
        Group(name, setting.subject, tuple(e for e in calibration if shown(e) == name), tuple(e for e in asked.examples if shown(e) == name)[:most])
        for name in names
    ]  # fmt: skip
    if setting.data.name in TELLINGS and setting.data.name != "demo:text":
        twins = load_data("demo:text", min(most, len(asked)), seed=setting.seed)
        found.append(Group("text", setting.subject, *_parted(twins, len(calibration), most)))
    return _enough(found)


def _parted(data: Data, count: int, most: int) -> tuple[tuple[Example, ...], tuple[Example, ...]]:
    rest, calibration = apart(data, count)
    return calibration, rest.examples[:most]


def by_kind(setting: Setting, asked: Data, calibration: Sequence[Example], most: int) -> list[Group]:
    """What is asked: the kinds of questions that the data name."""
    names = dict.fromkeys(e.tags.get("kind", "") for e in asked.examples)
    return _enough([
        Group(name, setting.subject, tuple(e for e in calibration if e.tags.get("kind") == name),
              tuple(e for e in asked.examples if e.tags.get("kind") == name)[:most])
        for name in names if name
    ])  # fmt: skip


def _enough(groups: list[Group]) -> list[Group]:
    return [group for group in groups if min(len(group.calibration), len(group.asked)) >= FEWEST]


def shown(example: Example) -> str:
    """The kinds of media of an example; `text` where there are none."""
    return "+".join(kind for kind, media in example.media.items() if media) or "text"


@dataclass(eq=False)
class Family:
    """The groups of one division (`by`), their masks at one sparsity, and those made of them."""

    by: str
    groups: list[Group]
    sparsity: float
    batch: int
    seed: int = 0
    found: dict[str, Weights] = field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        return [group.name for group in self.groups]

    @property
    def rows(self) -> list[str]:
        """Everything that is asked: the dense model, masks of groups and of all together, and masks that know nothing of inputs."""
        return [BESIDE[0], *self.names, *TOGETHER, *BESIDE[1:]]

    def mask(self, name: str) -> Weights:
        """A group's mask, found when it is first asked for."""
        if name not in self.found:
            group = next(group for group in self.groups if group.name == name)
            calibration = Calibration(group.calibration, batch=self.batch)
            self.found[name] = masks(group.subject, calibration, Pattern(self.sparsity), list(targeted(group.subject, ("*",))))
        return self.found[name]

    def kept(self, row: str) -> Weights:
        """Which weights a row of the table keeps."""
        if row in self.names:
            return self.mask(row)
        if row in TOGETHER:
            return combined([self.mask(name) for name in self.names], row)
        return self._magnitude if row == "magnitude" else self._random

    @cached_property
    def _magnitude(self) -> Weights:
        maps = targeted(self.groups[0].subject, ("*",))
        return {name: magnitude(m.weight.detach(), Pattern(self.sparsity), False).cpu() for name, m in maps.items()}

    @cached_property
    def _random(self) -> Weights:
        draw = torch.Generator().manual_seed(self.seed)
        maps = targeted(self.groups[0].subject, ("*",))
        return {name: Pattern(self.sparsity).kept(torch.rand(m.weight.shape, generator=draw)) for name, m in maps.items()}

    def overlap(self) -> Rows:
        """IoU of each pair of masks: over all weights, and of each layer (`example`) by itself; and with the mask of the least weights alone."""
        rows: Rows = [
            {"what": "overlap", "text": self.by, "name": name, "other": "magnitude", "example": "", "value": self._iou(name, "magnitude")}
            for name in self.names
        ]  # fmt: skip
        for a, b in combinations(self.names, 2):
            layers = sorted({int(name.split(".")[0]) for name in self.mask(a)})
            for place in ("", *map(str, layers)):
                value = self._iou(a, b, place)
                rows.append({"what": "overlap", "text": self.by, "name": a, "other": b, "example": place, "value": value})
        return rows

    def _iou(self, a: str, b: str, layer: str = "") -> float:
        first, second = self.kept(a), self.kept(b)
        names = [name for name in first if not layer or name.startswith(f"{layer}.")]
        return iou(*(torch.cat([mask[name].flatten() for name in names])[None] for mask in (first, second)))

    def ask(self, row: str) -> Rows:
        """Every group's questions put to a model with the row's mask."""
        rows: Rows = []
        models: dict[int, Subject] = {}
        for group in self.groups:
            if id(group.subject) not in models:
                models[id(group.subject)] = self._with(row, group.subject)
            subject = models[id(group.subject)]
            answers = answer(subject, encode_all(subject, group.asked, self.batch))
            rows += [
                {
                    "what": "cross",
                    "text": self.by,
                    "name": row,
                    "other": group.name,
                    "example": e.id,
                    "right": bool(right),
                    "said": said,
                }
                for e, right, said in zip(group.asked, answers.right, answers.said, strict=True)
            ]
        return [*rows, *self._realised(row)]

    def _with(self, row: str, subject: Subject) -> Subject:
        if row == BESIDE[0]:
            return subject
        smaller = Smaller.of(subject)
        apply_mask(smaller, self.kept(row))
        return smaller

    def _realised(self, row: str) -> Rows:
        if row == BESIDE[0]:
            return [{"what": "sparsity", "text": self.by, "name": row, "value": 0.0}]
        kept = self.kept(row)
        total, stays = (sum(count(mask) for mask in kept.values()) for count in (torch.Tensor.numel, lambda m: int(m.sum())))
        return [{"what": "sparsity", "text": self.by, "name": row, "value": 1 - stays / total}]


def apply_mask(smaller: Smaller, kept: Mapping[str, torch.Tensor]) -> None:
    """Sets to zero what a mask does not keep."""
    for name, module in linear_maps(smaller):
        if name in kept:
            module.weight.data.masked_fill_(~kept[name].to(module.weight.device), 0.0)
