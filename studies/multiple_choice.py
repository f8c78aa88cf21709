"""Does the model choose right, by what it writes and by what it finds likely?

Two ways to read a choice off a model, on the same questions: the option that its answer names, and the option whose own words it finds
likeliest (SEED-Bench, arXiv 2307.16125). Whether the two agree, whether likelihood knows how sure to be (ChEF, arXiv 2311.02692), and whether the
order in which options are shown decides (MMBench's circular accuracy, arXiv 2307.06281). Data of triplets has MMEvalPro's scores as well (arXiv
2407.00468).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, get_args

import pyarrow as pa

from probe.errors import ExampleError, StudyError, did_you_mean
from probe.example import Example
from probe.likelihood import Likelihood, Method, Reduce, cannot_share, score_options
from probe.subject import Subject
from studies.asking import alike
from studies.run import Run, finite
from studies.study import Setting, Summary, describe, study
from studies.tasks.relabelling import MOST, ORIGIN, SETTINGS, parse_label, relabelled
from studies.tasks.scores_choice import listed, parse_choice, rotations
from studies.work import Rows, read_units, sift

SCHEMA = pa.schema([
    ("example", pa.string()), ("what", pa.string()), ("kind", pa.string()), ("rotation", pa.int32()), ("text", pa.string()), ("count", pa.int32()),
    ("right", pa.int32()), ("chosen", pa.int32()), ("sums", pa.list_(pa.float64())), ("tokens", pa.list_(pa.int32())), ("bytes", pa.list_(pa.int32())),
    ("labels", pa.string()), ("group", pa.string()), ("triplet", pa.string()), ("part", pa.string()),
])  # fmt: skip
STYLES = ("auto", "letters", "words")
SPELLINGS = ("both", "given")


@dataclass(frozen=True)
class Plan:
    """The study's own options."""

    spelling: str = "both"
    show: str = "auto"
    rotate: bool = True
    blind: bool = True
    relabel: bool = False
    max_new_tokens: int = 16


@study
def multiple_choice(
    setting: Setting, *, reduce: str = "mean", spelling: str = "both", show: str = "auto", rotate: bool = True, blind: bool = True,
    relabel: bool = False, max_new_tokens: int = 16,
) -> Summary:  # fmt: skip
    """Does the model choose right, by what it writes and by what it finds likely?

    `reduce` makes one number of an option's tokens (mean, sum, per-byte); `spelling` is which words stand for an option (both: as it is given and
    with a capital, the likelier of the two; given: that alone, as published); `show` is how options are written where their order is
    turned (letters, words; auto: by letters where the data shows them so, else as words after the question); `rotate` asks in every
    rotation of the options; `blind` asks once without the picture; `relabel` asks for other names than letters (ChEF); `max_new_tokens` is how long an answer may be.
    """
    if reduce not in get_args(Reduce):
        raise StudyError(f"there is no way {reduce!r} to make one number of tokens{did_you_mean(reduce, get_args(Reduce))}")
    if show not in STYLES:
        raise StudyError(f"there is no way {show!r} to show options{did_you_mean(show, STYLES)}")
    if spelling not in SPELLINGS:
        raise StudyError(f"there is no spelling {spelling!r}{did_you_mean(spelling, SPELLINGS)}")
    config = {
        "data": setting.data.name, "fingerprint": setting.data.fingerprint, "limit": len(setting.data), "batch": setting.batch,
        "padding": setting.padding, "seed": setting.seed, "reduce": reduce, "spelling": spelling, "show": show, "rotate": rotate,
        "blind": blind, "relabel": relabel, "max_new_tokens": max_new_tokens,
    }  # fmt: skip
    run = Run.open(setting.out, "multiple-choice", config, describe(setting.subject), SCHEMA)
    with run.recorded():
        from studies.multiple_choice_report import figures, report, summarise

        plan = Plan(spelling, show, rotate, blind, relabel, max_new_tokens)
        rows = read_units(setting, run, "multiple choice", lambda some: unit(setting.subject, some, plan))
        summary = finite(summarise(rows, reduce, setting.data.problems, setting.seed))
        summary |= {"run": str(run.folder), "model": setting.subject.name, "reduce": reduce}
        figures(run, summary)
        run.finish(summary, report(summary))
        return summary


# --- one unit of work ------------------------------------------------------------------------------------------------


def right_choice(example: Example) -> int:
    """The index of the right one among an example's choices. Raises ExampleError where there are none, or it is not among them."""
    choices = [choice.strip().lower() for choice in example.choices]
    if len(choices) < 2:
        raise ExampleError(f"example {example.id!r} offers {len(choices)} choices, and choosing needs two")
    if (answer := (example.answer or "").strip().lower()) not in choices:
        raise ExampleError(f"the answer of example {example.id!r} ({example.answer!r}) is not among its choices")
    return choices.index(answer)


