"""Recorded tensors on disk: safetensors shards with a Parquet index, written while examples pass, read back lazily.

A store's folder holds `store.json` (what was recorded, of which model), `shard-00000.safetensors` and so on (a tensor for each
example and record), and `index-00000.parquet` for each shard, written after it, so that what the index names is there.
"""

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from probe.errors import StoreError, did_you_mean
from probe.recorders import Named
from probe.tracing import Trace

FORMAT, SHARD_BYTES = 1, 256 * 2**20
INDEX = pa.schema([
    ("example", pa.string()), ("name", pa.string()), ("key", pa.string()), ("shard", pa.string()), ("shard_bytes", pa.int64()),
    ("dims", pa.list_(pa.string())), ("shape", pa.list_(pa.int64())), ("dtype", pa.string()),
    ("positions", pa.list_(pa.int64())), ("labels", pa.string()),
])  # fmt: skip
# Records that say which positions the rows of another one are: they go into the index, not into a shard.
_POSITIONS = {"states": "state_positions", "rows": "row_positions", "lens": "lens_positions",
              "confidence": "confidence_positions"}  # fmt: skip
_ALONG = ("position", "row")  # the dimension that those positions name


class StoreWriter:
    """Takes traces in, example by example; a shard goes to disk whenever enough has come together.

    Shards are written by another thread while the next examples pass; at most one waits. A store that was cut off is
    continued: `done` holds the examples that are there.

    Raises StoreError for a folder of something else or of another recording, and when the disk is full.
    """

    def __init__(
        self, folder: Path | str, recording: dict[str, Any], dtype: torch.dtype | None = None, shard_bytes: int = SHARD_BYTES
    ) -> None:  # fmt: skip
        self.folder, self.dtype, self.shard_bytes = Path(folder), dtype, shard_bytes
        self.recording = json.loads(
            json.dumps({"format": FORMAT, **recording, "dtype": str(dtype or "as recorded")}, default=str)
        )
        self._open()
        self.done = frozenset(Store(self.folder).examples) if self._parts() else frozenset()
        self.seen = set(self.done)
        self.number = 1 + max((int(path.stem.removeprefix("index-")) for path in self._parts()), default=-1)
        self.tensors: dict[str, Tensor] = {}
        self.rows: list[dict[str, Any]] = []
        self.held = 0
        self.pool = ThreadPoolExecutor(1)
        self.writing: Future[None] | None = None

    def _parts(self) -> list[Path]:
        return sorted(self.folder.glob("index-*.parquet"))

    def _open(self) -> None:
        said = self.folder / "store.json"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            present = sorted(path.name for path in self.folder.iterdir())
            if said.is_file():
                before = json.loads(said.read_text())
                differing = [key for key in before | self.recording if before.get(key) != self.recording.get(key)]
                if differing:
                    raise StoreError(
                        f"{self.folder} holds another recording (it differs in {', '.join(differing)}): name a new folder"
                    )
            elif present:
                raise StoreError(f"{self.folder} holds other things ({', '.join(present[:3])}): name a new or empty folder")
            else:
                said.write_text(json.dumps(self.recording, indent=1) + "\n")
            indexed = {path.stem.removeprefix("index-") for path in self._parts()}
            for shard in [*self.folder.glob("shard-*.safetensors"), *self.folder.glob("*.tmp")]:
                if shard.suffix == ".tmp" or shard.stem.removeprefix("shard-") not in indexed:
                    shard.unlink()  # cut off before its index was written
        except (OSError, ValueError) as error:
            if isinstance(error, StoreError):
                raise
            raise StoreError(f"{self.folder} cannot be used as a store: {error}") from error

    def add(self, trace: Trace) -> None:
        """Keeps every record of a trace, example by example, padding left out.

        Raises StoreError for an example that is there already.
        """
        for i, example in enumerate(trace.encoded.examples):
            if example.id in self.seen:
                raise StoreError(f"example {example.id!r} is in the store {self.folder} already: ids must differ")
            self.seen.add(example.id)
            for name, named in trace.records.items():
                if name.split(".")[0] not in _POSITIONS.values():
                    self._keep(example.id, name, named, _positions_of(trace, name, i), i)
        if self.held >= self.shard_bytes:
            self._flush()

    def _keep(self, example: str, name: str, named: Named, positions: Tensor | None, i: int) -> None:
        dims = tuple(dim for dim in named.dims if dim != "batch")
        tensor = named.tensor.select(named.dims.index("batch"), i)
        if positions is not None:
            along = next(dim for dim in _ALONG if dim in dims)
            tensor = tensor.narrow(dims.index(along), 0, len(positions))
        if self.dtype is not None and tensor.is_floating_point():
            tensor = tensor.to(self.dtype)
        tensor = tensor.contiguous()
        key = f"{len(self.rows):06d}"
        self.tensors[key] = tensor
        self.held += tensor.nbytes
        self.rows.append({
            "example": example, "name": name, "key": key, "dims": list(dims), "shape": list(tensor.shape),
            "dtype": str(tensor.dtype).removeprefix("torch."), "labels": json.dumps(named.labels),
            "positions": None if positions is None else positions.tolist(),
        })  # fmt: skip

    def _flush(self) -> None:
        if not self.rows:
            return
        self._settle()
        self.writing = self.pool.submit(_write_shard, self.folder, self.number, self.tensors, self.rows)
        self.tensors, self.rows, self.held, self.number = {}, [], 0, self.number + 1

    def _settle(self) -> None:
        if self.writing is not None:
            self.writing.result()
            self.writing = None

    def close(self) -> None:
        """Writes what is left. Raises StoreError when it cannot be written."""
        try:
            self._flush()
            self._settle()
        finally:
            self.pool.shutdown()

    def __enter__(self) -> "StoreWriter":  # noqa: PYI034  beartype takes Self in decorated classes only
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def _positions_of(trace: Trace, name: str, i: int) -> Tensor | None:
    """The positions that a record's rows are, where another record says so; None where it has none."""
    base, _, number = name.partition(".")
    companion = _POSITIONS.get(base.split("_")[0])
    companion = f"{companion}.{number}" if number else companion
    if companion not in trace.records or not set(_ALONG) & set(trace.records[name].dims):
        return None
    found = trace.records[companion].tensor[i]
    return found[found >= 0]


