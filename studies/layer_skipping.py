"""Which layers do visual tokens need, which do words, and does a score tell before one tries?

Every layer is passed by alone, by visual tokens, by the words of the prompt, and by all, as a whole and in its halves; then more and more layers
together, chosen by four ways of ranking them. The method is ShortV's (arXiv 2504.00502) and IMA's (arXiv 2405.16700).
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

import numpy as np

from compress.cost import mean_cost
from compress.evidence import gather
from compress.latency import ratio, take_turns
from compress.measure import Answers, answer, compare
from compress.passes.skips import Mode, Skip
from compress.recipe import Recipe
from compress.skips.rule import Who
from compress.smaller import Smaller
from probe.analysis.stats import benjamini_hochberg, spearman, wilson
from probe.errors import SightlineError, StudyError
from probe.example import Example
from probe.subject import Subject
from studies.bench import SCHEMA, Bench, Configuration
from studies.data import apart
from studies.run import Run
from studies.study import Setting, Summary, describe, progress, study

MODES: tuple[Mode, ...] = ("block", "ffn", "attention")
ROWS: tuple[Who, ...] = ("perceptual", "text", "all")
RANKED = ("contribution", "block_influence_visual", "block_influence")
RANDOM = 3  # random orders of the layers
STEPS = 8  # at most so many sizes of growing sets
Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Skipped:
    """One way of passing layers by."""

    rows: Who
    mode: Mode
    layers: tuple[int, ...]

    @property
    def name(self) -> str:
        return f"{self.rows} {self.mode} {'+'.join(map(str, self.layers)) or 'none'}"

    @property
    def key(self) -> str:
        """Its name as part of a file's."""
        text = self.name.replace(" ", "-")
        return text if len(text) <= 100 else f"{text[:80]}-{sha256(text.encode()).hexdigest()[:12]}"


@study
def layer_skipping(setting: Setting, *, calibration: int = 32, rounds: int = 12, tokens: int = 2) -> Summary:
    """Which layers do visual tokens need, which do words, and does a score tell before one tries?

    `calibration` examples rank the layers and judge nothing (the demo world makes new ones; of other data every other one is taken), `rounds` is how
    often each growing set is timed in turns with the dense model (0 leaves times out), `tokens` how many tokens each timed answer has.
    """
    if calibration < 1:
        raise StudyError("layers are ranked on examples of their own: --calibration is at least 1")
    judge, rank = apart(setting.data, calibration)
    bench = Bench(setting.subject, judge, setting.batch, rounds, tokens, seed=setting.seed)
    config = {
        "data": setting.data.name, "fingerprint": setting.data.fingerprint, "examples": len(judge), "calibration": len(rank),
        "rounds": rounds, "tokens": tokens, "batch": setting.batch, "seed": setting.seed,
    }  # fmt: skip
    run = Run.open(setting.out, "layer-skipping", config, describe(setting.subject), SCHEMA)
    refused: dict[str, str] = {}
    alone = [Skipped(rows, mode, (layer,)) for rows in ROWS for mode in MODES for layer in range(setting.subject.n_layers)]
    with run.recorded():
        scores = _scores(run, setting, rank)
        orders = rankings(scores, setting.subject.n_layers, setting.seed)
        grown = [Skipped("perceptual", "block", chosen) for order in orders.values() for chosen in _sets(order)]
        first = next(iter(orders.values()))
        grown += [Skipped(rows, "block", chosen) for rows in ("text", "all") for chosen in _sets(first)]
        timed = {one.name for one in grown}
        todo = list({one.name: one for one in [Skipped("perceptual", "block", ()), *grown, *alone]}.values())
        with progress("ways of skipping", len(todo), setting.quiet, "ways") as advance:
            for one in todo:
                if run.pending([one.key]):
                    try:
                        run.write(one.key, _measured(bench, one, one.name in timed))
                    except SightlineError as error:  # this model has no such rows, or no such half
                        refused[one.name] = str(error)
                advance(1)
        points = {one.name: _point(run, one) for one in todo if one.name not in refused}
        if len(points) < 2:
            raise StudyError(f"no layer of this model can be passed by; the first reason: {next(iter(refused.values()))}")
        summary = summarise(points, scores, orders, refused, bench)
        summary["run"] = str(run.folder)
        from studies.layer_skipping_report import figures, report

        figures(run, summary)
        run.finish(summary, report(summary, setting))
    return summary


