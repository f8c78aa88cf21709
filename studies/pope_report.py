"""The POPE study's numbers, figures and words, made from its records."""

from collections import Counter
from collections.abc import Sequence
from itertools import combinations
from typing import Any

import numpy as np
import pyarrow as pa

from probe.analysis.stats import benjamini_hochberg, correlate, ends, mcnemar, paired_difference
from probe.plots.panels import colour, noted, values
from studies.run import Run
from studies.study import Setting, Summary
from studies.tasks.scores import Score, drawable
from studies.tasks.scores_pope import SPLITS, Verdict, auroc, pope
from studies.telling import above, bracketed
from studies.work import interval, picked, refuse_nothing, skipped

READINGS = ("input", "same")
SHOWN = ("accuracy", "f1", "hallucination", "yes_ratio", "unknown_rate", "auroc")
TITLES = {
    "accuracy": "accuracy", "f1": "F1 of yes", "hallucination": "affirmed though absent", "yes_ratio": "yes-ratio",
    "unknown_rate": "neither yes nor no", "auroc": "AUROC of p(yes)",
}  # fmt: skip
OBJECTS = 24  # how many of the things that are asked about most are drawn


def summarise(rows: pa.Table, names: Sequence[str], problems: Sequence[str], seed: int) -> Summary:
    """Everything that the report says, as numbers. Raises DataError when no example could be used."""
    own = picked(rows, model=names[0])
    refuse_nothing(own, len(picked(own, what="answer")))
    tables = {name: picked(rows, model=name) for name in names}
    found = {name: _model(table, seed) for name, table in tables.items() if len(picked(table, what="answer"))}
    first = found[names[0]]["splits"]["all"]
    comparison = _compare({name: picked(tables[name], what="answer") for name in found}, seed)
    return {
        "run": "", "n": first["accuracy"]["n"], "n_skipped": len(skipped(own)), "skipped": skipped(own), "problems": list(problems),
        "accuracy": first["accuracy"], "f1": first["f1"], "yes_ratio": first["yes_ratio"], "unknown_rate": first["unknown_rate"],
        "hallucination": first["hallucination"], "auroc": first["auroc"], "score": found[names[0]]["score"], "models": found,
        "comparison": comparison, "left_out": [name for name in names if name not in found],
    }  # fmt: skip


def _scores(verdicts: Sequence[Verdict], p_yes: Sequence[float], there: Sequence[bool], seed: int) -> dict[str, Any]:
    made: dict[str, Score] = {**pope(verdicts, there, seed), "auroc": auroc(p_yes, there, seed)}
    return {name: score.as_dict() for name, score in made.items()}


def _columns(rows: pa.Table, *names: str) -> list[list[Any]]:
    return [rows[name].to_pylist() for name in names]


def _of(rows: pa.Table, seed: int, official: bool = False) -> dict[str, Any]:
    verdicts, p_yes, there = _columns(rows, "official" if official else "verdict", "p_yes", "there")
    return _scores(verdicts, p_yes, there, seed)


def _model(table: pa.Table, seed: int) -> dict[str, Any]:
    rows, hidden = picked(table, what="answer"), picked(table, what="blind")
    present = set(rows["split"].to_pylist())
    names = [name for name in (*SPLITS, *sorted(present - set(SPLITS))) if name in present and name != "all"]
    splits = {"all": _of(rows, seed), **{name: _of(picked(rows, split=name), seed) for name in names}}
    right, there = _right(rows), np.array(rows["there"].to_pylist(), dtype=bool)
    return {
        "splits": splits, "official": _of(rows, seed, official=True), "constant": max(there.mean(), 1 - there.mean()),
        "blind": _of(hidden, seed) if len(hidden) else None, "gain": _gain(rows, hidden, seed) if len(hidden) else None,
        "objects": _objects(rows, seed), "n_right": int(right.sum()),
        "score": {reading: interval(_known(rows, reading), seed) for reading in READINGS},
        "within": _within(rows, seed),
    }  # fmt: skip


