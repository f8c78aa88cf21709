"""How a TokenMap is made: the processed ids laid over the prompt, and runs of placeholders dealt out to their media."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from probe.errors import TokenError
from probe.geometry import Layout, PatchGrid
from probe.tokens import Grid, TokenMap


@dataclass(frozen=True)
class Rendered:
    """A prompt as the chat template wrote it, and which characters of it are what."""

    text: str
    spans: tuple[tuple[str, int, int], ...]  # (segment, start, stop) in characters; what is in no span is a separator


@dataclass(frozen=True)
class Medium:
    """One picture, video or sound of an example: the id that fills its run, and its layout where the geometry is known."""

    kind: str
    token: int | None
    layout: Layout | None
    size: tuple[int, int] = (0, 0)  # width and height of the original


NO_ROW = "add its geometry to probe/anatomy/rows.py"


def build_map(
    tokens: Sequence[int],
    spellings: Sequence[str],
    rendered: Rendered,
    unexpanded: Sequence[int],
    offsets: Sequence[tuple[int, int]],
    marks: frozenset[int],
    bos: int | None,
    media: Sequence[Medium],
) -> TokenMap:
    """The map of one unpadded example.

    `tokens` are the processed ids; `unexpanded` and `offsets` the ids and character spans of the text in which each
    medium is still one of the `marks`. Raises TokenError where the two cannot be laid over each other.
    """
    runs = _deal(np.array(tokens), media)
    order = sorted(range(len(media)), key=lambda i: int(runs[i][0]))
    segments = ["separator"] * len(tokens)
    aligned = _align(tokens, unexpanded, marks, [runs[i] for i in order])
    for index, (start, stop) in enumerate(offsets):
        if index in aligned:
            segments[aligned[index]] = segment_of(rendered, start, stop)
    if "question" in {name for name, _, _ in rendered.spans} - set(segments):
        raise TokenError("the processor's tokens do not contain the prompt's own: its placeholders could not be followed")
    first_bos = next((i for i, token in enumerate(tokens) if token == bos), None)  # after the picture in PaliGemma
    if first_bos is not None:
        segments[first_bos] = "bos"
    numbers = _numbers(media)
    for medium, run in zip(media, runs, strict=True):
        for position in range(int(run[0]), int(run[-1]) + 1):
            segments[position] = "separator"
        for offset, position in enumerate(run):
            segments[position] = "separator" if medium.layout and offset in medium.layout.separators else medium.kind
    whole = [np.arange(run[0], run[-1] + 1) for run in runs]
    of = {kind: tuple(r for m, r in zip(media, whole, strict=True) if m.kind == kind) for kind in ("image", "video", "audio")}
    grids = [
        _grid(grid, run, number, medium.kind) for medium, run, number in zip(media, runs, numbers, strict=True)
        for grid in (medium.layout.grids if medium.layout else ())
    ]  # fmt: skip
    pictures = [medium for medium in media if medium.kind == "image"]
    reasons = [m.layout.placeless if m.layout else NO_ROW for m in pictures]
    return TokenMap(
        tuple(segments), tuple(grids), of["image"], tuple(m.size for m in pictures), next(filter(None, reasons), ""),
        of["video"], of["audio"], _crossed(pictures), tuple(spellings), tuple(tokens),
    )  # fmt: skip


def _grid(grid: PatchGrid, run: np.ndarray, number: int, kind: str) -> Grid:
    return Grid(number, run[grid.offsets], grid.area, grid.role, kind, grid.times)


def _numbers(media: Sequence[Medium]) -> list[int]:
    """The number of each medium among those of its kind."""
    return [sum(other.kind == medium.kind for other in media[:i]) for i, medium in enumerate(media)]


def _crossed(pictures: Sequence[Medium]) -> TokenMap | None:
    """The map of the keys of cross-attention layers, picture after picture."""
    keys = [medium.layout.crossed for medium in pictures if medium.layout and medium.layout.crossed]
    if not keys:
        return None
    segments: list[str] = []
    grids, runs = [], []
    for number, part in enumerate(keys):
        start = len(segments)
        own = ["image"] * part.length
        for offset in part.separators:
            own[offset] = "separator"
        for offset in part.padding:
            own[offset] = "pad"
        segments += own
        run = start + np.arange(part.length)
        runs.append(np.setdiff1d(run, start + np.array(part.padding, dtype=np.int64)))
        grids += [_grid(grid, run, number, "image") for grid in part.grids]
    return TokenMap(tuple(segments), tuple(grids), tuple(runs), tuple(medium.size for medium in pictures))


def segment_of(rendered: Rendered, start: int, stop: int) -> str:
    """The segment that holds most of the characters start to stop; a token that straddles two belongs to the larger part."""
    best, most = "separator", 0
    for name, first, last in rendered.spans:
        shared = min(stop, last) - max(start, first)
        if shared > most:
            best, most = name, shared
    return best


def _align(
    tokens: Sequence[int], unexpanded: Sequence[int], marks: frozenset[int], runs: Sequence[np.ndarray]
) -> dict[int, int]:
    """For each unexpanded token that is no mark, its position among the processed ones.

    What a processor writes around a picture lies between the text and the run: the text before the first run is looked
    for from the front, all other text from the back.
    """
    chunks: list[list[int]] = [[]]
    for index, token in enumerate(unexpanded):
        if token in marks:
            chunks.append([])
        else:
            chunks[-1].append(index)
    if len(chunks) == 1 and runs:  # the processor puts the pictures first by itself
        chunks = [[] for _ in runs] + chunks
    if len(chunks) != len(runs) + 1:
        raise TokenError(f"the prompt has {len(chunks) - 1} places for media and the processor filled {len(runs)}")
    aligned: dict[int, int] = {}
    for number, chunk in enumerate(chunks):
        start = int(runs[number - 1][-1]) + 1 if number else 0
        stop = int(runs[number][0]) if number < len(runs) else len(tokens)
        at, skip, shared = _overlay(list(tokens[start:stop]), [unexpanded[i] for i in chunk], number == 0)
        aligned.update({chunk[skip + i]: start + at + i for i in range(shared)})
    return aligned


def _overlay(window: list[int], wanted: list[int], from_front: bool) -> tuple[int, int, int]:
    """Where a chunk lies in a window of the processed ids: (first position, first of the chunk, how many).

    As a whole if it is there, else as much of it as the window's front (or back) shares.
    """
    last = len(window) - len(wanted)
    places = range(last + 1) if from_front else range(last, -1, -1)
    found = next((i for i in places if window[i : i + len(wanted)] == wanted), None)
    if found is not None:
        return found, 0, len(wanted)
    if from_front:
        return 0, 0, _common(window, wanted)
    shared = _common(window[::-1], wanted[::-1])
    return len(window) - shared, len(wanted) - shared, shared


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """How many first entries two sequences share."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _deal(tokens: np.ndarray, media: Sequence[Medium]) -> list[np.ndarray]:
    """Deals the placeholder positions of each kind out to its media, in order."""
    runs: dict[int, np.ndarray] = {}
    for kind in dict.fromkeys(medium.kind for medium in media):
        own = [i for i, medium in enumerate(media) if medium.kind == kind]
        run = np.nonzero(tokens == media[own[0]].token)[0]
        lengths = [layout.length for i in own if (layout := media[i].layout) is not None]
        if len(lengths) < len(own):
            lengths = _guessed_lengths(run, len(own), kind)
        if sum(lengths) != len(run):
            raise TokenError(
                f"the {kind} runs should take {sum(lengths)} positions by their geometry but the processor made {len(run)}: "
                f"the family's row in probe/anatomy/rows.py names the wrong geometry"
            )
        runs |= dict(zip(own, np.split(run, np.cumsum(lengths)[:-1]), strict=True))
    return [runs[i] for i in range(len(media))]


def _guessed_lengths(run: np.ndarray, count: int, kind: str) -> list[int]:
    """Without a geometry: one unbroken run for each medium, or equal shares."""
    if not len(run):
        raise TokenError(f"the processor made no {kind} positions for {count} {kind} media")
    pieces = np.split(run, np.nonzero(np.diff(run) != 1)[0] + 1)
    if len(pieces) == count:
        return [len(piece) for piece in pieces]
    if len(run) % count:
        raise TokenError(f"{len(run)} {kind} positions cannot be dealt out to {count} media without a known geometry")
    return [len(run) // count] * count
