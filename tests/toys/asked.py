"""What toys are asked."""

from typing import Any

import torch

from probe import Encoded, Example, Subject
from tests.toys.base import picture, sound

WORDS = (("what color is the ball ?", "yes no"), ("is there a dog in the park ?", "one"))


def pair(subject: Subject, media: bool = True) -> list[Example]:
    """Two questions of different length, with a picture (or a sound) each where the family is about pictures or sounds."""
    sees = media and (subject.anatomy.vision is not None or subject.anatomy.audio is None)
    hears = media and not sees
    return [
        Example(
            "ab"[i], prompt, (picture(*size, i),) if sees else (), suffix=suffix,
            sounds=(sound(0.75 - 0.2 * i, seed=i),) if hears else (),
        )
        for i, ((prompt, suffix), size) in enumerate(zip(WORDS, ((40, 60), (30, 50)), strict=True))
    ]  # fmt: skip


def questions(subject: Subject) -> list[Example]:
    """The pair with its media where the model takes any, else its words."""
    return pair(subject, bool(subject.marks))


def extended(encoded: Encoded, written: torch.Tensor) -> dict[str, Any]:
    """Inputs of one pass over prompts and written tokens (batch token), as a pass without a cache reads them."""
    inputs = dict(encoded.inputs)
    inputs["input_ids"] = torch.cat([inputs["input_ids"], written], 1)
    inputs["attention_mask"] = torch.cat([inputs["attention_mask"], torch.ones_like(written)], 1)
    for name in ("token_type_ids", "mm_token_type_ids"):
        if name in inputs:
            inputs[name] = torch.cat([inputs[name], torch.zeros_like(written)], 1)
    return inputs
