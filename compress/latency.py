"""Latency by phase, models taking turns in one process: vision, choosing, reading the prompt, and each written token.

Every number is measured with the attention kernel that the model uses anyway. Answers have a fixed number of tokens (their end is
suppressed), so that a model that says less is not the faster one. Which model goes first alternates from round to round.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from scipy import stats

from compress.smaller import Smaller
from probe.subject import Encoded, Subject

Verdict = Literal["faster", "slower", "no evidence"]
PHASES = ("vision", "selector", "prefill", "decode", "answer")


@torch.no_grad()
def generate_exactly(subject: Subject, encoded: Encoded, tokens: int) -> Any:
    """Greedy answers of exactly so many tokens."""
    with subject.lock:
        return subject.model.generate(**encoded.inputs, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False)


@dataclass(frozen=True)
class Timed:
    """Milliseconds of one answer.

    `prefill` is all of reading the prompt: `vision` (tower and connector, which transformers may run ahead of the model's own pass) and `selector`
    (the reducers' choices, and what they look at) are parts of it. `decode` is the mean of each token after the first, `answer` the whole.
    """

    vision: float
    selector: float
    prefill: float
    decode: float
    answer: float


@dataclass
class _Clock:
    """Seconds by phase of one answer, and the ends of every pass of the model."""

    device: torch.device
    spent: dict[str, float] = field(default_factory=lambda: {"vision": 0.0, "selector": 0.0})
    passes: list[tuple[float, float]] = field(default_factory=list)
    began: dict[str, float] = field(default_factory=dict)
    first: float = float("inf")  # when reading the prompt began

    def now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def start(self, phase: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            self.began[phase] = self.now()
            self.first = min(self.first, self.began[phase])

        return hook

    def stop(self, phase: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            took = (self.began[phase], self.now())
            if phase == "pass":
                self.passes.append(took)
            else:
                self.spent[phase] += took[1] - took[0]

        return hook

    @contextmanager
    def choosing(self) -> Iterator[None]:
        start = self.now()
        try:
            yield
        finally:
            self.spent["selector"] += self.now() - start


def time_answer(subject: Subject, encoded: Encoded, tokens: int) -> Timed:
    """One answer of `tokens` tokens, timed by phase. The model is left as it was."""
    clock = _Clock(subject.device)
    with _watched(subject, clock):
        start = clock.now()
        generate_exactly(subject, encoded, tokens)
        stop = clock.now()
    read = clock.passes[0][1]
    each = (clock.passes[-1][1] - read) / max(1, len(clock.passes) - 1)
    seconds = (clock.spent["vision"], clock.spent["selector"], read - clock.first, each, stop - start)
    return Timed(*(1e3 * one for one in seconds))


@contextmanager
def _watched(subject: Subject, clock: _Clock) -> Iterator[None]:
    anatomy = subject.anatomy
    inside = bool(anatomy.vision and anatomy.connector and anatomy.connector.startswith(f"{anatomy.vision}."))
    parts = [path for path in (anatomy.vision, None if inside else anatomy.connector) if path]
    watched = [(subject.model.get_submodule(path), "vision") for path in parts] + [(subject.model, "pass")]
    handles = [
        handle for module, phase in watched
        for handle in (
            module.register_forward_pre_hook(clock.start(phase), prepend=True), module.register_forward_hook(clock.stop(phase)),
        )
    ]  # fmt: skip
    runtime = subject.runtime if isinstance(subject, Smaller) else None
    if runtime:
        runtime.choosing = clock.choosing
    try:
        yield
    finally:
        if runtime:
            runtime.choosing = nullcontext
        for handle in handles:
            handle.remove()


def take_turns(
    subjects: Mapping[str, tuple[Subject, Sequence[Encoded]]], rounds: int, tokens: int, warm_up: int = 2,
    advance: Callable[[int], None] = lambda n: None,
) -> dict[str, list[Timed]]:  # fmt: skip
    """Every subject answers once in each round, all of them the same question of their own list, in alternating order."""
    found: dict[str, list[Timed]] = {name: [] for name in subjects}
    order = list(subjects)
    for turn in range(-warm_up, rounds):
        for name in order if turn % 2 == 0 else reversed(order):
            subject, prompts = subjects[name]
            timed = time_answer(subject, prompts[turn % len(prompts)], tokens)
            if turn >= 0:
                found[name].append(timed)
        advance(1)
    return found


@dataclass(frozen=True)
class Spread:
    """Median, quartiles and 90th percentile of milliseconds, and an interval of the median that presumes no distribution."""

    median: float
    lower: float
    upper: float
    p90: float
    low: float
    high: float
    n: int

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        lower, median, upper, p90 = (float(q) for q in np.percentile(values, [25, 50, 75, 90]))
        low, high = median_interval(values)
        return cls(median, lower, upper, p90, low, high, len(values))


def median_interval(values: Sequence[float], level: float = 0.95) -> tuple[float, float]:
    """The interval of a median by order statistics, at least `level` sure; without bounds where there are too few values."""
    ordered, n = sorted(values), len(values)
    rank = int(stats.binom.ppf((1 - level) / 2, n, 0.5))  # so many values may lie below it
    while rank > 0 and 2 * stats.binom.cdf(rank - 1, n, 0.5) > 1 - level:
        rank -= 1
    return (ordered[rank - 1], ordered[n - rank]) if rank > 0 else (float("-inf"), float("inf"))


@dataclass(frozen=True)
class Ratio:
    """Median over rounds of the time of one model over that of another in the same round, its interval, and what it says."""

    value: float
    low: float | None
    high: float | None
    n: int
    verdict: Verdict


def ratio(these: Sequence[float], base: Sequence[float]) -> Ratio:
    """`faster` where the whole interval of the ratio lies below 1, `slower` above it, else `no evidence`."""
    values = [a / b for a, b in zip(these, base, strict=True)]
    low, high = median_interval(values)
    verdict: Verdict = "faster" if high < 1 else "slower" if low > 1 else "no evidence"
    bounded = bool(np.isfinite(low))
    return Ratio(float(np.median(values)), low if bounded else None, high if bounded else None, len(values), verdict)


def amdahl(times: Sequence[Timed]) -> tuple[float, float]:
    """The share of an answer's time that the decoder's reading of the prompt takes, and the most that removing all of it could speed up."""
    share = float(np.median([max(0.0, t.prefill - t.vision - t.selector) / t.answer for t in times]))
    return share, 1 / (1 - share) if share < 1 else float("inf")