def _scores(run: Run, setting: Setting, examples: Sequence[Example]) -> dict[str, list[float]]:
    """Scores of layers, kept in the run. Raises PassError where a model has none of a picture's."""
    if run.pending(["scores"]):
        found = gather(setting.subject, examples, ["layer_scores"], setting.seed)["layer_scores"]
        run.write("scores", [{"what": "scores", "text": json.dumps({name: found[name] for name in RANKED if name in found})}])
    scores: dict[str, list[float]] = json.loads(run.rows_of("scores").to_pylist()[0]["text"])
    return scores


def rankings(scores: Mapping[str, Sequence[float]], n_layers: int, seed: int) -> dict[str, tuple[int, ...]]:
    """Orders in which layers are passed by: by each score from the lowest, evenly spread, and at random."""
    orders = {
        name: tuple(sorted(range(n_layers), key=lambda i: (values[i], i)))
        for name in RANKED
        if (values := scores.get(name)) is not None
    }
    strides = sorted(range(n_layers), key=lambda i: (i % 2 == 0, i))  # every other one first, as IMA's interval of 2 has it
    orders["interval"] = tuple(strides)
    for number in range(RANDOM):
        orders[f"random {number + 1}"] = tuple(np.random.default_rng((seed, number)).permutation(n_layers).tolist())
    return orders


def _sets(order: Sequence[int]) -> list[tuple[int, ...]]:
    """The first layers of an order, more and more of them, at most `STEPS` sizes."""
    return [tuple(sorted(order[:size])) for size in sizes(len(order))]


def sizes(n_layers: int) -> list[int]:
    """How many layers growing sets have."""
    return sorted({round(n_layers * step / min(STEPS, n_layers)) for step in range(1, min(STEPS, n_layers) + 1)})


def _measured(bench: Bench, one: Skipped, timed: bool) -> Rows:
    """Rows of one way: every answer beside the dense one's, its cost, and its times where they are asked for."""
    passes = (Skip(rows=one.rows, mode=one.mode, layers=one.layers, when="both"),) if one.layers else ()
    with bench.opened(Configuration(one.name, Recipe(passes, one.name))) as subject:
        answers = answer(subject, bench.batches, bench.max_new_tokens)
        found = compare(bench.answers, answers, bench.seed)
        low, high = wilson(int(answers.right.sum()), len(answers.right))
        point = {
            "accuracy": float(answers.right.mean()), "accuracy_low": low, "accuracy_high": high, **{key: value for key, value in found.told().items() if key != "by_kind"},
            **_costs(bench, subject), **_times(bench, subject, timed),
        }  # fmt: skip
    items = _items(bench, one.name, answers)
    return [*items, {"what": "point", "name": one.name, "text": json.dumps(point)}]


def _items(bench: Bench, name: str, answers: Answers) -> Rows:
    return [
        {"what": "item", "name": name, "example": e.id, "kind": e.tags.get("kind", ""), "right": bool(answers.right[i]), "said": answers.said[i]}
        for i, e in enumerate(bench.examples)
    ]  # fmt: skip


def _costs(bench: Bench, subject: Subject) -> dict[str, float]:
    """Shares of the dense model's multiply-adds: of reading a prompt in the decoder, of all of it, and of its keys and values."""
    found, dense = mean_cost(subject, bench.prompts), mean_cost(bench.dense, bench.prompts)
    prefill = float(found.by_phase["prefill"] or 0.0) / float(dense.by_phase["prefill"] or 1.0)
    return {"flops": 2 * found.macs, "flops_ratio": found.macs / dense.macs, "prefill_flops_ratio": prefill,
            "kv_ratio": found.kv_bytes / max(1.0, dense.kv_bytes)}  # fmt: skip


def _times(bench: Bench, subject: Subject, timed: bool) -> dict[str, Any]:
    """The time of reading a prompt over the dense model's in the same round, tower and all; None where nothing is timed."""
    if not timed or not bench.rounds or not isinstance(subject, Smaller):
        return {"prefill": None}
    found = take_turns({"dense": (bench.dense, bench.prompts), "this": (subject, bench.prompts)}, bench.rounds, bench.tokens)
    return {"prefill": vars(ratio([t.prefill for t in found["this"]], [t.prefill for t in found["dense"]]))}


