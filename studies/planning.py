"""Plans from evidence: the examples that they rest on, the runs that they read, and what is said of them."""

import json
from collections.abc import Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from compress.planning import UNITS, Cost, Plan, measurements, plan
from probe.analysis.stats import bootstrap_mean
from probe.errors import StudyError
from probe.example import Example
from probe.subject import Subject
from studies.data import TELLINGS, Data, apart, load_data
from studies.study import describe, progress
from studies.telling import bracketed

APART = 64  # examples that evidence comes from


def set_apart(data: Data, source: str = "") -> tuple[Data, tuple[Example, ...], str]:
    """What is measured, the examples that evidence comes from, and what these are in words: none of them is measured.

    They are those of `source` (less what is measured too); else what `studies.data.apart` takes: other scenes of the demo, or half of the data.
    Raises StudyError where `source` has nothing but what is measured, DataError where the data are too few to be parted.
    """
    if not source:
        asked, examples = apart(data, APART)
        return asked, examples, f"{len(examples)} other {'scenes' if data.name in TELLINGS else 'examples'} of {data.name}"
    own = int(data.fingerprint.rsplit(":", 1)[1]) if data.name in TELLINGS else 0
    measured = {_content(one) for one in data.examples}
    found = load_data(source, APART, seed=own + 1000).examples  # of the bundled world other scenes, as `apart` has it
    examples = tuple(one for one in found if _content(one) not in measured)
    if not examples:
        raise StudyError(f"{source} has nothing but the questions that are measured: name other data with --evidence-data")
    return data, examples, f"{len(examples)} examples of {source}"


def _content(example: Example) -> tuple[Any, ...]:
    """What is asked of what, whatever its id."""
    media = tuple(_medium(one) for kind in example.media.values() for one in kind)
    words = (example.prompt, example.context, example.options, example.suffix, example.answer)
    return (*words, media, example.regions, tuple(sorted(example.tags.items())))


def _medium(medium: Any) -> str:
    """A medium by its content where it is in memory, else by its place, or by what it is made from."""
    return sha256(medium.tobytes()).hexdigest() if hasattr(medium, "tobytes") else repr(medium)


def planned(
    subject: Subject, examples: Sequence[Example], budget: float, runs: Sequence[str | Path] = (), seed: int = 0, quiet: bool = True,
    cost: Cost = "flops",
) -> Plan:  # fmt: skip
    """A plan for a budget from examples and from runs of information-flow and implicit-alignment on the same model."""
    evidence = evidence_of(subject, runs)
    with progress("pricing steps", measurements(subject, len(examples)), quiet, "measurements") as advance:
        return plan(subject, examples, budget, evidence, seed, advance, cost)


# --- runs --------------------------------------------------------------------------------------------------------------


def evidence_of(subject: Subject, folders: Sequence[str | Path]) -> dict[str, Any]:
    """What runs say that a plan can use: `withdrawal_kl` and `cutoff` of information-flow, `drift`, `overlap` and `ima` of implicit-alignment.

    Raises StudyError for a folder that is no finished run, of another study, or of another model.
    """
    found: dict[str, Any] = {}
    for folder in map(Path, folders):
        study, summary = _finished(folder, describe(subject)["fingerprint"])
        if study not in _READERS:
            raise StudyError(f"{folder} is a run of {study}: a plan reads runs of {' and '.join(_READERS)}")
        found |= _READERS[study](folder, summary, subject.n_layers)
    return found


def _finished(folder: Path, fingerprint: str) -> tuple[str, dict[str, Any]]:
    try:
        told = json.loads((folder / "run.json").read_text())
        summary = json.loads((folder / "summary.json").read_text())
    except (OSError, ValueError) as error:
        raise StudyError(f"{folder} is no finished run: it has no run.json and summary.json that can be read") from error
    if told.get("subject", {}).get("fingerprint") != fingerprint:
        raise StudyError(
            f"{folder} is a run of another model ({told.get('subject', {}).get('name')}): plans rest on runs of the same one"
        )
    return str(told.get("study")), summary


