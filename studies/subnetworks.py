"""Which weights does the model need, and do tasks and modalities need the same ones?

Weights of the decoder set to zero by magnitude, Wanda and SparseGPT, at several sparsities, in 2:4 patterns, and with layers given different shares; each
model is asked with what is shown and with words alone. Then a mask for every modality and every kind of question: how much they overlap beside
chance, and what a model pruned with one group's mask can still do for another (alpha-SubNet, arXiv 2405.16700, section 6).
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, get_args

import pyarrow as pa

from compress.allocation import Rule
from compress.calibration import Calibration, Side
from compress.passes.base import Evidence
from compress.passes.prune import Prune, targeted
from compress.recipe import Recipe
from probe.errors import StudyError, did_you_mean
from probe.example import Example
from studies import bench
from studies.bench import Bench, Configuration, collect, settled
from studies.data import TELLINGS, apart, load_data
from studies.run import Run, finite
from studies.study import Setting, Summary, describe, progress, study
from studies.subnetwork_groups import Family, by_kind, by_modality
from studies.subnetworks_report import figures, report, summarise

SCHEMA = pa.schema([*bench.SCHEMA, ("other", pa.string()), ("value", pa.float64())])
METHODS = ("magnitude", "wanda", "sparsegpt")
PATTERN = "2:4"


@study
def subnetworks(
    setting: Setting,
    *,
    sparsities: str = "0.3,0.5,0.6,0.7",
    methods: str = "magnitude,wanda,sparsegpt",
    allocations: str = "owl,ecoflap,tamp",
    at: float = 0.5,
    calibrate: int = 128,
    most: int = 128,
) -> Summary:
    """Which weights does the model need, and do tasks and modalities need the same ones?

    `sparsities` are shares of weights that go, `methods` and `allocations` names with commas between them (allocations share Wanda's out over
    layers; none: no allocations); `at` is the sparsity of the masks of groups; `calibrate` examples that are not asked calibrate, and at most
    `most` questions of each group are asked.
    """
    shares = _shares(sparsities, at)
    names = _names(methods, METHODS, "method")
    rules = [] if allocations == "none" else _names(allocations, [r for r in get_args(Rule) if r != "uniform"], "allocation")
    targeted(setting.subject, ("*",))  # refused before anything is measured
    asked, calibration = apart(setting.data, calibrate)
    config = {
        "data": setting.data.name, "fingerprint": setting.data.fingerprint, "examples": len(setting.data), "sparsities": shares, "methods": names,
        "allocations": rules, "at": at, "calibrate": calibrate, "most": most, "batch": setting.batch, "seed": setting.seed,
    }  # fmt: skip
    run = Run.open(setting.out, "subnetworks", config, describe(setting.subject), SCHEMA)
    evidence = _evidence(setting, calibration)
    work = configurations(shares, names, rules, at, "mixed" in evidence)
    families = [
        Family(by, groups, at, setting.batch, setting.seed)
        for by, groups in (
            ("modality", by_modality(setting, asked, calibration, most)), ("kind", by_kind(setting, asked, calibration, most))
        ) if len(groups) > 1
    ]  # fmt: skip
    total = len(work) + sum(len(family.rows) + 1 for family in families)
    with run.recorded(), progress("subnetworks", total, setting.quiet, "models") as advance:
        benched = Bench(
            setting.subject, asked, setting.batch, 0, 1, seed=setting.seed, memory=False
        )  # zeros save neither time nor memory
        refused = {one.name: why for one, which in work if (why := _measured(run, benched, one, evidence[which], advance))}
        keys = [one.key for one, _ in work if one.name not in refused]
        for family in families:
            keys += _family(run, family, advance)
        rows = run.rows(keys)
    points = collect(rows)
    summary: Summary = finite({
        "run": str(run.folder), "n": len(benched.examples), "at": at, "calibration": len(calibration), "points": points, "skipped": refused,
        **summarise(points, rows, families, shares, setting.seed),
    })  # fmt: skip
    figures(run, summary)
    run.finish(summary, report(summary))
    return summary


def _measured(run: Run, benched: Bench, one: Configuration, evidence: Evidence, advance: Callable[[int], None]) -> str:
    why = settled(run, one, partial(benched.measure, evidence=evidence))
    advance(1)
    return why


def _family(run: Run, family: Family, advance: Callable[[int], None]) -> list[str]:
    """The units of one division: overlaps, and a row of the table of answers for each mask."""
    keys = [f"overlap-{family.by}"]
    if run.pending(keys):
        run.write(keys[0], family.overlap())
    advance(1)
    for row in family.rows:
        keys.append("cross-" + "".join(c if c.isalnum() else "-" for c in f"{family.by}-{row}"))
        if run.pending(keys[-1:]):
            run.write(keys[-1], family.ask(row))
        advance(1)
    return keys


def _evidence(setting: Setting, calibration: tuple[Example, ...]) -> dict[str, Evidence]:
    """What is calibrated on: what is asked, a side of its tokens, or half of it and half told in words."""
    found: dict[str, Evidence] = {"as asked": {"calibration": Calibration(calibration, batch=setting.batch)}}
    if setting.data.name in TELLINGS and setting.data.name != "demo:text":
        half = (len(calibration) + 1) // 2
        twins = apart(load_data("demo:text", 2, seed=setting.seed), half)[1]
        found["mixed"] = {"calibration": Calibration((*calibration[:half], *twins), batch=setting.batch)}
    return found


def configurations(
    shares: Sequence[float], methods: Sequence[str], rules: Sequence[str], at: float, mixed: bool
) -> list[tuple[Configuration, str]]:
    """Everything that is measured, with what it is calibrated on; names are unique."""
    found = [(Configuration("full", baseline="full"), "as asked")]
    for method in methods:
        found += [(_pruned(f"{method} {share:g}", method=method, sparsity=share), "as asked") for share in shares]
        found.append((_pruned(f"{method} {PATTERN}", method=method, n_of_m=PATTERN), "as asked"))
    for rule in rules:
        found += [(_pruned(f"{rule} {share:g}", sparsity=share, allocation=rule), "as asked") for share in shares]
    for method in (m for m in methods if m != "magnitude"):
        for side in (side for side in get_args(Side) if side != "both"):
            found.append((_pruned(f"{method} {at:g}, {side} tokens", method=method, sparsity=at, side=side), "as asked"))
        if mixed:
            found.append((_pruned(f"{method} {at:g}, half in words", method=method, sparsity=at), "mixed"))
    return found


def _pruned(name: str, **settings: Any) -> Configuration:
    return Configuration(name, Recipe((Prune.model_validate(settings),), name))


def _shares(text: str, at: float) -> list[float]:
    try:
        found = sorted({float(part) for part in text.split(",")} | {at})
    except ValueError as error:
        raise StudyError(f"--sparsities are numbers with commas between them, 0.3,0.5, not {text!r}") from error
    if outside := [share for share in found if not 0 < share < 1]:
        raise StudyError(f"a sparsity lies between 0 and 1, not at {outside[0]:g}")
    return found


def _names(text: str, known: Sequence[str], what: str) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    if unknown := [name for name in names if name not in known]:
        raise StudyError(f"there is no {what} {unknown[0]!r}{did_you_mean(unknown[0], known)}")
    return names
