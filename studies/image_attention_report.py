"""The image-attention study's numbers, figures and words, made from its records."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from probe.analysis.detection import detect, difference, resampled_auroc
from probe.analysis.stats import benjamini_hochberg, wilson
from probe.analysis.svar import svar, windows
from probe.plots import svar as plots
from studies.run import Run
from studies.study import Setting, Summary
from studies.telling import ranged
from studies.work import curve, interval, picked, refuse_nothing, skipped

COMPARISONS = {
    # name: (what is to be detected, beside what)
    "invented": ("things affirmed that are not there", "things affirmed that are"),
    "wrong": ("wrong answers", "right answers"),
}
FEW, LEVEL = 5, 0.05  # answers of each sort below which nothing is compared; the false discovery rate of a map


def summarise(rows: pa.Table, layers: Sequence[int], n_layers: int, heads: int, config: dict[str, Any]) -> Summary:
    """Everything that the report says, as numbers. Raises DataError when no example could be used."""
    own, left = picked(rows, what="ratio"), skipped(rows)
    refuse_nothing(rows, len(own))
    seed = int(config["seed"])
    ratio = np.array(own["values"].to_pylist(), dtype=float).reshape(len(own), len(layers), heads)
    middle = config["middle"]
    parts = windows(n_layers, (middle[0], middle[1]))
    scores = {name: svar(ratio, part, list(layers)) for name, part in parts.items() if set(part) & set(layers)}
    table = {key: np.array(own[key].to_pylist()) for key in ("answer", "text", "kind", "correct", "prob")}
    correct = table["correct"].astype(bool)
    low, high = wilson(int(correct.sum()), len(own))
    return {
        "n": len(own), "n_skipped": len(left), "skipped": left, "questions": config["questions"], "n_layers": n_layers, "layers": list(layers),
        "n_right": int(correct.sum()), "accuracy": float(correct.mean()), "accuracy_low": low, "accuracy_high": high,
        "existence": bool(np.isin(table["answer"], ("yes", "no")).all()),
        "windows": {name: [parts[name].start, parts[name].stop - 1] for name in scores},
        "ratio": curve(ratio.mean(2), layers, seed), "svar": {name: interval(values, seed) for name, values in scores.items()},
        "heads": ratio.mean(0).tolist(),
        "comparisons": {
            name: _compare(ratio, scores, table["prob"], chosen, flags, strata, layers, seed)
            for name, (chosen, flags, strata) in _sides(table).items()
        },
    }  # fmt: skip


def _sides(table: dict[str, np.ndarray]) -> dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Of each comparison: the examples in it, which of them are to be detected, and the stratum of each.

    Things are affirmed where every question is answered yes or no.
    Wrong and right answers are compared among questions of one kind, and where the answer is yes or no among those that were
    answered alike: what yes and no, or hard and easy kinds, differ in is no sign of an error.
    """
    told = np.where(np.isin(table["answer"], ("yes", "no")), table["text"], "")
    strata = np.unique(np.char.add(np.char.add(table["kind"].astype(str), "|"), told.astype(str)), return_inverse=True)[1]
    wrong = ~table["correct"].astype(bool)
    yes = table["text"] == "yes"
    made = {"wrong": (np.ones(len(wrong), dtype=bool), wrong, strata)}
    return {"invented": (yes, wrong, strata), **made} if np.isin(table["answer"], ("yes", "no")).all() else made


