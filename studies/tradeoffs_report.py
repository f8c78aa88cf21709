"""The words of the study of tradeoffs."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from probe.analysis.stats import benjamini_hochberg
from studies.points import broken, sentence, table
from studies.telling import bracketed


def report(summary: Mapping[str, Any]) -> str:
    points = summary["points"]
    full = next(point for point in points if point["baseline"] == "full")
    steps = [point for point in points if not point["baseline"]]
    lines = [
        "# Tradeoffs", "", "*What does each step of compression cost in accuracy, and what does it save?*", "", _answer(summary, full, steps), "",
        "![accuracy and cost](figures/frontier.png)", "",
        "Left: measured time of reading the prompt, over the dense model's in the same round. Right: multiply-adds in closed form. Bars are 95 % "
        "intervals (Wilson for accuracy, order statistics for times). Baselines have marks of their own. A hollow point is beaten by another one's "
        "values and cannot be told from it on these questions; a grey one is beaten beyond both 95 % intervals (paired on the same questions, each pair by "
        "itself).", "",
        "## Every configuration", "", table(points), "", _null(full), "",
    ]  # fmt: skip
    lines += _plan(summary)
    worst = surely_worse(steps)
    lines += ["## What surely cost accuracy", ""]
    lines += [f"- {sentence(point)[:-1]}; q = {q:.3g}." for point, q in worst] or [
        "No step by McNemar's test at a false discovery rate of 5 %, which is not to say that nothing was lost."
    ]
    kept = next((p for p in sorted(steps, key=lambda p: p["flops_ratio"]) if p["on_frontier"] and p.get("by_kind")), None)
    if kept:
        lines += ["", f"## Which questions the cheapest step on the frontier changed ({kept['name']})", "", broken(kept)]
    if summary["unused"]:
        lines += ["", f"## Examples that could not be used ({len(summary['unused'])})", ""]
        lines += [f"- {name}: {why}" for name, why in list(summary["unused"].items())[:20]]
    if summary["skipped"]:
        lines += ["", "## What was skipped", "", *(f"- {name}: {why}" for name, why in summary["skipped"].items())]
    uncounted = sorted({note for point in points for note in point["not_counted"]})
    if uncounted:
        lines += ["", f"Not in the FLOPs: {'; '.join(uncounted)}."]
    return "\n".join([*lines, ""])


def _plan(summary: Mapping[str, Any]) -> list[str]:
    """The plans from evidence, their reasons, and what they beat."""
    points = {point["name"]: point for point in summary["points"]}
    lines: list[str] = []
    for name, plan in summary["plans"].items():
        lines += [f"## {name[0].upper()}{name[1:]}", ""]
        if "refused" in plan or name not in points:
            lines += [plan.get("refused") or f"It could not be applied: {summary['skipped'].get(name, 'see above')}.", ""]
            continue
        point = points[name]
        times = point["standing"]["prefill"]
        timed = f", and of measured time {_WHERE[times]}" if times else ""
        lines += [
            f"{sentence(point)} It takes {point['flops_ratio']:.1%} of the FLOPs of reading a prompt. Of FLOPs it lies {_WHERE[point['standing']['flops']]}"
            f"{timed}. The evidence comes from {plan['whence']}.", "", *plan["words"], "", *_against(plan),
        ]  # fmt: skip
    return lines


def _against(plan: Mapping[str, Any]) -> list[str]:
    """The same budget of FLOPs met without evidence."""
    if not plan["against"]:
        return []
    lines = [
        "The same FLOPs met without evidence; differences are the plan's accuracy less theirs, paired on the same questions:", "",
        "| without evidence | draws | FLOPs | accuracy | the plan is better by | q |", "|---|---|---|---|---|---|",
    ]  # fmt: skip
    for name, found in plan["against"].items():
        lines.append(
            f"| {name.removeprefix('no evidence: ')} | {found['draws']} | {found['flops_ratio']:.0%} | {found['accuracy']:.1%} | {bracketed(found, '+.1%')} | "
            f"{found['q']:.2g} |"
        )
    sure = sum(found["value"] > 0 and found["q"] < 0.05 for found in plan["against"].values())
    return [
        *lines, "", f"The plan is surely better than {sure} of {len(plan['against'])} of them (sign-flip tests over questions, false discovery rate of 5 % over "
        f"these). What is drawn is averaged over its draws first, which are few: the interval is one over questions.", "",
    ]  # fmt: skip


_WHERE = {
    "frontier": "on the frontier",
    "inseparable": "where it cannot be told from the frontier",
    "dominated": "below the frontier",
}


def surely_worse(steps: Sequence[Mapping[str, Any]]) -> list[tuple[Mapping[str, Any], float]]:
    """Steps that are right less often than the dense model at a false discovery rate of 5 % over all of them, with their q-values, worst first."""
    paired = [point for point in steps if point.get("difference")]
    if not paired:
        return []
    q = benjamini_hochberg(np.array([point["p"] for point in paired], dtype=np.float64))
    found = [(p, float(v)) for p, v in zip(paired, q, strict=True) if v < 0.05 and p["difference"]["value"] < 0]
    return sorted(found, key=lambda one: one[0]["difference"]["value"])


def _answer(summary: Mapping[str, Any], full: Mapping[str, Any], steps: Sequence[Mapping[str, Any]]) -> str:
    """The answer in a few sentences."""
    kept = [p for p in steps if p.get("difference") and p["difference"]["low"] > -0.05]
    cheapest = min(kept, key=lambda p: p["flops_ratio"], default=None)
    faster, slower = (sum(p["verdict"] == verdict for p in steps) for verdict in ("faster", "slower"))
    text = f"The dense model answers {full['accuracy']:.1%} of {summary['n']} questions [{full['accuracy_low']:.1%}, {full['accuracy_high']:.1%}]. "
    if cheapest:
        change = cheapest["difference"]
        text += (
            f"The step that saves most while losing less than 5 points by its interval is *{cheapest['name']}*: {cheapest['flops_ratio']:.0%} of the FLOPs, "
            f"{bracketed(change, '+.1%')}. It was picked among {len(steps)} on the questions that it is judged by: "
            f"confirm it on others. "
        )
    else:
        text += "No step loses less than 5 points by its interval. "
    if full["ratios"]:
        share = full["amdahl"]["prefill_share"]
        text += (
            f"Of {len(steps)} steps {faster} make an answer measurably faster and {slower} slower; the decoder's reading of the prompt is {share:.0%} of an "
            f"answer: without any of it the answer would come {full['amdahl']['bound']:.2f} times as fast, and no faster."
        )
    return text


def _null(full: Mapping[str, Any]) -> str:
    if not full["ratios"]:
        return "Times were not measured."
    ratio = full["ratios"]["answer"]
    return f"The null beside the times: the dense model in turns with itself takes {ratio['value']:.3f} of its own time ({ratio['verdict']})."
