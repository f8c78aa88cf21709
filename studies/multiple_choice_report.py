"""The multiple-choice study's numbers, figures and words, made from its records."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from probe.analysis.stats import ends, mcnemar, paired_difference, wilson
from probe.plots.panels import colour, curves, noted, values
from studies.run import Run
from studies.study import Summary
from studies.tasks.relabelling import ORIGIN, SETTINGS
from studies.tasks.scores import Score, average, drawable, proportion
from studies.tasks.scores_chef import BINS, bins, ece, following
from studies.tasks.scores_choice import circular
from studies.tasks.scores_mmevalpro import by_source, named
from studies.telling import above, below, bracketed
from studies.work import picked, refuse_nothing, skipped

REDUCES = ("mean", "sum", "per-byte")
LEAST = 12  # questions that a bin of the figure has at least: fewer are mostly noise
WAYS = ("generation", "likelihood")
TRIPLETS = {  # MMEvalPro's scores as the report names them
    "GA": "genuine accuracy: all three right", "CG": "consistency gap: the original right, another wrong", "AA": "all questions", "OA": "original questions",
    "PA": "perception", "KA": "knowledge", "PC": "perception, where the original is right", "KC": "knowledge, where the original is right",
}  # fmt: skip


def summarise(rows: pa.Table, reduce: str, problems: Sequence[str], seed: int) -> Summary:
    """Everything that the report says, as numbers. Raises DataError when no example could be used."""
    asked = picked(rows, what="asked")
    refuse_nothing(rows, len(asked))
    right = np.array(asked["right"].to_pylist())
    chosen = {way: _chosen(asked, way, reduce) for way in WAYS}
    hits = {way: chosen[way] == right for way in WAYS}
    sure = np.array([_softmax(one).max() for one in _scores(asked, reduce)])
    turned, hidden = picked(rows, what="turned"), picked(rows, what="blind")
    difference = paired_difference(hits["generation"].astype(float), hits["likelihood"].astype(float), seed)
    return {
        "run": "", "n": len(asked), "n_skipped": len(skipped(rows)), "skipped": skipped(rows), "problems": list(problems),
        "chance": float(np.mean([1 / count for count in asked["count"].to_pylist()])),
        "accuracy": {way: _share(f"accuracy by {way}", hits[way]) for way in WAYS},
        "unknown": _share("unknown answers", chosen["generation"] < 0),
        "by_reduce": {name: _share(f"accuracy by likelihood ({name})", _likely(asked, name) == right) for name in REDUCES},
        "agreement": _share("both choose alike", chosen["generation"] == chosen["likelihood"]),
        "difference": {**dict(zip(("value", "low", "high"), (float(difference.value), *ends(float(difference.low), float(difference.high))), strict=True)),
                       "n": len(asked), "p": mcnemar(hits["generation"], hits["likelihood"])},
        "ece": ece(sure.tolist(), hits["likelihood"].tolist(), seed).as_dict(), "bins": _bins(sure, hits["likelihood"]),
        "confidence": average("confidence", sure.tolist(), seed).as_dict(),
        "turned": {way: _turned(turned, way, reduce, seed) for way in WAYS} if len(turned) else None,
        "blind": _blind(hidden, reduce) if len(hidden) else None,
        "gain": _gain(asked, hidden, reduce, seed) if len(hidden) else None,
        "kinds": _kinds(asked["kind"].to_pylist(), hits), "triplets": _triplets(asked, hits, seed),
        "renamed": _renamed(picked(rows, what="renamed"), reduce, seed),
    }  # fmt: skip


def _share(metric: str, hits: np.ndarray) -> dict[str, Any]:
    return proportion(metric, int(hits.sum()), len(hits)).as_dict()


def _generated(rows: pa.Table) -> np.ndarray:
    """The index of the option that each answer names, -1 where it names none."""
    return np.array([-1 if value is None else value for value in rows["chosen"].to_pylist()])


def _scores(rows: pa.Table, reduce: str) -> list[np.ndarray]:
    sums = [np.array(one, dtype=np.float64) for one in rows["sums"].to_pylist()]
    if reduce == "sum":
        return sums
    lengths = rows["tokens" if reduce == "mean" else "bytes"].to_pylist()
    return [one / np.array(by) for one, by in zip(sums, lengths, strict=True)]


def _likely(rows: pa.Table, reduce: str) -> np.ndarray:
    return np.array([int(one.argmax()) for one in _scores(rows, reduce)])


def _softmax(scores: np.ndarray) -> np.ndarray:
    raised: np.ndarray = np.exp(scores - scores.max())
    return raised / raised.sum()


def _bins(sure: np.ndarray, hits: np.ndarray) -> list[dict[str, Any]]:
    found = []
    for one in bins(sure, hits, max(2, min(BINS, len(sure) // LEAST))):
        low, high = wilson(one.hits, one.n)
        found.append({"n": one.n, "confidence": one.confidence, "accuracy": one.accuracy, "low": low, "high": high})
    return found


def _turned(rows: pa.Table, way: str, reduce: str, seed: int) -> dict[str, Any]:
    """Accuracy over every order of the options, in every one of them, and the place that is chosen whatever stands there."""
    chosen = _chosen(rows, way, reduce)
    names, counts, right, turns = (rows[name].to_pylist() for name in ("example", "count", "right", "rotation"))
    hits: dict[str, list[bool]] = {}
    places: dict[str, np.ndarray] = {}
    widest = max(counts)
    for name, count, answer, turn, choice in zip(names, counts, right, turns, chosen.tolist(), strict=True):
        hits.setdefault(name, []).append(choice == answer)
        share = places.setdefault(name, np.concatenate([np.zeros(count), np.full(widest - count, np.nan)]))
        if choice >= 0:
            share[(choice - turn) % count] += 1  # where the chosen option stood
    table = np.array([one / np.nansum(one) for one in places.values() if np.nansum(one)]).reshape(-1, widest)
    shares = [average(f"place {i + 1}", [v for v in table[:, i].tolist() if v == v], seed).as_dict() for i in range(widest)]
    chance = [_mean([1 / count for count in map(len, hits.values()) if count > i]) for i in range(widest)]
    return {
        "accuracy": average("accuracy in any order", [float(np.mean(one)) for one in hits.values()], seed).as_dict(),
        "circular": circular(list(hits.values())).as_dict(), "places": shares, "chance": chance,
        "chance_circular": float(np.mean([len(one) ** -float(len(one)) for one in hits.values()])),
    }  # fmt: skip


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values))


def _blind(rows: pa.Table, reduce: str) -> dict[str, Any]:
    right = np.array(rows["right"].to_pylist())
    return {
        "generation": _share("accuracy without the picture", _generated(rows) == right),
        "likelihood": _share("accuracy without the picture", _likely(rows, reduce) == right),
    }


def _gain(asked: pa.Table, hidden: pa.Table, reduce: str, seed: int) -> dict[str, Any]:
    """What the picture adds to the accuracy of each way, on the questions that were asked with it and without."""
    made = {}
    for way in WAYS:
        first, second = (
            dict(
                zip(rows["example"].to_pylist(), _chosen(rows, way, reduce) == np.array(rows["right"].to_pylist()), strict=True)
            )
            for rows in (asked, hidden)
        )
        shared = [name for name in first if name in second]
        x, y = (np.array([table[name] for name in shared], dtype=bool) for table in (first, second))
        found = paired_difference(x.astype(float), y.astype(float), seed)
        low, high = ends(float(found.low), float(found.high))
        made[way] = {"value": float(found.value), "low": low, "high": high, "p": mcnemar(x, y), "n": len(shared)}
    return made


def _chosen(rows: pa.Table, way: str, reduce: str) -> np.ndarray:
    return _generated(rows) if way == "generation" else _likely(rows, reduce)


def _kinds(kinds: Sequence[str], hits: dict[str, np.ndarray]) -> dict[str, Any]:
    return {
        name: {way: _share(f"{name} by {way}", hits[way][[kind == name for kind in kinds]]) for way in WAYS}
        for name in sorted(set(kinds) - {""})
    }


def _triplets(asked: pa.Table, hits: dict[str, np.ndarray], seed: int) -> dict[str, Any] | None:
    """MMEvalPro's scores of each way: of all triplets, of each source, and the mean over sources; None where no question is part of a triplet."""
    ids, sources, parts, counts = (asked[name].to_pylist() for name in ("triplet", "group", "part", "count"))
    members = [i for i, triplet in enumerate(ids) if triplet]
    if not members:
        return None
    found = {way: by_source(((sources[i], ids[i], parts[i], bool(hits[way][i])) for i in members), seed) for way in WAYS}
    first = found[WAYS[0]]
    guessed: dict[str, float] = {}
    for i in members:
        name = named(sources[i], ids[i])
        guessed[name] = guessed.get(name, 1.0) / counts[i]
    whole = [value for name, value in guessed.items() if name not in first.micro.incomplete]
    return {
        **{way: {"micro": _told(one.micro.scores), "macro": _told(one.macro) if len(one.of) > 1 else None,
                 "sources": {name: _told(of.scores) for name, of in one.of.items()}} for way, one in found.items()},
        "n": first.micro.scores["GA"].n, "incomplete": list(first.micro.incomplete), "chance_genuine": _mean(whole) if whole else None,
    }  # fmt: skip


