"""Pictures that are one grid: resized (and cropped), then cut into patches, perhaps merged or pooled."""

from collections.abc import Mapping
from typing import Any

from probe.errors import TokenError
from probe.geometry.layout import Layout, PatchGrid, Size, has_cls, resized_and_cropped, row_major, whole


def plain(size: Size, index: int, inputs: Mapping[str, Any], processor: Any, config: Any) -> Layout:
    """LLaVA: resize, centre crop, one row-major grid of patches; a CLS token comes first when the strategy is `full`."""
    height, width = (int(n) for n in inputs["pixel_values" if "pixel_values" in inputs else "pixel_values_images"].shape[-2:])
    patch = int(config.vision_config.patch_size)
    rows, columns = height // patch, width // patch
    extra = 1 if getattr(config, "vision_feature_select_strategy", "default") == "full" and has_cls(config) else 0
    offsets = row_major(rows, columns, extra)
    area = resized_and_cropped(size, (rows * patch, columns * patch), processor.image_processor)
    return Layout(extra + rows * columns, (PatchGrid(offsets, area),), tuple(range(extra)))


def merged(size: Size, index: int, inputs: Mapping[str, Any], processor: Any, config: Any) -> Layout:
    """Qwen-VL: the whole picture resized to a multiple of the merged patch, one row-major grid."""
    frames, rows, columns = (int(n) for n in inputs["image_grid_thw"][index])
    merge = int(config.vision_config.spatial_merge_size)
    rows, columns = rows // merge, columns // merge
    offsets = row_major(rows, columns, frames=frames)
    return Layout(offsets.size, (PatchGrid(offsets, whole(size)),))


def ragged(size: Size, index: int, inputs: Mapping[str, Any], processor: Any, config: Any) -> Layout:
    """Pixtral's tower (LLaVA with it, Mistral 3): resized keeping its shape; a break token of its own id ends each row."""
    height, width = (int(n) for n in inputs["image_sizes"][index])
    patch = int(config.vision_config.patch_size) * int(getattr(config, "spatial_merge_size", 1))
    rows, columns = height // patch, width // patch
    return Layout(rows * columns, (PatchGrid(row_major(rows, columns), whole(size)),))


def pooled(size: Size, index: int, inputs: Mapping[str, Any], processor: Any, config: Any) -> Layout:
    """Gemma 3: the whole picture resized to a square, its patches averaged to `mm_tokens_per_image` positions."""
    if getattr(processor.image_processor, "do_pan_and_scan", False):
        raise TokenError("pan-and-scan crops have no geometry here: switch do_pan_and_scan off in the picture processor")
    side = round(float(config.mm_tokens_per_image) ** 0.5)
    return Layout(side * side, (PatchGrid(row_major(side, side), whole(size)),))


def listed(size: Size, index: int, inputs: Mapping[str, Any], processor: Any, config: Any) -> Layout:
    """Gemma 4: resized keeping its shape; the processor lists each patch's column and row, pooled k by k."""
    places = inputs["image_position_ids"][index]
    pool = int(config.vision_config.pooling_kernel_size)
    columns, rows = ((int(places[:, axis].max()) + 1) // pool for axis in range(2))
    return Layout(rows * columns, (PatchGrid(row_major(rows, columns), whole(size)),))


def resampled(size: Size, index: int, inputs: Mapping[str, Any], processor: Any, config: Any) -> Layout:
    """BLIP-2 and InstructBLIP: a fixed number of Q-Former queries, each of which may look at the whole picture."""
    return Layout(int(config.num_query_tokens), (), placeless="a Q-Former's queries each read the whole picture")
