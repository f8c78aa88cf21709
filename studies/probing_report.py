"""The probing study's figures and words, made from its summary."""

from collections.abc import Mapping
from typing import Any

from probe.plots import probing as plots
from studies.run import Run
from studies.study import Setting, Summary
from studies.telling import bracketed, ranged

__all__ = ["figures", "report", "sentence", "table"]
PLACES = {
    "object": "the patches of the thing in question", "other": "the other patches", "shown": "all that is shown",
    "word": "the thing's word in the question", "question": "the question", "last": "the last position",
}  # fmt: skip


def figures(run: Run, summary: Summary) -> None:
    found = summary["facts"]
    run.figure("accuracy", *plots.accuracy(found))
    run.figure("selectivity", *plots.accuracy(found, "selectivity", "accuracy minus control task"))
    if any(one["onset"] for groups in found.values() for one in groups.values()):
        run.figure("onset", *plots.onsets(found))


def report(summary: Summary, setting: Setting) -> str:
    """The question, the answer with n and interval, the nulls, and what could not be used."""
    lines = [
        "# Probing", "", "*At which layer can each fact of a scene be read, and from which tokens?* "
        f"{summary['n']} examples of `{setting.data.name}` to `{setting.subject.name}`, {setting.subject.n_layers} layers; a state counts what "
        "enters layer 0 as 0.", "",
        *(f"- {sentence(name, one)}" for name, one in summary["headline"].items()), "",
        "![accuracy](figures/accuracy.png)", "",
        "Held-out accuracy of linear probes; bands are 95 % bootstrap intervals over pictures. The dashed line is what the most frequent class of the "
        "training part gets; `other`, the patches that show something else, is the contrast: what it reads has spread, or is no matter of the place.", "",
        *table(summary["facts"]),
        "## Selectivity", "", "![selectivity](figures/selectivity.png)", "",
        "Accuracy minus that of a control task, which gives each word that names the thing (or each question) one random label, drawn as "
        "often as true labels occur: about 0 where the probe only remembers words.", "",
    ]  # fmt: skip
    if any(one["onset"] for groups in summary["facts"].values() for one in groups.values()):
        lines += ["## From which layer on", "", "![onset](figures/onset.png)", "", "The first state within the tolerance of the best one, with a 95 % bootstrap interval; only where some state reads the fact better than the most frequent class (q < 0.05 over states).", ""]  # fmt: skip
    return "\n".join([*lines, *unused(summary)]) + "\n"


def sentence(name: str, one: Mapping[str, Any], places: Mapping[str, str] = PLACES) -> str:
    """One fact's answer."""
    best, base = one["best"], one["majority"]
    where = places.get(one["place"], one["place"])
    head = f"{bracketed(best, '.2f')} at state {best['state']} (n = {one['n']}), the most frequent class {base['value']:.2f}"
    if one["onset"] is None:
        return f"**{name}** is not read above the most frequent class anywhere; the best is {where}: {head}."
    start = one["onset"]
    return f"**{name}** is read best from {where}: {head}; readable from state {start['state']} [{start['low']}, {start['high']}] on."


def table(facts: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> list[str]:
    rows = [
        f"| {fact} | {group} | {one['n']} | {one['classes']} | {ranged(one['best'], '.2f')}, state "
        f"{one['best']['state']} | {one['majority']['value']:.2f} | {one['control']['mean'][one['best']['state']]:.2f} | "
        f"{'-' if one['first_above'] is None else one['first_above']} | {_start(one['onset'])} |"
        for fact, groups in facts.items() for group, one in groups.items()
    ]  # fmt: skip
    return [
        "| fact | tokens | n | classes | best accuracy | most frequent class | control task | first state above | readable from |",
        "|---|---|---|---|---|---|---|---|---|", *rows, "",
    ]  # fmt: skip


def _start(onset: Mapping[str, Any] | None) -> str:
    return "-" if onset is None else f"{onset['state']} ({onset['low']} to {onset['high']})"


def unused(summary: Summary) -> list[str]:
    """What could not be used, by name."""
    lines = []
    if summary["n_skipped"]:
        lines.append(f"- {summary['n_skipped']} examples could not be used; the first: {summary['skipped'][0]}")
    lines += [f"- {one}" for one in summary["refused"]]
    lines += [f"- some examples lack {one}" for one in summary["missing"]]
    dropped = {
        fact: sorted({c for one in groups.values() for c in one["dropped"]}) for fact, groups in summary["facts"].items()
    }
    lines += [
        f"- {fact}: classes with one example, dropped at some place: {', '.join(names)}"
        for fact, names in dropped.items()
        if names
    ]
    return ["## What could not be used", "", *lines, ""] if lines else []
