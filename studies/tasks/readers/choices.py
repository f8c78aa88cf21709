"""Readers of multiple-choice benchmarks: SEED-Bench, MMBench, MMEvalPro, ScienceQA and Video-MME."""

import re
from base64 import b64decode
from binascii import Error as Base64Error
from collections.abc import Iterator, Sequence
from functools import partial
from io import BytesIO
from itertools import takewhile
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError

from probe.errors import DataError, ExampleError
from probe.example import Example
from studies.tasks.readers.base import (
    LETTER_SUFFIX,
    LETTERS,
    Entry,
    Found,
    answer_index,
    collect,
    json_lines,
    lettered,
    list_in,
    medium,
    numbered,
    parquet_rows,
    read_json,
    read_object,
    table_rows,
    text_of,
    the_file,
    the_files,
)

_VIDEOS = (".mp4", ".avi", ".webm", ".mkv", ".mov")


def _asked(name: str, question: str, options: Sequence[str], answer: Any, tags: dict[str, Any], **rest: Any) -> Example:
    if len(options) < 2:
        raise DataError(f"it offers {len(options)} options, and a choice needs two")
    return Example(
        name, question, answer=options[answer_index(options, answer)], choices=tuple(options), options=lettered(options), suffix=LETTER_SUFFIX,
        tags={key: str(value) for key, value in tags.items() if value not in (None, "")}, **rest,
    )  # fmt: skip


def seed_bench(path: Path, limit: int | None = None) -> Found:
    """SEED-Bench 1 and 2: `questions` with `question_id question choice_a .. choice_d answer data_id data_type question_type_id`.

    `question_type` names the dimensions. `data_id` is a file, or a list of files, in `SEED-Bench-image`, `SEED-Bench-2-image`,
    `cc3m-image`, or the folder itself; SEED-Bench 1 writes pictures without `.jpg` and without a folder. Pictures in a list that are
    frames of a clip (`data_type` Video) are shown as pictures, as the benchmark gives them. A question about a part of a
    video (`segment`) is named and left out: no reader here cuts videos.
    """
    file = the_file(path, "SEED*.json", "*.json")
    found = read_object(file, "questions")
    questions, kinds = list_in(file, found, "questions"), found.get("question_type", {})
    if not isinstance(kinds, dict):
        raise DataError(f"{file}: its question_type is no object of numbers by name")
    names = {str(number): name for name, number in kinds.items()}

    def make(where: str, fields: dict[str, Any]) -> Example:
        options = [text_of(fields, f"choice_{letter}") for letter in "abcd"]
        shown = fields["data_id"] if isinstance(fields["data_id"], list) else [fields["data_id"]]
        if "segment" in fields:
            raise DataError("it asks about a part of a video, which is not cut out here")
        files = [_seed_file(file.parent, str(name)) for name in shown]
        moving = [one for one in files if one.suffix.lower() in _VIDEOS]
        tags = {"kind": names.get(str(fields.get("question_type_id"))), "group": fields.get("data_type")}
        return _asked(
            text_of(fields, "question_id"), text_of(fields, "question").replace("<img>", "the picture"), options, text_of(fields, "answer"), tags,
            images=tuple(one for one in files if one not in moving), videos=tuple(moving),
        )  # fmt: skip

    return collect(str(path), numbered(questions, "question"), make, [file], limit)


def _seed_file(root: Path, name: str) -> Path:
    folders = ("SEED-Bench-image", "SEED-Bench-2-image", "cc3m-image", "images", "videos")
    try:
        return medium(root, folders, name)
    except DataError:
        if Path(name).suffix:
            raise
        return medium(root, folders, f"{name}.jpg")


