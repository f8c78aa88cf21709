"""Exact, cheap re-runs of many edits from one clean pass.

A causal decoder with an edit in layers [a, b) whose first touched row is r is, up to layer a and at every position before
r, the clean run. So one clean pass is recorded (post-RoPE keys and values of each layer, the residual stream that enters
it, the keyword arguments it was called with), and then only rows r and after are run again, from layer a up: all
entries of the sweep together, folded into one long row of positions, each joining at its own first layer. The layers'
own modules do the work; only attention is ours, each row reading the shared clean prefix and its own entry's suffix,
merged through their common normaliser.

Where the argument does not hold (rows that a prefix looks ahead at, layers that mix positions without attention), the
sweep is refused with the reason. The idea and its cost model: methods of cross-modal knock-out, arXiv 2411.18620, which
publishes one full forward for each layer and flow.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from probe.attention import Call, listening
from probe.edits import Edit, Group, Knockout
from probe.errors import ReplayError
from probe.example import Example
from probe.points import head_list, layer_list
from probe.subject import Encoded, Side, Subject
from probe.tokens import TokenMap
from probe.tracing import last_logits, read_out, trace

Entry = Edit | Sequence[Edit]
Entries = Sequence[Entry] | Callable[[TokenMap], Sequence[Entry]]


def _alone(edit: Edit, token_map: TokenMap) -> Edit:
    """The edit in explicit positions of the example without its padding."""

    def places(group: Group) -> list[int]:
        return [int(p) - token_map.first for p in token_map.positions(group) if token_map.segments[p] != "pad"]

    if isinstance(edit, Knockout):
        return replace(edit, rows=places(edit.rows), columns=places(edit.columns))
    return replace(edit, positions=places(edit.positions))


@dataclass(frozen=True)
class Sweep:
    """Logits of the last position: clean ones (example vocabulary), and for each example one row for each entry.

    `layer_rows` counts rows times layers that the replay ran, against the clean pass's positions times layers.
    """

    encoded: Encoded
    clean: Float[Tensor, "example vocabulary"]
    edited: tuple[Float[Tensor, "_entry vocabulary"], ...]  # one for each example, float32
    layer_rows: int
    clean_layer_rows: int


def sweep(
    subject: Subject,
    examples: Example | Sequence[Example] | Encoded,
    entries: Entries,
    method: Literal["replay", "naive"] = "replay",
    padding: Side = "left",
    max_rows: int = 16384,
) -> Sweep:
    """Runs every entry (a knock-out, or several that act together) on every example.

    `entries` may be a function of an example's TokenMap, for positions that differ from example to example. `naive`
    runs one full forward for each entry: the oracle, and the way for architectures that replay refuses. `max_rows`
    bounds how many rows run at once.

    Raises ReplayError with the reason where a replay would not be exact.
    """
    encoded = examples if isinstance(examples, Encoded) else subject.encode(examples, padding)
    asked = [entries(m) if callable(entries) else entries for m in encoded.maps]
    wanted = [[(entry,) if isinstance(entry, Edit) else tuple(entry) for entry in each] for each in asked]
    if method == "naive":
        return _naive(subject, encoded, wanted)
    plans = [
        plan for i, each in enumerate(wanted) for j, edits in enumerate(each)
        if (plan := _plan(subject, encoded, i, j, edits)) is not None
    ]  # fmt: skip
    with torch.no_grad(), subject.lock:
        clean = _record(subject, encoded, plans)
        edited = [clean.logits[i].expand(len(each), -1).clone() for i, each in enumerate(wanted)]
        count = 0
        for batch in _batches(plans, max_rows):
            logits, rows = _Replay(subject, encoded, clean, batch).run()
            count += rows
            for plan, row in zip((plan for group in batch for plan in group), logits, strict=True):
                edited[plan.example][plan.number] = row
    return Sweep(encoded, clean.logits, tuple(edited), count, sum(len(m) for m in encoded.maps) * subject.n_layers)


def _naive(subject: Subject, encoded: Encoded, wanted: list[list[tuple[Edit, ...]]]) -> Sweep:
    clean = last_logits(subject, encoded)
    edited, runs = [], 0
    for i, each in enumerate(wanted):
        alone, token_map = subject.encode(encoded.examples[i]), encoded.maps[i]
        each = [tuple(_alone(edit, token_map) for edit in edits) for edits in each]
        edited.append(torch.stack([trace(subject, alone, edit=edits).logits[0] for edits in each]) if each else clean[:0])
        runs += len(each)
    per_run = len(encoded.maps[0]) * subject.n_layers
    return Sweep(encoded, clean, tuple(edited), runs * per_run, len(encoded) * per_run)


_Cut = tuple[Tensor, Tensor, list[int] | None]  # rows, columns, heads


@dataclass(frozen=True)
class _Plan:
    """One entry on one example: the first row and layer that it can change, and its cuts layer by layer."""

    example: int
    number: int
    first_row: int
    rows: int  # from the first row to the last position
    first_layer: int
    cuts: dict[int, list[_Cut]] = field(repr=False)


def _plan(subject: Subject, encoded: Encoded, example: int, number: int, edits: tuple[Edit, ...]) -> _Plan | None:
    """None for an entry that touches nothing: its result is the clean run's."""
    token_map = encoded.maps[example]
    cuts: dict[int, list[_Cut]] = {}
    first = token_map.last
    for edit in edits:
        if not isinstance(edit, Knockout):
            raise ReplayError(f'a sweep replays knock-outs: run {type(edit).__name__} entries with method="naive"')
        rows, columns = token_map.positions(edit.rows), token_map.positions(edit.columns)
        rows = rows[rows <= token_map.last]
        layers, heads = layer_list(edit.layers, subject.n_layers), head_list(edit.heads, subject.n_heads)
        if len(rows):  # without columns nothing is cut, but the rows are run again all the same: an honest no-op
            first = min(first, int(rows[0]))
            for layer in layers:
                cuts.setdefault(layer, []).append((torch.from_numpy(rows), torch.from_numpy(columns), heads))
    if not cuts:
        return None
    return _Plan(example, number, first, token_map.last + 1 - first, min(cuts), cuts)


