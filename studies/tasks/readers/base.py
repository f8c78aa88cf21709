"""What readers of published formats share: entries that are broken are named and counted, media are found but not opened."""

import csv
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from probe.errors import DataError, SightlineError
from probe.example import Example

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
LETTER_SUFFIX = "Answer with the option's letter from the given choices directly."
SHORT_SUFFIX = "Answer the question using a single word or phrase."
Entry = tuple[str, Any]  # where it stands (a line, an id), and what it holds


@dataclass(frozen=True)
class Found:
    """The examples of a benchmark, a sentence for each entry that could not be read, and a fingerprint of the files."""

    examples: tuple[Example, ...]
    problems: tuple[str, ...]
    fingerprint: str


def collect(
    name: str, entries: Iterable[Entry], make: Callable[[str, Any], Example], files: Sequence[Path], limit: int | None
) -> Found:
    """An Example of each entry, until there are `limit`; an entry that is broken is named, and the rest goes on.

    Raises DataError when not one can be read, with the first reason.
    """
    examples: list[Example] = []
    problems: list[str] = []
    seen: set[str] = set()
    for where, entry in entries:
        if limit is not None and len(examples) >= limit:
            break
        try:
            example = make(where, _sound(entry))
            if example.id in seen:
                raise DataError(f"the id {example.id!r} stands there before")
        except KeyError as error:
            problems.append(f"{where} has no {error.args[0]}")
        except (SightlineError, TypeError, ValueError, AttributeError) as error:
            problems.append(f"{where}: {error}")
        else:
            seen.add(example.id)
            examples.append(example)
    if not examples:
        first = f"none of {len(problems)} entries could be read; the first: {problems[0]}" if problems else "it has no entries"
        raise DataError(f"{name} gives no examples: {first}")
    return Found(tuple(examples), tuple(problems), fingerprint(files))


def _sound(entry: Any) -> Any:
    if isinstance(entry, Exception):
        raise entry
    return entry


def fingerprint(files: Sequence[Path]) -> str:
    digest = sha256()
    for path in files:
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


# --- files -----------------------------------------------------------------------------------------------------------


def the_file(path: Path, *patterns: str) -> Path:
    """The file itself, or the one file of a folder that fits one of the patterns, tried in order. Raises DataError."""
    return the_files(path, *patterns, most=1)[0]


def the_files(path: Path, *patterns: str, most: int | None = None) -> list[Path]:
    """The file itself, or all files of a folder that fit the first pattern that any fit."""
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise DataError(f"there is no file or folder {path}")
    found = next((hits for pattern in patterns if (hits := sorted(path.glob(pattern)))), [])
    if not found:
        raise DataError(f"{path} holds no {' or '.join(patterns)}")
    if most is not None and len(found) > most:
        raise DataError(f"{path} holds several files that could be meant ({', '.join(p.name for p in found[:3])}): name one")
    return found


