"""What `token-reduction` found: curves with intervals, a ranking with corrected tests, kinds of questions, and what is kept."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from probe.analysis.stats import benjamini_hochberg, mcnemar, sign_flip
from probe.plots import panels
from probe.plots.budgets import Line, budgets
from studies.run import Run
from studies.study import Summary
from studies.telling import below, bracketed
from studies.work import Rows, interval
from studies.work import share as proportion

DENSE, SMALLER = "dense", "smaller picture"
BASELINES = ("random", "uniform", "pooling", "downsampling", SMALLER)
GROUPS = {
    "baselines": BASELINES, "by the vision tower": ("fopru", "fastervlm", "visionzip", "prumerge", "vispruner"),
    "by what differs, or merged": ("divprune", "cdpruner", "aim-merge", "dpc-knn"), "of clips": ("evs", "progressive-pooling", "thumbnail-and-sampling"),
    "inside the decoder": ("fastv", "pdrop", "sparsevlm", "aim", "dart"),
}  # fmt: skip


def summarise(rows: pa.Table, seed: int) -> Summary:
    """`n examples dense methods refused ranking kinds overlap own`, every mean with its interval."""
    table = rows.to_pylist()
    found = _arrange(table)
    dense = found[DENSE][1.0][0]
    n_visual = float(np.mean([row["total"] for row in dense]))
    refused = {row["name"]: row["text"] for row in table if row["what"] == "refused"}
    reduced = {method: by_share for method, by_share in found.items() if method != DENSE}
    return {
        "n": len(dense), "n_visual": n_visual, "dense": {"accuracy": proportion(_right([dense]), seed), "flops": dense[0]["flops"]},
        "methods": {method: _curve(by_share, dense, seed) for method, by_share in reduced.items()}, "refused": refused,
        "ranking": ranking(reduced, dense, seed), "kinds": _kinds(reduced, dense, seed), "overlap": _overlap(reduced),
        "own": _own(reduced, dense, seed),
    }  # fmt: skip


def _arrange(table: Rows) -> dict[str, dict[float, list[Rows]]]:
    """method: share: one list of items for each draw."""
    draws: dict[tuple[str, float], dict[str, Rows]] = {}
    for row in table:
        if row["what"] == "item":
            draws.setdefault((row["method"], row["share"]), {}).setdefault(row["name"], []).append(row)
    found: dict[str, dict[float, list[Rows]]] = {}
    for (method, share), by_name in draws.items():
        found.setdefault(method, {})[share] = list(by_name.values())
    return found


def _right(draws: Sequence[Rows]) -> np.ndarray:
    """Whether each item is right; the share of draws in which it is."""
    found: np.ndarray = np.array([[row["right"] for row in items] for items in draws], dtype=np.float64).mean(0)
    return found


def _curve(by_share: Mapping[float, Sequence[Rows]], dense: Rows, seed: int) -> dict[str, Any]:
    """Accuracy, the difference to the dense model, tokens kept and FLOPs at every share."""
    before = _right([dense])
    return {
        f"{share:g}": {
            "accuracy": proportion(_right(draws), seed), "difference": _difference(_right(draws), before, seed),
            "kept": float(np.mean([_count(row) for items in draws for row in items])), "flops_ratio": draws[0][0]["flops"] / dense[0]["flops"],
            "draws": len(draws),
        }
        for share, draws in sorted(by_share.items(), reverse=True)
    }  # fmt: skip


def _count(row: Mapping[str, Any]) -> int:
    return int(row["total"]) if row["kept"] is None else len(row["kept"])


def _difference(these: np.ndarray, those: np.ndarray, seed: int) -> dict[str, Any]:
    return interval(these - those, seed)


# --- which is best ---------------------------------------------------------------------------------------------------


def ranking(reduced: Mapping[str, Mapping[float, Sequence[Rows]]], dense: Rows, seed: int) -> dict[str, list[dict[str, Any]]]:
    """At every share the methods from best to worst: each against random tokens, and against the best of all.

    Against the mean of the random draws by a two-sided permutation of pairs, against the best by McNemar's test (one draw of random tokens, its first); `q` are
    false discovery rates over all methods and shares of one comparison. The best was found on the same questions: `beaten` errs towards yes.
    """
    lines: dict[str, list[dict[str, Any]]] = {}
    for share in sorted({share for by_share in reduced.values() for share in by_share}, reverse=True):
        right = {method: by_share[share] for method, by_share in reduced.items() if share in by_share}
        means = {method: _right(draws) for method, draws in right.items()}
        order = sorted(means, key=lambda method: -means[method].mean())
        first = {method: _right(draws[:1]).astype(bool) for method, draws in right.items()}
        lines[f"{share:g}"] = [
            {
                "method": method, "accuracy": proportion(means[method], seed),
                "over_random": _difference(means[method], means["random"], seed) if "random" in means else None,
                "p_random": _two_sided(means[method] - means["random"], seed) if "random" in means and method != "random" else float("nan"),
                "p_best": mcnemar(first[order[0]], first[method]) if method != order[0] else float("nan"),
            }
            for method in order
        ]  # fmt: skip
    every = [line for found in lines.values() for line in found]
    for p, q in (("p_random", "q_random"), ("p_best", "q_best")):
        for line, value in zip(every, benjamini_hochberg(np.array([one[p] for one in every])), strict=True):
            line[q] = float(value)
    return lines


def _two_sided(differences: np.ndarray, seed: int) -> float:
    above, below = (float(sign_flip(sign * differences, seed)) for sign in (1, -1))
    return min(1.0, 2 * min(above, below))


def _kinds(reduced: Mapping[str, Mapping[float, Sequence[Rows]]], dense: Rows, seed: int) -> dict[str, Any]:
    """Differences to the dense model by kind of question, at every share: share: method: kind: `value low high n`."""
    kinds = np.array([row["kind"] for row in dense])
    names = sorted(set(kinds) - {""})
    before = _right([dense])
    found: dict[str, Any] = {}
    for method, by_share in reduced.items():
        for share, draws in by_share.items():
            these = _right(draws)
            found.setdefault(f"{share:g}", {})[method] = {
                kind: _difference(these[kinds == kind], before[kinds == kind], seed) for kind in names
            }  # fmt: skip
    return found


# --- what is kept ----------------------------------------------------------------------------------------------------


def _overlap(reduced: Mapping[str, Mapping[float, Sequence[Rows]]]) -> dict[str, Any]:
    """Intersection over union of what two methods keep of the same picture, averaged: share: `methods iou` (row column).

    Of a method with itself it is 1; two draws of random tokens stand under `chance`.
    """
    found = {}
    for share in sorted({share for by_share in reduced.values() for share in by_share}, reverse=True):
        sets = {
            m: by_share[share]
            for m, by_share in reduced.items()
            if share in by_share and by_share[share][0][0]["kept"] is not None
        }
        first = {method: [set(row["kept"]) for row in draws[0]] for method, draws in sets.items()}
        iou = [[float(np.mean([_iou(a, b) for a, b in zip(first[m], first[o], strict=True)])) for o in first] for m in first]
        chance = None
        if len(draws := sets.get("random", [])) > 1:
            chance = float(np.mean([_iou(set(a["kept"]), set(b["kept"])) for a, b in zip(draws[0], draws[1], strict=True)]))
        found[f"{share:g}"] = {"methods": list(first), "iou": iou, "chance": chance}
    return found


def _iou(a: set[int], b: set[int]) -> float:
    return len(a & b) / len(a | b) if a | b else 1.0


def _own(reduced: Mapping[str, Mapping[float, Sequence[Rows]]], dense: Rows, seed: int) -> dict[str, Any]:
    """Of the tokens that show what a question is about, the share that is kept: share: method: `value low high n`, and `chance`.

    Chance is the share of all tokens that is kept. Examples without boxes are left out.
    """
    own = [set(row["own"] or ()) for row in dense]
    shown = [i for i, one in enumerate(own) if one]
    found: dict[str, Any] = {}
    for method, by_share in reduced.items():
        for share, draws in by_share.items():
            if not shown or draws[0][0]["kept"] is None:
                continue
            kept = np.array([[len(own[i] & set(items[i]["kept"])) / len(own[i]) for i in shown] for items in draws]).mean(0)
            chance = float(np.mean([len(items[i]["kept"]) / items[i]["total"] for items in draws for i in shown]))
            found.setdefault(f"{share:g}", {})[method] = {**interval(kept, seed), "chance": chance}
    return found


# --- figures ---------------------------------------------------------------------------------------------------------


def figures(run: Run, summary: Summary) -> None:
    """Curves by group of methods; kinds of questions; overlap; the patches of what is asked about."""
    run.figure("accuracy", *_accuracy(summary))
    middle = _middle(summary)
    kinds = summary["kinds"].get(middle, {})
    if kinds and (names := list(next(iter(kinds.values())))):
        values = [[kinds[m][k]["value"] for k in names] for m in kinds]
        title = f"{float(middle):.1%} of the tokens kept"
        run.figure("kinds", *panels.tables(
            [title], [values], list(kinds), names, (-1.0, 1.0), "RdBu", "accuracy less the dense model's", down="method", across="kind of question",
        ))  # fmt: skip
    shared = summary["overlap"].get(middle)
    if shared and len(shared["methods"]) > 1:
        names = shared["methods"]
        run.figure("overlap", *panels.tables(
            [f"What two methods keep, {float(middle):.1%} of the tokens"], [shared["iou"]], names, names, (0.0, 1.0), "Blues",
            "intersection over union", write=True,
        ))  # fmt: skip
    if summary["own"]:
        run.figure("own", *_own_figure(summary))


def _middle(summary: Summary) -> str:
    """The share that tables are shown at: the second largest, or the only one."""
    shares = list(summary["ranking"])
    return shares[min(1, len(shares) - 1)]


def _accuracy(summary: Summary) -> panels.Pair:
    """Accuracy against tokens kept: a panel for each group of methods, the baseline of random tokens in all of them."""
    methods = summary["methods"]
    parts: list[tuple[str, list[Line]]] = []
    for title, names in GROUPS.items():
        present = [name for name in names if name in methods]
        if not present:
            continue
        drawn = dict.fromkeys(["random", *present])
        parts.append((title, [
            (name, _line(summary, name), panels.GREY if name == "random" else panels.colour(k - 1), name == "random")
            for k, name in enumerate(drawn) if name in methods
        ]))  # fmt: skip
    return budgets(parts, "visual tokens kept", "accuracy, 95 % interval")


def _line(summary: Summary, name: str) -> dict[str, list[float]]:
    """A method's accuracies against the tokens that it kept, the dense model's last."""
    points = [(point["kept"], point["accuracy"]) for point in summary["methods"][name].values()]
    ordered = sorted([*points, (summary["n_visual"], summary["dense"]["accuracy"])], key=lambda point: point[0])
    sides = {side: [found[key] for _, found in ordered] for side, key in (("mean", "value"), ("low", "low"), ("high", "high"))}
    return {"x": [kept for kept, _ in ordered], **sides}


def _own_figure(summary: Summary) -> panels.Pair:
    """The share of the asked things' tokens that stays over the share of all tokens that stays."""
    shares = [share for share in summary["ranking"] if share in summary["own"]]
    series: list[panels.Series] = []
    for k, share in enumerate(shares[:3]):
        found = summary["own"][share]
        scaled: dict[str, dict[str, Any]] = {
            m: {end: None if one[end] is None else one[end] / one["chance"] for end in ("value", "low", "high")}
            for m, one in found.items()
        }
        series.append((f"{float(share):.1%} kept", scaled, panels.colour(k)))
    return panels.values([("Tokens of what is asked about", series)], "share kept / share of all tokens kept", line=1.0)


