"""The lens study's numbers, figures and words, made from its records."""

from typing import Any

import numpy as np
import pyarrow as pa

from probe.analysis.clustered import auroc_draws, auroc_of_cases, auroc_over_examples
from probe.analysis.lens import OTHER_PATCHES, OTHER_WORD, OWN, best_layer
from probe.analysis.stats import benjamini_hochberg, ends, sign_flip, wilson
from probe.plots import lens as plots
from probe.vocabulary import NORMS
from studies.objects import ABSENT, PRESENT, ROLES
from studies.run import Run
from studies.study import Setting, Summary
from studies.telling import above, below, bracketed
from studies.work import curve, interval, picked, skipped

KINDS = {"first": "the likeliest token", "among": "among the likeliest"}
NULLS = (OTHER_WORD, OTHER_PATCHES)


def summarise(rows: pa.Table, plan: Any, image_layer: int, seed: int) -> Summary:
    """Everything that the report says, as numbers."""
    objects = picked(rows, what="object", against=OWN)
    missing = skipped(rows)
    roles = [role for role in ROLES if len(picked(objects, role=role))]
    read = {role: _correspondence(picked(rows, what="object", role=role), seed) for role in roles}
    whole = {word: plan.spelling(word).whole for _, word in plan.read}
    return {
        "run": "", "n": len(set(objects["example"].to_pylist())), "n_objects": len(picked(objects, role="noun")),
        "n_skipped": len(missing), "skipped": missing, "n_words": len(whole), "n_in_pieces": sum(not one for one in whole.values()),
        "correspondence": read, "confidence": {norm: {role: _confidence(rows, norm, role, seed) for role in ROLES} for norm in NORMS},
        "erasure": _erasure(rows, image_layer, seed),
    }  # fmt: skip


# --- correspondence --------------------------------------------------------------------------------------------------


def _correspondence(rows: pa.Table, seed: int) -> dict[str, Any]:
    """Shares by layer and at each object's best layer, own beside nulls; paired differences over examples."""
    made: dict[str, Any] = {"n_objects": len(picked(rows, against=OWN))}
    own_best = {kind: _by_example(picked(rows, against=OWN), kind, best=True) for kind in KINDS}
    for kind in KINDS:
        own = _by_example(picked(rows, against=OWN), kind)
        found: dict[str, Any] = {"own": curve(np.array(list(own.values())), seed=seed)}
        found["own_at_best"] = interval(np.array(list(own_best[kind].values())), seed)
        for null in NULLS:
            arm = picked(rows, against=null)
            found[null] = _against(own, _by_example(arm, kind), own_best[kind], _by_example(arm, kind, best=True), seed)
        made[kind] = found
    layers = [best_layer(np.array(shares)) for shares in picked(rows, against=OWN)["among"].to_pylist()]
    known = [layer for layer in layers if not np.isnan(layer)]
    made["best_layer"] = interval(np.array(layers), seed)
    made["n_read"] = len(known)
    return made


def _by_example(rows: pa.Table, kind: str, best: bool = False) -> dict[str, np.ndarray]:
    """For each example the mean over its objects of their shares (layer), or of each object's share at its own best layer."""
    found: dict[str, list[np.ndarray]] = {}
    for example, shares in zip(rows["example"].to_pylist(), rows[kind].to_pylist(), strict=True):
        found.setdefault(example, []).append(np.max(shares) if best else np.array(shares))
    return {example: np.mean(each, axis=0) for example, each in found.items()}


def _against(own: dict, null: dict, own_best: dict, null_best: dict, seed: int) -> dict[str, Any] | None:
    """A null's curve, and how far the own word is above it, on the examples that have both; None where none has."""
    both = [example for example in own if example in null]
    if not both:
        return None
    gaps = np.array([own[example] - null[example] for example in both])
    p = sign_flip(gaps, seed)
    return {
        "curve": curve(np.array([null[example] for example in both]), seed=seed), "gap": curve(gaps, seed=seed),
        "q": benjamini_hochberg(p).tolist(), "at_best": interval(np.array([null_best[e] for e in both]), seed),
        "gap_at_best": interval(np.array([own_best[e] - null_best[e] for e in both]), seed),
    }  # fmt: skip


# --- confidence ------------------------------------------------------------------------------------------------------


