"""Are perceptual and textual tokens implicitly aligned inside the language model, and does that predict what it can do?

The questions of Implicit Multimodal Alignment (arXiv 2405.16700) on any model: how like an example's perceptual tokens are to its
words, layer by layer and inside each block, beside unmatched pairs; whether they use the same weights; and whether the score goes
with accuracy and hallucination over a family of models. One forward pass for each example.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from hashlib import sha256
from itertools import islice
from typing import Any

import numpy as np
import pyarrow as pa

from probe.alignment import SIDES, Anchors, Reader, Reading, Sides, gather_anchors, read_alignment, sides_of, watch_alignment
from probe.analysis.alignment import score
from probe.calibration import InputSquares
from probe.errors import SightlineError, StudyError
from probe.example import Example
from probe.subject import Encoded, Subject
from studies.data import Data
from studies.demo.family import load_member, members
from studies.modalities import Part, parts_of
from studies.run import Run, finite
from studies.study import Setting, Summary, describe, progress, study, units

SCHEMA = pa.schema([
    ("modality", pa.string()), ("example", pa.string()), ("what", pa.string()), ("key", pa.string()),
    ("values", pa.list_(pa.float64())), ("vector", pa.list_(pa.float32())), ("n", pa.int32()), ("text", pa.string()),
])  # fmt: skip
ANCHORS, PLANES = 16, 4  # examples that stand for the unmatched side; states that are drawn in the plane
WHOLE = 3  # of the anchors, those whose every token is compared: any example has two that are not itself
Numbered = list[tuple[int, Example]]
DRAWN = 256  # examples that are drawn there: their mean states are kept, and of no others


@study
def implicit_alignment(
    setting: Setting,
    *,
    modalities: str = "auto",
    family: str = "auto",
    words_limit: int = 80,
    weights_limit: int = 256,
    sparsity: float = 0.5,
    family_limit: int = 96,
) -> Summary:
    """Are perceptual and textual tokens implicitly aligned inside the language model, and does that predict what it can do?

    `modalities` are names of `image,video,audio,text` (auto: whatever the data holds, and for demo:frozen all that the demo models have);
    `family` are models whose scores are compared with what they can do, separated by commas (auto: the demo family; none: no
    comparison); `words_limit` examples for the vocabulary distributions, `weights_limit` for the weight overlap at `sparsity`,
    `family_limit` examples for each member of the family.
    """
    if not 0 < sparsity < 1:
        raise StudyError(f"a sparsity lies between 0 and 1, not at {sparsity:g}")
    parts = parts_of(setting, modalities)
    names = _family(setting, family)
    config = {
        "data": {part.modality: [part.subject.name, part.data.name, part.data.fingerprint] for part in parts},
        "limit": len(setting.data), "batch": setting.batch, "padding": setting.padding, "seed": setting.seed, "words_limit": words_limit,
        "weights_limit": weights_limit, "sparsity": sparsity, "family": names, "family_limit": family_limit,
    }  # fmt: skip
    run = Run.open(setting.out, "implicit-alignment", config, describe(setting.subject), SCHEMA)
    with run.recorded():
        return _carry_out(setting, run, parts, names, words_limit, weights_limit, sparsity, family_limit)


def _family(setting: Setting, family: str) -> list[str]:
    if family == "none":
        return []
    if family == "auto":
        demo = setting.subject.name in ("demo", "demo:frozen") and setting.data.name == "demo"
        return members() if demo else []
    names = [name.strip() for name in family.split(",")]
    if len(names) < 3:
        raise StudyError("a correlation over a family of models needs at least three of them")
    return names


def _carry_out(
    setting: Setting, run: Run, parts: list[Part], names: list[str], words_limit: int, weights_limit: int, sparsity: float,
    family_limit: int,
) -> Summary:  # fmt: skip
    from studies.implicit_alignment_report import figures, report, summarise

    keys: list[str] = []
    total = sum(len(part.data) for part in parts) + len(names)
    with progress("implicit alignment", total, setting.quiet) as advance:
        for part in parts:
            work = _work(part, setting.batch)
            keys += [key for key, _ in work.units]
            _read_part(run, part, work, (words_limit, weights_limit), advance)
        asked = _existence(setting, family_limit) if names else []
        shown = _digest(example.id for example in (*setting.data.examples[:family_limit], *asked))
        for name in names:
            key = f"member-{name.replace(':', '-').replace('/', '-')}-{shown}"
            keys.append(key)
            if run.pending([key]):
                run.write(key, _member(setting, name, family_limit, asked))
            advance(1)
    summary = finite(summarise(run.rows(keys), parts, sparsity, setting.seed))
    summary["run"] = str(run.folder)
    figures(run, summary)
    run.finish(summary, report(summary, setting))
    return summary


# --- one unit of work ------------------------------------------------------------------------------------------------


def _usable(subject: Subject, example: Example, modality: str) -> str:
    """Why an example cannot be read; empty where it can."""
    try:
        sides_of(subject.encode(example).maps[0], example, modality)
    except SightlineError as error:
        return str(error)
    return ""


def _chosen(part: Part) -> list[Example]:
    """The examples of the unmatched side: the first that can be read, so that they are the same whatever the limit is."""
    usable = (e for e in part.data.examples if not _usable(part.subject, e, part.modality))
    return list(islice(usable, ANCHORS))


@dataclass(frozen=True)
class Work:
    """A part's units of work, each with its numbered examples; of the first (`leading`), anchors are taken as they are read."""

    units: list[tuple[str, Numbered]]
    leading: int
    anchors: list[Example]


