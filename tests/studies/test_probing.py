"""The study of probing on the demo models and on toys."""

from dataclasses import replace

import numpy as np
import pytest

from probe import Example, load
from probe.errors import DataError, StudyError
from probe.features import asked_word, group_means, places
from studies.data import Data, load_data
from studies.probes import facts_of, picture_row, scenes_of, shown_by
from studies.probing import probing
from studies.run import Run
from studies.study import Setting
from tests import toys
from tests.studies import command


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("probing") / "r"
    words = ["study", "probing", "--model", "demo", "--limit", "32", "--facts", "colour,circle", "--out", str(folder), "--json", "--quiet"]  # fmt: skip
    return folder, command.last_line(words), words


def test_it_says_what_was_asked(run):
    folder, found, _ = run
    assert found["n"] == 32
    assert set(found["facts"]) == {"colour", "circle"}
    assert set(found["facts"]["colour"]) == {"object", "other", "shown", "word", "last"}
    checked = 0
    for groups in found["facts"].values():
        for one in groups.values():
            assert len(one["accuracy"]["mean"]) == len(one["q"]) == 9
            for key in ("accuracy", "selectivity", "above", "control"):
                assert all(l <= m <= h for l, m, h in zip(one[key]["low"], one[key]["mean"], one[key]["high"], strict=True))  # noqa: E741
                checked += 1
            assert one["n_scenes"] == one["n"]  # every question has its own scene
    assert checked == 2 * 5 * 4
    own, other = (found["facts"]["colour"][place] for place in ("object", "other"))
    assert own["best"]["low"] > own["majority"]["high"]
    assert own["best"]["low"] > other["best"]["high"]
    assert own["onset"]["low"] <= own["onset"]["state"] <= own["onset"]["high"]
    assert found["headline"]["colour"]["place"] == "object"
    assert "NaN" not in (folder / "summary.json").read_text()
    report = (folder / "report.md").read_text()
    assert "**colour** is read best from the patches of the thing in question" in report
    assert {path.name for path in (folder / "figures").glob("*.png")} == {"accuracy.png", "selectivity.png", "onset.png"}


def test_asking_again_gives_the_same_bytes(run):
    folder, found, words = run
    parts = {path: path.read_bytes() for path in (folder / "records").glob("*.parquet")}
    sorted(parts)[1].unlink()
    assert command.last_line(words) == found
    assert {path: path.read_bytes() for path in (folder / "records").glob("*.parquet")} == parts


def test_batches_and_padding_change_nothing(stranger):
    """The states that the probes read are the same; a probe at a tie could turn a rounding into an example."""
    subject, some = load(str(stranger)), load_data("demo", 8).examples
    names = ("object", "other", "shown", "word", "last")

    def read(examples, side):
        encoded = subject.encode(examples, side)
        found = [places(m, e)[0] for m, e in zip(encoded.maps, examples, strict=True)]
        return group_means(subject, encoded, found, names)

    alone = np.concatenate([read([example], "left") for example in some])
    for side in ("left", "right"):
        np.testing.assert_allclose(read(list(some), side), alone, atol=1e-4)
    assert alone.shape == (8, 5, subject.n_layers + 1, 128)
    assert np.isfinite(alone).any((1, 2, 3)).all()


def test_groups_mean_what_they_say(toy):
    """The means against states taken whole, and the places against the map."""
    from probe import Residual, trace

    subject = toy("llava")
    example = load_data("demo", 1).examples[0]
    encoded = subject.encode(example)
    found, missing = places(encoded.maps[0], example)
    assert not missing
    assert sorted([*found["object"], *found["other"]]) == found["shown"].tolist()
    word = asked_word(example)
    assert "".join(encoded.maps[0].spellings[p] for p in found["word"]).strip() == word
    assert word in example.prompt
    states = trace(subject, encoded, [Residual()])["states"].tensor[:, 0]
    means = group_means(subject, encoded, [found], ("object", "word"))[0]
    for i, name in enumerate(("object", "word")):
        np.testing.assert_allclose(means[i, 1:], states[:, found[name]].mean(1), atol=1e-5)
    bare = replace(example, regions=())
    lacking = places(encoded.maps[0], bare)[1]
    assert set(lacking) == {"object", "other", "word"}
    assert np.isnan(group_means(subject, encoded, [places(encoded.maps[0], bare)[0]], ("object", "last"))[0, 0]).all()


