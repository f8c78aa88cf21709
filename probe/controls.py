"""Negative controls: the same question with its picture, clip or sound taken away, spoilt, or exchanged.

Pure functions from Example to Example. Media are changed when they are opened, not before, so that a control of a data set costs
no memory. Regions are dropped: they no longer show what they are named after. What is random depends on the seed and the
example's id alone.
"""

from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from typing import Any
from zlib import crc32

import numpy as np
from PIL import Image

from probe.errors import ExampleError, did_you_mean
from probe.example import Example
from probe.media import Clip, Picture, Sound, Video, VideoSource, open_picture, open_sound, open_video

FIELDS = {"image": "images", "video": "videos", "audio": "sounds", "text": "context"}  # a modality, and where an Example has it
GREY = 128  # of a blank picture: the same for all of them, so that it tells nothing
CELLS, SLICES = 8, 16  # cells of a side of a picture, and slices of a sound, that are shuffled
Pixels = Callable[[Image.Image, np.random.Generator], Image.Image]
Frames = Callable[[Clip, np.random.Generator], Clip]
Samples = Callable[[np.ndarray, np.random.Generator], np.ndarray]


def modalities(example: Example) -> tuple[str, ...]:
    """What an example brings besides its question: media, and `text` where it has a context."""
    return tuple(name for name, field in FIELDS.items() if getattr(example, field))


def only(example: Example, kept: Iterable[str]) -> Example:
    """The example with these modalities and no others; its question stays. Raises ExampleError for one that it does not have."""
    kept = set(kept)
    for name in kept - set(modalities(example)):
        raise ExampleError(f"example {example.id!r} has no {name} to keep{did_you_mean(name, modalities(example))}")
    gone: dict[str, Any] = {f: "" if n == "text" else () for n, f in FIELDS.items() if n not in kept}
    return replace(example, **gone, regions=example.regions if "image" in kept else ())


def swap(example: Example, other: Example, modality: str) -> Example:
    """The example with the pictures (clips, sounds, context) of another one. Raises ExampleError where one of them has none."""
    for one in (example, other):
        if modality not in modalities(one):
            raise ExampleError(f"example {one.id!r} has no {modality} to exchange")
    taken: dict[str, Any] = {FIELDS[modality]: getattr(other, FIELDS[modality])}
    return replace(example, **taken, regions=() if modality == "image" else example.regions)


def blank(example: Example) -> Example:
    """Middle grey in place of pictures and frames, silence in place of sounds, each as large or long as it was."""
    return _changed(example, 0, _grey, partial(_each_frame, _grey), lambda samples, _: np.zeros_like(samples))


def noise(example: Example, seed: int = 0) -> Example:
    """Noise in place of everything: uniform in every pixel, and in sounds Gaussian and as loud as they were."""
    return _changed(example, seed, _static, partial(_each_frame, _static), _hiss)


def shuffled(example: Example, seed: int = 0, cells: int = CELLS, slices: int = SLICES) -> Example:
    """The same parts in another order: cells of pictures (`cells` on each side), frames of clips, slices of sounds."""
    if cells < 2 or slices < 2:
        raise ExampleError(f"nothing can be shuffled in {cells} cells a side and {slices} slices: there must be two or more")
    return _changed(example, seed, partial(_cells, cells), _frames, partial(_slices, slices))


def frozen(example: Example) -> Example:
    """Clips that stand still: their middle frame, as often and at the times of the frames it replaces.

    Raises ExampleError for an example without a clip.
    """
    if not example.videos:
        raise ExampleError(f"example {example.id!r} has no clip to freeze")
    return _changed(example, 0, frames=_stand_still)


# --- media that are changed when they are opened ---------------------------------------------------------------------


def _changed(
    example: Example, seed: int, pixels: Pixels | None = None, frames: Frames | None = None, samples: Samples | None = None
) -> Example:
    """The example with a change of each kind of medium; a kind without one stays as it is."""
    if not any(example.media.values()):
        raise ExampleError(f"example {example.id!r} shows nothing that could be changed")
    key, made = (seed, crc32(example.id.encode())), dict[str, Any]()
    if pixels:
        made["images"] = tuple(partial(_picture, one, pixels, (*key, i)) for i, one in enumerate(example.images))
        made["regions"] = ()
    if frames:
        made["videos"] = tuple(_video(one, frames, (*key, i)) for i, one in enumerate(example.videos))
    if samples:
        made["sounds"] = tuple(partial(_sound, one, samples, (*key, i)) for i, one in enumerate(example.sounds))
    return replace(example, **made)


def _picture(picture: Picture, change: Pixels, key: tuple[int, ...]) -> Image.Image:
    return change(open_picture(picture), np.random.default_rng(key))


def _video(source: VideoSource, change: Frames, key: tuple[int, ...]) -> Video:
    """A clip whose chosen frames are changed: chosen first, as the model would have seen them."""
    video = source if isinstance(source, Video) else Video(source)
    return replace(video, source=partial(_clip, video, change, key))


def _clip(video: Video, change: Frames, key: tuple[int, ...]) -> Clip:
    return change(open_video(video), np.random.default_rng(key))


def _sound(sound: Sound, change: Samples, key: tuple[int, ...]) -> tuple[np.ndarray, int]:
    wave = open_sound(sound)
    return change(wave.samples, np.random.default_rng(key)).astype(np.float32), wave.rate


# --- the changes -----------------------------------------------------------------------------------------------------


def _grey(picture: Image.Image, _: np.random.Generator) -> Image.Image:
    return Image.new("RGB", picture.size, (GREY, GREY, GREY))


def _static(picture: Image.Image, rng: np.random.Generator) -> Image.Image:
    return Image.fromarray(rng.integers(0, 256, (picture.height, picture.width, 3), dtype=np.uint8))


def _each_frame(change: Pixels, clip: Clip, rng: np.random.Generator) -> Clip:
    return Clip(tuple(change(frame, rng) for frame in clip.frames), clip.times)


def _hiss(samples: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    loudness = float(np.sqrt((samples.astype(np.float64) ** 2).mean()))
    return np.clip(loudness * rng.standard_normal(len(samples)), -1, 1)


def _cells(count: int, picture: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Cells of one size trade places; a rest that no whole cell fits in stays where it is."""
    pixels = np.array(picture)
    high, wide = picture.height // count, picture.width // count
    if not high or not wide:
        raise ExampleError(f"a picture of {picture.width} x {picture.height} pixels has no {count} x {count} cells to shuffle")
    whole = pixels[: high * count, : wide * count]
    cells = whole.reshape(count, high, count, wide, 3).swapaxes(1, 2).reshape(count * count, high, wide, 3)
    mixed = cells[_order(len(cells), rng)].reshape(count, count, high, wide, 3).swapaxes(1, 2)
    pixels[: high * count, : wide * count] = mixed.reshape(whole.shape)
    return Image.fromarray(pixels)


def _frames(clip: Clip, rng: np.random.Generator) -> Clip:
    return Clip(tuple(clip.frames[i] for i in _order(len(clip.frames), rng)), clip.times)


def _stand_still(clip: Clip, _: np.random.Generator) -> Clip:
    return Clip((clip.frames[len(clip.frames) // 2],) * len(clip.frames), clip.times)


def _slices(count: int, samples: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    pieces = np.array_split(samples, count)
    return np.concatenate([pieces[i] for i in _order(len(pieces), rng)])


def _order(count: int, rng: np.random.Generator) -> list[int]:
    """A random order that is not the one they are in, where there is another."""
    order = np.arange(count)
    while count > 1 and (order == np.arange(count)).all():
        order = rng.permutation(count)
    return [int(i) for i in order]