def _point(run: Run, one: Skipped) -> dict[str, Any]:
    rows = run.rows_of(one.key).to_pylist()
    point = json.loads(next(row["text"] for row in rows if row["what"] == "point"))
    return {"name": one.name, "rows": one.rows, "mode": one.mode, "skipped": list(one.layers), **point}


# --- numbers ---------------------------------------------------------------------------------------------------------


def summarise(
    points: Mapping[str, Mapping[str, Any]], scores: Mapping[str, Sequence[float]], orders: Mapping[str, Sequence[int]],
    refused: Mapping[str, str], bench: Bench,
) -> Summary:  # fmt: skip
    """What each layer alone costs, what growing sets cost by each ranking, and how scores agree with what was measured."""
    n_layers = bench.dense.n_layers
    dense = points["perceptual block none"]
    alone: dict[str, Any] = {
        rows: {mode: curve for mode in MODES if (curve := _alone(points, rows, mode, n_layers)) is not None} for rows in ROWS
    }  # fmt: skip
    grown = {name: _grown(points, "perceptual", order) for name, order in orders.items()}
    first = next(iter(orders))
    contrast = {rows: _grown(points, rows, orders[first]) for rows in ROWS}
    return {
        "run": "", "n": len(bench.examples), "unused": bench.sifted[1], "n_layers": n_layers, "dense": dense, "alone": alone, "scores": dict(scores),
        "orders": {name: list(order) for name, order in orders.items()}, "sizes": sizes(n_layers), "grown": grown,
        "ranked_by": first, "contrast": contrast, "agreement": agreement(alone, scores), "skipped": dict(refused),
        "points": list(points.values()),
    }  # fmt: skip


def _alone(points: Mapping[str, Mapping[str, Any]], rows: Who, mode: Mode, n_layers: int) -> dict[str, Any] | None:
    """One mode at each layer: accuracy less the dense one's with its interval, KL of the first token, and McNemar's test over all layers."""
    found = [points.get(Skipped(rows, mode, (layer,)).name) for layer in range(n_layers)]
    known = [one for one in found if one is not None]
    if not known:
        return None
    p = np.array([np.nan if one is None else one["p"] for one in found], dtype=np.float64)
    return {**_curves(found), "q": [None if np.isnan(v) else float(v) for v in benjamini_hochberg(p)]}


def _grown(points: Mapping[str, Mapping[str, Any]], rows: Who, order: Sequence[int]) -> dict[str, Any] | None:
    found = [points.get(Skipped(rows, "block", chosen).name) for chosen in _sets(order)]
    return _curves(found) if any(one is not None for one in found) else None


def _curves(found: Sequence[Mapping[str, Any] | None]) -> dict[str, Any]:
    """Points as curves: `difference` and `divergence` with their ends, `accuracy`, shares of FLOPs, and measured times; None where one is missing."""

    def column(*path: str) -> list[float | None]:
        values = []
        for one in found:
            value: Any = one
            for part in path:
                value = None if value is None else value[part]
            values.append(value)
        return values

    curves = {
        key: {"mean": column(key, "value"), "low": column(key, "low"), "high": column(key, "high")} for key in ("difference", "divergence")
    }  # fmt: skip
    shares = {key: column(key) for key in ("accuracy", "prefill_flops_ratio", "flops_ratio", "kv_ratio")}
    prefill = {"mean": column("prefill", "value"), "low": column("prefill", "low"), "high": column("prefill", "high")}
    return {**curves, **shares, "prefill": prefill, "verdict": column("prefill", "verdict")}


def agreement(alone: Mapping[str, Any], scores: Mapping[str, Sequence[float]]) -> dict[str, float | None]:
    """Spearman's correlation over layers of each score with the KL that freezing visual tokens there costs, on other examples."""
    measured = (alone["perceptual"].get("block") or {}).get("divergence")
    if measured is None:
        return {}
    cost = np.array(measured["mean"], dtype=np.float64)
    found = {name: spearman(np.array(values, dtype=np.float64), cost) for name, values in scores.items()}
    return {name: None if np.isnan(value) else value for name, value in found.items()}
