"""Pictures, clips and sounds, opened: pixels, frames with their times, samples with their rate."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from math import gcd
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from PIL import Image, UnidentifiedImageError

from probe.errors import ExampleError

Picture = Image.Image | Path | str | Callable[[], Image.Image]  # a callable makes the picture when it is needed
MAX_PIXELS = 64_000_000
FRAME_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


@dataclass(frozen=True)
class Clip:
    """Frames (RGB) and the time of each in seconds."""

    frames: tuple[Image.Image, ...]
    times: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.frames:
            raise ExampleError("a clip without frames shows nothing: at least one frame is needed")
        if len(self.frames) != len(self.times):
            raise ExampleError(f"a clip of {len(self.frames)} frames needs as many times, not {len(self.times)}")


@dataclass(frozen=True)
class Wave:
    """Mono samples in [-1, 1] and how many there are in a second."""

    samples: Float[np.ndarray, " sample"]
    rate: int

    @property
    def seconds(self) -> float:
        return len(self.samples) / self.rate

    def at(self, rate: int) -> "Wave":
        """The same sound at another sampling rate (polyphase filtering)."""
        if rate == self.rate:
            return self
        from scipy.signal import resample_poly

        shared = gcd(rate, self.rate)
        return Wave(resample_poly(self.samples, rate // shared, self.rate // shared).astype(np.float32), rate)


@dataclass(frozen=True)
class Video:
    """A clip to be opened, and how its frames are chosen.

    `source` is a video file (read with PyAV), a folder of numbered pictures, or a function that makes a Clip. `policy`:
    `uniform` takes `frames` frames evenly from the first to the last, `middle` the middle frame of each of as many equal
    parts (what most papers do), `first` the first ones. A clip with fewer frames is taken whole. `fps` is the rate of a
    folder's pictures.
    """

    source: Path | str | Callable[[], Any]
    frames: int = 8
    policy: str = "uniform"
    fps: float = 1.0

    def __post_init__(self) -> None:
        if self.frames < 1:
            raise ExampleError(f"a video needs at least one frame, not {self.frames}")
        if self.policy not in ("uniform", "middle", "first"):
            raise ExampleError(f"frames are chosen by uniform, middle or first, not {self.policy!r}")


VideoSource = Video | Path | str | Callable[[], Any]
Sound = Path | str | Callable[[], Any] | tuple[np.ndarray, int]


def chosen_frames(count: int, wanted: int, policy: str) -> list[int]:
    """Which of `count` frames a policy takes, in order, each at most once."""
    if wanted >= count:
        return list(range(count))
    if policy == "first":
        return list(range(wanted))
    if policy == "middle":
        return [int((i + 0.5) * count / wanted) for i in range(wanted)]
    return [round(i * (count - 1) / (wanted - 1)) for i in range(wanted)] if wanted > 1 else [0]


def open_picture(picture: Picture) -> Image.Image:
    """The picture as RGB, fully decoded.

    Raises ExampleError when the file is missing, empty, truncated, not a picture, or would decode to more than
    64 million pixels.
    """
    if callable(picture):
        try:
            picture = picture()
        except (OSError, SyntaxError, ValueError, TypeError) as error:
            raise ExampleError(f"a picture of the data set is damaged: {error}") from error
    if picture is None:
        raise ExampleError("a picture of the data set is missing")
    if isinstance(picture, Image.Image):
        return _converted(picture, "a picture")
    path = Path(picture)
    if not path.is_file():
        raise ExampleError(f"there is no picture at {path}")
    if path.stat().st_size == 0:
        raise ExampleError(f"{path} is empty: a picture was expected")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            opened = Image.open(path)
        with opened as image:
            return _converted(image, str(path))
    except (UnidentifiedImageError, Image.DecompressionBombError) as error:
        bomb = isinstance(error, Image.DecompressionBombError)
        raise ExampleError(
            f"{path} would decode to too many pixels: at most {MAX_PIXELS:,} are opened" if bomb
            else f"{path} is not a picture that Pillow can read"
        ) from error  # fmt: skip
    except (OSError, SyntaxError, ValueError) as error:
        if isinstance(error, ExampleError):
            raise
        raise ExampleError(f"{path} is damaged or truncated: {error}") from error


def _converted(image: Image.Image, name: str) -> Image.Image:
    if image.width * image.height > MAX_PIXELS:
        raise ExampleError(f"{name} would decode to {image.width} x {image.height} pixels: at most {MAX_PIXELS:,} are opened")
    try:
        return image.convert("RGB")
    except (OSError, SyntaxError, ValueError) as error:
        raise ExampleError(f"{name} is damaged or truncated: {error}") from error


def open_video(source: VideoSource) -> Clip:
    """The chosen frames of a video.

    Raises ExampleError for a video that is missing, cannot be decoded, or has no frames, and for a video file where
    PyAV is not installed.
    """
    video = source if isinstance(source, Video) else Video(source)
    if callable(video.source):
        made = video.source()
        clip = made if isinstance(made, Clip) else Clip(tuple(made[0]), tuple(float(t) for t in made[1]))
        return _sampled(clip, video)
    path = Path(video.source)
    if path.is_dir():
        return _folder(path, video)
    if not path.is_file():
        raise ExampleError(f"there is no video at {path}")
    if path.stat().st_size == 0:
        raise ExampleError(f"{path} is empty: a video was expected")
    return _decoded(path, video)


def _sampled(clip: Clip, video: Video) -> Clip:
    kept = chosen_frames(len(clip.frames), video.frames, video.policy)
    return Clip(tuple(clip.frames[i].convert("RGB") for i in kept), tuple(clip.times[i] for i in kept))


def _folder(path: Path, video: Video) -> Clip:
    files = sorted(file for file in path.iterdir() if file.suffix.lower() in FRAME_SUFFIXES)
    if not files:
        raise ExampleError(f"{path} holds no frames: pictures whose names sort in time order were expected")
    kept = chosen_frames(len(files), video.frames, video.policy)
    return Clip(tuple(open_picture(files[i]) for i in kept), tuple(i / video.fps for i in kept))


def _decoded(path: Path, video: Video) -> Clip:
    try:
        import av
    except ImportError as error:
        raise ExampleError(f'{path} is a video file, which PyAV reads: pip install "sightline[video]"') from error
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise ExampleError(f"{path} has no video stream")
            times = [float(frame.time or 0.0) for frame in container.decode(video=0)]
        kept = set(chosen_frames(len(times), video.frames, video.policy))
        with av.open(str(path)) as container:  # twice, so that only the chosen frames are held as pictures
            frames = [frame.to_image() for i, frame in enumerate(container.decode(video=0)) if i in kept]
    except (av.error.FFmpegError, OSError, ValueError) as error:
        if isinstance(error, ExampleError):
            raise
        raise ExampleError(f"{path} cannot be decoded as a video: {error}") from error
    if not frames:
        raise ExampleError(f"{path} has no frames")
    return Clip(tuple(frames), tuple(times[i] for i in sorted(kept)))


def open_sound(source: Sound) -> Wave:
    """A sound as mono samples; several channels are averaged.

    Raises ExampleError for a sound that is missing, damaged, empty or holds values that are not numbers, and for a file
    where soundfile is not installed.
    """
    made = source() if callable(source) else source
    if isinstance(made, tuple):
        return _checked(made[0], int(made[1]), "a sound")
    path = Path(made)
    if not path.is_file():
        raise ExampleError(f"there is no sound at {path}")
    try:
        import soundfile
    except (ImportError, OSError) as error:
        raise ExampleError(f'{path} is a sound file, which soundfile reads: pip install "sightline[audio]"') from error
    try:
        samples, rate = soundfile.read(str(path), dtype="float32")
    except (soundfile.LibsndfileError, OSError) as error:
        raise ExampleError(f"{path} cannot be read as a sound: {error}") from error
    return _checked(samples, rate, str(path))


def _checked(samples: np.ndarray, rate: int, name: str) -> Wave:
    mono = np.asarray(samples, np.float32)
    mono = mono.mean(1) if mono.ndim == 2 else mono
    if rate <= 0:
        raise ExampleError(f"{name} has a sampling rate of {rate}: a positive number of samples in a second was expected")
    if mono.size == 0:
        raise ExampleError(f"{name} has no samples")
    if not np.isfinite(mono).all():
        raise ExampleError(f"{name} holds values that are not numbers")
    return Wave(mono, rate)


__all__ = ["Clip", "Sound", "Video", "VideoSource", "Wave", "chosen_frames", "open_sound", "open_video"]
