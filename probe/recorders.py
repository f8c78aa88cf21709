"""What a trace can record. Each recorder is a small frozen description; the tensors come back with named dimensions."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from probe.attention import RowAttention
from probe.edits import Group
from probe.errors import EditError
from probe.points import Layers, check_point
from probe.tokens import SEGMENTS, TokenMap


@dataclass(frozen=True)
class Named:
    """A tensor and the names of its dimensions."""

    tensor: Tensor
    dims: tuple[str, ...]
    labels: dict[str, tuple[Any, ...]]  # for dimensions whose entries have names: layers, groups

    def __post_init__(self) -> None:
        assert self.tensor.dim() == len(self.dims), (self.tensor.shape, self.dims)

    def at(self, **where: Any) -> Tensor:
        """The tensor at labels (or indices) of some dimensions, those dimensions dropped."""
        index: list[Any] = [slice(None)] * len(self.dims)
        for dim, label in where.items():
            known = self.labels.get(dim)
            index[self.dims.index(dim)] = known.index(label) if known is not None else label
        return self.tensor[tuple(index)]


@dataclass(frozen=True)
class Mass:
    """Attention mass from groups of rows to groups of columns, per layer and head, with entropy and sink share.

    Records `mass` (layer batch head row_group column_group), the mean over a group's rows; columns default to every
    segment that the batch has, so that a row's masses sum to one. `entropy` (layer batch head row_group) is in nats.
    `sink` (layer batch head row_group) is the mass on `sinks`: the first position by default (arXiv 2309.17453), or
    positions of your own. In cross-attention layers the columns are groups of the picture's keys (their map is
    `TokenMap.crossed`) and the sink is their first key.
    """

    rows: tuple[str, ...] = ("question", "last")
    columns: tuple[str, ...] | None = None
    layers: Layers = None
    sinks: Group | Literal["first"] = "first"


@dataclass(frozen=True)
class Rows:
    """Attention rows: `rows` (layer batch head row key), for the last position or any group or positions.

    Rows of shorter groups in a batch are padded with zeros at the end; `row_positions` (batch row) says which rows
    they are, -1 for padding. Layers default to all of one sort: self-attention, or with `cross` the layers whose keys are
    the picture's.
    """

    positions: Group = "last"
    layers: Layers = None
    heads: int | Iterable[int] | None = None
    cross: bool = False


@dataclass(frozen=True)
class Patterns:
    """Full attention patterns, `patterns` (layer batch head query key), for chosen layers and heads: N x N for each.

    With `cross`, of cross-attention layers, whose keys are the picture's.
    """

    layers: Layers
    heads: int | Iterable[int] | None = None
    cross: bool = False


@dataclass(frozen=True)
class Residual:
    """Activations at a point: `states` (layer batch position width), or reduced.

    `positions` picks a group or positions (rows of shorter groups are zero-padded, as in `Rows`); `reduce="mean"` leaves
    one vector (layer batch width). At the point z, width is (head dim).
    """

    point: str = "resid_post"
    layers: Layers = None
    positions: Group = "real"
    reduce: Literal["mean"] | None = None

    def __post_init__(self) -> None:
        check_point(self.point)
        if self.reduce not in (None, "mean"):
            raise EditError(f"a residual recorder reduces by mean or not at all, not by {self.reduce!r}")


@dataclass(frozen=True)
class Lens:
    """The logit lens: what the unembedding makes of each layer's residual stream.

    Records `top_ids` and `top_probs` (layer batch row top), and for `track` token ids (one tuple for each example)
    their probability, logit and rank (layer batch row track). Layers are the outputs of the blocks, before any norm;
    `norm="final"` is the standard lens. `"none"` is the raw one of Cross-modal Information Flow's published code, which reads
    every layer below the last without the norm and the last one with it. The last layer's lens is the model's own output.
    """

    positions: Group = "last"
    layers: Layers = None
    top: int = 5
    track: tuple[tuple[int, ...], ...] = ()
    norm: str = "final"

    def __post_init__(self) -> None:
        if self.norm not in ("final", "none"):
            raise EditError(f"the lens takes the final norm or none, not {self.norm!r}")


@dataclass(frozen=True)
class Confidence:
    """How likely each layer's states find some words at some positions, without a table of the whole vocabulary.

    `words` holds for each example the same number of words, each a token id or several (spellings: the likeliest counts).
    Records `confidence_log_prob` (layer batch row word), natural logarithms, minus infinity in the padding of shorter groups;
    `confidence` (batch word), the highest probability over positions and layers (internal confidence, arXiv 2410.02762); and with
    `top` the likeliest tokens, `confidence_top_ids` and `confidence_top_probs` (layer batch row top). `norm` is that of
    `Lens`: the published code of that paper reads with `"none"`.

    Raises EditError, when traced, for no words, ids outside the vocabulary, or a batch without such positions.
    """

    words: tuple[tuple[int | tuple[int, ...], ...], ...]
    positions: Group = "image"
    layers: Layers = None
    top: int = 0
    norm: str = "final"

    def __post_init__(self) -> None:
        if self.norm not in ("final", "none"):
            raise EditError(f"the lens takes the final norm or none, not {self.norm!r}")


ROWS_TIMES_VOCABULARY = 2**26  # logits that the lens holds at once: 256 MiB in float32
Recorder = Mass | Rows | Patterns | Residual | Lens | Confidence


def pad_positions(maps: tuple[TokenMap, ...], group: Group, cached: int = 0) -> Tensor:
    """Positions of a group in each example (batch row), -1 where an example has fewer.

    The first `cached` positions are in the cache of an earlier pass: this pass has no rows for them.
    """
    picked = [torch.from_numpy(token_map.positions(group)) for token_map in maps]
    picked = [positions[positions >= cached] for positions in picked]
    return torch.nn.utils.rnn.pad_sequence(picked, batch_first=True, padding_value=-1)


class MassCollector:
    """Turns row attention into group masses, layer by layer."""

    def __init__(
        self, recorder: Mass, maps: tuple[TokenMap, ...], device: torch.device, cross: tuple[bool, ...] = (), cached: int = 0
    ) -> None:
        self.groups = recorder.rows
        self.cross = cross  # layer by layer, whether its keys are the picture's
        keys = [space for m in maps for space in (m, m.crossed) if space is not None]
        self.columns = recorder.columns or tuple(name for name in SEGMENTS if any(name in space.segments for space in keys))
        picked = [pad_positions(maps, group, cached) for group in recorder.rows]
        rows = _union(picked)
        # batch group row: the share of each row in its group's mean
        self.shares = torch.stack([_share(rows, group) for group in picked], 1).to(device)
        self.rows = (rows - cached).clamp(min=0).to(device)  # among the queries of this pass
        self.member = {False: torch.stack([_one_hot(maps, column) for column in self.columns], -1).to(device)}
        sinks = [[token_map.first] if recorder.sinks == "first" else recorder.sinks for token_map in maps]
        self.sink = {False: torch.stack([_one_hot((m,), s)[0] for m, s in zip(maps, sinks, strict=True)]).to(device)}
        if any(cross):
            self.member[True] = torch.stack([crossed_one_hot(maps, column) for column in self.columns], -1).to(device)
            self.sink[True] = torch.zeros_like(self.member[True][..., 0])
            self.sink[True][:, 0] = 1.0
        self.found: dict[int, tuple[Tensor, Tensor, Tensor]] = {}

    def take(self, layer: int, attention: RowAttention) -> None:
        # The rows' own normalisation is folded into the group's mean, so that no probabilities are written out.
        device = attention.weight.device  # layers may live on different ones
        shares = self.shares.to(device)[:, None]
        mean = (shares / attention.total.transpose(2, 3)) @ attention.weight
        space = bool(self.cross) and self.cross[layer]
        mass = mean @ self.member[space].to(device)[:, None]
        sink = (mean * self.sink[space].to(device)[:, None, None]).sum(-1)
        entropy = (shares @ attention.entropy[..., None])[..., 0]
        self.found[layer] = (mass.cpu(), entropy.cpu(), sink.cpu())

    def result(self) -> dict[str, Named]:
        layers = tuple(sorted(self.found))
        mass, entropy, sink = (_stacked({i: self.found[i][part] for i in layers}) for part in range(3))
        labels = {"layer": layers, "row_group": self.groups, "column_group": self.columns}
        dims = ("layer", "batch", "head", "row_group")
        return {
            "mass": Named(mass, (*dims, "column_group"), labels),
            "entropy": Named(entropy, dims, labels),
            "sink": Named(sink, dims, labels),
        }


class RowCollector:
    """Keeps chosen attention rows."""

    def __init__(
        self, recorder: Rows | Patterns, maps: tuple[TokenMap, ...], heads: list[int] | None, device: torch.device,
        cached: int = 0,
    ) -> None:  # fmt: skip
        self.name = "rows" if isinstance(recorder, Rows) else "patterns"
        group: Group = recorder.positions if isinstance(recorder, Rows) else range(len(maps[0]))
        self.positions = pad_positions(maps, group, cached)
        self.rows = (self.positions - cached).clamp(min=0).to(device)
        self.real = (self.positions >= 0).to(device)
        self.heads = heads
        self.found: dict[int, Tensor] = {}

    def take(self, layer: int, attention: RowAttention) -> None:
        probability = attention.probability * self.real.to(attention.weight.device)[:, None, :, None]
        self.found[layer] = (probability if self.heads is None else probability[:, self.heads]).cpu()

    def result(self) -> dict[str, Named]:
        layers = tuple(sorted(self.found))
        labels: dict[str, tuple[Any, ...]] = {"layer": layers}
        if self.heads is not None:
            labels["head"] = tuple(self.heads)
        stacked = _stacked(self.found)
        row = "row" if self.name == "rows" else "query"
        made = {self.name: Named(stacked, ("layer", "batch", "head", row, "key"), labels)}
        if self.name == "rows":
            made["row_positions"] = Named(self.positions, ("batch", "row"), {})
        return made


class StateCollector:
    """Keeps activations at a point, whole or reduced."""

    def __init__(self, recorder: Residual, maps: tuple[TokenMap, ...], device: torch.device, cached: int = 0) -> None:
        self.recorder = recorder
        self.positions = pad_positions(maps, recorder.positions, cached)
        self.index = (self.positions - cached).clamp(min=0).to(device)
        self.real = (self.positions >= 0).to(device)
        self.found: dict[int, Tensor] = {}

    def take(self, layer: int, state: Tensor) -> None:
        """`state` is (batch position ...)."""
        index, real = self.index.to(state.device), self.real.to(state.device)
        batch = torch.arange(state.shape[0], device=state.device)[:, None]
        picked = state[batch, index] * real.view(*real.shape, *([1] * (state.dim() - 2))).to(state.dtype)
        if self.recorder.reduce == "mean":
            count = real.sum(1).clamp(min=1).view(-1, *([1] * (picked.dim() - 2)))
            self.found[layer] = (picked.float().sum(1) / count).cpu()
        else:
            self.found[layer] = picked.cpu()

    def result(self) -> dict[str, Named]:
        layers = tuple(sorted(self.found))
        width = ("head", "dim") if self.recorder.point == "z" else ("width",)
        stacked = _stacked(self.found)
        if self.recorder.reduce == "mean":
            return {"states": Named(stacked, ("layer", "batch", *width), {"layer": layers})}
        return {
            "states": Named(stacked, ("layer", "batch", "position", *width), {"layer": layers}),
            "state_positions": Named(self.positions, ("batch", "position"), {}),
        }


class LensCollector:
    """Reads vocabulary distributions off the residual stream, a few rows at a time."""

    def __init__(
        self,
        recorder: Lens,
        maps: tuple[TokenMap, ...],
        read: Callable[[int, Tensor], Tensor],
        vocabulary: int,
        device: torch.device,
        cached: int = 0,
    ) -> None:
        self.recorder, self.read, self.vocabulary = recorder, read, vocabulary
        self.positions = pad_positions(maps, recorder.positions, cached)
        self.index = (self.positions - cached).clamp(min=0).to(device)
        self.track = None
        if recorder.track:
            if len(recorder.track) != len(maps) or len({len(ids) for ids in recorder.track}) != 1:
                raise EditError(f"the lens tracks the same number of token ids for each of the {len(maps)} examples")
            self.track = torch.tensor(recorder.track, device=device)
        self.found: dict[int, dict[str, Tensor]] = {}

    def take(self, layer: int, state: Tensor) -> None:
        batch = torch.arange(state.shape[0], device=state.device)[:, None]
        picked = state[batch, self.index.to(state.device)]
        rows = max(1, ROWS_TIMES_VOCABULARY // (len(picked) * self.vocabulary))
        pieces = [self._look(layer, piece) for piece in picked.split(rows, dim=1)]
        self.found[layer] = {name: torch.cat([piece[name] for piece in pieces], 1) for name in pieces[0]}

    def _look(self, layer: int, state: Tensor) -> dict[str, Tensor]:
        logits = self.read(layer, state).float()
        log_total = logits.logsumexp(-1, keepdim=True)
        values, ids = logits.topk(min(self.recorder.top, logits.shape[-1]), -1)
        kept = {"top_ids": ids.cpu(), "top_probs": (values - log_total).exp().cpu()}
        if self.track is not None:
            wanted = self.track[:, None].expand(-1, logits.shape[1], -1).to(logits.device)
            logit = logits.gather(-1, wanted)
            kept["logit"] = logit.cpu()
            kept["prob"] = (logit - log_total).exp().cpu()
            kept["rank"] = torch.stack([(logits > one[..., None]).sum(-1) for one in logit.unbind(-1)], -1).cpu()
        return kept

    def result(self) -> dict[str, Named]:
        layers = tuple(sorted(self.found))
        last = {"top_ids": "top", "top_probs": "top", "logit": "track", "prob": "track", "rank": "track"}
        return {
            f"lens_{name}": Named(
                torch.stack([self.found[i][name] for i in layers]), ("layer", "batch", "row", last[name]), {"layer": layers}
            )
            for name in self.found[layers[0]]
        } | {"lens_positions": Named(self.positions, ("batch", "row"), {})}


def _stacked(found: Mapping[int, Tensor]) -> Tensor:
    """Layers in order, in one tensor. Raises EditError where they have different numbers of heads, as pruned models may."""
    layers = sorted(found)
    other = next((layer for layer in layers if found[layer].shape != found[layers[0]].shape), None)
    if other is not None:
        raise EditError(
            f"layers {layers[0]} and {other} of this model differ in heads: record layers that have the same number"
        )
    return torch.stack([found[layer] for layer in layers])


def _union(groups: list[Tensor]) -> Tensor:
    """Row-wise union of padded positions, padded with the row's first entry (it has no share in any mean)."""
    rows = [torch.unique(torch.cat([group[i] for group in groups])) for i in range(groups[0].shape[0])]
    rows = [row[row >= 0] for row in rows]
    width = max(1, *(len(row) for row in rows))
    return torch.stack([torch.cat([row, row.new_full((width - len(row),), int(row[0]) if len(row) else 0)]) for row in rows])