def _known(rows: pa.Table, name: str) -> np.ndarray:
    return np.array([np.nan if value is None else value for value in rows[name].to_pylist()], dtype=np.float64)


def _right(rows: pa.Table) -> np.ndarray:
    verdicts, there = _columns(rows, "verdict", "there")
    return np.array(
        [verdict == ("yes" if is_there else "no") for verdict, is_there in zip(verdicts, there, strict=True)], dtype=bool
    )


def _gain(rows: pa.Table, hidden: pa.Table, seed: int) -> dict[str, Any]:
    """What the picture adds to the accuracy, on the items that were asked with it and without."""
    return _paired(rows, hidden, seed)


def _paired(a: pa.Table, b: pa.Table, seed: int) -> dict[str, Any]:
    """Accuracy of the one less that of the other on the items that both have, with McNemar's p-value."""
    first, second = (dict(zip(t["example"].to_pylist(), _right(t), strict=True)) for t in (a, b))
    shared = [name for name in first if name in second]
    x, y = (np.array([table[name] for name in shared], dtype=bool) for table in (first, second))
    found = paired_difference(x.astype(float), y.astype(float), seed)
    low, high = ends(float(found.low), float(found.high))
    return {"value": float(found.value), "low": low, "high": high, "p": mcnemar(x, y), "n": len(shared)}


def _within(rows: pa.Table, seed: int) -> dict[str, Any]:
    """Whether the score goes, over a model's own examples, with how much it believes the truth; q-values over the two readings."""
    p_yes, there = _columns(rows, "p_yes", "there")
    truth = np.array([p if is_there else 1 - p for p, is_there in zip(p_yes, there, strict=True)], dtype=np.float64)
    found = {}
    for reading in READINGS:
        scores = _known(rows, reading)
        known = ~np.isnan(scores)
        found[reading] = correlate(scores[known], truth[known], rank=True, seed=seed)
    q = benjamini_hochberg(np.array([one.p for one in found.values()]))
    return {
        reading: {"value": one.value, "low": one.low, "high": one.high, "p": one.p, "q": float(q[i]), "n": one.n}
        for i, (reading, one) in enumerate(found.items())
    }


def _objects(rows: pa.Table, seed: int) -> dict[str, Any]:
    """Each thing that is asked about, the most asked first: accuracy, and how often it is affirmed where it is absent."""
    names, verdicts, there = _columns(rows, "object", "verdict", "there")
    made = {}
    for name, count in sorted(Counter(names).items(), key=lambda item: (-item[1], item[0])):
        at = [i for i, other in enumerate(names) if other == name]
        scores = pope([verdicts[i] for i in at], [there[i] for i in at], seed)
        made[name] = {"n": count, **{key: scores[key].as_dict() for key in ("accuracy", "hallucination", "yes_ratio")}}
    return made


def _compare(tables: dict[str, pa.Table], seed: int) -> list[dict[str, Any]]:
    """Every two models on the same items; q-values over the pairs."""
    pairs = list(combinations(tables, 2))
    found = [{"a": a, "b": b, **_paired(tables[a], tables[b], seed)} for a, b in pairs]
    q = benjamini_hochberg(np.array([one["p"] for one in found]))
    return [{**one, "q": float(value)} for one, value in zip(found, q, strict=True)]


# --- figures ---------------------------------------------------------------------------------------------------------


