"""How the modality-importance study asks one example: subsets of what it comes with, exchanges, and negative controls."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from zlib import crc32

import numpy as np

from probe import controls
from probe.analysis.modality import name_of, subsets
from probe.controls import modalities, only, swap
from probe.example import Example
from probe.subject import Subject

INTACT = "intact"
CONTROLS = ("blank", "noise", "shuffled", "frozen", "other", "without")
MEDIA = ("image", "video", "audio")


def conditions(
    subject: Subject, example: Example, came: Example, told: Sequence[Example], place: int, seed: int, cells: int, slices: int
) -> dict[str, Callable[[], Example]]:
    """How one example is asked, by name: its subsets, the same with one modality exchanged, and controls of it as it came.

    `told` are all examples, the one at `place` among them, with whatever context they were given; `came` is it as its data set has it.
    """
    own = modalities(example)
    others = {m: other for m in own if (other := partner(told, place, m, seed)) is not None}
    made: dict[str, Callable[[], Example]] = {
        name_of(one): partial(_only, subject, example, one) for one in (frozenset[str](), *subsets(own))
    }
    if len(own) > 1:
        made |= {
            exchanged(one, m): partial(_exchanged, subject, example, {m: others[m]}, one)
            for m in others for one in subsets(own) if m in one
        }  # fmt: skip
    made[INTACT] = lambda: came
    made["blank"] = partial(controls.blank, came)
    made["noise"] = partial(controls.noise, came, seed)
    made["shuffled"] = partial(controls.shuffled, came, seed, cells, slices)
    if came.videos:
        made["frozen"] = partial(controls.frozen, came)
    shown = [m for m in modalities(came) if m in MEDIA]
    if all(m in others for m in shown):
        whole = frozenset(modalities(came))
        made["other"] = partial(_exchanged, subject, came, {m: others[m] for m in shown}, whole)
    made["without"] = partial(_only, subject, came, frozenset(modalities(came)) - frozenset(MEDIA))
    return made


def exchanged(subset: Iterable[str], modality: str) -> str:
    """The name of the condition in which a subset is shown, one modality of it another example's."""
    return f"{name_of(frozenset(subset))}, other {modality}"


def partner(told: Sequence[Example], place: int, modality: str, seed: int) -> Example | None:
    """Another example with the same modality: drawn from those before it, so that more examples change nothing for the first ones."""
    key = crc32(f"{told[place].id} {modality}".encode())
    start = int(np.random.default_rng((seed, key)).integers(place)) if place else 0
    order = [*range(start, -1, -1), *range(place - 1, start, -1)] if place else []
    candidates = (told[i] for i in (*order, *range(place + 1, len(told))))
    return next((one for one in candidates if modality in modalities(one)), None)


def _exchanged(subject: Subject, example: Example, others: Mapping[str, Example], kept: frozenset[str]) -> Example:
    for modality, other in others.items():
        example = swap(example, other, modality)
    return _only(subject, example, kept)


def _only(subject: Subject, example: Example, kept: frozenset[str]) -> Example:
    """The example with some of its modalities, and no place left in its words for the media that are gone."""
    made = only(example, kept)
    gone = [mark for kind, mark in subject.marks.items() if kind in modalities(example) and kind not in kept]
    texts = {name: getattr(made, name) for name in ("prompt", "context", "options", "suffix")}
    for mark in gone:
        texts = {name: text.replace(mark, "").strip() for name, text in texts.items()}
    return replace(made, **texts)
