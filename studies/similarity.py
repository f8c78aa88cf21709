"""Do layers, modalities and models represent the same examples alike?

Linear CKA, CKNNA and mutual nearest neighbours of group means: layer against layer of one model, what is shown against the words, the same
scene told another way, and one model against another; whole grids, each beside permuted pairs. One forward pass for each example
and source.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from probe.analysis.similarity import LEAST, METRICS, Compared, Kernels, beside_permuted, linear_kernel, prepared
from probe.errors import DataError, StudyError
from probe.example import Example
from probe.features import group_means, places
from probe.subject import Subject
from studies.data import load_data
from studies.demo.family import load_member
from studies.run import Run, finite
from studies.study import Setting, Summary, describe, progress, study, units
from studies.work import picked, sift, skipped

SCHEMA = pa.schema([
    ("source", pa.string()), ("example", pa.string()), ("what", pa.string()), ("group", pa.string()),
    ("states", pa.int32()), ("vector", pa.list_(pa.float32())), ("text", pa.string()),
])  # fmt: skip
GROUPS = ("shown", "question", "last")


@dataclass(frozen=True)
class Source:
    """A model and the examples that it is shown, the same ones (by id and place) in every source."""

    name: str
    subject: Subject
    examples: tuple[Example, ...]
    fingerprint: str  # of the examples


@study
def similarity(
    setting: Setting, *, other: str = "auto", twin: str = "auto", k: int = 10, clip: float = 0.95, normalise: bool = True,
    unbiased: bool = True, permutations: int = 200,
) -> Summary:  # fmt: skip
    """Do layers, modalities and models represent the same examples alike?

    `other` is a model that is shown the same examples (auto: demo:frozen for demo; none), `twin` a data set that tells the same scenes in the
    same order another way (auto: demo:text for demo; none). `k` neighbours; `clip` the quantile beyond which values are clipped (1: none) and
    `normalise` to length one, as the reference prepares states; `unbiased` the HSIC of CKA; `permutations` of the null.
    """
    if not 0 < clip <= 1:
        raise StudyError(f"a quantile to clip at lies between 0 and 1, not at {clip:g}")
    if k < 2:
        raise StudyError(f"CKNNA compares at least 2 neighbours, not {k}")
    if permutations < 1:
        raise StudyError("a null takes at least one permutation")
    if len(setting.data) < LEAST:
        raise DataError(f"how alike representations are takes at least {LEAST} examples, and there are {len(setting.data)}")
    demo = setting.data.name == "demo"
    other = ("demo:frozen" if demo and setting.subject.name == "demo" else "none") if other == "auto" else other
    twin = ("demo:text" if demo else "none") if twin == "auto" else twin
    sources = _sources(setting, other, twin)
    config = {
        "data": setting.data.name, "fingerprint": setting.data.fingerprint, "limit": len(setting.data), "batch": setting.batch,
        "padding": setting.padding, "seed": setting.seed, "other": other, "twin": twin, "k": k, "clip": clip, "normalise": normalise,
        "unbiased": unbiased, "permutations": permutations, "sources": {s.name: [describe(s.subject), s.fingerprint] for s in sources},
    }  # fmt: skip
    run = Run.open(setting.out, "similarity", config, describe(setting.subject), SCHEMA)
    with run.recorded():
        return _carry_out(setting, run, sources, Way(k, clip, normalise, unbiased, permutations, setting.seed))


def _sources(setting: Setting, other: str, twin: str) -> list[Source]:
    """The model, the other model on the same examples, and the model on the same scenes told another way."""
    sources = [Source("model", setting.subject, setting.data.examples, setting.data.fingerprint)]
    if other != "none":
        subject = load_member(other, str(setting.subject.device), setting.subject.dtype)
        sources.append(Source("other", subject, setting.data.examples, setting.data.fingerprint))
    if twin != "none":
        told = load_data(twin, len(setting.data), seed=setting.seed)
        if len(told) < len(setting.data) or any(a.prompt != b.prompt for a, b in zip(setting.data.examples, told.examples, strict=False)):  # fmt: skip
            raise DataError(
                f"{twin} does not ask the questions of {setting.data.name} in the same order: its scenes cannot be paired"
            )
        sources.append(Source("twin", setting.subject, told.examples, told.fingerprint))
    return sources


@dataclass(frozen=True)
class Way:
    """How states are compared."""

    k: int
    clip: float
    normalise: bool
    unbiased: bool
    permutations: int
    seed: int


def _carry_out(setting: Setting, run: Run, sources: Sequence[Source], way: Way) -> Summary:
    from studies.similarity_report import figures, report

    keys: list[str] = []
    with progress("similarity", len(setting.data) * len(sources), setting.quiet) as advance:
        for source in sources:
            work = [(f"{source.name}-{key}", items) for key, items in units(len(setting.data), setting.batch)]
            todo, keys = set(run.pending(key for key, _ in work)), [*keys, *(key for key, _ in work)]
            for key, items in work:
                if key in todo:
                    run.write(key, _unit(source, [source.examples[i] for i in items], setting))
                advance(len(items))
    rows = run.rows(keys)
    summary = finite(summarise(rows, sources, way, [e.id for e in setting.data.examples]))
    summary["run"] = str(run.folder)
    figures(run, summary)
    run.finish(summary, report(summary, setting))
    return summary


def _unit(source: Source, examples: list[Example], setting: Setting) -> list[dict[str, Any]]:
    def check(example: Example) -> None:
        missing = places(source.subject.encode(example).maps[0], example)[1]
        for name in GROUPS:
            if name in missing:
                raise DataError(f"example {example.id!r} has no tokens of the group {name!r}: {missing[name]}")

    usable, rows = sift(examples, check)
    rows = [{**row, "source": source.name} for row in rows]
    if usable:
        encoded = source.subject.encode(usable, setting.padding)
        groups = [places(m, e)[0] for m, e in zip(encoded.maps, usable, strict=True)]
        means = group_means(source.subject, encoded, groups, GROUPS)
        rows += [
            {"source": source.name, "example": example.id, "what": "states", "group": name, "states": means.shape[2],
             "vector": means[i, j].ravel()}
            for i, example in enumerate(usable) for j, name in enumerate(GROUPS)
        ]  # fmt: skip
    return rows


# --- numbers ---------------------------------------------------------------------------------------------------------


def summarise(rows: pa.Table, sources: Sequence[Source], way: Way, order: Sequence[str]) -> Summary:
    """Every comparison's grids. Raises DataError when fewer than four examples can be used in every source."""
    own = {source.name: picked(rows, what="states", source=source.name) for source in sources}
    shared = set.intersection(*(set(table["example"].to_pylist()) for table in own.values()))
    ids = [name for name in order if name in shared]
    reasons = [f"{source.name}: {reason}" for source in sources for reason in skipped(picked(rows, source=source.name))]
    if len(ids) < LEAST:
        why = f"; the first that could not be used: {reasons[0]}" if reasons else ""
        raise DataError(f"how alike representations are takes at least {LEAST} examples, and {len(ids)} can be used{why}")
    k = max(2, min(way.k, len(ids) // 3))
    kernels = {(source.name, group): _kernels(own[source.name], group, ids, way, k) for source in sources for group in GROUPS}
    found = {
        title: _compared(kernels[a], kernels[b], way, a == b) for title, (a, b) in _pairs([s.name for s in sources]).items()
    }
    ones = {title: one["cka"]["along"] for title, one in found.items()}
    return {
        "run": "", "n": len(ids), "n_skipped": len(reasons), "skipped": reasons, "k": k, "k_asked": way.k,
        "chance_knn": k / (len(ids) - 1), "permutations": way.permutations, "n_alike": sum(one["p"] < 0.05 for one in ones.values()),
        "cka": ones, "sources": {s.name: {"model": s.subject.name, "layers": s.subject.n_layers} for s in sources}, "pairs": found,
    }  # fmt: skip


def _kernels(rows: pa.Table, group: str, ids: Sequence[str], way: Way, k: int) -> Kernels:
    table = picked(rows, group=group)
    at = {name: i for i, name in enumerate(table["example"].to_pylist())}
    states = table["states"][0].as_py()
    vectors = np.stack([table["vector"][at[name]].values.to_numpy().reshape(states, -1) for name in ids], 1)
    return Kernels(linear_kernel(prepared(torch.from_numpy(vectors), way.clip, way.normalise)), k, way.unbiased)


Place = tuple[str, str]  # a source and a token group


def _pairs(sources: Sequence[str]) -> dict[str, tuple[Place, Place]]:
    """What is compared with what: a title's first words name the question that it answers."""
    pairs = {f"layers: {group}": (("model", group), ("model", group)) for group in GROUPS}
    pairs |= {f"groups: {a} and {b}": (("model", a), ("model", b)) for a, b in combinations(GROUPS, 2)}
    for source, name in (("other", "models"), ("twin", "tellings")):
        if source in sources:
            pairs |= {f"{name}: {group}": (("model", group), (source, group)) for group in GROUPS}
    return pairs


def _compared(a: Kernels, b: Kernels, way: Way, itself: bool) -> dict[str, Any]:
    """The grids of a pair; its mean is over states of the same depth, or over neighbouring states of what is compared with itself."""
    cells = [(i, i + 1) for i in range(len(a.kernel) - 1)] if itself else []
    made = beside_permuted(a, b, way.permutations, way.seed, cells=cells)
    return {metric: _as_numbers(made[metric]) for metric in METRICS}


def _as_numbers(found: Compared) -> dict[str, Any]:
    return {
        "along": {name: float(value) for name, value in found.along._asdict().items()},
        "grid": {name: value.tolist() for name, value in found.grid._asdict().items()},
    }  # fmt: skip