# --- words -----------------------------------------------------------------------------------------------------------


def report(summary: Summary) -> str:
    """Figures in order with a sentence each, and every number in tables."""
    lines = [
        "# Token reduction", "", "*Which visual tokens can go, and which way of choosing them is best?*", "", answer(summary), "",
        "![accuracy](figures/accuracy.png)", "",
        f"Accuracy on {summary['n']} questions against the visual tokens that stay ({summary['n_visual']:.0f} in the dense model), with 95 % "
        f"intervals over questions (Wilson's; bootstrap for random tokens); random tokens are the mean of several draws. `{SMALLER}` shrinks the picture before the tower sees it.", "",
    ]  # fmt: skip
    for share, found in summary["ranking"].items():
        lines += [f"## {float(share):.1%} of the tokens kept", "", *_rank_table(found, summary["methods"], share), ""]
    if summary["kinds"].get(_middle(summary)):
        lines += ["## Which questions break", "", "![kinds](figures/kinds.png)", "", _broken(summary), ""]
    lines += ["## What is kept", ""]
    shared = summary["overlap"].get(_middle(summary))
    if shared and len(shared["methods"]) > 1:
        chance = "" if shared["chance"] is None else f" Two draws of random tokens share {shared['chance']:.2f}."
        lines += ["![overlap](figures/overlap.png)", "", f"Intersection over union of the kept tokens, picture by picture.{chance} A merged token stands "
                  "for others, too: what a merging method keeps is where its tokens stand.", ""]  # fmt: skip
    if summary["own"]:
        lines += ["![own](figures/own.png)", "", "Of the tokens inside the boxes of what the question is about, the share that stays, over the share of all "
                  "tokens that stays: 1 is chance.", ""]  # fmt: skip
    for title, found in (("refused", summary["refused"]), ("not usable", summary["unused"])):
        reasons = {why: [name for name, told in found.items() if told == why] for why in found.values()}
        if found:
            lines += [
                f"## What was {title}",
                "",
                *(f"- {', '.join(names)}: {why}" for why, names in list(reasons.items())[:40]),
                "",
            ]
    return "\n".join(lines)


