"""Other names for options: what is asked, and what an answer names."""

import pytest

from probe import Example
from probe.errors import ExampleError, StudyError
from studies.tasks.relabelling import KINDS, MOST, ORIGIN, SETTINGS, labels, parse_label, relabelled

ASKED = Example("a", "what is it ?", answer="dog", choices=("cat", "dog", "hot dog"), suffix="Answer with one word.")
NAMES = {
    ("letters", 0): ("A", "B", "C"), ("natural", 0): ("1", "2", "3"), ("natural", 1): ("I", "II", "III"), ("natural", 2): ("first", "second", "third"),
    ("natural", 3): ("(1)", "(2)", "(3)"), ("natural", 4): ("α", "β", "γ"), ("neutral", 0): ("Adams", "Baker", "Clark"),
    ("neutral", 1): ("bar", "pen", "tip"), ("neutral", 2): ("~", "@", "$"), ("unnatural", 0): ("B", "C", "A"), ("unnatural", 1): ("C", "A", "B"),
}  # fmt: skip


@pytest.mark.parametrize("setting", NAMES, ids=lambda one: f"{one[0]}-{one[1]}")
def test_each_name_stands_for_one_option_and_is_read_back(setting):
    kind, which = setting
    assert labels(kind, which, 3) == NAMES[setting]
    assert len(NAMES) == 11
    for count in range(2, MOST + 1):
        names = labels(kind, which, count)
        assert len({name.lower() for name in names}) == count
        for i, name in enumerate(names):
            assert [parse_label(text, names) for text in (name, f"{name}.", f' "{name}"', f"The answer is {name}.")] == [i] * 4
    assert set(SETTINGS) | {ORIGIN} <= set(NAMES)
    assert {kind for kind, _ in NAMES} == set(KINDS)


def test_the_question_says_which_name_to_write_for_each_letter():
    asked, names = relabelled(ASKED, "unnatural", 0)
    assert asked.options == "A. cat\nB. dog\nC. hot dog"
    assert asked.suffix == 'If the answer is A, write "B". If the answer is B, write "C". If the answer is C, write "A".'
    assert (asked.prompt, asked.choices, asked.answer, asked.id) == (ASKED.prompt, ASKED.choices, ASKED.answer, ASKED.id)
    assert names[asked.choices.index(asked.answer)] == "C"
    plain, letters = relabelled(ASKED, *ORIGIN)
    assert (plain.options, letters) == (asked.options, ("A", "B", "C"))
    assert "write" not in plain.suffix
    assert ASKED.suffix == "Answer with one word."  # the example itself is as it was


READ = {  # names: text: which
    ("natural", 0): {"2": 1, "option 2": 1, "(2)": 1, "dog": None, "B": None, "": None, "1 or 2": None, "It is not 2": None},
    ("natural", 1): {"II": 1, "iii": 2, "I": 0, "IV": None, "I or II": None},
    ("natural", 2): {"the second one": 1, "Second": 1, "first or third": None},
    ("neutral", 2): {"~": 0, "I say $": 2, "~@": None, "dog": None},
    ("unnatural", 0): {"C": 1, "(A)": 2, "A dog": None, "dog": None, "The answer is B.": 0, "B or C": None, "": None},
}


@pytest.mark.parametrize("setting", READ, ids=lambda one: f"{one[0]}-{one[1]}")
def test_an_answer_gives_a_name_or_none(setting):
    names = labels(*setting, 3)
    assert {text: parse_label(text, names) for text in READ[setting]} == READ[setting]
    assert sum(map(len, READ.values())) == 27


def test_what_has_no_name_is_refused():
    with pytest.raises(StudyError, match=r"there are no 'netural' names of options .did you mean 'neutral'"):
        labels("netural", 0, 3)
    with pytest.raises(StudyError, match="natural names of options are numbered 0 to 4, and 5 is none of them"):
        labels("natural", 5, 3)
    with pytest.raises(StudyError, match="neutral names 1 are for 1 to 8 options, not for 9"):
        labels("neutral", 1, 9)
    for count in (0, 1, 9):
        asked = Example("z", "x", choices=tuple("abcdefghi"[:count]))
        with pytest.raises(ExampleError, match=f"example 'z' offers {count} choices, and other names are for 2 to 8"):
            relabelled(asked, "natural", 0)
