"""What a sweep's entries can change, and in which batches they are run."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from probe.edits import Edit, Knockout, Patch
from probe.errors import ReplayError
from probe.points import head_list, layer_list
from probe.replay.patches import Put, resolve_patch
from probe.subject import Encoded, Subject

Cut = tuple[Tensor, Tensor, list[int] | None]  # rows, columns, heads


@dataclass(frozen=True)
class Plan:
    """One entry on one example: the first row and layer that it can change, its cuts by layer, its patches by point and layer."""

    example: int
    number: int
    first_row: int
    rows: int  # from the first row to the last position
    first_layer: int
    cuts: dict[int, list[Cut]] = field(repr=False)
    puts: dict[tuple[str, int], list[Put]] = field(repr=False)


def plan_entry(subject: Subject, encoded: Encoded, example: int, number: int, edits: tuple[Edit, ...]) -> Plan | None:
    """None for an entry that touches nothing: its result is the clean run's."""
    token_map = encoded.maps[example]
    cuts: dict[int, list[Cut]] = {}
    puts: dict[tuple[str, int], list[Put]] = {}
    first = token_map.last
    for edit in edits:
        if isinstance(edit, Patch):
            put = resolve_patch(edit, token_map)
            for layer in layer_list(edit.layer, subject.n_layers) if len(put.at) else ():
                first = min(first, int(put.at[0]))
                puts.setdefault((edit.point, layer), []).append(put)
            continue
        if not isinstance(edit, Knockout):
            raise ReplayError(f'a sweep replays knock-outs and patches: run {type(edit).__name__} entries with method="naive"')
        rows, columns = token_map.positions(edit.rows), token_map.positions(edit.columns)
        rows = rows[rows <= token_map.last]
        layers, heads = layer_list(edit.layers, subject.n_layers), head_list(edit.heads, subject.n_heads)
        if len(rows):  # without columns nothing is cut, but the rows are run again all the same: an honest no-op
            first = min(first, int(rows[0]))
            for layer in layers:
                hidden = token_map.crossed_positions(edit.columns) if subject.anatomy.cross[layer] else columns
                cuts.setdefault(layer, []).append((torch.from_numpy(rows), torch.from_numpy(hidden), heads))
    touched = [*cuts, *(layer for _, layer in puts)]
    return Plan(example, number, first, token_map.last + 1 - first, min(touched), cuts, puts) if touched else None


def batches(plans: list[Plan], max_rows: int) -> list[list[list[Plan]]]:
    """Batches of groups: a group shares its example and first row, its entries in order of their first layer."""
    batches: list[list[list[Plan]]] = []
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