def figures(run: Run, summary: Summary) -> None:
    """Scores by split, things that are affirmed in vain, and the alignment score beside them."""
    models = summary["models"]
    splits = []
    for key in SHOWN:
        series = [
            (name, drawable({split: one[key] for split, one in found["splits"].items()} | ({"no picture": found["blind"][key]} if found["blind"] else {})), colour(i))
            for i, (name, found) in enumerate(models.items())
        ]  # fmt: skip
        splits.append((TITLES[key], series))
    counts = next(iter(models.values()))["splits"]
    asked = "n = " + ", ".join(f"{one['accuracy']['n']} {split}" for split, one in counts.items())
    run.figure("splits", *noted(values(splits[:3], "share of questions, 95 % interval"), asked))
    run.figure("answers", *noted(values(splits[3:], "value, 95 % interval"), asked))
    objects = list(next(iter(models.values()))["objects"])[:OBJECTS]
    by_object = [
        (TITLES[key], [(name, drawable({o: found["objects"].get(o, {}).get(key) for o in objects}), colour(i)) for i, (name, found) in enumerate(models.items())])
        for key in ("hallucination", "accuracy")
    ]  # fmt: skip
    run.figure("objects", *noted(values(by_object, "share of questions, 95 % interval"), _things(objects, models)))
    if any(found["score"]["same"]["value"] is not None for found in models.values()):
        run.figure("alignment", *_alignment(models))


def _things(objects: Sequence[str], models: dict[str, Any]) -> str:
    found = next(iter(models.values()))["objects"]
    counts = [found[name]["n"] for name in objects]
    return f"n = {sum(counts)} questions, {min(counts)} to {max(counts)} for each thing"


def _alignment(models: dict[str, Any]) -> tuple[Any, Any]:
    panels = [
        (title, [("", drawable({name: read(found) for name, found in models.items()}), colour(0))])
        for title, read in (
            ("IMA, input", lambda found: found["score"]["input"]), ("IMA, same layer", lambda found: found["score"]["same"]),
            ("affirmed though absent", lambda found: found["splits"]["all"]["hallucination"]),
        )
    ]  # fmt: skip
    told = ", ".join(f"{found['score']['same']['n']} ({name})" for name, found in models.items())
    return noted(values(panels, "value, 95 % interval", share=False), f"n = {told}")


# --- words -----------------------------------------------------------------------------------------------------------


def _said(one: dict[str, Any] | None) -> str:
    if one is None or one["value"] is None:
        return "not defined"
    return bracketed(one)


def report(summary: Summary, setting: Setting) -> str:
    """The report: the question, the answer, each figure with a sentence, what could not be used."""
    name, found = next(iter(summary["models"].items()))
    wrong, gain = summary["hallucination"], found["gain"]
    lines = [
        "# Does the model say that things are there which are not?", "",
        f"Of {wrong['denominator']:.0f} questions after something that is not there, {name} affirms {_said(wrong)} (95 % interval); it "
        f"answers {_said(summary['accuracy'])} of all {summary['n']} questions rightly, where the better constant answer gives {found['constant']:.3f}.",
    ]  # fmt: skip
    if gain:
        lines += ["", _blind_words(found, gain)]
    lines += ["", "## By split", "", *_split_table(summary), "", "![by split](figures/splits.png)", "",
              "An answer that is neither yes nor no counts as wrong. AUROC needs no word to be written: it asks whether p(yes) over both spellings of yes and of no "
              "is higher where the thing is there.", "", "![answers](figures/answers.png)", ""]  # fmt: skip
    lines += [_official_words(found), "", "## By thing", "", "![by thing](figures/objects.png)", "", _object_words(found), ""]
    lines += ["## Beside the alignment score", "", *_alignment_words(summary), ""]
    if summary["comparison"]:
        lines += ["## Model against model", "", *_pair_table(summary["comparison"]), ""]
    return "\n".join([*lines, *_left_out(summary)])


def _blind_words(found: dict[str, Any], gain: dict[str, Any]) -> str:
    blind = found["blind"]
    told = "more than without it" if above(gain) else "no more than without it, as far as these questions can tell"
    return (
        f"Without its picture it answers {_said(blind['accuracy'])} rightly ({_said(blind['unknown_rate'])} say neither yes nor no) and affirms "
        f"{_said(blind['hallucination'])} of what is not there; its p(yes) has an AUROC of {_said(blind['auroc'])}. With the picture it knows {told} "
        f"(accuracy {bracketed(gain, '+.3f')}, McNemar p = {gain['p']:.2g}, n = {gain['n']})."
    )


