"""The grounding study's numbers, figures and words, made from its records."""

from typing import Any

import numpy as np
import pyarrow as pa

from probe.analysis.grounding import Scores
from probe.analysis.stats import benjamini_hochberg, sign_flip
from probe.grounding import SOURCES
from probe.plots import grounding as plots
from studies.data import Data
from studies.grounding_units import BASELINES, CENTRED, LAST_OF_ALL, LOCAL, MASK, ONE, RELATIVE, SIDE, Choice, Plan, table_of
from studies.run import Run
from studies.study import Setting, Summary
from studies.telling import above, below, ranged
from studies.work import curve, interval, picked, share, skipped

METRICS = Scores._fields
HEADLINE = f"{ONE}, word"
DRAWN = (f"{ONE}, word", f"{ONE}, last", f"{LOCAL}, word", f"{MASK}, word")


def summarise(rows: pa.Table, choice: Choice, plan: Plan) -> Summary:
    """Everything that the report says, as numbers."""
    scored = picked(rows, what="score", key=HEADLINE)
    chosen = picked(rows, what="selection", key="auc/word")
    names = list(dict.fromkeys(picked(rows, what="score")["key"].to_pylist()))
    own = {name: _by_scene(rows, "score", name) for name in names}
    methods = {name: _scores(table, plan.seed) for name, table in own.items()}
    gains = {
        name: {base: _gains(own[name] - own[base], plan.seed) for base in BASELINES if base != name}
        for name in names if name not in BASELINES[:2]
    }  # fmt: skip
    best = methods[HEADLINE]
    return {
        "run": "", "n": len(set(scored["example"].to_pylist())), "n_scenes": len(own[HEADLINE]), "n_phrases": len(scored),
        "n_selection": len(set(chosen["example"].to_pylist())), "n_selection_scenes": len(set(chosen["scene"].to_pylist())),
        "n_skipped": len(skipped(rows)), "skipped": skipped(rows), "n_unnamed": len(picked(rows, what="unnamed")),
        "auc": best["auc"], "iou": best["iou"], "pointing": best["pointing"], "accuracy": best["hit"],
        "gain_over_centred_box": gains[HEADLINE][CENTRED]["iou"],
        "chosen": _chosen(choice), "object": list(choice.size), "layers": list(choice.layers), "heads_per_layer": choice.heads,
        "methods": methods, "gains": gains,
        "null": {name: _scores(_by_scene(rows, "null score", name), plan.seed) for name in names},
        "against_null": {
            name: _gains(own[name] - _by_scene(rows, "null score", name), plan.seed) for name in names
        },
        "heads": _heads(rows, choice, plan.seed),
        "curves": {source: _curves(rows, choice, source, plan.seed) for source in SOURCES},
        "training": _training(rows),
    }  # fmt: skip


def _by_scene(rows: pa.Table, what: str, key: str) -> np.ndarray:
    """(scene value): phrases of one scene are averaged, since they are not independent of each other."""
    own = picked(rows, what=what, key=key)
    table, scenes = table_of(rows, what, key), np.array(own["scene"].to_pylist())
    return np.array([table[scenes == scene].mean(0) for scene in dict.fromkeys(scenes.tolist())])


def _scores(table: np.ndarray, seed: int) -> dict[str, Any]:
    """Means over scenes; Acc@0.5 and pointing are proportions where a scene has one phrase."""
    read = {metric: share if metric in ("hit", "pointing") else interval for metric in METRICS}
    return {metric: read[metric](table[:, i], seed) for i, metric in enumerate(METRICS)}


def _gains(differences: np.ndarray, seed: int) -> dict[str, Any]:
    """Paired differences by metric, with the one-sided p-value that they are above zero."""
    p = sign_flip(differences, seed)
    return {metric: {**interval(differences[:, i], seed), "p": float(p[i])} for i, metric in enumerate(METRICS)}


def _chosen(choice: Choice) -> dict[str, Any]:
    return {
        ONE: {source: choice.name(channel) for source, channel in choice.single.items()},
        LOCAL: {source: [choice.name(channel) for channel in found] for source, found in choice.located.items()},
        RELATIVE: None if choice.relative is None else choice.layers[choice.relative],
    }


