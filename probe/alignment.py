"""Reads how alike perceptual and textual tokens are off one forward pass, every layer and site of it, keeping nothing but numbers."""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from probe.analysis.alignment import cosine, diagonal, divergences, layers_for_vocabulary, norms, similarities, unit
from probe.errors import ExampleError
from probe.example import Example
from probe.sites import SITES, watching
from probe.subject import Encoded, Subject
from probe.tokens import TokenMap
from probe.tracing import last_logits, read_out

WORDS = ("question", "options", "suffix", "header")  # the textual side: without the system message, as published
SIDES = ("perceptual", "textual")
INTERVALS = (1, 8)  # layers between which a token is compared with itself


@dataclass(frozen=True)
class Sides:
    """Positions of the two kinds of tokens of one example."""

    perceptual: np.ndarray
    textual: np.ndarray


def sides_of(token_map: TokenMap, example: Example, modality: str) -> Sides:
    """Perceptual and textual positions: `modality` is a medium, or `text`, whose perceptual side is the context (a text twin).

    Raises ExampleError for an example that has nothing on one of the sides.
    """
    perceptual = token_map.positions("context" if modality == "text" else modality)
    textual = np.concatenate([token_map.positions(name) for name in WORDS])
    for name, found in (("tokens of the " + ("context" if modality == "text" else modality), perceptual), ("words", textual)):
        if not len(found):
            raise ExampleError(f"example {example.id!r} has no {name} to compare")
    return Sides(perceptual, np.sort(textual))


@dataclass
class Anchors:
    """Textual states of other examples, with which an example's perceptual ones have nothing to do: the unmatched side.

    A fixed few of them, so that what is unmatched does not depend on the batch an example came in.
    """

    ids: list[str] = field(default_factory=list)
    means: dict[tuple[str, int], list[Tensor]] = field(default_factory=dict)  # (site, layer): mean textual state of each
    tokens: dict[int, list[Tensor]] = field(default_factory=dict)  # state index: textual states of each, for the other modes

    def others(self, example: Example) -> list[int]:
        """Indices of the anchors that are not this example."""
        return [i for i, name in enumerate(self.ids) if name != example.id]


@dataclass
class Reading:
    """What one example says.

    A state index counts what enters layer 0 as 0 and what leaves layer l as l + 1. `similar[pairing][mode]` and `norm[side][kind]` go
    over state indices; `sites[pairing][site]` over layers, None where a layer has no such site; `from_input[pairing]` compares
    the perceptual side at state 0 with the textual one at each state; `drift[side][interval][mode]` over the states that have
    one `interval` later; `words[reading][kind]` over the states of `layers_for_vocabulary`.
    """

    example: str
    similar: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    from_input: dict[str, list[float]] = field(default_factory=dict)
    sites: dict[str, dict[str, dict[int, float]]] = field(default_factory=dict)
    norm: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    drift: dict[str, dict[int, dict[str, list[float]]]] = field(default_factory=dict)
    words: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    units: dict[str, Float[np.ndarray, "state width"]] = field(default_factory=dict)  # unit mean states of each side


def gather_anchors(
    subject: Subject, examples: Sequence[Example], modality: str, whole: int = 3, sites: Sequence[str] = SITES
) -> Anchors:
    """The textual states of some examples, one pass each; of the first `whole` token by token."""
    anchors = Anchors()
    for example in examples:
        encoded = subject.encode(example)
        at = torch.from_numpy(sides_of(encoded.maps[0], example, modality).textual)
        keeps = len(anchors.ids) < whole

        def take(site: str, layer: int, state: Tensor, at: Tensor = at, keeps: bool = keeps) -> None:
            words = state[0, at.to(state.device)].float()
            anchors.means.setdefault((site, layer), []).append(words.mean(0))
            if keeps and site == "in" and layer == 0:
                anchors.tokens.setdefault(0, []).append(words)
            if keeps and site == "out":
                anchors.tokens.setdefault(layer + 1, []).append(words)

        with watching(subject, take, sites):
            last_logits(subject, encoded)
        anchors.ids.append(example.id)
    return anchors


def read_alignment(
    subject: Subject, encoded: Encoded, sides: Sequence[Sides], anchors: Anchors | None = None, words: bool = False,
    sites: Sequence[str] = SITES,
) -> list[Reading]:  # fmt: skip
    """One forward pass over a batch, and a Reading of each of its examples.

    With `words`, the vocabulary distributions of a tenth of the layers are compared as well: an unembedding of every token there.
    The site `out`, and `in` of layer 0, are always read.
    """
    reader = _Reader(subject, encoded, sides, anchors, words)
    with watching(subject, reader.take, [site for site in SITES if site in ("in", "out", *sites)]):
        last_logits(subject, encoded)
    return reader.readings