def _told(scores: dict[str, Score]) -> dict[str, Any]:
    return {name: score.as_dict() for name, score in scores.items()}


def _renamed(rows: pa.Table, reduce: str, seed: int) -> dict[str, Any] | None:
    """ChEF's following of instructions, each way: which name is written where another than the letter is asked for; None where that was not asked."""
    if not len(rows):
        return None
    parts = {setting: picked(rows, labels="{} {}".format(*setting)) for setting in (ORIGIN, *SETTINGS)}
    right = parts[ORIGIN]["right"].to_pylist()
    made: dict[str, Any] = {"n": len(right), "chance": _mean([1 / count for count in parts[ORIGIN]["count"].to_pylist()])}
    for way in WAYS:
        chosen = {name: [None if i < 0 else i for i in _chosen(part, way, reduce).tolist()] for name, part in parts.items()}
        original = chosen.pop(ORIGIN)
        letters = proportion("accuracy under letters", sum(a == b for a, b in zip(original, right, strict=True)), len(right))
        found = following(original, chosen, right, seed)
        made[way] = {"letters": letters.as_dict(), **{name: _told(scores) for name, scores in found.items()}}
    return made


# --- figures ---------------------------------------------------------------------------------------------------------


def figures(run: Run, summary: Summary) -> None:
    """Accuracy in all readings, calibration, the place of what is chosen, and accuracy by kind of question."""
    run.figure(
        "accuracy",
        *_both("accuracy", {way: _cases(summary, way) for way in WAYS}, "share of questions", summary["n"], summary["chance"]),
    )
    run.figure("calibration", *_calibration(summary))
    if turned := summary["turned"]:
        equal = set(turned["generation"]["chance"])
        places = {way: {f"option {i + 1}": one for i, one in enumerate(turned[way]["places"])} for way in WAYS}
        if any(drawable(one) for one in places.values()):
            line = equal.pop() if len(equal) == 1 else None
            run.figure(
                "places", *_both("where the chosen option stood", places, "share of the choices made", summary["n"], line)
            )
    if len(summary["kinds"]) > 1:
        kinds = {way: {f"{name} ({one[way]['n']})": one[way] for name, one in summary["kinds"].items()} for way in WAYS}
        run.figure("kinds", *_both("accuracy by kind", kinds, "share of questions", summary["n"]))


