"""Points of accuracy and cost in words and pictures: what `tradeoffs`, `search` and `measure` show of them."""

from collections.abc import Mapping, Sequence
from typing import Any

from probe.plots.frontier import frontier
from probe.plots.panels import Pair
from studies.telling import bracketed

Points = Sequence[Mapping[str, Any]]


def figure(points: Points) -> Pair:
    """Accuracy against the time that the prompt takes (where it was measured) and against FLOPs."""
    timed = [point for point in points if point["ratios"]]
    panels = []
    if timed:
        panels.append(("Reading the prompt, measured", "prefill time / dense, median", [_timed(p) for p in timed]))
    panels.append(("Reading the prompt, counted", "FLOPs / dense", [_counted(p) for p in points]))
    return frontier(panels, "accuracy, 95 % interval")


def _timed(point: Mapping[str, Any]) -> dict[str, Any]:
    found = {"value": 1.0, "low": 1.0, "high": 1.0} if point["baseline"] == "full" else point["ratios"]["prefill"]
    value = found["value"]
    low, high = (value if end is None else end for end in (found["low"], found["high"]))
    return {**_common(point), "standing": point["standing"]["prefill"], "x": value, "x_low": low, "x_high": high}


def _counted(point: Mapping[str, Any]) -> dict[str, Any]:
    share = point["flops_ratio"]
    return {**_common(point), "standing": point["standing"]["flops"], "x": share, "x_low": share, "x_high": share}


def _common(point: Mapping[str, Any]) -> dict[str, Any]:
    return {"name": point["name"], "baseline": point["baseline"], "plan": point["name"].startswith("evidence plan"), "y": point["accuracy"], "y_low": point["accuracy_low"],
            "y_high": point["accuracy_high"]}  # fmt: skip


def table(points: Points) -> str:
    """Every point in one row, from accurate to less so."""
    head = "| configuration | accuracy | against dense | FLOPs | KV | prefill | verdict | frontier |\n|---|---|---|---|---|---|---|---|"
    ordered = sorted(points, key=lambda point: (-point["accuracy"], point["flops_ratio"]))
    return "\n".join([head, *(_row(point) for point in ordered)])


def _row(point: Mapping[str, Any]) -> str:
    name = f"**{point['name']}**" if point["baseline"] else point["name"]
    change = point.get("difference")
    against = "" if change is None else bracketed(change, "+.1%")
    prefill = "" if point["prefill_ms"] is None else f"{point['prefill_ms']:.1f} ms"
    ratio = point["ratios"].get("prefill")
    shown = f"{prefill}, x {ratio['value']:.2f}" if ratio else prefill
    where = point["standing"]["prefill"] or point["standing"]["flops"]
    return (
        f"| {name} | {point['accuracy']:.1%} [{point['accuracy_low']:.1%}, {point['accuracy_high']:.1%}] | {against} | {point['flops_ratio']:.0%} "
        f"| {point['kv_ratio']:.0%} | {shown} | {point['verdict'] or ''} | {where} |"
    )


def broken(point: Mapping[str, Any]) -> str:
    """The items that a configuration broke and mended, by kind of question."""
    kinds = point.get("by_kind") or {}
    lines = [
        f"| {kind} | {k['n']} | {len(k['broke'])} | {len(k['mended'])} | {', '.join(k['broke'][:8])} |"
        for kind, k in kinds.items()
    ]
    head = "| kind | n | broke | mended | which broke (at most 8) |\n|---|---|---|---|---|"
    return "\n".join([head, *lines]) if lines else "Nothing to compare with."


def sentence(point: Mapping[str, Any]) -> str:
    """One configuration in words."""
    text = f"{point['name']}: {point['accuracy']:.1%} of {point['n']} right [{point['accuracy_low']:.1%}, {point['accuracy_high']:.1%}]"
    if point.get("difference"):
        change = point["difference"]
        text += f", {bracketed(change, '+.1%')} against the dense model (McNemar p = {point['p']:.3g})"
    if point["verdict"]:
        ratio = point["ratios"]["answer"]
        text += f"; an answer takes {ratio['value']:.2f} of the dense model's time: {point['verdict']}"
    return text + "."
