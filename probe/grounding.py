"""From words to pixels: the attention of a phrase, and of the last position, laid over the picture (F-LMM, arXiv 2406.05821).

One forward pass for each example, and of it only the rows that are asked for.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import grid_sample

from probe.analysis.grounding import Box, box_mask
from probe.errors import DataError, StudyError, TokenError, did_you_mean
from probe.example import Example
from probe.geometry import Area
from probe.recorders import Rows
from probe.subject import Encoded, Subject
from probe.tokens import TokenMap
from probe.tracing import trace
from probe.words import positions_of

SOURCES = ("word", "last")  # whose rows are read: those of the phrase's own tokens, or the one that writes the answer
MERGES = ("mean", "max")
SMALLEST = 32  # cells along a side: a region must leave some of a table so fine, and take some of it


@dataclass(frozen=True)
class Target:
    """A phrase of the question and what it is about: its positions, a picture, and boxes as shares of the picture's sides."""

    phrase: str
    positions: tuple[int, ...]
    picture: int
    boxes: tuple[Box, ...]


@dataclass(frozen=True)
class PictureMaps:
    """Maps over one picture, one for each channel (layer by layer, head by head in each).

    `parts` are the grids that show it, thumbnail and tiles alike: (channel row column) and the area of the original. `size` is
    the picture's width and height.
    """

    parts: tuple[tuple[Float[Tensor, "channel _ _"], Area], ...]
    size: tuple[int, int]

    @property
    def mass(self) -> Float[Tensor, " channel"]:
        """What each map holds in all."""
        return torch.stack([part.sum((1, 2)) for part, _ in self.parts]).sum(0)

    @property
    def finest(self) -> Float[Tensor, "channel row column"]:
        """The maps of the grid with the most cells."""
        return max((part for part, _ in self.parts), key=lambda part: part[0].numel())

    def shared(self) -> "PictureMaps":
        """Each map divided by what it holds, so that it sums to one."""
        total = self.mass.clamp(min=1e-12)[:, None, None]
        return PictureMaps(tuple((part / total, area) for part, area in self.parts), self.size)

    def picked(self, channels: Sequence[int]) -> "PictureMaps":
        """Some of the maps."""
        return PictureMaps(tuple((part[list(channels)], area) for part, area in self.parts), self.size)

    def averaged(self, groups: int = 1) -> "PictureMaps":
        """The mean map of each of `groups` equal runs of channels: of all, or (with as many groups as layers) of each layer."""
        return PictureMaps(
            tuple((part.unflatten(0, (groups, -1)).mean(1), area) for part, area in self.parts), self.size
        )  # fmt: skip

    def over(self, other: "PictureMaps") -> "PictureMaps":
        """The ratio to other maps of the same shape, cell by cell."""
        pairs = zip(self.parts, other.parts, strict=True)
        return PictureMaps(tuple((a / b.clamp(min=1e-12), area) for (a, area), (b, _) in pairs), self.size)

    def raster(self, side: int) -> Float[Tensor, "channel side side"]:
        """The maps over the whole picture as a square table, bilinear between cells; 0 where no cell shows it.

        Values are densities, so that grids of different cells add up: a map that sums to one does so here too, but for what
        lies outside the picture.
        """
        return torch.stack([_sampled(part, area, self.size, side) for part, area in self.parts]).sum(0)


def _sampled(part: Float[Tensor, "channel row column"], area: Area, size: tuple[int, int], side: int) -> Tensor:
    left, top, right, bottom = area
    width, height = size
    middle = (torch.arange(side) + 0.5) / side
    across, down = (middle * width - left) / (right - left), (middle * height - top) / (bottom - top)
    places = torch.stack(torch.meshgrid(across, down, indexing="xy"), -1)
    values = grid_sample(part[None].float(), 2 * places[None] - 1, padding_mode="border", align_corners=False)[0]
    inside = ((places >= 0) & (places <= 1)).all(-1)
    density = part[0].numel() / ((right - left) * (bottom - top)) * width * height / side**2
    return values * inside * density


