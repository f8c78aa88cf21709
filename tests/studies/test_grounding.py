"""The study of grounding on the demo world, on a stranger to it, and on toys with other grids."""

import json

import numpy as np
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from probe import Example, Region, load
from probe.errors import DataError, StudyError
from probe.grounding import Target
from studies.cli import app
from studies.data import Data, load_data
from studies.grounding import grounding, split
from studies.grounding_training import fresh_examples
from studies.grounding_units import Usable
from studies.study import Setting
from studies.telling import above
from tests import toys
from tests.studies import command

CHEAP = {"mask_head": False, "generic": "what is there ?"}


@pytest.fixture(scope="module")
def run(stranger, tmp_path_factory):
    folder = tmp_path_factory.mktemp("grounding") / "r"
    asked = ["study", "grounding", "--model", str(stranger), "--data", "demo", "--limit", "12", "--train-scenes", "12", "--epochs", "2",
             "--generic", "what is there ?", "--out", str(folder), "--json", "--quiet"]  # fmt: skip
    return folder, command.last_line(asked), asked


@pytest.fixture
def undrawn(monkeypatch):
    """Studies whose numbers alone are looked at need no figures."""
    monkeypatch.setattr("studies.grounding_report.figures", lambda *_: None)


def _numbers(value):
    if isinstance(value, dict):
        for item in value.values():
            yield from _numbers(item)
    elif isinstance(value, list):
        for item in value:
            yield from _numbers(item)
    elif isinstance(value, float):
        yield value


def test_it_says_what_was_asked(run):
    folder, found, _ = run
    assert found["run"] == str(folder)
    assert found["n"] + found["n_selection"] + found["n_skipped"] == 12
    assert found["n_phrases"] >= found["n"] == found["n_scenes"]
    assert set(found["methods"]) == {
        *(f"{kind}, {source}" for kind in ("one head", "localisation heads", "all heads") for source in ("word", "last")),
        "relative, last", "mask head, word", "centred box", "random map",
    }  # fmt: skip
    for name in found["methods"]:
        for one in (*found["methods"][name].values(), *found["null"][name].values()):
            assert one["low"] is None or 0 <= one["low"] <= one["value"] <= one["high"] <= 1
            assert one["n"] == found["n"]
        assert all(
            found[part][name][metric]["low"] is not None for part in ("methods", "null") for metric in ("hit", "pointing")
        )
    assert found["gain_over_centred_box"] == found["gains"]["one head, word"]["centred box"]["iou"]
    assert np.array(found["heads"]["word"]["auc"]).shape == (8, 4)
    assert found["training"]["scenes"] == 12
    assert len(found["training"]["loss"]) == 2
    assert all(np.isfinite(list(_numbers(found))))
    report = (folder / "report.md").read_text()
    assert "nan" not in report.lower().replace("nance", "")
    assert "no scene is in both" in report
    gap = found["against_null"]["one head, word"]["auc"]
    assert ("finds its object: its AUC" in report) == above(gap)
    assert "Beside the last position's attention, averaged over all heads and layers, it is" in report
    assert {path.name for path in (folder / "figures").glob("*.png")} == {
        f"{name}.png" for name in ("overlays", "scores", "heads", "by-layer")
    }


def test_heads_and_scores_come_from_different_scenes(run):
    folder, found, _ = run
    rows = [row for path in (folder / "records").glob("*.parquet") for row in pq.read_table(path).to_pylist()]
    chosen = {row["scene"] for row in rows if row["what"] == "selection"}
    scored = {row["scene"] for row in rows if row["what"] in ("score", "auc")}
    assert len(chosen) == found["n_selection_scenes"]
    assert len(scored) == found["n_scenes"]
    assert not chosen & scored


def test_asking_again_gives_the_same_bytes(run, undrawn):
    folder, _, asked = run
    parts = {path: path.read_bytes() for path in (folder / "records").glob("*.parquet")}
    for lost in (path for path in parts if "scored" in path.name):
        lost.unlink()
    assert CliRunner().invoke(app, asked).exit_code == 0
    assert {path: path.read_bytes() for path in (folder / "records").glob("*.parquet")} == parts
    assert CliRunner().invoke(app, asked).exit_code == 0  # nothing left to read: the mask head is not trained again
    assert {path: path.read_bytes() for path in (folder / "records").glob("*.parquet")} == parts


def test_batches_and_padding_change_nothing(stranger, tmp_path, undrawn):
    subject, data = load(str(stranger)), load_data("demo", 8)
    settings = [("left", 1), ("left", 3), ("right", 3)]
    found = [
        grounding(Setting(subject, data, tmp_path / f"{side}{size}", batch=size, padding=side), **CHEAP) for side, size in settings
    ]  # fmt: skip
    for other in found[1:]:
        assert other["chosen"] == found[0]["chosen"]
        for source in ("word", "last"):
            np.testing.assert_allclose(other["heads"][source]["auc"], found[0]["heads"][source]["auc"], atol=2e-4)
        for name, one in found[0]["methods"].items():
            for metric in ("auc", "iou", "pointing"):
                assert other["methods"][name][metric]["value"] == pytest.approx(one[metric]["value"], abs=2e-3), (name, metric)


