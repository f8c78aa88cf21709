"""Which position of a picture's run shows which part of the original picture.

Each family's processor resizes, crops, pads and tiles in its own way. All of them come down to the same data: a `Patch
grid` is a table of offsets into the picture's run of placeholder positions, and the rectangle of the original picture
that the table covers (it may reach beyond the picture where the processor padded). Sizes are read from the processor's
output, never assumed.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from transformers.image_processing_utils import select_best_resolution

from probe.errors import TokenError

Area = tuple[float, float, float, float]


@dataclass(frozen=True)
class PatchGrid:
    """Offsets into one picture's run, as (frame, row, column), and the area of the original that they show (pixels)."""

    offsets: np.ndarray
    area: Area
    role: Literal["picture", "thumbnail", "tile"] = "picture"


@dataclass(frozen=True)
class Layout:
    """One picture's run: its length, its grids, and the offsets that show no part of the picture (newlines, breaks)."""

    length: int
    grids: tuple[PatchGrid, ...]
    separators: tuple[int, ...] = ()


Size = tuple[int, int]  # height, width


def plain(size: Size, index: int, inputs: Mapping[str, Any], processor: Any, config: Any) -> Layout:
    """LLaVA: resize, centre crop, one row-major grid of patches; a CLS token comes first when the strategy is `full`."""
    height, width = (int(n) for n in inputs["pixel_values"].shape[-2:])
    patch = int(config.vision_config.patch_size)
    rows, columns = height // patch, width // patch
    extra = 1 if getattr(config, "vision_feature_select_strategy", "default") == "full" and _has_cls(config) else 0
    offsets = extra + np.arange(rows * columns).reshape(1, rows, columns)
    area = _resized_and_cropped(size, (rows * patch, columns * patch), processor.image_processor)
    return Layout(extra + rows * columns, (PatchGrid(offsets, area),), tuple(range(extra)))


def anyres(size: Size, index: int, inputs: Mapping[str, Any], processor: Any, config: Any) -> Layout:
    """LLaVA-NeXT and OneVision: a thumbnail first, then the un-padded high-resolution grid with a newline after each row."""
    side = int(config.vision_config.image_size)
    per_tile = side // int(config.vision_config.patch_size)
    extra = 1 if config.vision_feature_select_strategy == "full" and _has_cls(config) else 0
    height, width = size
    base = extra + np.arange(per_tile**2).reshape(1, per_tile, per_tile)
    counts = inputs.get("batch_num_images")
    if counts is not None and _pictures_of_its_prompt(counts, index) > 1:
        # OneVision gives each of several pictures one tile, padded to a square, and one newline.
        longest = max(size)
        left, top = (longest - width) // 2, (longest - height) // 2
        square = (-float(left), -float(top), float(longest - left), float(longest - top))
        return Layout(per_tile**2 + 1, (PatchGrid(base, square),), (per_tile**2,))
    canvas = select_best_resolution(size, config.image_grid_pinpoints)
    if canvas is None:
        raise TokenError("the model's configuration names no image_grid_pinpoints, and an any-resolution grid needs them")
    area, rows, columns = _unpadded(size, canvas, side, per_tile)
    if limit := _patch_limit(config):
        ratio = (rows * columns / (limit * per_tile**2)) ** 0.5
        if ratio > 1.1:
            rows, columns = int(rows // ratio), int(columns // ratio)
    start = extra + per_tile**2
    table = start + np.arange(rows * (columns + 1)).reshape(rows, columns + 1)
    thumbnail = PatchGrid(base, (0.0, 0.0, float(width), float(height)), "thumbnail")
    detail = PatchGrid(table[None, :, :columns], area, "tile")
    separators = (*range(extra), *(int(n) for n in table[:, columns]))
    return Layout(start + table.size, (thumbnail, detail), separators)


def merged(size: Size, index: int, inputs: Mapping[str, Any], processor: Any, config: Any) -> Layout:
    """Qwen-VL: the whole picture resized to a multiple of the merged patch, one row-major grid."""
    frames, rows, columns = (int(n) for n in inputs["image_grid_thw"][index])
    merge = int(config.vision_config.spatial_merge_size)
    rows, columns = rows // merge, columns // merge
    offsets = np.arange(frames * rows * columns).reshape(frames, rows, columns)
    return Layout(offsets.size, (PatchGrid(offsets, (0.0, 0.0, float(size[1]), float(size[0]))),))


GEOMETRIES = {"plain": plain, "anyres": anyres, "merged": merged}


def _has_cls(config: Any) -> bool:
    return "clip" in str(config.vision_config.model_type)


def _resized_and_cropped(size: Size, seen: Size, image_processor: Any) -> Area:
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


def _unpadded(size: Size, canvas: Size, side: int, per_tile: int) -> tuple[Area, int, int]:
    """The area, rows and columns of the high-resolution grid once the padding rows or columns are taken off."""
    height, width = size
    canvas_h, canvas_w = canvas
    rows, columns = canvas_h // side * per_tile, canvas_w // side * per_tile
    scale_h, scale_w = canvas_h / height, canvas_w / width
    if scale_w < scale_h:
        new_w, new_h = canvas_w, min(math.ceil(height * scale_w), canvas_h)
    else:
        new_h, new_w = canvas_h, min(math.ceil(width * scale_h), canvas_w)
    top, left = (canvas_h - new_h) // 2, (canvas_w - new_w) // 2
    drop_rows = drop_columns = 0
    if width / height > columns / rows:
        drop_rows = (rows - int(round(height * (columns / width), 7))) // 2
    else:
        drop_columns = (columns - int(round(width * (rows / height), 7))) // 2
    patch = side / per_tile
    kept = (drop_columns * patch, drop_rows * patch, (columns - drop_columns) * patch, (rows - drop_rows) * patch)
    area = (
        (kept[0] - left) * width / new_w, (kept[1] - top) * height / new_h,
        (kept[2] - left) * width / new_w, (kept[3] - top) * height / new_h,
    )  # fmt: skip
    return area, rows - 2 * drop_rows, columns - 2 * drop_columns


def _patch_limit(config: Any) -> int | None:
    aspect = str(getattr(config, "vision_aspect_ratio", "") or "")
    return int(aspect.removeprefix("anyres_max_")) if aspect.startswith("anyres_max_") else None


def _pictures_of_its_prompt(counts: Any, index: int) -> int:
    seen = 0
    for count in (int(n) for n in counts):
        seen += count
        if index < seen:
            return count
    raise TokenError(f"picture {index} belongs to no prompt of the batch")
