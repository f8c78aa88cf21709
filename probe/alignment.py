"""Reads how alike perceptual and textual tokens are off one forward pass, every layer and site of it, keeping nothing but numbers."""

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from probe.analysis.alignment import (
    DIAGONAL,
    DIVERGENCES,
    MODES,
    NORMS,
    Spoken,
    Tokens,
    alike_themselves,
    cosine,
    diverging,
    layers_for_vocabulary,
    similar,
    sizes,
    unit,
)
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


Means = dict[str, dict[int, Tensor]]  # site: layer: mean states
Stack = tuple[list[int], Tensor]  # layers whose states are equally wide, and those (layer ... width)


@dataclass
class Anchors:
    """Textual states of other examples, with which an example's perceptual ones have nothing to do: the unmatched side.

    A fixed few of them, so that what is unmatched does not depend on the batch an example came in.
    """

    ids: list[str] = field(default_factory=list)
    means: dict[str, list[Stack]] = field(default_factory=dict)  # site: mean textual states (layer anchor width), length one
    tokens: dict[int, list[Tokens]] = field(default_factory=dict)  # state index: textual states of each, for the other modes

    def others(self, example: Example) -> list[int]:
        """Indices of the anchors that are not this example."""
        return [i for i, name in enumerate(self.ids) if name != example.id]

    def joined(self, readers: Sequence["Reader"]) -> "Anchors":
        """The examples of these readers for anchors, as they were read: nothing is read again. Token by token stay those that already are."""
        if [reader.example.id for reader in readers[: len(self.ids)]] != self.ids:
            raise ValueError("the anchors that are known token by token come first")
        words = [reader.means[1] for reader in readers]
        means = {site: {layer: [one[site][layer] for one in words] for layer in states} for site, states in words[0].items()}
        return Anchors([reader.example.id for reader in readers], _units(_together(means)), self.tokens)


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
    means: dict[str, dict[int, list[Tensor]]] = {}
    for example in examples:
        encoded = subject.encode(example)
        at = span(sides_of(encoded.maps[0], example, modality).textual)
        keeps = len(anchors.ids) < whole

        def take(site: str, layer: int, state: Tensor, at: slice | Tensor = at, keeps: bool = keeps) -> None:
            words = state[0, at]
            means.setdefault(site, {}).setdefault(layer, []).append(words.mean(0, dtype=torch.float32))
            index = _index(site, layer)
            if keeps and index is not None:
                anchors.tokens.setdefault(index, []).append(Tokens.of(words))

        with watching(subject, take, _read(sites)):
            last_logits(subject, encoded)
        anchors.ids.append(example.id)
    anchors.means = _units(_between(subject, _together(means), sites))
    return anchors


def read_alignment(
    subject: Subject, encoded: Encoded, sides: Sequence[Sides], anchors: Anchors | None = None, words: bool = False,
    sites: Sequence[str] = SITES,
) -> list[Reading]:  # fmt: skip
    """One forward pass over a batch, and a Reading of each of its examples.

    With `words`, the vocabulary distributions at ten states are compared as well: an unembedding of every token there.
    The site `out`, and `in` of layer 0, are always read.
    """
    return [reader.reading() for reader in watch_alignment(subject, encoded, sides, anchors, words, sites)]


def watch_alignment(
    subject: Subject, encoded: Encoded, sides: Sequence[Sides], anchors: Anchors | None = None, words: bool = False,
    sites: Sequence[str] = SITES,
) -> list["Reader"]:  # fmt: skip
    """The pass of `read_alignment`: its readers, who can say what they have read once all anchors are known."""
    readers = [Reader(subject, example, side, anchors, words) for example, side in zip(encoded.examples, sides, strict=True)]

    def take(site: str, layer: int, state: Tensor) -> None:
        for reader, one in zip(readers, state, strict=True):
            reader.take(site, layer, one)

    with watching(subject, take, _read(sites)):
        last_logits(subject, encoded)
    for reader in readers:
        reader.finish(sites)
    return readers


def span(positions: np.ndarray) -> slice | Tensor:
    """What picks these positions: a slice where they are a run, which copies nothing."""
    if len(positions) and positions[-1] - positions[0] == len(positions) - 1:
        return slice(int(positions[0]), int(positions[-1]) + 1)
    return torch.from_numpy(positions)