def _work(part: Part, batch: int) -> Work:
    """The units' keys name the anchors and the leading examples: a unit that was read beside others, or beside anchors that came in other batches, is
    another unit.
    """
    chosen = _chosen(part)
    cut = [(key, [(i, part.data.examples[i]) for i in items]) for key, items in units(len(part.data), batch)]
    last = chosen[-1].id if len(chosen) > 1 else None
    leading = next((i + 1 for i, (_, some) in enumerate(cut) if any(e.id == last for _, e in some)), 0)
    beside = _digest([*(e.id for e in chosen), "", *(e.id for _, some in cut[:leading] for _, e in some)])
    return Work([(f"{part.modality}-{key}-{beside}", some) for key, some in cut], leading, chosen if leading else [])


def _read_part(run: Run, part: Part, work: Work, limits: tuple[int, int], advance: Callable[[int], None]) -> None:
    """Every unit that the run does not hold yet. The anchors' own units are read first, and again, for anchors alone, where others are missing."""
    todo = set(run.pending(key for key, _ in work.units))
    anchors, watched = None, {}
    if todo and work.anchors:
        anchors = gather_anchors(part.subject, work.anchors[:WHOLE], part.modality, WHOLE)
        for key, some in work.units[: work.leading]:
            watched[key] = watch(part, some, anchors, *(limits if key in todo else (0, 0)))
            advance(len(some))
        ids = {e.id for e in work.anchors}
        anchors = anchors.joined([r for one in watched.values() for r in one.readers if r.example.id in ids])
    for key, some in work.units:
        known = watched.pop(key, None)
        if key in todo:
            run.write(key, (known or watch(part, some, anchors, *limits)).rows(anchors))
        advance(0 if known else len(some))


def _digest(names: Iterable[str]) -> str:
    """What stands for some examples in a unit's key."""
    return sha256("\n".join(names).encode()).hexdigest()[:8]


