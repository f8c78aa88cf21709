"""Where the text stands around what an example shows: before it, between its media, and after it."""

from dataclasses import dataclass

import numpy as np

from probe.errors import EditError, TokenError
from probe.subject import Encoded, Subject
from probe.tokens import TokenMap

SETS = ("before", "between", "shown", "after")  # together every position that is not padding


@dataclass(frozen=True)
class Surroundings:
    """Positions of each set, sorted; `shown` is the whole run of every picture, clip and sound."""

    before: np.ndarray
    between: np.ndarray
    shown: np.ndarray
    after: np.ndarray


def surroundings(token_map: TokenMap) -> Surroundings:
    """The text before the first medium, between media, and after the last.

    Raises TokenError where the sequence shows nothing, or has no text after it (no row could look at it).
    """
    shown, text = token_map.positions("media"), token_map.positions("text")
    if not len(shown):
        raise TokenError("nothing is shown in the sequence: an example needs a picture, a video or a sound")
    before, after = text[text < shown[0]], text[text > shown[-1]]
    if not len(after):
        raise TokenError("there is no text after what is shown: the prompt must come after the picture")
    return Surroundings(before, text[(text > shown[0]) & (text < shown[-1])], shown, after)


def name_surroundings(encoded: Encoded) -> Encoded:
    """The same batch with its sets as named groups, `first` for the first position, and `rest` for the words before without it."""
    maps = []
    for token_map in encoded.maps:
        found, first = surroundings(token_map), [token_map.first]
        maps.append(token_map.with_groups(**vars(found), first=first, rest=np.setdiff1d(found.before, first)))
    return encoded.with_maps(maps)


def check_in_sequence(subject: Subject) -> None:
    """Raises EditError for a model that reads the picture through cross-attention: no row looks at words and picture alike."""
    if any(subject.anatomy.cross):
        raise EditError(
            f"a {subject.anatomy.family} model has its picture in layers of their own, which look at nothing else: no row divides "
            f"its attention between words and picture, and knock-outs (the study information-flow) say what it uses instead"
        )
