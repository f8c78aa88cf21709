"""Readers of published formats, on small files in those formats."""

import base64
import csv
import io
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from probe.errors import DataError, ExampleError
from probe.media import open_picture
from studies.data import load_data
from studies.tasks.readers import READERS, human_answers
from tests import toys


def picture(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    toys.picture().save(path)


def lines(path, *rows):
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows) + "\n")


def dump(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def png() -> bytes:
    out = io.BytesIO()
    toys.picture().save(out, "PNG")
    return out.getvalue()


def pope(folder):
    picture(folder / "val2014/COCO_val2014_000000310196.jpg")
    row = {
        "question_id": 1,
        "image": "COCO_val2014_000000310196.jpg",
        "text": "Is there a snowboard in the image?",
        "label": "yes",
    }
    lines(
        folder / "coco_pope_popular.json", row, '{"question_id": 2', {**row, "question_id": 3, "image": "no.jpg"},
        {**row, "question_id": 4, "label": "maybe"}, {**row, "question_id": 1}, {k: v for k, v in row.items() if k != "text"},
        {**row, "question_id": 5, "text": "Is there an umbrella in the image?", "label": "no"},
    )  # fmt: skip
    lines(folder / "coco_pope_random.json", row)


def gqa(folder):
    picture(folder / "images/n161313.jpg")
    one = {
        "imageId": "n161313", "question": "Is it overcast?", "answer": "no", "fullAnswer": "No, it is clear.", "isBalanced": True,
        "groups": {"global": None, "local": "13-weather"}, "types": {"structural": "verify", "semantic": "global", "detailed": "weatherVerify"},
    }  # fmt: skip
    dump(
        folder / "testdev_balanced_questions.json",
        {"201": one, "202": {**one, "imageId": "gone"}, "203": {"imageId": "n161313", "question": "x?"}},
    )


def vqav2(folder):
    picture(folder / "val2014/COCO_val2014_000000262148.jpg")
    asked = [{"image_id": 262148, "question": "Where is he looking?", "question_id": 262148000 + i} for i in range(3)]
    asked.append({"image_id": 1, "question": "What?", "question_id": 262148000})
    notes = [
        {"question_id": 262148000 + i, "image_id": 262148, "question_type": "where is", "answer_type": "other", "multiple_choice_answer": "down",
         "answers": [{"answer": "down", "answer_confidence": "yes", "answer_id": k} for k in range(9)] + [{"answer": "table", "answer_id": 10}]}
        for i in (0, 2)
    ]  # fmt: skip
    dump(folder / "v2_OpenEnded_mscoco_val2014_questions.json", {"data_subtype": "val2014", "questions": asked})
    dump(folder / "v2_mscoco_val2014_annotations.json", {"annotations": notes})


def seed_bench(folder):
    picture(folder / "SEED-Bench-image/1454426_2591111986.jpg")
    picture(folder / "task17/a_1.png")
    (folder / "94328.webm").write_bytes(b"0")
    one = {
        "answer": "B", "choice_a": "One", "choice_b": "Two", "choice_c": "Three", "choice_d": "Four", "data_id": "1454426_2591111986",
        "data_type": "image", "question": "How many towels are in the image?", "question_id": "101669", "question_type_id": 5,
    }  # fmt: skip
    rows = [
        one, {**one, "question_id": "17_0", "data_id": ["task17/a_1.png", "task17/a_1.png"]}, {**one, "question_id": "v1", "data_id": "94328.webm"},
        {**one, "question_id": "v2", "data_id": "94328.webm", "segment": [1, 2]}, {**one, "question_id": "x", "answer": "E"},
        {k: v for k, v in one.items() if k != "choice_c"} | {"question_id": "y"},
    ]  # fmt: skip
    dump(folder / "SEED-Bench.json", {"questions": rows, "question_type": {"Instances Counting": 5}})


def mmbench(folder):
    names = [
        "index",
        "question",
        "hint",
        "A",
        "B",
        "C",
        "D",
        "answer",
        "category",
        "image",
        "source",
        "l2-category",
        "comment",
        "split",
    ]
    cell = base64.b64encode(png()).decode()
    row = dict(
        zip(
            names,
            ["0", "Which?", "A map.", "red", "blue", "", "", "B", "colour", cell, "s", "attribute", "", "dev"],
            strict=True,
        )
    )
    rows = [row, {**row, "index": "1000000", "image": "0", "answer": "A"}, {**row, "index": "2", "image": "77"}, {**row, "index": "3", "answer": ""},
            {**row, "index": "4", "image": "?" * 80}]  # fmt: skip
    with (folder / "mmbench_dev.tsv").open("w", newline="") as file:
        writer = csv.DictWriter(file, names, delimiter="\t")
        writer.writeheader()
        writer.writerows(rows)


def mmevalpro(folder):
    (folder / "data").mkdir()
    rows = [
        {"index": i, "triplet_id": 1, "question": "What?", "choices": ["red", "blue"], "answer": a, "image": {"bytes": png() if i else None, "path": None},
         "source": "MMMU", "question_category": "Art", "eval_type": part}
        for i, (part, a) in enumerate([("Origin", "A"), ("Perception", "blue"), ("Knowledge", "Z")])
    ]  # fmt: skip
    pq.write_table(pa.Table.from_pylist(rows), folder / "data/test-00000-of-00001.parquet", row_group_size=2)


def scienceqa(folder):
    picture(folder / "images/test/5/image.png")
    one = {
        "question": "Which state is farthest north?", "choices": ["West Virginia", "Louisiana"], "answer": 0, "hint": "A map.", "image": "image.png",
        "task": "closed choice", "grade": "grade2", "subject": "social science", "topic": "geography", "category": "Geography",
        "skill": "Read a map", "lecture": "", "solution": "", "split": "test",
    }  # fmt: skip
    dump(
        folder / "problems.json",
        {
            "5": one,
            "6": {**one, "image": None, "hint": ""},
            "7": {**one, "answer": 9, "image": None},
            "8": {**one, "split": "train"},
        },
    )
    dump(folder / "pid_splits.json", {"test": ["5", "6", "7", "9"], "train": ["8"]})


def video_mme(folder):
    (folder / "videos").mkdir()
    (folder / "videos/fFjv93ACGo8.mp4").write_bytes(b"0")
    row = {
        "video_id": "001", "duration": "short", "domain": "Knowledge", "sub_category": "Humanity", "url": "u", "videoID": "fFjv93ACGo8",
        "question_id": "001-1", "task_type": "Counting", "question": "How many?", "options": ["A. Apples.", "B. Candles.", "C. Berries."], "answer": "C",
    }  # fmt: skip
    rows = [row, {**row, "question_id": "001-2", "videoID": "gone"}, {**row, "question_id": "001-3", "options": ["A. x"]}]
    pq.write_table(pa.Table.from_pylist(rows), folder / "test-00000-of-00001.parquet")


def clotho_aqa(folder):
    import soundfile

    (folder / "audio_files").mkdir()
    soundfile.write(folder / "audio_files/rain.wav", np.zeros(1600, np.float32), 16000)
    rows = [["rain.wav", "Is it raining?", a, "yes"] for a in ("yes", "yes", "no")] + [
        ["rain.wav", "What falls?", "water", "maybe"]
    ]
    rows += [["gone.wav", "What?", "x", "yes"], ["rain.wav", "", "x", "yes"]]
    with (folder / "clotho_aqa_test.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["file_name", "QuestionText", "answer", "confidence"], *rows])


# of each format: the ids that are read, the answers, and what the sentences about the rest say
EXPECTED = {
    "pope": (["popular-1", "random-1", "popular-5"], ["yes", "yes", "no"], [
        "line 2 of coco_pope_popular.json: it is not valid JSON", "its file no.jpg is in none of", "its label is 'maybe'", "the id 'popular-1' stands there before",
        "line 6 of coco_pope_popular.json has no text"]),
    "gqa": (["201"], ["no"], ["question 202: its file gone.jpg is in none of", "question 203 has no answer"]),
    "vqav2": (["262148000", "262148002"], ["down", "down"], ["question 262148001: no annotation has its question_id", "question 262148000: its file COCO_val2014_000000000001.jpg"]),
    "seed-bench": (["101669", "17_0", "v1"], ["Two"] * 3, ["question v2: it asks about a part of a video", "question x: its answer 'E' is none of its 4 options", "question y has no choice_c"]),
    "mmbench": (["0", "1000000", "4"], ["blue", "red", "blue"], ["line 4 of mmbench_dev.tsv: its picture is that of row 77", "line 5 of mmbench_dev.tsv has no answer"]),
    "mmevalpro": (["0", "1"], ["red", "blue"], ["row 0 of group 1 of test-00000-of-00001.parquet: its answer 'Z' is none"]),
    "scienceqa": (["5", "6"], ["West Virginia"] * 2, ["problem 7: its answer '9' is none", "problem 9: problems.json does not hold it"]),
    "video-mme": (["001-1"], ["Berries."], ["its file gone.mp4 is in none of", "it offers 1 options"]),
    "clotho-aqa": (["1", "2"], ["yes", "water"], ["line 7 of clotho_aqa_test.csv has no QuestionText", "question 3: its file gone.wav"]),
}  # fmt: skip
WRITERS = {"pope": pope, "gqa": gqa, "vqav2": vqav2, "seed-bench": seed_bench, "mmbench": mmbench, "mmevalpro": mmevalpro, "scienceqa": scienceqa,
           "video-mme": video_mme, "clotho-aqa": clotho_aqa}  # fmt: skip


@pytest.mark.parametrize("name", EXPECTED)
def test_a_format_is_read_and_what_is_broken_is_named(name, tmp_path):
    WRITERS[name](tmp_path)
    data = load_data(f"{name}:{tmp_path}")
    ids, answers, problems = EXPECTED[name]
    assert [e.id for e in data.examples] == ids
    assert [e.answer for e in data.examples] == answers
    assert len(data.problems) == len(problems)
    for text in problems:
        assert any(text in problem for problem in data.problems), (text, data.problems)
    assert data.fingerprint == load_data(f"{name}:{tmp_path}").fingerprint
    assert len(load_data(f"{name}:{tmp_path}", limit=1)) == 1
    for example in data.examples:
        assert all(option in example.options for option in example.choices) or name == "pope"
        assert example.suffix


def test_all_nine_formats_were_covered():
    assert set(EXPECTED) == set(READERS) == set(WRITERS)
    assert len(READERS) == 9


def read(name, tmp_path):
    WRITERS[name](tmp_path)
    return load_data(f"{name}:{tmp_path}").examples


def test_tags_and_texts(tmp_path):
    first = read("pope", tmp_path / "a" if (tmp_path / "a").mkdir() is None else tmp_path)
    assert dict(first[2].tags) == {"kind": "exist", "split": "popular", "object": "umbrella"}
    (tmp_path / "b").mkdir()
    seed = read("seed-bench", tmp_path / "b")
    assert seed[0].options == "A. One\nB. Two\nC. Three\nD. Four"
    assert seed[0].tags["kind"] == "Instances Counting"
    assert (len(seed[1].images), len(seed[2].videos)) == (2, 1)
    (tmp_path / "c").mkdir()
    assert read("scienceqa", tmp_path / "c")[0].context == "A map."
    (tmp_path / "d").mkdir()
    assert human_answers(read("vqav2", tmp_path / "d")[0]) == ("down",) * 9 + ("table",)
    (tmp_path / "e").mkdir()
    heard = read("clotho-aqa", tmp_path / "e")
    assert [(e.tags["kind"], e.tags["group"]) for e in heard] == [("yes/no", "split"), ("word", "unanimous")]


def test_pictures_stay_where_they_are_until_they_are_asked_for(tmp_path):
    (tmp_path / "a").mkdir()
    shown = read("mmbench", tmp_path / "a")
    assert [open_picture(e.images[0]).size for e in shown[:2]] == [(60, 40)] * 2
    with pytest.raises(ExampleError, match="the picture of 4 is not base64"):
        open_picture(shown[2].images[0])
    (tmp_path / "b").mkdir()
    packed = read("mmevalpro", tmp_path / "b")
    assert open_picture(packed[1].images[0]).size == (60, 40)
    with pytest.raises(ExampleError, match=r"row 0 of group 0 of .*parquet holds no picture"):
        open_picture(packed[0].images[0])


def test_video_mme_as_json(tmp_path):
    (tmp_path / "videos").mkdir()
    (tmp_path / "videos/001.mp4").write_bytes(b"0")
    question = {"question_id": "001-1", "task_type": "t", "question": "q?", "options": ["A. x", "B. y"], "answer": "B"}
    dump(tmp_path / "v.json", [{"video_id": "001", "duration": "short", "questions": [question, {"question_id": "001-2"}]}])
    data = load_data(f"video-mme:{tmp_path / 'v.json'}")
    assert (data.examples[0].answer, data.problems) == ("y", ("question 001-2 has no options",))


WRONG = {
    "poep:x": "there is no data set 'poep:x' .did you mean 'pope'",
    "demo:vidoe": "did you mean 'demo:video'",
    "pope:": "pope: names no file: write pope:PATH",
    "gqa:nowhere": "there is no file or folder nowhere",
}


@pytest.mark.parametrize("source", WRONG)
def test_a_wrong_name_is_answered_with_the_nearest(source):
    with pytest.raises(DataError, match=WRONG[source]):
        load_data(source)
    assert len(WRONG) == 4


def test_nothing_that_can_be_read_is_refused(tmp_path):
    lines(tmp_path / "coco_pope_random.json", "nonsense")
    with pytest.raises(
        DataError, match=r"gives no examples: none of 1 entries could be read; the first: line 1 of .* not valid JSON"
    ):
        load_data(f"pope:{tmp_path}")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"holds no \*questions\*\.json"):
        load_data(f"gqa:{tmp_path / 'empty'}")
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(DataError, match=r"broken.json is not valid JSON"):
        load_data(f"gqa:{tmp_path / 'broken.json'}")


def mmbench_rows(path, *rows):
    cell = base64.b64encode(png()).decode()
    with path.open("w", newline="") as file:
        writer = csv.writer(file, delimiter="\t")
        writer.writerow(["index", "question", "A", "B", "C", "D", "answer", "image"])
        writer.writerows([str(i), "Which?", *row, cell] for i, row in enumerate(rows))


def test_an_empty_option_shifts_no_letter(tmp_path):
    """The answer's letter is that of the column; "nan" is a word like another, and "B" may be the text of option A."""
    mmbench_rows(
        tmp_path / "m.tsv", ["alpha", "", "gamma", "delta", "C"], ["alpha", "", "gamma", "delta", "D"], ["alpha", "", "gamma", "delta", "B"],
        ["nan", "pita", "", "", "A"], ["B", "A", "", "", "A"],
    )  # fmt: skip
    data = load_data(f"mmbench:{tmp_path / 'm.tsv'}")
    assert [(e.answer, e.choices) for e in data.examples] == [
        ("gamma", ("alpha", "gamma", "delta")), ("delta", ("alpha", "gamma", "delta")), ("nan", ("nan", "pita")), ("B", ("B", "A")),
    ]  # fmt: skip
    assert data.problems == ("line 4 of m.tsv: its answer 'B' is an empty option",)


def test_a_limit_keeps_every_split_of_pope(tmp_path):
    picture(tmp_path / "images/p.jpg")
    for split, count in (("adversarial", 5), ("popular", 3), ("random", 1)):
        rows = [
            {"question_id": i, "image": "p.jpg", "text": f"Is there a thing{i} in the image?", "label": "yes"}
            for i in range(count)
        ]
        lines(tmp_path / f"coco_pope_{split}.json", *rows)
    found = load_data(f"pope:{tmp_path}", limit=5).examples
    assert [e.id for e in found] == ["adversarial-0", "popular-0", "random-0", "adversarial-1", "popular-1"]
    assert len(load_data(f"pope:{tmp_path}").examples) == 9


MISSHAPEN = {  # format, what its JSON holds instead, and the sentence
    "seed, number": ("seed-bench", "SEED-Bench.json", {"questions": 3}, r"SEED-Bench.json has no list 'questions'"),
    "seed, list": ("seed-bench", "SEED-Bench.json", [1, 2], r"SEED-Bench.json is not an object of questions"),
    "seed, none": ("seed-bench", "SEED-Bench.json", {"question_type": {}}, r"SEED-Bench.json has no list 'questions'"),
    "seed, words": ("seed-bench", "SEED-Bench.json", {"questions": ["x"]}, r"question number 0: it is not a JSON object"),
    "seed, kinds": (
        "seed-bench",
        "SEED-Bench.json",
        {"questions": [], "question_type": [1]},
        r"its question_type is no object",
    ),
    "vqav2, list": (
        "vqav2",
        "v2_OpenEnded_mscoco_val2014_questions.json",
        [1],
        r"questions.json is not an object of questions",
    ),
    "gqa, numbers": ("gqa", "testdev_balanced_questions.json", {"1": 3}, r"question 1: it is not a JSON object"),
    "scienceqa, list": ("scienceqa", "problems.json", [1], r"problems.json is not an object of problems by id"),
    "video, object": ("video-mme", "v.json", {"a": 1}, r"v.json is not a list of questions, or of videos with theirs"),
    "video, words": ("video-mme", "v.json", ["x"], r"entry number 0: it is not a JSON object"),
    "video, numbers": ("video-mme", "v.json", [{"questions": [3]}], r"entry number 0: its questions are not JSON objects"),
}


@pytest.mark.parametrize("case", MISSHAPEN)
def test_json_of_another_shape_is_answered_with_a_sentence(case, tmp_path):
    name, file, content, message = MISSHAPEN[case]
    dump(tmp_path / file, content)
    with pytest.raises(DataError, match=message):
        load_data(f"{name}:{tmp_path}")
    assert len(MISSHAPEN) == 11


def test_annotations_of_another_shape_are_answered_with_a_sentence(tmp_path):
    vqav2(tmp_path)
    for content, message in (([1], "is not an object of annotations"), ({"annotations": 3}, "has no list 'annotations'")):
        dump(tmp_path / "v2_mscoco_val2014_annotations.json", content)
        with pytest.raises(DataError, match=message):
            load_data(f"vqav2:{tmp_path}")
