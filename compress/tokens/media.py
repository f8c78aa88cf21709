"""Where the pictures, clips and sounds of a prompt lie among its token ids."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import isqrt, prod
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from probe.subject import Subject

Shape = tuple[int, int, int]  # frames, rows, columns


@dataclass(frozen=True)
class Medium:
    """One run of placeholders: its kind, its positions in the row, and its grid where the ids tell one.

    A picture that is cut into tiles with separators between them is one Medium for each tile.
    """

    kind: str
    positions: Int[Tensor, " n"]
    grid: Shape | None

    def __len__(self) -> int:
        return len(self.positions)


def find_media(subject: Subject, ids: Int[Tensor, "batch position"], inputs: Mapping[str, Any]) -> list[list[Medium]]:
    """The media of each row of a batch, in order.

    Runs of one placeholder are one medium each; pictures that stand side by side are told apart where all take as many positions.
    """
    anatomy = subject.anatomy
    kinds = {"image": anatomy.image_token_id, "video": anatomy.video_token_id, "audio": anatomy.audio_token_id}
    found: list[list[Medium]] = [[] for _ in ids]
    for kind, token in kinds.items():
        if token is None:
            continue
        runs = [(row, run) for row, line in enumerate(ids) for run in _runs(torch.nonzero(line == token)[:, 0])]
        runs = _apart(subject, runs, kind)
        grids = _grids(subject, kind, inputs, [len(run) for _, run in runs])
        for (row, run), grid in zip(runs, grids, strict=True):
            found[row].append(Medium(kind, run, grid))
    return [sorted(row, key=lambda medium: int(medium.positions[0])) for row in found]


def _runs(places: Int[Tensor, " n"]) -> list[Int[Tensor, " m"]]:
    if not len(places):
        return []
    cuts = (torch.nonzero(places[1:] != places[:-1] + 1)[:, 0] + 1).tolist()
    return list(torch.tensor_split(places, cuts))


def _apart(subject: Subject, runs: list[tuple[int, Tensor]], kind: str) -> list[tuple[int, Tensor]]:
    """Runs of several pictures side by side, cut into pictures, in families whose pictures all take as many positions."""
    each = _positions_of_each(subject) if kind == "image" else None
    if not each or any(len(run) % each for _, run in runs):
        return runs
    return [(row, piece) for row, run in runs for piece in run.split(each)]


def _positions_of_each(subject: Subject) -> int | None:
    """How many positions every picture takes, where that is a constant of the model."""
    config = subject.config
    if subject.anatomy.row.geometry == "pooled":
        return int(config.mm_tokens_per_image)
    if subject.anatomy.row.geometry != "plain":
        return None
    vision = config.vision_config
    return (int(vision.image_size) // int(vision.patch_size)) ** 2 + (
        getattr(config, "vision_feature_select_strategy", "default") == "full"
    )


def _grids(subject: Subject, kind: str, inputs: Mapping[str, Any], lengths: list[int]) -> list[Shape | None]:
    told = inputs.get(f"{kind}_grid_thw")
    vision = getattr(subject.config, "vision_config", None)
    merge = int(getattr(vision, "spatial_merge_size", 1) or 1)
    if isinstance(told, Tensor) and len(told) == len(lengths):
        shapes = [(int(t), int(h) // merge, int(w) // merge) for t, h, w in told.tolist()]
        if [prod(shape) for shape in shapes] == lengths:
            return list(shapes)
    if kind == "audio":
        return [(length, 1, 1) for length in lengths]
    return [(1, isqrt(n), isqrt(n)) if kind == "image" and isqrt(n) ** 2 == n else None for n in lengths]
