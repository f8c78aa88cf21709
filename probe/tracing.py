"""trace(): one forward pass; what to record, what to edit."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from inspect import signature
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from probe.anatomy.readout import capped
from probe.attention import Call, RowAttention, attend_rows, listening, mix_values
from probe.backends import Wanted, find_backend
from probe.confidence import ConfidenceCollector
from probe.edits import Ablate, Edit, Erase, Knockout, Patch
from probe.errors import BackendError, EditError
from probe.example import Example
from probe.points import head_list, hook, layer_list
from probe.recorders import (
    Confidence,
    Lens,
    LensCollector,
    Mass,
    MassCollector,
    Named,
    Patterns,
    Recorder,
    Residual,
    RowCollector,
    Rows,
    StateCollector,
    crossed_one_hot,
    pad_positions,
)
from probe.subject import Encoded, Side, Subject
from probe.vocabulary import Vocabulary

AttentionCollector = MassCollector | RowCollector


@dataclass(frozen=True)
class Trace:
    """What one forward pass recorded, each tensor with named dimensions, and the logits of each row's last position."""

    encoded: Encoded
    logits: Float[Tensor, "batch vocabulary"]  # float32
    records: dict[str, Named]

    def __getitem__(self, name: str) -> Named:
        if name not in self.records:
            raise EditError(f"this trace did not record {name!r} (it has {', '.join(self.records) or 'no records'})")
        return self.records[name]


def trace(
    subject: Subject,
    examples: Example | Sequence[Example] | Encoded,
    record: Sequence[Recorder] = (),
    edit: Sequence[Edit] = (),
    padding: Side = "left",
    backend: str = "hooks",
) -> Trace:
    """One forward pass over a batch, recorded and edited; afterwards the model is as it was.

    The logits come from the model's own attention kernel; only rows that a knock-out touches are recomputed. Two
    recorders of one kind are told apart by a number (`states`, `states.1`, ...).

    `backend="nnsight"` or `"transformer_lens"` reads the same points through that library, on a copy of the model's
    structure that shares its weights; numbers agree with those of the hooks to rounding. Attention weights are then the
    library's own, eager and a whole pattern at a time, and knock-outs are refused.

    Raises EditError for a layer, head, point or group that the model does not have, and BackendError for a backend that
    is not installed or has no place for what was asked.
    """
    encoded = examples if isinstance(examples, Encoded) else subject.encode(examples, padding)
    session = Session(subject, encoded, record, edit)
    with ExitStack() as stack:
        stack.enter_context(subject.lock)
        if backend != "hooks":
            model = find_backend(backend)(subject, session.wanted())
            return Trace(encoded, last_logits(subject, encoded, model), session.results())
        if session.wants_attention:
            stack.enter_context(listening(subject, session))
        for handle in session.hooks(stack):
            stack.callback(handle.remove)
        logits = last_logits(subject, encoded)
    return Trace(encoded, logits, session.results())


@torch.no_grad()
def last_logits(
    subject: Subject, encoded: Encoded, model: Callable[..., Any] | None = None
) -> Float[Tensor, "batch vocabulary"]:
    """Logits of each row's last position (batch vocabulary, float32); the unembedding runs on those positions only.

    `model` is called in place of the subject's own, where a backend has something to call.
    """
    return run_to_last(subject, encoded, model)


def run_to_last(
    subject: Subject, encoded: Encoded, model: Callable[..., Any] | None = None
) -> Float[Tensor, "batch vocabulary"]:
    """What `last_logits` gives, as a function that gradients can flow through."""
    last = encoded.last
    options: dict[str, Any] = {"use_cache": False}
    # Only what is needed goes through the unembedding. A number, not a tensor: accelerate would move a tensor away.
    first = int(last.min())
    # Gemma 4 with shared keys and values drops other rows inside the decoder as well: there, everything is kept.
    shares = getattr(subject.config.get_text_config(), "num_kv_shared_layers", 0)
    if not shares and "logits_to_keep" in signature(subject.model.forward).parameters:
        options["logits_to_keep"] = len(encoded.maps[0]) - first
    with subject.lock:
        logits = (model or subject.model)(**encoded.inputs, **options).logits
    return logits[torch.arange(len(encoded)), last - len(encoded.maps[0])].float().to(subject.device)