def _confidence(rows: pa.Table, norm: str, role: str, seed: int) -> dict[str, Any] | None:
    """AUROC of confidence for present against absent words, of the same labels with another picture's confidence, and pointing."""
    own = picked(rows, what="confidence", norm=norm, role=role)
    names = own["example"].to_pylist()
    order = list(dict.fromkeys(names))
    number = {name: i for i, name in enumerate(order)}
    example = np.array([number[name] for name in names], dtype=np.int64)
    words, values = own["word"].to_pylist(), np.array(own["value"].to_pylist(), dtype=float)
    present = np.array(own["present"].to_pylist(), dtype=bool)
    if present.all() or not present.any():
        return None
    read = {(i, word): value for i, word, value in zip(example.tolist(), words, values.tolist(), strict=True)}
    strange = np.array(
        [read.get(((i + 1) % len(order), word), np.nan) for i, word in zip(example.tolist(), words, strict=True)]
    )
    hits = own.filter(pa.compute.is_valid(own["hit"]))
    hit, area = (_by_picture(hits, name) for name in ("hit", "area"))
    return {
        "auroc": _detected(values, present, example, seed), "n_present": int(present.sum()), "n_absent": int((~present).sum()),
        **_strange(values, strange, present, example, seed),
        "mean_present": float(values[present].mean()), "mean_absent": float(values[~present].mean()),
        "points": interval(hit, seed), "points_by_chance": interval(area, seed), "points_above_chance": interval(hit - area, seed),
    }  # fmt: skip


def _by_picture(rows: pa.Table, column: str) -> np.ndarray:
    """The mean over each picture's words (picture): words of one picture are not independent."""
    found: dict[str, list[float]] = {}
    for example, value in zip(rows["example"].to_pylist(), rows[column].to_pylist(), strict=True):
        found.setdefault(example, []).append(float(value))
    return np.array([np.mean(each) for each in found.values()])


def _strange(values: np.ndarray, strange: np.ndarray, present: np.ndarray, example: np.ndarray, seed: int) -> dict[str, Any]:
    """AUROC with another picture's confidence, and how far the picture's own is above it on the same cases and resamples."""
    known = ~np.isnan(strange)
    sides = (values[known], strange[known])
    if len(np.unique(example)) < 2 or present[known].all() or not present[known].any():
        return {"strange": None, "beyond_strange": None}
    own, other = (auroc_draws(side, present[known], example[known], seed) for side in sides)
    gap = auroc_of_cases(sides[0], present[known]) - auroc_of_cases(sides[1], present[known])
    low, high = ends(*np.nanpercentile(own - other, [2.5, 97.5]))
    n = len(np.unique(example[known]))
    return {
        "strange": _detected(sides[1], present[known], example[known], seed),
        "beyond_strange": {"value": gap, "low": low, "high": high, "n": n},
    }  # fmt: skip


def _detected(values: np.ndarray, present: np.ndarray, example: np.ndarray, seed: int) -> dict[str, Any]:
    value, *sides = (float(side) for side in auroc_over_examples(values, present, example, seed))
    low, high = ends(*sides)
    return {"value": value, "low": low, "high": high, "n": len(np.unique(example))}


# --- erasing ---------------------------------------------------------------------------------------------------------


def _erasure(rows: pa.Table, image_layer: int, seed: int) -> dict[str, Any]:
    """Change of the log-odds of yes by layer for each arm, own against the others on the same examples, and answers that turn."""
    found = picked(rows, what="erased")
    layers = sorted(set(found["layer"].to_pylist()))
    arms = {arm: _changes(picked(found, against=arm), layers) for arm in (OWN, PRESENT, ABSENT)}
    made: dict[str, Any] = {"layers": layers, "layer": image_layer, "curves": {}, "beyond": {}}
    for arm, changes in arms.items():
        if changes:
            made["curves"][arm] = curve(np.array(list(changes.values())), layers, seed)
    at = layers.index(image_layer)
    for arm in (PRESENT, ABSENT):
        both = [example for example in arms[OWN] if example in arms[arm]]
        if both:
            gaps = np.array([arms[OWN][example] - arms[arm][example] for example in both])
            made["beyond"][arm] = {
                "curve": curve(gaps, layers, seed), "q": benjamini_hochberg(sign_flip(-gaps, seed)).tolist(),
                "at_layer": interval(gaps[:, at], seed),
            }  # fmt: skip
    made["before"] = interval(
        np.array(
            picked(found, against=OWN)
            .filter(pa.compute.equal(picked(found, against=OWN)["layer"], image_layer))["before"]
            .to_pylist()
        ),
        seed,
    )
    made["in_vain"] = interval(np.array(picked(rows, what="in vain")["value"].to_pylist()), seed)
    made["own"] = interval(np.array([change[at] for change in arms[OWN].values()]), seed)
    made["turned"] = {arm: _turned(picked(found, against=arm), image_layer) for arm in arms if arms[arm]}
    return made


