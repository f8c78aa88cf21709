"""The study of patching: the changed object is found on the demo, pairs of any kind are taken, and bad ones are named."""

import json

import numpy as np
import pytest
from PIL import Image

from probe import Example, Region, load
from probe.errors import DataError, EditError, StudyError
from probe.patching import STREAM
from studies.data import Data, load_data
from studies.demo import picture, world
from studies.demo.pairs import KINDS, pairs
from studies.pairs import GROUPS, Pair, groups_of, pairs_of
from studies.patching import Plan, patching, unit
from studies.study import STUDIES, Setting
from tests import toys

ANY = Plan(width=3, least=0.0, only_correct=False, max_new_tokens=2, steps=0, method="replay", seed=0)


def test_pairs_differ_in_one_fact_and_in_its_cells_alone():
    found = pairs(24)
    assert [clean.tags["kind"] for clean, _ in found] == list(KINDS) * 8
    for clean, corrupt in found:
        assert (clean.prompt, clean.choices) == (corrupt.prompt, corrupt.choices[::-1])
        assert clean.answer != corrupt.answer
        assert clean.tags["pair"] == corrupt.tags["pair"]
        shown = [np.asarray(example.images[0]()).astype(int) for example in (clean, corrupt)]
        rows, columns = np.nonzero((shown[0] != shown[1]).any(-1))
        cells = {(int(r), int(c)) for r, c in zip(rows // picture.CELL, columns // picture.CELL, strict=True)}
        own = {
            (int(top // picture.CELL), int(left // picture.CELL))
            for example in (clean, corrupt) for left, top, *_ in (example.regions[0].box,)
        }  # fmt: skip
        assert cells == own
        assert len(own) == (2 if clean.tags["kind"] == "place" else 1)


def test_text_pairs_differ_in_one_word():
    for clean, corrupt in pairs(6, "text"):
        words = [example.context.split() for example in (clean, corrupt)]
        assert sum(a != b for a, b in zip(*words, strict=True)) == 1


def test_a_new_combination_is_never_an_unseen_one():
    rng = np.random.default_rng(0)
    from studies.demo.pairs import changed

    for scene, question in world.held_out(rng, 60, KINDS):
        other, asked = changed(rng, scene, question)
        (new,) = asked.about
        assert len(set(scene.things) ^ set(other.things)) == 2
        if question.kind != "place":
            assert (new.colour, new.name) not in world.HELD_OUT


def test_groups_are_disjoint_and_the_control_is_as_large_as_the_object():
    subject = load("demo")
    for clean, corrupt in pairs(6):
        pair = Pair(clean, corrupt)
        a, b = (subject.encode(example) for example in (clean, corrupt))
        found = groups_of(pair, a, b, 0, seed=0)
        assert tuple(found) == GROUPS
        assert len(found["random"]) == len(found["object"]) > 0
        assert set(found["random"]) <= set(found["others"])
        apart = np.concatenate([found[name] for name in GROUPS if name != "random"])
        assert len(apart) == len(set(apart.tolist()))
        assert set(a.maps[0].positions("image")) == set(found["object"]) | set(found["others"])
        word = "".join(a.maps[0].spellings[i] for i in found["word"]).strip()
        assert word == (
            clean.regions[0].label.split()[0] if clean.tags["kind"] == "thing" else clean.regions[0].label.split()[1]
        )


def test_the_demo_model_keeps_a_fact_at_its_object_and_moves_it_to_the_last_position(tmp_path):
    found = patching(Setting(load("demo"), load_data("demo", 6), tmp_path / "r", batch=3), ig_steps=2)
    assert found["n"] + sum(found["dropped"].values()) == 6
    gap, control = found["object_above_random"], found["random_early"]
    assert gap["low"] > 0.3 > abs(control["value"])
    assert found["object_above_nudged"]["low"] > 0.3
    assert found["sites"]["resid_pre"]["nudged"]["n"] == found["sites"]["resid_pre"]["object"]["n"]
    assert {"site resid_pre", "site resid_pre nudged", "window mlp_out nudged"} <= set(found["control"])
    assert found["last_final"]["low"] > 0.5 > found["last_early"]["high"]
    assert 0 < found["handover"]["layer"] < 8
    assert found["all_max_error"] < 1e-4
    assert set(found["sites"]) == set(STREAM)
    assert set(found["windows"]) == {"attn_out", "mlp_out"}
    assert np.shape(found["heads"]["mean"]) == (8, 4)
    assert set(found["agreement"]) == {"attribution", "integrated"}
    assert found["agreement"]["integrated"]["resid_pre"]["overall"]["value"] > 0.5
    text = (tmp_path / "r/summary.json").read_text()
    assert "NaN" not in text
    assert json.loads(text)["n"] == found["n"]
    report = (tmp_path / "r/report.md").read_text()
    assert STUDIES["patching"][1] in report
    assert "**The fact is at the object.**" in report
    assert "random positions have next to nothing to bring back early on" in report
    drawn = {path.stem for path in (tmp_path / "r/figures").glob("*.png")}
    assert len(drawn) == 7
    assert all(f"figures/{name}.png" in report for name in drawn)


@pytest.fixture(scope="module")
def stranger_pairs(stranger):
    subject = load(stranger, device="cpu")
    return subject, [Pair(*both) for both in pairs(2)]


def _effects(setting, found, plan, batch):
    rows = [row for i in range(0, len(found), batch) for row in unit(setting, found[i : i + batch], plan)]
    sites = [row for row in rows if "effect" in row]
    return sites, {name: np.array([row[name] or 0.0 for row in sites]) for name in ("effect", "attribution", "p_clean")}


def test_batches_and_padding_change_nothing(stranger_pairs):
    subject, found = stranger_pairs
    data = Data("pairs", (), "1")
    expected, numbers = _effects(Setting(subject, data), found, ANY, 1)
    assert len(expected) > 2 * 300
    for side in ("left", "right"):
        sites, others = _effects(Setting(subject, data, padding=side), found, ANY, 8)
        for name in ("example", "what", "point", "group", "layer", "head", "n_positions"):
            assert [row[name] for row in sites] == [row[name] for row in expected]
        for name, values in numbers.items():
            np.testing.assert_allclose(others[name], values, atol=3e-4, err_msg=name)


def asked(subject, tmp_path, answers=("yes", "no"), seeds=(0, 5), **more):
    """A .jsonl of two pairs, their pictures beside it."""
    lines = []
    for i, question in enumerate(("is there a dog ?", "what color is the ball ?")):
        for role, answer, seed in zip(("clean", "corrupt"), answers, seeds, strict=True):
            name = f"{i}-{role}.png"
            Image.fromarray(np.asarray(toys.picture(seed=seed + i))).save(tmp_path / name)
            lines.append({
                "id": f"{i}-{role}", "prompt": question, "answer": answer, "images": [name],
                "regions": [{"box": [5, 5, 20, 20], "label": "brown dog"}], "tags": {"pair": str(i), "role": role}, **more,
            })  # fmt: skip
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(json.dumps(line) for line in lines))
    return load_data(str(path))


@pytest.mark.parametrize("family", [pytest.param("qwen2_5_vl", marks=pytest.mark.slow), "mllama"])
def test_any_pairs_by_their_tags(toy, tmp_path, family):
    subject = toy(family)
    data = asked(subject, tmp_path)
    found = patching(Setting(subject, data, tmp_path / "r", batch=2), only_correct=False, least=0.0)
    assert found["n"] == 2
    sees = family != "mllama"  # its patches are no positions of the sequence: what reads them is patched, they are not
    assert ("object" in found["sites"]["resid_pre"]) == sees
    assert {"question", "last"} <= set(found["sites"]["resid_pre"])
    assert (found["object_above_random"]["value"] is None) != sees
    assert (found["all_max_error"] < 1e-3) == sees
    assert "No pair says where" in (tmp_path / "r/report.md").read_text() or sees
    slow = unit(Setting(subject, data), pairs_of(data, 0)[0][:1], Plan(**{**vars(ANY), "method": "naive"}))
    fast = unit(Setting(subject, data), pairs_of(data, 0)[0][:1], ANY)
    both = ([row["patched"] for row in rows if "patched" in row] for rows in (slow, fast))
    np.testing.assert_allclose(*both, atol=1e-4)


def test_pairs_of_words_are_taken_too(toy):
    subject = toy("llava")
    made = [
        Example(role, f"is there a {thing} in the park ?", answer=a)
        for role, thing, a in (("a", "cat", "yes"), ("b", "dog", "no"))
    ]
    sizes = [len(subject.encode(example).maps[0]) for example in made]
    assert sizes[0] == sizes[1]
    pair = Pair(*made)
    a, b = (subject.encode(example) for example in made)
    found = groups_of(pair, a, b, 0, 0)
    differ = (a.inputs["input_ids"][0] != b.inputs["input_ids"][0]).nonzero()[:, 0].tolist()
    assert found["object"].tolist() == differ
    assert set(found["random"]) <= set(a.maps[0].positions("question")) - set(differ)
    rows = unit(Setting(subject, Data("words", (), "1")), [pair], ANY)
    first = {
        row["layer"]: row["effect"]
        for row in rows
        if row["what"] == "site" and row["group"] == "object" and row["point"] == "resid_pre"
    }
    assert first[0] == pytest.approx(1, abs=1e-4)  # the words are all that differs  # fmt: skip


def test_what_cannot_be_used_is_named(toy, tmp_path, stranger_pairs):
    subject = toy("llava")
    with pytest.raises(
        DataError,
        match=r'has no pairs to patch between: name demo or demo:text, or a .jsonl in which two examples have the same tag "pair"',
    ):
        patching(Setting(subject, Data("toys", tuple(toys.pair(subject)), "t"), tmp_path / "r"))
    alone = Example("x", "is it ?", answer="yes", tags={"pair": "7", "role": "clean"})
    with pytest.raises(
        DataError,
        match="none of the 1 pairs of toys is whole; the first, '7': it has the roles clean, not one clean and one corrupt",
    ):
        patching(Setting(subject, Data("toys", (alone,), "t"), tmp_path / "r"))
    with pytest.raises(StudyError, match=r"there is no method 'replays' .did you mean 'replay'"):
        patching(Setting(subject, asked(subject, tmp_path), tmp_path / "r"), method="replays")
    for method in ("replay", "naive"):
        hybrid = Setting(toy("qwen3_5"), asked(subject, tmp_path), tmp_path / "r")
        with pytest.raises(
            StudyError, match=r"layer 0 of this Qwen3.5 model has no softmax attention: it takes models whose layers all attend"
        ):
            patching(hybrid, method=method)
    with pytest.raises(StudyError, match="cannot be below zero"):
        patching(Setting(subject, asked(subject, tmp_path), tmp_path / "r"), least=-1.0)
    with pytest.raises(EditError, match="a window has 1 to 4 layers"):
        patching(Setting(subject, asked(subject, tmp_path), tmp_path / "r"), window_width=5)
    assert not (tmp_path / "r").exists()
    with pytest.raises(
        DataError, match="none of the 2 examples could be used; the first: 0-clean: its clean question is answered"
    ):
        patching(Setting(subject, asked(subject, tmp_path), tmp_path / "r1"))
    same = asked(subject, tmp_path, answers=("yes", "yes"))
    with pytest.raises(DataError, match="its answers 'yes' and 'yes' begin with the same token"):
        patching(Setting(subject, same, tmp_path / "r2"), only_correct=False)
    alike = asked(subject, tmp_path, seeds=(0, 0))
    with pytest.raises(DataError, match=r"its runs differ by -?0\.000 logits: an effect is not defined"):
        patching(Setting(subject, alike, tmp_path / "r3"), only_correct=False)  # fmt: skip


def test_pairs_of_unequal_length_are_counted_beside_those_that_fit(toy, tmp_path):
    subject = toy("llava")
    whole = list(asked(subject, tmp_path).examples)
    longer = [
        Example("long-a", "is there a dog ?", answer="yes", images=(toys.picture(),), tags={"pair": "long", "role": "clean"}),
        Example("long-b", "is there a dog in the park ?", answer="no", images=(toys.picture(),), tags={"pair": "long", "role": "corrupt"}),
    ]  # fmt: skip
    broken = Example("x", "is it ?", answer="yes", tags={"pair": "half", "role": "clean"})
    data = Data("mixed", (*whole, *longer, broken), "t")
    rows = unit(Setting(subject, data), pairs_of(data, 0)[0], ANY)
    assert [(row["example"], row["reason"]) for row in rows if row["what"] == "skipped"] == [("long-a", "cannot be compared")]
    assert sum(row["what"] == "pair" for row in rows) == 2
    assert pairs_of(data, 0)[1] == {"half": "it has the roles clean, not one clean and one corrupt"}


def test_regions_alone_say_where_the_object_is(toy):
    """A region of either picture counts: what moved is at both places."""
    subject = toy("llava")
    a, b = (
        Example(i, "is there a dog ?", (toys.picture(28, 28, seed),), answer=i, regions=(Region(box),))
        for i, seed, box in (("yes", 0, (0.0, 0.0, 7.0, 7.0)), ("no", 1, (21.0, 21.0, 28.0, 28.0)))
    )
    clean, corrupt = subject.encode(a), subject.encode(b)
    found = groups_of(Pair(a, b), clean, corrupt, 0, 0)
    grid = clean.maps[0].grids[0].positions[0]
    assert found["object"].tolist() == [grid[0, 0], grid[3, 3]]
