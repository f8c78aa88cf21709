"""One bench for every configuration of a model: the same questions, the same dense answers, timed in turns with the dense model."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa

from compress.cost import mean_cost
from compress.downsampling import downsampled, shrunk
from compress.frontier import Point, standings
from compress.latency import PHASES, Ratio, Spread, Timed, amdahl, ratio, take_turns
from compress.measure import Answers, accuracy, affirmed, answer, compare, encode_all, first_token_divergence
from compress.memory import peaks_by_phase
from compress.passes.base import Evidence
from compress.recipe import Recipe, compress
from probe.analysis.stats import ends, paired_difference
from probe.errors import DataError, ExampleError, PassError, SightlineError, TokenError
from probe.example import Example
from probe.subject import Encoded, Subject
from studies.data import TELLINGS, Data, load_data
from studies.run import Run
from studies.tasks.readers import human_answers
from studies.tasks.scores_open import LEAST, score_item, score_open
from studies.work import sift

SCHEMA = pa.schema([
    ("what", pa.string()), ("name", pa.string()), ("example", pa.string()), ("kind", pa.string()), ("right", pa.bool_()),
    ("said", pa.string()), ("divergence", pa.float64()), ("round", pa.int32()), ("phase", pa.string()), ("ms", pa.float64()),
    ("text", pa.string()),
])  # fmt: skip
KEYS = (
    "name", "recipe", "accuracy", "accuracy_low", "accuracy_high", "prefill_ms", "decode_ms", "peak_memory", "flops", "kv_bytes",
    "verdict", "on_frontier", "baseline",
)  # fmt: skip
Rows = list[dict[str, Any]]
BLIND = 64  # at most so many questions are asked without media


@dataclass(frozen=True)
class Configuration:
    """Something to measure: a recipe, a smaller picture (`side`), or neither (the dense model)."""

    name: str
    recipe: Recipe | None = None
    baseline: str = ""  # full, random, pooling, down-sampling; empty for what is no baseline
    side: float | None = None

    @property
    def key(self) -> str:
        """Its name as part of a file's."""
        return "".join(c if c.isalnum() or c in "-." else "-" for c in self.name)

    def told(self) -> str:
        """What it is, for a table: the recipe as YAML in one line."""
        if self.side is not None:
            return f"pictures of {self.side:.3g} of their side"
        return json.dumps(self.recipe.steps()) if self.recipe else ""