def _changes(rows: pa.Table, layers: list[int]) -> dict[str, np.ndarray]:
    """Example: change of the log-odds of yes (layer)."""
    found: dict[str, np.ndarray] = {}
    columns = (rows[name].to_pylist() for name in ("example", "layer", "before", "value"))
    for example, layer, before, after in zip(*columns, strict=True):
        found.setdefault(example, np.full(len(layers), np.nan))[layers.index(layer)] = after - before
    return found


def _turned(rows: pa.Table, layer: int) -> dict[str, Any]:
    """Of the answers that were yes before, the share that is no after, at one layer."""
    own = rows.filter(pa.compute.equal(rows["layer"], layer))
    pairs = zip(own["before"].to_pylist(), own["value"].to_pylist(), strict=True)
    after = [now for was, now in pairs if was > 0]
    hits = sum(now <= 0 for now in after)
    low, high = wilson(hits, len(after))
    return {"value": hits / len(after) if after else None, "low": low, "high": high, "n": len(after)}


# --- figures and words -----------------------------------------------------------------------------------------------


def figures(run: Run, rows: pa.Table, summary: Summary) -> None:
    run.figure("correspondence", *plots.correspondence(summary))
    if any(one for read in summary["confidence"].values() for one in read.values()):
        run.figure("confidence", *plots.confidence(summary))
    run.figure("erasing", *plots.erasing(summary))
    run.figure("words", *plots.words(drawn(rows)))


def drawn(rows: pa.Table) -> list[dict[str, Any]]:
    """The first objects: label, and what each of some patches reads as (layer patch), with its probability."""
    own = picked(rows, what="drawn")
    found: dict[str, dict[str, Any]] = {}
    for example, label, texts, chances in zip(
        *(own[name].to_pylist() for name in ("example", "text", "texts", "first")), strict=True
    ):
        one = found.setdefault(example, {"label": label, "texts": [], "chances": []})
        one["texts"].append(texts)
        one["chances"].append(chances)
    return list(found.values())


def report(summary: Summary, setting: Setting, plan: Any) -> str:
    """The question, what was found on each part with its null, and the figures."""
    lines = [
        "# Lens", "", "*Which words does each position of what is shown become, and at which layer?*", "",
        f"{summary['n']} pictures of `{setting.data.name}` shown to `{setting.subject.name}`, {summary['n_objects']} objects with boxes, "
        f"{summary['n_words']} words looked for.", "",
    ]  # fmt: skip
    if summary["n_skipped"]:
        lines += [f"{summary['n_skipped']} examples could not be used; the first: {summary['skipped'][0]}", ""]
    if summary["n_in_pieces"]:
        lines += [
            f"{summary['n_in_pieces']} words are spelled in pieces and read by their first piece, which other words share.",
            "",
        ]
    lines += ["## Do an object's patches become its word?", "", *_said_of_words(summary, plan), ""]
    lines += ["![correspondence](figures/correspondence.png)", ""]
    lines += [
        "Share of an object's patches that read as its word, by layer. Dashed: a word of the same sort that does not fit the picture, on the "
        "same patches, and the object's word on as many patches elsewhere.", "",
        "![words](figures/words.png)", "", "The likeliest token of some patches of the first objects, darker where likelier.", "",
    ]  # fmt: skip
    lines += ["## Does confidence tell what is there from what is not?", "", *_said_of_confidence(summary), ""]
    lines += ["## Does an object go when its word is erased?", "", *_said_of_erasing(summary, plan), ""]
    return "\n".join([*lines, "![erasing](figures/erasing.png)", "", _ERASED, ""])


_ERASED = (
    "Change of the log-odds of yes against no, in nats, for a question for an object that is there, when a word's direction is taken out "
    "of the picture's states after a layer. The claim is the distance of the first line from the others."
)


