"""Pairs of examples that differ in one fact, and the groups of positions that could carry it."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from probe.errors import DataError
from probe.example import Example, Region
from probe.subject import Encoded, Subject
from probe.tokens import TokenMap
from studies.data import TELLINGS, Data

GROUPS = ("object", "random", "others", "context", "word", "question", "suffix", "header", "last")
ROLES = ("clean", "corrupt")
PAIRED = ("demo", "demo:text")  # the tellings of the bundled world that pairs are made of


@dataclass(frozen=True)
class Pair:
    """Two examples with the same question and different right answers."""

    clean: Example
    corrupt: Example

    @property
    def kind(self) -> str:
        return self.clean.tags.get("kind", "")


def pairs_of(data: Data, seed: int) -> tuple[list[Pair], dict[str, str]]:
    """The pairs of a data set, and why the others could not be made: of the bundled world, or by the tags `pair` and `role`.

    Raises DataError for data without pairs.
    """
    if data.name in PAIRED:
        from studies.demo.data import SEED
        from studies.demo.pairs import pairs

        return [Pair(*both) for both in pairs(len(data), TELLINGS[data.name], SEED + seed)], {}
    found: dict[str, dict[str, list[Example]]] = {}
    for example in data.examples:
        if "pair" in example.tags:
            found.setdefault(example.tags["pair"], {}).setdefault(example.tags.get("role", ""), []).append(example)
    if not found:
        raise DataError(
            f"{data.name} has no pairs to patch between: name {' or '.join(PAIRED)}, or a .jsonl in which two examples have the "
            f'same tag "pair" and the tags "role" clean and corrupt'
        )
    whole = {
        name: Pair(*(roles[role][0] for role in ROLES))
        for name, roles in found.items() if sorted(roles) == sorted(ROLES) and all(len(one) == 1 for one in roles.values())
    }  # fmt: skip
    broken = {
        name: f"it has the roles {', '.join(sorted(r or 'none' for r, e in roles.items() for _ in e))}, not one clean and one corrupt"
        for name, roles in found.items() if name not in whole
    }  # fmt: skip
    if not whole:
        name, why = next(iter(broken.items()))
        raise DataError(f"none of the {len(broken)} pairs of {data.name} is whole; the first, {name!r}: {why}")
    return list(whole.values()), broken


def check_pair(subject: Subject, pair: Pair) -> None:
    """Raises a SightlineError where the two cannot be compared position by position, or have no two answers to compare."""
    for example in (pair.clean, pair.corrupt):
        if not (example.answer or "").strip():
            raise DataError(f"example {example.id!r} has no answer to compare with")
    encoded = [subject.encode(example) for example in (pair.clean, pair.corrupt)]
    maps = [one.maps[0] for one in encoded]
    if len(maps[0]) != len(maps[1]):
        raise DataError(f"its prompts have {len(maps[0])} and {len(maps[1])} tokens: a patch needs position by position")
    if maps[0].segments != maps[1].segments:
        raise DataError("its prompts have their segments in different places: a patch needs position by position")


def begin(subject: Subject, pair: Pair, answers: Sequence[str]) -> tuple[int, int]:
    """The first tokens of the clean and the corrupt answer. Raises DataError where they are the same."""
    clean, corrupt = (
        subject.first_tokens([answer], example)[0] for answer, example in zip(answers, (pair.clean, pair.corrupt), strict=True)
    )
    if clean == corrupt:
        raise DataError(f"its answers {answers[0]!r} and {answers[1]!r} begin with the same token")
    return clean, corrupt


def groups_of(pair: Pair, clean: Encoded, corrupt: Encoded, row: int, seed: int) -> dict[str, np.ndarray]:
    """Disjoint groups of positions, except that `random` is a part of `others`; empty where an example has none.

    `object` is where the two differ: the patches that the regions of either example touch or, without regions, the tokens that
    are not the same. `others` are the rest of that medium or segment, `random` as many of them as the object has. `word` is
    what the question calls the object: words of the regions' labels, or of the changed tokens' answers.
    """
    token_map, example = clean.maps[row], pair.clean
    shown = np.concatenate([token_map.positions(kind) for kind in ("image", "video", "audio")])
    regions = _regions(pair)
    differ = _differing(clean, corrupt, row)
    if regions and token_map.geometry and token_map.crossed is None:
        found = np.union1d(token_map.in_boxes(example.regions), corrupt.maps[row].in_boxes(pair.corrupt.regions))
        changed, medium = np.intersect1d(found, shown), shown
    elif len(differ):
        changed = differ
        touched = {token_map.segments[position] for position in differ}
        medium = np.concatenate([token_map.positions(segment) for segment in sorted(touched)])
    else:
        changed, medium = np.array([], dtype=np.int64), shown
    others = np.setdiff1d(medium, changed)
    rng = np.random.default_rng([seed, *example.id.encode()])
    random = np.sort(rng.choice(others, size=min(len(changed), len(others)), replace=False))
    used = np.concatenate([changed, others])
    made = {"object": changed, "random": random, "others": others}
    wanted = {
        "word": _naming(token_map, [region.label for region in regions]),
        "last": np.array([token_map.last]),
        **{name: token_map.positions(name) for name in ("context", "question", "suffix", "header")},
    }
    for name, positions in wanted.items():
        made[name] = np.setdiff1d(positions, used)
        used = np.concatenate([used, made[name]])
    return {name: made[name] for name in GROUPS}


def _regions(pair: Pair) -> tuple[Region, ...]:
    return (*pair.clean.regions, *pair.corrupt.regions)


def _differing(clean: Encoded, corrupt: Encoded, row: int) -> np.ndarray:
    ids = [np.array(encoded.inputs["input_ids"][row].tolist()) for encoded in (clean, corrupt)]
    return np.nonzero(ids[0] != ids[1])[0]


def _naming(token_map: TokenMap, labels: Sequence[str]) -> np.ndarray:
    """Positions of the question whose tokens are part of a word of the labels."""
    positions = token_map.positions("question")
    spelled = [token_map.spellings[position].lower() for position in positions]
    ends = np.cumsum([len(text) for text in spelled])
    text = "".join(spelled)
    words = {word for label in labels for word in re.findall(r"\w+", label.lower())}
    hit = [match.span() for word in words for match in re.finditer(rf"\b{re.escape(word)}\b", text)]
    inside = [
        position for position, end, spelling in zip(positions, ends, spelled, strict=True)
        if any(start < end and stop > end - len(spelling) for start, stop in hit)
    ]  # fmt: skip
    return np.array(inside, dtype=np.int64)
