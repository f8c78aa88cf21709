"""The similarity study's figures and words, made from its summary."""

from typing import Any

from probe.plots import similarity as plots
from studies.run import Run
from studies.study import Setting, Summary

__all__ = ["figures", "report"]
ASKED = {
    "layers": "Layers", "groups": "What is shown and the words", "models": "Two models", "tellings": "The same scene, told two ways",
}  # fmt: skip
SAYS = {
    "layers": "each state of the model with each other, the same tokens of the same examples: blocks of dark colour are layers that change little.",
    "groups": "tokens of what is shown, of the question and the last one, of the same examples.",
    "models": "the model (down) and the other (across), shown the same examples.",
    "tellings": "the model shown the picture (down) and the same model told the same scene in the other data set (across).",
}  # fmt: skip
NAMES = {"cka": "CKA", "cknna": "CKNNA", "knn": "mutual kNN"}


def figures(run: Run, summary: Summary) -> None:
    for kind, titles in kinds(summary).items():
        found = {title.split(": ")[1]: summary["pairs"][title] for title in titles}
        run.figure(f"grids-{kind}", *plots.grids(found, _axes(kind)))
        if kind != "layers":
            run.figure(f"depth-{kind}", *plots.depth(found))
    run.figure("overview", *plots.overview({t: one for t, one in summary["pairs"].items() if not t.startswith("layers")}))


def _axes(kind: str) -> tuple[str, str]:
    return {"models": ("state of the model", "state of the other"), "tellings": ("state, shown", "state, told")}.get(
        kind, ("state", "state")
    )


def kinds(summary: Summary) -> dict[str, list[str]]:
    made: dict[str, list[str]] = {}
    for title in summary["pairs"]:
        made.setdefault(title.split(":")[0], []).append(title)
    return made


def report(summary: Summary, setting: Setting) -> str:
    """The question, the answer in a table beside its nulls, and each figure with what it shows."""
    where = summary["sources"]
    lines = [
        "# Similarity of representations", "", "*Do layers, modalities and models represent the same examples alike?* "
        f"{summary['n']} examples of `{setting.data.name}`, `{where['model']['model']}`"
        + (f", the other model `{where['other']['model']}`" if "other" in where else "") + ".", "",
        _answer(summary), "",
        f"k = {summary['k']} neighbours" + ("" if summary["k"] == summary["k_asked"] else f" ({summary['k_asked']} are too many for so few examples)")
        + f"; by chance two sets share {summary['chance_knn']:.3f} of them. The null pairs examples at random, {summary['permutations']} times: "
        "it keeps each set as it is and loses which example is which. Intervals are a jackknife over 20 parts of the examples; each number "
        "is the mean over states of the same depth (of `layers`: over neighbouring states), never the best pair of states.", "",
        "| pair | CKA | permuted | p | CKNNA | permuted | p | mutual kNN | permuted | p |", "|---|---|---|---|---|---|---|---|---|---|",
        *(f"| {title} | " + " | ".join(_cells(one[metric]["along"]) for metric in NAMES) + " |"
          for title, one in summary["pairs"].items()), "",
        "![overview](figures/overview.png)", "",
    ]  # fmt: skip
    for kind in kinds(summary):
        lines += [
            f"## {ASKED[kind]}",
            "",
            f"![{kind}](figures/grids-{kind}.png)",
            "",
            SAYS[kind][0].upper() + SAYS[kind][1:],
            "",
        ]
        if kind != "layers":
            lines += [f"![{kind} by depth](figures/depth-{kind}.png)", "", "The same depth on both sides; the dashed line is the null's mean, its band 95 % of the permutations.", ""]  # fmt: skip
    if summary["n_skipped"]:
        lines += [f"{summary['n_skipped']} examples could not be used; the first: {summary['skipped'][0]}", ""]
    lines += [
        "Questions that follow one template make the words' side alike by themselves: read a similarity beside its null and beside the other "
        "pairs, not as a number of its own.", "",
    ]  # fmt: skip
    return "\n".join(lines)


def _answer(summary: Summary) -> str:
    pairs = {title: one["cka"]["along"] for title, one in summary["pairs"].items() if not title.startswith("layers")}
    known = {title: one for title, one in pairs.items() if one["value"] is not None}
    if not known:
        return "No pair has a similarity that is defined: the states do not vary."
    clear = [title for title, one in known.items() if one["p"] < 0.05]
    best = max(known, key=lambda title: known[title]["value"])
    one = known[best]
    head = f"{len(clear)} of {len(known)} pairs are more alike (CKA) than permuted ones at p < 0.05 (n = {summary['n']})."
    rest = [title for title in known if title not in clear]
    return (
        f"{head} The most alike are {best}: {one['value']:.2f} [{one['low']:.2f}, {one['high']:.2f}] where permuted pairs give {one['null']:.2f}."
        + (f" Not told from permuted pairs: {', '.join(rest)}." if rest else "")
    )


def _cells(one: dict[str, Any]) -> str:
    if one["value"] is None:
        return "not defined | - | -"
    return f"{one['value']:.3f} ({one['low']:.3f} to {one['high']:.3f}) | {one['null']:.3f} | {one['p']:.3f}"
