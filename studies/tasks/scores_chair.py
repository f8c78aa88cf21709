"""CHAIR (arXiv 1809.02156): which of the things that a caption mentions are not in its picture?"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np

from probe.analysis.stats import RESAMPLES
from probe.errors import StudyError
from studies.tasks.scores import Score, from_draws, proportion
from studies.tasks.vocabulary import Mention, Vocabulary, coco


@dataclass(frozen=True)
class Captioned:
    """What one caption mentions, and which of it is not there; `missed` is there and not mentioned."""

    mentions: tuple[Mention, ...]
    hallucinated: tuple[Mention, ...]
    missed: frozenset[str]


def read_caption(caption: str, objects: Collection[str], vocabulary: Vocabulary | None = None) -> Captioned:
    """One caption held against what its picture holds (see `Vocabulary.objects`). A seat in a caption with a toilet is no chair."""
    found = (vocabulary or coco()).mentions(caption)
    if any(mention.name == "toilet" for mention in found):
        found = [mention for mention in found if mention.words != "seat"]
    wrong = tuple(mention for mention in found if mention.name not in objects)
    return Captioned(tuple(found), wrong, frozenset(objects) - {mention.name for mention in found})


def chair(
    captions: Sequence[str], objects: Sequence[Collection[str]], vocabulary: Vocabulary | None = None, seed: int = 0, compat: str | None = None
) -> dict[str, Score]:  # fmt: skip
    """CHAIR_i, CHAIR_s and recall over all captions together.

    `chair_i` is the share of mentions, each repetition counted, of what is not there, its interval from resampled captions, as a
    caption's mentions are not independent; None where no caption mentions anything, as a share of nothing is not defined. With
    `compat="published"` it is 0 there, as in the published code that is in use, and so is a resample without a mention.
    `chair_s` is the share of captions with at least one such mention. `recall` is the share of what is there that is
    mentioned. All three depend on how long captions may be and on the prompt: say both beside the numbers. Raises StudyError for another `compat`.
    """
    if compat not in (None, "published"):
        raise StudyError(f"CHAIR has no compat={compat!r}: there is 'published'")
    read = [read_caption(caption, there, vocabulary) for caption, there in zip(captions, objects, strict=True)]
    wrong = np.array([len(one.hallucinated) for one in read], dtype=np.float64)
    every = np.array([len(one.mentions) for one in read], dtype=np.float64)
    there = np.array([len(known) for known in objects], dtype=np.float64)
    seen = there - np.array([len(one.missed) for one in read], dtype=np.float64)
    return {
        "chair_i": _ratio("CHAIR_i", wrong, every, seed, empty=0.0 if compat else None),
        "chair_s": proportion("CHAIR_s", int((wrong > 0).sum()), len(read)),
        "recall": _ratio("recall", seen, there, seed),
    }


def _ratio(metric: str, above: np.ndarray, below: np.ndarray, seed: int, empty: float | None = None) -> Score:
    """A sum over a sum, which is `empty` where there is nothing below the line."""
    n = len(above)
    if not below.sum():
        return Score(metric, empty if n else None, None, None, float(above.sum()), 0.0, n)
    again = np.random.default_rng(seed).integers(0, n, (RESAMPLES, n))
    with np.errstate(invalid="ignore", divide="ignore"):
        draws = above[again].sum(1) / below[again].sum(1)
    if empty is not None:
        draws = np.nan_to_num(draws, nan=empty)
    return from_draws(metric, float(above.sum() / below.sum()), draws, float(above.sum()), float(below.sum()), n)
