"""The three studies that read attention: on a model like the demo's, on other architectures, and where they must refuse."""

import json
from dataclasses import replace

import numpy as np
import pytest

from probe import Example, Region, load
from probe.errors import DataError, EditError, StudyError
from studies.attention_shift import attention_shift
from studies.attention_sinks import attention_sinks
from studies.data import Data, load_data
from studies.demo.data import examples, furnished
from studies.image_attention import image_attention
from studies.run import Run
from studies.study import Setting
from tests import toys

STUDIES = {"shift": attention_shift, "sinks": attention_sinks, "image": image_attention}
OPTIONS = {"shift": {}, "sinks": {"tau": 1.5, "count": 2, "draws": 2}, "image": {"questions": "all", "max_new_tokens": 2}}
FIGURES = {
    "shift": {"attention-by-layer", "attention-shift"}, "sinks": {"sink-scores", "heads", "hiding"},
    "image": {"image-attention", "detection", "heads"},
}  # fmt: skip
CASES = [(name, family) for name in STUDIES for family in ("qwen2_vl", "qwen2_audio", "qwen3_5")]


@pytest.fixture(scope="module")
def subject(stranger):
    return load(stranger, device="cpu")


@pytest.fixture(scope="module")
def data(subject):
    """Questions of the demo; the answer of every second one is what the model will say, so that there are both sorts."""
    made = list(load_data("demo", 10).examples)
    told = subject.generate(made, 2)
    answers = [text if i % 2 else "nothing" for i, text in enumerate(told)]
    assert not {"yes", "no", ""} & set(answers)
    asked = tuple(replace(e, answer=answer, tags={}) for e, answer in zip(made, answers, strict=True))
    return Data("asked", asked, "1")


@pytest.fixture
def undrawn(monkeypatch):
    """Figures are made and not written."""
    monkeypatch.setattr(Run, "figure", lambda self, name, paper, page: None)


@pytest.fixture(scope="module")
def done(subject, data, tmp_path_factory):
    broken = (Example("blind", "what is it ?", answer="yes"), Example("gone", "what is it ?", ("nowhere.png",), answer="yes"))
    both = Data(data.name, (*data.examples, *broken), data.fingerprint)
    folder = tmp_path_factory.mktemp("attention")
    return {
        name: (folder / name, study(Setting(subject, both, folder / name, batch=4), **OPTIONS[name]))
        for name, study in STUDIES.items()
    }


def _numbers(value, path=""):
    """Every number of a summary, by where it stands."""
    if isinstance(value, dict):
        return {k: v for key, item in value.items() for k, v in _numbers(item, f"{path}/{key}").items()}
    if isinstance(value, list | tuple):
        return {k: v for i, item in enumerate(value) for k, v in _numbers(item, f"{path}/{i}").items()}
    return {path: value} if isinstance(value, int | float) and not isinstance(value, bool) else {}


@pytest.mark.parametrize("name", STUDIES)
def test_a_study_says_what_it_found(done, name):
    folder, found = done[name]
    assert (found["run"], found["n"], found["n_skipped"]) == (str(folder), 10, 2)
    assert "example 'blind' has no picture, video or sound" in found["skipped"][0]
    assert json.loads((folder / "run.json").read_text())["status"] == "done"
    assert {path.stem for path in (folder / "figures").glob("*.png")} == FIGURES[name]
    report = (folder / "report.md").read_text()
    assert all(f"figures/{figure}.png" in report for figure in FIGURES[name])
    assert "2 examples could not be used" in report
    assert "nan" not in report.lower().split()
    assert all(np.isfinite(v) for v in _numbers(json.loads((folder / "summary.json").read_text())).values())


def test_shift_is_within_its_bounds(done):
    found = done["shift"][1]
    assert found["n_layers"] == 8
    assert not found["few_layers"]
    for one in (found["shift"], found["shift_without_first"]):
        assert 0 <= one["low"] <= one["value"] <= one["high"] <= 2
        assert one["shuffled"]["low"] < 1 < one["shuffled"]["high"]
        assert one["n"] == 10 - one["n_constant"]
    masses = sum(np.array(found["laws"][key]["mean"]) for key in ("before", "shown", "after"))
    np.testing.assert_allclose(masses, 1, atol=1e-5)
    assert found["positions"]["shown"] == 64


