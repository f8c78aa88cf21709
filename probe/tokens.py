"""TokenMap: which position belongs to which segment, picture and grid cell.

Segments partition the positions of an encoded example. Everything that says "image tokens" asks the TokenMap.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import SupportsIndex

import numpy as np

from probe.errors import TokenError, did_you_mean
from probe.example import Region
from probe.geometry import Area, Span

SEGMENTS = (
    "pad", "bos", "system", "image", "video", "audio", "separator", "context", "question", "options", "suffix", "header",
    "answer",
)  # fmt: skip


@dataclass(frozen=True)
class Grid:
    """A (frame, row, column) table of positions, and the part of the original that it shows, in its pixels.

    `area` may reach beyond the picture where the processor padded it. `role` tells a thumbnail from the detailed grid.
    `kind` is the segment (image, video, audio) and `picture` the number of the medium within its kind. `times` are the
    seconds (start, stop) that each frame of a clip, or each position of a sound, covers.
    """

    picture: int
    positions: np.ndarray
    area: Area
    role: str = "picture"
    kind: str = "image"
    times: tuple[Span, ...] = ()

    @property
    def shape(self) -> tuple[int, int, int]:
        frames, rows, columns = self.positions.shape
        return frames, rows, columns

    def cell(self, row: int, column: int) -> Area:
        """The rectangle of the original picture that one cell shows."""
        left, top, right, bottom = self.area
        _, rows, columns = self.shape
        width, height = (right - left) / columns, (bottom - top) / rows
        return (left + column * width, top + row * height, left + (column + 1) * width, top + (row + 1) * height)

    def covering(self, box: Area) -> np.ndarray:
        """The (row, column) pairs of the cells that a box touches with more than a thousandth of a cell."""
        left, top, right, bottom = self.area
        _, rows, columns = self.shape
        width, height = (right - left) / columns, (bottom - top) / rows
        slack = 1e-3
        across = _touched((box[0] - left) / width, (box[2] - left) / width, columns, slack)
        down = _touched((box[1] - top) / height, (box[3] - top) / height, rows, slack)
        return np.array([(row, column) for row in down for column in across], dtype=np.int64).reshape(-1, 2)

    def during(self, start: float, stop: float) -> np.ndarray:
        """Positions of the frames (or slices of a sound) that overlap some seconds, sorted."""
        hit = [i for i, (first, last) in enumerate(self.times) if first < stop and last > start]
        return np.unique(self.positions[hit])


def _touched(start: float, stop: float, count: int, slack: float) -> range:
    first, last = max(0, int(np.floor(start + slack))), min(count, int(np.ceil(stop - slack)))
    return range(first, max(first, last))


@dataclass(frozen=True)
class TokenMap:
    """One example's positions: a segment for each, and the grids of its media. Padding is part of it.

    Where the picture is no part of the sequence (Mllama), `crossed` is the map of the keys that cross-attention layers
    read: its segments are `image`, `separator` (class tokens) and `pad` (tiles that no picture fills).
    """

    segments: tuple[str, ...]
    grids: tuple[Grid, ...] = ()
    pictures: tuple[np.ndarray, ...] = ()  # the run of each picture, separators within it included
    sizes: tuple[tuple[int, int], ...] = ()  # width and height of each original picture
    placeless: str = ""  # why image positions have no known place in the picture, if so
    videos: tuple[np.ndarray, ...] = ()
    sounds: tuple[np.ndarray, ...] = ()
    crossed: "TokenMap | None" = None
    spellings: tuple[str, ...] = field(default=(), repr=False)  # the token at each position, as text
    tokens: tuple[int, ...] = field(default=(), repr=False)
    groups: Mapping[str, tuple[int, ...]] = field(default_factory=dict)  # named position sets of one's own

    def __post_init__(self) -> None:
        unknown = set(self.segments) - set(SEGMENTS)
        if unknown:
            raise TokenError(f"unknown segments {sorted(unknown)}")

    def __len__(self) -> int:
        return len(self.segments)

    @property
    def geometry(self) -> bool:
        """Whether every picture's positions have a known place in it."""
        return not self.placeless

    @property
    def last(self) -> int:
        """The last input position: the row that predicts the first answer token."""
        real = np.nonzero(np.array(self.segments) != "pad")[0]
        return int(real[-1])

    @property
    def first(self) -> int:
        """The first position that is not padding."""
        return int(np.nonzero(np.array(self.segments) != "pad")[0][0])

    def positions(self, group: str | Iterable[SupportsIndex]) -> np.ndarray:
        """Sorted positions of a segment, of `last`, of `media` (every position that the run of a picture, video or sound
        takes, newlines and a CLS token included), of `text` (everything else that is real), of `real`, or of a group that `with_groups` named.

        Raises TokenError for a group that does not exist.
        """
        if not isinstance(group, str):
            chosen = np.unique(np.fromiter((int(position) for position in group), dtype=np.int64))
            if chosen.size and not (chosen[0] >= 0 and chosen[-1] < len(self)):
                raise TokenError(f"positions run from 0 to {len(self) - 1}, not {chosen[0]} to {chosen[-1]}")
            return chosen
        if group in self.groups:
            return np.array(self.groups[group], dtype=np.int64)
        names = np.array(self.segments)
        if group == "last":
            return np.array([self.last])
        if group == "media":
            return np.unique(np.concatenate([*self.pictures, *self.videos, *self.sounds, np.array([], dtype=np.int64)]))
        if group == "text":
            return np.setdiff1d(np.nonzero(names != "pad")[0], self.positions("media"))
        if group == "real":
            return np.nonzero(names != "pad")[0]
        if group in SEGMENTS:
            return np.nonzero(names == group)[0]
        known = (*SEGMENTS, "last", "media", "text", "real", *self.groups)
        raise TokenError(f"there is no token group {group!r}{did_you_mean(group, known)}")

    def crossed_positions(self, group: str | Iterable[SupportsIndex]) -> np.ndarray:
        """The keys of cross-attention layers that belong to a group; a group of the sequence's positions has none there.

        Raises TokenError where the example has no picture for such layers to read.
        """
        if self.crossed is None:
            raise TokenError("this example has no picture for the model's cross-attention layers to read")
        named = ("media", "image", "separator", "pad", *self.crossed.groups)
        return self.crossed.positions(group) if isinstance(group, str) and group in named else np.array([], dtype=np.int64)

    def reach(self, group: str | Iterable[SupportsIndex]) -> int:
        """How many keys a group has: its positions in the sequence, and its keys in cross-attention layers."""
        return len(self.positions(group)) + (len(self.crossed_positions(group)) if self.crossed else 0)

    def with_groups(self, **groups: Iterable[SupportsIndex]) -> "TokenMap":
        """The same map with more named groups of positions; edits and recorders can then speak of them.

        Positions are those of the sequence; `crossed.with_groups` names keys of cross-attention layers.
        """
        made = {name: tuple(int(p) for p in self.positions(list(positions))) for name, positions in groups.items()}
        return replace(self, groups={**self.groups, **made})

    def in_boxes(self, regions: Sequence[Region]) -> np.ndarray:
        """Positions of every grid cell that touches one of the boxes, thumbnails included, sorted.

        Raises TokenError when the family's positions have no known place in the picture.
        """
        if regions and self.placeless:
            raise TokenError(f"this model's image positions have no known place in the picture: {self.placeless}")
        found: list[int] = []
        for region in regions:
            for grid in (g for g in self.grids if g.kind == "image" and g.picture == region.picture):
                cells = grid.covering(region.box)
                found += grid.positions[:, cells[:, 0], cells[:, 1]].ravel().tolist()
        return np.unique(np.array(found, dtype=np.int64))

    def spans(self) -> list[tuple[str, int, int]]:
        """Runs of one segment, as (segment, start, stop)."""
        runs: list[tuple[str, int, int]] = []
        for position, segment in enumerate(self.segments):
            if runs and runs[-1][0] == segment:
                runs[-1] = (segment, runs[-1][1], position + 1)
            else:
                runs.append((segment, position, position + 1))
        return runs

    def spread(self, places: np.ndarray, length: int) -> "TokenMap":
        """The same map inside a padded row of `length` positions, its positions at `places`."""
        segments, spellings, tokens = ["pad"] * length, [""] * length, [-1] * length
        for at, place in enumerate(places.tolist()):
            segments[place] = self.segments[at]
            spellings[place] = self.spellings[at] if self.spellings else ""
            tokens[place] = self.tokens[at] if self.tokens else -1
        return replace(
            self,
            segments=tuple(segments),
            grids=tuple(replace(grid, positions=places[grid.positions]) for grid in self.grids),
            pictures=tuple(places[run] for run in self.pictures),
            videos=tuple(places[run] for run in self.videos),
            sounds=tuple(places[run] for run in self.sounds),
            spellings=tuple(spellings),
            tokens=tuple(tokens),
            groups={name: tuple(places[list(positions)].tolist()) for name, positions in self.groups.items()},
        )