def _batches(plans: list[_Plan], max_rows: int) -> list[list[list[_Plan]]]:
    """Batches of groups: a group shares its example and first row, its entries in order of their first layer."""
    batches: list[list[list[_Plan]]] = []
    room = 0
    for plan in sorted(plans, key=lambda p: (p.example, p.first_row, p.first_layer)):
        if plan.rows > room or not batches:
            batches.append([])
            room = max_rows
        room -= plan.rows
        groups = batches[-1]
        if not groups or (groups[-1][0].example, groups[-1][0].first_row) != (plan.example, plan.first_row):
            groups.append([])
        groups[-1].append(plan)
    return batches


# --- the clean pass --------------------------------------------------------------------------------------------------


@dataclass
class _CleanLayer:
    """What one layer saw and was called with in the clean pass."""

    call: Call | None = None
    entering: Tensor | None = None  # batch row width, from the first row that any entry needs
    leaving: Tensor | None = None
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)


@dataclass
class _Clean:
    logits: Tensor
    first_row: int
    length: int
    layers: list[_CleanLayer]


class _Recorder:
    def __init__(self, clean: list[_CleanLayer]) -> None:
        self.clean = clean

    def attend(self, layer: int, call: Call) -> tuple[Tensor, Tensor | None]:
        if self.clean[layer].call is not None:
            raise ReplayError(f"layer {layer} attends twice in one pass: this architecture cannot be replayed")
        self.clean[layer].call = call
        return call.run()


def _record(subject: Subject, encoded: Encoded, plans: list[_Plan]) -> _Clean:
    first_row = min([plan.first_row for plan in plans] + [token_map.last for token_map in encoded.maps])
    layers = [_CleanLayer() for _ in range(subject.n_layers)]
    with ExitStack() as stack:
        stack.enter_context(listening(subject, _Recorder(layers)))
        for index, block in enumerate(subject.layers):
            stack.callback(block.register_forward_pre_hook(_keep_input(layers[index], first_row), with_kwargs=True).remove)
            stack.callback(block.register_forward_hook(_keep_output(layers[index], first_row)).remove)
        logits = last_logits(subject, encoded)
    clean = _Clean(logits, first_row, len(encoded.maps[0]), layers)
    _refuse_what_is_not_exact(subject, encoded, clean, {(plan.example, plan.first_row) for plan in plans})
    return clean


def _keep_input(clean: _CleanLayer, first_row: int) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        state = args[0] if args else kwargs["hidden_states"]
        clean.entering = state[:, first_row:]
        clean.args, clean.kwargs = args[1:], {k: v for k, v in kwargs.items() if k != "hidden_states"}

    return hook


