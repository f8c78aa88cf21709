"""Does compression save the time that its FLOPs promise, and what does choosing cost?

Everything is measured side by side in one process on a LLaVA-shaped model with random weights, taking turns. Compared is what comes after the vision
tower, choosing included: the measured time of a smaller model over the dense model's time in the same round, and that over the same ratio of FLOPs
in closed form. The tower runs in both and is left out: with it every ratio would look better. Beside it stand the time that every reducer takes to
choose, as a share of that dense time, and the bytes of real caches, against the formula. No data is read.
"""

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from compress.budget import Budget
from compress.cost import cost
from compress.latency import Timed, ratio, take_turns
from compress.passes import METHODS
from compress.passes.base import Pass
from compress.passes.layers import RemoveLayers
from compress.passes.tokens import Tokens
from compress.passes.width import Width
from compress.recipe import compress
from compress.smaller import Smaller
from compress.tokens.choice import Seen
from probe.backends.twin import twin
from probe.errors import PassError
from probe.subject import Encoded, Subject
from studies.ratios import FIGURE, Goal, Measured, Panels, bounds, figure, head
from studies.run import Run
from studies.speed import interleaved, keep_what_is_freed
from studies.study import Summary, progress, study

SCHEMA = pa.schema([
    ("what", pa.string()), ("name", pa.string()), ("round", pa.int32()), ("phase", pa.string()), ("ms", pa.float64()),
])  # fmt: skip
PROMISED, CHOOSING = 1.15, 0.05  # goals: measured over predicted time, and choosing over the dense model's reading


@study
def compressing(
    *,
    layers: int = 16,
    width: int = 512,
    heads: int = 8,
    kv_heads: int = 8,
    ffn: int = 1376,
    vocabulary: int = 2000,
    image_side: int = 24,
    question: int = 24,
    keep: float = 0.25,
    rounds: int = 9,
    out: Path | None = None,
    seed: int = 0,
    device: str | None = None,
    dtype: str | None = None,
    quiet: bool = False,
) -> Summary:
    """Does compression save the time that its FLOPs promise, and what does choosing cost?

    The sizes are those of the study `speed`. `keep` is the share of visual tokens that stay; `rounds` how often everything takes its turn (fewer than six
    give no intervals). The model has random weights: `--model`, `--data` and `--limit` change nothing.
    """
    from studies.speed_model import example, llava_shaped, placed

    target, kind = placed(device, dtype)
    sizes = {"layers": layers, "width": width, "heads": heads, "kv_heads": kv_heads, "ffn": ffn, "vocabulary": vocabulary,
             "image_side": image_side, "question": question, "device": str(target), "dtype": str(kind).removeprefix("torch.")}  # fmt: skip
    asked = {**sizes, "keep": keep, "rounds": rounds, "seed": seed}
    run = Run.open(out, "compressing", asked, {"name": "random"}, SCHEMA)
    subject = llava_shaped(layers, width, heads, kv_heads, ffn, vocabulary, image_side, target, kind, seed)
    encoded = subject.encode(example(image_side, question))
    promised, records = _promised(subject, encoded, layers, keep, rounds, quiet)
    chosen, more = _chosen(subject, encoded, keep, rounds, quiet)
    clips, most = _clips(subject, image_side, keep, rounds, quiet)
    dense = [one.prefill - one.vision for one in more["dense"]]
    summary: Summary = {
        "run": str(run.folder), "n": rounds, "n_positions": len(encoded.maps[0]), "n_visual": image_side**2, **asked, "promised": promised,
        "choosing": chosen | {name: _held(most[name], [float(np.median(dense))] * rounds, CHOOSING) for name in clips},
    }  # fmt: skip
    summary["goals_met"] = all(row["verdict"] != "missed" for row in [*promised.values(), *summary["choosing"].values()])
    rows = [*_rows("promised", records), *_rows("choosing", more)]
    rows += [
        {"what": "choosing", "name": name, "round": i, "phase": "selector", "ms": ms}
        for name, series in most.items() for i, ms in enumerate(series)
    ]  # fmt: skip
    run.write("all", rows)
    run.figure(FIGURE, *figure(_panels(summary), f"medians over {rounds} rounds with 95 % intervals"))
    run.finish(summary, _report(summary))
    if not quiet:
        print(_table(summary), file=sys.stderr)
    return summary


def _rows(what: str, found: Mapping[str, list[Timed]]) -> list[dict[str, Any]]:
    return [
        {"what": what, "name": name, "round": i, "phase": phase, "ms": ms}
        for name, series in found.items() for i, one in enumerate(series)
        for phase, ms in {**vars(one), "after the tower": one.prefill - one.vision}.items()
    ]  # fmt: skip


# --- what is measured ------------------------------------------------------------------------------------------------


