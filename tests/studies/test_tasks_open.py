"""Open answers: by people's answers where enough of them are known, by the right one where they are not."""

import json

import pytest

from probe import Example
from probe.errors import DataError
from studies.tasks.scores_open import score_item, score_open
from studies.tasks.scores_text import exact_match, vqa_accuracy


def asked(name, answer, *people):
    return Example(name, "what ?", answer=answer, tags={"answers": json.dumps(people)} if people else {})


MANY = asked("a", "down", *["down"] * 8, "table", "table")
PLAIN = asked("b", "red")
THREE = asked("c", "yes", "yes", "yes", "yes")  # Clotho-AQA: leaving one out of three can give 2/3 at most
UNKNOWN = asked("d", None)


def test_each_item_has_its_own_rule():
    # "table": eight sets have both people who said so (2/3), two have one of them (1/3)
    assert score_item(MANY, "Table.") == pytest.approx((8 * 2 / 3 + 2 * 1 / 3) / 10)
    assert [score_item(MANY, said) for said in ("the down", "up")] == [1.0, 0.0]
    assert [score_item(PLAIN, said) for said in ("Red.", "dark red")] == [1.0, 0.0]
    assert [score_item(THREE, said) for said in ("Yes", "no")] == [1.0, 0.0]
    assert score_item(UNKNOWN, "x") is None


def test_the_score_says_by_which_rule():
    people = score_open([MANY, MANY], ["table", "down"])
    assert people == vqa_accuracy(["table", "down"], [["down"] * 8 + ["table"] * 2] * 2)
    assert (people.metric, people.value) == ("VQA accuracy", pytest.approx(0.8))
    exact = score_open([PLAIN, THREE, UNKNOWN], ["red", "no", "x"])
    assert exact == exact_match(["red", "no", "x"], ["red", "yes", None])
    assert (exact.value, exact.n, exact.n_dropped) == (0.5, 2, 1)
    both = score_open([MANY, PLAIN, UNKNOWN], ["table", "red", "x"])
    assert both.metric == "VQA accuracy of 1 and exact match (plain) of 2 answers"
    assert (both.value, both.n, both.n_dropped) == (pytest.approx(0.8), 2, 1)
    assert score_open([], []).value is None


def test_the_order_of_items_and_of_people_changes_nothing():
    turned = asked("a", "down", "table", *["down"] * 8, "table")
    said = ["table", "red"]
    assert score_open([MANY, PLAIN], said).value == pytest.approx(score_open([PLAIN, turned], said[::-1]).value)


def test_bad_input_is_named():
    with pytest.raises(DataError, match="2 examples and 1 answers were given"):
        score_open([MANY, PLAIN], ["down"])
    for tag in ("red", '{"a": 1}', "[1, 2]"):
        with pytest.raises(DataError, match="the tag 'answers' of example 'e' is no JSON list of what people answered"):
            score_item(Example("e", "what ?", answer="red", tags={"answers": tag}), "red")
