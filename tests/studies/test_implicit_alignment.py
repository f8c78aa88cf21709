"""The study of implicit alignment on the demo models and on toys."""

import json

import numpy as np
import pyarrow as pa
import pytest
from typer.testing import CliRunner

from probe import Example, load
from probe.analysis.stats import wilson
from probe.errors import DataError, StudyError
from studies.cli import app
from studies.data import Data, load_data
from studies.demo.family import load_member, members
from studies.implicit_alignment import implicit_alignment
from studies.implicit_alignment_report import _members
from studies.study import Setting
from tests import toys


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("alignment") / "r"
    asked = ["study", "implicit-alignment", "--model", "demo:frozen", "--data", "demo", "--limit", "12", "--family", "demo,demo:frozen,demo:frozen@0,demo:frozen@500",
             "--family-limit", "8", "--modalities", "image,text", "--out", str(folder), "--json", "--quiet"]  # fmt: skip
    result = CliRunner().invoke(app, asked)
    assert result.exit_code == 0, result.output
    return folder, json.loads(result.stdout.strip().splitlines()[-1]), asked


def test_it_says_what_was_asked(run):
    folder, found, _ = run
    assert found["run"] == str(folder)
    assert found["n"] == 24
    assert {m: set(readings) for m, readings in found["score"].items()} == {m: {"input", "same"} for m in ("image", "text")}
    for readings in found["score"].values():
        for one in readings.values():
            assert -1 <= one["low"] <= one["value"] <= one["high"] <= 1
    assert len(found["matched"]) == len(found["unmatched"]) == len(found["p_value"]) == 9
    assert all(0 < p <= 1 for p in found["p_value"])
    assert found["chance_iou"] == pytest.approx(1 / 3)
    assert found["chance_iou"] < found["iou"] < 1
    assert found["weights"]["n_matrices"] == 8 * 7
    assert set(found["correlation"]) == {
        f"{r} and {s}" for r in ("input", "same") for s in ("accuracy", "existence", "hallucination")
    }
    assert found["correlation"]["same and accuracy"]["n"] == 4
    report = (folder / "report.md").read_text()
    assert all(f"| {i}. " in report for i in range(1, 5))
    assert "nan" not in (folder / "summary.json").read_text().lower().replace("nance", "")
    assert {path.name for path in (folder / "figures").glob("*.png")} == {
        f"{name}.png" for name in ("alignment", "inside-the-block", "norms-and-drift", "plane", "score-and-skill", "spaces", "vocabulary", "weights")
    }  # fmt: skip


def test_asking_again_gives_the_same_bytes(run):
    folder, _, asked = run
    parts = {path: path.read_bytes() for path in (folder / "records").glob("*.parquet")}
    lost = sorted(parts)[1]
    lost.unlink()
    assert CliRunner().invoke(app, asked).exit_code == 0
    assert {path: path.read_bytes() for path in (folder / "records").glob("*.parquet")} == parts
    assert len(parts) == 2 * 2 + 4


def test_batches_change_nothing(tmp_path):
    subject, data = load("demo:frozen"), load_data("demo", 9)
    found = [
        implicit_alignment(Setting(subject, data, tmp_path / str(size), batch=size), modalities="image", family="none")
        for size in (1, 8)
    ]
    for key in ("matched", "unmatched"):
        np.testing.assert_allclose(found[0][key], found[1][key], atol=1e-5)
    assert found[0]["iou"] == pytest.approx(found[1]["iou"], abs=1e-3)
    np.testing.assert_allclose(
        found[0]["modalities"]["image"]["within"]["textual"], found[1]["modalities"]["image"]["within"]["textual"], atol=1e-5
    )
    assert found[0]["correlation"] is None


@pytest.mark.parametrize("family", ["qwen2_audio", "mllama", "qwen3_5", "blip2", "gemma4"])
def test_it_runs_on_other_architectures(toy, tmp_path, family):
    subject = toy(family)
    examples = toys.pair(subject)
    data = Data("toys", tuple(examples), "t")
    if family == "mllama":  # its picture is not in the sequence: there are no perceptual tokens there
        with pytest.raises(
            DataError, match=r"none of the 2 image examples could be used; the first: .* no tokens of the image"
        ):
            implicit_alignment(Setting(subject, data, tmp_path / "r"), family="none")
        return
    found = implicit_alignment(Setting(subject, data, tmp_path / "r"), family="none")
    assert found["n"] == 2
    assert len(found["matched"]) == subject.n_layers + 1


def test_what_cannot_be_compared_is_refused(toy, tmp_path):
    subject = toy("llava")
    data = Data("toys", (Example("a", "what is it ?"),), "t")
    with pytest.raises(StudyError, match="there is no modality 'smell'"):
        implicit_alignment(Setting(subject, data, tmp_path / "r"), modalities="smell")
    with pytest.raises(DataError, match="toys has no example that shows audio"):
        implicit_alignment(Setting(subject, data, tmp_path / "r"), modalities="audio")
    with pytest.raises(DataError, match="toys shows nothing and has no context"):
        implicit_alignment(Setting(subject, data, tmp_path / "r"))
    with pytest.raises(StudyError, match="a sparsity lies between 0 and 1, not at 2"):
        implicit_alignment(Setting(subject, data, tmp_path / "r"), sparsity=2.0)
    with pytest.raises(StudyError, match="needs at least three"):
        implicit_alignment(Setting(load("demo"), load_data("demo", 2), tmp_path / "r"), family="demo,demo:frozen")
    assert not (tmp_path / "r").exists()


def test_the_family_is_the_training_of_the_frozen_model():
    found = members()
    assert found[-2:] == ["demo:frozen", "demo"]
    assert len(found) >= 6
    first, last = load_member(found[0]), load_member("demo:frozen")
    before, after = first.model.state_dict(), last.model.state_dict()
    changed = {name.split(".")[1] for name in before if not before[name].equal(after[name])}
    assert changed == {"vision_tower", "multi_modal_projector"}


def test_a_member_that_is_always_right_or_wrong_has_an_interval():
    """24 of 24 is no certainty: skills are proportions, with Wilson's interval; scores are means."""
    skills = {
        "accuracy": [1.0] * 24,
        "existence": [1.0, 0.0] * 12,
        "hallucination": [0.0] * 24,
        "input": [0.1, 0.3],
        "same": [0.2, 0.2],
    }
    rows = pa.Table.from_pylist(
        [{"what": "member", "example": "one", "key": key, "values": values} for key, values in skills.items()]
    )
    (one,) = _members(rows, 0)["members"]
    for key, hits in (("accuracy", 24), ("existence", 12), ("hallucination", 0)):
        assert (one[key]["low"], one[key]["high"]) == wilson(hits, 24)
    assert (one["input"]["low"], one["input"]["high"]) == (0.1, 0.3)
    assert (one["same"]["value"], one["same"]["low"]) == (0.2, None)
