"""The study of choices: both ways on the same items, whatever the batch, and what it refuses."""

import io
import re

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from scipy.stats import binomtest

from probe import Example, load
from probe.analysis.stats import wilson
from probe.errors import DataError, StudyError
from studies.data import Data, load_data
from studies.multiple_choice import multiple_choice
from studies.multiple_choice_report import _blind_words
from studies.study import Setting
from studies.tasks.scores_mmevalpro import PARTS
from tests import toys
from tests.studies.test_pope import numbers


@pytest.fixture(scope="module")
def subject(stranger):
    return load(stranger, device="cpu")


@pytest.fixture(scope="module")
def done(subject, tmp_path_factory):
    out = tmp_path_factory.mktemp("choice") / "r"
    return out, multiple_choice(Setting(subject, load_data("demo", 10), out, batch=8), max_new_tokens=3)


def test_the_summary(done):
    out, found = done
    assert (found["n"], found["chance"]) == (10, 0.5)
    assert found["by_reduce"]["mean"]["value"] == found["accuracy"]["likelihood"]["value"]
    for way in ("generation", "likelihood"):
        turned = found["turned"][way]
        assert turned["circular"]["value"] <= turned["accuracy"]["value"]
        assert len(turned["places"]) == 2
    assert sum(one["value"] for one in found["turned"]["likelihood"]["places"]) == pytest.approx(1)
    assert sum(one["n"] for one in found["bins"]) == 10
    assert 0.5 <= found["confidence"]["value"] <= 1
    assert found["blind"]["likelihood"]["n"] == 10
    rows = pa.concat_tables([pq.read_table(path) for path in sorted((out / "records").glob("*.parquet"))]).to_pylist()
    for way, gain in found["gain"].items():
        assert gain["value"] == pytest.approx(found["accuracy"][way]["value"] - found["blind"][way]["value"])
        if gain["low"] is None:  # every question changed alike, or none did
            assert gain["value"] in (-1.0, 0.0, 1.0)
        else:
            assert gain["low"] <= gain["value"] <= gain["high"]
        assert gain["n"] == 10
    right = [
        {row["example"]: row["chosen"] == row["right"] for row in rows if row["what"] == what} for what in ("asked", "blind")
    ]
    turned = [right[0][name] for name in right[0] if right[0][name] != right[1][name]]
    assert found["gain"]["generation"]["p"] == pytest.approx(binomtest(sum(turned), len(turned)).pvalue if turned else 1.0)
    assert "NaN" not in (out / "summary.json").read_text()
    report = (out / "report.md").read_text()
    for name in ("accuracy", "calibration", "places", "kinds"):
        assert (out / f"figures/{name}.png").stat().st_size > 5000
        assert f"figures/{name}.png" in report


@pytest.mark.parametrize(("batch", "padding"), [(1, "left"), (8, "right")])
def test_batch_and_padding_change_nothing(done, subject, tmp_path, batch, padding):
    setting = Setting(subject, load_data("demo", 10), tmp_path / "r", batch=batch, padding=padding)
    first, second = numbers(done[1]), numbers(multiple_choice(setting, max_new_tokens=3))
    assert first.keys() == second.keys()
    assert len(first) > 100
    for name, value in first.items():
        assert second[name] == pytest.approx(value, abs=1e-4), name


def test_a_letter_is_understood_and_rotations_are_undone(toy, tmp_path, monkeypatch):
    """A model that always writes the letter of the right option, wherever it stands, is right in every order."""
    subject = toy("llava")
    choices = ("red", "green", "blue")
    asked = tuple(
        Example(
            f"e{i}",
            "what color ?",
            (toys.picture(seed=i),),
            answer=choices[i],
            choices=choices,
            options="A. red\nB. green\nC. blue",
        )
        for i in range(3)
    )

    def knows(encoded, max_new_tokens):
        return [
            next(line[0] for line in e.options.splitlines() if line.endswith(e.answer)) if e.images else "dunno"
            for e in encoded.examples
        ]

    monkeypatch.setattr(subject, "generate", knows, raising=False)
    found = multiple_choice(Setting(subject, Data("toys", asked, "1"), tmp_path / "r"))
    assert found["accuracy"]["generation"]["value"] == found["turned"]["generation"]["circular"]["value"] == 1
    assert [round(one["value"], 6) for one in found["turned"]["generation"]["places"]] == [round(1 / 3, 6)] * 3
    assert found["blind"]["generation"]["value"] == 0
    assert found["gain"]["generation"] == {"value": 1.0, "low": None, "high": None, "p": 0.25, "n": 3}

    monkeypatch.setattr(subject, "generate", lambda encoded, n: ["A"] * len(encoded))
    first = multiple_choice(Setting(subject, Data("toys", asked, "1"), tmp_path / "q"), blind=False)
    assert [one["value"] for one in first["turned"]["generation"]["places"]] == [1, 0, 0]
    assert first["turned"]["generation"]["circular"]["value"] == 0
    assert first["turned"]["generation"]["accuracy"]["value"] == pytest.approx(1 / 3)