class _Reader:
    def __init__(
        self, subject: Subject, encoded: Encoded, sides: Sequence[Sides], anchors: Anchors | None, words: bool
    ) -> None:  # fmt: skip
        self.subject, self.encoded, self.anchors = subject, encoded, anchors
        self.positions = [(torch.from_numpy(one.perceptual), torch.from_numpy(one.textual)) for one in sides]
        self.readings = [Reading(example.id) for example in encoded.examples]
        self.others = [anchors.others(example) if anchors else [] for example in encoded.examples]
        self.first: list[Tensor] = []  # each example's perceptual states as they enter layer 0
        self.before: list[deque[tuple[Tensor, Tensor]]] = [deque(maxlen=max(INTERVALS)) for _ in sides]
        self.vocabulary = layers_for_vocabulary(subject.n_layers + 1) if words else []

    @torch.no_grad()
    def take(self, site: str, layer: int, state: Tensor) -> None:
        for i, (perceptual, textual) in enumerate(self.positions):
            p, t = state[i, perceptual.to(state.device)].float(), state[i, textual.to(state.device)].float()
            self._site(i, site, layer, p.mean(0), t.mean(0))
            if site == "in" and layer == 0:
                self.first.append(p)
                self._state(i, 0, p, t)
            elif site == "out":
                self._state(i, layer + 1, p, t)

    def _site(self, i: int, site: str, layer: int, p: Tensor, t: Tensor) -> None:
        found = self.readings[i].sites
        found.setdefault("matched", {}).setdefault(site, {})[layer] = float(cosine(p, t))
        if self.others[i] and (site, layer) in self.anchors.means:  # type: ignore[union-attr]
            means = torch.stack([self.anchors.means[site, layer][j] for j in self.others[i]])  # type: ignore[union-attr]
            found.setdefault("unmatched", {}).setdefault(site, {})[layer] = float(cosine(p, means.to(p.device)).mean())

    def _state(self, i: int, index: int, p: Tensor, t: Tensor) -> None:
        reading = self.readings[i]
        first = self.first[i].to(p.device)
        _append(reading.similar, "matched", similarities(p, t))
        reading.from_input.setdefault("matched", []).append(float(cosine(first.mean(0), t.mean(0))))
        if self.others[i] and self.anchors is not None:
            self._unmatched(i, index, p, first)
        for side, states in zip(SIDES, (p, t), strict=True):
            _append(reading.norm, side, norms(states))
            one = unit(states.mean(0)).cpu().numpy()[None]
            reading.units[side] = np.concatenate([reading.units[side], one]) if side in reading.units else one
        self._drift(i, p, t)
        if index in self.vocabulary:
            self._words(i, p, t, first)

    def _unmatched(self, i: int, index: int, p: Tensor, first: Tensor) -> None:
        assert self.anchors is not None
        reading, place = self.readings[i], ("in", 0) if index == 0 else ("out", index - 1)
        means = torch.stack([self.anchors.means[place][j] for j in self.others[i]]).to(p.device)
        whole = [self.anchors.tokens[index][j] for j in self.others[i] if j < len(self.anchors.tokens[index])][:2]
        each = [similarities(p, tokens.to(p.device)) for tokens in whole]
        found = {mode: float(np.mean([one[mode] for one in each])) for mode in each[0]} if each else {}
        found["avg"] = float(cosine(p.mean(0), means).mean())  # over all anchors, where the others have two
        _append(reading.similar, "unmatched", found)
        reading.from_input.setdefault("unmatched", []).append(float(cosine(first.mean(0), means).mean()))

    def _drift(self, i: int, p: Tensor, t: Tensor) -> None:
        before = self.before[i]
        for interval in INTERVALS:
            if interval <= len(before):
                for side, then, now in zip(SIDES, before[-interval], (p, t), strict=True):
                    found = {
                        "avg": float(cosine(then.to(now.device).mean(0), now.mean(0))),
                        **diagonal(then.to(now.device), now),
                    }
                    for mode, value in found.items():
                        self.readings[i].drift.setdefault(side, {}).setdefault(interval, {}).setdefault(mode, []).append(value)
        before.append((p, t))

    def _words(self, i: int, p: Tensor, t: Tensor, first: Tensor) -> None:
        """The same layer on both sides, and as published: the perceptual side always as it enters layer 0."""
        said = [read_out(self.subject, states.to(self.subject.dtype)).float().log_softmax(-1) for states in (p, t, first)]
        _append(self.readings[i].words, "same", divergences(said[0], said[1]))
        _append(self.readings[i].words, "input", divergences(said[2], said[1]))


def _append(table: dict[str, dict[str, list[float]]], key: str, values: dict[str, float]) -> None:
    for name, value in values.items():
        table.setdefault(key, {}).setdefault(name, []).append(value)
