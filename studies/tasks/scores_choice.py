"""Multiple choice: which option an answer names, which one is likeliest, and whether the order of the options decides."""

import re
from collections.abc import Sequence
from dataclasses import replace

from probe.errors import StudyError
from probe.example import Example
from probe.likelihood import Likelihood, Reduce
from studies.tasks.scores import Score, proportion

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_MARKED = re.compile(r"(?:^|[^\w'])\(?([A-Z])(?:[).:,]|\s*$)")
# A and I are words as well, and so is a letter in lower case: they need a mark or the end behind them.
_ANSWER_IS = re.compile(r"\b(?i:answer|option|choice)(?:\s+is)?\s*:?\s*\(?([B-HJ-Z]\b(?!')|[A-Za-z](?=[).:,]|\s*$))")


def parse_choice(text: str, options: Sequence[str], lettered: bool = True) -> int | None:
    """The index of the option that an answer names; None (unknown) where it names none, or several.

    In this order: the answer is an option word by word; with `lettered`, "the answer is B", a letter alone, or a letter with a
    bracket, point or colon behind it; one option alone occurs in it as words, where an option inside a longer one that occurs
    too ("dog" in "hot dog") is not counted. Letters beyond the last option name nothing.
    """
    bare = _words(text)
    whole = [i for i, option in enumerate(options) if _words(option) == bare]
    if len(whole) == 1:
        return whole[0]
    if lettered and (letter := _letter(text, len(options))) is not None:
        return letter
    found = _named(bare, [_words(option) for option in options])
    return found[0] if len(found) == 1 else None


def _words(text: str) -> str:
    return " ".join(re.findall(r"[\w']+", text.lower()))


def _letter(text: str, count: int) -> int | None:
    known = LETTERS[:count]
    if said := _ANSWER_IS.search(text):
        letter = said.group(1).upper()
        return known.index(letter) if letter in known else None
    alone = text.strip().strip("().:").upper()
    if len(alone) == 1 and alone in known:
        return known.index(alone)
    marked = {letter for letter in _MARKED.findall(text) if letter in known}
    return known.index(marked.pop()) if len(marked) == 1 else None


def _named(text: str, options: Sequence[str]) -> list[int]:
    """Options that occur as words, longest first, each stretch of the text taken by one of them."""
    rest, found = f" {text} ", []
    for i in sorted(range(len(options)), key=lambda i: -len(options[i])):
        if options[i] and f" {options[i]} " in rest:
            found.append(i)
            rest = rest.replace(f" {options[i]} ", " | ")
    return found


def by_generation(chosen: Sequence[int | None], right: Sequence[int]) -> tuple[Score, Score]:
    """Accuracy, in which an unknown choice is a wrong one, and the share of unknown ones."""
    hits = sum(a == b for a, b in zip(chosen, right, strict=True))
    unknown = sum(a is None for a in chosen)
    return proportion("accuracy by generation", hits, len(chosen)), proportion("unknown answers", unknown, len(chosen))


def by_likelihood(likelihoods: Sequence[Likelihood], right: Sequence[int], reduce: Reduce = "mean") -> Score:
    """Accuracy of the likeliest option (SEED-Bench: the mean over its tokens)."""
    hits = sum(one.best(reduce) == answer for one, answer in zip(likelihoods, right, strict=True))
    return proportion(f"accuracy by likelihood ({reduce})", hits, len(likelihoods))


# --- the order of the options ----------------------------------------------------------------------------------------


def rotations(count: int) -> list[tuple[int, ...]]:
    """Every rotation of so many options; the first one leaves them as they are."""
    return [tuple((start + k) % count for k in range(count)) for start in range(count)]


def listed(example: Example, order: Sequence[int], style: str) -> Example:
    """The question with its choices shown in an order: `letters` on lines of their own, or `words` joined by "or".

    Raises StudyError for another style.
    """
    shown = [example.choices[i] for i in order]
    if style == "letters":
        return replace(example, options="\n".join(f"{letter}. {text}" for letter, text in zip(LETTERS, shown, strict=False)))
    if style == "words":
        return replace(example, options=" or ".join(shown))
    raise StudyError(f"options are shown by letters or by words, not by {style!r}")


def circular(right: Sequence[Sequence[bool]]) -> Score:
    """The share of items that are answered rightly in every rotation (MMBench's circular accuracy)."""
    return proportion("circular accuracy", sum(all(item) for item in right), len(right))
