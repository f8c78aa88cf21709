"""The numbers and figures of the modality-importance study, made from its records."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from probe.analysis.modality import CATEGORIES, Subset, category, importance, name_of, subsets
from probe.analysis.stats import benjamini_hochberg, mcnemar, wilson
from probe.plots import modality as plots
from studies.modality_conditions import CONTROLS, INTACT, exchanged
from studies.modality_importance_words import report
from studies.run import Run
from studies.study import Summary
from studies.work import interval, picked, skipped

__all__ = ["figures", "report", "summarise"]
NOTHING = name_of(frozenset())


@dataclass(frozen=True)
class Asked:
    """One example: what it comes with, its kind, and under every condition whether it was right, how likely, and what was said."""

    own: tuple[str, ...]
    kind: str
    right: dict[str, float]
    prob: dict[str, float]
    said: dict[str, str]

    def scores(self, table: str, other: str = "") -> dict[Subset, float] | None:
        """The score of every subset (with `other`, that modality exchanged); None where one could not be asked."""
        values: dict[str, float] = getattr(self, table)
        names = {one: exchanged(one, other) if other in one else name_of(one) for one in subsets(self.own)}
        return {one: values[name] for one, name in names.items()} if all(n in values for n in names.values()) else None


def summarise(rows: pa.Table, seed: int) -> Summary:
    """Everything that the report says, as numbers; every interval is one over questions."""
    asked = _asked(rows)
    whole = [one for one in asked if INTACT in one.right]
    compared = [one for one in asked if len(one.own) > 1 and one.scores("right") is not None]
    names = list(dict.fromkeys(m for one in compared for m in one.own))
    return {
        "run": "", "n": len(whole), "n_compared": len(compared), "modalities": names,
        "accuracy": _accuracy([one.right[INTACT] for one in whole]),
        "subsets": _subsets(asked),
        "importance": {m: _importance(compared, m, seed) for m in names},
        "kinds": {kind: {m: _importance([o for o in compared if o.kind == kind], m, seed)["right"] for m in names}
                  for kind in sorted({one.kind for one in compared} - {""})},
        "categories": _categories(compared, names),
        "exchanged": {m: _exchanged(compared, names, m, seed) for m in names},
        "reading": _reading(compared, names, seed),
        "controls": _controls(whole, seed),
        "shares": _shares(rows, seed),
        "refused": _refused(rows), "n_skipped": len(skipped(rows)), "skipped": skipped(rows),
    }  # fmt: skip


def _asked(rows: pa.Table) -> list[Asked]:
    found: dict[str, Asked] = {}
    for row in picked(rows, what="answer").to_pylist():
        own = tuple(row["modalities"].split("+"))
        one = found.setdefault(row["example"], Asked(own, row["kind"], {}, {}, {}))
        condition = row["condition"]
        one.right[condition], one.prob[condition], one.said[condition] = float(row["right"]), row["prob"], row["answer"]
    return list(found.values())


def _accuracy(right: Sequence[float]) -> dict[str, Any]:
    """A share with its Wilson interval; None where nothing was asked."""
    n, hits = len(right), round(sum(right))
    if not n:
        return {"value": None, "low": None, "high": None, "n": 0}
    low, high = wilson(hits, n)
    return {"value": hits / n, "low": low, "high": high, "n": n}


def _subsets(asked: Sequence[Asked]) -> dict[str, Any]:
    """Accuracy and probability of the right answer for every subset that some example has, nothing first."""
    names = dict.fromkeys([NOTHING, *(name_of(s) for one in asked for s in subsets(one.own))])
    made = {}
    for name in sorted(names, key=lambda n: (n != NOTHING, n.count("+"))):
        some = [one for one in asked if name in one.right]
        if some:
            prob = interval(np.array([one.prob[name] for one in some]))
            made[name] = {"accuracy": _accuracy([one.right[name] for one in some]), "prob": prob}
    return made


# --- importance ------------------------------------------------------------------------------------------------------


def _scores(compared: Sequence[Asked], m: str, table: str, other: str = "") -> np.ndarray:
    """A modality's importance for each question that has it; NaN where the exchanged one was not asked."""
    made = []
    for one in compared:
        if m in one.own:
            scores = one.scores(table, other)
            made.append(np.nan if scores is None else importance(scores, one.own)[m])
    return np.array(made, dtype=np.float64)


def _importance(compared: Sequence[Asked], m: str, seed: int) -> dict[str, Any]:
    return {table: interval(_scores(compared, m, table), seed) for table in ("right", "prob")}


def _category(one: Asked, other: str = "") -> str | None:
    scores = one.scores("right", other)
    return None if scores is None else category(scores, one.own)