def read_json(path: Path) -> Any:
    """A JSON file. Raises DataError where it is damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text: {error.reason}") from error
    except ValueError as error:
        raise DataError(f"{path} is not valid JSON: {error}") from error


def read_object(path: Path, holds: str) -> dict[str, Any]:
    """A JSON file that is an object; `holds` says of what, as in "questions by id". Raises DataError where it is none."""
    found = read_json(path)
    if not isinstance(found, dict):
        raise DataError(f"{path} is not an object of {holds}")
    return found


def list_in(path: Path, found: Mapping[str, Any], name: str) -> list[Any]:
    """A list that an object of a file must hold. Raises DataError where it does not."""
    if not isinstance(found.get(name), list):
        raise DataError(f"{path} has no list {name!r}")
    listed: list[Any] = found[name]
    return listed


def numbered(items: Iterable[Any], kind: str, key: str = "question_id") -> Iterator[Entry]:
    """Each item under its id, or its number where it has none; one that is no object is an error in its place."""
    for i, item in enumerate(items):
        if isinstance(item, dict):
            yield f"{kind} {item.get(key, f'number {i}')}", item
        else:
            yield f"{kind} number {i}", DataError("it is not a JSON object")


def in_turn(files: Iterable[Iterable[Entry]]) -> Iterator[Entry]:
    """One entry of each file in turn, so that the first of them are of all files alike; a file that is at its end is passed over."""
    left = [iter(file) for file in files]
    while left:
        for file in list(left):
            try:
                yield next(file)
            except StopIteration:
                left.remove(file)


def json_lines(path: Path) -> Iterator[Entry]:
    """Each line of a JSONL file as an object; a broken line is an error in its place."""
    with path.open("rb") as file:
        for number, raw in enumerate(file, 1):
            where = f"line {number} of {path.name}"
            if not raw.strip():
                continue
            try:
                found = json.loads(raw.decode("utf-8"))
            except ValueError as error:
                yield where, DataError(f"it is not valid JSON: {error}")
                continue
            yield where, found if isinstance(found, dict) else DataError("it is not a JSON object")


def table_rows(path: Path, delimiter: str) -> Iterator[Entry]:
    """Rows of a CSV or TSV with a header, fields by name. Raises DataError where it is not UTF-8 text."""
    csv.field_size_limit(1 << 30)  # a cell may hold a picture
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = csv.DictReader(file, delimiter=delimiter)
        try:
            for row in rows:
                short = None in row or None in row.values()
                yield (
                    f"line {rows.line_num} of {path.name}",
                    DataError("it has more or fewer fields than the header") if short else row,
                )
        except UnicodeDecodeError as error:
            raise DataError(f"{path} is not UTF-8 text: {error.reason}") from error


def parquet_rows(path: Path, without: Sequence[str] = ()) -> Iterator[tuple[str, dict[str, Any], int, int]]:
    """Rows of a Parquet file but for some columns: (where, row, its row group, its number in the group)."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
        columns = [name for name in file.schema_arrow.names if name not in without]
        for group in range(file.num_row_groups):
            for number, row in enumerate(file.read_row_group(group, columns).to_pylist()):
                yield f"row {number} of group {group} of {path.name}", row, group, number
    except pa.ArrowInvalid as error:
        raise DataError(f"{path} cannot be read as Parquet: {error}") from error


# --- media -----------------------------------------------------------------------------------------------------------


def medium(root: Path, folders: Sequence[str], name: str) -> Path:
    """A file of that name in the folder, or in one of those below it or beside it. Raises DataError where it is in none."""
    tried = [root / name, *(base / folder / name for base in (root, root.parent) for folder in folders)]
    found = next((path for path in tried if path.exists()), None)
    if found is None:
        places = dict.fromkeys(os.path.relpath(path.parent, root.parent) for path in tried)
        raise DataError(f"its file {name} is in none of {', '.join(places)}")
    return found


# --- options ---------------------------------------------------------------------------------------------------------


def lettered(options: Sequence[str]) -> str:
    """Options as prompts show them: a letter and its text on each line."""
    return "\n".join(f"{letter}. {text}" for letter, text in zip(LETTERS, options, strict=False))


def text_of(fields: Mapping[str, Any], name: str) -> str:
    """A field that must hold some text or a number. Raises KeyError with its name."""
    value = fields[name]
    if value is None or (isinstance(value, float) and value != value) or not str(value).strip():
        raise KeyError(name)
    return str(value).strip()


def answer_index(options: Sequence[str], answer: Any) -> int:
    """Which option a letter, a number, or its own text says is right. Raises DataError where it says none."""
    told = str(answer).strip()
    if isinstance(answer, int) and not isinstance(answer, bool) and 0 <= answer < len(options):
        return answer
    if told.upper().strip("().") in LETTERS[: len(options)] and len(told.strip("().")) == 1:
        return LETTERS.index(told.upper().strip("()."))
    if told in options:
        return options.index(told)
    raise DataError(f"its answer {told!r} is none of its {len(options)} options")