def _flow(folder: Path, summary: Mapping[str, Any], n_layers: int) -> dict[str, Any]:
    """What is shown hidden from each layer on: KL over examples, as the withdrawal of all visual tokens has it."""
    rows = pa.concat_tables([pq.read_table(path) for path in sorted((folder / "records").glob("part-*.parquet"))]).to_pandas()
    own = rows[rows["what"].isin(["cumulative", "hidden"])]
    table = own.pivot_table(index="example", columns="layer", values="kl").reindex(columns=range(n_layers)).dropna()
    if not len(table):
        raise StudyError(f"{folder} has no example whose picture was hidden layer by layer: it was answered wrong by all")
    mean, low, high = (np.asarray(side).tolist() for side in bootstrap_mean(table.to_numpy(float)))
    return {
        "withdrawal_kl": mean, "withdrawal_kl_interval": {"low": low, "high": high}, "withdrawal_from": f"{len(table)} examples of {folder.name}",
        "cutoff": {"layer": summary["cutoff_layer"], "interval": summary["cutoff_interval"]},
    }  # fmt: skip


def _alignment(folder: Path, summary: Mapping[str, Any], n_layers: int) -> dict[str, Any]:
    """How much what is shown changes from layer to layer, how far it uses the weights that words use, and how alike the two are."""
    modality, own = next(((name, one) for name, one in summary["modalities"].items() if name != "text"), (None, None))
    if own is None:
        raise StudyError(f"{folder} shows nothing but text: plans are made from runs on pictures, clips or sounds")
    pair = f"{modality} perceptual and {modality} textual"
    return {
        "drift": list(own["drift"]["perceptual"]["1"]["mean"])[:n_layers], "overlap": (summary.get("weights") or {}).get("by_layer", {}).get(pair),
        "ima": {reading: {end: score[end] for end in ("value", "low", "high")} for reading, score in own["score"].items()},
    }  # fmt: skip


SAID = {"input": "what is shown as it enters the model", "same": "both in the same layer"}
_READERS = {"information-flow": _flow, "implicit-alignment": _alignment}


# --- words -------------------------------------------------------------------------------------------------------------


def write(made: Plan, folder: Path, whence: str, runs: Sequence[str | Path] = ()) -> None:
    """The plan beside the model that it made: `recipe.yaml`, and `plan.md` with why each step and where the evidence comes from."""
    (folder / "recipe.yaml").write_text(made.recipe.dumped())
    ends = f"The evidence comes from {whence}{' and from runs' if runs else ''}."
    (folder / "plan.md").write_text("\n".join(["# The plan", "", *told(made), "", ends, ""]))


def told(made: Plan) -> list[str]:
    """A plan in Markdown: its choices with their reasons, and what it was chosen among."""
    lines = [
        f"{made.recipe.about[0].upper()}{made.recipe.about[1:]}.", "", f"| step | why | saves ({UNITS[made.cost]}, beside the others) |", "|---|---|---|",
        *(f"| {one.what} | {one.why} | {one.saves:.1%} |" for one in made.choices), "",
        "Chosen among these, all applied to a copy and measured:", "", "| kinds of steps | predicted, nats | measured, nats | FLOPs | time |", "|---|---|---|---|---|",
    ]  # fmt: skip
    for one in made.tried:
        value, low, high = one.measured
        took = "" if one.time_ratio is None else f"{one.time_ratio:.1%}"
        lines.append(
            f"| {', '.join(one.kinds)} | {one.predicted:.3g} | {value:.3g} [{low:.3g}, {high:.3g}] | {one.flops_ratio:.1%} | {took} |"
        )
    if scores := made.evidence.get("ima"):
        each = (f"{bracketed(score)} ({SAID[reading]})" for reading, score in scores.items())
        lines += [
            "",
            f"How alike what is shown and the words are in the run that was read (IMA score): {', '.join(each)}. It prices no step: damage is measured.",
        ]
    if made.notes:
        lines += ["", "Not allowed on this model:", "", *(f"- {note}" for note in made.notes)]
    return lines
