"""Data sets: lines that are broken are named, order and fingerprints are fixed."""

import json

import pytest

from probe.errors import DataError
from probe.media import open_picture
from studies.data import load_data
from tests import toys


def write(path, *lines):
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines) + "\n")
    return str(path)


@pytest.fixture
def folder(tmp_path):
    toys.picture().save(tmp_path / "p.png")
    return tmp_path


def test_a_jsonl_is_read_in_order_with_its_media(folder):
    path = write(
        folder / "d.jsonl",
        {"id": "x", "prompt": "what ?", "images": ["p.png"], "answer": "red", "regions": [{"box": [1, 2, 3, 4], "label": "ball"}], "tags": {"kind": "color"}},
        "",
        {"prompt": "and ?", "choices": ["a", "b"]},
    )  # fmt: skip
    data = load_data(path)
    assert [e.id for e in data.examples] == ["x", "3"]
    assert data.examples[0].images == (folder / "p.png",)
    assert data.examples[0].regions[0].label == "ball"
    assert data.examples[1].choices == ("a", "b")
    assert len(load_data(path, limit=1)) == 1
    assert data.fingerprint == load_data(path).fingerprint


BROKEN = {
    "broken line": ([{"prompt": "a"}, '{"prompt": '], "line 2 of .* is not valid JSON"),
    "no object": (["[1]"], "line 1 of .* is not a JSON object with a prompt"),
    "no prompt": ([{"id": "x"}], "line 1 of .* has no prompt"),
    "empty prompt": ([{"prompt": " "}], "line 1 of .* is not an example: .* has an empty prompt"),
    "missing media": (
        [{"prompt": "a"}, {"prompt": "b", "images": ["q.png"]}],
        "line 2 of .* names the picture .*q.png, which is not there",
    ),
    "duplicate ids": (
        [{"id": "x", "prompt": "a"}, {"id": "x", "prompt": "b"}],
        "has the id 'x' on lines 1 and 2: ids must differ",
    ),
    "unknown fields": ([{"prompt": "a", "imges": []}], "line 1 of .* has unknown fields imges"),
    "bad box": (
        [{"prompt": "a", "images": ["p.png"], "regions": [{"box": [3, 0, 1, 1]}]}],
        "line 1 of .* is not an example: a region's box",
    ),
    "nothing": ([""], "holds no examples"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_defect_is_named_with_its_line(folder, case):
    lines, message = BROKEN[case]
    with pytest.raises(DataError, match=message):
        load_data(write(folder / "d.jsonl", *lines))


def test_there_were_nine_defects():
    assert len(BROKEN) == 9


def test_a_missing_file():
    with pytest.raises(DataError, match=r"there is no file nowhere.jsonl"):
        load_data("nowhere.jsonl")


def test_a_saved_datasets_folder_with_a_column_mapping(tmp_path):
    import datasets

    table = datasets.Dataset.from_dict(
        {"q": ["what ?", "where ?"], "pic": [toys.picture(), toys.picture(seed=1)], "a": ["red", "b1"]}
    )
    table.cast_column("pic", datasets.Image()).save_to_disk(tmp_path / "set")
    data = load_data(str(tmp_path / "set"), columns={"prompt": "q", "image": "pic", "answer": "a"})
    assert [e.prompt for e in data.examples] == ["what ?", "where ?"]
    assert open_picture(data.examples[1].images[0]).size == (60, 40)
    with pytest.raises(DataError, match=r"has no column 'prompt' .it has q, pic, a.: map fields with --columns"):
        load_data(str(tmp_path / "set"))


@pytest.mark.parametrize(
    ("source", "kind"), [("demo", "images"), ("demo:text", ""), ("demo:video", "videos"), ("demo:audio", "sounds")]
)
def test_the_bundled_world_is_told_four_ways(source, kind):
    """The same scenes, questions and answers, but for clips, where things move and direction is asked too."""
    data = load_data(source, 14)
    assert len(data) == 14
    assert {name for name in ("images", "videos", "sounds") if getattr(data.examples[0], name)} == ({kind} - {""})
    assert {e.tags["kind"] for e in data.examples} >= {"color", "thing", "count", "exist", "place", "relation", "compare"}
    if source != "demo:video":
        assert [e.answer for e in data.examples] == [e.answer for e in load_data("demo", 14).examples]
