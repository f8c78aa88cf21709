"""Open answers: exact match under a named normalisation, and VQA accuracy over the answers of ten people."""

import re
from collections.abc import Callable, Sequence

from probe.errors import StudyError, did_you_mean
from studies.tasks.scores import Score, average, proportion

_ARTICLES = ("a", "an", "the")
_NUMBERS = {
    "none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5", "six": "6", "seven": "7", "eight": "8",
    "nine": "9", "ten": "10",
}  # fmt: skip
# The official list of words that a missing apostrophe is put back into, by what follows the apostrophe.
_STEMS = {
    "'t": "ain aren can couldn didn doesn don hadn hasn haven isn mightn mustn needn oughtn shan shouldn wasn weren won wouldn",
    "'ve": "could I might must not should we what where who would they you", "'d": "he how it someone something there they where who you",
    "'ll": "how it somebody someone something they what who why you",
    "'s": "he how somebody someone that there what when where who why", "'re": "there they what why you", "'m": "I",
}  # fmt: skip
_CONTRACTIONS = {stem + end.replace("'", ""): stem + end for end, stems in _STEMS.items() for stem in stems.split()} | {
    "maam": "ma'am", "oclock": "o'clock", "twas": "'twas", "yall": "y'all", "somebody'd": "somebodyd",
}  # fmt: skip
_WHO = ("he", "I", "it", "she", "somebody", "someone", "something", "there", "they", "we", "who", "you")
_DOUBLE = {  # two apostrophes, of which one is missing
    **{f"{stem}n'tve": f"{stem}n't've" for stem in ("could", "had", "might", "should", "would")},
    **{f"{stem}nt've": f"{stem}n't've" for stem in ("could", "had", "might", "should", "would")},
    **{f"{stem}d've": f"{stem}'d've" for stem in _WHO},
    **{f"{stem}'dve": f"{stem}'d've" for stem in _WHO},
    "ow's'at": "'ow's'at", "'ows'at": "'ow's'at", "'ow'sat": "'ow's'at", "yall'll": "y'all'll", "y'allll": "y'all'll",
    "yall'd've": "y'all'd've", "y'alld've": "y'all'd've", "y'all'dve": "y'all'd've",
}  # fmt: skip
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_COMMA_IN_NUMBER = re.compile(r"\d,\d")
_LONE_POINT = re.compile(r"\.(?!\d)")


def _official_punctuation(text: str) -> str:
    """Marks beside a space, or anywhere once a number has a comma, vanish; others become a space; so does no point of a number."""
    made, number = text, _COMMA_IN_NUMBER.search(text) is not None
    for mark in _PUNCTUATION:
        beside_space = f"{mark} " in text or f" {mark}" in text
        made = made.replace(mark, "" if beside_space or number else " ")
    return _LONE_POINT.sub("", made)


def _official_words(text: str) -> str:
    words = [_NUMBERS.get(word, word) for word in text.lower().split()]
    kept = [word for word in words if word not in _ARTICLES]
    return " ".join(_DOUBLE.get(word, _CONTRACTIONS.get(word, word)) for word in kept)


def vqa_answer(text: str) -> str:
    """An answer as the official VQA evaluation compares it: marks, articles, number words and missing apostrophes set right."""
    return _official_words(_official_punctuation(text.replace("\n", " ").replace("\t", " ").strip()))


def _plain(text: str) -> str:
    """Lower case, no white space or full stop at the ends."""
    return text.strip().lower().rstrip(".").strip()


NORMALISATIONS: dict[str, Callable[[str], str]] = {"none": str, "plain": _plain, "vqa": vqa_answer}


def exact_match(said: Sequence[str], answers: Sequence[str | None], normalisation: str = "plain") -> Score:
    """The share of answers that are the right one, letter by letter, after both went through a named normalisation.

    `none` changes nothing, `plain` takes lower case and strips white space and a full stop, `vqa` is that of VQA accuracy. Items without an
    answer are dropped. Raises StudyError for a normalisation that does not exist.
    """
    if normalisation not in NORMALISATIONS:
        raise StudyError(f"there is no normalisation {normalisation!r}{did_you_mean(normalisation, NORMALISATIONS)}")
    same = NORMALISATIONS[normalisation]
    pairs = [(text, answer) for text, answer in zip(said, answers, strict=True) if answer is not None]
    hits = sum(same(text) == same(answer) for text, answer in pairs)
    return proportion(f"exact match ({normalisation})", hits, len(pairs), n_dropped=len(answers) - len(pairs))


def vqa_item(said: str, humans: Sequence[str], compat: str | None = None) -> float | None:
    """One answer's VQA accuracy: min(people who said so / 3, 1), averaged over the sets that leave one person out.

    With ten people these are the ten sets of nine (Antol et al. 2015, and the official code). None where fewer than two
    people answered. What people said is normalised like the answer; `compat="official"` does as the published script: only marks
    of theirs are set right, and only where they disagree, so that a person's `The Dog` or `two` is matched by nothing.
    """
    if len(humans) < 2:
        return None
    if compat == "official":
        told = [_official_punctuation(h) for h in humans] if len(set(humans)) > 1 else list(humans)
    elif compat is None:
        told = [vqa_answer(h) for h in humans]
    else:
        raise StudyError(f"VQA accuracy has no compat={compat!r}: there is 'official'")
    same = [human == vqa_answer(said) for human in told]
    return sum(min(1.0, (sum(same) - own) / 3) for own in same) / len(same)


def vqa_accuracy(said: Sequence[str], humans: Sequence[Sequence[str]], seed: int = 0, compat: str | None = None) -> Score:
    """The mean of `vqa_item` over items."""
    return average("VQA accuracy", [vqa_item(text, told, compat) for text, told in zip(said, humans, strict=True)], seed)
