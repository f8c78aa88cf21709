"""What the studies of one data set share: units of examples read one after the other, and curves with their intervals."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from probe.analysis.stats import bootstrap_mean, ends, wilson
from probe.errors import DataError, SightlineError
from probe.example import Example
from studies.run import Run
from studies.study import Setting, progress, units

Rows = list[dict[str, Any]]


def read_units(setting: Setting, run: Run, title: str, read: Callable[[list[Example]], Rows]) -> pa.Table:
    """The rows of every example, a unit of `setting.batch` at a time; units that the run already holds are not read again."""
    work = units(len(setting.data), setting.batch)
    todo = set(run.pending(key for key, _ in work))
    with progress(title, len(setting.data), setting.quiet) as advance:
        for key, items in work:
            if key in todo:
                run.write(key, read([setting.data.examples[i] for i in items]))
            advance(len(items))
    return run.rows(key for key, _ in work)


def sift(examples: Sequence[Example], check: Callable[[Example], object]) -> tuple[list[Example], Rows]:
    """The examples that `check` lets pass, and a row (`example what="skipped" text`) for each that it raises a SightlineError for."""
    usable, rows = [], []
    for example in examples:
        try:
            check(example)
        except SightlineError as error:
            rows.append({"example": example.id, "what": "skipped", "text": str(error)})
        else:
            usable.append(example)
    return usable, rows


def picked(rows: pa.Table, **where: str) -> pa.Table:
    """The rows whose columns have these values."""
    for column, value in where.items():
        rows = rows.filter(pc.equal(rows[column], value))
    return rows


def skipped(rows: pa.Table) -> list[str]:
    """What could not be used, and why."""
    found = picked(rows, what="skipped")
    return [f"{e}: {t}" for e, t in zip(found["example"].to_pylist(), found["text"].to_pylist(), strict=True)]


def refuse_nothing(rows: pa.Table, n: int) -> None:
    """Raises DataError, with the first reason, when of all examples none (`n`) could be used."""
    if n == 0:
        reasons = skipped(rows)
        raise DataError(
            f"none of the {len(reasons)} examples could be used; the first: {reasons[0]}"
            if reasons
            else "there are no examples"
        )


def curve(values: np.ndarray, layers: Sequence[int] | None = None, seed: int = 0) -> dict[str, Any]:
    """Mean over examples at each layer with its 95 % bootstrap interval: `layers mean low high n`.

    `values` (example layer); NaN entries are left out, and a layer that has nothing but NaN is None in all three.
    """
    count = values.shape[1] if values.ndim == 2 else 0
    known = ~np.isnan(values).all(0) if values.size else np.zeros(count, dtype=bool)
    made = {name: np.full(count, np.nan) for name in ("mean", "low", "high")}
    if known.any():
        interval = bootstrap_mean(values[:, known], seed)
        for name, side in zip(made, interval, strict=True):
            made[name][known] = side
    lists = {name: [None if np.isnan(v) else float(v) for v in side] for name, side in made.items()}
    return {"layers": list(range(count) if layers is None else layers), **lists, "n": len(values)}


def interval(values: np.ndarray, seed: int = 0) -> dict[str, Any]:
    """The mean of one number over examples with its 95 % bootstrap interval: `value low high n`.

    All None where nothing is known; no ends (None) where all draws agree, as those of one example do.
    """
    known = np.asarray(values, dtype=np.float64)
    known = known[~np.isnan(known)]
    if not len(known):
        return {"value": None, "low": None, "high": None, "n": 0}
    value, *sides = (float(side) for side in bootstrap_mean(known, seed))
    low, high = ends(*sides)
    return {"value": value, "low": low, "high": high, "n": len(known)}


def share(values: np.ndarray, seed: int = 0) -> dict[str, Any]:
    """As `interval`, for what is right or wrong: Wilson's interval where each value is 0 or 1, so that 0 of 24 and 24 of 24 have one too."""
    known = np.asarray(values, dtype=np.float64)
    known = known[~np.isnan(known)]
    if not len(known) or not np.isin(known, (0.0, 1.0)).all():
        return interval(known, seed)
    low, high = wilson(int(known.sum()), len(known))
    return {"value": float(known.mean()), "low": low, "high": high, "n": len(known)}
