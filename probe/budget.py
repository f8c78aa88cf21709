"""What a recording will want of memory, disk and time, said before it begins."""

import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import psutil
import torch
from safetensors.torch import save_file

from probe.errors import StoreError
from probe.example import Example
from probe.recorders import Recorder, Residual
from probe.store import SHARD_BYTES, Store, StoreWriter
from probe.subject import Subject
from probe.tracing import Trace, trace

GIB = 2**30
SAMPLE = 4  # examples that are traced to find out, after one that warms up


@dataclass(frozen=True)
class Budget:
    """Bytes and seconds that a recording is expected to want, from examples of it that were traced, and what there is."""

    n: int
    per_example: float  # bytes, the mean of the sample
    largest: int  # bytes of the sample's largest example
    batch: int
    disk: int
    memory: int  # beside the model: a batch's records, the shard that fills and the one that is being written
    seconds: float
    free_disk: int
    free_memory: int
    half: bool  # whether half precision would make it smaller
    whole: bool  # whether states are kept position by position

    @property
    def fits(self) -> bool:
        return self.disk <= self.free_disk and self.memory <= self.free_memory

    def check(self, where: str) -> None:
        """Raises StoreError, with what would fit, for a recording that does not."""
        if self.disk > self.free_disk:
            raise StoreError(
                f"recording {self.n} examples would take {_size(self.disk)} and {where} has {_size(self.free_disk)} free: {self._proposal()}"
            )
        if self.memory > self.free_memory:
            fitting = max(1, int((self.free_memory - 2 * SHARD_BYTES) / self.largest)) if self.largest else 1
            raise StoreError(
                f"a batch of {self.batch} examples would take {_size(self.memory)} of memory and {_size(self.free_memory)} is free: record "
                f"batches of {min(self.batch - 1, fitting) or 1}, fewer layers, or chosen positions"
            )

    def _proposal(self) -> str:
        options = []
        if (count := int(self.free_disk / self.per_example)) > 0:
            options.append(f"at most {count} examples")
        if self.half:
            options.append(f"dtype float16 ({_size(self.disk // 2)})")
        if self.whole:
            options.append('reduce="mean" or positions="last"')
        return f"record {', or '.join([*options, 'fewer layers'])}"

    def __str__(self) -> str:
        return f"{_size(self.disk)} of disk, {_size(self.memory)} of memory, about {self.seconds:.0f} s for {self.n} examples"


def plan(
    subject: Subject, examples: Sequence[Example], record: Sequence[Recorder], folder: Path | str, batch: int = 8,
    dtype: torch.dtype | None = None,
) -> Budget:  # fmt: skip
    """What recording these examples will want, from tracing a few of them, evenly chosen, and from writing a little.

    Lengths of the others are taken to be like those of the sample. Nothing stays in `folder`, which need not exist yet.
    """
    if not examples:
        raise StoreError("there is nothing to record: the list of examples is empty")
    step = max(1, len(examples) // SAMPLE)
    sample = list(examples)[::step][:SAMPLE]
    trace(subject, sample[0], record)
    began = time.perf_counter()
    traces = [trace(subject, example, record) for example in sample]
    each = (time.perf_counter() - began) / len(sample)
    sizes = [_kept_bytes(found, dtype) for found in traces]
    there = _existing(Path(folder))
    disk = int(len(examples) * sum(sizes) / len(sizes))
    memory = batch * max(sizes) + 2 * min(SHARD_BYTES, disk)
    return Budget(
        len(examples), sum(sizes) / len(sizes), max(sizes), batch, disk, memory, len(examples) * each + disk / _write_rate(there),
        shutil.disk_usage(there).free, psutil.virtual_memory().available, subject.dtype == torch.float32 and dtype is None,
        any(isinstance(one, Residual) and one.reduce is None and one.positions != "last" for one in record),
    )  # fmt: skip


def keep(
    subject: Subject, examples: Sequence[Example], record: Sequence[Recorder], folder: Path | str, batch: int = 8,
    dtype: torch.dtype | None = None, advance: Callable[[int], None] = lambda n: None,
) -> Store:  # fmt: skip
    """Records examples into a store and opens it; examples that an earlier, cut-off recording holds are passed over.

    `advance` is told how many examples are done. Raises StoreError before anything is written where it would not fit.
    """
    plan(subject, examples, record, folder, batch, dtype).check(str(folder))
    recording: dict[str, Any] = {"model": subject.name, "layers": subject.n_layers, "record": [repr(one) for one in record]}
    with StoreWriter(folder, recording, dtype) as writer:
        todo = [example for example in examples if example.id not in writer.done]
        advance(len(examples) - len(todo))
        for start in range(0, len(todo), batch):
            some = todo[start : start + batch]
            writer.add(trace(subject, some, record))
            advance(len(some))
    return Store(folder)


def _kept_bytes(found: Trace, dtype: torch.dtype | None) -> int:
    total = 0
    for name, named in found.records.items():
        if not name.split(".")[0].endswith("_positions"):
            floats = named.tensor.is_floating_point()
            total += named.tensor.numel() * (dtype.itemsize if dtype is not None and floats else named.tensor.itemsize)
    return total


def _existing(folder: Path) -> Path:
    return next(place for place in (folder.absolute(), *folder.absolute().parents) if place.is_dir())


def _write_rate(where: Path, size: int = 32 * 2**20) -> float:
    """Bytes in a second that a safetensors file is written at."""
    try:
        with TemporaryDirectory(dir=where) as folder:
            began = time.perf_counter()
            save_file({"probe": torch.zeros(size, dtype=torch.uint8)}, Path(folder) / "probe.safetensors")
            return size / (time.perf_counter() - began)
    except OSError as error:
        raise StoreError(f"{where} cannot be written: {error}") from error


def _size(count: int) -> str:
    return f"{count / GIB:.1f} GiB" if count >= GIB / 10 else f"{count / 2**20:.1f} MiB"
