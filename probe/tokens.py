"""TokenMap: which position belongs to which segment, picture and grid cell.

Segments partition the positions of an encoded example. Everything that says "image tokens" asks the TokenMap.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import SupportsIndex

import numpy as np

from probe.errors import TokenError, did_you_mean
from probe.example import Region
from probe.geometry import Area, Layout

SEGMENTS = (
    "pad", "bos", "system", "image", "video", "audio", "separator", "context", "question", "options", "suffix", "header",
    "answer",
)  # fmt: skip


@dataclass(frozen=True)
class Grid:
    """A (frame, row, column) table of positions, and the part of the original picture that it shows, in its pixels.

    `area` may reach beyond the picture where the processor padded it. `role` tells a thumbnail from the detailed grid.
    """

    picture: int
    positions: np.ndarray
    area: Area
    role: str = "picture"

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


def _touched(start: float, stop: float, count: int, slack: float) -> range:
    first, last = max(0, int(np.floor(start + slack))), min(count, int(np.ceil(stop - slack)))
    return range(first, max(first, last))


@dataclass(frozen=True)
class TokenMap:
    """One example's positions: a segment for each, and the grids of its pictures. Padding is part of it."""

    segments: tuple[str, ...]
    grids: tuple[Grid, ...] = ()
    pictures: tuple[np.ndarray, ...] = ()  # the run of each picture, separators within it included
    sizes: tuple[tuple[int, int], ...] = ()  # width and height of each original picture
    geometry: bool = True
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
    def last(self) -> int:
        """The last input position: the row that predicts the first answer token."""
        real = np.nonzero(np.array(self.segments) != "pad")[0]
        return int(real[-1])

    @property
    def first(self) -> int:
        """The first position that is not padding."""
        return int(np.nonzero(np.array(self.segments) != "pad")[0][0])

    def positions(self, group: str | Iterable[SupportsIndex]) -> np.ndarray:
        """Sorted positions of a segment, of `last`, of `media` (every position that a picture's run takes, newlines and a
        CLS token included), of `text` (everything else that is real), of `real`, or of a group that `with_groups` named.

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
            return np.unique(np.concatenate([*self.pictures, np.array([], dtype=np.int64)]))
        if group == "text":
            return np.setdiff1d(np.nonzero(names != "pad")[0], self.positions("media"))
        if group == "real":
            return np.nonzero(names != "pad")[0]
        if group in SEGMENTS:
            return np.nonzero(names == group)[0]
        known = (*SEGMENTS, "last", "media", "text", "real", *self.groups)
        raise TokenError(f"there is no token group {group!r}{did_you_mean(group, known)}")

    def with_groups(self, **groups: Iterable[SupportsIndex]) -> "TokenMap":
        """The same map with more named groups of positions; edits and recorders can then speak of them."""
        made = {name: tuple(int(p) for p in self.positions(list(positions))) for name, positions in groups.items()}
        return replace(self, groups={**self.groups, **made})

    def in_boxes(self, regions: Sequence[Region]) -> np.ndarray:
        """Positions of every grid cell that touches one of the boxes, thumbnails included, sorted.

        Raises TokenError when the family's positions have no known place in the picture.
        """
        if regions and not self.geometry:
            raise TokenError(
                "this model's image positions have no known place in the picture: add its geometry to probe/anatomy/rows.py"
            )
        found: list[int] = []
        for region in regions:
            for grid in (grid for grid in self.grids if grid.picture == region.picture):
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

    def shifted(self, left: int, right: int) -> "TokenMap":
        """The same map inside a padded row."""
        pad = ("pad",)
        return TokenMap(
            segments=pad * left + self.segments + pad * right,
            grids=tuple(Grid(g.picture, g.positions + left, g.area, g.role) for g in self.grids),
            pictures=tuple(run + left for run in self.pictures),
            sizes=self.sizes,
            geometry=self.geometry,
            spellings=("",) * left + self.spellings + ("",) * right,
            tokens=(-1,) * left + self.tokens + (-1,) * right,
            groups={name: tuple(p + left for p in positions) for name, positions in self.groups.items()},
        )


@dataclass(frozen=True)
class Rendered:
    """A prompt as the chat template wrote it, and which characters of it are what."""

    text: str
    spans: tuple[tuple[str, int, int], ...]  # (segment, start, stop) in characters; what is in no span is a separator


def build_map(
    tokens: Sequence[int],
    spellings: Sequence[str],
    rendered: Rendered,
    unexpanded: Sequence[int],
    offsets: Sequence[tuple[int, int]],
    placeholder: int | None,
    bos: int | None,
    layouts: Sequence[Layout] | None,
    sizes: Sequence[tuple[int, int]],
) -> TokenMap:
    """The map of one unpadded example.

    `tokens` are the processed ids; `unexpanded` and `offsets` the ids and character spans of the text before each
    placeholder grew into its run. `layouts` is None where the family's geometry is unknown.
    """
    segments = ["separator"] * len(tokens)
    aligned = _align(tokens, unexpanded, placeholder)
    for index, (start, stop) in enumerate(offsets):
        if index in aligned:
            segments[aligned[index]] = _segment_of(rendered, start, stop)
    if bos is not None and tokens[0] == bos:
        segments[0] = "bos"
    run = np.array([i for i, token in enumerate(tokens) if token == placeholder], dtype=np.int64)
    pictures, grids = _pictures(run, layouts, len(sizes))
    for position in run:
        segments[position] = "image"
    for picture, layout in zip(pictures, layouts or (), strict=False):
        for offset in layout.separators:
            segments[picture[offset]] = "separator"
    return TokenMap(
        tuple(segments), tuple(grids), tuple(pictures), tuple(sizes), layouts is not None, tuple(spellings), tuple(tokens)
    )


def _segment_of(rendered: Rendered, start: int, stop: int) -> str:
    """The segment that holds most of the characters start to stop; a token that straddles two belongs to the larger part."""
    best, most = "separator", 0
    for name, first, last in rendered.spans:
        shared = min(stop, last) - max(start, first)
        if shared > most:
            best, most = name, shared
    return best


def _align(tokens: Sequence[int], unexpanded: Sequence[int], placeholder: int | None) -> dict[int, int]:
    """For each unexpanded token that is no placeholder, its position among the processed ones."""
    chunks: list[list[int]] = [[]]
    for index, token in enumerate(unexpanded):
        if token == placeholder:
            chunks.append([])
        else:
            chunks[-1].append(index)
    aligned: dict[int, int] = {}
    end = len(tokens)
    for number, chunk in reversed(list(enumerate(chunks))):
        start = 0 if number == 0 else end - len(chunk)
        if number == 0 and len(chunks) == 1:
            start = 0
        while start >= 0 and [tokens[start + i] for i in range(len(chunk))] != [unexpanded[i] for i in chunk]:
            start -= 1
        if start < 0:
            raise TokenError("the processor's tokens do not contain the prompt's own: its placeholders could not be followed")
        aligned.update({index: start + i for i, index in enumerate(chunk)})
        end = start
        while number and end and tokens[end - 1] == placeholder:
            end -= 1
    return aligned


def _pictures(run: np.ndarray, layouts: Sequence[Layout] | None, count: int) -> tuple[list[np.ndarray], list[Grid]]:
    """Deals the placeholder positions out to the pictures, in order."""
    if layouts is None:
        return _split_evenly(run, count), []
    expected = sum(layout.length for layout in layouts)
    if expected != len(run):
        raise TokenError(
            f"the pictures should take {expected} positions by their geometry but the processor made {len(run)}: "
            f"the family's row in probe/anatomy/rows.py names the wrong geometry"
        )
    pictures, grids, start = [], [], 0
    for index, layout in enumerate(layouts):
        own = run[start : start + layout.length]
        start += layout.length
        pictures.append(own)
        grids += [Grid(index, own[grid.offsets], grid.area, grid.role) for grid in layout.grids]
    return pictures, grids


def _split_evenly(run: np.ndarray, count: int) -> list[np.ndarray]:
    if count == 0:
        return []
    pieces = np.split(run, np.nonzero(np.diff(run) != 1)[0] + 1)
    if len(pieces) != count:
        if len(run) % count:
            raise TokenError(f"{len(run)} image positions cannot be dealt out to {count} pictures without a known geometry")
        pieces = np.split(run, count)
    return list(pieces)
