"""What toys are asked."""

from probe import Example, Subject
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