def mmbench(path: Path, limit: int | None = None) -> Found:
    """MMBench: a TSV of `index question hint A B C D answer category l2-category split image`, pictures in base64.

    A cell of a picture that is no longer than 64 characters is the index of the row whose picture it shares, as in the circular files.
    A hint stands before the question. Empty options are not offered, and the letter of the answer is that of the column, whichever are empty;
    rows without an answer (the test split), or whose answer is an empty option, are named.
    """
    file = the_file(path, "*.tsv")
    pictures: dict[str, str] = {}

    def make(where: str, row: dict[str, Any]) -> Example:
        number, cell = text_of(row, "index"), text_of(row, "image")
        pictures[number] = pictures[cell] if len(cell) <= 64 and cell in pictures else cell
        if len(pictures[number]) <= 64:
            raise DataError(f"its picture is that of row {cell}, which is not there")
        options, right = _offered(
            [row[letter].strip() for letter in takewhile(row.__contains__, LETTERS)], text_of(row, "answer")
        )
        hint = row.get("hint", "").strip()
        tags = {
            "kind": row.get("category"),
            "group": row.get("l2-category") or row.get("L2-category"),
            "split": row.get("split"),
        }
        return _asked(
            number, text_of(row, "question"), options, right, tags, context="" if hint == "nan" else hint,
            images=(partial(_from_base64, pictures[number], number),),
        )  # fmt: skip

    return collect(str(path), table_rows(file, "\t"), make, [file], limit)


def _offered(cells: Sequence[str], answer: str) -> tuple[list[str], int]:
    """The options that are not empty, and which of them is right: the letter counts the empty ones as well."""
    right = answer_index(cells, answer)
    if not cells[right]:
        raise DataError(f"its answer {answer!r} is an empty option")
    return [cell for cell in cells if cell], sum(bool(cell) for cell in cells[:right])


def _from_base64(text: str, name: str) -> Image.Image:
    try:
        return _decoded(b64decode(text, validate=True), name)
    except Base64Error as error:
        raise ExampleError(f"the picture of {name} is not base64: {error}") from error


def _decoded(content: bytes, name: str) -> Image.Image:
    try:
        return Image.open(BytesIO(content)).convert("RGB")
    except (UnidentifiedImageError, OSError) as error:
        raise ExampleError(f"the picture of {name} cannot be opened: {error}") from error


def mmevalpro(path: Path, limit: int | None = None) -> Found:
    """MMEvalPro: Parquet files of `index triplet_id question choices answer image source question_category eval_type`.

    `path` is one file or the folder (`data/test-*.parquet`, or any below it); `image` is `{bytes, path}` and stays in the file until an
    example is put to the model. Tags: `triplet`, `part` (Origin, Perception, Knowledge), `group` (the source), `kind`.
    """
    files = the_files(path, "data/test-*.parquet", "*.parquet")

    def entries() -> Iterator[Entry]:
        for file in files:
            for where, row, group, number in parquet_rows(file, ("image",)):
                yield where, {**row, "picture": partial(_from_parquet, file, group, number)}

    def make(where: str, row: dict[str, Any]) -> Example:
        options = [str(option) for option in row["choices"]]
        tags = {
            "triplet": text_of(row, "triplet_id"),
            "part": text_of(row, "eval_type"),
            "group": row.get("source"),
            "kind": row.get("question_category"),
        }
        return _asked(
            text_of(row, "index"), text_of(row, "question"), options, text_of(row, "answer"), tags, images=(row["picture"],)
        )

    return collect(str(path), entries(), make, files, limit)


def _from_parquet(file: Path, group: int, number: int) -> Image.Image:
    import pyarrow.parquet as pq

    cell = pq.ParquetFile(file).read_row_group(group, ["image"])["image"][number].as_py()
    if not cell or not cell.get("bytes"):
        raise ExampleError(f"row {number} of group {group} of {file.name} holds no picture")
    return _decoded(cell["bytes"], f"row {number} of group {group} of {file.name}")