def find_targets(subject: Subject, example: Example, token_map: TokenMap) -> tuple[list[Target], list[str]]:
    """What the question speaks of, and the labels of regions that it does not name.

    Regions that the same words speak of are one target (`how many things are red ?`). Raises DataError where the example has no picture or region, and
    TokenError where the family's positions have no known place in the picture.
    """
    if not example.images:
        raise DataError(f"example {example.id!r} shows no picture")
    space = token_map.crossed or token_map
    if space.placeless or not any(grid.kind == "image" for grid in space.grids):
        reason = space.placeless or "its picture has no grid"
        raise TokenError(f"this model's image positions have no known place in the picture: {reason}")
    if not example.regions:
        raise DataError(f"example {example.id!r} has no region to find")
    found: dict[tuple[int, tuple[int, ...]], tuple[str, list[Box]]] = {}
    unnamed = []
    for region in example.regions:
        phrase, positions = positions_of(subject, example, token_map, region.label)
        if not positions:
            unnamed.append(region.label)
            continue
        width, height = space.sizes[region.picture]
        left, top, right, bottom = region.box
        box = (left / width, top / height, right / width, bottom / height)
        if not 0 < box_mask([box], SMALLEST).sum() < SMALLEST**2:
            raise DataError(f"region {region.label!r} of example {example.id!r} lies outside its picture, or fills all of it")
        found.setdefault((region.picture, positions), (phrase, []))[1].append(box)
    return [Target(phrase, at, picture, tuple(boxes)) for (picture, at), (phrase, boxes) in found.items()], unnamed


def read_maps(
    subject: Subject, encoded: Encoded, targets: Sequence[Sequence[Target]], merge: str = "mean"
) -> tuple[list[list[dict[str, PictureMaps]]], list[int]]:
    """For each example and each of its targets, raw attention maps by source, and the layers whose heads are the channels.

    The rows of a phrase's tokens are merged by `mean`, or by `max` (F-LMM's two ways); a target without positions has the
    last position's maps alone. Attention is not normalised over the picture. In cross-attention families the maps are those of the layers that read the picture.
    """
    if merge not in MERGES:
        raise StudyError(f"tokens of a phrase are not merged by {merge!r}{did_you_mean(merge, MERGES)}")
    maps = [
        token_map.with_groups(asked=[token_map.last, *(place for target in own for place in target.positions)])
        for token_map, own in zip(encoded.maps, targets, strict=True)
    ]
    crossed = maps[0].crossed is not None
    traced = trace(subject, encoded.with_maps(maps), [Rows("asked", cross=crossed)])
    rows, places = traced["rows"], traced["row_positions"].tensor
    made = []
    for i, (token_map, own) in enumerate(zip(maps, targets, strict=True)):
        at = {int(place): row for row, place in enumerate(places[i].tolist()) if place >= 0}
        each = []
        for target in own:
            found = {"last": rows.tensor[:, i, :, at[token_map.last]]}
            if target.positions:
                word = rows.tensor[:, i][:, :, [at[place] for place in target.positions]]
                found["word"] = word.mean(2) if merge == "mean" else word.amax(2)
            each.append({source: _laid(row, token_map, target.picture) for source, row in found.items()})
        made.append(each)
    return made, list(rows.labels["layer"])


def _laid(row: Float[Tensor, "layer head key"], token_map: TokenMap, picture: int) -> PictureMaps:
    """A row's weights on one picture's positions, as maps."""
    space = token_map.crossed or token_map
    grids = [grid for grid in space.grids if grid.kind == "image" and grid.picture == picture]
    flat = row.flatten(0, 1)
    return PictureMaps(
        tuple((flat[:, torch.from_numpy(grid.positions[0])], grid.area) for grid in grids), space.sizes[picture]
    )  # fmt: skip
