"""The replay itself: the rows that entries can change, all entries folded together, layer by layer."""

from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from probe.attention import Call, listening
from probe.errors import ReplayError
from probe.points import hook
from probe.replay.clean import Clean
from probe.replay.patches import put_rows
from probe.replay.plan import Cut, Plan
from probe.subject import Encoded, Subject
from probe.tracing import read_out


@dataclass
class _Group:
    """Entries that share an example and a first row; `state` grows as they join (entry row width)."""

    plans: list[Plan]
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

    def patched(self, point: str, layer: int, state: Tensor) -> Tensor:
        """`state` (entry row ...), of the group's last rows, with what the entries patch at this point."""
        puts = [plan.puts.get((point, layer), ()) for plan in self.plans[: len(state)]]
        return put_rows(puts, state, self.first_row + self.rows - state.shape[1])


_UNUSED = ("attention_mask", "cross_attention_mask", "past_key_values")  # the clean pass knows who may look where


class _EnoughKnown(Exception):  # noqa: N818 (a way out of the layer, not an error)
    """The last layer's keys and values are known; its other rows are of no further use."""


class Replay:
    """All entries of one batch, layer by layer."""

    def __init__(self, subject: Subject, encoded: Encoded, clean: Clean, groups: list[list[Plan]]) -> None:
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
        self.active = active
        for group in active:
            assert group.state is not None
            group.state = group.patched("resid_pre", layer, group.state)
        if final and any(group.rows > 1 for group in active):
            if not self.subject.anatomy.cross[layer]:
                self.suffix = []
                with suppress(_EnoughKnown):
                    self._call(layer, [range(group.rows) for group in active])
            for group in active:
                assert group.state is not None
                group.state = group.state[:, -1:]
        picked = [range(group.rows)[-group.state.shape[1] :] for group in active if group.state is not None]
        output = self._call(layer, picked)
        for group, piece in zip(active, self._unfold(output), strict=True):
            group.state = group.patched("resid_post", layer, piece)
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
        args = tuple(_at_rows(value, places, self.clean.length, len(self.clean.logits)) for value in clean.args)
        kwargs = {
            key: None if key in _UNUSED else _at_rows(value, places, self.clean.length, len(self.clean.logits))
            for key, value in clean.kwargs.items()
        }
        if (picture := kwargs.get("cross_attention_states")) is not None:
            kwargs["cross_attention_states"] = picture[:1, :1]  # its keys and values are taken from the clean pass
        with ExitStack() as stack:
            for point in ("attn_out", "mlp_out"):
                if self._patches(point, layer):
                    change = partial(self._patch_folded, point, layer)
                    stack.callback(hook(self.subject, point, layer, change).remove)
            output = self.subject.layers[layer](torch.cat(states)[None], *args, **kwargs)
        return (output[0] if isinstance(output, tuple) else output)[0]

    def _patches(self, point: str, layer: int) -> bool:
        return any((point, layer) in plan.puts for group in self.active for plan in group.plans)

    def _unfold(self, folded: Tensor) -> list[Tensor]:
        """One row of positions (position ...) as each group's entries and rows (entry row ...)."""
        shapes = [group.state.shape[:2] for group in self.active if group.state is not None]
        pieces = folded.split([entries * rows for entries, rows in shapes])
        return [piece.unflatten(0, tuple(shape)) for piece, shape in zip(pieces, shapes, strict=True)]

    def _patch_folded(self, point: str, layer: int, state: Tensor) -> Tensor:
        pieces = zip(self.active, self._unfold(state[0]), strict=True)
        return torch.cat([group.patched(point, layer, piece).flatten(0, 1) for group, piece in pieces])[None]

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
            query = call.query[0, :, piece].unflatten(1, (group.state.shape[0], -1))
            if self.subject.anatomy.cross[layer]:
                outputs.append(_attend_picture(group, layer, clean, query))
                continue
            own_key, own_value = (
                tensor[0, :, piece].unflatten(1, (group.state.shape[0], -1)) for tensor in (call.key, call.value)
            )
            if collecting:
                keys.append((own_key, own_value))
                continue
            if self.suffix:
                own_key, own_value = self.suffix[number]
            outputs.append(_attend_group(group, layer, clean, query, own_key, own_value))
        if collecting:
            self.suffix = keys
            raise _EnoughKnown
        output = torch.cat(outputs)[None]
        return (self._patch_folded("z", layer, output) if self._patches("z", layer) else output), None


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


