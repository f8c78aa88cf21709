"""Data sets as lists of Examples: the bundled world, a JSONL beside its media, or a `datasets` folder."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

from probe.errors import DataError, SightlineError, did_you_mean
from probe.example import Example, Region

TELLINGS = {"demo": "picture", "demo:text": "text", "demo:video": "clip", "demo:audio": "sound"}
_MEDIA = {"images": "picture", "videos": "video", "sounds": "sound"}
_FIELDS = ("id", "prompt", *_MEDIA, "context", "suffix", "options", "system", "answer", "choices", "regions", "tags")


@dataclass(frozen=True)
class Data:
    """Examples in a fixed order, and a fingerprint of what they were made from."""

    name: str
    examples: tuple[Example, ...]
    fingerprint: str
    problems: tuple[str, ...] = ()  # what of a benchmark could not be read, a sentence each

    def __len__(self) -> int:
        return len(self.examples)


def load_data(source: str, limit: int | None = None, columns: Mapping[str, str] | None = None, seed: int = 0) -> Data:
    """`demo` (pictures), `demo:text` (text twins), `demo:video` (clips), `demo:audio` (sounds), a `.jsonl`, or a folder that `datasets` saved, or a hub id.

    A benchmark that lies on the disk as it was published is `pope:PATH`, `gqa:PATH` and so on (`studies.tasks.readers`); of those alone, what
    cannot be read is left out and named in `problems`. `columns` maps Example fields to the data set's columns (`image` stands for one picture). Raises DataError for a
    broken line, a duplicate id, or media that are not there, naming the line.
    """
    if limit is not None and limit < 1:
        raise DataError(f"a limit of {limit} leaves no examples: it must be at least 1")
    if source in TELLINGS:
        from studies.demo import data

        made = data.examples(limit or 700, TELLINGS[source], seed=data.SEED + seed)
        return Data(source, tuple(made), f"demo-world-2:{TELLINGS[source]}:{seed}")
    benchmark, colon, place = source.partition(":")
    if colon and not Path(source).exists() and "/" not in benchmark:
        return _benchmark(source, benchmark, place, limit)
    path = Path(source)
    if path.suffix == ".jsonl":
        return _jsonl(path, limit)
    if path.is_dir() or ("/" in source and not path.exists()):
        return _datasets(source, limit, dict(columns or {}))
    raise DataError(
        f"there is no data set {source!r}: name {', '.join(TELLINGS)}, a .jsonl file, a folder that datasets saved, or a "
        f"benchmark such as pope:PATH"
    )


def apart(data: Data, count: int) -> tuple[Data, tuple[Example, ...]]:
    """Data to be asked, and at most `count` other examples to calibrate on: of the bundled world other scenes, else every other example.

    Raises DataError where there are too few to be parted.
    """
    if data.name in TELLINGS:
        seed = int(data.fingerprint.rsplit(":", 1)[1])
        return data, load_data(data.name, count, seed=seed + 1000).examples
    if len(data) < 2:
        raise DataError(f"{data.name} has {len(data)} example: some to calibrate on and others to ask are needed")
    taken = data.examples[1::2][:count]
    ids = {example.id for example in taken}
    return replace(data, examples=tuple(e for e in data.examples if e.id not in ids)), taken


def _benchmark(source: str, name: str, place: str, limit: int | None) -> Data:
    from studies.tasks.readers import READERS

    if name not in READERS:
        known = (*TELLINGS, *(f"{reader}:PATH" for reader in READERS))
        near = did_you_mean(source, TELLINGS) if name == "demo" else did_you_mean(name, READERS)
        raise DataError(f"there is no data set {source!r}{near}: name {', '.join(known)}, a .jsonl file, or a folder")
    if not place:
        raise DataError(f"{source} names no file: write {name}:PATH")
    found = READERS[name](Path(place).expanduser(), limit)
    return Data(source, found.examples, found.fingerprint, found.problems)


def _jsonl(path: Path, limit: int | None) -> Data:
    if not path.is_file():
        raise DataError(f"there is no file {path}")
    found: list[Example] = []
    lines: dict[str, int] = {}
    with path.open("rb") as file:
        for number, raw in enumerate(file, 1):
            try:
                line = raw.decode("utf-8")
            except UnicodeDecodeError as error:
                raise DataError(f"line {number} of {path} is not UTF-8 text: {error.reason}") from error
            if limit is not None and len(found) >= limit:
                break
            if line.strip():
                example = _from_line(line, number, path)
                if example.id in lines:
                    raise DataError(
                        f"{path} has the id {example.id!r} on lines {lines[example.id]} and {number}: ids must differ"
                    )
                lines[example.id] = number
                found.append(example)
    if not found:
        raise DataError(f"{path} holds no examples: one JSON object on each line was expected")
    return Data(str(path), tuple(found), sha256(path.read_bytes()).hexdigest()[:16])


def _from_line(line: str, number: int, path: Path) -> Example:
    try:
        fields = json.loads(line)
    except ValueError as error:
        raise DataError(f"line {number} of {path} is not valid JSON: {error}") from error
    if not isinstance(fields, dict):
        raise DataError(f"line {number} of {path} is not a JSON object with a prompt")
    fields.setdefault("id", str(number))
    if unknown := sorted(set(fields) - set(_FIELDS)):
        raise DataError(
            f"line {number} of {path} has unknown fields {', '.join(unknown)} (an example has {', '.join(_FIELDS)})"
        )
    if not isinstance(fields.get("prompt"), str):
        raise DataError(f"line {number} of {path} has no prompt")
    media = {kind: tuple(path.parent / str(name) for name in fields.get(kind) or ()) for kind in _MEDIA}
    for kind, files in media.items():
        for file in files:
            if not file.exists():  # a video may be a folder of frames
                raise DataError(f"line {number} of {path} names the {_MEDIA[kind]} {file}, which is not there")
    try:
        return _example({**fields, **media})
    except (SightlineError, TypeError, KeyError, ValueError, AttributeError) as error:
        raise DataError(f"line {number} of {path} is not an example: {error}") from error


def _box(sides: Any) -> tuple[float, float, float, float]:
    left, top, right, bottom = (float(side) for side in sides)
    return left, top, right, bottom


def _example(fields: dict[str, Any]) -> Example:
    for name in (*_MEDIA, "choices", "regions"):
        if isinstance(fields.get(name), str):
            raise DataError(f"{name} is a list, not {fields[name]!r}")
    fields = {name: value for name, value in fields.items() if value is not None}
    fields |= {name: str(fields[name]) for name in ("id", "answer") if name in fields}
    if not isinstance(fields.get("prompt"), str):
        raise DataError("it has no prompt")
    regions = tuple(Region(_box(r["box"]), r.get("label", ""), r.get("picture", 0)) for r in fields.get("regions", ()))
    return Example(**{
        **fields, "regions": regions, "choices": tuple(str(c) for c in fields.get("choices", ())),
        "tags": {str(key): str(value) for key, value in fields.get("tags", {}).items()},
    })  # fmt: skip


def _datasets(source: str, limit: int | None, columns: dict[str, str]) -> Data:
    import datasets

    try:
        table = datasets.load_from_disk(source) if Path(source).is_dir() else datasets.load_dataset(source)
    except Exception as error:  # datasets raises a different class for each way a folder or a hub id can be wrong
        raise DataError(f"{source} cannot be opened as a data set: {str(error).splitlines()[0]}") from error
    if isinstance(table, datasets.DatasetDict):
        split = next((name for name in ("test", "validation", "val", "train") if name in table), next(iter(table)))
        table = table[split]
    missing = [column for column in columns.values() if column not in table.column_names]
    if missing or not (columns.get("prompt") or "prompt" in table.column_names):
        wanted = missing[0] if missing else "prompt"
        raise DataError(
            f"{source} has no column {wanted!r} (it has {', '.join(table.column_names)}): map fields with --columns prompt=question"
        )
    # Pictures stay on disk until an example is put to the model.
    pictures = [name for name, kind in table.features.items() if _holds_pictures(kind, datasets.Image)]
    words = table.remove_columns(pictures)
    count = len(table) if limit is None else min(limit, len(table))
    found: list[Example] = []
    rows: dict[str, int] = {}
    for number in range(count):
        try:
            example = _from_row(words[number], table, number, columns, pictures)
        except (SightlineError, TypeError, KeyError, ValueError, AttributeError) as error:
            raise DataError(f"row {number} of {source} is not an example: {error}") from error
        if example.id in rows:
            raise DataError(f"{source} has the id {example.id!r} in rows {rows[example.id]} and {number}: ids must differ")
        rows[example.id] = number
        found.append(example)
    return Data(source, tuple(found), str(table._fingerprint))


def _holds_pictures(kind: Any, picture: type) -> bool:
    return isinstance(kind, picture) or isinstance(getattr(kind, "feature", None), picture)


def _from_row(row: dict[str, Any], table: Any, number: int, columns: dict[str, str], pictures: list[str]) -> Example:
    fields = {name: row[columns.get(name, name)] for name in _FIELDS if columns.get(name, name) in row}
    shown = next((c for c in (columns.get("images", "images"), columns.get("image", "image")) if c in pictures), None)
    fields["images"] = ()
    if shown is not None:
        single = not hasattr(table.features[shown], "feature")
        count = 1 if single else len(table[number][shown])
        fields["images"] = tuple(partial(_cell, table, number, shown, None if single else i) for i in range(count))
    fields["id"] = str(fields.get("id", number))
    if isinstance(fields.get("answer"), list):
        fields["answer"] = fields["answer"][0] if fields["answer"] else None
    return _example(fields)


def _cell(table: Any, number: int, column: str, index: int | None) -> Any:
    found = table[number][column]
    return found if index is None else found[index]
