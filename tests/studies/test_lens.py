"""The study of the lens: on a stranger that reads the demo's prompts, on toys, and on what cannot be used."""

import numpy as np
import pytest
from typer.testing import CliRunner

from probe import Example, Region, load
from probe.analysis.lens import OTHER_PATCHES, OTHER_WORD, OWN
from probe.errors import DataError, StudyError
from studies.cli import app
from studies.data import Data, load_data
from studies.demo.data import everything
from studies.lens import lens
from studies.lens_report import _said_of_words
from studies.objects import known, vocabulary, words_of
from studies.study import Setting
from tests import toys
from tests.studies import command


@pytest.fixture(scope="module")
def run(stranger, tmp_path_factory):
    folder = tmp_path_factory.mktemp("lens") / "r"
    asked = ["study", "lens", "--model", str(stranger), "--data", "demo", "--limit", "5", "--batch", "2", "--out", str(folder),
             "--json", "--quiet"]  # fmt: skip
    return folder, command.last_line(asked), asked


def test_it_says_what_was_asked(run):
    folder, found, _ = run
    assert found["n"] == 5
    assert found["n_objects"] == sum(len(everything(e)) for e in load_data("demo", 5).examples)
    assert set(found["correspondence"]) == {"noun", "attribute"}
    for one in found["correspondence"].values():
        for kind in ("first", "among"):
            assert len(one[kind]["own"]["mean"]) == 8
            best = one[kind]["own_at_best"]
            assert best["low"] is None or 0 <= best["low"] <= best["high"] <= 1
            assert one[kind][OTHER_WORD]["at_best"]["n"] == one[kind][OTHER_PATCHES]["at_best"]["n"] == 5
    for roles in found["confidence"].values():
        for one in roles.values():
            assert 0 <= one["auroc"]["low"] <= one["auroc"]["value"] <= one["auroc"]["high"] <= 1
            assert one["n_present"] + one["n_absent"] in (5 * 16, 5 * 8)
    assert found["erasure"]["layers"] == [0, 2, 4, 6]
    assert found["erasure"]["own"]["n"] == 5
    report = (folder / "report.md").read_text()
    for claim in ("above every null", "beyond every null", "beyond its null", "beyond what erasing"):
        assert claim in report or claim == "above every null"
    assert "nan" not in (folder / "summary.json").read_text().lower()
    assert {path.stem for path in (folder / "figures").glob("*.png")} == {"correspondence", "confidence", "erasing", "words"}


def test_asking_again_gives_the_same_bytes(run):
    folder, _, asked = run
    parts = {path: path.read_bytes() for path in (folder / "records").glob("*.parquet")}
    sorted(parts)[1].unlink()
    assert CliRunner().invoke(app, asked).exit_code == 0
    assert {path: path.read_bytes() for path in (folder / "records").glob("*.parquet")} == parts
    assert len(parts) == 3


@pytest.fixture
def undrawn(monkeypatch):
    """Runs without their figures, which take most of the time of a small one."""
    monkeypatch.setattr("studies.lens_report.figures", lambda *_: None)


def numbers(value):
    """Every number of a summary, in order."""
    if isinstance(value, dict):
        return [n for item in value.values() for n in numbers(item)]
    if isinstance(value, list):
        return [n for item in value for n in numbers(item)]
    return [float(value)] if isinstance(value, int | float) else []


@pytest.mark.usefixtures("undrawn")
def test_batches_and_padding_change_nothing(stranger, tmp_path):
    subject, data = load(str(stranger)), load_data("demo", 5)
    found = [
        numbers(lens(Setting(subject, data, tmp_path / f"{size}{side}", batch=size, padding=side), sweep=False))
        for size, side in ((1, "left"), (8, "left"), (8, "right"))
    ]
    assert len(found[0]) > 200
    for other in found[1:]:
        np.testing.assert_allclose(found[0], other, atol=1e-4)


def _labelled(subject):
    pair = toys.pair(subject)
    regions = [(Region((5.0, 5.0, 30.0, 25.0), "red ball"),), (Region((2.0, 2.0, 20.0, 20.0), "dog"),)]
    return [
        Example(e.id, "is there a dog ?" if i else e.prompt, e.images, regions=r, answer="yes" if i else "no")
        for i, (e, r) in enumerate(zip(pair, regions, strict=True))
    ]


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("family", ["llava", "qwen2_vl", "gemma3", "llava_next"])
def test_it_runs_on_other_architectures(toy, tmp_path, family):
    subject = toy(family)
    data = Data("toys", (*_labelled(subject), Example("c", "what ?", (toys.picture(),))), "t")
    found = lens(Setting(subject, data, tmp_path / "r"), complete=True)
    assert (found["n"], found["n_skipped"]) == (2, 1)
    assert found["skipped"] == ["c: example 'c' has no labelled region, so that nothing is known of its picture"]
    assert found["confidence"]["final"]["noun"]["n_absent"] == 2
    assert found["n_in_pieces"] >= 0


