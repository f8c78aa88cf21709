"""Does attention to the words before and after what is shown move alike through the layers?

The attention shift of Wings (arXiv 2406.03496) on any model and medium: the attention that the words before a picture, the
picture itself and the words after it receive, layer by layer (MLLM-LAWS), and Shift, one less the correlation of the first and
the last. One forward pass for each example.
"""

from typing import Any

import numpy as np
import pyarrow as pa

from probe.analysis.shift import densities
from probe.errors import StudyError, TokenError, did_you_mean
from probe.example import Example
from probe.recorders import Mass, Rows
from probe.subject import Subject
from probe.surroundings import SETS, check_in_sequence, name_surroundings, surroundings
from probe.tracing import Trace, trace
from studies.run import Run, finite
from studies.shown import alike, check_shown
from studies.study import Setting, Summary, describe, study
from studies.work import read_units, sift

SCHEMA = pa.schema([
    ("example", pa.string()), ("what", pa.string()), ("key", pa.string()), ("values", pa.list_(pa.float64())), ("n", pa.int32()),
    ("text", pa.string()),
])  # fmt: skip
ROWS = {"after": "after", "all": "real"}  # the rows whose attention is averaged, and their group
COLUMNS = (*SETS, "first", "rest")


@study
def attention_shift(setting: Setting, *, rows: str = "after", per_pair: bool = False) -> Summary:
    """Does attention to the words before and after what is shown move alike through the layers?

    `rows` whose attention is averaged: `after`, the words after what is shown, or `all` positions. `per_pair` divides the attention
    that a set receives by the number of visible (row, column) pairs.
    """
    from studies.attention_shift_report import figures, report, summarise

    if rows not in ROWS:
        raise StudyError(f"there is no group of rows {rows!r}{did_you_mean(rows, ROWS)}")
    subject, data = setting.subject, setting.data
    check_in_sequence(subject)
    layers = attended(subject)
    config = {
        "data": data.name, "fingerprint": data.fingerprint, "limit": len(data), "batch": setting.batch, "padding": setting.padding,
        "seed": setting.seed, "rows": rows, "per_pair": per_pair,
    }  # fmt: skip
    run = Run.open(setting.out, "attention-shift", config, describe(subject), SCHEMA)
    with run.recorded():
        table = read_units(setting, run, "attention shift", lambda examples: unit(setting, examples, rows, per_pair))
        summary = finite({"run": str(run.folder), **summarise(table, layers, config)})
        figures(run, summary)
        run.finish(summary, report(summary, setting))
    return summary


def attended(subject: Subject) -> list[int]:
    """The layers that have attention to read. Raises StudyError where there are too few for a correlation over layers."""
    layers = [layer for layer, name in enumerate(subject.anatomy.attention) if name is not None]
    if len(layers) < 3:
        raise StudyError(f"a correlation over layers takes at least 3 with attention: this model has {len(layers)}")
    return layers


def unit(setting: Setting, examples: list[Example], rows: str, per_pair: bool) -> list[dict[str, Any]]:
    """The series of every example; one that cannot be read is a row that says why."""
    usable, found = sift(examples, lambda example: _check(setting.subject, example))
    for some in alike(usable):
        encoded = name_surroundings(setting.subject.encode(some, setting.padding))
        wanted: list[Mass | Rows] = [Mass((ROWS[rows],), COLUMNS)]
        if per_pair:
            wanted.append(Rows(ROWS[rows], heads=0))  # which pairs are visible is the same for every head
        seen = trace(setting.subject, encoded, wanted)
        for i, example in enumerate(some):
            found += [{"example": example.id, **row} for row in _series(seen, i, rows, per_pair)]
    return found


def _check(subject: Subject, example: Example) -> None:
    check_shown(example)
    if not len(surroundings(subject.encode(example).maps[0]).before):
        raise TokenError(f"example {example.id!r} has no text before what is shown: a system message or a context goes there")


def _series(seen: Trace, i: int, rows: str, per_pair: bool) -> list[dict[str, Any]]:
    """The attention that each set receives, over layers, heads averaged; `n` is how many positions the set has."""
    token_map = seen.encoded.maps[i]
    mass = seen["mass"].at(batch=i, row_group=ROWS[rows]).mean(1).double().numpy()
    if per_pair:
        visible = seen["rows"].tensor[:, i, 0].numpy() > 0
        member = np.stack([np.isin(np.arange(len(token_map)), token_map.positions(name)) for name in COLUMNS], 1)
        pairs = (visible.sum(1).astype(np.int64) @ member).astype(np.int64)
        mass = densities(mass, len(token_map.positions(ROWS[rows])), pairs)
    return [
        {"what": "laws", "key": name, "values": mass[:, k].tolist(), "n": len(token_map.positions(name))}
        for k, name in enumerate(COLUMNS)
    ]
