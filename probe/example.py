"""Example: what is put to a model, and what is known about it."""

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from probe.errors import ExampleError

Picture = Image.Image | Path | str | Callable[[], Image.Image]  # a callable makes the picture when it is needed
MAX_PIXELS = 64_000_000


@dataclass(frozen=True)
class Region:
    """A box in an example's picture, in pixels of the original: left, top, right, bottom (right and bottom exclusive)."""

    box: tuple[float, float, float, float]
    label: str = ""
    picture: int = 0

    def __post_init__(self) -> None:
        left, top, right, bottom = self.box
        if not (left < right and top < bottom):
            raise ExampleError(
                f"a region's box is (left, top, right, bottom) with left < right and top < bottom, not {self.box}"
            )


@dataclass(frozen=True)
class Example:
    """A prompt with its pictures, and what is known about it.

    `prompt` is the question as a person types it: the model's chat template puts the rest around it, with the pictures
    before the question unless the prompt holds placeholders (`<image>`) that say otherwise. `context` is text that
    stands before the question (a text twin, subtitles), `suffix` the answer-format instruction after it. `answer` is
    the right answer, `choices` the answers offered or compared (the right one among them), `tags` anything to group by.
    """

    id: str
    prompt: str
    images: tuple[Picture, ...] = ()
    context: str = ""
    suffix: str = ""
    options: str = ""
    system: str | None = None
    answer: str | None = None
    choices: tuple[str, ...] = ()
    regions: tuple[Region, ...] = ()
    tags: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.prompt.strip():
            raise ExampleError(f"example {self.id!r} has an empty prompt: it needs a question")
        for region in self.regions:
            if not 0 <= region.picture < len(self.images):
                raise ExampleError(
                    f"example {self.id!r} has a region in picture {region.picture} but {len(self.images)} pictures"
                )

    def without_images(self) -> "Example":
        """The same question with nothing to look at."""
        return replace(self, images=(), regions=())


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
