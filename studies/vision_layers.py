"""Which layers of the vision tower carry which facts, and what does merging levels give?

Patch states of every layer of the tower, pooled over the thing's own patches, through the probes of the study `probing`; then layers laid side
by side against the best single one, on the same pictures (the question of From CLIP to DINO, arXiv 2310.08825). One pass of the tower for
each example.
"""

from collections.abc import Hashable, Sequence
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa

from probe.analysis.probing import BEST, FOLDS, classes_of, curve_of, merge
from probe.analysis.stats import benjamini_hochberg, sign_flip
from probe.errors import DataError, StudyError, TokenError
from probe.example import Example
from probe.towers import Groups, Tower, find_tower, patches_of, tower_means
from studies.probes import SCHEMA, as_number, facts_of, picture_row, read_all, read_fact, scenes_of, states_of, type_of
from studies.run import Run, finite
from studies.study import Setting, Summary, describe, progress, study
from studies.work import picked, read_units, refuse_nothing, sift, skipped

PLACES = ("object", "other", "shown")
DEMO = ("name", "colour", "cell")  # the facts of a thing: of the scene as a whole the tower is not asked
SHOWN = {"vision": ("image",), "audio": ("audio",)}


@study
def vision_layers(
    setting: Setting, *, tower: str = "auto", facts: str = "auto", folds: int = FOLDS, tolerance: float = 0.05
) -> Summary:
    """Which layers of the vision tower carry which facts, and what does merging levels give?

    `tower` is vision or audio (auto: whichever the model has, vision first); `facts` are tags of the examples (auto: name, colour and cell for
    the demo, else as in probing); `folds` parts of the pictures, each tested once; `tolerance` how near the best layer's accuracy counts
    as readable.
    """
    if tower not in ("auto", *SHOWN):
        raise StudyError(f"there is no tower {tower!r}: name vision or audio")
    if folds < 2:
        raise StudyError(f"pictures are split into two parts or more, not {folds}")
    kind = (
        tower
        if tower != "auto"
        else "audio"
        if setting.subject.anatomy.vision is None and setting.subject.anatomy.audio
        else "vision"
    )
    layers = find_tower(setting.subject, kind)
    own = setting.data.name.split(":")[0] == "demo" and facts == "auto"
    names = list(facts_of(setting.data.examples, ",".join(DEMO) if own else facts))
    config = {
        "data": setting.data.name, "fingerprint": setting.data.fingerprint, "limit": len(setting.data), "batch": setting.batch,
        "padding": setting.padding, "seed": setting.seed, "tower": layers.path, "facts": names, "folds": folds, "tolerance": tolerance,
    }  # fmt: skip
    run = Run.open(setting.out, "vision-layers", config, describe(setting.subject), SCHEMA)
    with run.recorded():
        rows = read_units(setting, run, "vision layers: reading", lambda some: _unit(setting, some, layers))
        summary = finite(summarise(rows, setting, layers, names, folds, tolerance))
        summary["run"] = str(run.folder)
        from studies.vision_layers_report import figures, report

        figures(run, summary)
        run.finish(summary, report(summary, setting))
    return summary


def _unit(setting: Setting, examples: list[Example], tower: Tower) -> list[dict[str, Any]]:
    """A pass of the tower for each example by itself: nothing of it is padded, and no other example shares its patches."""
    means: dict[str, dict[str, np.ndarray]] = {}
    notes: dict[str, str] = {}

    def check(example: Example) -> None:
        if not any(example.media[kind] for kind in SHOWN[tower.kind]):
            raise DataError(f"example {example.id!r} shows the {tower.kind} tower nothing")
        means[example.id], notes[example.id] = _means(setting, example, tower)

    usable, rows = sift(examples, check)
    for example in usable:
        rows.append(picture_row(setting.subject, example))
        if notes[example.id]:
            rows.append({"example": example.id, "what": "missing", "group": "object", "text": notes[example.id]})
        rows += [
            {"example": example.id, "what": "states", "group": name, "states": len(found), "vector": found.ravel()}
            for name, found in means[example.id].items()
        ]  # fmt: skip
    return rows


