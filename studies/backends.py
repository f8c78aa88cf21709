"""What does it cost to read the same points through nnsight or TransformerLens?

Everything is measured side by side in one process on a LLaVA-shaped model with random weights, taking turns: the plain SDPA
forward, for each backend a trace of one quantity in every layer, and what transformers itself gives with eager attention. What a
backend does before its pass (a copy of the model's structure, for TransformerLens a bridge around it) is part of its time. Beside
it stands what a store makes of full residuals, next to a plain safetensors file of the same bytes. No data is read.
"""

import os
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import save_file

from compress.memory import peak_memory
from probe.backends import BACKENDS
from probe.recorders import Mass, Recorder, Residual, Rows
from probe.store import Store, StoreWriter
from probe.subject import Encoded, Subject
from probe.tracing import Trace, last_logits, trace
from studies.ratios import FIGURE, Goal, Measured, Panels, bounds, figure, head, lines, over, row
from studies.run import Run
from studies.speed import SCHEMA, eager_forward, interleaved
from studies.study import Summary, study

QUANTITIES: dict[str, Recorder] = {
    "resid_post": Residual("resid_post"), "resid_post, mean": Residual("resid_post", reduce="mean"),
    "attn_out": Residual("attn_out"), "mlp_out": Residual("mlp_out"), "rows": Rows("last"), "mass": Mass(),
}  # fmt: skip
NAMES = ("hooks", *BACKENDS)
EAGER = {"resid_post": "hidden_states", "rows": "attentions"}  # what transformers returns by itself
WRITES = 8  # traces that a store takes in
STORED = Goal(0.8, most=False)  # the rate of a store, over that of a plain file


@study
def backends(
    *,
    layers: int = 16,
    width: int = 512,
    heads: int = 8,
    kv_heads: int = 8,
    ffn: int = 1376,
    vocabulary: int = 2000,
    image_side: int = 24,
    question: int = 24,
    rounds: int = 7,
    out: Path | None = None,
    seed: int = 0,
    device: str | None = None,
    dtype: str | None = None,
    quiet: bool = False,
) -> Summary:
    """What does it cost to read the same points through nnsight or TransformerLens?

    The sizes are those of the study `speed`. Each backend records `resid_post`, `attn_out` and `mlp_out` at every position, the mean
    of `resid_post`, the attention `rows` of the last position and the group masses, in all layers. Fewer than six rounds give no intervals. The model has random weights: `--model`, `--data` and `--limit`
    change nothing.
    """
    from studies.speed_model import example, llava_shaped, placed

    target, kind = placed(device, dtype)
    sizes = {"layers": layers, "width": width, "heads": heads, "kv_heads": kv_heads, "ffn": ffn, "vocabulary": vocabulary,
             "image_side": image_side, "question": question, "device": str(target), "dtype": str(kind).removeprefix("torch.")}  # fmt: skip
    run = Run.open(out, "backends", {**sizes, "rounds": rounds, "seed": seed}, {"name": "random"}, SCHEMA)
    subject = llava_shaped(layers, width, heads, kv_heads, ffn, vocabulary, image_side, target, kind, seed)
    encoded = subject.encode(example(image_side, question))
    timed = _candidates(subject, encoded)
    seconds = interleaved(timed, rounds, target, quiet)
    peaks = {name: peak_memory(call, target) for name, call in timed.items()}
    found = {
        backend: {
            quantity: _cost(timed, seconds, peaks, backend, quantity)
            for quantity in (EAGER if backend == "eager" else QUANTITIES)
        }
        for backend in (*NAMES, "eager")
    }
    stored = _stored(subject, encoded, rounds, target, quiet)
    seconds |= stored
    rate = over(stored, "plain write", "store")
    summary: Summary = {"run": str(run.folder), "n": rounds, "n_positions": len(encoded.maps[0]), **sizes, "backends": found,
                        "store_over_plain_write": rate.value, "intervals": {"store_over_plain_write": bounds(rate)}}  # fmt: skip
    rows = [{"what": name, "round": i, "seconds": s} for name, values in seconds.items() for i, s in enumerate(values)]
    run.write("all", rows + [{"what": f"peak {name}", "bytes": float(count)} for name, count in peaks.items()])
    run.figure(FIGURE, *figure(_panels(summary), f"medians over {rounds} rounds with 95 % intervals; memory is counted once"))
    run.finish(summary, _report(summary))
    if not quiet:
        print(_table(summary), file=sys.stderr)
    return summary


def _candidates(subject: Subject, encoded: Encoded) -> dict[str, Callable[[], Any]]:
    timed: dict[str, Callable[[], Any]] = {"forward": partial(last_logits, subject, encoded)}
    for backend in NAMES:
        for quantity, recorder in QUANTITIES.items():
            timed[f"{backend} {quantity}"] = partial(trace, subject, encoded, [recorder], backend=backend)
    for quantity, output in EAGER.items():
        timed[f"eager {quantity}"] = partial(eager_forward, subject, encoded, output)
    return timed


