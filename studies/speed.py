"""What do tracing and replaying cost, next to a plain forward pass and to the naive way?

Everything is measured side by side in one process on a LLaVA-shaped model with random weights, taking turns: the plain SDPA
forward, the same pass traced (group masses and last rows of every layer), eager attention with output_attentions, and a
replayed three-flow sweep; then, in turns with the replayed sweep again, the naive loop of one masked forward for each
layer and flow.
"""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from compress.memory import peak_memory
from probe.analysis.flow import FLOWS, default_window
from probe.edits import Knockout, window
from probe.errors import StudyError
from probe.recorders import Mass, Recorder, Rows
from probe.replay import sweep
from probe.subject import Encoded, Subject
from probe.tracing import last_logits, trace
from studies.run import Run
from studies.study import Summary, progress, study

SCHEMA = pa.schema([("what", pa.string()), ("round", pa.int32()), ("seconds", pa.float64()), ("bytes", pa.float64())])
SWEPT = ("image->question", "image->last", "question->last")


@study
def speed(
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
    naive_rounds: int = 3,
    stream: int = 512,
    out: Path | None = None,
    seed: int = 0,
    device: str | None = None,
    dtype: str | None = None,
    quiet: bool = False,
) -> Summary:
    """What do tracing and replaying cost, next to a plain forward pass and to the naive way?

    The sizes are arguments: `--layers 32 --width 4096 --heads 32 --kv-heads 32 --ffn 11008 --vocabulary 32064 --device cuda
    --dtype bfloat16` is a 7B shape. `image_side` is the grid's side in patches, `question` the number of words. `stream` is how many examples of the
    demo's data the memory of a whole study is measured with, against 32 (0 leaves it out).
    """
    from studies.speed_model import example, llava_shaped, placed

    target, kind = placed(device, dtype)
    sizes = {"layers": layers, "width": width, "heads": heads, "kv_heads": kv_heads, "ffn": ffn, "vocabulary": vocabulary,
             "image_side": image_side, "question": question, "device": str(target), "dtype": str(kind).removeprefix("torch.")}  # fmt: skip
    run = Run.open(
        out, "speed", {**sizes, "rounds": rounds, "naive_rounds": naive_rounds, "seed": seed}, {"name": "random"}, SCHEMA
    )
    subject = llava_shaped(layers, width, heads, kv_heads, ffn, vocabulary, image_side, target, kind, seed)
    encoded = subject.encode(example(image_side, question))
    entries = [
        Knockout(*FLOWS[name], window(center, default_window(layers), layers)) for name in SWEPT for center in range(layers)
    ]
    recorders: list[Recorder] = [Mass(), Rows("last")]
    timed: dict[str, Callable[[], Any]] = {
        "forward": lambda: last_logits(subject, encoded),
        "trace": lambda: trace(subject, encoded, recorders),
        "eager": lambda: eager_forward(subject, encoded, "attentions"),
        "sweep": lambda: sweep(subject, encoded, entries),
    }
    seconds = interleaved(timed, rounds, target, quiet)
    both = {"sweep again": timed["sweep"], "naive": lambda: sweep(subject, encoded, entries, method="naive")}
    seconds |= interleaved(both, naive_rounds, target, quiet)
    peaks = {name: peak_memory(timed[name], target) for name in ("forward", "trace", "eager")}
    summary = _summarise(subject, encoded, entries, seconds, peaks, timed, sizes)
    summary |= _streamed(stream, quiet) if stream else {}
    summary["run"] = str(run.folder)
    rows = [{"what": name, "round": i, "seconds": s} for name, values in seconds.items() for i, s in enumerate(values)]
    run.write("all", rows + [{"what": f"peak {name}", "bytes": float(peak)} for name, peak in peaks.items()])
    run.finish(summary, _report(summary))
    if not quiet:
        print(_table(summary), file=sys.stderr)
    return summary


def eager_forward(subject: Subject, encoded: Encoded, output: str) -> Any:
    """What everybody else does: eager attention that returns every pattern (`attentions`), or every `hidden_states`."""
    config = subject.decoder.config
    before = config._attn_implementation
    config._attn_implementation_internal = "eager"
    try:
        with torch.no_grad():
            asked = {"output_attentions": output == "attentions", "output_hidden_states": output == "hidden_states"}
            return subject.model(**encoded.inputs, use_cache=False, logits_to_keep=1, **asked)[output]
    finally:
        config._attn_implementation_internal = before


def interleaved(timed: dict[str, Callable[[], Any]], rounds: int, device: torch.device, quiet: bool) -> dict[str, list[float]]:
    """Seconds of each round, the candidates taking turns, after one warm-up round."""
    seconds: dict[str, list[float]] = {name: [] for name in timed}
    with progress(", ".join(timed), rounds + 1, quiet, "rounds") as advance:
        for turn in range(rounds + 1):
            for name, call in timed.items():
                _settle(device)
                start = time.perf_counter()
                call()
                _settle(device)
                if turn:
                    seconds[name].append(time.perf_counter() - start)
            advance(1)
    return seconds