def _write_shard(folder: Path, number: int, tensors: dict[str, Tensor], rows: list[dict[str, Any]]) -> None:
    shard, index = folder / f"shard-{number:05d}.safetensors", folder / f"index-{number:05d}.parquet"
    partial = shard.with_suffix(".tmp")
    try:
        save_file(tensors, partial)
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        partial.replace(shard)
        size = shard.stat().st_size
        made = [{**row, "shard": shard.name, "shard_bytes": size} for row in rows]
        partial = index.with_suffix(".tmp")
        pq.write_table(pa.Table.from_pylist(made, schema=INDEX), partial, compression="zstd")
        partial.replace(index)
    except (OSError, SafetensorError) as error:
        partial.unlink(missing_ok=True)
        raise StoreError(f"{shard} cannot be written: {error}") from error


@dataclass(frozen=True)
class _Entry:
    key: str
    shard: str
    dims: tuple[str, ...]
    labels: dict[str, tuple[Any, ...]]
    positions: tuple[int, ...] | None


class Store:
    """A store opened for reading: nothing but its index is in memory.

    Raises StoreError for a folder that is no store, and names a shard that is missing or shorter than it was.
    """

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        parts = sorted(self.folder.glob("index-*.parquet"))
        if not (self.folder / "store.json").is_file():
            raise StoreError(f"{self.folder} is no store: there is no store.json in it")
        self.recording = json.loads((self.folder / "store.json").read_text())
        index = pa.concat_tables([pq.read_table(part, schema=INDEX) for part in parts]) if parts else INDEX.empty_table()
        self.entries: dict[tuple[str, str], _Entry] = {}
        self.sizes: dict[str, int] = {}
        for row in index.to_pylist():
            self.sizes[row["shard"]] = row["shard_bytes"]
            labels = {dim: tuple(values) for dim, values in json.loads(row["labels"]).items()}
            positions = None if row["positions"] is None else tuple(row["positions"])
            self.entries[row["example"], row["name"]] = _Entry(row["key"], row["shard"], tuple(row["dims"]), labels, positions)
        for shard, size in self.sizes.items():
            self._check(shard, size)

    def _check(self, shard: str, size: int) -> None:
        path, again = (
            self.folder / shard,
            f"delete {shard.replace('shard', 'index').replace('safetensors', 'parquet')} and record again",
        )
        if not path.is_file():
            raise StoreError(f"the shard {path} is missing: {again}")
        if path.stat().st_size != size:
            raise StoreError(f"the shard {path} has {path.stat().st_size} of {size} bytes: {again}")

    @property
    def examples(self) -> tuple[str, ...]:
        """Ids of the examples, in the order in which they were recorded."""
        return tuple(dict.fromkeys(example for example, _ in self.entries))

    @property
    def names(self) -> tuple[str, ...]:
        """The records that the examples have (`states`, `mass`, ...)."""
        return tuple(dict.fromkeys(name for _, name in self.entries))

    @property
    def n_bytes(self) -> int:
        """Bytes of all shards on disk."""
        return sum(self.sizes.values())

    def read(
        self, example: str, name: str, layer: int | None = None, positions: Sequence[int] | None = None
    ) -> Named:  # fmt: skip
        """One record of one example: all of it, one layer of it (that dimension dropped), or some of its positions.

        Only what is asked for is read from disk. Raises StoreError for an example, record, layer or position that is not there.
        """
        entry = self._entry(example, name)
        index: list[Any] = [slice(None)] * len(entry.dims)
        if layer is not None:
            index[entry.dims.index("layer")] = _place(entry.labels.get("layer", ()), layer, f"layer {layer} of {name}")
        along = next((dim for dim in _ALONG if dim in entry.dims), None)
        inner: Tensor | None = None
        if positions is not None:
            if along is None or entry.positions is None:
                raise StoreError(f"{name} has no positions to choose among")
            at = torch.tensor([_place(entry.positions, p, f"position {p} of {name} of example {example!r}") for p in positions])
            first, last = (int(at.min()), int(at.max())) if len(at) else (0, -1)
            index[entry.dims.index(along)] = slice(first, last + 1)  # one run is read, and picked from
            inner = at - first
        try:
            with safe_open(self.folder / entry.shard, "pt") as shard:
                tensor = shard.get_slice(entry.key)[tuple(index)] if index else shard.get_tensor(entry.key)
        except (OSError, SafetensorError) as error:
            raise StoreError(f"the shard {self.folder / entry.shard} cannot be read: {error}") from error
        dims = tuple(dim for dim in entry.dims if not (dim == "layer" and layer is not None))
        if inner is not None:
            assert along is not None
            tensor = tensor.index_select(dims.index(along), inner)
        kept = tuple(entry.positions or ()) if positions is None else tuple(positions)
        labels = {dim: values for dim, values in entry.labels.items() if dim in dims}
        return Named(tensor, dims, labels | ({along: kept} if along and entry.positions is not None else {}))

    def _entry(self, example: str, name: str) -> _Entry:
        if name not in self.names:
            raise StoreError(f"this store has no record {name!r}{did_you_mean(name, self.names)}")
        if (example, name) not in self.entries:
            raise StoreError(f"this store has no example {example!r}{did_you_mean(example, self.examples)}")
        return self.entries[example, name]

    def each(self, name: str, layer: int | None = None, examples: Iterable[str] | None = None) -> Iterator[tuple[str, Named]]:
        """One record of every example (or of some), one at a time."""
        for example in self.examples if examples is None else examples:
            yield example, self.read(example, name, layer)


def _place(known: tuple[Any, ...], wanted: int, what: str) -> int:
    if wanted not in known:
        raise StoreError(f"{what} is not in this store")
    return known.index(wanted)