def test_examples_that_share_a_picture_stay_together(toy, tmp_path):
    subject = toy("llava")
    a, b, c, d = (toys.picture(seed=i) for i in range(4))
    shows = [(a,), (a,), (b, c), (c,), (d,)]
    examples = [Example(str(i), "what ?", pictures) for i, pictures in enumerate(shows)]
    assert len(shown_by(subject, examples[2])) == 2
    from studies.probes import SCHEMA

    kept = Run.open(tmp_path / "r", "probing", {}, {}, SCHEMA)
    kept.write("all", [picture_row(subject, example) for example in examples])
    assert scenes_of(kept.rows(["all"]), [e.id for e in examples]) == [0, 0, 1, 1, 2]
    assert shown_by(subject, Example("x", "what ?", context="a cat .")) == shown_by(subject, Example("y", "is it ?", context="a cat ."))  # fmt: skip


def test_facts_are_tags():
    examples = [Example(str(i), "what ?", tags={"kind": "ab"[i % 2], "same": "x"}) for i in range(4)]
    assert facts_of(examples) == {"kind": ["a", "b", "a", "b"]}
    named = [replace(e, tags={**e.tags, "fact:colour": "rg"[i // 2]}) for i, e in enumerate(examples)]
    assert facts_of(named) == {"colour": ["r", "r", "g", "g"]}
    with pytest.raises(StudyError, match="there is no fact 'color'"):
        facts_of(named, "color")
    with pytest.raises(DataError, match="no tag with two values"):
        facts_of([Example("a", "what ?")])


def test_the_demos_facts_are_of_the_scene():
    some = load_data("demo", 70).examples
    about = [e for e in some if e.regions]
    assert len(about) > 40
    for example in about:
        assert example.regions[0].label == f"{example.tags['fact:colour']} {example.tags['fact:name']}"
    for kind, fact in (("color", "colour"), ("thing", "name"), ("place", "cell")):
        own = [e for e in some if e.tags["kind"] == kind]
        assert len(own) == 10
        assert all(e.answer == e.tags[f"fact:{fact}"] for e in own)
    assert {e.tags["fact:circle"] for e in some} == {"there", "not there"}
    assert {e.tags["fact:things"] for e in some} <= set("34567")


def test_it_runs_on_other_architectures(toy, tmp_path):
    """No boxes, other tags, a sound; a family whose picture is not in the sequence is read at its words."""
    seen = 0
    for family in ("qwen2_vl", "qwen2_audio", "mllama"):
        subject = toy(family)
        sounds = subject.anatomy.vision is None
        examples = tuple(
            Example(str(i), f"what color is the {'ball' if i % 2 else 'cat'} ?", () if sounds else (toys.picture(seed=i),),
                    sounds=(toys.sound(seed=i),) if sounds else (), tags={"thing": "ball" if i % 2 else "cat"})
            for i in range(12)
        )  # fmt: skip
        found = probing(
            Setting(subject, Data("toys", examples, "t"), tmp_path / family, batch=4), at="shown,question,last,object"
        )
        assert found["facts"]["thing"]["question"]["best"]["value"] == 1
        assert ("shown" in found["facts"]["thing"]) == (family != "mllama")
        assert any("no example has such tokens" in one for one in found["refused"])
        seen += 1
    assert seen == 3


def test_what_cannot_be_probed_is_refused(toy, tmp_path):
    subject = toy("llava")
    data = Data("toys", tuple(Example(str(i), "what ?", tags={"t": "ab"[i % 2]}) for i in range(5)), "t")
    with pytest.raises(StudyError, match="there is no place 'objekt'"):
        probing(Setting(subject, data, tmp_path / "a"), at="objekt")
    with pytest.raises(StudyError, match="two parts or more, not 1"):
        probing(Setting(subject, data, tmp_path / "a"), folds=1)
    with pytest.raises(StudyError, match="between 0 and 1, not at 1"):
        probing(Setting(subject, data, tmp_path / "a"), tolerance=1.0)
    assert not (tmp_path / "a").exists()
    with pytest.raises(DataError, match="no fact could be probed; the first: t, last: 5 examples are too few"):
        probing(Setting(subject, data, tmp_path / "b"), at="last")