def _categories(compared: Sequence[Asked], names: Sequence[str], other: str = "") -> dict[str, Any]:
    """The share of each kind of question, with its interval."""
    found = [made for one in compared if (made := _category(one, other)) is not None]
    kinds = (CATEGORIES[0], *(f"{m}-biased" for m in names), *CATEGORIES[1:])
    return {kind: _accuracy([float(made == kind) for made in found]) for kind in kinds} if found else {}


def _exchanged(compared: Sequence[Asked], names: Sequence[str], m: str, seed: int) -> dict[str, Any]:
    """What becomes of everything when one modality is another example's."""
    both = [one for one in compared if m in one.own and one.scores("right", m) is not None]
    before, after = (_scores(both, m, "right", other) for other in ("", m))
    whole = [name_of(frozenset(one.own)) for one in both]
    a, b = ([one.right[name] for one, name in zip(both, whole, strict=True)],
            [one.right[exchanged(one.own, m)] for one in both])  # fmt: skip
    return {
        "n": len(both), "importance": interval(after, seed), "fall": interval(before - after, seed),
        "probability_fall": interval(_scores(both, m, "prob") - _scores(both, m, "prob", m), seed),
        "accuracy": _accuracy(b), "accuracy_fall": interval(np.array(a) - np.array(b), seed),
        "p": mcnemar(np.array(a, dtype=bool), np.array(b, dtype=bool)), "categories": _categories(both, names, m),
    }  # fmt: skip


def _reading(compared: Sequence[Asked], names: Sequence[str], seed: int) -> dict[str, Any]:
    """What the model's language part can do with the context alone, beside each medium alone, on the same questions."""
    made = {}
    for m in names:
        both = [one for one in compared if {"text", m} <= set(one.own)] if m != "text" else []
        if both:
            words, medium = ([one.right[name] for one in both] for name in ("text", m))
            made[m] = {
                "text": _accuracy(words), "medium": _accuracy(medium),
                "difference": interval(np.array(words) - np.array(medium), seed),
                "p": mcnemar(np.array(words, dtype=bool), np.array(medium, dtype=bool)),
            }  # fmt: skip
    return made


# --- controls --------------------------------------------------------------------------------------------------------


def _controls(whole: Sequence[Asked], seed: int) -> dict[str, Any]:
    """Each control beside the intact example, paired; q-values over the controls."""
    made: dict[str, Any] = {}
    for name in CONTROLS:
        both = [one for one in whole if name in one.right]
        if both:
            a, b = ([one.right[condition] for one in both] for condition in (INTACT, name))
            made[name] = {
                "accuracy": _accuracy(b), "intact": _accuracy(a), "fall": interval(np.array(a) - np.array(b), seed),
                "probability_fall": interval(np.array([one.prob[INTACT] - one.prob[name] for one in both]), seed),
                "agreement": _accuracy([float(one.said[INTACT] == one.said[name]) for one in both]),
                "p": mcnemar(np.array(a, dtype=bool), np.array(b, dtype=bool)),
            }  # fmt: skip
    q = benjamini_hochberg(np.array([one["p"] for one in made.values()], dtype=np.float64))
    return {name: {**one, "q": float(value)} for (name, one), value in zip(made.items(), q, strict=True)}


def _shares(rows: pa.Table, seed: int) -> dict[str, Any]:
    """MM-SHAP: each modality's share of the answer, beside its share of the players, and why some examples have none."""
    refused = picked(rows, what="no shares")["text"].to_pylist()
    tables = {what: picked(rows, what=what).to_pylist() for what in ("share", "even")}
    names = list(dict.fromkeys(row["condition"] for row in tables["share"]))
    made: dict[str, Any] = {
        what: {m: interval(np.array([r["prob"] for r in found if r["condition"] == m]), seed) for m in names}
        for what, found in tables.items()
    }
    return {**made, "n": len({row["example"] for row in tables["share"]}), "refused": refused[:1], "n_refused": len(refused)}


def _refused(rows: pa.Table) -> dict[str, dict[str, Any]]:
    """The conditions that some examples could not be put under: how many, and why."""
    made: dict[str, dict[str, Any]] = {}
    for row in picked(rows, what="refused").to_pylist():
        made.setdefault(row["condition"], {"n": 0, "why": row["text"]})["n"] += 1
    return made


# --- figures ---------------------------------------------------------------------------------------------------------


def figures(run: Run, summary: Mapping[str, Any]) -> None:
    """All figures that the numbers allow."""
    run.figure("answers-by-subset", *plots.subsets_figure(summary))
    run.figure("controls", *plots.controls_figure(summary))
    if summary["n_compared"]:
        run.figure("importance", *plots.importance_figure(summary))
        run.figure("categories", *plots.categories_figure(summary))
    if summary["shares"]["n"]:
        run.figure("shares", *plots.shares_figure(summary))
