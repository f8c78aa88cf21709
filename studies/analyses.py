"""What do the analyses cost, next to the forward passes that they read?

Measured as the studies `speed` and `backends` are: side by side in one process, taking turns, on a LLaVA-shaped model with random
weights. An analysis that reads one pass of each example should cost little more than that pass. No data is read, but for the memory of a
whole study, which the bundled model's demo shows.
"""

import sys
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch

from compress.calibration import refuse, sequential
from compress.latency import ratio
from compress.memory import peak_memory
from compress.pruning import Pattern
from probe.alignment import gather_anchors
from probe.analysis.alignment import mean_over_pairs
from probe.analysis.alignment import unit as unit_vectors
from probe.calibration import linear_maps
from probe.example import Example
from probe.likelihood import Method, score_options
from probe.relevance import relevance
from probe.subject import Encoded, Subject
from probe.tracing import last_logits
from studies.data import Data
from studies.implicit_alignment import ANCHORS, WHOLE, watch
from studies.modalities import Part
from studies.ratios import FIGURE, Goal, Measured, bounds, figure, head, lines, over, row
from studies.run import Run
from studies.speed import SCHEMA, eager, interleaved, streamed
from studies.study import Summary, study

EXAMPLES, WORDS = 200, 80  # of an implicit-alignment study: how many there are, and how many are read through the vocabulary
READ = 4  # examples in a pass that is timed
FEW = 32  # examples that a whole study's memory is held against
CALIBRATED = 128  # examples that Wanda looks at
AT_ONCE = 50  # closed forms that are timed together
OPTIONS = ("red", "two blue circle", "left", "there is a green star")
STREAMED = "alignment_memory_ratio"
GOALS = {
    "alignment_over_forwards": (f"implicit alignment of {EXAMPLES} examples / {EXAMPLES} forwards", Goal(1.3)),
    STREAMED: (f"  implicit alignment, peak memory: many examples / {FEW}", Goal(1.05)),
    "pairs_speedup": (f"all pairs of {EXAMPLES} examples: double loop / closed form", Goal(100, most=False)),
    "pairs_difference": ("  their largest difference", Goal(1e-6)),
    "gradient_memory_over_matrices": ("gradient relevance, extra memory: row chain / N x N", Goal(0.1)),
    "gradient_difference": ("  their largest difference", Goal(1e-5, where="in float32")),
    "likelihood_over_one_by_one": (f"likelihood of {len(OPTIONS)} options: one by one / prompt once", Goal(2.5, most=False)),
    "likelihood_difference": ("  their largest difference", Goal(1e-5, where="in float32")),
    "wanda_over_forwards": (f"Wanda by dense states, {CALIBRATED} examples / their forwards", Goal(1.2)),
    "wanda_rerun_over_forwards": ("  Wanda by pruned states (layers twice) / twice the forwards", Goal(1.2)),
}  # fmt: skip
Turns = Callable[[dict[str, Callable[[], Any]]], dict[str, list[float]]]  # seconds of each round, the candidates taking turns
Found = dict[str, Any]  # part of the summary, with `seconds` and `intervals` of its own


@study
def analyses(
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
    stream: int = 512,
    out: Path | None = None,
    seed: int = 0,
    device: str | None = None,
    dtype: str | None = None,
    quiet: bool = False,
) -> Summary:
    """What do the analyses cost, next to the forward passes that they read?

    The sizes are those of the study `speed`. `stream` is how many examples of the demo's data the memory of a whole implicit-alignment study is
    measured with, against 32 (0 leaves it out). Fewer than six rounds give no intervals. The model has random weights: `--model`, `--data` and
    `--limit` change nothing.
    """
    from studies.speed_model import alike, example, llava_shaped, placed

    target, kind = placed(device, dtype)
    sizes = {"layers": layers, "width": width, "heads": heads, "kv_heads": kv_heads, "ffn": ffn, "vocabulary": vocabulary,
             "image_side": image_side, "question": question, "device": str(target), "dtype": str(kind).removeprefix("torch.")}  # fmt: skip
    run = Run.open(out, "analyses", {**sizes, "rounds": rounds, "seed": seed}, {"name": "random"}, SCHEMA)
    subject = llava_shaped(layers, width, heads, kv_heads, ffn, vocabulary, image_side, target, kind, seed)
    asked = example(image_side, question)
    encoded = subject.encode(asked)
    taking_turns = partial(interleaved, rounds=rounds, device=target, quiet=quiet)
    anchors, read = (alike(image_side, question, n, name, seed + n) for name, n in (("anchor", ANCHORS), ("read", READ)))
    parts = [
        _alignment(subject, anchors, read, taking_turns),
        _of_a_study(stream, quiet) if stream else {},
        _pairs(width, target, seed, taking_turns),
        _gradient(subject, encoded, target),
        _likelihood(subject, asked, taking_turns),
        _pruned(subject, read, target, taking_turns),
    ]
    seconds, intervals = ({k: v for part in parts for k, v in part.pop(name, {}).items()} for name in ("seconds", "intervals"))
    summary: Summary = {"run": str(run.folder), "n": rounds, "n_positions": len(encoded.maps[0]), **sizes}
    summary |= {key: value for part in parts for key, value in part.items()} | {"intervals": intervals}
    rows = [{"what": name, "round": i, "seconds": s} for name, values in seconds.items() for i, s in enumerate(values)]
    peaks = summary["gradient_peak_bytes"]
    run.write("all", rows + [{"what": f"peak of relevance, {name}", "bytes": float(peak)} for name, peak in peaks.items()])
    run.figure(FIGURE, *figure([("ratio", _rows(summary, apart=False))], _note(summary)))
    run.finish(summary, _report(summary))
    if not quiet:
        print(_table(summary), file=sys.stderr)
    return summary