class Session:
    """One pass: the recorders and edits, resolved against the batch.

    Where the first `cached` positions come from the cache of an earlier pass, they are keys here and never rows.
    """

    def __init__(
        self, subject: Subject, encoded: Encoded, record: Sequence[Recorder], edit: Sequence[Edit], cached: int = 0
    ) -> None:
        self.subject, self.encoded, self.cached = subject, encoded, cached
        self.crossed = all(token_map.crossed is not None for token_map in encoded.maps)
        self.collectors: list[tuple[str, Any]] = []
        self.attention: dict[int, list[AttentionCollector]] = {}
        self.states: dict[tuple[str, int], list[StateCollector | LensCollector | ConfidenceCollector]] = {}
        self.cuts: dict[int, list[Cut]] = {}
        self.changes: dict[tuple[str, int], list[Ablate | Patch | Erase]] = {}
        for recorder in record:
            self._add_recorder(recorder)
        for one in edit:
            self._add_edit(one)

    def _add_recorder(self, recorder: Recorder) -> None:
        subject, maps, device = self.subject, self.encoded.maps, self.subject.device
        layers = layer_list(recorder.layers, subject.n_layers)
        collector: Any
        if isinstance(recorder, Residual):
            collector = StateCollector(recorder, maps, device, self.cached)
            for layer in layers:
                self.states.setdefault((recorder.point, layer), []).append(collector)
        elif isinstance(recorder, Lens | Confidence):
            if isinstance(recorder, Lens):
                read = partial(_lens, subject, recorder.norm)
                collector = LensCollector(recorder, maps, read, subject.vocabulary, device, self.cached)
            else:
                collector = ConfidenceCollector(recorder, maps, Vocabulary(subject, recorder.norm), device, self.cached)
            for layer in layers:
                self.states.setdefault(("resid_post", layer), []).append(collector)
        else:
            if isinstance(recorder, Mass):
                collector = MassCollector(recorder, maps, device, subject.anatomy.cross if self.crossed else (), self.cached)
            else:
                collector = RowCollector(recorder, maps, head_list(recorder.heads, subject.n_heads), device, self.cached)
            wanted = None if isinstance(recorder, Mass) else recorder.cross
            for layer in self._with_attention(layers, recorder.layers is not None, wanted):
                self.attention.setdefault(layer, []).append(collector)
        self.collectors.append((type(recorder).__name__, collector))

    def _add_edit(self, edit: Edit) -> None:
        if isinstance(edit, Knockout):
            cut = resolve_cut(edit, self.encoded, self.subject, self.cached)
            if not cut.rows.shape[1]:
                return  # no example of the batch has such rows
            for layer in self._with_attention(layer_list(edit.layers, self.subject.n_layers), edit.layers is not None):
                self.cuts.setdefault(layer, []).append(cut)
        else:
            layers = edit.layers if isinstance(edit, Ablate) else edit.layer
            for layer in layer_list(layers, self.subject.n_layers):
                self.changes.setdefault((edit.point, layer), []).append(edit)

    def _with_attention(self, layers: list[int], asked: bool, cross: bool | None = None) -> list[int]:
        """Those of the layers that have softmax attention (over the picture's keys, or over the sequence, if that is said).

        A layer named on purpose that has none is refused.
        """
        anatomy = self.subject.anatomy
        runs = [not crosses or self.crossed for crosses in anatomy.cross]  # without a picture, such layers are passed over
        kept = [
            layer for layer in layers
            if anatomy.attention[layer] is not None and runs[layer] and cross in (None, anatomy.cross[layer])
        ]  # fmt: skip
        if (asked and len(kept) < len(layers)) or (cross and not kept):
            missing = next((layer for layer in layers if layer not in kept), None)
            sort = {None: "softmax attention", True: "cross-attention", False: "self-attention"}[cross]
            raise EditError(f"layer {missing} of this {anatomy.family} model has no {sort}")
        return kept

    @property
    def wants_attention(self) -> bool:
        return bool(self.attention or self.cuts or any(point == "z" for point, _ in (*self.states, *self.changes)))

    def hooks(self, stack: ExitStack) -> list[Any]:
        places = {place for place in (*self.states, *self.changes) if place[0] != "z"}
        handles = []
        for point, layer in sorted(places):
            handle = hook(self.subject, point, layer, partial(self.visit, point, layer))
            stack.callback(handle.remove)
            handles.append(handle)
        return handles

    def visit(self, point: str, layer: int, state: Tensor) -> Tensor | None:
        """Edits first, then records: what is recorded is what the model goes on with."""
        changes = self.changes.get((point, layer), ())
        for change in changes:
            state = apply_change(change, state, self.encoded, self.cached)
        for collector in self.states.get((point, layer), ()):
            collector.take(layer, state.detach())
        return state if changes else None

    def wanted(self) -> Wanted:
        """What a backend is asked for."""
        if self.cuts:
            raise BackendError("knock-outs run on the hooks backend: the others take Ablate and Patch")
        return Wanted(frozenset((*self.states, *self.changes)), frozenset(self.attention), self.visit, self._weigh)

    def _weigh(self, layer: int, pattern: Tensor) -> None:
        real = torch.ones(pattern.shape[0], pattern.shape[3], dtype=torch.bool, device=pattern.device)
        if not self.subject.anatomy.cross[layer]:  # a picture's keys have no padding that a row could be lost to
            real &= self.encoded.inputs["attention_mask"].to(pattern.device).bool()
        for collector in self.attention[layer]:
            collector.take(layer, RowAttention.picked(pattern, collector.rows.to(pattern.device), real))

    def attend(self, layer: int, call: Call) -> tuple[Tensor, Tensor | None]:
        output, weights = call.run()
        with torch.no_grad():
            cuts = self.cuts.get(layer, [])
            for collector in self.attention.get(layer, []):
                seen = self._rows(call, collector.rows.to(call.query.device), cuts, layer)
                collector.take(layer, self._seen(seen, layer))
        if cuts:
            rows = cut_rows(cuts).to(call.query.device)
            read = mix_values(call, self._rows(call, rows, cuts, layer)).transpose(1, 2)
            output = output.scatter(1, rows[:, :, None, None].expand_as(read), read.to(output.dtype))
        new = self.visit("z", layer, output)
        return (output if new is None else new), weights

    def _rows(self, call: Call, rows: Tensor, cuts: list["Cut"], layer: int) -> RowAttention:
        visible, bias = call.visible(rows)
        for cut in cuts:
            visible = cut.apply(visible, rows, call.query.shape[1], self.subject.anatomy.cross[layer])
        return attend_rows(call, rows, visible, bias)

    def _seen(self, attention: RowAttention, layer: int) -> RowAttention:
        """The rows with a key for every position: the cache of a sliding window has forgotten the first ones."""
        forgotten = 0 if self.subject.anatomy.cross[layer] else len(self.encoded.maps[0]) - attention.weight.shape[3]
        return attention.after(forgotten) if forgotten > 0 else attention

    def results(self) -> dict[str, Named]:
        made: dict[str, Named] = {}
        seen: dict[str, int] = {}
        for kind, collector in self.collectors:
            number = seen[kind] = seen.get(kind, -1) + 1
            for name, named in collector.result().items():
                made[name if number == 0 else f"{name}.{number}"] = named
        return made


