"""A study over several modalities: whose examples show what, and the model that is shown them."""

from dataclasses import dataclass

import torch

from probe.errors import DataError, StudyError, did_you_mean
from probe.example import Example
from probe.subject import Side, Subject
from studies.data import Data, load_data
from studies.demo.family import MODALITIES, load_member
from studies.study import Setting


@dataclass(frozen=True)
class Part:
    """One modality: whose examples, and the model that is shown them."""

    modality: str
    subject: Subject
    data: Data
    padding: Side = "left"


def parts_of(setting: Setting, modalities: str) -> list[Part]:
    demo = setting.subject.name == "demo:frozen" and setting.data.name == "demo"
    chosen = [name.strip() for name in modalities.split(",")]
    for name in chosen:
        if name != "auto" and name not in MODALITIES:
            raise StudyError(f"there is no modality {name!r}{did_you_mean(name, MODALITIES)}")
    if demo:
        names = list(MODALITIES) if chosen == ["auto"] else chosen
        return [_demo_part(setting, name) for name in names]
    groups = {name: tuple(e for e in setting.data.examples if _shows(e, name)) for name in MODALITIES}
    names = [name for name, found in groups.items() if found] if chosen == ["auto"] else chosen
    for name in names:
        if not groups[name]:
            raise DataError(f"{setting.data.name} has no example that shows {name}: name others with --modalities")
    if not names:
        raise DataError(f"{setting.data.name} shows nothing and has no context: there is nothing to align")
    return [
        Part(name, setting.subject, Data(setting.data.name, groups[name], setting.data.fingerprint), setting.padding)
        for name in names
    ]


def _shows(example: Example, modality: str) -> bool:
    shown = [name for name, media in zip(("image", "video", "audio"), example.media.values(), strict=True) if media]
    return shown == [modality] if modality != "text" else not shown and bool(example.context)


def _demo_part(setting: Setting, modality: str) -> Part:
    """Another modality of the demo, with its own model on the same frozen language model."""
    model, data = MODALITIES[modality]
    if modality == "image":
        return Part("image", setting.subject, setting.data, setting.padding)
    subject = load_member(model, str(setting.subject.device), setting.subject.dtype)
    ours, theirs = (one.decoder.state_dict() for one in (setting.subject, subject))
    if any(not torch.equal(value, theirs[name]) for name, value in ours.items()):
        raise StudyError(f"{model} does not hold the language model of {setting.subject.name}: its tokens cannot be compared")
    return Part(modality, subject, load_data(data, len(setting.data), seed=setting.seed), setting.padding)