def _range(one: dict[str, Any], form: str = ".3f") -> str:
    if one["value"] is None:
        return "not known"
    return bracketed(one, form)


def _clear(one: dict[str, Any] | None) -> bool:
    return one is not None and above(one)


def _said_of_words(summary: Summary, plan: Any) -> list[str]:
    lines = []
    for role, found in summary["correspondence"].items():
        among = found["among"]
        gaps = [among[null]["gap_at_best"] for null in NULLS if among[null]]
        verdict = "They do, above every null" if gaps and all(map(_clear, gaps)) else "Not beyond every null"
        elsewhere = among[OTHER_PATCHES]
        if elsewhere and below(elsewhere["gap_at_best"]):
            gap = elsewhere["gap_at_best"]
            more = {
                **gap,
                **{a: None if gap[b] is None else -gap[b] for a, b in (("value", "value"), ("low", "high"), ("high", "low"))},
            }
            verdict = (
                "The reverse: as many patches elsewhere in the picture read the object's word more often than its own patches do, by "
                f"{_range(more)} (paired)"
            )
        elif elsewhere and elsewhere["gap_at_best"]["value"] is not None and elsewhere["gap_at_best"]["value"] < 0:
            verdict += ", and on the mean the word is read more often elsewhere in the picture (the interval of the difference includes zero)"
        nulls = "; ".join(
            f"{null} {_range(among[null]['at_best'])}, the own less it {_range(among[null]['gap_at_best'], '+.3f')}" for null in NULLS if among[null]
        ) or "no null is known"  # fmt: skip
        lines.append(
            f"- **{role}** ({found['n_objects']} objects, n = {summary['n']} pictures). {verdict}: at its best layer, {_range(among['own_at_best'])} of "
            f"an object's patches have its word among the {plan.top} likeliest tokens, {_range(found['first']['own_at_best'])} as the likeliest. The same "
            f"choice of the best layer gives, as nulls: {nulls}. Mean best layer {_range(found['best_layer'], '.1f')} of 0 to "
            f"{plan.subject.n_layers - 1}, over the {found['n_read']} objects that are read at all."
        )
    return lines


def _said_of_confidence(summary: Summary) -> list[str]:
    lines = []
    for norm, roles in summary["confidence"].items():
        for role, found in roles.items():
            if found is None:
                continue
            strange, own = found["strange"], found["auroc"]
            beyond = found["beyond_strange"]
            verdict = "It does" if above(own, 0.5) and _clear(beyond) else "Not beyond its null"
            against = (
                f"; with another picture's confidence {_range(strange)}, a difference of {_range(beyond)}" if strange else ""
            )
            lines.append(
                f"- **{role}, norm {norm}**. {verdict}: AUROC {_range(own)} (n = {own['n']} pictures, {found['n_present']} words present, "
                f"{found['n_absent']} absent){against}. A present word is most likely inside its own box {_range(found['points'])} of the time, "
                f"by area {_range(found['points_by_chance'])}."
            )
    if not lines:
        return [
            "No word is known to be absent from a picture: name everything that is shown (`--complete`), or ask for what is not there."
        ]
    return [*lines, "", "![confidence](figures/confidence.png)", "",
            "AUROC of the highest probability of a word over positions and layers, and of the same labels with another picture's confidence, which "
            "shows what the words alone are worth."]  # fmt: skip


def _said_of_erasing(summary: Summary, plan: Any) -> list[str]:
    found = summary["erasure"]
    beyond = {arm: one["at_layer"] for arm, one in found["beyond"].items()}
    gone = beyond and all(below(one) for one in beyond.values())
    verdict = "It goes, further than with other words" if gone else "Not beyond what erasing other words does"
    turned = found["turned"][OWN]
    against = "; ".join(f"against {arm} {_range(one)}" for arm, one in beyond.items()) or "no other word is known"
    return [
        f"{verdict}: erased after layer {found['layer']} with alpha {plan.alpha:g} along its {plan.direction}"
        + (f" of text layer {plan.text_layer}" if plan.direction == "state" else "")
        + f", the log-odds of yes to a question for an object change by {_range(found['own'])} nats (n = {found['own']['n']}) from "
        f"{_range(found['before'], '.2f')}; {against} (paired, 95 % intervals). Asked for what is not there, they are "
        f"{_range(found['in_vain'], '.2f')}. Of {turned['n']} answers that were yes, {_range(turned)} turn to no."
    ]