def test_what_cannot_be_used_is_refused(toy, tmp_path):
    for family, reason in (("mllama", "is not in the sequence"), ("blip2", "no known place")):
        subject = toy(family)
        with pytest.raises(DataError, match=f"none of the 2 examples could be used; the first: .*{reason}"):
            lens(Setting(subject, Data("toys", tuple(_labelled(subject)), "t"), tmp_path / family))
    subject = toy("llava")
    setting = Setting(subject, Data("toys", tuple(_labelled(subject)), "t"), tmp_path / "r")
    for asked, message in (
        ({"norm": "first"}, "there is no norm 'first'"), ({"direction": "mean"}, "there is no direction 'mean'"), ({"top": 0}, "at least one token"),
        ({"top": 100_000}, f"top 100000 is more than the {subject.vocabulary} tokens of the vocabulary"),
        ({"question": "is it there ?"}, "has a place for its word"),
    ):  # fmt: skip
        with pytest.raises(StudyError, match=message):
            lens(setting, **asked)
    with pytest.raises(DataError, match="no example has a region with a label"):
        lens(Setting(subject, Data("toys", tuple(toys.pair(subject)), "t"), tmp_path / "r"))
    assert not (tmp_path / "r").exists()


def test_what_is_known_of_a_picture(toy):
    pair = _labelled(toy("llava"))
    words = vocabulary(pair, 8)
    assert words == {"noun": ("ball", "dog"), "attribute": ("red",)}
    assert words_of("Big red ball") == {"noun": ("ball",), "attribute": ("big", "red")}
    assert known(pair[0], words, complete=True).absent == {"noun": {"dog"}, "attribute": frozenset()}
    assert known(pair[0], words, complete=False).absent["noun"] == frozenset()
    denied = Example("d", "is there a dog ?", pair[0].images, regions=pair[0].regions, answer="no")
    assert known(denied, words, complete=False).absent["noun"] == {"dog"}
    assert known(pair[1], words, complete=False).present["noun"] == {"dog"}
    scene = load_data("demo", 1).examples[0]
    assert {r.box for r in scene.regions} <= {r.box for r in everything(scene)}
    assert known(scene, vocabulary([scene], 8), complete=False).absent["noun"]
    assert everything(pair[0]) is None


@pytest.mark.usefixtures("undrawn")
def test_an_erased_word_is_the_own_one(stranger, tmp_path):
    """Erased at alpha 0 nothing changes, for any word."""
    found = lens(Setting(load(str(stranger)), load_data("demo", 3), tmp_path / "r"), alpha=0.0, sweep=False)
    assert found["erasure"]["own"]["value"] == 0.0
    assert all(one["mean"] == [0.0] for one in found["erasure"]["curves"].values())
    assert found["erasure"]["turned"][OWN]["value"] in (0.0, None)


def test_a_reversal_is_said_and_paired():
    """Where patches elsewhere read the word more often, that is the finding, with the paired difference."""
    from types import SimpleNamespace

    def number(value, low, high):
        return {"value": value, "low": low, "high": high, "n": 24}

    def null(*gap):
        return {"at_best": number(0.2, 0.1, 0.3), "gap_at_best": number(*gap)}

    among = {
        "own_at_best": number(0.147, 0.1, 0.2),
        OTHER_WORD: null(0.1, 0.05, 0.15),
        OTHER_PATCHES: null(-0.067, -0.1, -0.03),
    }
    found = {
        "n_objects": 118,
        "n_read": 60,
        "among": among,
        "first": {"own_at_best": number(0.1, 0.0, 0.2)},
        "best_layer": number(3, 2, 4),
    }
    plan = SimpleNamespace(top=5, subject=SimpleNamespace(n_layers=8))
    (said,) = _said_of_words({"n": 24, "correspondence": {"noun": found}}, plan)
    assert "The reverse: as many patches elsewhere in the picture read the object's word more often than its own patches do, by 0.067 [0.030, 0.100] (paired)" in said  # fmt: skip
    among[OTHER_PATCHES] = null(0.05, 0.01, 0.1)
    (said,) = _said_of_words({"n": 24, "correspondence": {"noun": found}}, plan)
    assert "They do, above every null" in said
