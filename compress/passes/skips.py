"""Rows that pass layers by: visual tokens, or all of them; whole blocks, their attention, or their feed-forward block."""

from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar, Literal

from compress.passes.base import Change, Evidence, Pass, Stage
from compress.skips.rule import Rule, When, Who, refuse
from compress.skips.runtime import SkipRuntime
from compress.smaller import Smaller
from probe.errors import PassError
from probe.subject import Subject

Mode = Literal["block", "ffn", "attention", "parallel-attention"]


class SkipRows(Change):
    """Rows of some layers that do without a part of them, as a ledger has it."""

    kind: ClassVar[str] = "skip-rows"
    runs: ClassVar[bool] = True
    layers: tuple[int, ...]
    rule: Rule

    def carry_out(self, smaller: Smaller) -> None:
        smaller.attached.append(SkipRuntime(smaller, self.rule, self.layers))

    def masked(self) -> Change:
        return self.model_copy(update={"rule": replace(self.rule, simulated=True)})


def _planned(subject: Subject, rule: Rule, layers: Sequence[int]) -> list[Change]:
    if not layers:
        return []
    refuse(subject, rule, layers)
    return [SkipRows(layers=tuple(sorted(set(layers))), rule=rule)]


class Skip(Pass):
    """Skipping computations (IMA, arXiv 2405.16700; arXiv 2410.09454): rows do without a part of every other layer.

    `mode`: `block` (nothing happens to the row), `ffn` (attention alone), `attention` (feed-forward block alone), `parallel-attention` (the
    feed-forward block reads what the attention reads: nothing is left out). `rows`: `perceptual` (visual tokens; others still look at them unless
    `kv` is false), `text` (all others, which is a contrast and no way to save), or `all`. `when`: while the `prompt` is read, while the `answer` is written, or `both`. Layers are those named, or start <
    layer < end with layer % interval == 0; `end` is the last layer unless set, so that the first and the last always run.

    `compat` is the published code where it departs from this: `attention` feeds the attention's normed input to the feed-forward block, and
    `ffn` for perceptual rows adds the feed-forward block's normed input in place of nothing.
    """

    title: ClassVar[str] = "skip"
    stage: ClassVar[Stage] = "skips"
    repeatable: ClassVar[bool] = True
    mode: Mode = "block"
    rows: Who = "perceptual"
    when: When = "both"
    layers: tuple[int, ...] | None = None
    interval: int = 2
    start: int = 0
    end: int | None = None
    kv: bool = True
    compat: bool = False
    simulated: bool = False

    def plan(self, subject: Subject, evidence: Evidence) -> Sequence[Change]:
        if not self.kv and (self.rows != "perceptual" or self.mode not in ("block", "attention")):
            raise PassError("keys and values can be left out of perceptual rows that do not attend: mode block or attention")
        rule = Rule(
            rows=self.rows, when=self.when, query=self.mode in ("ffn", "parallel-attention"), ffn=self.mode != "block" and self.mode != "ffn",
            kv=self.kv, parallel=self.mode == "parallel-attention", compat=self.compat, simulated=self.simulated,
        )  # fmt: skip
        return _planned(subject, rule, self.layers if self.layers is not None else self._spread(subject))

    def _spread(self, subject: Subject) -> list[int]:
        if self.interval < 1:
            raise PassError(f"every {self.interval}th layer is none: an interval is 1 or more")
        end = subject.n_layers - 1 if self.end is None else self.end
        return [layer for layer in range(subject.n_layers) if self.start < layer < end and layer % self.interval == 0]


class ShortV(Pass):
    """ShortV (arXiv 2504.00502): visual tokens are frozen in some layers, where words still look at them.

    The layers are those named, or the `count` that `score` ranks lowest (evidence `layer_scores`; the paper's `contribution`).
    """

    title: ClassVar[str] = "shortv"
    stage: ClassVar[Stage] = "skips"
    layers: tuple[int, ...] | None = None
    count: int | None = None
    score: Literal["contribution", "block_influence", "block_influence_visual", "block_influence_text"] = "contribution"
    simulated: bool = False

    def asks(self) -> tuple[str, ...]:
        return () if self.layers is not None or self.count == 0 else ("layer_scores",)

    def plan(self, subject: Subject, evidence: Evidence) -> Sequence[Change]:
        if (self.layers is None) == (self.count is None):
            raise PassError("shortv takes either layers or a count")
        rule = Rule(query=False, ffn=False, simulated=self.simulated)
        return _planned(subject, rule, self.layers if self.layers is not None else self._ranked(subject, evidence))

    def _ranked(self, subject: Subject, evidence: Evidence) -> tuple[int, ...]:
        assert self.count is not None
        if not 0 <= self.count <= subject.n_layers:
            raise PassError(f"visual tokens can be frozen in 0 to {subject.n_layers} layers, not in {self.count}")
        if self.count == 0:
            return ()
        scores = self.found(evidence, "layer_scores")
        if self.score not in scores:
            raise PassError(f"the evidence has no layer scores {self.score!r}: it has {', '.join(scores)}")
        values = list(scores[self.score])
        return tuple(sorted(range(len(values)), key=lambda i: (values[i], i))[: self.count])


class Composite(Pass):
    """Composite attention (EE-MLLM, arXiv 2408.11795): visual tokens do not attend, and go through the feed-forward block alone.

    A reconstruction from the paper's words and its FLOPs: no code is published. In all layers unless some are named. `ffn_for_visual` false
    freezes them (ShortV everywhere); `kv_from_updated` makes their keys and values of what the feed-forward block has made of them.
    """

    title: ClassVar[str] = "composite"
    stage: ClassVar[Stage] = "skips"
    layers: tuple[int, ...] | None = None
    ffn_for_visual: bool = True
    kv_from_updated: bool = False
    simulated: bool = False

    def plan(self, subject: Subject, evidence: Evidence) -> Sequence[Change]:
        if self.kv_from_updated and not self.ffn_for_visual:
            raise PassError("without a feed-forward block nothing updates visual tokens: leave kv_from_updated out")
        rule = Rule(query=False, ffn=self.ffn_for_visual, updated=self.kv_from_updated, simulated=self.simulated)
        return _planned(subject, rule, self.layers if self.layers is not None else range(subject.n_layers))