def _compare(
    ratio: np.ndarray, scores: dict[str, np.ndarray], prob: np.ndarray, chosen: np.ndarray, flags: np.ndarray,
    strata: np.ndarray, layers: Sequence[int], seed: int,
) -> dict[str, Any]:  # fmt: skip
    """One comparison; `detected` is None where there are too few answers of a sort."""
    flags, strata = flags[chosen], strata[chosen]
    total = {"all_detected": int(flags.sum()), "all_beside": int((~flags).sum())}
    both = [group for group in np.unique(strata) if 0 < flags[strata == group].sum() < (strata == group).sum()]
    usable = np.isin(strata, both)  # a stratum that is all right or all wrong has nothing to compare
    flags, strata, ratio, prob = flags[usable], strata[usable], ratio[chosen][usable], prob[chosen][usable]
    counts = {**total, "n_detected": int(flags.sum()), "n_beside": int((~flags).sum()), "n_strata": len(both)}
    if min(counts["n_detected"], counts["n_beside"]) < FEW:
        return {**counts, "detected": None}
    low = {name: -values[chosen][usable] for name, values in scores.items()}  # little attention is the sign
    found = {name: detect(values, flags, strata, seed)._asdict() for name, values in {**low, "answer": -prob}.items()}
    base = resampled_auroc(-prob, flags, strata, seed)
    for name, values in low.items():
        gap = resampled_auroc(values, flags, strata, seed) - base
        ends = [float(end) for end in np.nanpercentile(gap, [2.5, 97.5])]
        found[name]["over_answer"] = {"value": found[name]["auroc"] - found["answer"]["auroc"], "low": ends[0], "high": ends[1]}
    gap, _, _, p = difference(ratio, flags, strata, seed)
    q = benjamini_hochberg(p)
    parts = difference(np.stack([-values for values in low.values()], 1), flags, strata, seed)
    return {
        **counts, "detected": found, "difference": gap.tolist(), "q": q.tolist(), "n_clear": int((q < LEVEL).sum()), "n_tests": int(p.size),
        "by_layer": _gap_curve(ratio.mean(2), flags, strata, layers, seed),
        "svar_difference": {
            name: dict(zip(("value", "low", "high", "p_value"), map(float, side), strict=True))
            for name, side in zip(low, zip(*parts, strict=True), strict=True)
        },
    }  # fmt: skip


def _gap_curve(values: np.ndarray, flags: np.ndarray, strata: np.ndarray, layers: Sequence[int], seed: int) -> dict[str, Any]:
    mean, low, high, _ = difference(values, flags, strata, seed)
    return {"layers": list(layers), "mean": mean.tolist(), "low": low.tolist(), "high": high.tolist(), "n": int(flags.sum())}


def compared(summary: Summary) -> list[str]:
    """The comparisons that could be made, the question's own first."""
    return [name for name, found in summary["comparisons"].items() if found["detected"] is not None]


def figures(run: Run, summary: Summary) -> None:
    """Where the model looks, and, where answers could be compared, how well that tells them apart."""
    names = compared(summary)
    run.figure("image-attention", *plots.ratios(summary, names[0] if names else None))
    if names:
        run.figure("detection", *plots.detection(summary, names))
    run.figure("heads", *plots.heads(summary, names))


# --- words -----------------------------------------------------------------------------------------------------------


def report(summary: Summary, setting: Setting) -> str:
    """The report: the answer first, then the figures."""
    low, high = summary["accuracy_low"], summary["accuracy_high"]
    names = compared(summary)
    lines = [
        "# Image attention", "",
        f"*Does a model that looks away from the picture say what is not there?* Model `{setting.subject.name}`, data `{setting.data.name}` "
        f"({'questions of existence' if summary['existence'] else 'questions of all kinds'}), {summary['n']} examples, {summary['accuracy']:.1%} answered rightly "
        f"(95 % Wilson interval {low:.1%} to {high:.1%}).", "",
        "## The answer", "",
        *(f"- {_verdict(name, found)}" for name, found in summary["comparisons"].items()),
        *([f"- {summary['n_skipped']} examples could not be used; the first: {summary['skipped'][0]}"] if summary["n_skipped"] else []), "",
        "![image attention](figures/image-attention.png)", "",
        f"Left, the share of its attention that the position which writes the answer gives to what is shown, heads averaged, with a 95 % bootstrap interval"
        f"{_gap_words(names)}. Shaded: the middle layers. Windows: "
        + ", ".join(f"{name} {first} to {last}" for name, (first, last) in summary["windows"].items()) + ".", "",
        *_tables(summary, names),
        "## Heads", "", "![heads](figures/heads.png)", "", *_heads(summary, names),
        "The paper's mitigation raises the scores of image columns before the softmax; edits here cut edges and do not raise them, so it is not "
        "carried out.", "",
    ]  # fmt: skip
    return "\n".join(lines)


