"""MM-SHAP on any decoder with softmax attention: how much of an answer comes from the medium's tokens, how much from the words.

Tokens leave a coalition by being hidden: no position may look at them, in any layer. The players are groups of neighbouring
positions of each modality; the game's value is the log probability of the first token that the model says when it sees everything.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float

from probe.analysis.modality import shapley
from probe.edits import Knockout
from probe.errors import EditError, ExampleError
from probe.example import Example
from probe.media import open_picture
from probe.subject import Subject
from probe.tokens import TokenMap
from probe.tracing import last_logits, trace

WORDS = ("context", "question", "options")  # what a person says; system words, format and roles are always seen


@dataclass(frozen=True)
class Contributions:
    """Shapley values (player) of one answer, the modality that each player belongs to, and how many positions it has."""

    values: Float[np.ndarray, " player"]
    owners: tuple[str, ...]
    sizes: tuple[int, ...]
    full: float  # the log probability with everything seen
    empty: float  # and with every player hidden


def players_of(token_map: TokenMap, example: Example, groups: int) -> list[tuple[str, np.ndarray]]:
    """The players of an example: each modality's positions in at most `groups` runs of nearly the same length.

    Raises ExampleError where it has no medium in the sequence, or no words.
    """
    found = {name: token_map.positions(name) for name in ("image", "video", "audio")}
    words = np.concatenate([token_map.positions(name) for name in WORDS])
    media = {name: positions for name, positions in found.items() if len(positions)}
    if not media or not len(words) or token_map.crossed is not None:
        raise ExampleError(f"example {example.id!r} has no tokens of a medium beside its words to share an answer between")
    return [
        (name, run)
        for name, positions in {**media, "text": np.sort(words)}.items()
        for run in np.array_split(positions, min(groups, len(positions)))
    ]


def contributions(
    subject: Subject, example: Example, groups: int = 6, samples: int = 4, seed: int = 0, batch: int = 8
) -> Contributions:
    """Shapley values of an example's token groups for its answer, over `samples` random orders: about samples x players passes.

    Raises EditError for a model with layers that see tokens by other ways than softmax attention, which no knock-out hides.
    """
    if any(name is None for name in subject.anatomy.attention):
        raise EditError(
            f"some layers of this {subject.anatomy.family} model have no softmax attention: no token can be hidden from them"
        )
    example = replace(example, images=tuple(open_picture(picture) for picture in example.images))  # decoded once
    encoded = subject.encode(example)
    found = players_of(encoded.maps[0], example, groups)
    token = int(last_logits(subject, encoded)[0].argmax())

    def value(coalitions: Sequence[frozenset[int]]) -> list[float]:
        made: list[float] = []
        for start in range(0, len(coalitions), batch):
            some = coalitions[start : start + batch]
            together = subject.encode([example] * len(some))
            hidden = [[p for i, (_, run) in enumerate(found) if i not in one for p in run.tolist()] for one in some]
            maps = [m.with_groups(hidden=gone) for m, gone in zip(together.maps, hidden, strict=True)]
            logits = trace(subject, together.with_maps(maps), edit=[Knockout("real", "hidden")]).logits
            made += logits.log_softmax(-1)[:, token].tolist()
        return made

    values = shapley(value, len(found), samples, seed)
    empty, full = value([frozenset(), frozenset(range(len(found)))])
    return Contributions(values, tuple(n for n, _ in found), tuple(len(run) for _, run in found), full, empty)