def _means(setting: Setting, example: Example, tower: Tower) -> tuple[dict[str, np.ndarray], str]:
    """Mean states of the thing's patches, of the others and of all; or of all alone, and why."""
    encoded = setting.subject.encode(example)
    note = ""

    def choose(count: int) -> Groups:
        nonlocal note
        try:
            if not example.regions:
                raise TokenError("no region says where the object is")
            patches = patches_of(setting.subject, encoded.maps[0], count)
        except TokenError as error:
            note = str(error)
            return {"shown": np.arange(count)}
        own = patches.covering(example.regions[0].box)
        note = "" if len(own) else "the box is cut away"
        return {"object": own, "other": np.setdiff1d(patches.everything, own), "shown": patches.everything}

    return tower_means(setting.subject, encoded, tower, choose), note


# --- numbers ---------------------------------------------------------------------------------------------------------


def summarise(
    rows: pa.Table, setting: Setting, tower: Tower, facts: list[str], folds: int, tolerance: float
) -> Summary:  # fmt: skip
    """Every fact at every layer, and merged layers. Raises DataError when no example, or no fact, can be used."""
    known = set(picked(rows, what="shown")["example"].to_pylist())
    examples = [example for example in setting.data.examples if example.id in known]
    refuse_nothing(rows, len(examples))
    ids = [e.id for e in examples]
    kept = [i for i, example in enumerate(setting.data.examples) if example.id in known]
    values = {n: [own[i] for i in kept] for n, own in facts_of(setting.data.examples, ",".join(facts)).items()}
    states = {name: own for name in PLACES if (own := states_of(rows, name, ids)) is not None}
    scenes, types = scenes_of(rows, ids), [type_of(e) for e in examples]
    place = next(name for name in PLACES if name in states)
    read = partial(read_fact, seed=setting.seed, folds=folds, tolerance=tolerance)
    with progress("vision layers: probes", len(values) * (len(states) + 1), setting.quiet, "probes") as advance:
        found, refused = read_all(values, states, scenes, types, read, advance)
        merged = {}
        for name in found:
            if place in found[name]:
                merged[name] = compared(states[place], values[name], scenes, levels(tower), setting.seed, folds)
            advance(1)
    headline = {
        name: {"place": place, **{key: groups[place][key] for key in ("n", "best", "majority", "onset", "first_above")}}
        for name, groups in found.items() if place in groups
    }  # fmt: skip
    absent = picked(rows, what="missing")["text"].to_pylist()
    return {
        "run": "", "n": len(ids), "n_skipped": len(skipped(rows)), "skipped": skipped(rows), "refused": refused, "folds": folds,
        "missing": [f"a place for the thing ({absent.count(text)}): {text}" for text in dict.fromkeys(absent)],
        "tower": {"kind": tower.kind, "path": tower.path, "layers": tower.n_layers, "read": list(tower.read)}, "place": place,
        "levels": {name: list(chosen) for name, chosen in levels(tower).items()},
        "headline": headline, "merged": merged, "facts": found,
    }  # fmt: skip


def levels(tower: Tower) -> dict[str, tuple[int, ...]]:
    """The layers that are laid side by side: early, middle and late ones up to the last that the connector reads, and all."""
    late = tower.read[-1]
    early, middle = max(1, round(late / 3)), round(2 * late / 3)
    made = {
        "connector's layers": tower.read, "early + late": (early, late), "middle + late": (middle, late),
        "early + middle + late": (early, middle, late), "all": tuple(range(tower.n_states)),
    }  # fmt: skip
    return {name: tuple(dict.fromkeys(states)) for name, states in made.items()}


def compared(
    states: np.ndarray, values: Sequence[str | None], scenes: Sequence[Hashable], merges: dict[str, tuple[int, ...]], seed: int,
    folds: int,
) -> dict[str, Any]:  # fmt: skip
    """Accuracy of merged layers, and what they gain on the best single layer: the same pictures, with intervals over them."""
    fact = classes_of(values, np.isfinite(states).all((0, 2)).tolist())
    groups = [scenes[i] for i in fact.items]
    right = merge(states[:, fact.items], fact.labels, groups, merges, folds, seed)
    made: dict[str, Any] = {}
    for name, own in right.items():
        gain = (own.astype(float) - right[BEST].astype(float))[None]
        made[name] = {"n": len(own), "accuracy": as_number(curve_of(own[None].astype(float), groups, seed))}
        if name != BEST:
            p = float(sign_flip(gain.T, seed)[0])
            made[name] |= {"gain": as_number(curve_of(gain, groups, seed)), "p": p}
    q = benjamini_hochberg(np.array([one["p"] for one in made.values() if "p" in one]))
    for one, value in zip((one for one in made.values() if "p" in one), q, strict=True):
        one["q"] = float(value)
    return made