def answer(summary: Summary) -> str:
    """The answer in a few sentences."""
    dense = summary["dense"]["accuracy"]
    text = f"The dense model answers {bracketed(dense, '.1%')}. "
    for share, found in summary["ranking"].items():
        best, beating = (
            found[0],
            [one["method"] for one in found if (one["q_random"] or 1) < 0.05 and one["over_random"]["value"] > 0],
        )
        alike = [one["method"] for one in found[1:] if (1 if one["q_best"] is None else one["q_best"]) >= 0.05]
        text += (
            f"Of {float(share):.1%} of the tokens *{best['method']}* makes the most ({best['accuracy']['value']:.1%}); {len(alike)} of {len(found) - 1} others "
            f"cannot be told from it, and {len(beating)} are surely better than random tokens"
            + (f" ({', '.join(beating)}). " if beating else ". ")
        )  # fmt: skip
    return text + "Surely: at a false discovery rate of 5 % over all methods and shares."


def _rank_table(found: Sequence[Mapping[str, Any]], methods: Mapping[str, Any], share: str) -> list[str]:
    head = "| | method | accuracy | over random | q | against the best, q | tokens | FLOPs |"
    rows = [head, "|---" * 8 + "|"]
    for place, one in enumerate(found, 1):
        point, accuracy, over = methods[one["method"]][share], one["accuracy"], one["over_random"]
        name = f"**{one['method']}**" if one["method"] in BASELINES else one["method"]
        against = "" if over is None or one["method"] == "random" else bracketed(over, "+.1%")
        rows.append(
            f"| {place} | {name} | {bracketed(accuracy, '.1%')} | {against} | {_q(one['q_random'])} "
            f"| {_q(one['q_best'])} | {point['kept']:.0f} | {point['flops_ratio']:.0%} |"
        )  # fmt: skip
    return [*rows, "", "Baselines are in bold. q: false discovery rates over all methods and shares."]


def _q(value: float | None) -> str:
    return "" if value is None or np.isnan(value) else f"{value:.3g}"


def _broken(summary: Summary) -> str:
    """For every kind the methods that surely lose most of it."""
    kinds = summary["kinds"][_middle(summary)]
    lines = []
    for kind in next(iter(kinds.values())):
        lost = sorted(((m, one[kind]) for m, one in kinds.items() if below(one[kind])), key=lambda pair: pair[1]["value"])
        n = next(iter(kinds.values()))[kind]["n"]
        told = ", ".join(f"{m} {one['value']:+.0%}" for m, one in lost[:5]) or "none"
        lines.append(f"- {kind} (n = {n}): {len(lost)} of {len(kinds)} methods lose by their own interval; most: {told}")
    return "\n".join(lines)
