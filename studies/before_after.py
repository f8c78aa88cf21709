"""What does compression change inside a model?

The dense model and the compressed one look at the same examples: where the answer's information flows (knock-outs in windows of layers), where
attention goes, how alike what is shown and the words are, and which questions are answered otherwise.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from compress.measure import Answers, answer
from compress.passes.layers import DropLayers
from compress.recipe import compress, read
from compress.saving import changes_of
from compress.smaller import Smaller
from compress.twin import simulated
from probe.alignment import Sides, read_alignment, sides_of
from probe.analysis.flow import FLOWS, change, default_window
from probe.edits import Knockout, window
from probe.errors import DataError, ReplayError, StudyError
from probe.example import Example
from probe.recorders import Mass
from probe.replay import Sweep, sweep
from probe.subject import Encoded, Subject
from probe.tracing import trace
from studies.before_after_report import SHOWN_FLOWS, figures, report, summarise
from studies.demo.family import load_member
from studies.measuring import gather
from studies.planning import planned, set_apart
from studies.run import Run, finite
from studies.study import Setting, Summary, describe, study
from studies.work import read_units, sift

SCHEMA = pa.schema([
    ("example", pa.string()), ("kind", pa.string()), ("model", pa.string()), ("what", pa.string()), ("flow", pa.string()),
    ("layer", pa.int32()), ("value", pa.float64()), ("said", pa.string()), ("right", pa.bool_()), ("n", pa.int32()), ("text", pa.string()),
])  # fmt: skip
MASSES = Mass(rows=("question", "last"), columns=("media", "question"))


@study
def before_after(
    setting: Setting,
    *,
    recipe: str = "",
    budget: float = 0.6,
    dense: str = "",
    evidence_data: str = "",
    window_width: int | None = None,
    max_new_tokens: int = 4,
) -> Summary:
    """What does compression change inside a model?

    Either `--model` is a compressed folder (the dense model is the one that it was made from, or `dense`), or it is the dense model and `recipe`
    says how it is compressed: without one, by the plan from evidence that reads a prompt at no more than `budget` of the dense FLOPs. What its
    passes or the plan ask for comes from `evidence_data`, or examples set apart. `window_width` is that of information-flow, in layers of each model.
    """
    if window_width is not None:
        window(0, window_width, setting.subject.n_layers)  # before anything is planned; what is left may have fewer layers
    setting, before, after = _models(setting, recipe, budget, dense, evidence_data)
    width = default_window(after.n_layers) if window_width is None else window_width
    window(0, width, after.n_layers)
    config = {
        "data": setting.data.name, "fingerprint": setting.data.fingerprint, "examples": len(setting.data), "batch": setting.batch,
        "width": width, "max_new_tokens": max_new_tokens, "seed": setting.seed, "padding": setting.padding, "before": describe(before),
        "steps": [{"title": step.title, "settings": dict(step.settings), "evidence": dict(step.evidence)} for step in after.ledger],
    }  # fmt: skip
    run = Run.open(setting.out, "before-after", config, describe(after), SCHEMA)
    numbers = {"before": list(range(before.n_layers)), "after": layers_left(after)}
    try:
        with run.recorded():
            return _carry_out(setting, run, {"before": before, "after": after}, numbers, width, max_new_tokens)
    finally:
        after.detach()


def _carry_out(
    setting: Setting, run: Run, models: Mapping[str, Subject], numbers: Mapping[str, list[int]], width: int, max_new_tokens: int
) -> Summary:  # fmt: skip
    rows = read_units(
        setting, run, "before and after", lambda some: unit(models, numbers, some, width, max_new_tokens, setting.padding)
    )
    summary = finite(summarise(rows, numbers, setting.seed))
    summary |= {"run": str(run.folder), "width": width, "steps": run.config["steps"]}
    figures(run, summary)
    run.finish(summary, report(summary, setting))
    return summary


def _models(setting: Setting, recipe: str, budget: float, dense: str, evidence_data: str) -> tuple[Setting, Subject, Smaller]:
    """What is asked of both, the dense model, and the compressed one. Raises StudyError where the question names only one of them."""
    subject = setting.subject
    if isinstance(subject, Smaller):
        if recipe:
            raise StudyError(
                f"{subject.name} is compressed already: name the dense model with --model where a --recipe is given"
            )
        source = dense or next(iter(subject.parents), "")
        if not source:
            raise StudyError(f"{subject.name} does not say what it was made from: name the dense model with --dense")
        return setting, load_member(source, str(subject.device), subject.dtype), subject
    asked = read(Path(recipe)) if recipe else None
    evident: Sequence[Example] = ()
    if asked is None or any(one.asks() for one in asked.passes):
        data, evident, _ = set_apart(setting.data, evidence_data)
        setting = replace(setting, data=data)
    if asked:
        return setting, subject, compress(subject, asked, gather(subject, asked, evident, setting.seed))
    made = planned(subject, evident, budget, seed=setting.seed, quiet=setting.quiet)
    return setting, subject, compress(subject, made.recipe, made.evidence)


def layers_left(smaller: Smaller) -> list[int]:
    """Which layer of the dense model each layer of a compressed one was."""
    drops = [one for one in changes_of(smaller.ledger) if isinstance(one, DropLayers)]
    left = list(range(smaller.n_layers + sum(len(set(one.layers)) for one in drops)))
    for one in drops:
        left = [layer for number, layer in enumerate(left) if number not in one.layers]
    return left


# --- one unit of work ------------------------------------------------------------------------------------------------


def unit(
    models: Mapping[str, Subject], numbers: Mapping[str, list[int]], examples: Sequence[Example], width: int, max_new_tokens: int,
    padding: Any = "left",
) -> list[dict[str, Any]]:  # fmt: skip
    """All rows of some examples, of both models; an example that cannot be put to them is a row that says why."""
    usable, rows = sift(examples, lambda example: _check(models["before"], example))
    if not usable:
        return rows
    smaller = models["after"]
    assert isinstance(smaller, Smaller)
    encoded = smaller.encode(usable, padding)
    right = {name: answer(model, [model.encode(usable)], max_new_tokens) for name, model in models.items()}
    with simulated(smaller, [encoded, *(smaller.encode(example, padding) for example in usable)]) as twin:
        after = _looked(twin, encoded, width)
        stays = _stays(twin, encoded)
        after |= {"alike": _alike(twin, encoded, stays)}
    gone = min((one.layer for one in smaller.reducers if one.select is None), default=smaller.n_layers)
    after["alike"] = [[*values[: gone + 1], *[float("nan")] * (len(values) - gone - 1)] for values in after["alike"]]
    kept = [0 if gone < smaller.n_layers else len(one) for one in stays]
    dense = models["before"]
    before = {**_looked(dense, encoded, width), "alike": _alike(dense, encoded, stays)}
    for name, looked in (("before", before), ("after", after)):
        rows += _rows(name, looked, numbers[name], usable, right[name], kept)
    return rows


def _check(subject: Subject, example: Example) -> None:
    if example.answer is None:
        raise DataError(f"example {example.id!r} has no answer to compare with")
    if not any(example.media.values()):
        raise DataError(f"example {example.id!r} has no picture, video or sound")
    subject.encode(example)


def _looked(subject: Subject, encoded: Encoded, width: int) -> dict[str, Any]:
    """The effect of every knock-out (example entry), in percent of the answer's probability, and attention masses by flow and layer."""
    entries = _entries(subject.n_layers, width)
    swept = _swept(subject, encoded, [entry for *_, entry in entries])
    tokens = swept.clean.argmax(-1).tolist()
    relative = [change(swept.clean[i], swept.edited[i], token).relative for i, token in enumerate(tokens)]
    mass = trace(subject, encoded, [MASSES])["mass"]
    masses = {
        flow: mass.at(row_group=FLOWS[flow][0], column_group=FLOWS[flow][1]).mean(-1).cpu().numpy() for flow in SHOWN_FLOWS
    }
    return {"entries": [entry[:2] for entry in entries], "relative": relative, "mass": masses}