@dataclass(eq=False)
class Bench:
    """Measures configurations of one dense model on the same examples.

    `rounds` of `tokens` written tokens are timed in turns with the dense model (0 leaves the times out); without `memory` peaks are not measured
    (`peak_memory` None). The dense answers are computed once.
    """

    dense: Subject
    data: Data
    batch: int = 32
    rounds: int = 12
    tokens: int = 8
    max_new_tokens: int = 4
    seed: int = 0
    memory: bool = True  # whether peaks are measured
    advance: Callable[[int], None] = lambda n: None

    @cached_property
    def sifted(self) -> tuple[tuple[Example, ...], dict[str, str]]:
        """The examples that can be asked and scored, and why the others cannot. Raises DataError when none can."""
        usable, rows = sift(self.data.examples, self._check)
        why = {row["example"]: row["text"] for row in rows}
        if not usable:
            raise DataError(
                f"none of the {len(rows)} examples of {self.data.name} could be used; the first: {next(iter(why.values()), '')}"
            )
        return tuple(usable), why

    def _check(self, example: Example) -> None:
        if example.answer is None:
            raise DataError("it has no answer, and accuracy needs the right one")
        score_item(example, "")  # names a tag of people's answers that cannot be read
        self.dense.render(example)

    @property
    def examples(self) -> tuple[Example, ...]:
        return self.sifted[0]

    @cached_property
    def batches(self) -> list[Encoded]:
        return encode_all(self.dense, self.examples, self.batch)

    @cached_property
    def prompts(self) -> list[Encoded]:
        """The prompts that are timed and costed, one at a time."""
        return [self.dense.encode(example) for example in self.examples[: max(8, min(16, self.rounds))]]

    @cached_property
    def answers(self) -> Answers:
        return answer(self.dense, self.batches, self.max_new_tokens)

    @cached_property
    def blind(self) -> tuple[str, tuple[Example, ...]]:
        """Questions without a picture, and what they are: text twins where the data has them."""
        if self.data.name in TELLINGS and self.data.name != "demo:text":
            return "text twins", tuple(load_data("demo:text", min(BLIND, len(self.examples)), seed=self._data_seed).examples)
        what = (
            "the same questions with their context alone"
            if any(e.context for e in self.examples)
            else "the same questions, shown nothing"
        )
        return what, tuple(self.dense.without_media(example) for example in self.examples[:BLIND])

    @property
    def _data_seed(self) -> int:
        return int(self.data.fingerprint.rsplit(":", 1)[1])

    @cached_property
    def told_blind(self) -> tuple[list[Encoded], Answers] | str:
        """The dense model's answers without media, or why there are none."""
        try:
            batches = encode_all(self.dense, self.blind[1], self.batch)
        except SightlineError as error:
            return str(error)
        return batches, answer(self.dense, batches, self.max_new_tokens)

    # --- one configuration ---

    @contextmanager
    def opened(self, one: Configuration, evidence: Evidence | None = None) -> Iterator[Subject]:
        """The model of a configuration; what hangs on it comes off afterwards. Raises PassError where it is refused."""
        if one.side is not None:
            smaller = downsampled(self.dense, one.side)
        elif one.recipe is not None:
            smaller = compress(self.dense, one.recipe, evidence)
        else:
            yield self.dense
            return
        try:
            yield smaller
        finally:
            smaller.detach()

    def measure(self, one: Configuration, evidence: Evidence | None = None) -> Rows:
        """Every row of a configuration: its answers, its times, and the point that they make."""
        with self.opened(one, evidence) as subject:
            return self.measure_model(one, subject)

    def measure_model(self, one: Configuration, subject: Subject) -> Rows:
        """The same for a model that is open already."""
        shown = self.examples
        batches, prompts = self.batches, self.prompts
        if one.side is not None or subject.processor is not self.dense.processor:
            shown = tuple(shrunk(subject, self.examples, one.side)) if one.side is not None else self.examples
            batches = encode_all(subject, shown, self.batch)
            prompts = [subject.encode(example) for example in shown[: len(self.prompts)]]
        answers = self.answers if subject is self.dense else answer(subject, batches, self.max_new_tokens)
        divergence = self._divergence(answers)
        items: Rows = [
            {"what": "item", "name": one.name, "example": e.id, "kind": e.tags.get("kind", ""), "right": bool(answers.right[i]),
             "said": answers.said[i], "divergence": None if divergence is None else float(divergence[i])}
            for i, e in enumerate(self.examples)
        ]  # fmt: skip
        times = self._timed(subject, prompts)
        rows: Rows = [
            {"what": "time", "name": who, "round": i, "phase": phase, "ms": getattr(timed, phase)}
            for who, found in times.items() for i, timed in enumerate(found) for phase in PHASES
        ]  # fmt: skip
        point = self._point(one, subject, answers, times, prompts)
        return [*items, *rows, {"what": "point", "name": one.name, "text": json.dumps(point)}]

    def _divergence(self, answers: Answers) -> np.ndarray | None:
        return first_token_divergence(self.answers, answers) if answers.first.shape == self.answers.first.shape else None

    def _timed(self, subject: Subject, prompts: Sequence[Encoded]) -> dict[str, list[Timed]]:
        """Both models in turns; the dense one against itself where it is the one that is measured."""
        if not self.rounds:
            return {}
        both = {"dense": (self.dense, self.prompts), "this": (subject, prompts)}
        return take_turns(both, self.rounds, self.tokens)

    def _point(
        self, one: Configuration, subject: Subject, answers: Answers, times: Mapping[str, Sequence[Timed]], prompts: Sequence[Encoded]
    ) -> dict[str, Any]:  # fmt: skip
        shares = accuracy(answers)
        cost, dense = mean_cost(subject, prompts), mean_cost(self.dense, self.prompts)
        memory = peaks_by_phase(subject, prompts[0], self.tokens) if self.memory else {}
        weights = sum(w.numel() * w.element_size() for w in subject.model.parameters())
        same = answers.first.shape == self.answers.first.shape
        return {
            "name": one.name, "recipe": one.told(), "baseline": one.baseline, "n": len(self.examples),
            "accuracy": shares["all"].value, "accuracy_low": shares["all"].low, "accuracy_high": shares["all"].high,
            "accuracy_by_kind": {kind: vars(share) for kind, share in shares.items() if kind != "all"},
            "affirmed": vars(affirmed(answers)), "open": self._open(answers),
            **(compare(self.answers, answers, self.seed).told() if same else {}), "text_only": self._text_only(subject),
            **_times(times), "peak_memory": weights + max(memory.values()) if memory else None, "memory": {"weights": weights, **memory},
            "flops": cost.flops, "flops_ratio": cost.macs / dense.macs, "flops_by_phase": {
                phase: None if macs is None else 2 * macs for phase, macs in cost.by_phase.items()
            }, "decode_flops": 2 * cost.decode_macs, "kv_bytes": cost.kv_bytes, "kv_ratio": cost.kv_bytes / max(1.0, dense.kv_bytes),
            "parameters": cost.parameters, "not_counted": list(cost.notes),
        }  # fmt: skip

    def _open(self, answers: Answers) -> dict[str, Any] | None:
        """VQA accuracy, and its paired difference to the dense model, where people's answers are known; None elsewhere."""
        if not any(len(human_answers(example)) >= LEAST for example in self.examples):
            return None
        these, dense = (
            np.array([score_item(e, text) for e, text in zip(self.examples, said, strict=True)], dtype=np.float64)
            for said in (answers.said, self.answers.said)
        )
        gap = paired_difference(these, dense, self.seed)
        low, high = ends(float(gap.low), float(gap.high))
        score = score_open(self.examples, answers.said, self.seed)
        return {**score.as_dict(), "difference": {"value": float(gap.value), "low": low, "high": high, "n": score.n}}

    def _text_only(self, subject: Subject) -> dict[str, Any]:
        """How the model answers where it is shown nothing: what a step took from its language."""
        if isinstance(self.told_blind, str):
            return {"refused": self.told_blind}
        batches, dense = self.told_blind
        these = dense if subject is self.dense else answer(subject, batches, self.max_new_tokens)
        found = compare(dense, these, self.seed) if these.first.shape == dense.first.shape else None
        told = {key: value for key, value in found.told().items() if key != "by_kind"} if found else {}
        return {"what": self.blind[0], "accuracy": vars(accuracy(these)["all"]), **told}