def _cost(
    timed: dict[str, Callable[[], Any]], seconds: dict[str, list[float]], peaks: dict[str, int], backend: str, quantity: str
) -> dict[str, Any]:
    """What one trace costs, next to the plain forward, and how far its numbers are from the hooks'."""
    name = f"{backend} {quantity}"
    time = over(seconds, name, "forward")
    return {
        "time_over_forward": time.value, "memory_over_forward": peaks[name] / max(1, peaks["forward"]),
        "max_difference": _difference(timed, backend, quantity), "intervals": {"time_over_forward": bounds(time)},
    }  # fmt: skip


def _stored(subject: Subject, encoded: Encoded, rounds: int, device: torch.device, quiet: bool) -> dict[str, list[float]]:
    """Seconds of writing the same traces of full residuals through a store, and as one plain safetensors file, on one disk."""
    states = [trace(subject, encoded, [Residual("resid_post")]) for _ in range(WRITES)]
    traces = [_under(found, f"{i}") for i, found in enumerate(states)]
    plain = {f"{i}": found["states"].tensor for i, found in enumerate(traces)}

    def store(folder: Path) -> None:
        with StoreWriter(folder, {}) as writer:
            for found in traces:
                writer.add(found)
        assert Store(folder).n_bytes > sum(tensor.nbytes for tensor in plain.values())

    def write(folder: Path) -> None:
        folder.mkdir()
        save_file(plain, folder / "plain.safetensors")
        with (folder / "plain.safetensors").open("rb") as file:
            os.fsync(file.fileno())

    with TemporaryDirectory() as place:
        turns = iter(range(10**6))
        timed: dict[str, Callable[[], Any]] = {
            "store": lambda: store(Path(place) / str(next(turns))), "plain write": lambda: write(Path(place) / str(next(turns))),
        }  # fmt: skip
        return interleaved(timed, rounds, device, quiet)


def _under(found: Trace, name: str) -> Trace:
    """The trace as one of an example of another name."""
    example = replace(found.encoded.examples[0], id=name)
    return replace(found, encoded=replace(found.encoded, examples=(example,)))


def _difference(timed: dict[str, Callable[[], Any]], backend: str, quantity: str) -> float:
    """The largest difference of what was recorded from what the hooks record, and of the logits from the plain forward's."""
    if backend == "eager":
        return _eager_difference(timed, quantity)
    found: Trace = timed[f"{backend} {quantity}"]()
    name = quantity if quantity in ("rows", "mass") else "states"
    recorded = found[name].tensor.float() - timed[f"hooks {quantity}"]()[name].tensor.float()
    return float(max(recorded.abs().max(), (found.logits - timed["forward"]()).abs().max()))


def _eager_difference(timed: dict[str, Callable[[], Any]], quantity: str) -> float:
    found = timed[f"eager {quantity}"]()
    hooks: Trace = timed[f"hooks {quantity}"]()
    if quantity == "rows":
        expected, returned = hooks["rows"].tensor[:, :, :, 0], [layer[:, :, -1] for layer in found]
    else:  # transformers' last hidden state has been through the final norm
        expected, returned = hooks["states"].tensor[:-1], list(found[1:-1])
    return float((torch.stack(returned).float().cpu() - expected.float()).abs().max())


def _panels(summary: Summary) -> Panels:
    """Time and memory of every trace, and the rate of a store."""
    every = [
        (f"{backend}, {quantity}", found) for backend, quantities in summary["backends"].items() for quantity, found in quantities.items()
    ]  # fmt: skip
    return [
        ("time / forward", [Measured(name, one["time_over_forward"], **one["intervals"]["time_over_forward"]) for name, one in every]),
        ("memory / forward", [Measured(name, one["memory_over_forward"]) for name, one in every]),
        ("rate of writing / plain write", [row(summary, "store_over_plain_write", "store, full residuals", STORED)]),
    ]  # fmt: skip


def _table(summary: Summary) -> str:
    told = [head(summary), f"{'':<36}{'time / forward':>16}{'':>16}{'memory / forward':>18}{'max difference':>16}"]
    for backend, quantities in summary["backends"].items():
        for quantity, found in quantities.items():
            time, memory, gap = (found[key] for key in ("time_over_forward", "memory_over_forward", "max_difference"))
            between = Measured("", time, **found["intervals"]["time_over_forward"]).between()
            told.append(f"{backend:<17} {quantity:<18}{time:>16.2f}  {between:<14}{memory:>18.2f}{gap:>16.1e}")
    return "\n".join(
        [*told, *lines([row(summary, "store_over_plain_write", "full residuals into a store / a plain file, rate", STORED)])]
    )


def _report(summary: Summary) -> str:
    return (
        f"# Backends\n\nInterleaved rounds in one process; times are medians of the ratio to the plain forward within a round, with 95 % intervals by "
        f"order statistics (none with fewer than six rounds); memory is the peak of tensors over the plain forward's, and differences are the largest "
        f"of any recorded number from the hooks' and of any logit from the plain forward's.\n\n![ratios](figures/{FIGURE}.png)\n\n```\n"
        f"{_table(summary)}\n```\n"
    )
