"""Clips without torchvision: every frame goes through the family's picture path, and the run is laid out by hand.

transformers' video processors need torchvision and may resize a little differently from the picture processors; what is
done here is a policy of its own, the same whether torchvision is installed or not. A clip's grid is (frame, row, column),
each frame lasting until the next one begins.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from probe.errors import ExampleError
from probe.geometry.layout import Layout, PatchGrid, Span, row_major, whole
from probe.media import Clip


@dataclass(frozen=True)
class Filmed:
    """One clip as its model takes it: tensors to call the model with, and the layout of its run."""

    inputs: dict[str, Tensor]
    layout: Layout


def pooled_frames(clip: Clip, processor: Any, config: Any) -> Filmed:
    """LLaVA-NeXT-Video: patches averaged two by two in each frame, no separators."""
    pixels, rows, columns = _stacked(clip, processor, config)
    layout = _film(clip, rows // 2, columns // 2)
    return Filmed({"pixel_values_videos": pixels[None]}, layout)


def newline_last(clip: Clip, processor: Any, config: Any) -> Filmed:
    """LLaVA-OneVision: patches interpolated to half the side in each frame, one newline after the last frame."""
    pixels, rows, columns = _stacked(clip, processor, config)
    film = _film(clip, -(-rows // 2), -(-columns // 2))
    return Filmed({"pixel_values_videos": pixels[None]}, Layout(film.length + 1, film.grids, separators=(film.length,)))


def class_tokens(clip: Clip, processor: Any, config: Any) -> Filmed:
    """Video-LLaVA: every patch of every frame, a class token before each frame."""
    pixels, rows, columns = _stacked(clip, processor, config)
    per_frame = rows * columns + 1
    starts = per_frame * np.arange(len(clip.frames))
    offsets = starts[:, None, None] + 1 + row_major(rows, columns)
    grid = PatchGrid(offsets, _area(clip), "frames", spans(clip))
    layout = Layout(per_frame * len(clip.frames), (grid,), separators=tuple(starts.tolist()))
    return Filmed({"pixel_values_videos": pixels[None]}, layout)


def paired_frames(clip: Clip, processor: Any, config: Any) -> Filmed:
    """Qwen2-VL and Qwen2.5-VL: two frames make one grid of merged patches; an odd last frame is shown twice.

    A picture is a pair of the same frame: the patches of a clip are put together from those of its frames as pictures.
    """
    pictures, vision = processor.image_processor, config.vision_config
    depth, merge = int(vision.temporal_patch_size), int(vision.spatial_merge_size)
    made = pictures(images=list(clip.frames), return_tensors="pt")
    _, rows, columns = (int(n) for n in made["image_grid_thw"][0])
    if len({tuple(size) for size in made["image_grid_thw"].tolist()}) > 1:
        raise ExampleError("the frames of a clip have different sizes: they must be alike")
    patch = int(vision.patch_size)
    frames = made["pixel_values"].view(len(clip.frames), rows * columns, -1, depth, patch, patch)
    missing = -len(frames) % depth
    frames = torch.cat([frames, frames[-1:].expand(missing, *frames.shape[1:])])
    steps = len(frames) // depth
    paired = frames[:, :, :, 0].view(steps, depth, *frames.shape[1:3], patch, patch).movedim(1, 3)
    layout = _film(clip, rows // merge, columns // merge, depth)
    inputs = {
        "pixel_values_videos": paired.reshape(steps * rows * columns, -1),
        "video_grid_thw": torch.tensor([[steps, rows, columns]]),
        "second_per_grid_ts": torch.tensor([depth * spacing(clip)]),  # what Qwen2.5-VL counts its time by
    }
    return Filmed(inputs, layout)


FRAMES: dict[str, Callable[[Clip, Any, Any], Filmed]] = {
    function.__name__: function for function in (pooled_frames, newline_last, class_tokens, paired_frames)
}


def joined(filmed: list[Filmed]) -> dict[str, Tensor]:
    """The tensors of several clips as one batch. Raises ExampleError where their frames differ in number."""
    if len({one.inputs["pixel_values_videos"].shape[1] for one in filmed}) > 1 and "video_grid_thw" not in filmed[0].inputs:
        raise ExampleError(
            "the clips of a batch differ in their number of frames: encode them apart, or sample as many from each"
        )
    return {name: torch.cat([one.inputs[name] for one in filmed]) for name in filmed[0].inputs}


def spans(clip: Clip, together: int = 1) -> tuple[Span, ...]:
    """Start and stop of each frame (or group of frames) in seconds; the last frame lasts as long as others do on average."""
    starts = clip.times[::together]
    left = len(clip.times) - together * (len(starts) - 1)  # frames in the last group
    return tuple(zip(starts, (*starts[1:], starts[-1] + left * spacing(clip)), strict=True))


def spacing(clip: Clip) -> float:
    """Seconds from frame to frame on average; one, where there is a single frame."""
    return (clip.times[-1] - clip.times[0]) / (len(clip.times) - 1) if len(clip.times) > 1 else 1.0


def _film(clip: Clip, rows: int, columns: int, together: int = 1) -> Layout:
    times = spans(clip, together)
    offsets = row_major(rows, columns, frames=len(times))
    return Layout(offsets.size, (PatchGrid(offsets, _area(clip), "frames", times),))


def _stacked(clip: Clip, processor: Any, config: Any) -> tuple[Tensor, int, int]:
    """Pixels (frame 3 height width) and the rows and columns of their patches; of a tiled frame, the whole-picture tile."""
    made = processor.image_processor(images=list(clip.frames), return_tensors="pt")
    pixels = made["pixel_values" if "pixel_values" in made else "pixel_values_images"]
    pixels = pixels[:, 0] if pixels.dim() == 5 else pixels
    patch = int(config.vision_config.patch_size)
    return pixels, pixels.shape[-2] // patch, pixels.shape[-1] // patch


def _area(clip: Clip) -> tuple[float, float, float, float]:
    frame = clip.frames[0]
    return whole((frame.height, frame.width))