def _times(times: Mapping[str, Sequence[Timed]]) -> dict[str, Any]:
    """Medians of the phases, ratios to the dense model in the same round, and the verdict on the whole answer."""
    if not times:
        return {"prefill_ms": None, "decode_ms": None, "verdict": None, "phases": {}, "ratios": {}, "amdahl": None}
    this, dense = times["this"], times["dense"]
    spreads = {phase: Spread.of([getattr(t, phase) for t in this]) for phase in PHASES}
    ratios: dict[str, Ratio] = {
        phase: ratio([getattr(t, phase) for t in this], [getattr(t, phase) for t in dense])
        for phase in ("prefill", "decode", "answer")
    }
    share, bound = amdahl(dense)
    return {
        "prefill_ms": spreads["prefill"].median, "decode_ms": spreads["decode"].median, "verdict": ratios["answer"].verdict,
        "phases": {phase: _bounded(spread) for phase, spread in spreads.items()},
        "ratios": {phase: vars(found) for phase, found in ratios.items()}, "amdahl": {"prefill_share": share, "bound": bound},
    }  # fmt: skip


def _bounded(spread: Spread) -> dict[str, Any]:
    return {key: None if isinstance(value, float) and not np.isfinite(value) else value for key, value in vars(spread).items()}


def settled(run: Run, one: Configuration, measure: Callable[[Configuration], Rows]) -> str:
    """Measures a configuration that the run does not hold yet; why it was refused, if it was. Raises what the dense model itself is refused for."""
    if run.pending([one.key]):
        try:
            rows = measure(one)
        except (PassError, ExampleError, TokenError) as error:
            if one.baseline == "full":
                raise
            rows = [{"what": "refused", "name": one.name, "text": str(error)}]
        run.write(one.key, rows)
    found = run.rows_of(one.key).to_pylist()
    return next((row["text"] for row in found if row["what"] == "refused"), "")


# --- points together -------------------------------------------------------------------------------------------------


def collect(rows: pa.Table) -> list[dict[str, Any]]:
    """The points that the records of a run hold, with their places on the frontiers of time and of FLOPs."""
    found = rows.to_pylist()
    points = [json.loads(row["text"]) for row in found if row["what"] == "point"]
    right = {p["name"]: np.array([r["right"] for r in found if r["what"] == "item" and r["name"] == p["name"]]) for p in points}
    flops = standings([Point(p["name"], right[p["name"]], (p["flops"],) * 3) for p in points])
    timed = [p for p in points if p["ratios"]]
    times = standings([Point(p["name"], right[p["name"]], _ratio_of(p)) for p in timed])
    for point in points:
        name = point["name"]
        point["standing"] = {"flops": flops[name], "prefill": times.get(name)}
        point["on_frontier"] = "frontier" in (flops[name], times.get(name))  # of FLOPs, or of measured time
        point["separable"] = "dominated" not in (flops[name], times.get(name))
    return [{**{key: point[key] for key in KEYS}, **point} for point in points]


def _ratio_of(point: Mapping[str, Any]) -> tuple[float, float, float]:
    found = point["ratios"]["prefill"]
    if point["baseline"] == "full":  # itself
        return (1.0, 1.0, 1.0)
    low, high = found["low"], found["high"]
    return found["value"], 0.0 if low is None else low, float("inf") if high is None else high
