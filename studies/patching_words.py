"""The report of the patching study."""

from typing import Any

import numpy as np

from studies.study import Setting, Summary
from studies.telling import above, ranged

FIGURES = (
    ("sites", "Mean effect of each group of positions at each layer. A state put into the residual stream stands for all that came "
              "before it; what attention or feed-forward add is one layer's own share."),
    ("object-and-control", "The object beside its two controls (a random direction of equal size at its own positions, and as many random positions), all "
                           "others, and the last position, with 95 % bootstrap intervals over pairs."),
    ("windows", "The same with the blocks of {window} layers patched together: one layer is often too little to carry a fact."),
    ("windows-and-control", "Windows of layers, with the control and intervals."),
    ("heads", "Each head's output at the last position, put back alone: means on the left, and the strongest with 95 % bootstrap intervals over pairs."),
    ("exact-and-estimate", "First-order estimates of all sites from one pass forward and back, against the exact effects; the dotted line is "
                           "where both are the same. One mark is one group at one layer, mean over pairs, with the exact effect's interval."),
    ("agreement", "Their correlation over pairs and groups (over pairs and heads for the heads), layer by layer, with intervals over pairs."),
)  # fmt: skip


def report(summary: Summary, setting: Setting) -> str:
    """The report: the answer in a sentence, then the control, sorts of fact, heads, the estimate, and the figures."""
    lines = [
        "# Patching", "", "*Which positions, at which layers, carry the fact that was changed?* "
        f"{summary['n']} pairs of `{setting.data.name}`, put to `{setting.subject.name}`.", "",
        _answer(summary), "", _moves(summary), "", *_checks(summary), *_dropped(summary), *_kinds(summary), *_heads(summary), *_estimate(summary),
    ]  # fmt: skip
    for name, text in FIGURES:
        lines += [f"![{name}](figures/{name}.png)", "", text.format(window=summary["window"]), ""]
    return "\n".join(lines).rstrip() + "\n"


def _span(one: dict[str, Any], digits: int = 2) -> str:
    if one["value"] is None:
        return "not measured"
    return ranged(one, f".{digits}f")


def _answer(summary: Summary) -> str:
    own = summary["object_early"]
    if own["value"] is None:
        return "No pair says where its changed object is, so that nothing is claimed about it; the other groups are below."
    early = f"the first {summary['early_layers']} layers" if summary["early_layers"] > 1 else "the first layer"
    told = (
        f"The clean run's states at the changed object's positions, put into the corrupt run in {early}, bring back {_span(own)} of the difference "
        f"between the two answers. The same positions changed by as much in a random direction bring back {_span(summary['nudged_early'])}, and as many "
        f"random positions of the same kind {_span(summary['random_early'])} (n = {own['n']}, 95 % bootstrap intervals over pairs). The two pictures of a "
        "pair can be alike everywhere else, so that random positions have next to nothing to bring back early on: that control says where the two runs "
        "differ, the change of equal size says whether it matters what is put there."
    )
    gaps = {"the change of equal size": summary["object_above_nudged"], "random positions": summary["object_above_random"]}
    known = {name: gap for name, gap in gaps.items() if gap["value"] is not None}
    if not known:
        return told
    beside = "; ".join(
        f"above {name} by {_span(gap)}" + ("" if gap["p_value"] is None else f" (one-sided sign-flip p = {gap['p_value']:.4f})")
        for name, gap in known.items()
    )
    if all(above(gap) for gap in known.values()):
        return f"**The fact is at the object.** {told} It is {beside}."
    return f"**The object's positions are not told apart from every control.** {told} The object is {beside}."


def _moves(summary: Summary) -> str:
    moved, n_layers = summary["handover"], len(summary["sites"]["resid_pre"]["last"]["layers"])
    text = f"What enters the last layer at the last position brings back {_span(summary['last_final'])}, early {_span(summary['last_early'])}."
    if moved is None:
        return text
    if moved["layer"] >= n_layers:
        return f"**At no layer does the last position carry more than the object to the end.** {text}"
    return (
        f"**From layer {moved['layer']} on (95 % interval {moved['low']} to {moved['high']}) the last position carries more than the object**: "
        f"by then the fact has moved. {text}"
    )


def _checks(summary: Summary) -> list[str]:
    deep = (
        " This family adds the corrupt picture's features between layers as well, so that the input alone need not bring everything back."
        if summary["deepstack"] else ""
    )  # fmt: skip
    clean, corrupt = summary["difference_clean"], summary["difference_corrupt"]
    return [
        f"The difference of logits between the clean and the corrupt answer is {_span(clean)} in the clean run and {_span(corrupt)} in the corrupt run. "
        f"All positions patched as they enter layer 0 give an effect of 1 within {summary['all_max_error']:.1e}.{deep}", "",
    ]  # fmt: skip


def _dropped(summary: Summary) -> list[str]:
    if not summary["dropped"]:
        return []
    counts = ", ".join(f"{count} {reason}" for reason, count in sorted(summary["dropped"].items()))
    return [f"Pairs that could not be used: {counts}. The first: {summary['skipped'][0]}", ""]


def _kinds(summary: Summary) -> list[str]:
    if not summary["kinds"]:
        return []
    rows = [
        f"| {kind} | {one['n']} | {_span(one['object'])} | {_span(one['nudged'])} | {_span(one['random'])} | {_span(one['last'])} |"
        for kind, one in summary["kinds"].items()
    ]
    return [
        "| question | pairs | object, early | equal change, early | random positions, early | last position, last layer |",
        "|---|---|---|---|---|---|",
        *rows,
        "",
    ]


def _heads(summary: Summary) -> list[str]:
    found = summary["heads"]
    mean, q = (np.array(found[name], dtype=float) for name in ("mean", "q"))
    order = np.dstack(np.unravel_index(np.argsort(-mean, axis=None), mean.shape))[0]
    count = int((q < 0.05).sum())
    rows = [
        f"| {layer} | {head} | {mean[layer, head]:.3f} | {found['low'][layer][head]:.3f} to {found['high'][layer][head]:.3f} | "
        f"{'-' if np.isnan(q[layer, head]) else format(q[layer, head], '.4f')} |"
        for layer, head in order[:5]
    ]
    return [
        f"Heads that bring back more than nothing at the last position (one-sided sign-flip test, false discovery rate 5 %): {count} of {q.size}. "
        "The strongest:", "", "| layer | head | effect | 95 % interval | q |", "|---|---|---|---|---|", *rows, "",
    ]  # fmt: skip


def _estimate(summary: Summary) -> list[str]:
    lines = ["| estimate | point | correlation over all layers | mean distance |", "|---|---|---|---|"]
    lines += [
        f"| {variant} | {point} | {_span(one['overall'])} | {one['distance']:.3f} |"
        for variant, points in summary["agreement"].items() for point, one in points.items()
    ]  # fmt: skip
    return ["First-order estimates beside the exact effects:", "", *lines, ""]
