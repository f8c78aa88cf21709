"""Run: a directory that survives being killed.

Work is done in units. A unit's rows appear all at once, as one Parquet part written under another name and renamed, so
that a run killed at any moment and started again holds the same records, byte for byte, as one that was never killed.
"""

import json
import math
import os
import platform
import subprocess
import time
import uuid
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from probe.errors import RunError

SCHEMA = 1
_PACKAGES = ("sightline", "torch", "transformers", "numpy", "scipy", "pyarrow", "pillow")
_FREE = ("limit",)  # fields of a configuration that may differ when a run is continued: more examples are more units


@dataclass(frozen=True)
class Sorts:
    """The rows of a run by what they are, each sort with the columns that it fills."""

    schema: pa.Schema
    tables: dict[str, pa.Table]

    def of(self, what: str) -> pa.Table:
        """The rows of one sort, with every column."""
        table = self.tables.get(what, self.schema.empty_table())
        for column in self.schema:
            if column.name not in table.column_names:
                table = table.append_column(column.name, pa.nulls(len(table), column.type))
        return table


@dataclass
class Run:
    """One run's directory. Make it with `Run.open`."""

    folder: Path
    study: str
    config: dict[str, Any]
    subject: dict[str, Any]
    schema: pa.Schema
    started: float = field(default_factory=time.time)

    @classmethod
    def open(cls, folder: Path | None, study: str, config: dict[str, Any], subject: dict[str, Any], schema: pa.Schema) -> "Run":
        """A new run, or the continuation of the one that the folder holds.

        Raises RunError when the folder cannot be written, holds something else, or holds a run that was asked
        something else (the sentence names the fields).
        """
        folder = folder or Path("runs") / study / f"{datetime.now():%Y%m%d-%H%M%S}-{uuid.uuid4().hex[:4]}"
        config = json.loads(json.dumps(config, default=str))
        run = cls(folder, study, config, subject, schema)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            present = sorted(path.name for path in folder.iterdir() if path.suffix != ".tmp")  # a kill may leave a .tmp
        except (OSError, NotADirectoryError) as error:
            raise RunError(f"{folder} cannot be made or read as a run directory: {error.strerror or error}") from error
        if (folder / "run.json").is_file():
            run._continue()
        elif present:
            raise RunError(
                f"{folder} holds other things ({', '.join(present[:3])}) and no run.json: name a new or empty folder"
            )
        run._save({"status": "running"})
        (folder / "records").mkdir(exist_ok=True)
        for leftover in (folder / "records").glob("*.tmp"):
            leftover.unlink()
        return run

    def _continue(self) -> None:
        try:
            before = json.loads((self.folder / "run.json").read_text())
        except (ValueError, OSError) as error:
            raise RunError(
                f"{self.folder / 'run.json'} is damaged or cannot be read: name a new folder, or delete this one"
            ) from error
        if before.get("study") != self.study:
            raise RunError(
                f"{self.folder} holds a run of the study {before.get('study')!r}, not {self.study!r}: name a new folder"
            )
        asked = {**self.config, "model": self.subject}
        was = {**before.get("config", {}), "model": before.get("subject")}
        differing = sorted(key for key in asked.keys() | was.keys() if asked.get(key) != was.get(key) and key not in _FREE)
        if differing:
            shown = "; ".join(f"{key}: {_brief(was.get(key))} before, {_brief(asked.get(key))} now" for key in differing)
            raise RunError(f"{self.folder} holds a run with another configuration ({shown}): name a new folder to start afresh")

    def _save(self, how: dict[str, Any]) -> None:
        before = self.folder / "run.json"
        history = json.loads(before.read_text()).get("sessions", []) if before.is_file() else []
        session = {"started": datetime.fromtimestamp(self.started, UTC).isoformat(timespec="seconds")}
        if not history or history[-1] != session:
            history = [*[item for item in history if item != session], session]
        self.write_json("run.json", {
            "schema": SCHEMA, "study": self.study, "config": self.config, "subject": self.subject,
            "environment": environment(), "sessions": history, **how,
        })  # fmt: skip

    # --- units ---

    def part(self, key: str) -> Path:
        return self.folder / "records" / f"part-{key}.parquet"

    def pending(self, keys: Iterable[str]) -> list[str]:
        """The keys whose rows are not there yet. Parts that another limit's rows set aside are there again."""
        keys = list(keys)
        for key in keys:
            aside = self._aside(self.part(key))
            if aside.is_file() and not self.part(key).is_file():
                aside.replace(self.part(key))
        return [key for key in keys if not self.part(key).is_file()]

    def _aside(self, part: Path) -> Path:
        return self.folder / "set-aside" / part.name

    def write(self, key: str, rows: Sequence[dict[str, Any]]) -> None:
        """A unit's rows, all at once. Raises RunError when they cannot be written (a full disk); nothing stays behind."""
        target = self.part(key)
        partial = target.with_suffix(".tmp")
        try:
            pq.write_table(pa.Table.from_pylist(list(rows), schema=self.schema), partial, compression="zstd")
            with partial.open("rb") as file:
                os.fsync(file.fileno())
            partial.replace(target)
        except OSError as error:
            partial.unlink(missing_ok=True)
            raise RunError(f"{target} cannot be written: {error.strerror or error}") from error

    def rows(self, keys: Iterable[str]) -> pa.Table:
        """All rows of some units, in the order of the keys.

        Parts of other units (another limit's) are moved to `set-aside`, so that `records` holds what the summary is of and nothing that was
        measured is lost: asked for again, they are back.
        """
        return pa.concat_tables(list(self._parts(keys))).unify_dictionaries()

    def sorts(self, keys: Iterable[str]) -> "Sorts":
        """As `rows`, by what they are (the column `what`): where most columns of a row are empty, one table of all would be the largest thing that a
        study holds.
        """
        found: dict[str, list[pa.Table]] = {}
        for part in self._parts(keys):
            for what in pc.unique(part["what"]).to_pylist():
                own = part.filter(pc.equal(part["what"], what))
                filled = [name for name in own.column_names if own[name].null_count < len(own)]
                found.setdefault(what, []).append(own.select(filled))
        whole = {what: pa.concat_tables(tables, promote_options="default") for what, tables in found.items()}
        return Sorts(self.schema, {what: table.unify_dictionaries() for what, table in whole.items()})

    def _parts(self, keys: Iterable[str]) -> Iterator[pa.Table]:
        keys = list(keys)
        for other in set((self.folder / "records").glob("part-*.parquet")) - {self.part(key) for key in keys}:
            self._aside(other).parent.mkdir(exist_ok=True)
            other.replace(self._aside(other))
        words = [field.name for field in self.schema if pa.types.is_string(field.type)]
        for key in keys:
            yield pq.read_table(self.part(key), schema=self.schema, read_dictionary=words)

    def rows_of(self, key: str) -> pa.Table:
        """The rows of one unit; no other is touched."""
        return pq.read_table(self.part(key), schema=self.schema)

    # --- results ---

    def write_json(self, name: str, value: Any) -> None:
        self.write_text(name, json.dumps(finite(value), indent=2, default=str, allow_nan=False) + "\n")

    def write_text(self, name: str, text: str) -> None:
        """A file of the run, written under another name and renamed."""
        target = self.folder / name
        partial = target.with_name(target.name + ".tmp")
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            partial.write_text(text)
            partial.replace(target)
        except OSError as error:
            partial.unlink(missing_ok=True)
            raise RunError(f"{target} cannot be written: {error.strerror or error}") from error

    def figure(self, name: str, paper: Any, page: Any) -> None:
        """One figure twice: `.png` from matplotlib, and `.html` from plotly, which needs no network."""
        folder = self.folder / "figures"
        try:
            folder.mkdir(exist_ok=True)
            paper.savefig(folder / f"{name}.png.tmp", dpi=200, bbox_inches="tight", format="png")
            page.write_html(folder / f"{name}.html.tmp", include_plotlyjs=True, full_html=True)
            for kind in ("png", "html"):
                (folder / f"{name}.{kind}.tmp").replace(folder / f"{name}.{kind}")
        except OSError as error:
            for kind in ("png", "html"):
                (folder / f"{name}.{kind}.tmp").unlink(missing_ok=True)
            raise RunError(f"the figure {name} cannot be written to {folder}: {error.strerror or error}") from error

    def finish(self, summary: dict[str, Any], report: str) -> None:
        """The summary, the report, and the run marked as done."""
        self.write_json("summary.json", summary)
        self.write_text("report.md", report)
        self._save({"status": "done", "seconds": round(time.time() - self.started, 1)})

    @contextmanager
    def recorded(self) -> Iterator[None]:
        """Whatever ends the work early is written into run.json; the records stay, and asking again continues."""
        try:
            yield
        except BaseException as error:
            self.fail(error)
            raise

    def fail(self, error: BaseException) -> None:
        """Says in run.json how the run ended; the records stay, and asking again continues."""
        self._save({"status": "failed", "error": f"{type(error).__name__}: {error}"})


def finite(value: Any) -> Any:
    """The same value with None where a number is not one (a correlation of constants), so that it is JSON."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def environment() -> dict[str, Any]:
    """Versions, machine and commit, as far as they can be known."""
    import torch

    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "python": platform.python_version(), "system": f"{platform.system()} {platform.machine()}", "versions": versions,
        "threads": torch.get_num_threads(), "gpus": devices, "commit": _commit(),
    }  # fmt: skip


def _commit() -> str | None:
    here = Path(__file__).parent
    try:
        head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, check=True)
        dirty = subprocess.run(["git", "status", "--porcelain"], cwd=here, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return head.stdout.strip() + ("+changes" if dirty.stdout.strip() else "")


def _brief(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
