"""Where a phrase stands in the question: from words to the positions of their tokens."""

import re

from probe.errors import TokenError
from probe.example import Example
from probe.mapping import segment_of
from probe.subject import Subject
from probe.tokens import TokenMap

# Words that name nothing: a label is not found in a question by these alone.
_EMPTY = frozenset(["a", "an", "the", "of", "in", "on", "at", "to", "and", "or", "with", "is", "are"])


def phrase_in(label: str, text: str) -> tuple[str, list[tuple[int, int]]]:
    """The longest run of the label's words that the text holds as whole words, and where (start, stop in characters).

    Case does not matter. Among runs of one length the last is taken, since that is where a name's noun stands: of `red circle`,
    the question `is the circle red ?` holds `circle`. Nothing found is an empty phrase.
    """
    words = re.findall(r"\w+", label)
    for length in range(len(words), 0, -1):
        for start in range(len(words) - length, -1, -1):
            run = words[start : start + length]
            if all(word.lower() in _EMPTY for word in run):
                continue
            pattern = r"(?<!\w)" + r"\W+".join(map(re.escape, run)) + r"(?!\w)"
            found = [match.span() for match in re.finditer(pattern, text, re.IGNORECASE)]
            if found:
                return " ".join(run), found
    return "", []


def positions_of(subject: Subject, example: Example, token_map: TokenMap, label: str) -> tuple[str, tuple[int, ...]]:
    """The phrase of the question that speaks of a label, and the positions of its tokens; empty where none does.

    A token belongs to the phrase when it writes at least one of its characters; a phrase that is said twice has the
    tokens of both. `token_map` is the example's, padded or not. Raises TokenError where the question's tokens cannot be
    laid over its text.
    """
    rendered = subject.render(example)
    plain = subject.tokenizer(rendered.text, return_offsets_mapping=True, add_special_tokens=False)
    pieces = zip(plain["input_ids"], plain["offset_mapping"], strict=True)
    tokens = [(token, start, stop) for token, (start, stop) in pieces if segment_of(rendered, start, stop) == "question"]
    places = token_map.positions("question")
    if [token for token, *_ in tokens] != [token_map.tokens[place] for place in places]:
        raise TokenError(f"the tokens of the question of example {example.id!r} cannot be laid over its text")
    asked = [(start, stop) for name, start, stop in sorted(rendered.spans, key=lambda span: span[1]) if name == "question"]
    found = [(phrase_in(label, rendered.text[start:stop]), start) for start, stop in asked]
    phrase = max((one for (one, _), _ in found), key=lambda one: len(one.split()), default="")
    spans = [(at + a, at + b) for (one, where), at in found if phrase and one == phrase for a, b in where]
    return phrase, tuple(
        int(place) for place, (_, start, stop) in zip(places, tokens, strict=True)
        if any(start < b and stop > a for a, b in spans)
    )  # fmt: skip
