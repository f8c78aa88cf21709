"""What every geometry comes down to: tables of offsets into a medium's run of positions, and what each shows."""

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from probe.errors import TokenError

Area = tuple[float, float, float, float]  # left, top, right, bottom in pixels of the original
Span = tuple[float, float]  # start and stop in seconds
Size = tuple[int, int]  # height, width


@dataclass(frozen=True)
class PatchGrid:
    """Offsets into one run as (frame, row, column), the area of the original that they show, and the time of each frame."""

    offsets: np.ndarray
    area: Area
    role: Literal["picture", "thumbnail", "tile", "frames", "sound"] = "picture"
    times: tuple[Span, ...] = ()


@dataclass(frozen=True)
class Crossed:
    """What a picture that never enters the sequence takes among the keys of cross-attention."""

    length: int
    grids: tuple[PatchGrid, ...]
    separators: tuple[int, ...] = ()  # class tokens
    padding: tuple[int, ...] = ()  # tiles that the picture does not fill


@dataclass(frozen=True)
class Layout:
    """One medium's run: its length, its grids, and the offsets that show no part of it (newlines, class tokens).

    `placeless` says why positions have no place in the picture, where they have none; `crossed` is what the medium takes
    in the key space of cross-attention layers.
    """

    length: int
    grids: tuple[PatchGrid, ...]
    separators: tuple[int, ...] = ()
    placeless: str = ""
    crossed: Crossed | None = None


def whole(size: Size) -> Area:
    """The area of a picture that is resized as a whole."""
    return (0.0, 0.0, float(size[1]), float(size[0]))


def row_major(rows: int, columns: int, start: int = 0, frames: int = 1) -> np.ndarray:
    """Offsets (frame row column) of a run that lists its cells row by row."""
    return start + np.arange(frames * rows * columns).reshape(frames, rows, columns)


def tiled(rows: int, columns: int, tile_rows: int, tile_columns: int, start: int = 0) -> np.ndarray:
    """Offsets (1 row column) of one big grid cut into tiles: tile by tile, row by row within each."""
    table = row_major(1, rows * columns * tile_rows * tile_columns, start).reshape(rows, columns, tile_rows, tile_columns)
    return table.transpose(0, 2, 1, 3).reshape(1, rows * tile_rows, columns * tile_columns)


def has_cls(config: Any) -> bool:
    return "clip" in str(config.vision_config.model_type)


def resized_and_cropped(size: Size, seen: Size, image_processor: Any) -> Area:
    """The part of the original that a resize and a centre crop leave, `seen` being the height and width that remain."""
    height, width = size
    wanted = image_processor.size
    if getattr(image_processor, "do_pad", False) or not (wanted.get("shortest_edge") or wanted.get("height")):
        raise TokenError(
            f"{type(image_processor).__name__} pads or resizes in a way that this geometry does not follow: pass "
            'load(..., row=Row("LLaVA")) to go without boxes'
        )
    if not image_processor.do_resize:
        scale_h = scale_w = 1.0
        resized = (height, width)
    elif wanted.get("shortest_edge"):
        edge = int(wanted["shortest_edge"])
        short, long = min(size), max(size)
        other = int(edge * long / short)
        resized = (edge, other) if height <= width else (other, edge)
    else:
        resized = (int(wanted["height"]), int(wanted["width"]))
    scale_h, scale_w = resized[0] / height, resized[1] / width
    if not getattr(image_processor, "do_center_crop", False):
        return (0.0, 0.0, seen[1] / scale_w, seen[0] / scale_h)
    crop = image_processor.crop_size
    top, left = (resized[0] - int(crop["height"])) // 2, (resized[1] - int(crop["width"])) // 2
    return (left / scale_w, top / scale_h, (left + seen[1]) / scale_w, (top + seen[0]) / scale_h)
