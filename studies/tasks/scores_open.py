"""Open answers of any data: VQA accuracy where enough people's answers are known, exact match with the right one elsewhere."""

from collections.abc import Sequence

from probe.errors import DataError
from probe.example import Example
from studies.tasks.readers import human_answers
from studies.tasks.scores import Score, average
from studies.tasks.scores_text import NORMALISATIONS, exact_match, vqa_item

LEAST = 4  # people, one of whom is left out: three have to agree for an answer to be wholly right


def score_item(example: Example, said: str) -> float | None:
    """How right one answer is, from 0 to 1: VQA accuracy where four people or more answered, else 1 or 0 by `plain` exact match.

    With fewer people VQA accuracy cannot reach 1 (of three, as in Clotho-AQA, two are left and it is 2/3 at most), and their most frequent answer is
    the example's. None where an example has neither.
    """
    people = human_answers(example)
    if len(people) >= LEAST:
        return vqa_item(said, people)
    same = NORMALISATIONS["plain"]
    return None if example.answer is None else float(same(said) == same(example.answer))


def score_open(examples: Sequence[Example], said: Sequence[str], seed: int = 0) -> Score:
    """The mean of `score_item` over answers, under the name of the rule: with a bootstrap where people's answers count, else Wilson's interval.

    Where data is of both sorts each item has its own rule, and the metric says so. Raises DataError for more or fewer answers than examples.
    """
    if len(examples) != len(said):
        raise DataError(f"each example has one answer: {len(examples)} examples and {len(said)} answers were given")
    people = sum(len(human_answers(example)) >= LEAST for example in examples)
    if not people:
        return exact_match(said, [example.answer for example in examples])
    rest = len(examples) - people
    metric = "VQA accuracy" if not rest else f"VQA accuracy of {people} and exact match (plain) of {rest} answers"
    return average(metric, [score_item(example, text) for example, text in zip(examples, said, strict=True)], seed)
