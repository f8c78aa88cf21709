"""Readers of benchmarks with open answers: POPE, GQA, VQAv2 and Clotho-AQA."""

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from probe.errors import DataError
from probe.example import Example
from studies.tasks.readers.base import (
    SHORT_SUFFIX,
    Entry,
    Found,
    collect,
    in_turn,
    json_lines,
    list_in,
    medium,
    numbered,
    read_object,
    table_rows,
    text_of,
    the_file,
    the_files,
)
from studies.tasks.scores_pope import SPLITS, asked_object


def human_answers(example: Example) -> tuple[str, ...]:
    """What people answered to a question of VQAv2 or Clotho-AQA (a JSON list in the tag `answers`); empty for other examples.

    Raises DataError where the tag holds something else.
    """
    try:
        found = json.loads(example.tags.get("answers", "[]"))
    except ValueError:
        found = None
    if not isinstance(found, list) or not all(isinstance(one, str) for one in found):
        raise DataError(f"the tag 'answers' of example {example.id!r} is no JSON list of what people answered")
    return tuple(found)


def pope(path: Path, limit: int | None = None) -> Found:
    """POPE: lines of `question_id image text label`, as in `coco_pope_random.json` (which is JSONL), one file for each split.

    A folder may hold all three; the split is read off a file's name, and lines are taken from the files in turn, so that a limit keeps
    all splits. Pictures (`COCO_val2014_...jpg`) lie beside the file, or in
    `val2014`, `images` or `coco/val2014`.
    """
    files = the_files(path, "*pope*.json*", "*.jsonl", "*.json")

    def entries(file: Path) -> Iterator[Entry]:
        split = next((name for name in SPLITS if name in file.stem), "")
        for where, fields in json_lines(file):
            yield where, fields if isinstance(fields, Exception) else {**fields, "split": split, "root": file.parent}

    def make(where: str, fields: dict[str, Any]) -> Example:
        answer = text_of(fields, "label").lower()
        if answer not in ("yes", "no"):
            raise DataError(f"its label is {answer!r}, and not yes or no")
        prompt, number = text_of(fields, "text"), text_of(fields, "question_id")
        picture = medium(fields["root"], ("val2014", "images", "coco/val2014"), text_of(fields, "image"))
        tags = {"kind": "exist", "split": fields["split"], "object": asked_object(prompt)}
        name = f"{fields['split']}-{number}" if fields["split"] else number
        return Example(
            name,
            prompt,
            (picture,),
            answer=answer,
            choices=("yes", "no"),
            suffix=SHORT_SUFFIX,
            tags={k: v for k, v in tags.items() if v},
        )

    return collect(str(path), in_turn(map(entries, files)), make, files, limit)


def gqa(path: Path, limit: int | None = None) -> Found:
    """GQA: one object, question id to `imageId question answer fullAnswer isBalanced groups types`, as in `testdev_balanced_questions.json`.

    Pictures (`<imageId>.jpg`) lie in `images` below or beside the file's folder. Tags: `kind` and `group` are the
    structural and the semantic type, `detail` the detailed one.
    """
    file = the_file(path, "*questions*.json")
    found = read_object(file, "questions by id")

    def make(where: str, fields: dict[str, Any]) -> Example:
        picture = medium(file.parent, ("images", "allImages/images"), f"{text_of(fields, 'imageId')}.jpg")
        types = fields.get("types") or {}
        tags = {"kind": types.get("structural"), "group": types.get("semantic"), "detail": types.get("detailed")}
        return Example(
            where.removeprefix("question "), text_of(fields, "question"), (picture,), answer=text_of(fields, "answer"), suffix=SHORT_SUFFIX,
            tags={key: str(value) for key, value in tags.items() if value},
        )  # fmt: skip

    entries = (
        (f"question {key}", value if isinstance(value, dict) else DataError("it is not a JSON object"))
        for key, value in found.items()
    )
    return collect(str(path), entries, make, [file], limit)


def vqav2(path: Path, limit: int | None = None) -> Found:
    """VQAv2: `v2_OpenEnded_mscoco_val2014_questions.json` and, beside it, `v2_mscoco_val2014_annotations.json`.

    Questions have `question_id image_id question`, annotations `question_id answers[].answer multiple_choice_answer question_type
    answer_type`. Pictures are `COCO_<subtype>_<image_id in twelve digits>.jpg` in a folder of the subtype's name, or `images`. The answer
    is the annotators' most frequent one; all ten are in `human_answers`.
    """
    file = the_file(path, "*uestions.json")
    asked = read_object(file, "questions")
    questions = list_in(file, asked, "questions")
    subtype = asked.get("data_subtype", "val2014")
    notes = next(iter(sorted(file.parent.glob(f"*{subtype}*nnotations.json"))), None)
    if notes is None:
        raise DataError(f"no *{subtype}*annotations.json lies beside {file}: the answers are in it")
    listed = list_in(notes, read_object(notes, "annotations"), "annotations")
    told = {note.get("question_id"): note for note in listed if isinstance(note, dict)}

    def make(where: str, fields: dict[str, Any]) -> Example:
        number = fields["question_id"]
        if number not in told:
            raise DataError("no annotation has its question_id")
        note = told[number]
        picture = medium(file.parent, (subtype, "images"), f"COCO_{subtype}_{int(fields['image_id']):012d}.jpg")
        tags = {
            "kind": note.get("answer_type"),
            "group": note.get("question_type"),
            "answers": json.dumps([a["answer"] for a in note["answers"]]),
        }
        return Example(
            str(number), text_of(fields, "question"), (picture,), answer=text_of(note, "multiple_choice_answer"), suffix=SHORT_SUFFIX,
            tags={key: str(value) for key, value in tags.items() if value},
        )  # fmt: skip

    return collect(str(path), numbered(questions, "question"), make, [file, notes], limit)


def clotho_aqa(path: Path, limit: int | None = None) -> Found:
    """Clotho-AQA: `clotho_aqa_test.csv` with `file_name QuestionText answer confidence`, a line for each of three annotators.

    Lines of one file and question are one example, whose answer is the one that most gave, the first of them in a tie; all are in
    `human_answers`. Sounds lie in `audio_files` below or beside the table's folder. `kind` is `yes/no` or `word`, and `group` says whether
    the annotators were `unanimous` or `split`.
    """
    file = the_file(path, "clotho_aqa_test.csv", "*.csv")
    asked: dict[tuple[str, str], list[str]] = {}
    broken: list[Entry] = []
    for where, row in table_rows(file, ","):
        try:
            if isinstance(row, Exception):
                raise row
            asked.setdefault((text_of(row, "file_name"), text_of(row, "QuestionText")), []).append(
                text_of(row, "answer").lower()
            )
        except (DataError, KeyError) as error:
            broken.append((where, error))

    def make(where: str, answers: list[str]) -> Example:
        (name, question), number = keys[where], where.removeprefix("question ")
        counted = Counter(answers)
        tags = {
            "kind": "yes/no" if set(answers) <= {"yes", "no"} else "word",
            "group": "unanimous" if len(counted) == 1 else "split", "answers": json.dumps(answers),
        }  # fmt: skip
        sound = medium(file.parent, ("audio_files",), name)
        return Example(number, question, sounds=(sound,), answer=counted.most_common(1)[0][0], suffix=SHORT_SUFFIX, tags=tags)

    keys = {f"question {i}": key for i, key in enumerate(asked, 1)}
    entries = [*broken, *((where, asked[key]) for where, key in keys.items())]
    return collect(str(path), entries, make, [file], limit)
