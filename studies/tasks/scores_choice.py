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
_JOINT = r"(?:\s*[,/&]\s*|\s+)(?:(?:or|and|nor|option|choice)\s+)*"
_JOINED = re.compile(
    rf"\b([A-Z])\b\)?(?=\s*[,/&]|\s+(?:or|and|nor)\b){_JOINT}\(?([B-HJ-Z]\b(?!')|[AI](?=[).:,/]|\s*$|\s+(?:or|and|nor)\b))"
)
_BARE = re.compile(r"(?<![\w'])([B-HJ-Z])(?![\w'])")
_DENIAL = re.compile(r"\b(?:not|neither|nor|never|none|cannot|\w+n't)\b")
# Where what is said of one thing ends. A bracket that belongs to a letter does not end "(B) is not ...".
_CLAUSE = re.compile(
    r"[;!?\n]|[.,:](?=\s|$)|\)(?=\s+(?!is\b|was\b|can|could|would|does))|\b(?:because|since|but|so|as)\b", re.IGNORECASE
)


def parse_choice(text: str, options: Sequence[str], lettered: bool = True) -> int | None:
    """The index of the option that an answer names; None (unknown) where it names none, several, or denies the one that it names.

    In this order: the answer is an option word by word; with `lettered`, "the answer is B", a letter alone, or a letter with a
    bracket, point or colon behind it; one option alone occurs in it as words, where an option inside a longer one that occurs
    too ("dog" in "hot dog") is not counted. Letters beyond the last option name nothing, and Markdown says nothing. A denial is a "not",
    "neither" or the like in the clause of the letter or the option: "It is not red", but not "B, as it is not red".
    """
    text = _plain(text)
    bare, known = _words(text), [_words(option) for option in options]
    whole = [i for i, option in enumerate(known) if option == bare]
    if len(whole) == 1:
        return whole[0]
    if lettered and (letters := _letters(text, options)):
        index = LETTERS.index(min(letters))
        return None if len(letters) > 1 or _denies_letter(text, LETTERS[index], options) else index
    found = _named(bare, known)
    return found[0] if len(found) == 1 and not _denies(text, known[found[0]]) else None


def _plain(text: str) -> str:
    """Without the marks of Markdown: stars, backticks, headings, and underscores around words."""
    text = re.sub(r"[*`]|^\s*#+\s", "", text.replace("\u2019", "'"), flags=re.MULTILINE)
    return re.sub(r"(?<!\w)_+|_+(?!\w)", "", text).strip()


def _words(text: str) -> str:
    return " ".join(re.findall(r"[\w']+", text.lower()))


def _without(text: str, options: Sequence[str]) -> str:
    """The text with the options that stand in it cut out: what they say themselves ("not enough light", "Vitamin C") is no letter and no denial."""
    for option in sorted(options, key=len, reverse=True):
        if len(option.strip()) > 1:
            text = re.sub(rf"(?<!\w){re.escape(option.strip())}(?!\w)", "|", text, flags=re.IGNORECASE)
    return text


def _letters(text: str, options: Sequence[str]) -> set[str]:
    """The letters that an answer names: those that it says are the answer, else one alone, else those with a mark and any beside them."""
    known, text = LETTERS[: len(options)], _without(text, options)
    alone = text.strip("(). :").upper()
    if said := {letter.upper() for letter in _ANSWER_IS.findall(text)}:
        found = said
    elif len(alone) == 1:
        found = {alone}
    else:
        found = set(_MARKED.findall(text))
        found |= set(_BARE.findall(text)) if found & set(known) else set()
    joined = {letter for pair in _JOINED.findall(text) for letter in pair}
    return (found | joined if found & set(known) else found) & set(known)


def _denies_letter(text: str, letter: str, options: Sequence[str]) -> bool:
    """Whether a clause that has the letter has a denial as well."""
    clauses = _CLAUSE.split(_without(text, options))
    return any(re.search(rf"\b{letter}\b", clause) and _DENIAL.search(clause.lower()) for clause in clauses)


def _denies(text: str, option: str) -> bool:
    """Whether a clause that has the option has a denial beside it; an option that is one itself ("no") is said, not denied."""
    if _DENIAL.search(option) or "no" in option.split():
        return False
    for clause in _CLAUSE.split(text):
        before, there, after = f" {_words(clause)} ".partition(f" {option} ")
        if there and (_DENIAL.search(f"{before} {after}") or before.endswith(" no")):
            return True
    return False


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