def _keep_output(clean: _CleanLayer, first_row: int) -> Callable[..., None]:
    def hook(module: nn.Module, args: Any, output: Any) -> None:
        clean.leaving = (output[0] if isinstance(output, tuple) else output)[:, first_row:]

    return hook


def _refuse_what_is_not_exact(subject: Subject, encoded: Encoded, clean: _Clean, starts: set[tuple[int, int]]) -> None:
    family = subject.anatomy.family
    for index, layer in enumerate(clean.layers):
        if layer.call is None:
            kind = type(subject.layers[index]).__name__
            raise ReplayError(
                f"layer {index} of this {family} model ({kind}) mixes positions without softmax attention, so that a clean "
                f'prefix cannot be reused: run the sweep with method="naive"'
            )
        if layer.call.key.shape[2] != clean.length:
            raise ReplayError(
                f"layer {index} of this {family} model attends to {layer.call.key.shape[2]} keys in a prompt of {clean.length} "
                f'positions (cross-attention or a rolling cache): run the sweep with method="naive"'
            )
        for example, first_row in sorted(starts):
            _refuse_lookahead(index, layer.call, example, first_row, family)
    state = torch.stack([clean.layers[-1].leaving[i, m.last - clean.first_row] for i, m in enumerate(encoded.maps)])  # type: ignore[index]
    gap = (read_out(subject, state).float().to(clean.logits.device) - clean.logits).abs().max().item()
    scale = 1e-4 if subject.dtype == torch.float32 else 5e-2
    if gap > scale * max(1.0, clean.logits.abs().max().item()):
        raise ReplayError(
            f"the logits of this {family} model are not its final norm and unembedding of the last layer (difference {gap:.1e}): "
            f'run the sweep with method="naive"'
        )


def _refuse_lookahead(index: int, call: Call, example: int, first_row: int, family: str) -> None:
    """No position before the first row may look at it or beyond, or the clean prefix would not be clean."""
    mask = call.mask
    if isinstance(mask, Tensor) and mask.dim() == 4:
        ahead = mask[example if len(mask) > 1 else 0, :, :first_row, first_row:]
        open_ahead = ahead.any() if ahead.dtype == torch.bool else (ahead > torch.finfo(ahead.dtype).min / 2).any()
        if bool(open_ahead):
            raise ReplayError(
                f"layer {index} of this {family} model lets positions look ahead (a bidirectional prefix), so that rows before "
                f'an edit change too: run the sweep with method="naive"'
            )
    elif not call.options.get("is_causal", getattr(call.module, "is_causal", True)):
        raise ReplayError(f'layer {index} of this {family} model is not causal: run the sweep with method="naive"')


# --- the replay ------------------------------------------------------------------------------------------------------


@dataclass
class _Group:
    """Entries that share an example and a first row; `state` grows as they join (entry row width)."""

    plans: list[_Plan]
    state: Tensor | None = None

    @property
    def example(self) -> int:
        return self.plans[0].example

    @property
    def first_row(self) -> int:
        return self.plans[0].first_row

    @property
    def rows(self) -> int:
        return self.plans[0].rows

    def active(self, layer: int) -> int:
        return sum(plan.first_layer <= layer for plan in self.plans)


class _EnoughKnown(Exception):  # noqa: N818 (a way out of the layer, not an error)
    """The last layer's keys and values are known; its other rows are of no further use."""