def packed(folder):
    """MMEvalPro's files: two whole triplets of MMMU, one of MathVista, and one of it without its last question."""
    out = io.BytesIO()
    toys.picture().save(out, "PNG")
    rows = [
        {"index": f"{source}-{number}-{part}", "triplet_id": number, "question": f"what color {number} ?", "choices": ["red", "green", "blue"], "answer": "B",
         "image": {"bytes": out.getvalue(), "path": None}, "source": source, "question_category": "art", "eval_type": part}
        for source, number in (("MMMU", 1), ("MMMU", 2), ("MathVista", 1), ("MathVista", 3)) for part in PARTS
    ]  # fmt: skip
    pq.write_table(pa.Table.from_pylist(rows[:-1]), folder / "test-00000.parquet")
    return load_data(f"mmevalpro:{folder}")


def test_triplets_are_scored_where_the_data_has_them(toy, tmp_path, monkeypatch):
    """A model that is wrong in one knowledge question of MMMU, and right in all others."""
    subject, data = toy("llava"), packed(tmp_path)

    def knows(encoded, n):
        return ["A" if e.id == "MMMU-2-Knowledge" or not e.images else "B" for e in encoded.examples]

    monkeypatch.setattr(subject, "generate", knows, raising=False)
    found = multiple_choice(Setting(subject, data, tmp_path / "r", batch=4), rotate=False)
    triplets = found["triplets"]
    assert (triplets["n"], triplets["incomplete"], triplets["chance_genuine"]) == (3, ["MathVista/3"], pytest.approx(1 / 27))
    micro, macro = (triplets["generation"][of] for of in ("micro", "macro"))
    assert {name: one["value"] for name, one in micro.items()} == pytest.approx({
        "AA": 8 / 9, "OA": 1, "PA": 1, "KA": 2 / 3, "GA": 2 / 3, "CG": 1 / 3, "PC": 1, "KC": 2 / 3,
    })  # fmt: skip
    assert (macro["GA"]["value"], macro["CG"]["value"], macro["KC"]["value"]) == (3 / 4, 1 / 4, 3 / 4)
    assert (micro["GA"]["n"], micro["GA"]["n_dropped"], macro["GA"]["n"], macro["GA"]["denominator"]) == (3, 1, 3, 2)
    assert (micro["GA"]["low"], micro["GA"]["high"]) == wilson(2, 3)
    assert {name: one["GA"]["value"] for name, one in triplets["generation"]["sources"].items()} == {
        "MMMU": 0.5,
        "MathVista": 1.0,
    }
    for way in ("generation", "likelihood"):
        for of in (triplets[way]["micro"], triplets[way]["macro"]):
            assert of["CG"]["value"] == pytest.approx(of["OA"]["value"] - of["GA"]["value"])
            assert of["GA"]["value"] <= min(of[name]["value"] for name in ("OA", "PA", "KA"))
    report = (tmp_path / "r/report.md").read_text()
    assert "## Right for the right reason" in report
    assert "| MMMU | 2 | 0.500 [" in report
    assert "1 triplets were left out, as not each of their three questions was asked once: MathVista/3." in report


def test_data_without_triplets_or_other_names_says_nothing_of_them(done):
    out, found = done
    assert (found["triplets"], found["renamed"]) == (None, None)
    report = (out / "report.md").read_text()
    assert "right reason" not in report
    assert "Other names" not in report