@dataclass(frozen=True)
class Watched:
    """One forward pass over some examples of a modality: of what was seen in it rows are made once all anchors are known."""

    part: Part
    skipped: list[dict[str, Any]]  # the rows of those that cannot be read
    examples: Numbered  # the others
    sides: Sequence[Sides]
    readers: list[Reader]
    squares: dict[tuple[str, str], np.ndarray]
    words_limit: int
    weights_limit: int

    def rows(self, anchors: Anchors | None) -> list[dict[str, Any]]:
        """All rows, an unmatched side beside these anchors."""
        if not self.readers:
            return self.skipped
        part, readings = self.part, [reader.reading(anchors) for reader in self.readers]
        rows = self.skipped + [
            row for (i, _), reading in zip(self.examples, readings, strict=True)
            for row in [*_reading_rows(part, reading, i < self.words_limit), *(_plane_rows(part, reading) if i < DRAWN else ())]
        ]  # fmt: skip
        weighed = sum(i < self.weights_limit for i, _ in self.examples)
        rows += [
            _row(part, "", "squares", f"{side}/{name}", vector=total, n=weighed) for (side, name), total in self.squares.items()
        ]
        rows += [_centroid(part, side, readings, [len(getattr(s, side)) for s in self.sides]) for side in SIDES]
        return rows + _sums(part, readings, [i for i, _ in self.examples])


def watch(part: Part, examples: Numbered, anchors: Anchors | None, words_limit: int, weights_limit: int) -> Watched:
    """Reads some examples of one modality, each with its number; one that cannot be read is a row that says why."""
    try:
        skipped, usable, read = [], examples, _encoded(part, examples)
    except SightlineError:  # which of them cannot be read, and why, is asked one by one
        reasons = {e.id: _usable(part.subject, e, part.modality) for _, e in examples}
        skipped = [_row(part, e.id, "skipped", "", text=reasons[e.id]) for _, e in examples if reasons[e.id]]
        usable = [(i, e) for i, e in examples if not reasons[e.id]]
        if not usable:
            return Watched(part, skipped, [], [], [], {}, words_limit, weights_limit)
        read = _encoded(part, usable)
    encoded, sides = read
    wanted = [side if i < weights_limit else None for side, (i, _) in zip(sides, usable, strict=True)]
    with InputSquares(part.subject, wanted) as squares:
        readers = watch_alignment(part.subject, encoded, sides, anchors, words=any(i < words_limit for i, _ in usable))
    return Watched(part, skipped, usable, sides, readers, squares.totals, words_limit, weights_limit)


def _encoded(part: Part, examples: Numbered) -> tuple[Encoded, list[Sides]]:
    """A batch, and which positions of each example are on which side."""
    encoded = part.subject.encode([e for _, e in examples], part.padding)
    return encoded, [sides_of(m, e, part.modality) for m, (_, e) in zip(encoded.maps, examples, strict=True)]


def _centroid(part: Part, side: str, readings: Sequence[Reading], counts: Sequence[int]) -> dict[str, Any]:
    """The sum of all tokens of one side over some examples (state width): each one's mean states times its tokens (`counts`)."""
    means = (
        np.asarray(reading.norm[side]["norm_of_mean"])[:, None] * reading.units[side].astype(np.float64) * count
        for reading, count in zip(readings, counts, strict=True)
    )
    total = sum(means, np.zeros(()))
    return _row(part, "", "centroid", side, vector=total.ravel(), n=len(readings))


def _row(part: Part, example: str, what: str, key: str, **rest: Any) -> dict[str, Any]:
    return {"modality": part.modality, "example": example, "what": what, "key": key, **rest}


def _reading_rows(part: Part, reading: Reading, words: bool) -> list[dict[str, Any]]:
    """Curves over layers, one row each; a site that a layer lacks is a null."""
    name, layers = reading.example, range(part.subject.n_layers)
    curves: list[tuple[str, str, Sequence[float | None]]] = []
    curves += [
        ("similar", f"{pairing}/{mode}", values) for pairing, table in reading.similar.items() for mode, values in table.items()
    ]
    curves += [("from_input", pairing, values) for pairing, values in reading.from_input.items()]
    curves += [
        ("site", f"{pairing}/{site}", [values.get(layer) for layer in layers])
        for pairing, table in reading.sites.items() for site, values in table.items()
    ]  # fmt: skip
    curves += [("norm", f"{side}/{kind}", values) for side, table in reading.norm.items() for kind, values in table.items()]
    curves += [
        ("drift", f"{side}/{interval}/{mode}", values)
        for side, table in reading.drift.items() for interval, modes in table.items() for mode, values in modes.items()
    ]  # fmt: skip
    if words:
        curves += [("words", f"{as_read}/{kind}", v) for as_read, table in reading.words.items() for kind, v in table.items()]
    return [_row(part, name, what, key, values=list(values)) for what, key, values in curves]