def _both(title: str, found: dict[str, dict[str, Any]], axis: str, n: int, line: float | None = None) -> tuple[Any, Any]:
    """Scores of both ways beside each other."""
    series = [(way, drawable(scores), colour(i)) for i, (way, scores) in enumerate(found.items())]
    told = f"n = {n} questions" + ("" if line is None else f"; dotted: chance, {line:.2f}")
    return noted(values([(title, series)], f"{axis}, 95 % interval", line=line), told)


def _cases(summary: Summary, way: str) -> dict[str, Any]:
    cases = {"as asked": summary["accuracy"][way]}
    if summary["turned"]:
        cases |= {"in any order": summary["turned"][way]["accuracy"], "in every order": summary["turned"][way]["circular"]}
    return cases | ({"no picture": summary["blind"][way]} if summary["blind"] else {})


def _calibration(summary: Summary) -> tuple[Any, Any]:
    found = summary["bins"]
    lines = [
        ("accuracy", {"mean": [b["accuracy"] for b in found], "low": [b["low"] for b in found], "high": [b["high"] for b in found]}, colour(0), False),
        ("confidence", {"mean": [b["confidence"] for b in found]}, colour(1), True),
    ]  # fmt: skip
    drawn = curves(
        [("calibration of likelihood", lines)], [range(1, len(found) + 1)], f"{len(found)} bins of equal size, least sure first", "share"
    )  # fmt: skip
    each = sorted({b["n"] for b in found})
    return noted(drawn, f"n = {summary['n']} questions, {' or '.join(map(str, each))} in a bin; band: Wilson, 95 %")


