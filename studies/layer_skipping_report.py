"""The figures and words of the study of layers passed by, made from its summary."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from probe.plots.panels import GREY, Line, curves
from probe.plots.style import COLOURS
from studies.run import Run
from studies.study import Setting, Summary

__all__ = ["figures", "report"]
ROWS = {"perceptual": "visual tokens", "text": "words", "all": "all rows"}
MODES = {"block": "whole layer passed by", "ffn": "without feed-forward block", "attention": "without attention"}
NAMES = {
    "contribution": "contribution (ShortV)", "block_influence_visual": "block influence, visual", "block_influence": "block influence, all",
    "interval": "every other layer first",
}  # fmt: skip


def figures(run: Run, summary: Summary) -> None:
    layers = list(range(summary["n_layers"]))
    used = [mode for mode in MODES if any(mode in found for found in summary["alone"].values())]
    panels: list[tuple[str, list[Line]]] = [
        (MODES[mode], [
            (ROWS[rows], found[mode]["difference"], COLOURS[i], rows == "all")
            for i, (rows, found) in enumerate(summary["alone"].items()) if mode in found
        ]) for mode in used
    ]  # fmt: skip
    run.figure("alone", *curves(panels, [layers] * len(panels), "layer", "accuracy, less the dense model's"))
    sizes = [0, *summary["sizes"]]
    ways = [line for line in _ways(summary) if line is not None]
    contrast: list[Line] = [
        (ROWS[rows], _from_zero(found["difference"], 0.0), colour, rows == "all")
        for colour, (rows, found) in zip((COLOURS[0], COLOURS[4], COLOURS[6]), summary["contrast"].items(), strict=True) if found
    ]  # fmt: skip
    grown: list[tuple[str, list[Line]]] = [("visual tokens, by each ranking", ways)] if ways else []
    grown.append((f"by {_named(summary['ranked_by'])}", contrast))
    run.figure(
        "growing", *curves(grown, [sizes] * len(grown), "layers passed by", "accuracy, less the dense model's", share=False)
    )
    saved = _saved(summary)
    if saved:
        run.figure("saving", *curves(saved, [sizes] * len(saved), "layers passed by", "share of the dense model's"))


def _named(name: str) -> str:
    return NAMES.get(name, name)


def _ways(summary: Summary) -> list[Line | None]:
    """Curves of growing sets by each ranking; random orders as their mean, with the least and the most of them."""
    lines: list[Line | None] = []
    for i, (name, found) in enumerate((n, f) for n, f in summary["grown"].items() if n in NAMES):
        lines.append((_named(name), _from_zero(found["difference"], 0.0), COLOURS[i], False) if found else None)
    drawn = [found["difference"]["mean"] for name, found in summary["grown"].items() if name not in NAMES and found]
    if drawn:
        stacked = np.array(drawn, dtype=float)
        ends = {"mean": stacked.mean(0).tolist(), "low": stacked.min(0).tolist(), "high": stacked.max(0).tolist()}
        lines.append((f"random ({len(drawn)} orders)", _from_zero(ends, 0.0), GREY, True))
    return lines


def _from_zero(curve: Mapping[str, Any], start: float) -> dict[str, Any]:
    """A curve with the dense model before it."""
    return {side: [start, *values] for side, values in curve.items()}


def _saved(summary: Summary) -> list[tuple[str, list[Line]]]:
    """Counted and measured shares for visual tokens and for all rows, in the order of the first ranking."""
    panels: list[tuple[str, list[Line]]] = []
    for rows in ("perceptual", "all"):
        found = summary["contrast"].get(rows)
        if not found:
            continue
        lines: list[Line] = [
            ("FLOPs of reading a prompt, counted", _from_zero({"mean": found["flops_ratio"]}, 1.0), COLOURS[0], False),
            ("keys and values", _from_zero({"mean": found["kv_ratio"]}, 1.0), COLOURS[2], True),
        ]
        if any(value is not None for value in found["prefill"]["mean"]):
            bounded = all(value is not None for value in found["prefill"]["low"])
            times = found["prefill"] if bounded else {"mean": found["prefill"]["mean"]}
            lines.append(("time of reading a prompt, measured", _from_zero(times, 1.0), COLOURS[1], False))
        panels.append((f"{ROWS[rows]} pass layers by", lines))
    return panels


# --- words -----------------------------------------------------------------------------------------------------------


def report(summary: Summary, setting: Setting) -> str:
    """The question, the answer with n and intervals, the contrasts, and what could not be used."""
    dense = summary["dense"]
    lines = [
        "# Layers passed by", "", "*Which layers do visual tokens need, which do words, and does a score tell before one tries?* "
        f"{summary['n']} questions of `{setting.data.name}` to `{setting.subject.name}` ({summary['n_layers']} layers), which answers {dense['accuracy']:.1%} "
        "of them as it is. Layers were ranked on other examples.", "", *_answers(summary), "",
        "## Each layer alone", "", "![each layer alone](figures/alone.png)", "",
        "Change in accuracy when one layer is passed by (95 % bootstrap intervals over questions, paired with the dense model). Words are those of the "
        "prompt and what is written. Where visual tokens pass a whole layer by, words still look at them there (ShortV).", "",
        *_table(summary), "",
        "## More and more layers", "", "![growing sets](figures/growing.png)", "",
        "Left: visual tokens pass by whole layers, chosen in four ways; the grey line is the mean of the random orders, its band reaches from the worst to "
        "the best of them. Right: the same sets of layers passed by by visual tokens, by words, and by all.", "", *_grown(summary), "",
    ]  # fmt: skip
    if summary["contrast"].get("perceptual") or summary["contrast"].get("all"):
        lines += [
            "## What it saves", "", "![what it saves](figures/saving.png)", "",
            "Counted FLOPs are those of the whole prompt, tower and head included; so is the measured time (median over rounds in turns with the dense "
            "model, bars by order statistics). Frozen visual tokens still leave their keys and values in every layer.", "", *_savings(summary), "",
        ]  # fmt: skip
    if summary["unused"]:
        lines += [f"## Examples that could not be used ({len(summary['unused'])})", ""]
        lines += [f"- {name}: {why}" for name, why in list(summary["unused"].items())[:20]]
    if summary["skipped"]:
        reasons = dict.fromkeys(summary["skipped"].values())
        lines += ["## What was refused", "", *(f"- {why}" for why in reasons), ""]
    return "\n".join(lines) + "\n"


def _answers(summary: Summary) -> list[str]:
    lines = []
    for rows, found in summary["alone"].items():
        for mode, curve in found.items():
            hurt = [i for i, q in enumerate(curve["q"]) if q is not None and q < 0.05 and curve["difference"]["mean"][i] < 0]
            told = f"layers {', '.join(map(str, hurt))} surely cost accuracy" if hurt else "no layer surely costs accuracy"
            worst = int(np.nanargmin(np.array(curve["difference"]["mean"], dtype=float)))
            lines.append(
                f"- **{ROWS[rows]}, {MODES[mode]}**, one layer at a time: {told} (McNemar, false discovery rate 5 % over layers); the most at layer {worst}: "
                f"{_change(curve['difference'], worst)}."
            )
    agreed = summary["agreement"]
    if agreed:
        told = ", ".join(f"{_named(name)} {value:+.2f}" for name, value in agreed.items() if value is not None)
        lines.append(
            f"- **Scores** against the KL that freezing visual tokens in each layer costs on these questions (Spearman over {summary['n_layers']} layers): "
            f"{told}. With so few layers only values near 1 mean much, and contribution is that KL itself (of the other direction), on other examples."
        )
    return lines


def _change(curve: Mapping[str, Sequence[float]], i: int) -> str:
    return f"{curve['mean'][i]:+.1%} [{curve['low'][i]:+.1%}, {curve['high'][i]:+.1%}]"


def _table(summary: Summary) -> list[str]:
    ways = [(rows, mode) for rows, found in summary["alone"].items() for mode in found]
    if not ways:
        return []
    names = " | ".join(f"{ROWS[rows]}, {mode}" for rows, mode in ways)
    lines = ["KL(dense \\|\\| this) of the first token, in nats, and the scores:", "",
             f"| layer | {names} | {' | '.join(_named(n) for n in summary['scores'])} |", "|---" * (1 + len(ways) + len(summary["scores"])) + "|"]  # fmt: skip
    for layer in range(summary["n_layers"]):
        cells = [_three(summary["alone"][rows][mode]["divergence"]["mean"][layer]) for rows, mode in ways]
        lines.append(f"| {layer} | {' | '.join([*cells, *(_three(values[layer]) for values in summary['scores'].values())])} |")
    return lines


def _three(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _grown(summary: Summary) -> list[str]:
    """For each ranking, how many layers visual tokens can pass by before the interval of the loss leaves five points."""
    lines = [
        "| layers chosen by | order | most layers losing less than 5 points by the interval | and its loss |",
        "|---|---|---|---|",
    ]
    for name, found in summary["grown"].items():
        order = ", ".join(map(str, summary["orders"][name]))
        if not found:
            continue
        kept = _within(found, summary["sizes"])
        told = "none | -" if kept is None else f"{summary['sizes'][kept]} | {_change(found['difference'], kept)}"
        lines.append(f"| {_named(name)} | {order} | {told} |")
    lines += ["", "The number was picked on the questions that it is judged by: confirm it on others."]
    return lines


def _within(found: Mapping[str, Any], sizes: Sequence[int]) -> int | None:
    """The last of the first sizes that all lose less than five points by their interval."""
    fine = [low is not None and low > -0.05 for low in found["difference"]["low"]]
    count = next((i for i, good in enumerate(fine) if not good), len(sizes))
    return count - 1 if count else None


def _savings(summary: Summary) -> list[str]:
    lines = [
        "| rows | layers | accuracy | FLOPs | decoder FLOPs | KV | prefill time | verdict |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for rows in ("perceptual", "all"):
        found = summary["contrast"].get(rows)
        for i, size in enumerate(summary["sizes"] if found else []):
            if found["accuracy"][i] is None:
                continue
            time = found["prefill"]["mean"][i]
            low, high = found["prefill"]["low"][i], found["prefill"]["high"][i]
            told = "-" if time is None else f"x {time:.2f}" + ("" if low is None else f" [{low:.2f}, {high:.2f}]")
            lines.append(
                f"| {ROWS[rows]} | {size} | {found['accuracy'][i]:.1%} | {found['flops_ratio'][i]:.0%} | {found['prefill_flops_ratio'][i]:.0%} "
                f"| {found['kv_ratio'][i]:.0%} | {told} | {found['verdict'][i] or '-'} |"
            )
    return lines