def _plane_rows(part: Part, reading: Reading) -> list[dict[str, Any]]:
    """Unit mean states of both sides at a few states."""
    count = part.subject.n_layers + 1
    drawn = sorted({round(i * (count - 1) / (PLANES - 1)) for i in range(PLANES)})
    return [_row(part, reading.example, "plane", f"{side}/{i}", vector=reading.units[side][i]) for side in SIDES for i in drawn]


def _sums(part: Part, readings: list[Reading], numbers: Sequence[int]) -> list[dict[str, Any]]:
    """Sums of unit mean states, from which means over all pairs follow; even and odd examples apart."""
    rows = []
    for half in (0, 1):
        own = [reading for reading, number in zip(readings, numbers, strict=True) if number % 2 == half]
        for side in SIDES:
            if own:
                total = np.sum([reading.units[side] for reading in own], 0, dtype=np.float64)
                rows.append(_row(part, "", "sum", f"{side}/{half}", vector=total.ravel(), n=len(own)))
    return rows


# --- a family of models ----------------------------------------------------------------------------------------------


def _member(setting: Setting, name: str, limit: int, asked: Sequence[Example]) -> list[dict[str, Any]]:
    """A model's scores on pictures, and what it can do: answers, and whether it says that things are there which are not."""
    subject = load_member(name, str(setting.subject.device), setting.subject.dtype)
    data = Data(setting.data.name, setting.data.examples[:limit], setting.data.fingerprint)
    part = Part("image", subject, data)
    same, first, right = [], [], []
    for _, items in units(len(data), setting.batch):
        some = [data.examples[i] for i in items if not _usable(subject, data.examples[i], "image")]
        if some:
            encoded = subject.encode(some)
            sides = [sides_of(m, e, "image") for m, e in zip(encoded.maps, some, strict=True)]
            readings = read_alignment(subject, encoded, sides, sites=())
            same += [score(reading.similar["matched"]["avg"]) for reading in readings]
            first += [score(reading.from_input["matched"]) for reading in readings]
            right += [_says(told, e.answer) for told, e in zip(subject.generate(encoded), some, strict=True)]
    polled = [_says(told, e.answer) for e, told in _answers(subject, asked, setting.batch)]
    invented = [not ok for ok, e in zip(polled, asked, strict=True) if (e.answer or "").lower() == "no"]
    found: dict[str, list[Any]] = {
        "input": first,
        "same": same,
        "accuracy": right,
        "existence": polled,
        "hallucination": invented,
    }
    return [
        _row(part, name, "member", key, values=[float(value) for value in values], n=len(values))
        for key, values in found.items()
    ]


def _existence(setting: Setting, limit: int) -> list[Example]:
    """Questions whether something is there; the demo world has as many as are wanted."""
    if setting.data.name == "demo":
        from studies.demo.data import SEED, examples

        return examples(limit, "picture", SEED + setting.seed, ("exist",))
    return [e for e in setting.data.examples if (e.answer or "").lower() in ("yes", "no")][:limit]


def _answers(subject: Subject, asked: Sequence[Example], batch: int) -> list[tuple[Example, str]]:
    found: list[tuple[Example, str]] = []
    for _, items in units(len(asked), batch):
        some = [asked[i] for i in items]
        found += zip(some, subject.generate(some), strict=True)
    return found


def _says(told: str, answer: str | None) -> bool:
    return told.strip().lower().rstrip(".") == (answer or "").strip().lower()
