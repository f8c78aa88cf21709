"""The relevance study's numbers, figures and words, made from its records."""

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from probe.analysis.relevance import RANDOM
from probe.analysis.stats import benjamini_hochberg, sign_flip
from probe.plots import relevance as plots
from studies.run import Run
from studies.study import Setting, Summary
from studies.telling import above, bracketed
from studies.work import interval, picked, skipped

LEVEL = 0.05


def summarise(rows: pa.Table, plan: Any, seed: int) -> Summary:
    """Everything that the report says, as numbers."""
    missing, answers = skipped(rows), picked(rows, what="answer")
    return {
        "run": "", "n": len(answers), "n_skipped": len(missing), "skipped": missing,
        "mass": {method: _mass(picked(rows, what="mass", method=method), seed) for method in plan.methods},
        "segments": {method: _segments(picked(rows, what="segment", method=method), seed) for method in plan.methods},
        "deletion": _deletion(picked(rows, what="deleted"), plan, seed), "gap": _gap(answers, plan, seed),
        "probability": interval(np.array(answers["before"].to_pylist()), seed), "shares": list(plan.shares),
    }  # fmt: skip


def values_of(rows: pa.Table, column: str = "value") -> dict[str, float]:
    """Example: value, of rows with one for each example; what is not known is left out."""
    pairs = zip(rows["example"].to_pylist(), rows[column].to_pylist(), strict=True)
    return {example: value for example, value in pairs if value is not None and not np.isnan(value)}


def _mass(rows: pa.Table, seed: int) -> dict[str, Any] | None:
    """Share of the relevance on the object's patches, against their share of the picture, and against the mirrored box."""
    inside, across = picked(rows, text="object"), picked(rows, text="mirrored")
    mass, area = values_of(inside), values_of(inside, "area")
    if not mass:
        return None
    other, other_area = values_of(across), values_of(across, "area")
    gains = {example: mass[example] - area[example] for example in mass}
    both = [example for example in mass if example in other]
    null = np.array([gains[example] - (other[example] - other_area[example]) for example in both])
    return {
        "mass": interval(np.array(list(mass.values())), seed), "area": interval(np.array([area[e] for e in mass]), seed),
        "gain": interval(np.array(list(gains.values())), seed), "beyond_mirrored": interval(null, seed),
        "mirrored_gain": interval(np.array([other[e] - other_area[e] for e in both]), seed),
    }  # fmt: skip


def _segments(rows: pa.Table, seed: int) -> dict[str, Any]:
    """Mean share of the relevance on each segment; an example without such a segment has none there."""
    names = list(dict.fromkeys(rows["text"].to_pylist()))
    examples = list(dict.fromkeys(rows["example"].to_pylist()))
    found = {name: values_of(picked(rows, text=name)) for name in names}
    known = {example for each in found.values() for example in each}
    return {
        name: interval(np.array([each.get(example, 0.0) for example in examples if example in known]), seed)
        for name, each in found.items()
    }


def _deletion(rows: pa.Table, plan: Any, seed: int) -> dict[str, Any]:
    """Drops of the answer's probability by method, order and share; the highest against random and lowest, paired, with q-values."""
    drops = {
        (method, order, share): values_of(picked(rows, method=method, order=order).filter(pc.equal(picked(rows, method=method, order=order)["share"], share)))
        for method, order in [*((m, o) for m in plan.methods for o in ("highest", "lowest")), (RANDOM, RANDOM)] for share in plan.shares
    }  # fmt: skip
    random = {share: drops[RANDOM, RANDOM, share] for share in plan.shares}
    made: dict[str, Any] = {
        "random": {str(share): interval(np.array(list(each.values())), seed) for share, each in random.items()}
    }
    tests: list[tuple[dict[str, Any], str, float]] = []
    for method in plan.methods:
        made[method] = {}
        for share in plan.shares:
            highest, lowest = drops[method, "highest", share], drops[method, "lowest", share]
            against = np.array([highest[e] - random[share][e] for e in highest])
            tests.append((made[method], str(share), float(sign_flip(against, seed))))
            made[method][str(share)] = {
                "highest": interval(np.array(list(highest.values())), seed), "lowest": interval(np.array(list(lowest.values())), seed),
                "beyond_random": interval(against, seed), "beyond_lowest": interval(np.array([highest[e] - lowest[e] for e in highest]), seed),
            }  # fmt: skip
    for (of, key, p), q in zip(tests, benjamini_hochberg(np.array([p for *_, p in tests])).tolist(), strict=True):
        of[key] |= {"p": p, "q": q}
    return made


def _gap(answers: pa.Table, plan: Any, seed: int) -> dict[str, Any] | None:
    """How far integrated gradients miss the rise of the logit that they should sum to."""
    if "integrated-gradients" not in plan.methods:
        return None
    gap, rise = (np.array(answers[name].to_pylist(), dtype=float) for name in ("value", "area"))
    return {
        "absolute": interval(gap, seed),
        "rise": interval(rise, seed),
        "relative": float(gap.sum() / max(np.abs(rise).sum(), 1e-12)),
    }


# --- figures and words -----------------------------------------------------------------------------------------------


