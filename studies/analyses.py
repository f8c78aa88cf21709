"""What do the analyses cost, next to the forward passes that they read?

Measured as the studies `speed` and `backends` are: side by side in one process, taking turns, on a LLaVA-shaped model with random
weights. An analysis that reads one pass of each example should cost little more than that pass.
"""

import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch

from compress.calibration import refuse, sequential
from compress.pruning import Pattern
from probe.alignment import gather_anchors, read_alignment, sides_of
from probe.analysis.alignment import mean_over_pairs, unit
from probe.calibration import linear_maps
from probe.example import Example
from probe.likelihood import Method, score_options
from probe.subject import Subject
from probe.tracing import last_logits
from studies.run import Run
from studies.speed import SCHEMA, interleaved, paired
from studies.study import Summary, study

EXAMPLES, WORDS = 200, 80  # of an implicit-alignment study: how many there are, and how many are read through the vocabulary
CALIBRATED = 128  # examples that Wanda looks at
OPTIONS = ("red", "two blue circle", "left", "there is a green star")
GOALS = {
    "alignment_over_forwards": (f"implicit alignment of {EXAMPLES} examples / {EXAMPLES} forwards", "at most 1.3"),
    "pairs_speedup": (f"all pairs of {EXAMPLES} examples: double loop / closed form", "at least 100"),
    "pairs_difference": ("  their largest difference", "at most 1e-6"),
    "likelihood_over_one_by_one": (f"likelihood of {len(OPTIONS)} options: one by one / prompt once", "at least 2.5"),
    "likelihood_difference": ("  their largest difference", "at most 1e-5 in float32"),
    "wanda_over_forwards": (f"Wanda by dense states, {CALIBRATED} examples / their forwards", "at most 1.2"),
    "wanda_rerun_over_forwards": ("  by pruned states (layers run twice) / twice their forwards", "at most 1.2"),
}  # fmt: skip


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
    rounds: int = 5,
    out: Path | None = None,
    seed: int = 0,
    device: str | None = None,
    dtype: str | None = None,
    quiet: bool = False,
) -> Summary:
    """What do the analyses cost, next to the forward passes that they read?

    The sizes are those of the study `speed`.
    """
    from studies.speed_model import example, llava_shaped, placed

    target, kind = placed(device, dtype)
    sizes = {"layers": layers, "width": width, "heads": heads, "kv_heads": kv_heads, "ffn": ffn, "vocabulary": vocabulary,
             "image_side": image_side, "question": question, "device": str(target), "dtype": str(kind).removeprefix("torch.")}  # fmt: skip
    run = Run.open(out, "analyses", {**sizes, "rounds": rounds, "seed": seed}, {"name": "random"}, SCHEMA)
    subject = llava_shaped(layers, width, heads, kv_heads, ffn, vocabulary, image_side, target, kind, seed)
    asked = example(image_side, question)
    encoded = subject.encode(asked)
    others = [replace(asked, id=f"other {i}") for i in range(4)]
    anchors = gather_anchors(subject, others, "image")
    sides = [sides_of(encoded.maps[0], asked, "image")]
    timed: dict[str, Callable[[], Any]] = {
        "forward": lambda: last_logits(subject, encoded),
        "alignment": lambda: read_alignment(subject, encoded, sides, anchors),
        "alignment with words": lambda: read_alignment(subject, encoded, sides, anchors, words=True),
    }
    seconds = interleaved(timed, rounds, target, quiet)
    rng = np.random.default_rng(seed)
    a, b = (torch.tensor(rng.normal(size=(EXAMPLES, width)) + 0.3, dtype=torch.float32, device=target) for _ in range(2))
    pairs = interleaved({"closed form": lambda: _closed(a, b), "double loop": lambda: _loop(a, b)}, 3, target, quiet)
    seconds |= pairs
    plain, words = (paired(seconds, name, "forward") for name in ("alignment", "alignment with words"))
    calibrated = _pruned(subject, asked, rounds, target, quiet)
    seconds |= calibrated.pop("seconds")
    likelihood = _likelihood(subject, asked, rounds, target, quiet)
    seconds |= likelihood.pop("seconds")
    summary: Summary = {
        "run": str(run.folder), "n_positions": len(encoded.maps[0]), **sizes,
        "alignment_over_forwards": ((EXAMPLES - WORDS) * plain + WORDS * words) / EXAMPLES,
        "pairs_speedup": paired(pairs, "double loop", "closed form"), "pairs_difference": abs(_closed(a, b) - _loop(a, b)),
        **likelihood, **calibrated,
    }  # fmt: skip
    run.write(
        "all", [{"what": name, "round": i, "seconds": s} for name, values in seconds.items() for i, s in enumerate(values)]
    )
    run.finish(summary, f"# What the analyses cost\n\n```\n{_table(summary)}\n```\n")
    if not quiet:
        print(_table(summary), file=sys.stderr)
    return summary


