"""What do tracing and replaying cost, next to a plain forward pass and to the naive way?

Everything is measured side by side in one process on a LLaVA-shaped model with random weights, taking turns: the plain SDPA
forward, the same pass traced (group masses and last rows of every layer), eager attention with output_attentions, and a
replayed three-flow sweep; then, in turns with the replayed sweep again, the naive loop of one masked forward for each
layer and flow. The weights are random and no data is read, but for the memory of a whole study, which the bundled model's demo shows.
"""

import ctypes
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
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
from studies.ratios import FIGURE, Goal, Measured, bounds, figure, head, lines, over, row
from studies.run import Run
from studies.study import Summary, progress, study

SCHEMA = pa.schema([("what", pa.string()), ("round", pa.int32()), ("seconds", pa.float64()), ("bytes", pa.float64())])
SWEPT = ("image->question", "image->last", "question->last")
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # as glibc's malloc.h counts them
ALONE = """
import sys
from studies.cli import app
from studies.speed import resident_peak
failed = app(sys.argv[1:], standalone_mode=False)
print(resident_peak())
sys.exit(failed)
"""  # the command in a process that says how much memory it took
RATIOS = {  # key: what is timed, and over what
    "trace_over_forward": ("trace", "forward"), "eager_over_forward": ("eager", "forward"), "sweep_in_forwards": ("sweep", "forward"),
    "sweep_speedup": ("naive", "sweep again"),
}  # fmt: skip
FEW = 32  # examples that a whole study's memory is held against


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
    naive_rounds: int = 6,
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
    demo's data the memory of a whole study is measured with, against 32 (0 leaves it out). Fewer than six rounds give no intervals. The model has
    random weights: `--model`, `--data` and `--limit` change nothing.
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
    summary = _summarise(subject, encoded, entries, seconds, peaks, timed, {"n": rounds, "n_naive": naive_rounds, **sizes})
    summary |= _of_a_study(stream, quiet) if stream else {}
    summary["run"] = str(run.folder)
    rows = [{"what": name, "round": i, "seconds": s} for name, values in seconds.items() for i, s in enumerate(values)]
    run.write("all", rows + [{"what": f"peak {name}", "bytes": float(peak)} for name, peak in peaks.items()])
    run.figure(FIGURE, *figure([("ratio", _rows(summary))], _note(summary)))
    run.finish(summary, _report(summary))
    if not quiet:
        print(_table(summary), file=sys.stderr)
    return summary


@contextmanager
def eager(subject: Subject) -> Iterator[None]:
    """While this is open the decoder attends as transformers does where patterns are asked for: one matrix of all positions a layer and head."""
    config = subject.decoder.config
    before = config._attn_implementation
    config._attn_implementation_internal = "eager"
    try:
        yield
    finally:
        config._attn_implementation_internal = before


def eager_forward(subject: Subject, encoded: Encoded, output: str) -> Any:
    """What everybody else does: eager attention that returns every pattern (`attentions`), or every `hidden_states`."""
    with eager(subject), torch.no_grad():
        asked = {"output_attentions": output == "attentions", "output_hidden_states": output == "hidden_states"}
        return subject.model(**encoded.inputs, use_cache=False, logits_to_keep=1, **asked)[output]


def interleaved(timed: dict[str, Callable[[], Any]], rounds: int, device: torch.device, quiet: bool) -> dict[str, list[float]]:
    """Seconds of each round, the candidates taking turns, after one warm-up round."""
    keep_what_is_freed()
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


def keep_what_is_freed() -> None:
    """Tells glibc to keep memory for the next pass instead of handing it back.

    Handed back, its pages are faulted in anew in the next pass, or not, as it happens to lie on the heap: a sixth of a pass on a CPU, which fell
    on one candidate or the other.
    """
    keep = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if keep is not None:
        keep(M_TRIM_THRESHOLD, 2**31 - 1)
        keep(M_MMAP_THRESHOLD, 2**25)  # the most that it takes


