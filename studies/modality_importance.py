"""Which modality does each answer need?

Every question is asked with every subset of what it comes with: its picture, clip or sound, its context (for the demo, the text
twin of the scene), all of them, none. The Modality Importance Score (arXiv 2408.12763) and its categories follow; whether they mean
anything is seen by exchanging one modality for another example's. Negative controls take the medium away by degrees, and MM-SHAP
(arXiv 2212.08158) says how much of the answer's probability its tokens carry.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any
from zlib import crc32

import pyarrow as pa

from probe import controls
from probe.analysis.modality import shares
from probe.controls import modalities
from probe.errors import ExampleError, SightlineError, StudyError
from probe.example import Example
from probe.shares import contributions
from probe.subject import Subject
from studies.asking import Told, ask
from studies.modality_conditions import conditions
from studies.run import Run, finite
from studies.study import Setting, Summary, describe, study
from studies.work import Rows, read_units, refuse_nothing, sift

SCHEMA = pa.schema([
    ("example", pa.string()), ("kind", pa.string()), ("modalities", pa.string()), ("what", pa.string()), ("condition", pa.string()),
    ("right", pa.bool_()), ("prob", pa.float64()), ("answer", pa.string()), ("text", pa.string()),
])  # fmt: skip


@dataclass(frozen=True)
class Plan:
    """What is done with each example."""

    twins: bool
    max_new_tokens: int
    cells: int
    slices: int
    shap_limit: int
    shap_orders: int
    shap_groups: int


@study
def modality_importance(
    setting: Setting,
    *,
    twins: bool = True,
    max_new_tokens: int = 16,
    cells: int = controls.CELLS,
    slices: int = controls.SLICES,
    shap_limit: int = 8,
    shap_orders: int = 4,
    shap_groups: int = 4,
) -> Summary:
    """Which modality does each answer need?

    `twins` gives the demo's examples the text twin of their scene for a context; other data bring their own, or none. `cells` (on each
    side of a picture) and `slices` (of a sound) are what the shuffled control shuffles. MM-SHAP is computed for the first
    `shap_limit` examples (0: none), from `shap_orders` random orders of `shap_groups` groups of tokens of each modality.
    """
    for option, value, least in (
        ("cells", cells, 2),
        ("slices", slices, 2),
        ("shap_orders", shap_orders, 1),
        ("shap_groups", shap_groups, 1),
    ):
        if value < least:
            raise StudyError(f"{option} must be {least} or more, not {value}")
    plan = Plan(twins, max_new_tokens, cells, slices, shap_limit, shap_orders, shap_groups)
    config = {
        **vars(plan), "data": setting.data.name, "fingerprint": setting.data.fingerprint, "limit": len(setting.data),
        "batch": setting.batch, "padding": setting.padding, "seed": setting.seed,
    }  # fmt: skip
    run = Run.open(setting.out, "modality-importance", config, describe(setting.subject), SCHEMA)
    with run.recorded():
        return _carry_out(setting, run, plan)


def _carry_out(setting: Setting, run: Run, plan: Plan) -> Summary:
    from studies.modality_importance_report import figures, report, summarise

    told = [_with_twin(e) if plan.twins else e for e in setting.data.examples]
    places = {example.id: i for i, example in enumerate(told)}
    rows = read_units(setting, run, "modality importance", lambda some: unit(setting, plan, told, [places[e.id] for e in some]))
    summary = finite(summarise(rows, setting.seed))
    refuse_nothing(rows, summary["n"])
    summary["run"] = str(run.folder)
    figures(run, summary)
    run.finish(summary, report(summary, setting))
    return summary


def _with_twin(example: Example) -> Example:
    """A demo example with its scene's text twin for a context."""
    from studies.demo.data import twin

    return example if example.context else replace(example, context=twin(example))


# --- one unit of work ------------------------------------------------------------------------------------------------


def unit(setting: Setting, plan: Plan, told: Sequence[Example], numbers: Sequence[int]) -> Rows:
    """All rows of some examples of `told`, each under every condition; one that cannot be asked at all is a row that says why."""
    subject = setting.subject
    came = {setting.data.examples[i].id: setting.data.examples[i] for i in numbers}
    usable, rows = sift([told[i] for i in numbers], lambda e: _check(subject, e, came[e.id]))
    places = {told[i].id: i for i in numbers}
    asked = {
        e.id: conditions(subject, e, came[e.id], told, places[e.id], setting.seed, plan.cells, plan.slices) for e in usable
    }
    for condition in dict.fromkeys(name for made in asked.values() for name in made):
        some = [(e, asked[e.id][condition]) for e in usable if condition in asked[e.id]]
        put, refused = _made(some)
        rows += [_row(e, condition, Told(refused=text)) for e, text in refused]
        answers = ask(setting, [example for _, example in put], plan.max_new_tokens)
        rows += [_row(e, condition, answer) for (e, _), answer in zip(put, answers, strict=True)]
    for number in numbers:
        if number < plan.shap_limit and told[number].id in asked:
            rows += _shares(setting, plan, came[told[number].id])
    return rows


def _check(subject: Subject, example: Example, came: Example) -> None:
    if example.answer is None:
        raise ExampleError(f"example {example.id!r} has no right answer to be held against")
    if not any(example.media.values()):
        raise ExampleError(f"example {example.id!r} has no picture, clip or sound to be without")
    subject.encode(came)


def _made(
    some: Sequence[tuple[Example, Callable[[], Example]]],
) -> tuple[list[tuple[Example, Example]], list[tuple[Example, str]]]:
    put, refused = [], []
    for example, make in some:
        try:
            put.append((example, make()))
        except SightlineError as error:
            refused.append((example, str(error)))
    return put, refused


def _row(example: Example, condition: str, told: Told) -> dict[str, Any]:
    row = {
        "example": example.id, "kind": example.tags.get("kind", ""), "modalities": "+".join(modalities(example)),
        "condition": condition,
    }  # fmt: skip
    if told.refused:
        return {**row, "what": "refused", "text": told.refused}
    return {**row, "what": "answer", "right": told.right, "prob": told.prob, "answer": told.text}


def _shares(setting: Setting, plan: Plan, example: Example) -> Rows:
    """MM-SHAP of one example: each modality's share, beside its share of the players."""
    row = {"example": example.id, "modalities": "+".join(modalities(example)), "kind": example.tags.get("kind", "")}
    try:
        seed = setting.seed + crc32(example.id.encode()) % 2**31
        found = contributions(setting.subject, example, plan.shap_groups, plan.shap_orders, seed, setting.batch)
    except SightlineError as error:
        return [{**row, "what": "no shares", "text": str(error)}]
    even = {name: found.owners.count(name) / len(found.owners) for name in dict.fromkeys(found.owners)}
    return [
        {**row, "what": what, "condition": name, "prob": value}
        for what, table in (("share", shares(found.values, found.owners)), ("even", even)) for name, value in table.items()
    ]  # fmt: skip