def test_other_names_are_asked_for_and_scored(toy, tmp_path, monkeypatch):
    """A model that writes what it is told to write for the right letter, but letters where they are turned and nothing where names are people's."""
    subject = toy("llava")
    choices = ("red", "green", "blue")
    asked = tuple(
        Example(f"e{i}", "what color ?", (toys.picture(seed=i),), answer=choices[i], choices=choices) for i in range(3)
    )
    many = Example("many", "what color ?", (toys.picture(),), answer="a", choices=tuple("abcdefghi"))

    def obeys(encoded, n):
        return [_obeyed(example) for example in encoded.examples]

    monkeypatch.setattr(subject, "generate", obeys, raising=False)
    setting = Setting(subject, Data("toys", (*asked, many), "1"), tmp_path / "r")
    found = multiple_choice(setting, rotate=False, blind=False, relabel=True)["renamed"]
    assert (found["n"], found["chance"]) == (3, pytest.approx(1 / 3))  # nine options have no names in some lists
    told = found["generation"]
    assert told["letters"]["value"] == 1
    assert {name: told[name]["mr"]["value"] for name in ("natural 2", "neutral 0", "neutral 1", "unnatural 0")} == {
        "natural 2": 1, "neutral 0": 0, "neutral 1": 1, "unnatural 0": 0,
    }  # fmt: skip
    assert told["neutral"]["unknown"]["value"] == 0.5
    assert told["all"]["mr"]["value"] == told["all"]["accuracy"]["value"] == pytest.approx((1 + 0.5 + 0) / 3)
    rows = pa.concat_tables([pq.read_table(path) for path in sorted((tmp_path / "r/records").glob("*.parquet"))]).to_pylist()
    assert sum(row["what"] == "renamed" for row in rows) == 3 * 7
    for row in (row for row in rows if row["what"] == "renamed"):
        assert len(row["sums"]) == len(row["tokens"]) == 3
    report = (tmp_path / "r/report.md").read_text()
    assert "## Other names for the options" in report
    assert "| all, by generation | 0.500 [" in report


def _obeyed(example):
    letter = next((line[0] for line in example.options.splitlines() if line.endswith(f" {example.answer}")), "?")
    name = re.search(rf'is {letter}, write "(.*?)"', example.suffix)
    if name is None or name[1] in "ABC":
        return letter
    return "no idea" if name[1] in ("Adams", "Baker", "Clark") else name[1]


def test_questions_with_and_without_a_picture_can_stand_in_one_batch(subject, tmp_path):
    """As in ScienceQA; each is asked as it comes, and the numbers are those of a batch of one."""
    cases = [
        Example(f"q{i}", "color of star", (toys.picture(128, 128, i),) if i % 2 else (), answer="red", choices=("red", "blue"))
        for i in range(4)
    ]
    runs = [
        multiple_choice(
            Setting(subject, Data("mixed", tuple(cases), "1"), tmp_path / str(batch), batch=batch), max_new_tokens=2
        )
        for batch in (4, 1)
    ]
    first, second = map(numbers, runs)
    assert (runs[0]["n"], runs[0]["blind"]["likelihood"]["n"]) == (4, 2)  # two have a picture that can be left out
    assert first == pytest.approx(second, abs=1e-4)


def test_what_cannot_be_chosen_is_named(subject, tmp_path):
    asked = Example("a", "color of star", (toys.picture(128, 128),), answer="red", choices=("red", "blue"))
    cases = [asked, Example("b", "x", answer="red"), Example("c", "x", answer="red", choices=("green", "blue")),
             Example("d", "x", answer="red", choices=("red", "Red"))]  # fmt: skip
    found = multiple_choice(Setting(subject, Data("mine", tuple(cases), "1"), tmp_path / "r"), rotate=False, max_new_tokens=2)
    assert (found["n"], found["n_skipped"], found["turned"]) == (1, 3, None)
    for text in ("offers 0 choices", "is not among its choices", "offers a choice twice"):
        assert any(text in line for line in found["skipped"])
    with pytest.raises(DataError, match="none of the 1 examples could be used"):
        multiple_choice(Setting(subject, Data("mine", (cases[1],), "1"), tmp_path / "q"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reduce": "max"}, "no way 'max' to make one number"),
        ({"show": "leters"}, "did you mean 'letters'"),
        ({"spelling": "all"}, "there is no spelling 'all'"),
    ],
)
def test_wrong_options_write_nothing(subject, tmp_path, options, message):
    with pytest.raises(StudyError, match=message):
        multiple_choice(Setting(subject, load_data("demo", 2), tmp_path / "r"), **options)
    assert not (tmp_path / "r").exists()


def test_what_needs_no_picture_is_said_only_above_guessing():
    gain = {"value": 0.4, "low": 0.2, "high": 0.6, "p": 0.001, "n": 40}
    blind = {"value": 0.55, "low": 0.4, "high": 0.7}
    summary = {
        "chance": 0.5,
        "blind": {"generation": blind, "likelihood": blind},
        "gain": {"generation": gain, "likelihood": gain},
    }
    assert "nothing is shown to need no picture" in _blind_words(summary)
    summary["blind"]["likelihood"] = {"value": 0.7, "low": 0.55, "high": 0.85}
    said = _blind_words(summary)
    assert "By likelihood some of it needs no picture" in said
    assert "McNemar p = 0.001" in said
