"""The plainest way to have fewer visual tokens: a smaller picture. A baseline that every reducer is held against."""

import copy
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from PIL import Image
from torch import nn

from compress.smaller import Smaller
from probe.errors import PassError
from probe.example import Example
from probe.media import Picture, open_picture
from probe.subject import Subject


def downsampled(subject: Subject, side: float) -> Smaller:
    """A copy of a model that is shown pictures of `side` (a share in (0, 1)) of their height and width, in as many fewer tokens.

    A tower of one size gets smaller pictures and position embeddings between its own; in families that take pictures of any
    size the model is as it was, and `shrunk` makes the examples. Raises PassError where a family does neither.
    """
    if not 0 < side < 1:
        raise PassError(f"a picture's side is shortened to a share between 0 and 1, not to {side:g}")
    geometry = subject.anatomy.row.geometry
    if geometry in ("merged", "ragged"):
        return Smaller.of(subject)
    tower = subject.model.get_submodule(subject.anatomy.vision) if subject.anatomy.vision else None
    embeddings = getattr(tower, "embeddings", None)
    if geometry != "plain" or not hasattr(embeddings, "interpolate_pos_encoding"):
        raise PassError(f"{subject.anatomy.family} takes pictures of one size: pool its tokens instead (method pooling)")
    smaller = Smaller.of(subject)
    smaller.processor = copy.deepcopy(subject.processor)
    patch = int(subject.config.vision_config.patch_size)
    cells = max(1, round(int(subject.config.vision_config.image_size) // patch * side))
    pictures = smaller.processor.image_processor
    pictures.size = dict.fromkeys(pictures.size, cells * patch)
    if getattr(pictures, "crop_size", None):
        pictures.crop_size = {"height": cells * patch, "width": cells * patch}
    own = smaller.model.get_submodule(subject.anatomy.vision or "")
    smaller.attached.append(_Between(own.embeddings))
    return smaller


def shrunk(subject: Subject, examples: Sequence[Example], side: float) -> list[Example]:
    """The examples for a down-sampled model: with smaller pictures where the family takes any size, else as they are."""
    if subject.anatomy.row.geometry not in ("merged", "ragged"):
        return list(examples)
    return [replace(one, images=tuple(partial(_shrink, picture, side) for picture in one.images)) for one in examples]


def _shrink(picture: Picture, side: float) -> Image.Image:
    opened = open_picture(picture)
    return opened.resize((max(1, round(opened.width * side)), max(1, round(opened.height * side))), Image.Resampling.BICUBIC)


class _Between:
    """Position embeddings between those that the tower was trained with, while it is attached."""

    def __init__(self, embeddings: nn.Module) -> None:
        self.handle = embeddings.register_forward_pre_hook(self._ask, with_kwargs=True)

    def _ask(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return args, {**kwargs, "interpolate_pos_encoding": True}

    def detach(self) -> None:
        self.handle.remove()