def test_the_demos_word_finds_what_it_is_about(tmp_path, undrawn):
    """The claim of the study: better than a box in the middle, by an interval that leaves zero out, and not by chance."""
    found = grounding(Setting(load("demo"), load_data("demo", 32), tmp_path / "r"), **CHEAP)
    assert found["gain_over_centred_box"]["low"] > 0
    assert found["against_null"]["one head, word"]["auc"]["low"] > 0
    random = found["methods"]["random map"]["auc"]
    assert random["low"] < 0.55
    assert random["high"] > 0.45
    assert found["training"] is None


def _asked(subject, count=4):
    """Questions of the toys about pictures of different shapes, with boxes; the mark of a picture where one must be written."""
    made = []
    for i, (height, width) in enumerate([(40, 60), (60, 40), (30, 50), (50, 50)][:count]):
        regions = (Region((5.0, 5.0, 20.0, 25.0), "red ball"), Region((22.0, 8.0, 38.0, 28.0), "dog"))
        prompt = ("what color is the ball ?", "is there a dog in the park ?")[i % 2]
        made.append(Example(f"e{i}", prompt, (toys.picture(height, width, i),), regions=regions))
    return made


@pytest.mark.parametrize("family", ["llava", "llava_next", "qwen2_vl"])
def test_it_runs_on_other_grids_and_learns_from_the_data_itself(toy, tmp_path, undrawn, family):
    subject = toy(family)
    data = Data("toys", tuple(_asked(subject)), "t")
    found = grounding(Setting(subject, data, tmp_path / "r", batch=1), train_scenes=2, epochs=1, generic="describe the image .")
    assert found["n"] == found["n_selection"] == 2
    assert found["n_unnamed"] == 4
    assert found["training"]["scenes"] == 2
    assert found["layers"] == list(range(subject.n_layers))
    assert all(np.isfinite(list(_numbers(found))))


def test_a_jsonl_is_as_good_as_the_world(toy, tmp_path, undrawn):
    lines = []
    for example in _asked(toy("llava")):
        example.images[0].save(tmp_path / f"{example.id}.png")
        regions = [{"box": list(region.box), "label": region.label} for region in example.regions]
        lines.append({"id": example.id, "prompt": example.prompt, "images": [f"{example.id}.png"], "regions": regions})
    lines.append({"id": "lost", "prompt": "is there a cat ?", "images": ["e0.png"], "regions": lines[0]["regions"]})
    (tmp_path / "d.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    data = load_data(str(tmp_path / "d.jsonl"))
    found = grounding(
        Setting(toy("llava"), data, tmp_path / "r"), mask_head=False, generic="none", merge="max", threshold="std"
    )
    assert found["n"] + found["n_selection"] == 4
    assert found["skipped"] == ["lost: the question 'is there a cat ?' names none of its regions (red ball, dog)"]
    assert "relative, last" not in found["methods"]


def test_what_cannot_be_used_is_refused(toy, tmp_path):
    subject = toy("llava")
    data = Data("toys", tuple(_asked(subject)), "t")
    for options, reason in (
        ({"merge": "sum"}, "there is no merge 'sum'"),
        ({"threshold": "otso"}, "did you mean 'otsu'"),
        ({"heads": 0}, "--heads must be at least 1, not 0"),
        ({"epochs": 0}, "--epochs must be at least 1, not 0"),
    ):
        with pytest.raises(StudyError, match=reason):
            grounding(Setting(subject, data, tmp_path / "r"), **options)
    assert not (tmp_path / "r").exists()
    with pytest.raises(
        DataError, match="none of the 2 examples could be used; the first: a: example 'a' has no region to find"
    ):
        grounding(Setting(subject, Data("toys", tuple(toys.pair(subject)), "t"), tmp_path / "a"))
    with pytest.raises(DataError, match=r"none of the 4 .* no known place in the picture"):
        grounding(Setting(toy("blip2"), data, tmp_path / "b"))
    with pytest.raises(DataError, match="at least two different pictures"):
        grounding(Setting(subject, Data("toys", data.examples[:1], "t"), tmp_path / "c"))


def test_a_scene_stays_in_its_half():
    def usable(i):
        return Usable(Example(f"e{i}", "what ?"), f"scene{i // 2}", (Target("x", (0,), 0, ((0.0, 0.0, 0.5, 0.5),)),))

    all_of_them = [usable(i) for i in range(41)]
    chosen, scored = split(all_of_them, 0)
    assert len(chosen) + len(scored) == 41
    assert not {one.scene for one in chosen} & {one.scene for one in scored}
    assert abs(len({one.scene for one in chosen}) - len({one.scene for one in scored})) <= 1
    for count in (4, 7, 20):  # more examples move none to the other half
        fewer, _ = split(all_of_them[:count], 0)
        assert fewer == [one for one in chosen if int(one.example.id[1:]) < count]
    assert split(all_of_them, 1)[0] != chosen


def test_fresh_scenes_are_none_of_the_data():
    fresh = fresh_examples(6, 0)
    assert len(fresh) == len({one.id for one in fresh}) == 6
    assert all(one.regions for one in fresh)
    assert fresh_examples(6, 1) != fresh
    pictures = {one.images[0]().tobytes() for one in fresh}
    assert len(pictures) == 6
    assert not pictures & {one.images[0]().tobytes() for one in load_data("demo", 30).examples}