def _settle(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _streamed(examples: int, quiet: bool) -> dict[str, float]:
    """Peak memory of the information-flow study on the demo, each size in a process of its own: many examples over 32."""
    peaks = {}
    with progress("memory of a whole study", 2, quiet, "runs") as advance, tempfile.TemporaryDirectory() as folder:
        for count in (32, examples):
            out = str(Path(folder) / str(count))
            command = [
                sys.executable,
                "-m",
                "studies.cli",
                "study",
                "information-flow",
                "--limit",
                str(count),
                "--out",
                out,
                "--quiet",
            ]
            process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
            _, status, usage = os.wait4(process.pid, 0)
            if status:
                raise StudyError(
                    f"the information-flow study failed with {count} examples (exit code {os.waitstatus_to_exitcode(status)})"
                )
            peaks[count] = usage.ru_maxrss
            advance(1)
    return {
        "stream_examples": examples,
        "stream_memory_ratio": peaks[examples] / peaks[32],
        "stream_peak_mib": peaks[examples] / 1024,
    }


def _summarise(
    subject: Subject, encoded: Encoded, entries: list[Knockout], seconds: dict[str, list[float]], peaks: dict[str, int],
    timed: dict[str, Callable[[], Any]], sizes: dict[str, Any],
) -> Summary:  # fmt: skip
    quartiles = {name: [float(q) for q in np.percentile(values, [25, 50, 75])] for name, values in seconds.items()}
    plain = timed["forward"]()
    fast, slow = timed["sweep"](), sweep(subject, encoded, entries, method="naive")
    return {
        "run": "", "n_positions": len(encoded.maps[0]), "n_entries": len(entries), **sizes,
        "trace_over_forward": paired(seconds, "trace", "forward"),
        "eager_over_forward": paired(seconds, "eager", "forward"),
        "trace_extra_memory_over_eager": (peaks["trace"] - peaks["forward"]) / max(1, peaks["eager"] - peaks["forward"]),
        "trace_logits_bitwise": bool(torch.equal(timed["trace"]().logits, plain)),
        "sweep_in_forwards": paired(seconds, "sweep", "forward"),
        "sweep_predicted_in_forwards": 1 + fast.layer_rows / fast.clean_layer_rows,
        "sweep_speedup": paired(seconds, "naive", "sweep again"),
        "sweep_max_difference": float((fast.edited[0] - slow.edited[0]).abs().max()),
        "sweep_same_answers": float((fast.edited[0].argmax(-1) == slow.edited[0].argmax(-1)).float().mean()),
        "seconds": quartiles, "peak_bytes": peaks,
    }  # fmt: skip


def paired(seconds: dict[str, list[float]], name: str, base: str) -> float:
    """Median over rounds of the ratio within a round: what drifts from round to round cancels."""
    return float(np.median(np.array(seconds[name]) / np.array(seconds[base])))


def _table(summary: Summary) -> str:
    rows = [
        ("trace (group masses, last rows) / forward", summary["trace_over_forward"], "at most 1.06"),
        ("eager with output_attentions / forward", summary["eager_over_forward"], ""),
        ("extra memory of trace / of eager", summary["trace_extra_memory_over_eager"], "at most 0.01"),
        (f"replayed sweep of {summary['n_entries']} entries, in forwards", summary["sweep_in_forwards"], "at most 2.2"),
        ("  the token-layer model predicts", summary["sweep_predicted_in_forwards"], ""),
        ("naive loop / replayed sweep", summary["sweep_speedup"], "at least 18"),
        ("largest difference of the logits", summary["sweep_max_difference"], "at most 1e-5 in float32"),
    ]
    if "stream_memory_ratio" in summary:
        rows.append(
            (
                f"peak memory of a study, {summary['stream_examples']} examples / 32",
                summary["stream_memory_ratio"],
                "at most 1.05",
            )
        )
    lines = [f"{name:<52}{value:>12.3g}   {goal}" for name, value, goal in rows]
    for name, (low, middle, high) in summary["seconds"].items():
        lines.append(f"{name:<52}{middle * 1e3:>9.1f} ms   quartiles {low * 1e3:.1f} to {high * 1e3:.1f}")
    head = f"{summary['n_positions']} positions, {summary['layers']} layers, width {summary['width']}, {summary['dtype']} on {summary['device']}"
    return "\n".join([head, *lines])


def _report(summary: Summary) -> str:
    bitwise = "bit for bit those of the plain forward" if summary["trace_logits_bitwise"] else "not those of the plain forward"
    return (
        f"# Speed\n\nMedians of interleaved rounds in one process; ratios are medians of the ratio within a round.\n\n```\n"
        f"{_table(summary)}\n```\n\nThe traced pass's logits are {bitwise}. The replayed and the naive sweep agree on the most likely "
        f"token in {summary['sweep_same_answers']:.1%} of the entries.\n"
    )
