"""The figures and words of the study of a tower's layers, made from its summary."""

from collections.abc import Mapping
from typing import Any

from probe.plots import vision_layers as plots
from studies.probing_report import sentence, table, unused
from studies.run import Run
from studies.study import Setting, Summary
from studies.telling import bracketed, ranged

__all__ = ["figures", "report"]
PLACES = {"object": "the patches of the thing in question", "other": "the other patches", "shown": "all patches"}


def figures(run: Run, summary: Summary) -> None:
    run.figure("layers", *plots.layers(summary["facts"], summary["tower"]["read"]))
    if summary["merged"]:
        run.figure("merging", *plots.merged(summary["merged"]))


def report(summary: Summary, setting: Setting) -> str:
    """The question, the answer with n and interval, the contrast, and what could not be used."""
    tower = summary["tower"]
    read = ", ".join(map(str, tower["read"]))
    lines = [
        "# Layers of the tower", "", "*Which layers of the vision tower carry which facts, and what does merging levels give?* "
        f"{summary['n']} examples of `{setting.data.name}` to the {tower['kind']} tower of `{setting.subject.name}` ({tower['layers']} layers). A state "
        f"counts what enters the tower's layer 0 as 0; the connector reads state {read}.", "",
        *(f"- {sentence(name, one, PLACES)}" for name, one in summary["headline"].items()), *_merging(summary), "",
        "![layers](figures/layers.png)", "",
        "Held-out accuracy of linear probes on mean patch states; bands are 95 % bootstrap intervals over pictures, the dashed line is the most "
        "frequent class, the dotted one what the connector reads. "
        + ("`other` are the patches beside the thing, the contrast." if summary["place"] == "object"
           else "The thing's own patches are not known: these are means over all patches, which mix all that is shown."), "",
        *table(summary["facts"]),
    ]  # fmt: skip
    if summary["merged"]:
        lines += [
            "## Merging levels", "", "![merging](figures/merging.png)", "",
            f"From {PLACES[summary['place']]}: states laid side by side, against the best single state, which is chosen for each fold inside its training "
            "part. The gain is paired over the same pictures. A merge has more dimensions and no more pictures, which by itself costs accuracy where "
            "pictures are few.", "",
            "| fact | layers | states | n | accuracy | gain on the best single layer | q |", "|---|---|---|---|---|---|---|",
            *(_row(fact, name, one, summary["levels"]) for fact, ways in summary["merged"].items() for name, one in ways.items()), "",
        ]  # fmt: skip
    return "\n".join([*lines, *unused(summary)]) + "\n"


def _row(fact: str, name: str, one: Mapping[str, Any], levels: Mapping[str, Any]) -> str:
    states = ", ".join(map(str, levels[name])) if name in levels else "-"
    q = "-" if one.get("q") is None else f"{one['q']:.3f}"
    return f"| {fact} | {name} | {states} | {one['n']} | {_number(one['accuracy'])} | {_number(one.get('gain'))} | {q} |"


def _number(one: Mapping[str, float] | None) -> str:
    return "-" if one is None else ranged(one)


def _merging(summary: Summary) -> list[str]:
    """Which merges gain, which lose, by their intervals."""
    lines = []
    for fact, ways in summary["merged"].items():
        gains = {name: one["gain"] for name, one in ways.items() if "gain" in one}
        better = [name for name, gain in gains.items() if gain["low"] > 0]
        worse = [name for name, gain in gains.items() if gain["high"] < 0]
        best = max(gains, key=lambda name: gains[name]["value"])
        told = f"the most is gained by {best}: {bracketed(gains[best], '+.3f')}"
        lines.append(
            f"- **{fact}**, levels merged: "
            + (f"better than the best single layer are {', '.join(better)}" if better else "none is better than the best single layer")
            + (f", worse {', '.join(worse)}" if worse else "") + f"; {told}."
        )  # fmt: skip
    return lines
