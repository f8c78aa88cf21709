"""The study of a tower's layers on the demo models and on toys."""

import numpy as np
import pytest

from probe import Example, Region, load
from probe.errors import AnatomyError, DataError, StudyError
from probe.towers import Tower
from studies.data import Data, load_data
from studies.study import Setting
from studies.vision_layers import levels, vision_layers
from tests import toys
from tests.studies import command


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tower") / "r"
    words = ["study", "vision-layers", "--model", "demo", "--limit", "32", "--facts", "colour", "--out", str(folder), "--json", "--quiet"]  # fmt: skip
    return folder, command.last_line(words), words


def test_it_says_what_was_asked(run):
    folder, found, _ = run
    assert (found["n"], found["place"]) == (32, "object")
    assert found["tower"] == {"kind": "vision", "path": "model.vision_tower.encoder.layers", "layers": 5, "read": [5]}
    own, other = (found["facts"]["colour"][place] for place in ("object", "other"))
    assert len(own["accuracy"]["mean"]) == 6
    assert own["best"]["low"] > max(own["majority"]["high"], other["best"]["high"])
    ways = found["merged"]["colour"]
    assert list(ways) == [
        "best single layer",
        "connector's layers",
        "early + late",
        "middle + late",
        "early + middle + late",
        "all",
    ]
    for name, one in ways.items():
        assert one["n"] == own["n"]
        assert one["accuracy"]["low"] <= one["accuracy"]["value"] <= one["accuracy"]["high"]
        if name != "best single layer":
            difference = one["accuracy"]["value"] - ways["best single layer"]["accuracy"]["value"]
            assert one["gain"]["value"] == pytest.approx(difference)
            assert one["gain"]["low"] <= one["gain"]["value"] <= one["gain"]["high"]
    assert "NaN" not in (folder / "summary.json").read_text()
    assert "the connector reads state 5" in (folder / "report.md").read_text()
    assert {path.name for path in (folder / "figures").glob("*.png")} == {"layers.png", "merging.png"}


def test_asking_again_gives_the_same_bytes(run):
    folder, found, words = run
    parts = {path: path.read_bytes() for path in (folder / "records").glob("*.parquet")}
    sorted(parts)[1].unlink()
    assert command.last_line(words) == found
    assert {path: path.read_bytes() for path in (folder / "records").glob("*.parquet")} == parts


def test_batches_and_padding_change_nothing(stranger, tmp_path):
    subject, data = load(str(stranger)), load_data("demo", 18)
    found = [
        vision_layers(Setting(subject, data, tmp_path / f"{size}{side}", batch=size, padding=side), facts="colour")
        for size, side in ((1, "left"), (8, "right"))
    ]
    assert found[0]["facts"] == found[1]["facts"]
    assert found[0]["merged"] == found[1]["merged"]


def test_levels_go_up_to_what_the_connector_reads():
    assert levels(Tower("vision", "", 24, (23,))) == {
        "connector's layers": (23,), "early + late": (8, 23), "middle + late": (15, 23), "early + middle + late": (8, 15, 23),
        "all": tuple(range(25)),
    }  # fmt: skip
    assert levels(Tower("vision", "", 2, (2,)))["early + middle + late"] == (1, 2)


def examples(kind):
    shown = [(toys.picture(56, 56, i),) if kind == "vision" else () for i in range(12)]
    return tuple(
        Example(str(i), "what ?", pictures, sounds=(toys.sound(seed=i),) if kind == "audio" else (), tags={"t": "ab"[i % 2]},
                regions=(Region((0.0, 0.0, 20.0, 20.0), "ball"),) if pictures else ())
        for i, pictures in enumerate(shown)
    )  # fmt: skip


@pytest.mark.parametrize(
    ("family", "place"),
    [
        ("llava", "object"),
        ("qwen2_vl", "object"),
        ("llava_onevision", "shown"),
        ("qwen2_5_vl", "shown"),
        ("qwen2_audio", "shown"),
    ],
)
def test_it_runs_on_other_architectures(toy, tmp_path, family, place):
    subject = toy(family)
    kind = "audio" if subject.anatomy.vision is None else "vision"
    found = vision_layers(Setting(subject, Data("toys", examples(kind), "t"), tmp_path / "r"))
    assert (found["n"], found["place"], found["tower"]["kind"]) == (12, place, kind)
    assert np.isfinite(found["facts"]["t"][place]["accuracy"]["mean"]).all()
    assert bool(found["missing"]) == (place == "shown")


def test_what_cannot_be_read_is_refused(toy, tmp_path):
    data = Data("toys", examples("vision"), "t")
    with pytest.raises(AnatomyError, match="this LLaVA model has no audio tower"):
        vision_layers(Setting(toy("llava"), data, tmp_path / "r"), tower="audio")
    with pytest.raises(AnatomyError, match="this generic model has no vision tower"):
        vision_layers(Setting(toy("llama"), data, tmp_path / "r"))
    with pytest.raises(StudyError, match="there is no tower 'touch'"):
        vision_layers(Setting(toy("llava"), data, tmp_path / "r"), tower="touch")
    assert not (tmp_path / "r").exists()
    words = Data("toys", tuple(Example(str(i), "what ?", tags={"t": "ab"[i % 2]}) for i in range(12)), "t")
    with pytest.raises(DataError, match=r"none of the 12 examples could be used; the first: .* shows the vision tower nothing"):
        vision_layers(Setting(toy("llava"), words, tmp_path / "w"))
