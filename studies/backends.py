"""What does it cost to read the same points through nnsight or TransformerLens?

Everything is measured side by side in one process on a LLaVA-shaped model with random weights, taking turns: the plain SDPA
forward, and for each backend a trace of one quantity in every layer. What a backend does before its pass (a copy of the
model's structure, for TransformerLens a bridge around it) is part of its time.
"""

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from probe.backends import BACKENDS
from probe.errors import StudyError
from probe.recorders import Recorder, Residual, Rows
from probe.subject import Encoded, Subject
from probe.tracing import Trace, last_logits, trace
from studies.run import Run
from studies.speed import SCHEMA, interleaved, paired, peak_memory
from studies.study import Summary, study

QUANTITIES: dict[str, Recorder] = {
    "resid_post": Residual("resid_post"), "attn_out": Residual("attn_out"), "mlp_out": Residual("mlp_out"), "rows": Rows("last"),
}  # fmt: skip
NAMES = ("hooks", *BACKENDS)


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
    rounds: int = 5,
    out: Path | None = None,
    seed: int = 0,
    device: str | None = None,
    dtype: str | None = None,
    quiet: bool = False,
) -> Summary:
    """What does it cost to read the same points through nnsight or TransformerLens?

    The sizes are those of the study `speed`. Each backend records `resid_post`, `attn_out` and `mlp_out` at every position and
    the attention `rows` of the last one, in all layers.
    """
    from studies.speed_model import example, llava_shaped

    target = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if dtype not in (None, "float32", "bfloat16", "float16"):
        raise StudyError(f"there is no dtype {dtype!r}: name float32, bfloat16 or float16")
    kind = getattr(torch, dtype) if dtype else (torch.bfloat16 if target.type == "cuda" else torch.float32)
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
            quantity: {
                "time_over_forward": paired(seconds, f"{backend} {quantity}", "forward"),
                "memory_over_forward": peaks[f"{backend} {quantity}"] / max(1, peaks["forward"]),
                "max_difference": _difference(timed, backend, quantity),
            }
            for quantity in QUANTITIES
        }
        for backend in NAMES
    }
    summary: Summary = {"run": str(run.folder), "n_positions": len(encoded.maps[0]), **sizes, "backends": found}
    rows = [{"what": name, "round": i, "seconds": s} for name, values in seconds.items() for i, s in enumerate(values)]
    run.write("all", rows + [{"what": f"peak {name}", "bytes": float(count)} for name, count in peaks.items()])
    run.finish(summary, _report(summary))
    if not quiet:
        print(_table(summary), file=sys.stderr)
    return summary


def _candidates(subject: Subject, encoded: Encoded) -> dict[str, Callable[[], Any]]:
    timed: dict[str, Callable[[], Any]] = {"forward": partial(last_logits, subject, encoded)}
    for backend in NAMES:
        for quantity, recorder in QUANTITIES.items():
            timed[f"{backend} {quantity}"] = partial(trace, subject, encoded, [recorder], backend=backend)
    return timed


def _difference(timed: dict[str, Callable[[], Any]], backend: str, quantity: str) -> float:
    """The largest difference of what was recorded from what the hooks record, and of the logits from the plain forward's."""
    found: Trace = timed[f"{backend} {quantity}"]()
    name = "rows" if quantity == "rows" else "states"
    recorded = found[name].tensor.float() - timed[f"hooks {quantity}"]()[name].tensor.float()
    return float(max(recorded.abs().max(), (found.logits - timed["forward"]()).abs().max()))


def _table(summary: Summary) -> str:
    head = f"{summary['n_positions']} positions, {summary['layers']} layers, width {summary['width']}, {summary['dtype']} on {summary['device']}"
    lines = [head, f"{'':<30}{'time / forward':>16}{'memory / forward':>18}{'max difference':>16}"]
    for backend, quantities in summary["backends"].items():
        for quantity, found in quantities.items():
            time, memory, gap = (found[key] for key in ("time_over_forward", "memory_over_forward", "max_difference"))
            lines.append(f"{backend:<18}{quantity:<12}{time:>16.2f}{memory:>18.2f}{gap:>16.1e}")
    return "\n".join(lines)


def _report(summary: Summary) -> str:
    return (
        f"# Backends\n\nInterleaved rounds in one process; times are medians of the ratio to the plain forward within a round, memory "
        f"is the peak of tensors over the plain forward's, and differences are the largest of any recorded number from the "
        f"hooks' and of any logit from the plain forward's.\n\n```\n{_table(summary)}\n```\n"
    )
