"""Does the model say that things are there which are not?

POPE (arXiv 2305.10355) on any model: existence questions in three splits of absent things (random, popular, adversarial), answered in words
and by the likelihood of yes and no, with the picture and without it; beside it how alike the same pictures' tokens are to the words
(arXiv 2405.16700), which is said to go with fewer hallucinations.
"""

from collections.abc import Sequence
from typing import Any

import pyarrow as pa

from probe.alignment import read_alignment, sides_of
from probe.analysis.alignment import score
from probe.errors import SightlineError, StudyError
from probe.example import Example
from probe.likelihood import Method, cannot_share, score_options
from probe.subject import Side, Subject
from studies.data import TELLINGS, Data
from studies.demo.family import load_member
from studies.run import Run, finite
from studies.study import Setting, Summary, describe, progress, study, units
from studies.tasks.scores_pope import asked_object, parse_yes_no
from studies.work import Rows, sift

SCHEMA = pa.schema([
    ("model", pa.string()), ("example", pa.string()), ("what", pa.string()), ("split", pa.string()), ("object", pa.string()), ("there", pa.bool_()),
    ("text", pa.string()), ("verdict", pa.string()), ("official", pa.string()), ("p_yes", pa.float64()), ("input", pa.float64()), ("same", pa.float64()),
])  # fmt: skip
SPELLINGS = ("yes", "Yes", "no", "No")
DEMOS = ("demo", "demo:frozen")


@study
def pope(setting: Setting, *, models: str = "auto", blind: bool = True, max_new_tokens: int = 8) -> Summary:
    """Does the model say that things are there which are not?

    `models` are others that are asked the same, separated by commas (auto: `demo` and `demo:frozen` are shown side by side; none: the model
    alone); `blind` asks everything a second time without the picture; `max_new_tokens` is how long an answer may be.
    """
    if max_new_tokens < 1:
        raise StudyError(f"an answer needs at least one token, not {max_new_tokens}")
    names = _models(setting, models)
    asked = questions(setting)
    config = {
        "data": setting.data.name, "fingerprint": setting.data.fingerprint, "limit": len(setting.data), "batch": setting.batch,
        "padding": setting.padding, "seed": setting.seed, "models": names, "blind": blind, "max_new_tokens": max_new_tokens,
    }  # fmt: skip
    run = Run.open(setting.out, "pope", config, describe(setting.subject), SCHEMA)
    with run.recorded():
        return _carry_out(setting, run, asked, names, blind, max_new_tokens)


def _models(setting: Setting, models: str) -> list[str]:
    """The model itself first, then those that it is shown beside."""
    own, others = setting.subject.name, [name.strip() for name in models.split(",") if name.strip()]
    if others == ["auto"]:
        others = list(DEMOS) if own in DEMOS and setting.data.name == "demo" else []
    elif others == ["none"]:
        others = []
    return list(dict.fromkeys([own, *others]))


def questions(setting: Setting) -> Data:
    """The existence questions: the demo world has as many as there are examples, other data those that are answered yes or no.

    Raises StudyError where other data holds none.
    """
    data = setting.data
    if data.name in TELLINGS:
        from studies.demo.data import SEED, examples

        made = examples(len(data), TELLINGS[data.name], SEED + setting.seed, ("exist",))
        return Data(data.name, tuple(made), data.fingerprint)
    found = tuple(e for e in data.examples if (e.answer or "").strip().lower() in ("yes", "no"))
    if not found:
        raise StudyError(f"{data.name} has no question that is answered yes or no: name pope:PATH, or other data that has")
    return Data(data.name, found, data.fingerprint, data.problems)


def _carry_out(
    setting: Setting, run: Run, asked: Data, names: list[str], blind: bool, max_new_tokens: int
) -> Summary:  # fmt: skip
    from studies.pope_report import figures, report, summarise

    work = units(len(asked), setting.batch)
    keys = {name: [f"{_slug(name)}-{key}" for key, _ in work] for name in names}
    with progress("pope", len(asked) * len(names), setting.quiet) as advance:
        for name in names:
            todo = set(run.pending(keys[name]))
            subject = setting.subject
            if todo and name != setting.subject.name:
                subject = load_member(name, str(setting.subject.device), setting.subject.dtype)
            for key, (_, items) in zip(keys[name], work, strict=True):
                if key in todo:
                    rows = unit(subject, [asked.examples[i] for i in items], setting.padding, blind, max_new_tokens)
                    run.write(key, [{"model": name, **row} for row in rows])
                advance(len(items))
    summary = finite(summarise(run.rows(key for own in keys.values() for key in own), names, asked.problems, setting.seed))
    summary["run"] = str(run.folder)
    figures(run, summary)
    run.finish(summary, report(summary, setting))
    return summary


def _slug(name: str) -> str:
    return name.strip("/").replace(":", "-").replace("/", "-")


# --- one unit of work ------------------------------------------------------------------------------------------------


def unit(subject: Subject, examples: Sequence[Example], padding: Side, blind: bool, max_new_tokens: int) -> Rows:
    """A row of each example as it is asked, one of it without its picture, and one of each that cannot be asked."""
    usable, rows = sift(examples, subject.encode)
    if not usable:
        return rows
    scores = ima(subject, usable, padding)
    for example, row, found in zip(usable, _answered(subject, usable, max_new_tokens), scores, strict=True):
        rows.append({**_about(example), "what": "answer", **row, **found})
    if blind and any(any(example.media.values()) for example in usable):
        hidden, _ = sift([subject.without_media(example) for example in usable], subject.encode)
        told = _answered(subject, hidden, max_new_tokens) if hidden else []
        rows += [{**_about(e), "what": "blind", **row} for e, row in zip(hidden, told, strict=True)]
    return rows


def _about(example: Example) -> dict[str, Any]:
    return {
        "example": example.id, "split": example.tags.get("split", "all"), "object": example.tags.get("object") or asked_object(example.prompt),
        "there": (example.answer or "").strip().lower() == "yes",
    }  # fmt: skip


def _answered(subject: Subject, examples: Sequence[Example], max_new_tokens: int) -> Rows:
    """What the model writes, and how likely it finds a yes: p(yes) over both spellings of yes and of no."""
    told = subject.generate(subject.encode(examples), max_new_tokens)
    method: Method = "whole" if cannot_share(subject) else "prefix"
    found = score_options(subject, examples, [SPELLINGS] * len(examples), method)
    return [
        {
            "text": text, "verdict": parse_yes_no(text), "official": parse_yes_no(text, "official"),
            "p_yes": float(one.probabilities("sum")[:2].sum()),
        }
        for text, one in zip(told, found, strict=True)
    ]  # fmt: skip


def ima(subject: Subject, examples: Sequence[Example], padding: Side) -> list[dict[str, float | None]]:
    """The IMA score of each example in both readings (`input`, `same`); None where it has no tokens of a picture to compare."""
    none: dict[str, float | None] = {"input": None, "same": None}
    encoded = subject.encode(examples, padding)
    sides = []
    for token_map, example in zip(encoded.maps, examples, strict=True):
        modality = next((kind for kind, media in example.media.items() if media), "text")
        try:
            sides.append(sides_of(token_map, example, modality))
        except SightlineError:
            return [none] * len(examples)  # a family, not an example, keeps its pictures elsewhere
    readings = read_alignment(subject, encoded, sides, sites=())
    return [
        {"input": score(reading.from_input["matched"]), "same": score(reading.similar["matched"]["avg"])} for reading in readings
    ]  # fmt: skip
