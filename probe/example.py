"""Example: what is put to a model, and what is known about it."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from probe.errors import ExampleError
from probe.media import Picture, Sound, VideoSource


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
    """A prompt with its pictures, videos and sounds, and what is known about it.

    `prompt` is the question as a person types it: the model's chat template puts the rest around it, with the pictures
    (then videos, then sounds) before the question unless the prompt holds placeholders (`<image>`) that say otherwise. `context` is text that
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
    videos: tuple[VideoSource, ...] = ()
    sounds: tuple[Sound, ...] = ()

    def __post_init__(self) -> None:
        if not self.prompt.strip():
            raise ExampleError(f"example {self.id!r} has an empty prompt: it needs a question")
        for region in self.regions:
            if not 0 <= region.picture < len(self.images):
                raise ExampleError(
                    f"example {self.id!r} has a region in picture {region.picture} but {len(self.images)} pictures"
                )

    @property
    def media(self) -> dict[str, tuple[Any, ...]]:
        """Pictures, videos and sounds by the segment that they become."""
        return {"image": self.images, "video": self.videos, "audio": self.sounds}

    def without_media(self) -> "Example":
        """The same question with nothing to look at or listen to."""
        return replace(self, images=(), videos=(), sounds=(), regions=())