def _read(sites: Sequence[str]) -> list[str]:
    """The sites that are watched: what lies between attention and the feed-forward block follows from its two parts, if both are read."""
    return [site for site in SITES if site in ("in", "out", *sites) and not (site == "mid" and "attn" in sites)]


def _between(subject: Subject, means: Means, sites: Sequence[str]) -> Means:
    """Mean states by site and layer, with those of `mid`: the mean of what enters and is added is the sum of their means."""
    if "mid" not in sites or "attn" not in means:
        return means
    gated = subject.anatomy.cross
    mid = {layer: means["in"][layer].to(added.device) + added for layer, added in means["attn"].items() if not gated[layer]}
    return {**means, **({"mid": mid} if mid else {})}


def _together(means: Mapping[str, Mapping[int, Sequence[Tensor]]]) -> Means:
    """Means of several examples (example width) by site and layer."""
    return {site: {layer: torch.stack(list(few)) for layer, few in layers.items()} for site, layers in means.items()}


def _units(means: Means) -> dict[str, list[Stack]]:
    return {site: [(layers, unit(states)) for layers, states in _stacked(found)] for site, found in means.items()}


def _index(site: str, layer: int) -> int | None:
    """The state index of a site, if it is one."""
    if site == "out":
        return layer + 1
    return 0 if (site, layer) == ("in", 0) else None


class Reader:
    """What is gathered of one example while the pass runs: tensors, of which numbers are made at its end, all at once."""

    def __init__(self, subject: Subject, example: Example, sides: Sides, anchors: Anchors | None, words: bool) -> None:
        self.subject, self.example = subject, example
        self.at = (span(sides.perceptual), span(sides.textual))
        self.anchors = anchors or Anchors()
        self.means: tuple[Means, ...] = ({}, {})  # of each side
        self.similar: list[Tensor] = []
        self.unmatched: list[Tensor] = []
        self.sizes: tuple[list[Tensor], list[Tensor]] = ([], [])
        self.drift: dict[tuple[str, int], list[Tensor]] = {}
        self.before: deque[tuple[Tokens, Tokens]] = deque(maxlen=max(INTERVALS))
        self.vocabulary = layers_for_vocabulary(subject.n_layers + 1) if words else []
        self.first: Spoken | None = None  # perceptual tokens as they enter layer 0
        self.words: dict[str, list[Tensor]] = {"same": [], "input": []}

    @torch.no_grad()
    def take(self, site: str, layer: int, state: Float[Tensor, "position width"]) -> None:
        """Looks at one example's states at a site of a layer."""
        p, t = (state[at] for at in self.at)
        index = _index(site, layer)
        if index is None:
            seen = (p.mean(0, dtype=torch.float32), t.mean(0, dtype=torch.float32))
        else:
            both = Tokens.of(p), Tokens.of(t)
            self._state(index, *both)
            seen = (both[0].mean, both[1].mean)
            if index in self.vocabulary:
                self._words(p, t)
        for means, one in zip(self.means, seen, strict=True):
            means.setdefault(site, {})[layer] = one

    def _state(self, index: int, p: Tokens, t: Tokens) -> None:
        self.similar.append(similar(p, t))
        whole = self.anchors.tokens.get(index, [])
        if others := [whole[j] for j in self.anchors.others(self.example) if j < len(whole)][:2]:
            self.unmatched.append(torch.stack([similar(p, other) for other in others]).mean(0))
        for kept, now in zip(self.sizes, (p, t), strict=True):
            kept.append(sizes(now))
        for interval in (interval for interval in INTERVALS if interval <= len(self.before)):
            for side, then, now in zip(SIDES, self.before[-interval], (p, t), strict=True):
                moved = alike_themselves(then.units.to(now.units.device), now.units)
                self.drift.setdefault((side, interval), []).append(moved)
        self.before.append((p, t))

    def _words(self, p: Tensor, t: Tensor) -> None:
        """The same layer on both sides, and as published: the perceptual side always as it enters layer 0."""
        logits = read_out(self.subject, torch.cat([p, t]).to(self.subject.dtype))
        now, asked = Spoken.of(logits[: len(p)], len(t)), Spoken.of(logits[len(p) :], len(p))
        if self.first is None:
            self.first = now
        self.words["same"].append(diverging(now, asked))
        self.words["input"].append(diverging(self.first, asked))

    def finish(self, sites: Sequence[str]) -> None:
        """The pass is over: whole states, which only it needs, are let go."""
        self.means = tuple(_between(self.subject, means, sites) for means in self.means)
        self.before.clear()
        self.first = None

    def reading(self, anchors: Anchors | None = None) -> Reading:
        """What the example says, once the pass is over; beside more `anchors` than were known while it ran."""
        anchors = anchors or self.anchors
        others = anchors.others(self.example)
        sides = [{site: _stacked(states) for site, states in means.items()} for means in self.means]
        p, t = map(_states, sides)
        found = Reading(self.example.id)
        found.similar["matched"] = _columns(MODES, self.similar)
        found.from_input["matched"] = cosine(p[0], t).tolist()
        found.norm = {side: _columns(NORMS, kept) for side, kept in zip(SIDES, self.sizes, strict=True)}
        found.units = {side: unit(means).cpu().numpy() for side, means in zip(SIDES, (p, t), strict=True)}
        for (side, interval), moved in self.drift.items():
            means = p if side == SIDES[0] else t
            avg = cosine(means[:-interval], means[interval:]).tolist()
            found.drift.setdefault(side, {})[interval] = {"avg": avg, **_columns(DIAGONAL, moved)}
        found.words = {reading: _columns(DIVERGENCES, values) for reading, values in self.words.items() if values}
        found.sites["matched"] = {site: _by_layer(cosine, sides[0][site], sides[1][site]) for site in sides[0]}
        if others:
            apart = partial(_mean_cosine, others=others)
            means = _states(anchors.means)
            found.sites["unmatched"] = {
                site: _by_layer(apart, states, anchors.means[site])
                for site, states in sides[0].items()
                if site in anchors.means
            }
            # `avg` over all anchors, where the other modes have two
            found.similar["unmatched"] = _columns(MODES, self.unmatched) if self.unmatched else {}
            found.similar["unmatched"]["avg"] = apart(p, means).tolist()
            found.from_input["unmatched"] = apart(p[:1], means).tolist()
        return found