def _heads(rows: pa.Table, choice: Choice, seed: int) -> dict[str, Any]:
    """Mean AUC of every head with q-values over all heads of both sources that it beats the same map on another object's box."""
    own = {source: _by_scene(rows, "auc", source) for source in SOURCES}
    p = np.stack([sign_flip(own[source] - _by_scene(rows, "null auc", source), seed) for source in SOURCES])
    q = benjamini_hochberg(p)
    shape = (len(choice.layers), choice.heads)
    return {
        source: {
            "auc": own[source].mean(0).reshape(shape).tolist(), "q": q[i].reshape(shape).tolist(),
            "n_significant": int((q[i] < 0.05).sum()),
        }
        for i, source in enumerate(SOURCES)
    }  # fmt: skip


def _curves(rows: pa.Table, choice: Choice, source: str, seed: int) -> dict[str, Any]:
    best = choice.by_layer[source]
    return {
        "best": curve(_by_scene(rows, "auc", source)[:, best], choice.layers, seed),
        "mean": curve(_by_scene(rows, "layer auc", source), choice.layers, seed),
        "null": curve(_by_scene(rows, "null auc", source)[:, best], choice.layers, seed),
    }


def _training(rows: pa.Table) -> dict[str, Any] | None:
    losses = table_of(rows, "training", "loss")
    if not losses.size:
        return None
    return {"scenes": int(table_of(rows, "training", "scenes")[0, 0]), "loss": losses[0].tolist()}


# --- figures and words -----------------------------------------------------------------------------------------------


def figures(run: Run, summary: Summary, rows: pa.Table, setting: Setting) -> None:
    """The figures of a run."""
    run.figure("overlays", *plots.overlays(_shown(rows, setting.data, setting)))
    run.figure("scores", *plots.scores(summary))
    run.figure("heads", *plots.heads(summary))
    run.figure("by-layer", *plots.by_layer(summary))


def _shown(rows: pa.Table, data: Data, setting: Setting) -> list[plots.Shown]:
    """The phrases whose maps were kept: the first of each drawn example."""
    examples = {example.id: example for example in data.examples}
    maps: dict[tuple[str, str], dict[str, np.ndarray]] = {}
    for row in picked(rows, what="map").to_pylist():
        maps.setdefault((row["example"], row["phrase"]), {})[row["key"]] = np.array(row["values"]).reshape(SIDE, SIDE)
    shown: list[plots.Shown] = []
    seen: set[str] = set()
    for row in picked(rows, what="boxes").to_pylist():
        if row["example"] in seen:
            continue
        seen.add(row["example"])
        example, found = examples[row["example"]], maps[row["example"], row["phrase"]]
        picture = setting.subject.open_media(example).pictures[int(row["key"])]
        boxes = np.array(row["values"]).reshape(-1, 4) * ([picture.width, picture.height] * 2)
        asked = f"{row['phrase']}: {example.prompt}"
        shown.append((asked, picture, boxes.tolist(), {name: found[name] for name in DRAWN if name in found}))
    return shown


def report(summary: Summary, setting: Setting) -> str:
    """The report: the question, the answer in a sentence, each figure with a sentence, and what could not be used."""
    lines = [
        "# Grounding", "", f"*Does the attention of a word find the pixels that it is about?* Model `{setting.subject.name}`, data "
        f"`{setting.data.name}`.", "", _answer(summary), "",
        f"Heads were chosen on {summary['n_selection']} examples ({summary['n_selection_scenes']} scenes) and scored on {summary['n']} others "
        f"({summary['n_scenes']} scenes, {summary['n_phrases']} phrases); no scene is in both. Intervals are 95 % bootstrap intervals over "
        "scenes (Wilson's for Acc@0.5 and pointing where each scene has one phrase); phrases of one scene are averaged first.", "",
        "## Maps", "", "![overlays](figures/overlays.png)", "",
        "The first scored examples: the boxes of what the phrase speaks of, and each method's map, bright where it is high.", "",
        "## Scores", "", "![scores](figures/scores.png)", "", *_table(summary), "",
        "Grey: the same maps scored against another object's box, which is what finding something, but not this, would give.", "",
        *_trained(summary),
        "## Which heads", "", "![heads](figures/heads.png)", "", *_which(summary), "",
        "## Which layers", "", "![by layer](figures/by-layer.png)", "",
        "In each layer the head that had the greatest AUC on the selection split, read on the scored one; the mean of the layer's "
        "heads; and the chosen head against another object's box.", "",
        "## What could not be used", "", *_left_out(summary), "",
    ]  # fmt: skip
    return "\n".join(lines)