# --- what is measured ------------------------------------------------------------------------------------------------


def _alignment(subject: Subject, anchors: list[Example], read: list[Example], taking_turns: Turns) -> Found:
    """The work of an implicit-alignment study, put together from what was measured: its anchors' tokens once, and of each example its rows.

    The other anchors are examples as they are read.
    """
    part = Part("image", subject, Data("bench", tuple(read), ""))
    encoded, gathered, numbered = subject.encode(read), gather_anchors(subject, anchors, "image"), list(enumerate(read))
    rows = lambda words: watch(part, numbered, gathered, words, READ).rows(gathered)  # noqa: E731
    seconds = taking_turns({
        "alignment forwards": lambda: last_logits(subject, encoded),
        "anchors": lambda: gather_anchors(subject, anchors[:READ], "image", READ),
        "alignment": partial(rows, 0),
        "alignment with words": partial(rows, READ),
    })  # fmt: skip
    each = {name: np.array(found) / READ for name, found in seconds.items()}
    whole = WHOLE * each["anchors"] + (EXAMPLES - WORDS) * each["alignment"] + WORDS * each["alignment with words"]
    found = ratio(whole.tolist(), (EXAMPLES * each["alignment forwards"]).tolist())
    return {
        "alignment_over_forwards": found.value, "intervals": {"alignment_over_forwards": bounds(found)}, "seconds": seconds,
        "alignment_parts": {
            name: {"value": one.value, **bounds(one)}
            for name in ("anchors", "alignment", "alignment with words") if (one := over(seconds, name, "alignment forwards"))
        },
    }  # fmt: skip


def _of_a_study(examples: int, quiet: bool) -> Found:
    """Peak memory of the implicit-alignment study on the demo: many examples over few."""
    peaks = streamed("implicit-alignment", (FEW, examples), quiet, "--family", "none")
    return {"stream_examples": examples, STREAMED: peaks[examples] / peaks[FEW], "stream_peak_mib": peaks[examples]}


def _pairs(width: int, target: torch.device, seed: int, taking_turns: Turns) -> Found:
    """The mean cosine of all pairs of two sets, both ways."""
    rng = np.random.default_rng(seed)
    a, b = (torch.tensor(rng.normal(size=(EXAMPLES, width)) + 0.3, dtype=torch.float32, device=target) for _ in range(2))
    many = lambda: [_closed(a, b) for _ in range(AT_ONCE)]  # noqa: E731  one alone is mostly the waking of threads
    seconds = taking_turns({"closed form": many, "double loop": lambda: _loop(a, b)})
    seconds["closed form"] = [s / AT_ONCE for s in seconds["closed form"]]
    found = over(seconds, "double loop", "closed form")
    return {
        "pairs_speedup": found.value, "pairs_difference": abs(_closed(a, b) - _loop(a, b)), "seconds": seconds,
        "intervals": {"pairs_speedup": bounds(found)},
    }  # fmt: skip


def _gradient(subject: Subject, encoded: Encoded, target: torch.device) -> Found:
    """Peak memory of gradient-weighted attention above that of a plain forward, as one row and by matrices; and whether they say the same."""
    by_row = lambda: relevance(subject, encoded, ["gradient-attention"]).scores["gradient-attention"][0]  # noqa: E731
    ways: dict[str, Callable[[], Any]] = {
        "forward": partial(last_logits, subject, encoded), "row chain": by_row, "matrices": partial(by_matrices, subject, encoded),
    }  # fmt: skip
    peaks = {name: peak_memory(call, target) for name, call in ways.items()}
    row, matrices = (peaks[name] - peaks["forward"] for name in ("row chain", "matrices"))
    return {
        "gradient_memory_over_matrices": row / max(1, matrices),
        "gradient_difference": float((ways["row chain"]() - ways["matrices"]().cpu()).abs().max()),
        "gradient_peak_bytes": peaks,
    }


