"""Other names for the options of a question (ChEF, arXiv 2311.02692): does a model write the name that it is told to write?"""

import re
from collections.abc import Sequence
from dataclasses import replace

from probe.errors import ExampleError, StudyError, did_you_mean
from probe.example import Example
from studies.tasks.scores_choice import LETTERS, listed, parse_choice

Setting = tuple[str, int]  # a kind of names, and which of that kind
ORIGIN: Setting = ("letters", 0)
SETTINGS: tuple[Setting, ...] = (
    ("natural", 0), ("natural", 1), ("natural", 2), ("neutral", 0), ("neutral", 1), ("unnatural", 0),
)  # fmt: skip
_LISTS = {
    "natural": (
        "1 2 3 4 5 6 7 8", "I II III IV V VI VII VIII", "first second third fourth fifth sixth seventh eighth", "(1) (2) (3) (4) (5) (6) (7) (8)",
        "α β γ δ ε ζ η θ",
    ),
    "neutral": ("Adams Baker Clark Evans Harris Lewis Moore Turner", "bar pen tip ah sun hill road cup", "~ @ $ % ^ & + ="),
}  # fmt: skip
_SHIFTS = {"letters": (0,), "unnatural": (1, -1)}  # by how many places letters are turned
KINDS = (*_SHIFTS, *_LISTS)
MOST = 8  # options that have a name in every list


def labels(kind: str, which: int, count: int) -> tuple[str, ...]:
    """The names of so many options: `natural` and `neutral` ones from lists, `unnatural` ones the letters turned by a place, `letters` as they are.

    `natural`: numbers, Roman numerals, ordinals, numbers in brackets, Greek letters. `neutral`: surnames, short words, signs. `unnatural`: to the
    left, to the right. Surnames, words and signs are this project's own, of the sort that the published code has, so that numbers are close to
    the published ones and not equal. Raises StudyError for names that there are not, or too few of.
    """
    if kind not in KINDS:
        raise StudyError(f"there are no {kind!r} names of options{did_you_mean(kind, KINDS)}")
    known = len(_SHIFTS[kind] if kind in _SHIFTS else _LISTS[kind])
    if not 0 <= which < known:
        raise StudyError(f"{kind} names of options are numbered 0 to {known - 1}, and {which} is none of them")
    names = LETTERS if kind in _SHIFTS else _LISTS[kind][which].split()
    if not 1 <= count <= len(names):
        raise StudyError(f"{kind} names {which} are for 1 to {len(names)} options, not for {count}")
    shift = _SHIFTS[kind][which] if kind in _SHIFTS else 0
    return tuple(names[(i + shift) % count if shift else i] for i in range(count))


def relabelled(example: Example, kind: str, which: int) -> tuple[Example, tuple[str, ...]]:
    """The question with its options by letter and, after them, which name to write for each letter; and the names in the order of the choices.

    As published, options keep their letters and the names are an instruction: what is measured is whether it is followed. It takes the place
    of the example's own suffix, which says how to answer as well. The question, its choices and its answer stay as they are. Raises
    ExampleError for fewer than two choices or more than there are names.
    """
    if not 2 <= len(example.choices) <= MOST:
        raise ExampleError(f"example {example.id!r} offers {len(example.choices)} choices, and other names are for 2 to {MOST}")
    names = labels(kind, which, len(example.choices))
    shown = listed(example, range(len(names)), "letters")
    if (kind, which) == ORIGIN:
        return replace(shown, suffix="Answer with the letter of the right option alone."), names
    told = " ".join(f'If the answer is {letter}, write "{name}".' for letter, name in zip(LETTERS, names, strict=False))
    return replace(shown, suffix=told), names


def parse_label(text: str, names: Sequence[str]) -> int | None:
    """The index of the option whose name an answer gives; None where it gives none or several.

    An answer that gives the option's own words has not done as told and names nothing, unless they are one of the names ("2" of "2 or 3"). Letters are read as `parse_choice` reads
    letters; other names are whole words in any case, and signs are looked for as they are. Quotation marks, which the names have in the
    instruction, say nothing.
    """
    text = text.replace('"', "").replace("\u201c", "").replace("\u201d", "")
    if set(names) <= set(LETTERS[: len(names)]):
        place = parse_choice(text, [""] * len(names))  # options without words of their own are named by their letters alone
        return None if place is None else list(names).index(LETTERS[place])
    if any(re.search(r"\w", name) for name in names):
        return parse_choice(text, names, lettered=False)
    found = [i for i, name in enumerate(names) if name in text]
    return found[0] if len(found) == 1 else None