def unit(subject: Subject, examples: Sequence[Example], plan: Plan) -> Rows:
    """Rows of some examples: as they are asked, in every order of their options, without their picture, under other names; and of those left out."""

    def check(example: Example) -> None:
        right_choice(example)
        if len({choice.strip().lower() for choice in example.choices}) < len(example.choices):
            raise ExampleError(f"example {example.id!r} offers a choice twice")
        subject.encode(example)

    usable, rows = sift(examples, check)
    for group in alike(usable):  # ScienceQA has questions with a picture and without
        rows += _seen(subject, [usable[i] for i in group], plan)
    place = {example.id: i for i, example in enumerate(examples)}
    return sorted(rows, key=lambda row: place[row["example"]])  # whatever the batch: bootstraps draw by place


def _seen(subject: Subject, examples: Sequence[Example], plan: Plan) -> Rows:
    """Rows of examples that all bring the same kinds of media."""
    rows = _rows(subject, examples, "asked", 0, plan)
    if plan.rotate:
        for turn in range(max(len(example.choices) for example in examples)):
            rows += _rows(subject, [e for e in examples if len(e.choices) > turn], "turned", turn, plan)
    if plan.blind and any(examples[0].media.values()):
        hidden, _ = sift([subject.without_media(example) for example in examples], subject.encode)
        rows += _rows(subject, hidden, "blind", 0, plan)
    if plan.relabel:
        for kind, which in (ORIGIN, *SETTINGS):
            rows += _renamed(subject, [e for e in examples if len(e.choices) <= MOST], kind, which, plan)
    return rows


def _rows(subject: Subject, examples: Sequence[Example], what: str, turn: int, plan: Plan) -> Rows:
    """One row of each example, asked as it is or, where orders are `turned`, with its options shown in one rotation."""
    if not examples:
        return []
    orders = [rotations(len(e.choices))[turn] for e in examples]
    styles = [style_of(e, plan.show) if what == "turned" else "" for e in examples]
    asked = [listed(e, order, style) if style else e for e, order, style in zip(examples, orders, styles, strict=True)]
    told = subject.generate(subject.encode(asked), plan.max_new_tokens)
    found = _likelihoods(subject, asked, plan.spelling)
    return [
        _row(example, what, turn, text, one, order, style == "letters" or (not style and bool(example.options)))
        for example, text, one, order, style in zip(examples, told, found, orders, styles, strict=True)
    ]


def _renamed(subject: Subject, examples: Sequence[Example], kind: str, which: int, plan: Plan) -> Rows:
    """One row of each example, its options shown by letter and other names asked for; likelihoods are those of the names."""
    if not examples:
        return []
    asked, names = zip(*(relabelled(example, kind, which) for example in examples), strict=True)
    told = subject.generate(subject.encode(asked), plan.max_new_tokens)
    found = score_options(subject, asked, names, _method(subject))
    return [
        {"example": example.id, "what": "renamed", "labels": f"{kind} {which}", "text": text, "count": len(mine), "right": right_choice(example),
         "chosen": parse_label(text, mine), **_numbers(one)}
        for example, mine, text, one in zip(examples, names, told, found, strict=True)
    ]  # fmt: skip


def _method(subject: Subject) -> Method:
    return "whole" if cannot_share(subject) else "prefix"


def _numbers(found: Likelihood) -> dict[str, Any]:
    return {
        "sums": found.by("sum").tolist(), "tokens": [len(one) for one in found.log_probs],
        "bytes": [len(option.strip().encode()) for option in found.options],
    }  # fmt: skip


def _likelihoods(subject: Subject, examples: Sequence[Example], spelling: str) -> list[Likelihood]:
    """How likely each choice is: as it is given, or in the likelier of two spellings, as models differ in how they begin an answer."""
    given = [[choice.strip() for choice in example.choices] for example in examples]
    capital = [[f"{c[:1].upper()}{c[1:]}" if spelling == "both" else c for c in choices] for choices in given]
    found = score_options(
        subject, examples, [list(dict.fromkeys(a + b)) for a, b in zip(given, capital, strict=True)], _method(subject)
    )
    made = []
    for one, a, b in zip(found, given, capital, strict=True):
        likely = dict(zip(one.options, one.by("sum"), strict=True))
        at = [one.options.index(max((x, y), key=lambda name: likely[name])) for x, y in zip(a, b, strict=True)]
        made.append(
            Likelihood(tuple(one.options[i] for i in at), tuple(one.log_probs[i] for i in at), tuple(one.greedy[i] for i in at))
        )
    return made


def style_of(example: Example, show: str) -> str:
    return show if show != "auto" else "letters" if example.options else "words"


def _row(
    example: Example, what: str, turn: int, text: str, found: Likelihood, order: Sequence[int], lettered: bool
) -> dict[str, Any]:  # fmt: skip
    named = parse_choice(text, [example.choices[i] for i in order], lettered)
    return {
        "example": example.id, "what": what, "kind": example.tags.get("kind", ""), "rotation": turn, "text": text,
        "count": len(example.choices), "right": right_choice(example), "chosen": None if named is None else order[named],
        **_numbers(found), **{name: example.tags.get(name, "") for name in ("group", "triplet", "part")},
    }  # fmt: skip