def passes(n_layers: int, keep: float) -> dict[str, Pass]:
    """What must keep its promise: tokens dropped inside and before the decoder, layers, and half of all heads and neurons."""
    quarter = tuple(range(n_layers // 2, n_layers // 2 + max(1, n_layers // 4)))
    return {
        f"fastv {keep:g} at {min(2, n_layers - 1)}": Tokens(method="fastv", budget=Budget(keep=keep)),
        f"divprune {keep:g}": Tokens(method="divprune", budget=Budget(keep=keep)),
        f"without {len(quarter)} layers": RemoveLayers(layers=quarter), "width 0.5": Width(heads=0.5, neurons=0.5, score="magnitude"),
    }  # fmt: skip


@contextmanager
def smaller(subject: Subject, one: Pass) -> Iterator[Smaller]:
    """The model with one pass applied: its structure copied, its weights shared (what is cut out of them is a copy)."""
    copy = Smaller(twin(subject.model), subject.processor, subject.anatomy, subject.name, subject.checks)
    made = compress(copy, [one], in_place=True)
    try:
        yield made
    finally:
        made.detach()


def _promised(
    subject: Subject, encoded: Encoded, n_layers: int, keep: float, rounds: int, quiet: bool
) -> tuple[dict[str, Any], dict[str, list[Timed]]]:
    """For every pass: time and FLOPs over the dense model's, one over the other, and whether caches are as large as the formula says."""
    records: dict[str, list[Timed]] = {}
    found: dict[str, Any] = {}
    every = passes(n_layers, keep)
    keep_what_is_freed()
    with progress("reading the prompt", len(every) * (rounds + 2), quiet, "rounds") as advance:
        for name, one in every.items():
            with smaller(subject, one) as made:
                running, n = [int(layer.queries) for layer in cost(made, encoded).ran], len(encoded.maps[0])
                plain = {"plain": (subject, [worded(subject, encoded, min(running))])} if min(running) < n else {}
                times = take_turns(
                    {"dense": (subject, [encoded]), name: (made, [encoded]), **plain}, rounds, 1, advance=advance
                )
                records |= {name if who == name else f"{who} beside {name}": series for who, series in times.items()}
                share = _after(made, encoded) / _after(subject, encoded)
                after_tower = {who: [t.prefill - t.vision for t in series] for who, series in times.items()}
                this, dense = after_tower[name], after_tower["dense"]
                promise = [share * ms for ms in dense]
                after, whole = ratio(this, dense), ratio([t.prefill for t in times[name]], [t.prefill for t in times["dense"]])
                found[name] = {
                    "as_many_positions": _alone(running, n, dense, after_tower["plain"], promise) if plain else None,
                    "flops_ratio": share, "time_ratio": after.value, **_held(this, promise, PROMISED),
                    "whole_prefill_ratio": whole.value, "kv_exact": cached(made, encoded) == list(cost(made, encoded).kv_bytes),
                    "intervals": {"time_ratio": bounds(after), "whole_prefill_ratio": bounds(whole)},
                }  # fmt: skip
    return found, records


def _alone(running: list[int], n: int, dense: list[float], few: list[float], promise: list[float]) -> dict[str, Any]:
    """What as many positions in each layer take by themselves over what is promised: layers that read all `n` of them as in the dense model, the
    others as in a shorter prompt's pass (`few`).
    """
    all_run = running.count(n) / len(running)
    found = ratio([all_run * d + (1 - all_run) * f for d, f in zip(dense, few, strict=True)], promise)
    return {"value": found.value, **bounds(found)}


def worded(subject: Subject, encoded: Encoded, positions: int) -> Encoded:
    """A prompt of so many positions without a picture."""
    asked = replace(encoded.examples[0], images=(), prompt="there")
    return subject.encode(replace(asked, prompt=" ".join(["there"] * (1 + positions - len(subject.encode(asked).maps[0])))))


def _after(subject: Subject, encoded: Encoded) -> float:
    """Multiply-adds of what comes after the tower."""
    macs = cost(subject, encoded).macs
    return sum(macs[phase] or 0.0 for phase in ("selector", "prefill", "head"))


def cached(subject: Subject, encoded: Encoded) -> list[int]:
    """Bytes of every layer's real cache after the prompt."""
    with subject.lock, torch.no_grad():
        made = subject.model(**encoded.inputs, use_cache=True, logits_to_keep=1)
    return [layer.keys.nbytes + layer.values.nbytes for layer in made.past_key_values.layers]


def _held(these: list[float], base: list[float], goal: float) -> dict[str, Any]:
    """A ratio with its interval against a goal: `met`, `missed`, or `within noise` of it."""
    found = ratio(these, base)
    low, high = (float("-inf") if found.low is None else found.low), (float("inf") if found.high is None else found.high)
    verdict = "met" if high <= goal else "missed" if low > goal else "within noise"
    return {"value": found.value, "low": found.low, "high": found.high, "n": found.n, "goal": goal, "verdict": verdict}


def _chosen(
    subject: Subject, encoded: Encoded, keep: float, rounds: int, quiet: bool
) -> tuple[dict[str, Any], dict[str, list[Timed]]]:
    """The share of the dense model's reading (after the tower) that every reducer of pictures takes to choose."""
    with ExitStack() as stack:
        models: dict[str, Subject] = {"dense": subject}
        for name, method in METHODS.items():
            one = Tokens(method=name, budget=Budget(keep=keep), layer=min(2, subject.n_layers - 1) if method.layer else 0)
            if not _of_clips(name):
                models[name] = stack.enter_context(smaller(subject, one))
        with progress("choosing", rounds + 2, quiet, "rounds") as advance:
            times = take_turns({k: (m, [encoded]) for k, m in models.items()}, rounds, 1, advance=advance)
    dense = [t.prefill - t.vision for t in times["dense"]]
    return {
        name: _held([t.selector for t in found], dense, CHOOSING) for name, found in times.items() if name != "dense"
    }, times  # fmt: skip


def _of_clips(name: str) -> bool:
    return METHODS[name].choose.__module__.endswith(".frames")


def _clips(
    subject: Subject, side: int, keep: float, rounds: int, quiet: bool
) -> tuple[list[str], dict[str, list[float]]]:  # fmt: skip
    """Milliseconds of the reducers of clips by themselves, on as many states as the picture has, in four frames."""
    half = max(2, side // 2)
    n = 4 * half * half
    states = torch.randn(n, subject.config.get_text_config().hidden_size, device=subject.device, dtype=subject.dtype)
    seen = Seen(states, states[:8], (4, half, half), 0, subject.n_layers, "video")
    names = [name for name in METHODS if _of_clips(name)]
    timed: dict[str, Callable[[], Any]] = {}
    for name in names:
        try:
            METHODS[name].choose(seen, round(keep * n))
        except PassError:
            continue
        timed[name] = partial(METHODS[name].choose, seen, round(keep * n))
    seconds = interleaved(timed, rounds, subject.device, quiet)
    return list(seconds), {name: [1e3 * one for one in values] for name, values in seconds.items()}


# --- the report ------------------------------------------------------------------------------------------------------


def _panels(summary: Mapping[str, Any]) -> Panels:
    """Every promise, and every choice from the dearest to the cheapest."""
    return [
        (title, [Measured(name, found["value"], found["low"], found["high"], Goal(found["goal"])) for name, found in rows])
        for title, rows in (
            ("time / promised time", list(summary["promised"].items())), ("choosing / the dense model's reading", _dearest(summary)),
        )
    ]  # fmt: skip


def _dearest(summary: Mapping[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    return sorted(summary["choosing"].items(), key=lambda one: -one[1]["value"])


def _table(summary: Mapping[str, Any]) -> str:
    lines = [
        head(dict(summary)),
        f"{summary['n_visual']} of the positions are visual",
        "",
        f"{'after the tower':<28}{'FLOPs':>8}{'time':>8}{'time / promised':>28}   goal 1.15",
    ]
    for name, row in summary["promised"].items():
        told = f"{row['value']:.3f} {_between(row, '.3f')}"
        exact = "caches as the formula" if row["kv_exact"] else "CACHES DIFFER FROM THE FORMULA"
        plain = row["as_many_positions"]
        alone = f"; {plain['value']:.3f} {_between(plain, '.3f')} for as many positions alone" if plain else ""
        lines.append(
            f"{name:<28}{row['flops_ratio']:>8.3f}{row['time_ratio']:>8.3f}{told:>28}   {row['verdict']}; {exact}{alone}"
        )
    lines += ["", f"{'choosing':<28}{'share of the dense reading':>44}   goal 5 %"]
    for name, row in _dearest(summary):
        told = f"{row['value']:.2%} {_between(row, '.2%')}"
        lines.append(f"{name:<28}{told:>44}   {row['verdict']}")
    return "\n".join(lines)


def _between(row: Mapping[str, Any], form: str) -> str:
    return "" if row["low"] is None else f"[{row['low']:{form}}, {row['high']:{form}}]"


def _report(summary: Mapping[str, Any]) -> str:
    missed = [name for part in ("promised", "choosing") for name, row in summary[part].items() if row["verdict"] == "missed"]
    said = "No goal is surely missed." if not missed else f"Surely missed: {', '.join(missed)}."
    return (
        f"# Compressing\n\n*Does compression save the time that its FLOPs promise, and what does choosing cost?*\n\n{said} Medians of ratios within a "
        f"round, all models taking turns in one process, with intervals by order statistics. Compared is what comes after the vision tower, choosing "
        f"included. A goal is met where the whole interval keeps it, missed where none of it does. What the dense model takes for a prompt of words with as many "
        f"positions in each layer stands beside it: what is above the promise there is that of kernels and fixed costs, and no reducer can go below it.\n\n![ratios](figures/{FIGURE}.png)\n\n```\n{_table(summary)}\n```\n"
    )