def test_sinks_are_hidden_beside_as_many_others(done):
    found = done["sinks"][1]
    assert found["n_with_sinks"] > 0
    assert found["cause"]["nothing"]["log_prob"]["value"] == pytest.approx(0, abs=1e-5)
    assert found["cause"]["everything"]["n"] == 10
    assert found["paired"]["highest"]["log_prob"]["difference"]["n"] == 10
    for name in ("sinks", "highest"):
        paired = found["paired"][name]["log_prob"]
        assert paired["difference"]["value"] == pytest.approx(paired["own"]["value"] - paired["random"]["value"], abs=1e-9)
        assert 0 < paired["p_value"] <= 1
    assert 0 < found["place"]["highest"]["chance"]["value"] < 1
    falling = found["by_threshold"]["shown"]["mean"]
    assert falling == sorted(falling, reverse=True)


def test_a_threshold_that_nothing_reaches_is_said(subject, data, tmp_path, undrawn):
    found = attention_sinks(Setting(subject, data, tmp_path / "r"), tau=30.0, dimensions="3,9", draws=1)
    assert found["n_with_sinks"] == 0
    assert found["dimensions"] == [3, 9]
    assert found["paired"]["sinks"] is None
    assert found["paired"]["highest"] is not None
    assert "**No sinks**" in (tmp_path / "r" / "report.md").read_text()


def test_wrong_answers_are_told_or_not(done):
    found = done["image"][1]["comparisons"]["wrong"]
    assert found["n_detected"] + found["n_beside"] == 10
    assert min(found["n_detected"], found["n_beside"]) >= 5
    assert set(found["detected"]) == {"early", "middle", "late", "all", "answer"}
    for one in found["detected"].values():
        assert 0 <= one["low"] <= one["auroc"] <= one["high"] <= 1
        assert one["base"] == found["n_detected"] / 10
    assert np.array(found["q"]).shape == np.array(found["difference"]).shape == (8, 4)
    assert found["n_tests"] == 32


def test_existence_on_the_demo_is_asked_as_often_as_there_were_examples(subject, tmp_path, undrawn):
    found = image_attention(Setting(subject, load_data("demo", 6), tmp_path / "r"), max_new_tokens=1)
    assert found["n"] == 6
    assert found["existence"]
    assert "invented" in found["comparisons"]
    assert all(one["detected"] is None for one in found["comparisons"].values())  # six are too few
    assert sum(found["comparisons"]["wrong"][key] for key in ("all_detected", "all_beside")) == 6
    assert "**Not tested**" in (tmp_path / "r" / "report.md").read_text()


@pytest.mark.parametrize("name", STUDIES)
def test_batches_and_padding_change_nothing(subject, data, tmp_path, name, undrawn):
    ways = [Setting(subject, data, tmp_path / f"{batch}-{side}", batch=batch, padding=side) for batch, side in ((1, "left"), (8, "right"))]  # fmt: skip
    first, second = (_numbers({**STUDIES[name](way, **OPTIONS[name]), "run": ""}) for way in ways)
    assert first.keys() == second.keys()
    assert len(first) > 100
    # a p-value or a rank may change by one of its steps where two numbers are equal to rounding
    steps = ("p_value", "/p", "q/", "correlation", "n_clear")
    for key, value in first.items():
        tolerance = 0.02 if any(step in key for step in steps) else 2e-3 if "relative" in key else 3e-4
        assert second[key] == pytest.approx(value, abs=tolerance), key


def test_every_case_is_there():
    assert len(CASES) == 9