class _Replay:
    """All entries of one batch, layer by layer."""

    def __init__(self, subject: Subject, encoded: Encoded, clean: _Clean, groups: list[list[_Plan]]) -> None:
        self.subject, self.clean = subject, clean
        self.groups = [_Group(plans) for plans in groups]
        self.suffix: list[tuple[Tensor, Tensor]] | None = None  # keys and values of the last layer's rows, by group

    def run(self) -> tuple[Tensor, int]:
        """Last-position logits of every entry, in the order of the plans, and how many rows times layers were run."""
        count = 0
        last = self.subject.n_layers - 1
        for layer in range(min(group.plans[0].first_layer for group in self.groups), last + 1):
            self._join(layer)
            count += sum(group.state.shape[0] * group.rows for group in self.groups if group.state is not None)
            with listening(self.subject, self):
                self._step(layer, final=layer == last)
        states = torch.cat([group.state[:, -1] for group in self.groups if group.state is not None])
        return read_out(self.subject, states).float().to(self.clean.logits.device), count

    def _join(self, layer: int) -> None:
        """Entries whose first layer this is start from what the clean run put into it."""
        clean = self.clean.layers[layer].entering
        assert clean is not None
        for group in self.groups:
            have = 0 if group.state is None else group.state.shape[0]
            new = group.active(layer) - have
            if new > 0:
                start = group.first_row - self.clean.first_row
                rows = clean[group.example, start : start + group.rows].expand(new, -1, -1)
                group.state = rows if group.state is None else torch.cat([group.state.to(rows.device), rows])

    def _step(self, layer: int, final: bool) -> None:
        active = [group for group in self.groups if group.state is not None]
        self.active, self.layer = active, layer
        if final and any(group.rows > 1 for group in active):
            self.suffix = []
            with suppress(_EnoughKnown):
                self._call(layer, [range(group.rows) for group in active])
            for group in active:
                assert group.state is not None
                group.state = group.state[:, -1:]
        picked = [range(group.rows)[-group.state.shape[1] :] for group in active if group.state is not None]
        output = self._call(layer, picked)
        for group, piece in zip(
            active, output.split([g.state.shape[0] * g.state.shape[1] for g in active if g.state is not None]), strict=True
        ):
            assert group.state is not None
            group.state = piece.view(group.state.shape)
        if not final:
            self._add_between(layer, active)

    def _call(self, layer: int, picked: list[range]) -> Tensor:
        """The layer's own forward on all groups folded into one row of positions."""
        states = [g.state.reshape(-1, g.state.shape[-1]) for g in self.active if g.state is not None]
        places = [
            (group.example, group.first_row + torch.tensor(rows).repeat(group.state.shape[0]))
            for group, rows in zip(self.active, picked, strict=True) if group.state is not None
        ]  # fmt: skip
        clean = self.clean.layers[layer]
        args = tuple(_at_rows(value, places, self.clean.length) for value in clean.args)
        kwargs = {
            key: None if key in ("attention_mask", "past_key_values") else _at_rows(value, places, self.clean.length)
            for key, value in clean.kwargs.items()
        }
        output = self.subject.layers[layer](torch.cat(states)[None], *args, **kwargs)
        return (output[0] if isinstance(output, tuple) else output)[0]

    def _add_between(self, layer: int, active: list[_Group]) -> None:
        """What the family adds to the stream between layers (DeepStack) is the same in every entry."""
        leaving, entering = self.clean.layers[layer].leaving, self.clean.layers[layer + 1].entering
        assert leaving is not None
        assert entering is not None
        for group in active:
            start = group.first_row - self.clean.first_row
            rows = slice(start, start + group.rows)
            before, after = leaving[group.example, rows], entering[group.example, rows].to(leaving.device)
            if torch.equal(before, after):
                continue
            if not self.subject.anatomy.row.deepstack:
                raise ReplayError(
                    f"something between layers {layer} and {layer + 1} of this {self.subject.anatomy.family} model changes the "
                    f'residual stream in a way that is not known to be an addition: run the sweep with method="naive"'
                )
            assert group.state is not None
            group.state = group.state + (after - before)

    def attend(self, layer: int, call: Call) -> tuple[Tensor, Tensor | None]:
        clean = self.clean.layers[layer].call
        assert clean is not None
        collecting = self.suffix is not None and not self.suffix
        outputs, start, keys = [], 0, []
        for number, group in enumerate(self.active):
            assert group.state is not None
            count = group.state.shape[0] * group.state.shape[1]
            piece = slice(start, start + count)
            start += count
            own_key, own_value = (
                tensor[0, :, piece].unflatten(1, (group.state.shape[0], -1)) for tensor in (call.key, call.value)
            )
            if collecting:
                keys.append((own_key, own_value))
                continue
            if self.suffix:
                own_key, own_value = self.suffix[number]
            query = call.query[0, :, piece].unflatten(1, (group.state.shape[0], -1))
            outputs.append(_attend_group(group, layer, clean, query, own_key, own_value))
        if collecting:
            self.suffix = keys
            raise _EnoughKnown
        return torch.cat(outputs)[None], None


