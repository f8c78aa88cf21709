"""The study of choices: both ways on the same items, whatever the batch, and what it refuses."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from scipy.stats import binomtest

from probe import Example, load
from probe.errors import DataError, StudyError
from studies.data import Data, load_data
from studies.multiple_choice import multiple_choice
from studies.multiple_choice_report import _blind_words
from studies.study import Setting
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