def figures(run: Run, rows: pa.Table, summary: Summary, setting: Setting, plan: Any) -> list[str]:
    """The figures of a run; the names of those that lay maps over pictures."""
    if any(summary["mass"].values()):
        run.figure("mass", *plots.mass(summary))
    run.figure("deletion", *plots.deletion(summary))
    run.figure("segments", *plots.segments(summary))
    made: list[str] = []
    maps = picked(rows, what="map")
    for example in (e for e in setting.data.examples if e.id in set(maps["example"].to_pylist())):
        own = picked(maps, example=example.id)
        token_map = setting.subject.encode(example).maps[0]
        grid = next(g for g in reversed(token_map.grids) if (g.kind, g.picture) == ("image", 0))
        picture = setting.subject.open_media(example).pictures[0]
        shape = grid.positions[0].shape
        drawn = [
            (name, np.clip(np.array(values).reshape(shape), 0, None))
            for name, values in zip(own["method"].to_pylist(), own["values"].to_pylist(), strict=True)
        ]
        said = picked(rows, what="answer", example=example.id)["text"].to_pylist()[0]
        name = f"map-{len(made)}"
        run.figure(name, *plots.over_picture(picture, grid, drawn, f"{example.prompt}  {said}", example.regions))
        made.append(name)
    return made


def report(summary: Summary, setting: Setting, plan: Any, maps: list[str]) -> str:
    """The question, what was found of each method beside its null, and the figures."""
    lines = [
        "# Relevance", "", "*Which positions does the answer depend on, by attention and by gradient?*", "",
        f"{summary['n']} examples of `{setting.data.name}` shown to `{setting.subject.name}`; what is explained is the first token of the model's own "
        f"answer, whose mean probability is {_range(summary['probability'])}.", "",
    ]  # fmt: skip
    if summary["n_skipped"]:
        lines += [f"{summary['n_skipped']} examples could not be used; the first: {summary['skipped'][0]}", ""]
    lines += ["## Does a method point at what the question is about?", "", *_said_of_mass(summary), ""]
    lines += [
        "## Does the answer fall without the positions that a method ranks highest?",
        "",
        *_said_of_deletion(summary, plan),
        "",
    ]
    lines += ["## Where relevance lies", "", "![segments](figures/segments.png)", "",
              "Share of the positive relevance by segment of the prompt, without what the last position begins with; integrated gradients score what is shown alone.", ""]  # fmt: skip
    if gap := summary["gap"]:
        lines += [
            f"Integrated gradients in {plan.steps} steps miss the rise of the logit that they should sum to by {_range(gap['absolute'])} where it is "
            f"{_range(gap['rise'], '.2f')}: {gap['relative']:.1%} of it.", "",
        ]  # fmt: skip
    for name in maps:
        lines += [f"![{name}](figures/{name}.png)", ""]
    if maps:
        lines += [
            "Positive relevance laid over the picture, each panel scaled by its own maximum; framed: what the question is about.",
            "",
        ]
    return "\n".join(lines)


def _range(one: dict[str, Any], form: str = ".3f") -> str:
    if one["value"] is None:
        return "not known"
    return bracketed(one, form)


def _said_of_mass(summary: Summary) -> list[str]:
    known = {method: found for method, found in summary["mass"].items() if found}
    if not known:
        return ["No example has a box whose place among the positions is known, so that this cannot be said."]
    good = [m for m, f in known.items() if above(f["gain"]) and above(f["beyond_mirrored"])]
    first = next(iter(known.values()))
    lines = [
        f"{', '.join(good) if good else 'No method'} put{'' if len(good) > 1 else 's'} more on the object than its area, and more than on its mirror image. The object takes "
        f"{_range(first['area'])} of the positions that show something (n = {first['area']['n']}).", "",
        "| method | share of relevance on the object | above its area | above the mirrored box (paired) |", "|---|---|---|---|",
        *(f"| {m} | {_range(f['mass'])} | {_range(f['gain'])} | {_range(f['beyond_mirrored'])} |" for m, f in known.items()),
    ]  # fmt: skip
    return [*lines, "", "![mass](figures/mass.png)", "",
            "What a method puts on the object beyond the object's share of the positions (0 is chance), and on the same box mirrored in the picture's centre."]  # fmt: skip


def _said_of_deletion(summary: Summary, plan: Any) -> list[str]:
    found, share = summary["deletion"], str(plan.shares[0])
    good = [
        m for m in plan.methods
        if found[m][share]["q"] is not None and found[m][share]["q"] < LEVEL and above(found[m][share]["beyond_random"])
    ]  # fmt: skip
    how = "made to hold the baseline" if plan.deletion == "ablate" else "hidden from all text"
    lines = [
        f"With {float(share):.0%} of the positions that show something {how}, the answer falls further than with random ones for "
        f"{', '.join(good) if good else 'no method'} (q < {LEVEL:g} over methods and shares).", "",
        f"| method | drop, highest {float(share):.0%} | lowest | highest beyond random (paired) | q |", "|---|---|---|---|---|",
        *(
            f"| {m} | {_range(found[m][share]['highest'])} | {_range(found[m][share]['lowest'])} | {_range(found[m][share]['beyond_random'])} | "
            f"{'-' if found[m][share]['q'] is None else format(found[m][share]['q'], '.3f')} |" for m in plan.methods
        ),
        f"| random | {_range(found['random'][share])} | | | |",
    ]  # fmt: skip
    return [*lines, "", "![deletion](figures/deletion.png)", "",
            "Drop of the answer's probability by the share taken away: highest first, and lowest first, beside random."]  # fmt: skip
