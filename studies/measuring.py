"""`sightline measure` and `sightline compress`: what one model costs and can do, beside the dense model that it was made from."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from compress import evidence
from compress.ledger import FILE
from compress.passes.base import Evidence
from compress.recipe import Recipe, compress
from compress.saving import loads_in_transformers, save
from compress.smaller import Smaller
from probe.errors import RunError
from probe.example import Example
from probe.subject import Subject
from studies.bench import SCHEMA, Bench, Configuration, collect
from studies.points import broken, figure, sentence, table
from studies.run import Run
from studies.study import describe, progress
from studies.telling import bracketed


def measure(subject: Subject, dense: Subject | None, bench: Bench, out: Path | None, quiet: bool) -> dict[str, Any]:
    """Accuracy, times, memory and cost of a model; with a dense one, paired with it item by item and in turns.

    Returns the model's point with `run`. Asking again with the same `out` gives what was measured.
    """
    config = {
        "data": bench.data.name, "fingerprint": bench.data.fingerprint, "examples": len(bench.data), "batch": bench.batch, "rounds": bench.rounds,
        "tokens": bench.tokens, "seed": bench.seed, "dense": describe(dense) if dense else None,
    }  # fmt: skip
    run = Run.open(out, "measure", config, describe(subject), SCHEMA)
    full, this = Configuration("dense" if dense else subject.name, baseline="full"), Configuration(subject.name)
    work = [("dense", full, dense), ("this", this, subject)] if dense else [("this", full, subject)]
    with run.recorded(), progress("measuring", len(work), quiet, "models") as advance:
        todo = run.pending([key for key, _, _ in work])
        for key, one, model in work:
            if key in todo:
                assert model is not None
                run.write(key, bench.measure_model(one, model))
            advance(1)
        points = collect(run.rows([key for key, _, _ in work]))
    points[-1]["recipe"] = applied(subject)
    point = {**points[-1], "run": str(run.folder), "unused": bench.sifted[1]}
    point["note"] = _note(subject, dense)
    if dense is None:
        point = alone(point)
    else:
        run.figure("frontier", *figure(points))
    run.finish(point, _alone_report(point) if dense is None else _report(points, point["note"]))
    return point


def applied(subject: Subject) -> str:
    """What was done to a model, as the `recipe` of a point has it: passes with their settings, in order; empty for a dense one."""
    steps = subject.ledger if isinstance(subject, Smaller) else ()
    return json.dumps([{step.title: dict(step.settings)} for step in steps], default=str) if steps else ""


def alone(point: dict[str, Any]) -> dict[str, Any]:
    """A point without what compares it: there is nothing beside it that it could be faster than, or right more often than."""
    compared = ("difference", "p", "agreement", "divergence", "by_kind", "flops_ratio", "kv_ratio", "standing", "separable")
    left = {key: value for key, value in point.items() if key not in compared}
    text_only = {key: value for key, value in point["text_only"].items() if key not in compared}
    if left.get("open"):
        left["open"] = {key: value for key, value in left["open"].items() if key not in compared}
    return {**left, "text_only": text_only, "verdict": None, "on_frontier": None, "baseline": "", "ratios": {}, "amdahl": None}


def _note(subject: Subject, dense: Subject | None) -> str:
    """What a model was made from, where that is not what it is compared with."""
    made = ", ".join(subject.parents) if isinstance(subject, Smaller) else ""
    if dense is None:
        return f"made from {made}: name it with --dense to compare the two" if made else ""
    return f"compared with {dense.name}, and made from {made}" if made and dense.name not in subject.parents else ""  # type: ignore[attr-defined]


def _alone_report(point: Mapping[str, Any]) -> str:
    lines = [
        "# What the model costs and can do",
        "",
        sentence(point),
        "",
        *([f"It was {point['note']}.", ""] if point["note"] else []),
    ]
    lines += ["| | |", "|---|---|", f"| FLOPs of reading a prompt | {point['flops']:.4g} |", f"| bytes of keys and values | {point['kv_bytes']:.4g} |",
              f"| parameters | {point['parameters']:,} |"]  # fmt: skip
    if point["prefill_ms"] is not None:
        lines += [
            f"| reading the prompt | {point['prefill_ms']:.1f} ms |",
            f"| each token after it | {point['decode_ms']:.1f} ms |",
        ]
    if point["peak_memory"] is not None:
        lines.append(f"| peak memory | {point['peak_memory'] / 2**20:.1f} MiB |")
    if one := point.get("open"):
        lines.append(f"| {one['metric']} ({one['n']} answers) | {bracketed(one, '.1%')} |")
    return "\n".join([*lines, ""])


def _report(points: list[dict[str, Any]], note: str) -> str:
    lines = [
        "# What the model costs and can do",
        "",
        *(sentence(point) for point in points),
        "",
        *([f"**The model was {note}.**", ""] if note else []),
    ]
    lines += [
        table(points),
        "",
        "## Which items changed",
        "",
        broken(points[-1]),
        "",
        "![accuracy and cost](figures/frontier.png)",
        "",
    ]
    return "\n".join(lines)


def make(
    subject: Subject, recipe: Recipe, bench: Bench, out: Path, quiet: bool, found: Evidence | None = None, whence: str = ""
) -> dict[str, Any]:  # fmt: skip
    """A compressed model in `out`, measured against the dense one: `model ledger loads_in_transformers measured`.

    `whence` says for the model card where the evidence comes from. Raises RunError for a folder that holds something else, PassError for a recipe that this model refuses.
    """
    refuse_folder(out)
    smaller = compress(subject, recipe, found)
    try:
        with progress("measuring", 1, quiet, "models") as advance:
            points = [_point(bench.measure_model(Configuration(recipe.name, recipe), smaller))]
            advance(1)
        save(smaller, out, _lines(points[0], bench.data.name, whence))
        return {
            "model": str(out), "ledger": str(out / FILE), "loads_in_transformers": loads_in_transformers(smaller), "name": recipe.name,
            "measured": points[0],
        }  # fmt: skip
    finally:
        smaller.detach()


def _point(rows: list[dict[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(rows[-1]["text"])
    return found


def _lines(point: Mapping[str, Any], data: str, whence: str) -> dict[str, Any]:
    """What the model card says of the measurement."""
    change, ratio = point.get("difference"), point["ratios"].get("answer")
    told = {
        "accuracy": f"{point['accuracy']:.1%} [{point['accuracy_low']:.1%}, {point['accuracy_high']:.1%}] of {point['n']} questions of {data}",
        "parameters": f"{point['parameters']:,}",
        "FLOPs of reading a prompt": f"{point['flops_ratio']:.0%} of the dense model's", "keys and values": f"{point['kv_ratio']:.0%}",
    }  # fmt: skip
    if point["peak_memory"] is not None:
        told["peak memory"] = f"{point['peak_memory'] / 2**20:.1f} MiB, weights and the largest phase"
    if whence:
        told["evidence for what goes"] = whence
    if one := point.get("open"):
        told[one["metric"]] = f"{bracketed(one, '.1%')} of {one['n']} answers"
    if change:
        told["against the dense model"] = f"{bracketed(change, '+.1%')}, paired"
    if ratio:
        told["time of an answer"] = f"{ratio['value']:.2f} of the dense model's ({ratio['verdict']})"
    return told


def refuse_folder(out: Path) -> None:
    """Raises RunError where a model would be written over something that is none of ours."""
    present = sorted(path.name for path in out.iterdir()) if out.is_dir() else []
    if out.exists() and not out.is_dir():
        raise RunError(f"{out} is a file: name a new or empty folder for the model")
    if present and FILE not in present:
        raise RunError(f"{out} holds other things ({', '.join(present[:3])}) and no {FILE}: name a new or empty folder")


def gather(subject: Subject, recipe: Recipe, examples: Sequence[Example], seed: int) -> Evidence | None:
    """The evidence that a recipe's passes ask for."""
    names = list(dict.fromkeys(name for one in recipe.passes for name in one.asks()))
    return evidence.gather(subject, examples, names, seed) if names else None
