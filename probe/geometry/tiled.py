"""Pictures that are several tiles: with a thumbnail first or last, un-padded, or kept out of the sequence."""

import math
import sys
from collections.abc import Mapping
from typing import Any

import numpy as np
from transformers.image_processing_utils import select_best_resolution

from probe.errors import TokenError
from probe.geometry.layout import Area, Crossed, Layout, PatchGrid, Size, has_cls, row_major, tiled, whole


def anyres(size: Size, index: int, inputs: Mapping[str, Any], processor: Any, config: Any) -> Layout:
    """LLaVA-NeXT and OneVision: a thumbnail first, then the un-padded high-resolution grid with a newline after each row."""
    side = int(config.vision_config.image_size)
    per_tile = side // int(config.vision_config.patch_size)
    extra = 1 if config.vision_feature_select_strategy == "full" and has_cls(config) else 0
    height, width = size
    base = row_major(per_tile, per_tile, extra)
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
    thumbnail = PatchGrid(base, whole(size), "thumbnail")
    detail = PatchGrid(table[None, :, :columns], area, "tile")
    separators = (*range(extra), *(int(n) for n in table[:, columns]))
    return Layout(start + table.size, (thumbnail, detail), separators)


def thumbnail_last(size: Size, index: int, inputs: Mapping[str, Any], processor: Any, config: Any) -> Layout:
    """InternVL: resized to a canvas of square tiles, which follow row by row; a thumbnail comes last where there are several."""
    pictures = processor.image_processor
    side = int(pictures.size["height"])
    cells = round(side / _first(config.vision_config.patch_size) * float(config.downsample_ratio))
    columns = rows = 1
    asked = {name: getattr(pictures, name) for name in ("crop_to_patches", "min_patches", "max_patches")}
    asked |= {name: value for name, value in processor_defaults(processor).items() if name in asked}
    if asked["crop_to_patches"] and asked["max_patches"] > 1:
        canvas = _of_its_module(pictures, "get_optimal_tiled_canvas")
        columns, rows = canvas(size, (side, side), asked["min_patches"], asked["max_patches"])
    return _tiles_then_thumbnail(size, int(rows), int(columns), cells)


def named_tiles(size: Size, index: int, inputs: Mapping[str, Any], processor: Any, config: Any) -> Layout:
    """Idefics3 and SmolVLM: tiles with a token that names row and column before each, the whole picture last."""
    vision = config.vision_config
    cells = int(vision.image_size) // int(vision.patch_size) // int(config.scale_factor)
    _, rows, columns = processor.image_processor.get_number_of_image_patches(*size)
    return _tiles_then_thumbnail(size, max(1, int(rows)), max(1, int(columns)), cells)


def crossed(size: Size, index: int, inputs: Mapping[str, Any], processor: Any, config: Any) -> Layout:
    """Mllama: one mark in the sequence; tiles of (class token, patches) are the keys of cross-attention layers.

    The picture is resized to fit a canvas of tiles and padded on the right and below.
    """
    pictures, vision = processor.image_processor, config.vision_config
    side, most = int(pictures.size["height"]), int(vision.max_num_tiles)
    canvas_h, canvas_w = (int(n) for n in _of_its_module(pictures, "get_optimal_tiled_canvas")(*size, most, side))
    new_h, new_w = _of_its_module(pictures, "get_image_size_fit_to_canvas")(*size, canvas_h, canvas_w, side)
    rows, columns, cells = canvas_h // side, canvas_w // side, side // int(vision.patch_size)
    per_tile = cells * cells + 1
    tile, inside = np.divmod(tiled(rows, columns, cells, cells), cells * cells)
    area = (0.0, 0.0, canvas_w * size[1] / int(new_w), canvas_h * size[0] / int(new_h))
    keys = Crossed(
        most * per_tile,
        (PatchGrid(tile * per_tile + 1 + inside, area, "tile"),),
        tuple(number * per_tile for number in range(rows * columns)),
        tuple(range(rows * columns * per_tile, most * per_tile)),
    )
    return Layout(1, (), (0,), crossed=keys)


def _tiles_then_thumbnail(size: Size, rows: int, columns: int, cells: int) -> Layout:
    if rows * columns == 1:
        return Layout(cells**2, (PatchGrid(row_major(cells, cells), whole(size)),))
    count = rows * columns * cells**2
    detail = PatchGrid(tiled(rows, columns, cells, cells), whole(size), "tile")
    thumbnail = PatchGrid(row_major(cells, cells, count), whole(size), "thumbnail")
    return Layout(count + cells**2, (thumbnail, detail))


def processor_defaults(processor: Any) -> dict[str, Any]:
    """What a processor's class tells its picture processor by default, over that one's own settings."""
    return dict(getattr(processor, "images_kwargs", None) or {})


def _of_its_module(image_processor: Any, name: str) -> Any:
    """A function of the module that a picture processor comes from: Pillow's and torchvision's versions each have their own."""
    return getattr(sys.modules[type(image_processor).__module__], name)


def _first(value: Any) -> int:
    return int(value[0] if isinstance(value, list | tuple) else value)


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