def read_out(subject: Subject, state: Tensor) -> Tensor:
    """Residual stream (... width) to logits (... vocabulary): the final norm, the unembedding, and a final soft cap."""
    return capped(subject.unembedding(subject.final_norm(state)), subject.config)


def _lens(subject: Subject, norm: str, layer: int, state: Tensor) -> Tensor:
    if norm == "none" and layer < subject.n_layers - 1:
        return capped(subject.unembedding(state), subject.config)
    return read_out(subject, state)


@dataclass(frozen=True)
class Cut:
    """A knock-out resolved against a batch."""

    rows: Tensor  # batch row, among the queries of the pass; -1 where an example has fewer
    columns: Tensor  # batch position, True where the rows may not look
    heads: list[int] | None
    crossed: Tensor | None = None  # batch key: the same among the picture's keys, in cross-attention layers

    def apply(self, visible: Tensor, rows: Tensor, n_heads: int, cross: bool = False) -> Tensor:
        """`visible` (batch 1|head row key) without the cut edges."""
        columns = self.crossed if cross else self.columns
        assert columns is not None
        columns = columns[:, -visible.shape[-1] :]  # a sliding window's cache holds the last keys only
        hit = (rows[:, :, None] == self.rows.to(rows.device)[:, None, :]).any(-1)  # batch row
        cut = (hit[:, :, None] & columns.to(rows.device)[:, None, :])[:, None]
        if self.heads is not None:
            head_list(self.heads, n_heads)  # layers of a pruned model may have fewer than the model has
            chosen = torch.zeros(n_heads, dtype=torch.bool, device=rows.device)
            chosen[self.heads] = True
            cut = cut & chosen[None, :, None, None]
        return visible & ~cut


