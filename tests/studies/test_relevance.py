"""The study of relevance: on a stranger that reads the demo's prompts, on toys, and on what cannot be used."""

import numpy as np
import pytest
from typer.testing import CliRunner

from probe import Example, Region, load
from probe.errors import DataError, EditError, StudyError
from probe.relevance import METHODS
from studies.cli import app
from studies.data import Data, load_data
from studies.relevance import relevance
from studies.study import Setting
from tests import toys
from tests.studies import command
from tests.studies.test_lens import numbers


@pytest.fixture(scope="module")
def run(stranger, tmp_path_factory):
    folder = tmp_path_factory.mktemp("relevance") / "r"
    asked = ["study", "relevance", "--model", str(stranger), "--data", "demo", "--limit", "3", "--batch", "2", "--steps", "4", "--out", str(folder),
             "--json", "--quiet"]  # fmt: skip
    return folder, command.last_line(asked), asked


def test_it_says_what_was_asked(run):
    folder, found, _ = run
    assert found["n"] == 3
    assert set(found["mass"]) == set(found["segments"]) == set(METHODS)
    for method in METHODS:
        mass = found["mass"][method]
        assert mass["mass"]["low"] is None or 0 <= mass["mass"]["low"] <= mass["mass"]["high"] <= 1
        assert mass["gain"]["value"] == pytest.approx(mass["mass"]["value"] - mass["area"]["value"])
        assert sum(one["value"] for one in found["segments"][method].values()) == pytest.approx(1)
        for one in found["deletion"][method].values():
            gap = one["highest"]["value"] - one["lowest"]["value"]
            assert one["beyond_lowest"]["value"] == pytest.approx(gap, abs=1e-9)
            assert 0 < one["p"] <= one["q"] <= 1
    assert found["segments"]["integrated-gradients"]["image"]["value"] == pytest.approx(1)
    assert found["gap"]["relative"] < 0.5
    report = (folder / "report.md").read_text()
    assert all(f"| {method} |" in report for method in METHODS)
    assert "nan" not in (folder / "summary.json").read_text().lower()
    assert {path.stem for path in (folder / "figures").glob("*.png")} == {
        "mass", "deletion", "segments", "map-0", "map-1", "map-2"
    }  # fmt: skip


@pytest.mark.slow
def test_asking_again_gives_the_same_bytes(run):
    folder, _, asked = run
    parts = {path: path.read_bytes() for path in (folder / "records").glob("*.parquet")}
    sorted(parts)[1].unlink()
    assert CliRunner().invoke(app, asked).exit_code == 0
    assert {path: path.read_bytes() for path in (folder / "records").glob("*.parquet")} == parts
    assert len(parts) == 2


@pytest.fixture
def undrawn(monkeypatch):
    """Runs without their figures, which take most of the time of a small one."""
    monkeypatch.setattr("studies.relevance_report.figures", lambda *_: [])


@pytest.mark.usefixtures("undrawn")
def test_batches_and_padding_change_nothing(stranger, tmp_path):
    subject, data = load(str(stranger)), load_data("demo", 3)
    found = [
        numbers(relevance(Setting(subject, data, tmp_path / f"{size}{side}", batch=size, padding=side), steps=3, shares="0.2"))
        for size, side in ((1, "left"), (8, "left"), (8, "right"))
    ]
    assert len(found[0]) > 100
    for other in found[1:]:
        np.testing.assert_allclose(found[0], other, atol=1e-4)


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("deletion", ["ablate", "knockout"])
@pytest.mark.parametrize("family", ["llava", "qwen2_vl", "gemma3", "qwen2_audio", "blip2"])
def test_it_runs_on_other_architectures(toy, tmp_path, family, deletion):
    """Without boxes, or without a known place for them, pointing is not said."""
    subject = toy(family)
    examples = list(toys.pair(subject))
    if examples[0].images:
        examples[0] = Example("a", examples[0].prompt, examples[0].images, regions=(Region((5.0, 5.0, 30.0, 25.0), "ball"),))
    found = relevance(
        Setting(subject, Data("toys", tuple(examples), "t"), tmp_path / "r"), steps=2, shares="0.3", deletion=deletion
    )
    assert found["n"] == 2
    assert all((one is not None) == (family not in ("qwen2_audio", "blip2")) for one in found["mass"].values())
    assert "# Relevance" in (tmp_path / "r" / "report.md").read_text()


@pytest.mark.usefixtures("undrawn")
def test_an_example_that_shows_nothing_is_named(toy, tmp_path):
    subject = toy("llava")
    data = Data("toys", (*toys.pair(subject), Example("c", "what is it ?")), "t")
    found = relevance(Setting(subject, data, tmp_path / "r"), methods="attention", shares="0.3")
    assert (found["n"], found["n_skipped"], found["gap"]) == (2, 1, None)
    assert found["skipped"] == ["c: example 'c' shows nothing: it has no picture, video or sound"]


@pytest.mark.usefixtures("undrawn")
def test_what_cannot_be_scored_is_refused(toy, tmp_path):
    subject = toy("llava")
    setting = Setting(subject, Data("toys", tuple(toys.pair(subject)), "t"), tmp_path / "r")
    for asked, message in (
        ({"methods": "rolout"}, "there is no method 'rolout'"), ({"deletion": "zero"}, "there is no deletion 'zero'"),
        ({"baseline": "blur"}, "there is no baseline 'blur'"), ({"shares": "a"}, "shares are numbers"), ({"shares": "2"}, "lie between 0 and 1"),
        ({"fusion": "sum"}, "there is no fusion 'sum'"),
    ):  # fmt: skip
        with pytest.raises(StudyError, match=message):
            relevance(setting, **asked)
    assert not (tmp_path / "r").exists()
    blind = Data("toys", (Example("a", "what is it ?"),), "t")
    with pytest.raises(DataError, match=r"none of the 1 examples could be used; the first: .* shows nothing"):
        relevance(Setting(subject, blind, tmp_path / "blind"))
    hybrid = toy("qwen3_5")
    data = Data("toys", tuple(toys.pair(hybrid)), "t")
    with pytest.raises(EditError, match="mixes positions without softmax attention"):
        relevance(Setting(hybrid, data, tmp_path / "hybrid"))
    found = relevance(Setting(hybrid, data, tmp_path / "gradients"), methods="gradient-input", shares="0.3")
    assert found["n"] == 2
    crossing = toy("mllama")
    with pytest.raises(DataError, match="is not in the sequence of this"):
        relevance(Setting(crossing, Data("toys", tuple(toys.pair(crossing)), "t"), tmp_path / "crossing"))
