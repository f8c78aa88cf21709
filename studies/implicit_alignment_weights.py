"""How far the subnetworks that two kinds of token ask for overlap, beside what the weights alone would give."""

from collections.abc import Sequence
from itertools import combinations
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import torch

from probe.alignment import SIDES
from probe.analysis.overlap import chance_iou, iou, magnitude_kept, wanda_kept
from probe.calibration import linear_maps
from studies.modalities import Part
from studies.work import interval, picked

if TYPE_CHECKING:
    from probe.subject import Subject


def weights(rows: pa.Table, parts: Sequence[Part], sparsity: float, seed: int) -> dict[str, Any]:
    """IoU of the subnetworks that each kind of token asks for, by layer and by type of matrix, beside what says nothing of the inputs.

    Wanda's scores share |W|, so that masks of unrelated inputs overlap too: beside each IoU stands that of the same pair with one kind's
    inputs permuted over the columns, and that of each kind with |W| alone. Differences are paired matrix by matrix.
    """
    squares = {(part.modality, side): _squares(picked(rows, modality=part.modality), side) for part in parts for side in SIDES}
    kinds = [kind for kind, found in squares.items() if found]
    maps = _with_inputs(parts[0].subject, [squares[kind] for kind in kinds])
    pairs = list(combinations(range(len(kinds)), 2))
    cross = [k for k, (i, j) in enumerate(pairs) if kinds[i][1] != kinds[j][1]]
    layers = np.array([int(name.split(".")[0]) for name, *_ in maps], dtype=int)
    types = [name.split(".")[-1] for name, *_ in maps]
    found = [_overlaps(w, inputs, pairs, sparsity, [seed, i]) for i, (_, w, inputs) in enumerate(maps)]
    own, permuted, alone = (np.array([one[k] for one in found]) for k in range(3))  # (matrix pair) twice, (matrix kind)
    bare = np.array([[row[[i, j]].mean() for i, j in pairs] for row in alone]) if len(found) else own
    numbers: dict[str, Any] = dict.fromkeys(("across", "permuted", "magnitude", "above_permuted", "above_magnitude"))
    if len(found) and cross:
        real, shuffled, plain = (table[:, cross].mean(1) for table in (own, permuted, bare))
        numbers = {
            "across": float(real.mean()), "permuted": float(shuffled.mean()), "magnitude": float(plain.mean()),
            "above_permuted": interval(real - shuffled, seed), "above_magnitude": interval(real - plain, seed),
        }  # fmt: skip
    curves = {k: _by_layer(own[:, k], layers) for k in range(len(pairs))} if len(found) else {}
    name = lambda k: " and ".join(f"{kinds[i][0]} {kinds[i][1]}" for i in pairs[k])  # noqa: E731
    return {
        "kinds": [f"{modality} {side}" for modality, side in kinds], "table": _square(own, pairs, len(kinds)),
        "permuted_table": _square(permuted, pairs, len(kinds)), "magnitude_by_kind": alone.mean(0).tolist() if len(found) else [],
        "layers": sorted(set(layers.tolist())), "by_layer": {name(k): curve for k, curve in curves.items()},
        "least_by_layer": np.min(list(curves.values()), 0).tolist() if curves else [],
        "across_by_layer": {
            which: _layer_curve(table[:, cross].mean(1), layers, seed) if len(found) and cross else None
            for which, table in (("own", own), ("permuted", permuted), ("magnitude", bare))
        },
        "by_type": {
            kind: float(own[[k for k, t in enumerate(types) if t == kind]][:, cross].mean()) for kind in dict.fromkeys(types) if cross
        },
        **numbers, "sparsity": sparsity, "chance": chance_iou(sparsity), "n_matrices": len(maps),
    }  # fmt: skip


def _overlaps(
    weight: torch.Tensor, inputs: Sequence[torch.Tensor], pairs: Sequence[tuple[int, int]], sparsity: float, seed: Sequence[int]
) -> tuple[list[float], list[float], list[float]]:
    """Of one matrix: the IoU of each pair of kinds, the same with the second's inputs permuted, and each kind's with |W| alone."""
    order = torch.from_numpy(np.random.default_rng(seed).permutation(weight.shape[1]))
    kept = [wanda_kept(weight, found.to(weight.device), sparsity) for found in inputs]
    shuffled = [wanda_kept(weight, found[order].to(weight.device), sparsity) for found in inputs]
    plain = magnitude_kept(weight, sparsity)
    return (
        [iou(kept[i], kept[j]) for i, j in pairs], [iou(kept[i], shuffled[j]) for i, j in pairs], [iou(one, plain) for one in kept],
    )  # fmt: skip


def _by_layer(values: np.ndarray, layers: np.ndarray) -> list[float]:
    return [float(values[layers == layer].mean()) for layer in np.unique(layers)]


def _layer_curve(values: np.ndarray, layers: np.ndarray, seed: int) -> dict[str, list[float]]:
    """Mean over each layer's matrices with a bootstrap interval over them."""
    numbers = [interval(values[layers == layer], seed) for layer in np.unique(layers)]
    known = lambda value: float("nan") if value is None else value  # noqa: E731  all draws agree
    return {name: [known(one[key]) for one in numbers] for name, key in (("mean", "value"), ("low", "low"), ("high", "high"))}


def _square(values: np.ndarray, pairs: Sequence[tuple[int, int]], count: int) -> list[list[float]]:
    """The mean over matrices of each pair, both ways round."""
    table = np.full((count, count), np.nan)
    for k, (i, j) in enumerate(pairs):
        if len(values):
            table[i, j] = table[j, i] = float(values[:, k].mean())
    return table.tolist()


def _squares(rows: pa.Table, side: str) -> dict[str, torch.Tensor]:
    found: dict[str, np.ndarray] = {}
    own = picked(rows, what="squares")
    for key, vector in zip(own["key"].to_pylist(), own["vector"], strict=True):
        kind, name = key.split("/", 1)
        if kind == side:
            values = vector.values.to_numpy().astype(np.float64)
            found[name] = values if name not in found else found[name] + values
    return {name: torch.tensor(values) for name, values in found.items()}


def _with_inputs(
    subject: "Subject", squares: Sequence[dict[str, torch.Tensor]]
) -> list[tuple[str, torch.Tensor, list[torch.Tensor]]]:
    """Each linear map with what entered it, for each kind of tokens; maps that share an input share its sum."""
    made, last = [], ""
    for name, module in linear_maps(subject):
        if all(name in found for found in squares):
            last = name
        same = last.split(".")[0] == name.split(".")[0] and squares and len(squares[0].get(last, [])) == module.in_features
        if same:
            made.append((name, module.weight.detach(), [found[last] for found in squares]))
    return made
