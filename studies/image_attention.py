"""Does a model that looks away from the picture say what is not there?

Visual attention ratios (arXiv 2411.16724, "Devils in the Middle Layers") on any model: how much of the attention of the position that
writes the answer goes to the picture, by layer and head, and whether it tells answers that are wrong from answers that are right:
first of all things that are said to be there and are not. One forward pass for each example, beside the answer itself.
"""

from dataclasses import replace
from typing import Any

import pyarrow as pa

from probe.analysis.svar import MIDDLE
from probe.errors import StudyError, did_you_mean
from probe.example import Example
from probe.recorders import Mass
from probe.surroundings import check_in_sequence, surroundings
from probe.tracing import trace
from studies.data import Data
from studies.run import Run, finite
from studies.shown import alike, check_shown
from studies.study import Setting, Summary, describe, study
from studies.work import read_units, sift

SCHEMA = pa.schema([
    ("example", pa.string()), ("what", pa.string()), ("kind", pa.string()), ("values", pa.list_(pa.float64())), ("prob", pa.float64()),
    ("answer", pa.string()), ("text", pa.string()), ("correct", pa.bool_()),
])  # fmt: skip
QUESTIONS = ("auto", "existence", "all")


@study
def image_attention(
    setting: Setting,
    *,
    questions: str = "auto",
    middle_start: float = MIDDLE[0],
    middle_stop: float = MIDDLE[1],
    max_new_tokens: int = 16,
) -> Summary:
    """Does a model that looks away from the picture say what is not there?

    `questions`: `existence`, those answered yes or no (the demo world asks as many as are wanted), `all`, or `auto`: those of existence
    where the data is the demo's, else all. `middle_start` and `middle_stop` bound the middle layers, as shares of them all.
    """
    from studies.image_attention_report import figures, report, summarise

    if questions not in QUESTIONS:
        raise StudyError(f"there are no questions {questions!r}{did_you_mean(questions, QUESTIONS)}")
    if not 0 <= middle_start < middle_stop <= 1:
        raise StudyError(
            f"the middle layers are shares from 0 to 1, the first before the last, not {middle_start:g} to {middle_stop:g}"
        )
    check_in_sequence(setting.subject)
    setting = replace(setting, data=_asked(setting, questions))
    subject, data = setting.subject, setting.data
    config = {
        "data": data.name, "fingerprint": data.fingerprint, "limit": len(data), "batch": setting.batch, "padding": setting.padding,
        "seed": setting.seed, "questions": questions, "middle": [middle_start, middle_stop], "max_new_tokens": max_new_tokens,
    }  # fmt: skip
    run = Run.open(setting.out, "image-attention", config, describe(subject), SCHEMA)
    with run.recorded():
        rows = read_units(setting, run, "image attention", lambda examples: unit(setting, examples, max_new_tokens))
        layers = [layer for layer, name in enumerate(subject.anatomy.attention) if name is not None]
        summary = finite({"run": str(run.folder), **summarise(rows, layers, subject.n_layers, subject.n_heads, config)})
        figures(run, summary)
        run.finish(summary, report(summary, setting))
    return summary


def _asked(setting: Setting, questions: str) -> Data:
    """The examples that are asked; the demo world makes as many questions of existence as there were examples."""
    data = setting.data
    if data.name == "demo" and questions != "all":
        from studies.demo.data import SEED, examples

        made = examples(len(data), "picture", SEED + setting.seed, ("exist",))
        return Data("demo", tuple(made), f"{data.fingerprint}:exist:{setting.seed}")
    if questions != "existence":
        return data
    kept = tuple(e for e in data.examples if (e.answer or "").strip().lower() in ("yes", "no"))
    if not kept:
        raise StudyError(f"{data.name} has no question that is answered yes or no: ask --questions all")
    return Data(data.name, kept, f"{data.fingerprint}:exist")


def unit(setting: Setting, examples: list[Example], max_new_tokens: int) -> list[dict[str, Any]]:
    """One row for each example: its attention to what is shown (layer head), its answer, and how sure the model was of it."""
    subject = setting.subject
    usable, rows = sift(examples, lambda example: _check(setting, example))
    for some in alike(usable):
        seen = trace(subject, subject.encode(some, setting.padding), [Mass(("last",), ("media",))])
        told = subject.generate(some, max_new_tokens)
        sure = seen.logits.softmax(-1).amax(-1)
        for i, (example, answer) in enumerate(zip(some, told, strict=True)):
            ratio = seen["mass"].at(batch=i, row_group="last", column_group="media")
            rows.append({
                "example": example.id, "what": "ratio", "kind": example.tags.get("kind", ""), "prob": float(sure[i]),
                "values": ratio.double().flatten().tolist(), "answer": plain(example.answer or ""), "text": plain(answer),
                "correct": plain(answer) == plain(example.answer or ""),
            })  # fmt: skip
    return rows


def _check(setting: Setting, example: Example) -> None:
    check_shown(example, answer=True)
    surroundings(setting.subject.encode(example).maps[0])


def plain(answer: str) -> str:
    """An answer as it is compared: stripped, in lower case, without a full stop at its end."""
    return answer.strip().lower().rstrip(".")
