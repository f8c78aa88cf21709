"""One vector for each example, token group and layer: the mean state of the group, read off one forward pass.

A state counts what enters layer 0 as 0 and what leaves layer l as l + 1.
"""

import re
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float

from probe.errors import SightlineError
from probe.example import Example
from probe.recorders import Residual
from probe.subject import Encoded, Subject
from probe.tokens import TokenMap
from probe.tracing import trace

SHOWN = ("image", "video", "audio", "context")  # what an example shows, whichever of them it has
PLACES = ("object", "other", "shown", "word", "question", "last")


def shown(token_map: TokenMap) -> str:
    """The segment that holds what an example shows; the empty string where it shows nothing in the sequence."""
    return next((name for name in SHOWN if len(token_map.positions(name))), "")


def places(token_map: TokenMap, example: Example) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Positions of the token groups that an example has, and why it lacks the others.

    `object` are the patches of its first region, `other` the rest of the picture, `shown` all tokens of what is shown, `word` the word of
    the question that names the object, and `question` and `last` what they always are.
    """
    medium = shown(token_map)
    found = {"shown": token_map.positions(medium) if medium else np.array([], dtype=np.int64)}
    found |= {name: token_map.positions(name) for name in ("question", "last")}
    missing = {"shown": "nothing is shown in the sequence", "question": "the prompt has no question"}
    missing |= {"object": "no region says where the object is", "other": "no region says where the object is"}
    missing["word"] = "the question has no word of the object's label"
    if example.regions:
        try:
            found["object"] = np.intersect1d(token_map.in_boxes(example.regions[:1]), found["shown"])
            found["other"] = np.setdiff1d(found["shown"], found["object"]) if len(found["object"]) else found["object"]
            missing |= dict.fromkeys(
                ("object", "other"), "the picture's positions are not in the sequence, or the box is cut away"
            )
        except SightlineError as error:
            missing |= dict.fromkeys(("object", "other"), str(error))
        found["word"] = word_positions(token_map, asked_word(example))
    found = {name: positions for name, positions in found.items() if len(positions)}
    return found, {name: why for name, why in missing.items() if name not in found}


def asked_word(example: Example) -> str:
    """The word of the question that names the first region: a word of its label that the prompt has; the empty string without one."""
    label = example.regions[0].label.lower().split() if example.regions else []
    said = re.findall(r"\w+", example.prompt.lower())
    return next((word for word in said if word in label), "")


def word_positions(token_map: TokenMap, word: str) -> np.ndarray:
    """The question's tokens that spell a word, the first time that it is there; none where whole tokens do not spell it."""
    at = token_map.positions("question")
    said = [token_map.spellings[p].strip().lower() for p in at] if token_map.spellings else []
    for i in range(len(said) if word else 0):
        spelt, stop = said[i], i + 1
        while len(spelt) < len(word) and stop < len(said):
            spelt, stop = spelt + said[stop], stop + 1
        if spelt == word and said[i]:
            return at[i:stop]
    return np.array([], dtype=np.int64)


def group_means(
    subject: Subject, encoded: Encoded, groups: Sequence[Mapping[str, np.ndarray]], names: Sequence[str]
) -> Float[np.ndarray, "batch group state width"]:
    """The mean state of each named group of each example; NaN where an example has no such group.

    `groups` are each example's positions by name. One forward pass; nothing but the means is kept.
    """
    empty = np.array([], dtype=np.int64)
    named = [
        token_map.with_groups(**{f"mean-{name}": own.get(name, empty) for name in names})
        for token_map, own in zip(encoded.maps, groups, strict=True)
    ]
    record = [
        Residual(point, layers, f"mean-{name}", "mean")
        for name in names for point, layers in (("resid_pre", 0), ("resid_post", None))
    ]  # fmt: skip
    taken = trace(subject, encoded.with_maps(named), record)
    parts = [taken["states" if i == 0 else f"states.{i}"].tensor.float().numpy() for i in range(len(record))]
    made = np.stack([np.concatenate(parts[i : i + 2]) for i in range(0, len(parts), 2)])  # group state batch width
    made = made.transpose(2, 0, 1, 3).astype(np.float32)
    for i, own in enumerate(groups):
        made[i, [name not in own for name in names]] = np.nan
    return made