# --- words -----------------------------------------------------------------------------------------------------------


def _said(one: dict[str, Any]) -> str:
    return "not defined" if one["value"] is None else bracketed(one)


def report(summary: Summary) -> str:
    """The report: the question, the answer, each figure with a sentence, what could not be used."""
    accuracy, gap = summary["accuracy"], summary["difference"]
    verdict = "the two differ by more than chance" if gap["p"] < 0.05 else "the two do not differ beyond chance"
    lines = [
        "# Does the model choose right, by what it writes and by what it finds likely?", "",
        f"{summary['model']} names the right option in {_said(accuracy['generation'])} of {summary['n']} questions (95 % interval), and finds it likeliest in "
        f"{_said(accuracy['likelihood'])}, where guessing gives {summary['chance']:.3f}: {verdict} (difference "
        f"{bracketed(gap, '+.3f')}, McNemar p = {gap['p']:.2g}). Both choose alike in {_said(summary['agreement'])}.", "",
        "![accuracy](figures/accuracy.png)", "",
        f"{_said(summary['unknown'])} of the answers name none of the options, or several; they count as wrong, and as no agreement. Likelihood is the {summary['reduce']} "
        "over an option's tokens; the others give:", "",
        "| reduce | accuracy |", "|---|---|", *(f"| {name} | {_said(one)} |" for name, one in summary["by_reduce"].items()), "",
    ]  # fmt: skip
    if summary["blind"]:
        lines += [_blind_words(summary), ""]
    lines += ["## How sure it is", "", "![calibration](figures/calibration.png)", "",
              f"The mean confidence, the softmax over the options, is {_said(summary['confidence'])}; the expected calibration error over ten bins of equal mass is "
              f"{_said(summary['ece'])}. With {summary['n'] / 10:.0f} questions in a bin some of it is noise: a perfectly calibrated model would not show zero.", ""]  # fmt: skip
    if summary["turned"]:
        lines += _order_words(summary)
    if len(summary["kinds"]) > 1:
        lines += ["## By kind of question", "", "![kinds](figures/kinds.png)", ""]
    if summary["triplets"]:
        lines += _triplet_words(summary["triplets"])
    if summary["renamed"]:
        lines += _renamed_words(summary["renamed"])
    what = [*summary["problems"], *summary["skipped"]]
    if what:
        lines += [f"{len(what)} examples could not be used:", "", *(f"- {text}" for text in what[:20]), ""]
    return "\n".join(lines)


def _blind_words(summary: Summary) -> str:
    """Accuracy without the picture beside guessing, and what the picture adds on the same questions."""
    told = [
        f"{_said(summary['blind'][way])} by {way}, the picture adding {bracketed(gain, '+.3f')} on the same {gain['n']} "
        f"questions (McNemar p = {gain['p']:.2g})"
        for way, gain in summary["gain"].items()
    ]
    better = [way for way in WAYS if above(summary["blind"][way], summary["chance"])]
    verdict = (
        f"By {' and by '.join(better)} some of it needs no picture, being above guessing without one."
        if better
        else f"Neither is above guessing ({summary['chance']:.3f}) within its interval, so that nothing is shown to need no picture."
    )
    return f"Without the picture it is {'; '.join(told)}. {verdict}"


