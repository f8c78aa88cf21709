"""Which tokens of what is shown are sinks, and does it matter where their attention goes?

Visual attention sinks (arXiv 2503.03321) on any model: positions whose states are massive in the dimensions in which the first
position's are, where they lie, how much attention falls on them, and which heads look at the picture beside them. Whether
they matter is asked by cause: they are hidden from the words, and so are as many other positions. One forward pass for each example,
and a sweep.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa

from probe.analysis.flow import change
from probe.analysis.sinks import (
    FIRST_LAYER,
    MAX_SHARE,
    MIN_MASS,
    TAU,
    THRESHOLDS,
    attention_and_score,
    counts,
    image_centric,
    moved,
    on_background,
    sink_share,
)
from probe.edits import Knockout
from probe.errors import DataError, SightlineError, StudyError, did_you_mean
from probe.example import Example
from probe.replay import Entry, sweep
from probe.sinks import SinkReading, massive_dimensions, places_of, read_sinks, sink_layers
from probe.subject import Encoded, Subject
from probe.surroundings import check_in_sequence, surroundings
from probe.tokens import TokenMap
from studies.demo.data import furnished
from studies.run import Run, finite
from studies.shown import alike, check_shown
from studies.study import Setting, Summary, describe, study
from studies.work import read_units, sift

SCHEMA = pa.schema([
    ("example", pa.string()), ("what", pa.string()), ("key", pa.string()), ("values", pa.list_(pa.float64())), ("n", pa.int32()),
    ("text", pa.string()),
])  # fmt: skip
EFFECTS = ("relative", "log_prob", "flip")
GROUPS = ("sinks", "highest")
Label = tuple[str, float, Entry]  # a group or its control, how many positions a layer loses on average, the knock-out


@dataclass(frozen=True)
class Plan:
    """What is done with each example."""

    tau: float
    first_layer: int
    min_mass: float
    max_share: float
    count: int
    draws: int
    seed: int
    method: str


@study
def attention_sinks(
    setting: Setting,
    *,
    tau: float = TAU,
    dimensions: str = "auto",
    first_layer: int = FIRST_LAYER,
    min_mass: float = MIN_MASS,
    max_share: float = MAX_SHARE,
    count: int = 4,
    draws: int = 4,
    method: str = "replay",
) -> Summary:
    """Which tokens of what is shown are sinks, and does it matter where their attention goes?

    `tau` is the score above which a position is a sink; `dimensions` are D_sink, separated by commas (auto: the two in which the first
    position is largest); `first_layer` the first layer that is read; `min_mass` and `max_share` make a head image-centric; `count`
    positions of the highest score are tested whether they are sinks or not; `draws` random sets of as many positions stand beside each
    knock-out; `method` is `replay` or `naive`.
    """
    from studies.attention_sinks_report import figures, report, summarise

    if method not in ("replay", "naive"):
        raise StudyError(f"there is no method {method!r}{did_you_mean(method, ('replay', 'naive'))}")
    if tau <= 0 or count < 1 or draws < 1:
        raise StudyError("a threshold lies above 0, and at least one position and one random set are hidden")
    subject, data = setting.subject, setting.data
    check_in_sequence(subject)
    plan = Plan(tau, first_layer, min_mass, max_share, count, draws, setting.seed, method)
    layers = sink_layers(subject, first_layer)
    chosen = _dimensions(setting, dimensions, layers)
    config = {
        **vars(plan), "dimensions": dimensions, "data": data.name, "fingerprint": data.fingerprint, "limit": len(data),
        "batch": setting.batch, "padding": setting.padding,
    }  # fmt: skip
    run = Run.open(setting.out, "attention-sinks", config, describe(subject), SCHEMA)
    with run.recorded():
        rows = read_units(setting, run, "attention sinks", lambda examples: unit(setting, examples, plan, chosen, layers))
        summary = finite({"run": str(run.folder), **summarise(rows, plan, layers, chosen, subject.n_heads)})
        figures(run, summary)
        run.finish(summary, report(summary, setting))
    return summary


def _dimensions(setting: Setting, asked: str, layers: Sequence[int]) -> tuple[int, ...]:
    """D_sink: as asked, or found on the first example that can be read; () where none can."""
    width = setting.subject.config.get_text_config().hidden_size
    if asked != "auto":
        try:
            chosen = tuple(int(number) for number in asked.split(","))
        except ValueError as error:
            raise StudyError(f"dimensions are numbers separated by commas, not {asked!r}") from error
        if min(chosen) < 0 or max(chosen) >= width:
            raise StudyError(f"dimensions run from 0 to {width - 1}, not {min(chosen)} to {max(chosen)}")
        return chosen
    for example in setting.data.examples:
        try:
            return massive_dimensions(setting.subject, setting.subject.encode(example), layers)
        except SightlineError:
            continue  # named, with its reason, when its unit is read
    return ()


def unit(
    setting: Setting, examples: list[Example], plan: Plan, dimensions: Sequence[int], layers: Sequence[int]
) -> list[dict[str, Any]]:  # fmt: skip
    """All rows of some examples; one that cannot be read is a row that says why."""
    subject = setting.subject
    usable, rows = sift([furnished(example) for example in examples], lambda example: _check(subject, example))
    others = np.random.default_rng([plan.seed, 1]).permutation(subject.config.get_text_config().hidden_size)
    control = [int(d) for d in others if d not in dimensions][: len(dimensions)]
    for some in alike(usable):
        encoded = subject.encode(some, setting.padding)
        readings, _ = read_sinks(subject, encoded, dimensions, control, layers)
        for i, example in enumerate(some):
            found = [*_score_rows(readings[i], plan), *_place_rows(readings[i], encoded.maps[i], example, plan)]
            rows += [{"example": example.id, **row} for row in found]
        rows += _cause_rows(subject, encoded, readings, plan, layers)
    return rows


def _check(subject: Subject, example: Example) -> None:
    check_shown(example)
    token_map = subject.encode(example).maps[0]
    surroundings(token_map)
    if not len(places_of(token_map)):
        raise DataError(f"example {example.id!r} has no positions of what is shown")


# --- what is read ----------------------------------------------------------------------------------------------------


def groups(reading: SinkReading, plan: Plan) -> dict[str, np.ndarray]:
    """The sinks of each layer (layer shown), and the positions of the highest score, which are the same in every layer."""
    highest = np.zeros_like(reading.phi, dtype=bool)
    highest[:, np.argsort(-reading.phi.mean(0), kind="stable")[: plan.count]] = True
    return {"sinks": np.asarray(reading.phi > plan.tau), "highest": highest}


def _row(what: str, key: str, values: Any, n: int = 0) -> dict[str, Any]:
    flat = np.asarray(values, dtype=np.float64).ravel()
    return {"what": what, "key": key, "values": [None if np.isnan(v) else float(v) for v in flat], "n": n}


def _score_rows(reading: SinkReading, plan: Plan) -> list[dict[str, Any]]:
    """Scores and the attention that goes with them: curves over layers, and tables (layer head)."""
    sinks = groups(reading, plan)["sinks"]
    named = {"shown": reading.phi, "text": reading.phi_text, "control": reading.control}
    rows = [_row("count", key, counts(phi, (*THRESHOLDS, plan.tau)), phi.shape[1]) for key, phi in named.items()]
    rows += [_row("largest", key, phi.max(1)) for key, phi in named.items()]
    centric = image_centric(reading.attention, sinks, plan.min_mass, plan.max_share)
    share = sink_share(reading.attention, sinks)
    share[~sinks.any(1)] = np.nan  # a layer without sinks has no share of them
    return [
        *rows, _row("first", "phi", reading.phi_text[:, 0]), _row("mass", "", reading.attention.sum(-1)), _row("sink_share", "", share),
        _row("centric", "", centric), _row("correlation", "", attention_and_score(reading.attention, reading.phi)),
        *(_row("received", name, _received(reading, chosen)) for name, chosen in groups(reading, plan).items()),
    ]  # fmt: skip


def _received(reading: SinkReading, chosen: np.ndarray) -> tuple[float, float]:
    """Attention of one position, layers and heads averaged: of the chosen ones, and of the others."""
    seen = reading.attention.mean(1)
    mine, rest = seen[chosen], seen[~chosen]
    return (float(mine.mean()) if mine.size else np.nan), (float(rest.mean()) if rest.size else np.nan)


def _place_rows(reading: SinkReading, token_map: TokenMap, example: Example, plan: Plan) -> list[dict[str, Any]]:
    """Where the positions of each group lie, where boxes are known."""
    if not example.regions or not token_map.geometry:
        return []
    background = ~np.isin(reading.shown, token_map.in_boxes(example.regions))
    return [_row("place", name, on_background(chosen, background)) for name, chosen in groups(reading, plan).items()]


# --- what is changed -------------------------------------------------------------------------------------------------


def _cause_rows(
    subject: Subject, encoded: Encoded, readings: Sequence[SinkReading], plan: Plan, layers: Sequence[int]
) -> list[dict[str, Any]]:
    """What hiding each group from the words after it does to the model's own answer, beside as many other positions."""
    asked = [
        _entries(reading, m, example.id, plan, layers)
        for reading, m, example in zip(readings, encoded.maps, encoded.examples, strict=True)
    ]
    entries = iter([[entry for *_, entry in each] for each in asked])
    swept = sweep(subject, encoded, lambda _: next(entries), method=plan.method)  # type: ignore[arg-type]
    rows = []
    for i, example in enumerate(encoded.examples):
        found = change(swept.clean[i], swept.edited[i], int(swept.clean[i].argmax()))
        for name in dict.fromkeys(label for label, *_ in asked[i]):
            own = [j for j, (label, *_) in enumerate(asked[i]) if label == name]
            values = [float(np.mean(getattr(found, effect)[own])) for effect in EFFECTS]
            rows.append({"example": example.id, **_row("cause", name, [*values, asked[i][own[0]][1]])})
    return rows


