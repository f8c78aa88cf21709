"""Exact, cheap re-runs of many edits from one clean pass.

A causal decoder with an edit in layers [a, b) whose first touched row is r is, up to layer a and at every position before
r, the clean run. So one clean pass is recorded (post-RoPE keys and values of each layer, the residual stream that enters
it, the keyword arguments it was called with), and then only rows r and after are run again, from layer a up: all
entries of the sweep together, folded into one long row of positions, each joining at its own first layer. The layers'
own modules do the work; only attention is ours, each row reading the shared clean prefix and its own entry's suffix,
merged through their common normaliser. An edit is edges that are cut (a knock-out) or activations that are given (a
patch), and an entry may hold several of both.

Where the argument does not hold (rows that a prefix looks ahead at, layers that mix positions without attention), the
sweep is refused with the reason. The idea and its cost model: methods of cross-modal knock-out, arXiv 2411.18620, which
publishes one full forward for each layer and flow.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from probe.edits import Edit, Erase, Group, Knockout, Patch
from probe.example import Example
from probe.replay.clean import record
from probe.replay.patches import resolve_patch
from probe.replay.plan import batches, plan_entry
from probe.replay.rows import Replay
from probe.subject import Encoded, Side, Subject
from probe.tokens import TokenMap
from probe.tracing import last_logits, trace

Entry = Edit | Sequence[Edit]
Entries = Sequence[Entry] | Callable[[TokenMap], Sequence[Entry]]


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
    """Runs every entry (a knock-out, a patch, or several that act together) on every example.

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
        if (plan := plan_entry(subject, encoded, i, j, edits)) is not None
    ]  # fmt: skip
    with torch.no_grad(), subject.lock:
        clean = record(subject, encoded, plans)
        edited = [clean.logits[i].expand(len(each), -1).clone() for i, each in enumerate(wanted)]
        count = 0
        for batch in batches(plans, max_rows):
            logits, rows = Replay(subject, encoded, clean, batch).run()
            count += rows
            for plan, row in zip((plan for group in batch for plan in group), logits, strict=True):
                edited[plan.example][plan.number] = row
    return Sweep(encoded, clean.logits, tuple(edited), count, sum(len(m) for m in encoded.maps) * subject.n_layers)


def _naive(subject: Subject, encoded: Encoded, wanted: list[list[tuple[Edit, ...]]]) -> Sweep:
    clean = last_logits(subject, encoded)
    edited, runs = [], 0
    for i, each in enumerate(wanted):
        alone, token_map = subject.encode(encoded.examples[i]), encoded.maps[i]
        real = token_map.positions("real")
        named = {name: np.nonzero(np.isin(real, group))[0].tolist() for name, group in token_map.groups.items()}
        own = alone.maps[0].with_groups(**named)
        alone = alone.with_maps([replace(own, crossed=token_map.crossed)])
        each = [tuple(_alone(edit, token_map, real, i) for edit in edits) for edits in each]
        edited.append(torch.stack([trace(subject, alone, edit=edits).logits[0] for edits in each]) if each else clean[:0])
        runs += len(each)
    per_run = len(encoded.maps[0]) * subject.n_layers
    return Sweep(encoded, clean, tuple(edited), runs * per_run, len(encoded) * per_run)


def _alone(edit: Edit, token_map: TokenMap, real: np.ndarray, example: int) -> Edit:
    """The edit on the example without its padding: explicit positions move, groups keep their names."""
    if isinstance(edit, Patch):
        put = resolve_patch(edit, token_map)
        return replace(edit, positions=_without_padding(put.at.tolist(), real), value=edit.value[put.of.to(edit.value.device)])
    if isinstance(edit, Knockout):
        return replace(edit, rows=_without_padding(edit.rows, real), columns=_without_padding(edit.columns, real))
    if isinstance(edit, Erase):
        edit = replace(edit, directions=edit.of(example))
    return replace(edit, positions=_without_padding(edit.positions, real))


def _without_padding(group: Group, real: np.ndarray) -> Group:
    if isinstance(group, str):
        return group
    found: list[int] = np.nonzero(np.isin(real, [int(position) for position in group]))[0].tolist()
    return found