@pytest.mark.parametrize(("name", "family"), CASES)
def test_other_architectures(toy, tmp_path, name, family, undrawn):
    subject = toy(family)
    made = [replace(e, answer="yes", context="a dog in the park .") for e in toys.pair(subject)]
    setting = Setting(subject, Data("toys", tuple(made), "t"), tmp_path / "r")
    if (name, family) == ("shift", "qwen3_5"):  # one of its layers attends
        with pytest.raises(StudyError, match="takes at least 3 with attention: this model has 1"):
            attention_shift(setting)
        return
    options = OPTIONS[name] | ({"method": "naive"} if (name, family) == ("sinks", "qwen3_5") else {})
    assert STUDIES[name](setting, **options)["n"] == 2


@pytest.mark.parametrize("name", STUDIES)
def test_a_crossed_picture_is_refused_by_name(toy, tmp_path, name):
    subject = toy("mllama")
    with pytest.raises(EditError, match="has its picture in layers of their own"):
        STUDIES[name](Setting(subject, Data("toys", tuple(toys.pair(subject)), "t"), tmp_path / "r"))
    assert not (tmp_path / "r").exists()


def test_what_was_asked_wrongly_is_refused(subject, data, tmp_path, undrawn):
    setting = Setting(subject, data, tmp_path / "r")
    for study, options, sentence in (
        (attention_shift, {"rows": "before"}, "there is no group of rows 'before'"),
        (attention_sinks, {"dimensions": "one"}, "dimensions are numbers separated by commas, not 'one'"),
        (attention_sinks, {"dimensions": "3,5000"}, "dimensions run from 0 to 127, not 3 to 5000"),
        (attention_sinks, {"method": "fast"}, "there is no method 'fast'"),
        (attention_sinks, {"tau": 0.0}, "a threshold lies above 0"),
        (image_attention, {"questions": "some"}, "there are no questions 'some'"),
        (image_attention, {"middle_start": 0.7}, "the middle layers are shares from 0 to 1"),
    ):
        with pytest.raises(StudyError, match=sentence):
            study(setting, **options)
    with pytest.raises(StudyError, match="asked has no question that is answered yes or no"):
        image_attention(setting, questions="existence")
    assert not (tmp_path / "r").exists()
    blind = Data("blind", (Example("a", "what is it ?", answer="yes"),), "3")
    for name, study in STUDIES.items():
        with pytest.raises(DataError, match=r"none of the 1 examples could be used; the first: .*no picture, video or sound"):
            study(Setting(subject, blind, tmp_path / name))


def test_text_before_the_picture_is_needed(toy, tmp_path):
    """PaliGemma's prompt begins with the picture: nothing stands before it."""
    subject = toy("paligemma")
    with pytest.raises(DataError, match="has no text before what is shown"):
        attention_shift(Setting(subject, Data("toys", tuple(toys.pair(subject)), "t"), tmp_path / "r"))


def test_pairs_leave_the_shift_as_it_is(subject, data, tmp_path, undrawn):
    few = Data("few", data.examples[:4], "4")
    plain, paired, everything = (
        attention_shift(Setting(subject, few, tmp_path / name), rows=rows, per_pair=pairs)
        for name, rows, pairs in (("a", "after", False), ("b", "after", True), ("c", "all", False))
    )
    assert paired["shift"]["value"] == pytest.approx(plain["shift"]["value"], abs=1e-5)
    # seven words before are seen by every row after: as many pairs as seven times the rows
    np.testing.assert_allclose(np.array(paired["laws"]["before"]["mean"]) * 7, plain["laws"]["before"]["mean"], rtol=1e-4)
    masses = sum(np.array(everything["laws"][key]["mean"]) for key in ("before", "shown", "after"))
    np.testing.assert_allclose(masses, 1, atol=1e-5)
    assert everything["laws"]["before"]["mean"] != plain["laws"]["before"]["mean"]


def test_every_thing_of_a_demo_picture_has_a_region():
    example = examples(1)[0]
    full = furnished(example)
    assert {region.box for region in example.regions} <= {region.box for region in full.regions}
    assert 3 <= len(full.regions) <= 7
    other = Example("a", "what is it ?", (toys.picture(),), regions=(Region((0.0, 0.0, 5.0, 5.0)),))
    assert furnished(other) is other
