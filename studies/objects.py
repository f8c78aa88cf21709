"""What is known of the objects in a picture: those that are there, with their boxes, and those that are not."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from probe.errors import DataError
from probe.example import Example, Region
from probe.tokens import TokenMap
from studies.demo import data as world_data
from studies.demo.world import COLOURS, NAMES

Role = str  # noun, attribute
ROLES: tuple[Role, ...] = ("noun", "attribute")
PRESENT, ABSENT = "another object's word", "an absent object's word"  # what is erased in place of the own word


@dataclass(frozen=True)
class Known:
    """An example's regions, and for each role the words that are known to fit its picture, and not to fit it."""

    regions: tuple[Region, ...]
    present: dict[Role, frozenset[str]]
    absent: dict[Role, frozenset[str]]


def words_of(label: str) -> dict[Role, tuple[str, ...]]:
    """A label's last word, which names the object, and the words before it: `red circle` is a red thing and a circle."""
    words = label.lower().split()
    return {"noun": tuple(words[-1:]), "attribute": tuple(words[:-1])}


def vocabulary(examples: Sequence[Example], limit: int) -> dict[Role, tuple[str, ...]]:
    """The words of each role that the examples' labels hold, the `limit` commonest; the bundled world has a list of its own.

    Raises DataError where nothing is labelled.
    """
    if any(world_data.everything(example) is not None for example in examples):
        return {"noun": NAMES, "attribute": COLOURS}
    counted: dict[Role, Counter[str]] = {role: Counter() for role in ROLES}
    for region in (region for example in examples for region in example.regions):
        for role, words in words_of(region.label).items():
            counted[role].update(words)
    if not counted["noun"]:
        raise DataError(
            "no example has a region with a label: this study asks about objects that are known to be in the picture"
        )
    return {role: tuple(sorted(word for word, _ in counted[role].most_common(limit))) for role in ROLES}


def known(example: Example, words: dict[Role, tuple[str, ...]], complete: bool) -> Known:
    """What an example says of its picture.

    Everything in the bundled world's pictures is known, and with `complete` an example's regions are taken to name all there is:
    the other words are then absent. Without it a word is absent where the example asks for it and the answer is no.
    """
    everything = world_data.everything(example)
    regions = tuple(region for region in (everything or example.regions) if region.label.strip())
    present = {role: frozenset(word for r in regions for word in words_of(r.label)[role]) for role in ROLES}
    absent = {role: frozenset[str]() for role in ROLES}
    if everything is not None or complete:
        absent = {role: frozenset(words[role]) - present[role] for role in ROLES}
    else:
        asked = _asked(example, words["noun"])
        if asked is not None:
            side = present if (example.answer or "").strip().lower() == "yes" else absent
            side["noun"] = side["noun"] | {asked}
            absent["noun"] = absent["noun"] - present["noun"]
    return Known(regions, present, absent)


def _asked(example: Example, nouns: Sequence[str]) -> str | None:
    """The one known object that a yes-or-no question speaks of."""
    if (example.answer or "").strip().lower() not in ("yes", "no"):
        return None
    said = example.prompt.lower().replace("?", " ").replace(".", " ").split()
    found = [noun for noun in nouns if noun in said]
    return found[0] if len(found) == 1 else None


def shown_by(token_map: TokenMap, regions: Sequence[Region]) -> np.ndarray:
    """Positions of the picture that the regions touch, sorted."""
    return np.intersect1d(token_map.in_boxes(regions), token_map.positions("image"))