def _split_table(summary: Summary) -> list[str]:
    rows = ["| model | split | n | " + " | ".join(TITLES[key] for key in SHOWN) + " |", "|---" * (3 + len(SHOWN)) + "|"]
    for name, found in summary["models"].items():
        cases = {**found["splits"], **({"no picture": found["blind"]} if found["blind"] else {})}
        rows += [
            f"| {name} | {split} | {one['accuracy']['n']} | " + " | ".join(_said(one[key]) for key in SHOWN) + " |"
            for split, one in cases.items()
        ]
    return rows


def _official_words(found: dict[str, Any]) -> str:
    ours, theirs = found["splits"]["all"], found["official"]
    return (
        f"The published parser takes everything without a no for a yes: with it accuracy is {_said(theirs['accuracy'])} and the yes-ratio "
        f"{_said(theirs['yes_ratio'])}, where the one used here finds {_said(ours['accuracy'])} and {_said(ours['yes_ratio'])}, and "
        f"{_said(ours['unknown_rate'])} of the answers neither."
    )


def _object_words(found: dict[str, Any]) -> str:
    rates = {name: one["hallucination"] for name, one in found["objects"].items() if one["hallucination"]["denominator"] >= 3}
    if not rates:
        return "No thing is asked about three times in vain, so that none can be called often affirmed."
    most = max(rates, key=lambda name: rates[name]["value"])
    if not rates[most]["value"]:
        return f"None of the {len(rates)} things that are asked about in vain at least three times is ever affirmed."
    return (
        f"Of the things that are asked about in vain at least three times, `{most}` is affirmed most often: {_said(rates[most])} of "
        f"{rates[most]['denominator']:.0f}. It is the highest of {len(rates)}, and the highest of many is high by chance too."
    )


def _alignment_words(summary: Summary) -> list[str]:
    models = summary["models"]
    if all(found["score"]["same"]["value"] is None for found in models.values()):
        return ["These models keep no tokens of the picture among those of the text: there is no alignment score."]
    lines = [
        "| model | IMA, input | IMA, same layer | affirmed though absent | ρ with belief in the truth (input; same) |",
        "|---|---|---|---|---|",
    ]
    for name, found in models.items():
        within = "; ".join(
            f"{_said(found['within'][r])}"
            + (f", q = {found['within'][r]['q']:.2g}" if found["within"][r]["q"] is not None else "")
            for r in READINGS
        )
        lines.append(
            f"| {name} | {_said(found['score']['input'])} | {_said(found['score']['same'])} | {_said(found['splits']['all']['hallucination'])} | {within} |"
        )
    return [
        *lines, "", "![alignment](figures/alignment.png)", "",
        "The paper holds that models with a higher score hallucinate less. That is a claim over models, and so few of them show no correlation: "
        "the study `implicit-alignment` measures it over a family. The last column asks it within a model: Spearman's correlation over "
        "examples of the score with the probability given to the true answer, q-values over the two readings.",
    ]  # fmt: skip


def _pair_table(comparison: Sequence[dict[str, Any]]) -> list[str]:
    return [
        "| models | difference of accuracy | McNemar p | q | n |", "|---|---|---|---|---|",
        *(f"| {one['a']} less {one['b']} | {bracketed(one, '+.3f')} | {one['p']:.2g} | {one['q']:.2g} | {one['n']} |" for one in comparison),
    ]  # fmt: skip


def _left_out(summary: Summary) -> list[str]:
    lines = []
    if summary["n_skipped"] or summary["problems"]:
        what = [*summary["problems"], *summary["skipped"]]
        lines += [f"{len(what)} examples could not be used:", "", *(f"- {text}" for text in what[:20]), ""]
    return lines + [f"{name} could use none of the examples." for name in summary["left_out"]]