def _attend_group(group: _Group, layer: int, clean: Call, query: Tensor, own_key: Tensor, own_value: Tensor) -> Tensor:
    """Attention of one group's rows over the shared clean prefix and each entry's own suffix: (entry x row, head, dim).

    `query` (head entry row dim), `own_key` and `own_value` (kv_head entry suffix dim).
    """
    groups, entries, suffix, _ = own_key.shape
    heads, _, rows, dim = query.shape
    first = group.first_row
    # kv_head entry share x row dim: the heads that share a key and value are rows of one product
    folded = query.float().view(groups, heads // groups, entries, rows, dim).transpose(1, 2).reshape(groups, entries, -1, dim)
    prefix_key, prefix_value = (tensor[group.example, :, :first].float() for tensor in (clean.key, clean.value))
    before = (folded.flatten(1, 2) @ prefix_key.transpose(1, 2)).unflatten(1, (entries, -1))
    after = folded @ own_key.float().transpose(2, 3)
    shape = (groups, entries, heads // groups, rows)
    before, after = before.view(*shape, first), after.view(*shape, suffix)
    for scores in (before, after):
        _scale(scores, clean)
    _hide(group, layer, clean, before, after, rows)
    peak = torch.maximum(before.amax(-1, keepdim=True), after.amax(-1, keepdim=True)) if first else after.amax(-1, keepdim=True)
    peak = peak.clamp_(min=torch.finfo(torch.float32).min / 2)  # a row that sees nothing has weight zero, not one
    before, after = before.sub_(peak).exp_(), after.sub_(peak).exp_()
    total = before.sum(-1, keepdim=True) + after.sum(-1, keepdim=True)
    read = (before.flatten(1, 3) @ prefix_value).view(*shape, dim)
    read = read + (after.view(groups, entries, -1, suffix) @ own_value.float()).view(*shape, dim)
    read = read / torch.where(total > 0, total, 1.0)
    return read.permute(1, 3, 0, 2, 4).reshape(entries * rows, heads, dim).to(query.dtype)


def _scale(scores: Tensor, clean: Call) -> None:
    scores.mul_(clean.scaling)
    if cap := clean.options.get("softcap"):
        scores.div_(cap).tanh_().mul_(cap)


def _hide(group: _Group, layer: int, clean: Call, before: Tensor, after: Tensor, rows: int) -> None:
    """Minus infinity where the mask or an entry's cut forbids looking; `before` and `after` in place."""
    first, suffix = group.first_row, after.shape[-1]
    at = first + suffix - rows + torch.arange(rows, device=before.device)
    visible, _ = clean.visible(at.expand(clean.query.shape[0], -1))
    seen = visible[group.example, 0, :, : first + suffix]
    if not bool(seen[:, :first].all()):
        before.masked_fill_(~seen[:, :first], float("-inf"))
    after.masked_fill_(~seen[:, first:], float("-inf"))
    for entry in range(before.shape[1]):
        for cut_rows, columns, heads in group.plans[entry].cuts.get(layer, ()):
            row = torch.isin(at.cpu(), cut_rows)
            column = torch.zeros(first + suffix, dtype=torch.bool)
            column[columns[columns < first + suffix]] = True
            edges = (row[:, None] & column).to(before.device)
            for scores, part in ((before[:, entry], edges[:, :first]), (after[:, entry], edges[:, first:])):
                if heads is None:
                    scores.masked_fill_(part, float("-inf"))
                else:
                    chosen = torch.zeros(scores.shape[0] * scores.shape[1], dtype=torch.bool, device=scores.device)
                    chosen[heads] = True
                    scores.masked_fill_(chosen.view(*scores.shape[:2], 1, 1) & part, float("-inf"))


def _at_rows(value: Any, places: list[tuple[int, Tensor]], length: int) -> Any:
    """A layer's argument at the rows of a replay: position embeddings and position ids are picked, the rest passes."""
    if isinstance(value, tuple):
        return tuple(_at_rows(item, places, length) for item in value)
    if not isinstance(value, Tensor):
        return value
    dim = -1 if not value.is_floating_point() else -2
    if value.dim() < 2 or value.shape[dim] != length:
        return value
    batch = dim - 1 if value.dim() >= 1 - dim else None
    pieces = []
    for example, rows in places:
        one = value if batch is None else value.narrow(batch, example if value.shape[batch] > 1 else 0, 1)
        pieces.append(one.index_select(value.dim() + dim, rows.to(value.device)))
    return torch.cat(pieces, dim)