def scienceqa(path: Path, limit: int | None = None, split: str = "test") -> Found:
    """ScienceQA: `problems.json` (id to `question choices answer hint image subject topic category skill split`) and `pid_splits.json`.

    `answer` is the index of the choice, `image` a file name or null; the file is `images/<split>/<id>/image.png`, or without
    `images`. The test split is read. A hint stands before the question. Questions without a picture are kept, with the tag
    `group` text.
    """
    file = the_file(path, "problems.json")
    problems = read_object(file, "problems by id")
    listed = file.parent / "pid_splits.json"
    if listed.is_file():
        ids = list_in(listed, read_object(listed, "ids by split"), split)
    else:
        ids = [i for i, p in problems.items() if isinstance(p, dict) and p.get("split") == split]

    def make(where: str, number: str) -> Example:
        if number not in problems:
            raise DataError(f"{file.name} does not hold it")
        fields = problems[number]
        if not isinstance(fields, dict):
            raise DataError("it is not a JSON object")
        shown = f"{split}/{number}/{fields['image']}" if fields.get("image") else ""
        pictures = (medium(file.parent, ("images",), shown),) if shown else ()
        tags = {
            "kind": fields.get("subject"),
            "group": "picture" if shown else "text",
            "topic": fields.get("topic"),
            "split": split,
        }
        return _asked(
            number, text_of(fields, "question"), [str(choice) for choice in fields["choices"]], fields["answer"], tags,
            context=str(fields.get("hint") or "").strip(), images=pictures,
        )  # fmt: skip

    files = [file, listed] if listed.is_file() else [file]
    return collect(str(path), ((f"problem {i}", str(i)) for i in ids), make, files, limit)


def video_mme(path: Path, limit: int | None = None) -> Found:
    """Video-MME: Parquet (`videomme/test-*.parquet`) or JSON of `videoID question_id task_type question options answer`.

    The JSON may be a list of such rows, lines of them, or the benchmark's own list of videos, each with its `questions`. `options` are written
    `A. text`. Videos (`<videoID>.mp4`) lie in `data`, `videos` or `video` below or beside the folder. Tags: `kind` the task type, `group` the
    duration, `domain`, `sub_category`.
    """
    file = the_file(path, "videomme/test-*.parquet", "test-*.parquet", "*.parquet", "*.json", "*.jsonl")

    def make(where: str, row: dict[str, Any]) -> Example:
        options = [re.sub(r"^\s*\(?[A-Z][.):]\s*", "", str(option)).strip() for option in row["options"]]
        name = str(row.get("videoID") or row.get("video_id") or "")
        if not name:
            raise KeyError("videoID")
        folders = ("data", "videos", "video", *(f"../{folder}" for folder in ("data", "videos", "video")))
        tags = {
            "kind": row.get("task_type"),
            "group": row.get("duration"),
            "domain": row.get("domain"),
            "sub_category": row.get("sub_category"),
        }
        return _asked(
            text_of(row, "question_id"), text_of(row, "question"), options, text_of(row, "answer"), tags,
            videos=(medium(file.parent, folders, f"{name}.mp4"),),
        )  # fmt: skip

    return collect(str(path), _video_entries(file), make, [file], limit)


def _video_entries(file: Path) -> Iterator[Entry]:
    if file.suffix == ".parquet":
        yield from ((where, row) for where, row, _, _ in parquet_rows(file))
    elif file.suffix == ".jsonl":
        yield from json_lines(file)
    else:
        found = read_json(file)
        if not isinstance(found, list):
            raise DataError(f"{file} is not a list of questions, or of videos with theirs")
        for where, item in numbered(found, "entry"):
            yield from _of_video(where, item)


def _of_video(where: str, item: Any) -> Iterator[Entry]:
    """The questions of one entry, which is a question itself where it holds none."""
    if isinstance(item, Exception):
        yield where, item
        return
    shared = {key: value for key, value in item.items() if key != "questions"}
    asked = item.get("questions", [{}])
    for fields in asked if isinstance(asked, list) else [asked]:
        if not isinstance(fields, dict):
            yield where, DataError("its questions are not JSON objects")
            continue
        row = {**shared, **fields}
        yield f"question {row['question_id']}" if "question_id" in row else f"a question of {where}", row