def _entries(reading: SinkReading, token_map: TokenMap, name: str, plan: Plan, layers: Sequence[int]) -> list[Label]:
    after = surroundings(token_map).after.tolist()
    rng = np.random.default_rng([plan.seed, *name.encode()])
    everything = Knockout(after, reading.shown.tolist(), list(layers))
    made: list[Label] = [("everything", len(reading.shown), everything), ("nothing", 0, replace(everything, columns=[]))]
    for group, chosen in groups(reading, plan).items():
        drawn = [moved(chosen, rng) for _ in range(plan.draws)]
        if not chosen.any() or any(other.sum() < chosen.sum() for other in drawn):
            continue  # nothing to hide, or not as many others to hide instead
        size = float(chosen.sum(1).mean())
        made.append((group, size, _hide(reading, chosen, after, layers)))
        made += [(f"random for {group}", size, _hide(reading, other, after, layers)) for other in drawn]
    return made


def _hide(reading: SinkReading, chosen: np.ndarray, after: list[int], layers: Sequence[int]) -> list[Knockout]:
    """In each layer its own positions; layers that share them are one knock-out."""
    together: dict[tuple[int, ...], list[int]] = {}
    for layer, own in zip(layers, chosen, strict=True):
        together.setdefault(tuple(reading.shown[own].tolist()), []).append(layer)
    return [Knockout(after, list(positions), own) for positions, own in together.items() if positions]