def _attend_picture(group: _Group, layer: int, clean: Call, query: Tensor) -> Tensor:
    """Cross-attention of one group's rows over the picture's keys, which are the clean run's: (entry x row, head, dim).

    `query` (head entry row dim).
    """
    heads, entries, rows, dim = query.shape
    groups = clean.key.shape[1]
    key, value = (tensor[group.example].float() for tensor in (clean.key, clean.value))
    folded = query.float().view(groups, heads // groups, entries, rows, dim).transpose(1, 2)
    scores = (folded.flatten(1, 3) @ key.transpose(1, 2)).unflatten(1, (entries, heads // groups, rows))
    _scale(scores, clean)
    at = group.first_row + group.rows - rows + torch.arange(rows, device=scores.device)
    visible, bias = clean.visible(at.expand(clean.query.shape[0], -1))
    if bias is not None:
        scores = scores + bias[group.example, 0].float()
    scores.masked_fill_(~visible[group.example, 0], float("-inf"))
    for entry in range(entries):
        for cut in group.plans[entry].cuts.get(layer, ()):
            _cut(scores[:, entry], cut, at, 0)
    weight = scores.softmax(-1).nan_to_num(0.0)  # a row that sees nothing reads zero
    read = (weight.flatten(1, 3) @ value).unflatten(1, (entries, heads // groups, rows))
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
        for cut in group.plans[entry].cuts.get(layer, ()):
            _cut(before[:, entry], cut, at, 0)
            _cut(after[:, entry], cut, at, first)


def _cut(scores: Tensor, cut: Cut, at: Tensor, first: int) -> None:
    """Minus infinity, in place, on the edges of one cut: `scores` (kv_head share row key), its keys numbered from `first`."""
    cut_rows, columns, heads = cut
    row = torch.isin(at.cpu(), cut_rows)
    column = torch.zeros(scores.shape[-1], dtype=torch.bool)
    inside = columns[(columns >= first) & (columns < first + scores.shape[-1])]
    column[inside - first] = True
    edges = (row[:, None] & column).to(scores.device)
    if heads is not None:
        chosen = torch.zeros(scores.shape[0] * scores.shape[1], dtype=torch.bool, device=scores.device)
        chosen[heads] = True
        edges = chosen.view(*scores.shape[:2], 1, 1) & edges
    scores.masked_fill_(edges, float("-inf"))


def _at_rows(value: Any, places: list[tuple[int, Tensor]], length: int, batch: int) -> Any:
    """A layer's argument at the rows of a replay: position embeddings and position ids are picked, the rest passes.

    Examples lie in the dimension before the positions, or first where that one has a single entry (a mask's heads).
    """
    if isinstance(value, tuple):
        return tuple(_at_rows(item, places, length, batch) for item in value)
    if not isinstance(value, Tensor):
        return value
    dim = value.dim() - (2 if value.is_floating_point() else 1)
    if dim < 0 or value.dim() < 2 or value.shape[dim] != length:
        return value
    of = 0 if dim and value.shape[dim - 1] == 1 and value.shape[0] == batch else dim - 1
    pieces = []
    for example, rows in places:
        one = value if of < 0 else value.narrow(of, example if value.shape[of] > 1 else 0, 1)
        pieces.append(one.index_select(dim, rows.to(value.device)))
    return torch.cat(pieces, dim)
