"""Examples put to a model: what it says, whether that is right, and how likely it held the right answer."""

from collections.abc import Sequence
from dataclasses import dataclass

from probe.errors import SightlineError
from probe.example import Example
from probe.subject import Subject
from probe.tracing import last_logits
from studies.study import Setting


@dataclass(frozen=True)
class Told:
    """An answer; `refused` says why there is none. `prob` is the probability of the right answer's first token, in any spelling
    that counts as right.
    """

    text: str = ""
    right: bool = False
    prob: float = 0.0
    refused: str = ""


def says(told: str, answer: str | None) -> bool:
    """Whether an answer is the right one: stripped, lower-cased, without a full stop."""
    return told.strip().lower().rstrip(".") == (answer or "").strip().lower()


def alike(examples: Sequence[Example]) -> list[list[int]]:
    """Indices of examples that bring the same kinds of media, which one batch can hold, group by group."""
    groups: dict[tuple[bool, ...], list[int]] = {}
    for i, example in enumerate(examples):
        groups.setdefault(tuple(map(bool, example.media.values())), []).append(i)
    return list(groups.values())


def ask(setting: Setting, examples: Sequence[Example], max_new_tokens: int = 16) -> list[Told]:
    """What the model says to each example; one that cannot be put to it is refused, and the others are answered all the same."""
    made = [Told()] * len(examples)
    for group in alike(examples):
        for i, told in zip(group, _ask([examples[i] for i in group], setting, max_new_tokens), strict=True):
            made[i] = told
    return made


def _ask(batch: list[Example], setting: Setting, max_new_tokens: int) -> list[Told]:
    try:
        return _answers(batch, setting, max_new_tokens)
    except SightlineError as error:
        if len(batch) == 1:
            return [Told(refused=str(error))]
    return [told for example in batch for told in _ask([example], setting, max_new_tokens)]


def _answers(batch: list[Example], setting: Setting, max_new_tokens: int) -> list[Told]:
    subject: Subject = setting.subject
    encoded = subject.encode(batch, setting.padding)
    likely = last_logits(subject, encoded).double().softmax(-1)
    prompt = encoded if setting.padding == "left" or len(batch) == 1 else subject.encode(batch)
    texts = subject.generate(prompt, max_new_tokens)
    return [
        Told(text, says(text, example.answer), float(likely[i, _begins(subject, example)].sum()))
        for i, (example, text) in enumerate(zip(batch, texts, strict=True))
    ]


def _begins(subject: Subject, example: Example) -> list[int]:
    """The tokens that the right answer may begin with: as it is written, in small letters, with a capital."""
    answer = example.answer or ""
    return sorted(set(subject.first_tokens([answer, answer.lower(), answer.capitalize()], example)))