def _entries(n_layers: int, width: int) -> list[tuple[str, int, Knockout]]:
    found = [
        (flow, center, Knockout(*FLOWS[flow], window(center, width, n_layers))) for flow in SHOWN_FLOWS for center in range(n_layers)
    ]  # fmt: skip
    return found + [
        ("image from here on", start, Knockout("text", "media", range(start, n_layers))) for start in range(n_layers)
    ]


def _swept(subject: Subject, encoded: Encoded, entries: list[Knockout]) -> Sweep:
    """Replayed where that is exact; else one forward for each entry."""
    try:
        return sweep(subject, encoded, entries)
    except ReplayError:
        return sweep(subject, encoded, entries, method="naive")


def _stays(twin: Smaller, encoded: Encoded) -> list[np.ndarray]:
    """What is shown and never dropped of each example; all of it where everything leaves in the end, up to the layer where it does."""
    found = []
    read = twin.runtime.read if twin.runtime is not None else None
    for i, token_map in enumerate(encoded.maps):
        shown = token_map.positions("media")
        hidden = read.hidden[i].cpu().numpy()[shown] if read is not None else np.zeros(len(shown), dtype=bool)
        found.append(shown if hidden.all() else shown[~hidden])
    return found


def _alike(subject: Subject, encoded: Encoded, stays: Sequence[np.ndarray]) -> list[list[float]]:
    """SimAvg of what stays and of the words, by state, for each example."""
    sides = []
    for token_map, example, shown in zip(encoded.maps, encoded.examples, stays, strict=True):
        modality = next(name for name, media in zip(("image", "video", "audio"), example.media.values(), strict=True) if media)
        sides.append(Sides(shown, sides_of(token_map, example, modality).textual))
    return [reading.similar["matched"]["avg"] for reading in read_alignment(subject, encoded, sides, sites=())]


def _rows(
    name: str, looked: Mapping[str, Any], numbers: list[int], examples: Sequence[Example], answers: Answers, kept: Sequence[int]
) -> list[dict[str, Any]]:  # fmt: skip
    rows = []
    for i, example in enumerate(examples):
        own = {"example": example.id, "kind": example.tags.get("kind", ""), "model": name}
        rows.append(
            {**own, "what": "answer", "said": answers.said[i], "right": bool(answers.right[i]), "n": kept[i],
             "text": str(int(answers.first[i].argmax()))}
        )  # fmt: skip
        rows += [
            {**own, "what": "flow", "flow": flow, "layer": numbers[layer], "value": float(value)}
            for (flow, layer), value in zip(looked["entries"], looked["relative"][i], strict=True)
        ]
        for flow, mass in looked["mass"].items():
            rows += [
                {**own, "what": "mass", "flow": flow, "layer": numbers[k], "value": float(value)} for k, value in enumerate(mass[:, i])
            ]  # fmt: skip
        states = [0, *(layer + 1 for layer in numbers)]
        rows += [
            {**own, "what": "alike", "layer": state, "value": float(value)}
            for state, value in zip(states, looked["alike"][i], strict=True)
        ]
    return rows