def _likelihood(subject: Subject, asked: Example, rounds: int, target: torch.device, quiet: bool) -> dict[str, Any]:
    """Four options after one prompt, both ways: `seconds`, their ratio, and the largest difference of a token's log-probability."""
    scored: dict[str, Callable[[], Any]] = {
        method: partial(score_options, subject, [asked], [OPTIONS], method) for method in get_args(Method)
    }
    seconds = interleaved(scored, rounds, target, quiet)
    once, each = ([p for option in scored[m]()[0].log_probs for p in option] for m in ("prefix", "whole"))
    return {
        "seconds": seconds, "likelihood_over_one_by_one": paired(seconds, "whole", "prefix"),
        "likelihood_difference": max(abs(x - y) for x, y in zip(once, each, strict=True)),
    }  # fmt: skip


def _pruned(subject: Subject, asked: Example, rounds: int, target: torch.device, quiet: bool) -> dict[str, Any]:
    """Wanda over a calibration set, put together from what was measured: once its check and its sorting, for each example its share of the loop."""
    few = [subject.encode(replace(asked, id=f"calibration {i}")) for i in range(4)]
    ones = torch.ones(1, device=target)
    timed: dict[str, Callable[[], Any]] = {
        "calibration forwards": lambda: [last_logits(subject, one) for one in few],
        "calibration, dense states": lambda: sequential(subject, few, lambda index, layer, maps: None, dense=True, check=False),
        "calibration, pruned states": lambda: sequential(subject, few, lambda index, layer, maps: None, check=False),
        "calibration check": lambda: refuse(subject, few[0]),
        "wanda": lambda: [Pattern(0.5).kept(module.weight.float().abs() * ones) for _, module in linear_maps(subject)],
    }
    seconds = interleaved(timed, min(3, rounds), target, quiet)
    each = {name: np.array(found) for name, found in seconds.items()}
    once, sets = each["calibration check"] + each["wanda"], CALIBRATED / len(few)
    ratios = {
        times: (once + sets * each[name]) / (times * sets * each["calibration forwards"])
        for times, name in ((1, "calibration, dense states"), (2, "calibration, pruned states"))
    }
    return {
        "seconds": seconds,
        "wanda_over_forwards": float(np.median(ratios[1])),
        "wanda_rerun_over_forwards": float(np.median(ratios[2])),
    }


def _closed(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(mean_over_pairs(unit(a).double().sum(0), unit(b).double().sum(0), len(a), len(b)))


def _loop(a: torch.Tensor, b: torch.Tensor) -> float:
    """Every pair by itself, as the published code has it."""
    rows, columns = a.double().cpu().numpy(), b.double().cpu().numpy()
    lengths = np.linalg.norm(columns, axis=1)
    return float(np.mean([[x @ y / (np.linalg.norm(x) * n) for y, n in zip(columns, lengths, strict=True)] for x in rows]))


def _table(summary: Summary) -> str:
    head = f"{summary['n_positions']} positions, {summary['layers']} layers, width {summary['width']}, {summary['dtype']} on {summary['device']}"
    return "\n".join([head, *(f"{text:<56}{summary[key]:>12.3g}   {goal}" for key, (text, goal) in GOALS.items())])