def _settle(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _of_a_study(examples: int, quiet: bool) -> dict[str, float]:
    """Peak memory of the information-flow study on the demo: many examples over few."""
    peaks = streamed("information-flow", (FEW, examples), quiet)
    return {
        "stream_examples": examples,
        "stream_memory_ratio": peaks[examples] / peaks[FEW],
        "stream_peak_mib": peaks[examples],
    }


def streamed(name: str, counts: Sequence[int], quiet: bool, *options: str) -> dict[int, float]:
    """Peak resident memory (MiB) of a whole study on the demo, with each number of examples in a process of its own."""
    peaks = {}
    with progress(f"memory of {name}", len(counts), quiet, "runs") as advance, tempfile.TemporaryDirectory() as folder:
        for count in counts:
            asked = ["study", name, "--limit", str(count), "--out", str(Path(folder) / str(count)), "--quiet", *options]
            done = subprocess.run([sys.executable, "-c", ALONE, *asked], stdout=subprocess.PIPE, text=True)
            if done.returncode:
                raise StudyError(f"the {name} study failed with {count} examples (exit code {done.returncode})")
            peaks[count] = float(done.stdout.split()[-1])
            advance(1)
    return peaks


def resident_peak() -> float:
    """The most memory (MiB) that this process has had at once.

    On Linux from its own status: what the system tells of a process after its end begins with the peak of the one that started it.
    """
    status = Path("/proc/self/status")
    told = status.read_text().splitlines() if status.is_file() else []
    if peaks := [int(line.split()[1]) for line in told if line.startswith("VmHWM:")]:
        return peaks[0] / 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def _summarise(
    subject: Subject, encoded: Encoded, entries: list[Knockout], seconds: dict[str, list[float]], peaks: dict[str, int],
    timed: dict[str, Callable[[], Any]], sizes: dict[str, Any],
) -> Summary:  # fmt: skip
    quartiles = {name: [float(q) for q in np.percentile(values, [25, 50, 75])] for name, values in seconds.items()}
    plain = timed["forward"]()
    fast, slow = timed["sweep"](), sweep(subject, encoded, entries, method="naive")
    ratios = {key: over(seconds, *names) for key, names in RATIOS.items()}
    return {
        "run": "", "n_positions": len(encoded.maps[0]), "n_entries": len(entries), **sizes,
        "trace_over_forward": ratios["trace_over_forward"].value, "eager_over_forward": ratios["eager_over_forward"].value,
        "trace_extra_memory_over_eager": (peaks["trace"] - peaks["forward"]) / max(1, peaks["eager"] - peaks["forward"]),
        "trace_logits_bitwise": bool(torch.equal(timed["trace"]().logits, plain)),
        "sweep_in_forwards": ratios["sweep_in_forwards"].value,
        "sweep_predicted_in_forwards": 1 + fast.layer_rows / fast.clean_layer_rows,
        "sweep_speedup": ratios["sweep_speedup"].value,
        "sweep_max_difference": float((fast.edited[0] - slow.edited[0]).abs().max()),
        "sweep_same_answers": float((fast.edited[0].argmax(-1) == slow.edited[0].argmax(-1)).float().mean()),
        "intervals": {key: bounds(found) for key, found in ratios.items()}, "seconds": quartiles, "peak_bytes": peaks,
    }  # fmt: skip


def _rows(summary: Summary) -> list[Measured]:
    """The ratios of the table and of the figure."""
    made = [
        row(summary, "trace_over_forward", "trace (group masses, last rows) / forward", Goal(1.06)),
        row(summary, "eager_over_forward", "eager with output_attentions / forward"),
        row(summary, "trace_extra_memory_over_eager", "extra memory of trace / of eager", Goal(0.01)),
        row(summary, "sweep_in_forwards", f"replayed sweep of {summary['n_entries']} entries, in forwards", Goal(2.2)),
        row(summary, "sweep_predicted_in_forwards", "  the sweep by the token-layer model"),
        row(summary, "sweep_speedup", "naive loop / replayed sweep", Goal(18, most=False)),
    ]
    if "stream_memory_ratio" in summary:
        named = f"peak memory of a study, {summary['stream_examples']} examples / {FEW}"
        made.append(row(summary, "stream_memory_ratio", named, Goal(1.05)))
    return made


def _note(summary: Summary) -> str:
    return f"medians over {summary['n']} rounds ({summary['n_naive']} of the naive loop) with 95 % intervals; memory is counted once"


def _table(summary: Summary) -> str:
    gap = row(summary, "sweep_max_difference", "largest difference of the logits", Goal(1e-5, where="in float32"))
    told = lines([*_rows(summary), gap])
    for name, (low, middle, high) in summary["seconds"].items():
        told.append(f"{name:<58}{middle * 1e3:>7.1f} ms   quartiles {low * 1e3:.1f} to {high * 1e3:.1f}")
    return "\n".join([head(summary), *told])


def _report(summary: Summary) -> str:
    bitwise = "bit for bit those of the plain forward" if summary["trace_logits_bitwise"] else "not those of the plain forward"
    return (
        f"# Speed\n\nMedians of interleaved rounds in one process; ratios are medians of the ratio within a round, with 95 % intervals by order "
        f"statistics (none with fewer than six rounds). Memory is counted, once.\n\n![ratios](figures/{FIGURE}.png)\n\n```\n{_table(summary)}\n```\n\n"
        f"The traced pass's logits are {bitwise}. The replayed and the naive sweep agree on the most likely token in "
        f"{summary['sweep_same_answers']:.1%} of the entries.\n"
    )