def _answer(summary: Summary) -> str:
    area, other, gap = summary["auc"], summary["null"][HEADLINE]["auc"], summary["against_null"][HEADLINE]["auc"]
    verdict = "finds its object" if above(gap) else (
        "finds other objects rather than its own" if below(gap) else "is not shown to find its own object rather than another"
    )  # fmt: skip
    return (
        f"Read through one head ({summary['chosen'][ONE]['word']}, layer and head), the attention of a word {verdict}: its AUC is {_plain(area)}, and "
        f"{_plain(other)} for another object's box, the strictest null, a paired difference of {_signed(gap)} (one-sided sign-flip p {_p(gap['p'])}, "
        f"n = {gap['n']} scenes).{_beside(summary)}"
    )


def _beside(summary: Summary) -> str:
    """What the baselines and the trained head say to the same claim."""
    hard, box = summary["gains"][HEADLINE][LAST_OF_ALL], summary["gains"][HEADLINE][CENTRED]
    word = "better" if above(hard["auc"]) else "worse" if below(hard["auc"]) else "not shown to be better or worse"
    told = (
        f" Beside the last position's attention, averaged over all heads and layers, it is {word}: the AUC differs by {_signed(hard['auc'])}, the IoU by "
        f"{_signed(hard['iou'])}; beside a centred box, which objects of a grid seldom meet, the IoU differs by {_signed(box['iou'])}."
    )
    trained = summary["gains"].get(f"{MASK}, word", {}).get(LAST_OF_ALL)
    if trained:
        told += f" A mask head trained on all heads' maps of the word adds {_signed(trained['iou'])} to that average's IoU."
    return told


def _plain(found: dict[str, Any]) -> str:
    return ranged(found, ".2f")


def _signed(found: dict[str, Any]) -> str:
    return ranged(found, "+.2f")


def _p(value: float | None) -> str:
    if value is None:
        return "unknown"
    return "< 0.001" if value < 0.001 else f"= {value:.3f}"


def _table(summary: Summary) -> list[str]:
    names = {"iou": "IoU", "box_iou": "box IoU", "hit": "Acc@0.5", "pointing": "pointing", "auc": "AUC"}
    lines = [
        f"| method | {' | '.join(names.values())} | IoU less the centred box's | p |", "|---|" + "---|" * (len(names) + 2),
    ]  # fmt: skip
    for name, found in summary["methods"].items():
        gain = summary["gains"].get(name, {}).get(CENTRED)
        beside = f"{_signed(gain['iou'])} | {_p(gain['iou']['p']).removeprefix('= ')}" if gain else "|"
        lines.append(f"| {name} | {' | '.join(_plain(found[metric]) for metric in names)} | {beside} |")
    return lines


def _trained(summary: Summary) -> list[str]:
    if not summary["training"]:
        return []
    loss = summary["training"]["loss"]
    return [
        f"The mask head learnt from {summary['training']['scenes']} other scenes in {len(loss)} epochs, on the maps of the model as it is "
        f"(loss {loss[0]:.2f} in the first epoch, {loss[-1]:.2f} in the last).", "",
    ]  # fmt: skip


def _which(summary: Summary) -> list[str]:
    chosen = summary["chosen"]
    heads = summary["heads_per_layer"] * len(summary["layers"])
    lines = [
        f"- `{source}`: {summary['heads'][source]['n_significant']} of {heads} heads look at the phrase's box more than at another object's "
        f"(q < 0.05, Benjamini-Hochberg over the heads of both sources). Chosen with the boxes of the selection split: "
        f"{chosen[ONE][source]}; without any boxes, by mass on the picture and spatial entropy: {', '.join(chosen[LOCAL][source])}."
        for source in SOURCES
    ]
    if chosen[RELATIVE] is not None:
        lines.append(f"- The ratio to the generic prompt is read at layer {chosen[RELATIVE]}, chosen on the selection split.")
    return lines


def _left_out(summary: Summary) -> list[str]:
    lines = [
        f"- {summary['n_skipped']} examples could not be used." if summary["n_skipped"] else "- Every example could be used.",
        *(f"  - {line}" for line in summary["skipped"][:20]),
    ]
    if summary["n_unnamed"]:
        lines.append(f"- {summary['n_unnamed']} regions have a label of which the question says no word.")
    return lines