def by_matrices(subject: Subject, encoded: Encoded) -> torch.Tensor:
    """Gradient-weighted attention of one example's last position (position), as published: every attention matrix, its gradient, and R.

    The weights are frozen, so that the graph keeps nothing for their sake.
    """
    weights = [w for w in subject.model.parameters() if w.requires_grad]
    with subject.lock, ExitStack() as stack:
        stack.enter_context(eager(subject))
        stack.callback(subject.layers[0].register_forward_pre_hook(_begin, with_kwargs=True).remove)
        for weight in weights:
            weight.requires_grad_(False)
            stack.callback(weight.requires_grad_, True)
        with torch.enable_grad():
            made = subject.model(**encoded.inputs, use_cache=False, output_attentions=True, logits_to_keep=1)
            slopes = torch.autograd.grad(made.logits[0, -1].float().max(), made.attentions)
    with torch.no_grad():
        whole = torch.eye(made.attentions[0].shape[-1], device=made.logits.device)
        for attention, slope in zip(made.attentions, slopes, strict=True):
            whole = whole + (attention[0].float() * slope[0].float()).clamp(min=0).mean(0) @ whole
    return whole[-1]


def _begin(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """The graph begins with what enters the first layer."""
    (args[0] if args else kwargs["hidden_states"]).requires_grad_(True)


def _likelihood(subject: Subject, asked: Example, taking_turns: Turns) -> Found:
    """Four options after one prompt, both ways: their ratio, and the largest difference of a token's log-probability."""
    scored: dict[str, Callable[[], Any]] = {
        method: partial(score_options, subject, [asked], [OPTIONS], method) for method in get_args(Method)
    }
    seconds = taking_turns(scored)
    once, each = ([p for option in scored[m]()[0].log_probs for p in option] for m in ("prefix", "whole"))
    found = over(seconds, "whole", "prefix")
    return {
        "seconds": seconds, "intervals": {"likelihood_over_one_by_one": bounds(found)}, "likelihood_over_one_by_one": found.value,
        "likelihood_difference": max(abs(x - y) for x, y in zip(once, each, strict=True)),
    }  # fmt: skip


def _pruned(subject: Subject, read: list[Example], target: torch.device, taking_turns: Turns) -> Found:
    """Wanda over a calibration set, put together from what was measured: once its check and its sorting, for each example its share of the loop."""
    few = [subject.encode(one) for one in read]
    ones = torch.ones(1, device=target)
    timed: dict[str, Callable[[], Any]] = {
        "calibration forwards": lambda: [last_logits(subject, one) for one in few],
        "calibration, dense states": lambda: sequential(subject, few, lambda index, layer, maps: None, dense=True, check=False),
        "calibration, pruned states": lambda: sequential(subject, few, lambda index, layer, maps: None, check=False),
        "calibration check": lambda: refuse(subject, few[0]),
        "wanda": lambda: [Pattern(0.5).kept(module.weight.float().abs() * ones) for _, module in linear_maps(subject)],
    }
    seconds = taking_turns(timed)
    each = {name: np.array(found) for name, found in seconds.items()}
    once, sets = each["calibration check"] + each["wanda"], CALIBRATED / len(few)
    found = {
        key: ratio((once + sets * each[name]).tolist(), (times * sets * each["calibration forwards"]).tolist())
        for key, times, name in (
            ("wanda_over_forwards", 1, "calibration, dense states"), ("wanda_rerun_over_forwards", 2, "calibration, pruned states"),
        )
    }  # fmt: skip
    return {
        "seconds": seconds, **{key: one.value for key, one in found.items()},
        "intervals": {key: bounds(one) for key, one in found.items()},
    }  # fmt: skip


def _closed(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(mean_over_pairs(unit_vectors(a).double().sum(0), unit_vectors(b).double().sum(0), len(a), len(b)))


def _loop(a: torch.Tensor, b: torch.Tensor) -> float:
    """Every pair by itself, as the published code has it."""
    rows, columns = a.double().cpu().numpy(), b.double().cpu().numpy()
    lengths = np.linalg.norm(columns, axis=1)
    return float(np.mean([[x @ y / (np.linalg.norm(x) * n) for y, n in zip(columns, lengths, strict=True)] for x in rows]))


# --- the report ------------------------------------------------------------------------------------------------------


def _rows(summary: Summary, apart: bool) -> list[Measured]:
    """What was measured beside its goal; `apart` has differences among the ratios."""
    return [
        row(summary, key, text, goal) for key, (text, goal) in GOALS.items()
        if key in summary and (apart or not key.endswith("difference"))
    ]  # fmt: skip


def _note(summary: Summary) -> str:
    return f"medians over {summary['n']} rounds with 95 % intervals; memory is counted once"


def _table(summary: Summary) -> str:
    return "\n".join([head(summary), *lines(_rows(summary, apart=True))])


def _report(summary: Summary) -> str:
    parts = "; ".join(f"{name} {one['value']:.3g}" for name, one in summary["alignment_parts"].items())
    return (
        f"# What the analyses cost\n\nMedians of ratios within a round, everything taking turns in one process, with 95 % intervals by order statistics "
        f"(none with fewer than six rounds). Memory is counted, once.\n\n![ratios](figures/{FIGURE}.png)\n\n```\n{_table(summary)}\n```\n\n"
        f"Of implicit alignment, each example in forwards of one: {parts}.\n"
    )