def _share(rows: Tensor, group: Tensor) -> Tensor:
    """For each row of the union, 1 / size of the group where the row belongs to it (batch row)."""
    hit = (rows[:, :, None] == group[:, None, :]).any(-1)
    first = torch.zeros_like(hit)
    for i in range(rows.shape[0]):  # a padded repeat of a row must not count twice
        _, where = torch.unique(rows[i], return_inverse=True)
        seen: set[int] = set()
        for j, value in enumerate(where.tolist()):
            first[i, j] = value not in seen
            seen.add(value)
    hit = hit & first
    return hit.float() / hit.sum(1, keepdim=True).clamp(min=1)


def _one_hot(maps: tuple[TokenMap, ...], group: Group) -> Tensor:
    made = torch.zeros(len(maps), len(maps[0]))
    for i, token_map in enumerate(maps):
        made[i, token_map.positions(group)] = 1.0
    return made


def crossed_one_hot(maps: tuple[TokenMap, ...], group: Group) -> Tensor:
    """Which keys of cross-attention layers belong to a group (batch key); a group of the sequence's positions has none."""
    longest = max(len(token_map.crossed or ()) for token_map in maps)
    made = torch.zeros(len(maps), longest)
    for i, token_map in enumerate(maps):
        made[i, token_map.crossed_positions(group)] = 1.0
    return made