def _gap_words(names: Sequence[str]) -> str:
    if not names:
        return ""
    return f"; right, {COMPARISONS[names[0]][0]} less {COMPARISONS[names[0]][1]}, to questions of one kind"


def _verdict(name: str, found: dict[str, Any]) -> str:
    what, beside = COMPARISONS[name]
    if found["detected"] is None:
        return (
            f"**Not tested**: of {what} ({found['all_detected']}) and {beside} ({found['all_beside']}), {found['n_detected']} and {found['n_beside']} answer the same kind of "
            f"question and are too few; it takes {FEW} of each. More examples, or a weaker model, would tell."
        )
    window = "middle" if "middle" in found["detected"] else "all"
    one = found["detected"][window]
    if one["low"] > 0.5 and one["p"] < LEVEL:
        says = "little attention to the picture goes with them"
    elif one["high"] < 0.5 and one["p"] < LEVEL:
        says = "much attention to the picture goes with them, against the paper"
    else:
        says = "attention to the picture does not tell them apart, as far as can be told"
    gap = one["over_answer"]
    return (
        f"{what.capitalize()} (n = {found['n_detected']}) beside {beside} (n = {found['n_beside']}): **{says}**. SVAR of the {window} layers has an AUROC of "
        f"{_auroc(one)} (permuted labels {one['null_low']:.2f} to {one['null_high']:.2f}, p = {one['p']:.4f}); how unsure the answer is has {_auroc(found['detected']['answer'])}, "
        f"a difference of {ranged(gap, '+.2f')}."
    )


def _tables(summary: Summary, names: Sequence[str]) -> list[str]:
    if not names:
        return []
    lines = ["## How well it tells", "", "![detection](figures/detection.png)", ""]
    for name in names:
        found = summary["comparisons"][name]
        lines += [
            f"{COMPARISONS[name][0].capitalize()} ({found['n_detected']}) beside {COMPARISONS[name][1]} ({found['n_beside']}); kinds of question and answer: {found['n_strata']}.", "",
            "| sign | AUROC | permuted labels | p | average precision | of any sign | AUROC less the answer's |", "|---|---|---|---|---|---|---|",
            *(_line(sign, one) for sign, one in found["detected"].items()), "",
        ]  # fmt: skip
    return [
        *lines,
        "The sign is little SVAR in a window (attention to what is shown, summed over its layers, heads averaged), or a small probability of the answer's first "
        "token. AUROC compares answers to the same kind of question, and where that is yes or no, the same answer. Average precision takes all answers "
        "together.", "",
    ]  # fmt: skip


def _line(sign: str, one: dict[str, Any]) -> str:
    gap = one.get("over_answer")
    over = "-" if gap is None else f"{ranged(gap, '+.2f')}"
    name = "the answer's own probability" if sign == "answer" else f"SVAR, {sign} layers"
    return (
        f"| {name} | {_auroc(one)} | {one['null_low']:.2f} to {one['null_high']:.2f} | {one['p']:.4f} | {one['ap']:.2f} ({one['ap_low']:.2f} to {one['ap_high']:.2f}) | "
        f"{one['base']:.2f} | {over} |"
    )


def _heads(summary: Summary, names: Sequence[str]) -> list[str]:
    if not names:
        return ["Attention to what is shown by layer and head, all examples together.", ""]
    found = summary["comparisons"][names[0]]
    return [
        f"Left, attention to what is shown by layer and head; right, {COMPARISONS[names[0]][0]} less {COMPARISONS[names[0]][1]}. {found['n_clear']} of {found['n_tests']} heads "
        f"differ at a false discovery rate of {LEVEL:g} (permuted labels, Benjamini and Hochberg).", "",
    ]  # fmt: skip


def _auroc(one: dict[str, Any]) -> str:
    return ranged({"value": one["auroc"], "low": one["low"], "high": one["high"]}, ".2f")
