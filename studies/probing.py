"""At which layer can each fact of a scene be read, and from which tokens?

Linear probes on group means of every state, one forward pass for each example, beside the most frequent class, a control task with random
labels, and patches that show something else. No picture is both trained and tested on.
"""

from functools import partial
from typing import Any

import pyarrow as pa

from probe.analysis.probing import FOLDS
from probe.errors import StudyError, did_you_mean
from probe.example import Example
from probe.features import PLACES, group_means, places
from studies.probes import SCHEMA, facts_of, picture_row, read_all, read_fact, scenes_of, states_of, type_of
from studies.run import Run, finite
from studies.study import Setting, Summary, describe, progress, study
from studies.work import picked, read_units, refuse_nothing, sift, skipped

DEFAULT = ("object", "other", "shown", "word", "last")


@study
def probing(setting: Setting, *, facts: str = "auto", at: str = "auto", folds: int = FOLDS, tolerance: float = 0.05) -> Summary:
    """At which layer can each fact of a scene be read, and from which tokens?

    `facts` are tags of the examples (auto: the tags `fact:...`, else every tag with two values or more); `at` names of
    `object,other,shown,word,question,last` (auto: all but question); `folds` parts of the pictures, each tested once; `tolerance` how near
    the best state's accuracy counts as readable.
    """
    chosen = DEFAULT if at == "auto" else tuple(name.strip() for name in at.split(","))
    for name in chosen:
        if name not in PLACES:
            raise StudyError(f"there is no place {name!r}{did_you_mean(name, PLACES)}")
    if folds < 2:
        raise StudyError(f"pictures are split into two parts or more, not {folds}")
    if not 0 <= tolerance < 1:
        raise StudyError(f"a tolerance of accuracy lies between 0 and 1, not at {tolerance:g}")
    found = list(facts_of(setting.data.examples, facts))
    config = {
        "data": setting.data.name, "fingerprint": setting.data.fingerprint, "limit": len(setting.data), "batch": setting.batch,
        "padding": setting.padding, "seed": setting.seed, "facts": facts, "places": list(chosen), "folds": folds, "tolerance": tolerance,
    }  # fmt: skip
    run = Run.open(setting.out, "probing", config, describe(setting.subject), SCHEMA)
    with run.recorded():
        rows = read_units(setting, run, "probing: reading", lambda some: _unit(setting, some, chosen))
        summary = finite(summarise(rows, setting, found, chosen, folds, tolerance))
        summary["run"] = str(run.folder)
        from studies.probing_report import figures, report

        figures(run, summary)
        run.finish(summary, report(summary, setting))
    return summary


def _unit(setting: Setting, examples: list[Example], chosen: tuple[str, ...]) -> list[dict[str, Any]]:
    subject = setting.subject
    usable, rows = sift(examples, subject.encode)
    if not usable:
        return rows
    encoded = subject.encode(usable, setting.padding)
    found = [places(m, e) for m, e in zip(encoded.maps, usable, strict=True)]
    means = group_means(subject, encoded, [groups for groups, _ in found], chosen)
    for i, (example, (groups, missing)) in enumerate(zip(usable, found, strict=True)):
        rows.append(picture_row(subject, example))
        for j, name in enumerate(chosen):
            own = {"example": example.id, "group": name}
            if name in groups:
                rows.append({**own, "what": "states", "states": means.shape[2], "vector": means[i, j].ravel()})
            else:
                rows.append({**own, "what": "missing", "text": missing[name]})
    return rows


def summarise(
    rows: pa.Table, setting: Setting, facts: list[str], chosen: tuple[str, ...], folds: int, tolerance: float
) -> Summary:
    """Every fact at every place. Raises DataError when no example, or no fact, can be used."""
    known = set(picked(rows, what="shown")["example"].to_pylist())
    examples = [example for example in setting.data.examples if example.id in known]
    refuse_nothing(rows, len(examples))
    ids, values = [e.id for e in examples], facts_of(setting.data.examples, ",".join(facts))
    kept = [i for i, example in enumerate(setting.data.examples) if example.id in known]
    values = {name: [own[i] for i in kept] for name, own in values.items()}
    states = {name: states_of(rows, name, ids) for name in chosen}

    read = partial(read_fact, seed=setting.seed, folds=folds, tolerance=tolerance)
    with progress("probing: probes", len(values) * len(chosen), setting.quiet, "probes") as advance:
        found, refused = read_all(values, states, scenes_of(rows, ids), [type_of(e) for e in examples], read, advance)
    best = {name: max(groups, key=lambda g: groups[g]["best"]["value"]) for name, groups in found.items()}
    absent = picked(rows, what="missing")
    missing = list(dict.fromkeys(zip(absent["group"].to_pylist(), absent["text"].to_pylist(), strict=True)))
    return {
        "run": "", "n": len(ids), "n_skipped": len(skipped(rows)), "skipped": skipped(rows), "refused": refused, "folds": folds,
        "n_missing": {group: absent["group"].to_pylist().count(group) for group in chosen},
        "missing": [f"{group}: {text}" for group, text in missing],
        "headline": {
            name: {"place": place, **{key: found[name][place][key] for key in ("n", "best", "majority", "onset", "first_above")}}
            for name, place in best.items()
        },
        "facts": found,
    }  # fmt: skip