def _mean_cosine(
    states: Float[Tensor, "_ width"], means: Float[Tensor, "state anchor width"], others: Sequence[int]
) -> Float[Tensor, " state"]:
    """Each state's mean cosine with some of the anchors; one state may stand for all."""
    each = (means.to(states.device) @ unit(states)[..., None])[..., 0]
    return each[:, others].mean(1)


def _by_layer(compare: Callable[[Tensor, Tensor], Tensor], ours: list[Stack], theirs: list[Stack]) -> dict[int, float]:
    """What a comparison says at each layer."""
    found: dict[int, float] = {}
    for (layers, a), (_, b) in zip(ours, theirs, strict=True):
        found |= dict(zip(layers, compare(a, b).tolist(), strict=True))
    return found


def _stacked(states: dict[int, Tensor]) -> list[Stack]:
    """States by layer, the equally wide ones together (inner widths may differ), on the device of the first: layers may lie on several."""
    device = next(iter(states.values())).device
    alike: dict[int, list[int]] = {}
    for layer, state in states.items():
        alike.setdefault(state.shape[-1], []).append(layer)
    return [(layers, torch.stack([states[layer].to(device) for layer in layers])) for layers in alike.values()]


def _states(sites: dict[str, list[Stack]]) -> Tensor:
    """What enters layer 0 and what leaves each layer (state ... width)."""
    (_, first), (_, left) = sites["in"][0], sites["out"][0]
    return torch.cat([first[:1], left.to(first.device)])


def _columns(names: Sequence[str], rows: Sequence[Tensor]) -> dict[str, list[float]]:
    """Values by name, from one vector of them for each state."""
    table = torch.stack([row.to(rows[0].device) for row in rows]).T.tolist()
    return dict(zip(names, table, strict=True))