def resolve_cut(edit: Knockout, encoded: Encoded, subject: Subject, cached: int = 0) -> Cut:
    """The knock-out's rows and columns as positions of each example of the batch."""
    columns = torch.zeros(len(encoded), len(encoded.maps[0]), dtype=torch.bool)
    for i, token_map in enumerate(encoded.maps):
        columns[i, token_map.positions(edit.columns)] = True
    crossed = None
    if all(token_map.crossed is not None for token_map in encoded.maps):
        crossed = crossed_one_hot(encoded.maps, edit.columns).bool()
    rows = pad_positions(encoded.maps, edit.rows, cached)
    return Cut(torch.where(rows < 0, rows, rows - cached), columns, head_list(edit.heads, subject.n_heads), crossed)


def cut_rows(cuts: list[Cut]) -> Tensor:
    """All rows that any of the cuts touches (batch row); shorter examples repeat their own rows, or row 0."""
    merged = torch.cat([cut.rows for cut in cuts], 1)
    fill = merged.max(1, keepdim=True).values.clamp(min=0)
    merged = torch.where(merged < 0, fill, merged)
    return merged[:, :1] if merged.shape[1] == 1 else torch.unique_consecutive(merged.sort(1).values, dim=1)


def apply_change(change: Ablate | Patch | Erase, state: Tensor, encoded: Encoded, cached: int = 0) -> Tensor:
    """`state` (batch position ...) with the chosen positions replaced."""
    if isinstance(change, Erase) and change.directions.dim() == 3 and len(change.directions) != len(encoded):
        raise EditError(f"directions of {len(change.directions)} examples cannot be erased from a batch of {len(encoded)}")
    state = state.clone()
    for i, token_map in enumerate(encoded.maps):
        positions = token_map.positions(change.positions)
        at = torch.from_numpy(positions[positions >= cached] - cached).to(state.device)
        if isinstance(change, Patch):
            change.put(state[i], torch.arange(len(at)), at, len(at))
        elif isinstance(change, Erase):
            state[i, at] = _erased(change, state[i, at], i)
        else:
            state[i, at] = _ablated(change, state[i, at], i)
    return state


def _erased(change: Erase, picked: Tensor, row: int) -> Tensor:
    directions = change.of(row).to(picked.device, torch.float32)
    if directions.shape[-1] != picked.shape[-1]:
        raise EditError(f"the residual stream is {picked.shape[-1]} wide, the directions to erase {directions.shape[-1]}")
    new = picked.float()
    for direction in directions:
        share = (new @ direction / direction.square().sum()).clamp(min=0)
        new = new - change.alpha * share[:, None] * direction
    return new.to(picked)


def _ablated(change: Ablate, picked: Tensor, row: int) -> Tensor:
    if change.how == "zero":
        new = torch.zeros_like(picked)
    elif change.how == "mean":
        mean = change.reference if change.reference is not None else picked.float().mean(0)
        if mean.shape != picked.shape[1:]:
            raise EditError(
                f"the reference of an ablation at {change.point} has the shape {tuple(picked.shape[1:])}, not {tuple(mean.shape)}"
            )
        new = mean.to(picked).expand_as(picked)
    else:
        source = torch.Generator().manual_seed(change.seed + row)
        noise = torch.randn(picked.shape, generator=source).to(picked)
        new = picked + change.scale * picked.float().std().to(picked) * noise
    if change.heads is None:
        return new
    heads = [change.heads] if isinstance(change.heads, int) else sorted(change.heads)
    kept = picked.clone()
    kept[:, heads] = new[:, heads]
    return kept


__all__ = ["Patterns", "Rows", "Trace", "trace"]