def _order_words(summary: Summary) -> list[str]:
    lines = [
        "## The order of the options",
        "",
        "| | any order | every order (circular) | first option chosen |",
        "|---|---|---|---|",
    ]
    lines += [
        f"| {way} | {_said(one['accuracy'])} | {_said(one['circular'])} | {_said(one['places'][0])} |"
        for way, one in summary["turned"].items()
    ]
    first = summary["turned"]["generation"]
    place, chance = first["places"][0], first["chance"][0]
    biased = above(place, chance) or below(place, chance)
    return [
        *lines, "", "![places](figures/places.png)", "",
        f"In all rotations together each option stands in each place equally often, so that of the choices made the first place would have {chance:.3f} if "
        f"the order did not matter; it has {_said(place)} by generation, {'which is not that' if biased else 'which is that within its interval'}. Guessing "
        f"anew in each order would be right in all of them {first['chance_circular']:.3f} of the time.", "",
    ]  # fmt: skip


def _triplet_words(found: dict[str, Any]) -> list[str]:
    """MMEvalPro's scores in a table, genuine accuracy of each source, and which triplets were left out."""
    columns = [(way, of) for way in WAYS for of in ("micro", "macro") if found[way][of]]
    titles = [f"by {way}, {'all triplets' if of == 'micro' else 'mean over sources'}" for way, of in columns]
    lines = ["## Right for the right reason", "", f"| | {' | '.join(titles)} |", "|---|" + "---|" * len(columns)]
    lines += [
        f"| {title} | {' | '.join(_said(found[way][of][name]) for way, of in columns)} |" for name, title in TRIPLETS.items()
    ]
    sources = found[WAYS[0]]["sources"]
    if len(sources) > 1:
        lines += ["", "| genuine accuracy | triplets | by generation | by likelihood |", "|---|---|---|---|"]
        lines += [
            f"| {name or 'no source'} | {sources[name]['GA']['n']} | {' | '.join(_said(found[way]['sources'][name]['GA']) for way in WAYS)} |" for name in sources
        ]  # fmt: skip
    chance = (
        ""
        if found["chance_genuine"] is None
        else f" Guessing would be right in all three of {found['chance_genuine']:.3f} of them."
    )
    lines += ["", f"Each is a share with its 95 % interval, over {found['n']} triplets of an original question and what it rests on (arXiv 2407.00468).{chance}", ""]  # fmt: skip
    if left := found["incomplete"]:
        lines += [f"{len(left)} triplets were left out, as not each of their three questions was asked once: {', '.join(left[:5])}{', ...' if len(left) > 5 else ''}.", ""]  # fmt: skip
    return lines


def _renamed_words(found: dict[str, Any]) -> list[str]:
    """How often the option chosen under letters is chosen under other names, for each kind of names."""
    lines = ["## Other names for the options", "", "| names | same option as under letters (MR) | accuracy | answers that give no name |",
             "|---|---|---|---|"]  # fmt: skip
    kinds = [*dict.fromkeys(kind for kind, _ in SETTINGS), "all"]
    lines += [
        f"| {kind}, by {way} | {_said(found[way][kind]['mr'])} | {_said(found[way][kind]['accuracy'])} | "
        f"{_said(found[way][kind]['unknown']) if way == 'generation' else ''} |"
        for way in WAYS for kind in kinds
    ]  # fmt: skip
    letters = " and ".join(f"{_said(found[way]['letters'])} by {way}" for way in WAYS)
    return [
        *lines, "", f"{found['n']} questions were asked with their options by letter, then with other names to be written for the letters (arXiv 2311.02692); "
        f"with letters accuracy is {letters}. Guessing anew would choose the same option in {found['chance']:.3f}.", "",
    ]  # fmt: skip
