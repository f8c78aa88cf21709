"""What the studies that probe share: facts of examples, which examples show the same picture, and one fact read at every state."""

import json
from collections.abc import Callable, Hashable, Mapping, Sequence
from hashlib import sha256
from typing import Any

import numpy as np
import pyarrow as pa

from probe.analysis.probing import FOLDS, Curve, above_zero, classes_of, curve_of, onset, probe_fact
from probe.errors import DataError, StudyError, did_you_mean
from probe.example import Example
from probe.features import asked_word
from probe.subject import Subject
from studies.study import Summary
from studies.work import picked

SCHEMA = pa.schema([
    ("example", pa.string()), ("what", pa.string()), ("group", pa.string()), ("states", pa.int32()),
    ("vector", pa.list_(pa.float32())), ("text", pa.string()),
])  # fmt: skip
PREFIX = "fact:"
LEVEL = 0.05
Values = Mapping[str, Sequence[str | None]]


def facts_of(examples: Sequence[Example], asked: str = "auto") -> dict[str, list[str | None]]:
    """Each fact's value in each example: the tags `fact:...` where the data has them, else every tag with two values or more.

    Raises DataError where there is none, StudyError for a fact that there is not.
    """
    tags = sorted({tag for example in examples for tag in example.tags})
    named = {tag.removeprefix(PREFIX): tag for tag in tags if tag.startswith(PREFIX)} or {tag: tag for tag in tags}
    found = {name: [example.tags.get(tag) for example in examples] for name, tag in named.items()}
    found = {name: values for name, values in found.items() if len({v for v in values if v is not None}) > 1}
    if not found:
        raise DataError("the examples have no tag with two values: a probe needs facts, as tags, to look for")
    chosen = list(found) if asked == "auto" else [name.strip() for name in asked.split(",")]
    for name in chosen:
        if name not in found:
            raise StudyError(f"there is no fact {name!r}{did_you_mean(name, found)}")
    return {name: found[name] for name in chosen}


def type_of(example: Example) -> str:
    """What the control task gives a random label: the word of the question that names the object, else the whole question."""
    return asked_word(example) or example.prompt


def shown_by(subject: Subject, example: Example) -> list[str]:
    """A fingerprint of each picture, clip and sound; of the context, or the example's own name, where nothing is shown."""
    media = subject.open_media(example)
    bytes_of = [picture.tobytes() for picture in media.pictures]
    bytes_of += [b"".join(frame.tobytes() for frame in clip.frames) for clip in media.videos]
    bytes_of += [sound.samples.tobytes() for sound in media.sounds]
    return [sha256(one).hexdigest()[:16] for one in bytes_of or [(example.context or example.id).encode()]]


def picture_row(subject: Subject, example: Example) -> dict[str, Any]:
    return {"example": example.id, "what": "shown", "text": json.dumps(shown_by(subject, example))}


def scenes_of(rows: pa.Table, ids: Sequence[str]) -> list[int]:
    """A number for each example, the same for all that are tied by a picture that they share, however indirectly."""
    table = picked(rows, what="shown")
    pictures = dict(zip(table["example"].to_pylist(), map(json.loads, table["text"].to_pylist()), strict=True))
    home: dict[str, str] = {}

    def root(name: str) -> str:
        while home.setdefault(name, name) != name:
            name = home[name]
        return name

    for name in ids:
        for other in pictures[name][1:]:
            home[root(other)] = root(pictures[name][0])
    numbers: dict[str, int] = {}
    return [numbers.setdefault(root(pictures[name][0]), len(numbers)) for name in ids]


def states_of(rows: pa.Table, group: str, ids: Sequence[str]) -> np.ndarray | None:
    """The states of one token group (state item width), NaN for examples that lack it; None where all do."""
    table = picked(rows, what="states", group=group)
    if not len(table):
        return None
    states, first = table["states"][0].as_py(), table["vector"][0].values.to_numpy()
    made = np.full((states, len(ids), len(first) // states), np.nan)
    at = {name: i for i, name in enumerate(ids)}
    for name, vector in zip(table["example"].to_pylist(), table["vector"], strict=True):
        made[:, at[name]] = vector.values.to_numpy().reshape(states, -1)
    return made


def read_fact(
    states: np.ndarray, values: Sequence[str | None], scenes: Sequence[int], types: Sequence[Hashable], seed: int = 0,
    folds: int = FOLDS, tolerance: float = 0.05,
) -> Summary:  # fmt: skip
    """Everything that is said of one fact and one token group, with intervals over pictures.

    Raises DataError with the reason where the fact cannot be probed there.
    """
    fact = classes_of(values, np.isfinite(states).all((0, 2)).tolist())
    groups, kinds = ([of[i] for i in fact.items] for of in (scenes, types))
    probed = probe_fact(states[:, fact.items], fact.labels, groups, kinds, folds, seed)
    gap = probed.correct.astype(float) - probed.majority.astype(float)
    p, q = above_zero(gap, groups, seed)
    accuracy, above = curve_of(probed.correct.astype(float), groups, seed), curve_of(gap, groups, seed)
    clear = [i for i in range(len(q)) if q[i] < LEVEL and above.low[i] > 0]
    best = int(accuracy.mean.argmax())
    return {
        "n": len(fact.items), "n_scenes": len(set(groups)), "classes": len(fact.classes), "dropped": list(fact.dropped),
        "accuracy": as_curve(accuracy), "above": as_curve(above), "p": p.tolist(), "q": q.tolist(),
        "majority": as_number(curve_of(probed.majority[None].astype(float), groups, seed)),
        "control": as_curve(curve_of(probed.control.astype(float), groups, seed)),
        "selectivity": as_curve(curve_of(probed.correct.astype(float) - probed.control, groups, seed)),
        "best": {"state": best, **as_number(Curve(*(side[best : best + 1] for side in accuracy)))},
        "first_above": clear[0] if clear else None,
        "onset": onset(probed.correct.astype(float), groups, tolerance, seed)._asdict() if clear else None,
        "strengths": list(probed.strengths),
    }  # fmt: skip


def as_curve(curve: Curve) -> dict[str, list[float]]:
    return {name: side.tolist() for name, side in curve._asdict().items()}


def as_number(curve: Curve) -> dict[str, float]:
    return {"value": float(curve.mean[0]), "low": float(curve.low[0]), "high": float(curve.high[0])}


def read_all(
    facts: Values, states: Mapping[str, np.ndarray | None], scenes: Sequence[int], types: Sequence[Hashable],
    read: Callable[..., Summary], advance: Callable[[int], None],
) -> tuple[dict[str, dict[str, Summary]], list[str]]:  # fmt: skip
    """`read` of each fact in each token group, and what could not be probed and why. Raises DataError where nothing could."""
    found: dict[str, dict[str, Summary]] = {}
    refused = []
    for name, values in facts.items():
        for group, own in states.items():
            try:
                if own is None:
                    raise DataError("no example has such tokens")
                found.setdefault(name, {})[group] = read(own, values, scenes, types)
            except DataError as error:
                refused.append(f"{name}, {group}: {error}")
            advance(1)
    found = {name: groups for name, groups in found.items() if groups}
    if not found:
        raise DataError(f"no fact could be probed; the first: {refused[0]}")
    return found, refused
