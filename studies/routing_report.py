"""The routing study's numbers, figures and words, made from its records."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from probe.analysis.routing import balance, paired_differences, rule_of_three
from probe.analysis.stats import benjamini_hochberg, sign_flip
from probe.plots import routing as plots
from probe.routing import GROUPS
from studies.run import Run
from studies.study import Setting, Summary
from studies.telling import above, ranged
from studies.work import curve, interval, picked, skipped

LEVEL, TWICE = 0.05, 2.0  # a unit leans to a modality: false discovery rate, and how many times as often it is used
COLUMNS, QUANTILES = 64, 21  # more units than these are shown as quantiles


def summarise(rows: pa.Table, kind: str, layers: Sequence[int], n_layers: int, share: float, seed: int) -> Summary:
    """Everything that the report says, as numbers."""
    spread = picked(rows, what="spread")
    found = {
        name: np.array(picked(spread, key=name)["values"].to_pylist(), dtype=np.float64)
        for name in ("js", "mi", "js_null", "mi_null")
    }
    sums = _sums(rows)
    tokens = {m: sums["uses", m, layers[0]][1] for m in GROUPS if ("uses", m, layers[0]) in sums}
    media = [m for m in tokens if m != "text"]
    specialised = {name: _measure(found[name], found[f"{name}_null"], layers, seed) for name in ("js", "mi")}
    units = [len(sums["uses", "text", layer][0]) for layer in layers]
    return {
        "run": "", "n": len(found["js"]), "units": kind, "share": share if kind == "neurons" else None, "layers": list(layers),
        "n_layers": n_layers, "n_units": units, "tokens": tokens,
        "js": specialised["js"]["overall"], "js_null": specialised["js"]["overall_null"], "js_gap": specialised["js"]["overall_gap"],
        "clear_layers": sum(q is not None and q < LEVEL for q in specialised["js"]["q"]),
        "specialised": specialised, "media": _media(sums, media, layers),
        "balance": {m: [_balance(sums["uses", m, layer][0]) for layer in layers] for m in tokens},
        "weight": {m: [_per_use(sums, m, layer) for layer in layers] for m in tokens},
        "unused": {m: _unused(sums, m, layers, len(found["js"]), rows) for m in tokens},
        "n_skipped": len(skipped(rows)), "skipped": skipped(rows),
    }  # fmt: skip


def _sums(rows: pa.Table) -> dict[tuple[str, str, int], tuple[np.ndarray, int]]:
    """(what, modality, layer): the sum over all units of work, and over how many tokens or examples."""
    found: dict[tuple[str, str, int], tuple[np.ndarray, int]] = {}
    own = picked(rows, what="sum")
    for key, modality, layer, vector, n in zip(
        *(own[name].to_pylist() for name in ("key", "modality", "layer")), own["vector"], own["n"].to_pylist(), strict=True
    ):
        values = vector.values.to_numpy().astype(np.float64)
        before, count = found.get((key, modality, layer), (np.zeros_like(values), 0))
        found[key, modality, layer] = (before + values, count + n)
    return found


def _measure(own: np.ndarray, null: np.ndarray, layers: Sequence[int], seed: int) -> dict[str, Any]:
    """A measure at each layer beside its null, the test that it is above it, with q-values over layers; and over all layers."""
    p = sign_flip(own - null, seed)
    return {
        "own": curve(own, layers, seed), "null": curve(null, layers, seed), "gap": curve(own - null, layers, seed),
        "p": p.tolist(), "q": benjamini_hochberg(p).tolist(), "overall": interval(own.mean(1), seed),
        "overall_null": interval(null.mean(1), seed), "overall_gap": interval((own - null).mean(1), seed),
    }  # fmt: skip


def _balance(uses: np.ndarray) -> float | None:
    value = float(balance(uses[None])[0])
    return None if np.isnan(value) else value


def _per_use(sums: Mapping[tuple[str, str, int], tuple[np.ndarray, int]], m: str, layer: int) -> float | None:
    """The mean weight (magnitude) with which a token of a modality uses a unit that it uses."""
    uses = float(sums["uses", m, layer][0].sum())
    return float(sums["weight", m, layer][0].sum()) / uses if uses else None


# --- what each unit is used by ---------------------------------------------------------------------------------------


def _media(
    sums: Mapping[tuple[str, str, int], tuple[np.ndarray, int]], media: Sequence[str], layers: Sequence[int]
) -> dict[str, Any]:
    """Each medium beside the words: the difference of every unit's use, and how many units lean which way."""
    made = {}
    for m in media:
        gaps, tests = [], []
        for layer in layers:
            total, n = sums["gap", m, layer]
            mean, p = paired_differences(total, sums["gap_squared", m, layer][0], n)
            gaps.append(mean)
            tests.append(p)
        q = np.split(benjamini_hochberg(np.concatenate(tests)), np.cumsum([len(t) for t in tests])[:-1])
        leans = [_lean(sums, m, layer, found) for layer, found in zip(layers, q, strict=True)]
        made[m] = {
            "table": [_columns(gap) for gap in gaps], "quantiles": max(len(gap) for gap in gaps) > COLUMNS,
            "n": sums["gap", m, layers[0]][1], "n_tests": sum(len(t) for t in tests),
            "to_medium": [a for a, _ in leans], "to_text": [b for _, b in leans],
        }  # fmt: skip
    return made


def _lean(
    sums: Mapping[tuple[str, str, int], tuple[np.ndarray, int]], m: str, layer: int, q: np.ndarray
) -> tuple[float, float]:
    """The shares of a layer's units that clearly lean to a medium, and to words: used at least twice as often."""
    (own, a), (text, b) = sums["uses", m, layer], sums["uses", "text", layer]
    mine, theirs = own / a, text / b
    clear = np.nan_to_num(q, nan=1.0) < LEVEL
    return float((clear & (mine > theirs) & (mine >= TWICE * theirs)).mean()), float(
        (clear & (theirs > mine) & (theirs >= TWICE * mine)).mean()
    )


def _columns(gap: np.ndarray) -> list[float]:
    """A unit's difference in each column; many units as evenly spaced quantiles, the least first."""
    found = gap if len(gap) <= COLUMNS else np.quantile(gap, np.linspace(0, 1, QUANTILES))
    return [float(value) for value in found]


def _unused(
    sums: Mapping[tuple[str, str, int], tuple[np.ndarray, int]], m: str, layers: Sequence[int], n: int, rows: pa.Table
) -> dict[str, Any]:
    """Units that a modality never used, out of how many, over how many tokens of how many examples, with the bound on their use."""
    none = [int((sums["uses", m, layer][0] == 0).sum()) for layer in layers]
    units = [len(sums["uses", m, layer][0]) for layer in layers]
    tokens = sums["uses", m, layers[0]][1]
    examples = len(picked(rows, what="tokens", modality=m))
    return {
        "by_layer": [a / b for a, b in zip(none, units, strict=True)], "units": sum(none), "of": sum(units), "tokens": tokens,
        "examples": examples, "bound": rule_of_three(tokens), "bound_examples": rule_of_three(examples),
    }  # fmt: skip


# --- figures and words -----------------------------------------------------------------------------------------------


def figures(run: Run, summary: Mapping[str, Any]) -> None:
    """All figures of the study."""
    run.figure("divergence", *plots.divergence_figure(summary))
    run.figure("differences", *plots.differences_figure(summary))
    run.figure("leanings", *plots.leanings_figure(summary))
    run.figure("balance", *plots.balance_figure(summary))


def report(summary: Mapping[str, Any], setting: Setting) -> str:
    """The question, the answer in a sentence, and each figure with what it shows."""
    noun, name = summary["units"], setting.subject.name
    dense = noun == "neurons"
    title = "# Neurons by modality (this model has no experts)" if dense else "# Experts by modality"
    tokens = ", ".join(f"{n} of {m}" for m, n in summary["tokens"].items())
    lines = [title, "", f"*Do experts specialise by modality?* {_answer(summary)}", "",
             f"`{name}` on {summary['n']} examples of `{setting.data.name}`; tokens: {tokens}. Words are all segments of text but the beginning of "
             "the sequence; separators and padding belong to none.", ""]  # fmt: skip
    if dense:
        lines += [f"`{name}` has no mixture of experts: the neurons of its feed-forward blocks are read in place of experts. A token uses the "
                  f"{summary['share']:.0%} of a layer's neurons with the greatest magnitude.", ""]  # fmt: skip
    if left := summary["n_layers"] - len(summary["layers"]):
        lines += [f"{left} of {summary['n_layers']} layers have no {noun} to read and are left out.", ""]
    if summary["n_skipped"]:
        lines += [f"- {summary['n_skipped']} examples could not be used; the first: {summary['skipped'][0]}", ""]
    return "\n".join([*lines, *_divergence(summary), *_differences(summary), *_balances(summary)]) + "\n"


def _answer(summary: Mapping[str, Any]) -> str:
    gap, noun = summary["js_gap"], summary["units"]
    told = (
        f"the Jensen-Shannon divergence between the modalities' {noun} is {_number(summary['js'])} nats, with labels moved along the sequence "
        f"{_number(summary['js_null'])} (n = {summary['n']}; above it at {summary['clear_layers']} of {len(summary['layers'])} layers at q < {LEVEL})"
    )
    if above(gap) and summary["clear_layers"]:
        return f"Yes, in part: {told}."
    return f"Nothing clear was found: {told}."


def _number(one: Mapping[str, Any]) -> str:
    return ranged(one)


def _divergence(summary: Mapping[str, Any]) -> list[str]:
    own = summary["specialised"]["js"]["gap"]["mean"]
    top = summary["layers"][int(np.argmax([value if value is not None else -1.0 for value in own]))]
    mi = summary["specialised"]["mi"]
    return [
        "## By layer", "", "![divergence](figures/divergence.png)", "",
        f"Each example's own divergence and information, averaged, with 95 % intervals over examples; the null moves the labels of the same example's "
        f"tokens along its sequence, which keeps neighbours together. The divergence is furthest above it at layer {top}. A use tells "
        f"{_number(mi['overall'])} nats about its token's modality, with moved labels {_number(mi['overall_null'])}. States that differ by modality are enough for this, under an untrained router too: it says that "
        f"the {summary['units']} are divided, not that training divided them.", "",
    ]  # fmt: skip


def _differences(summary: Mapping[str, Any]) -> list[str]:
    lines = ["## Unit by unit", "", "![differences](figures/differences.png)", ""]
    for m, one in summary["media"].items():
        order = "each row sorted, as quantiles" if one["quantiles"] else "in the model's order"
        lines += [
            f"How much more often a token of {m} uses each of the {summary['units']} than a word does ({order}). {np.mean(one['to_medium']):.1%} of them lean "
            f"to {m} and {np.mean(one['to_text']):.1%} to words: at least twice as often, at a false discovery rate below {LEVEL} over "
            f"{one['n_tests']} paired tests on {one['n']} examples.", "",
        ]  # fmt: skip
    return [*lines, "![leanings](figures/leanings.png)", "", "The share of each layer that leans either way.", ""]


def _balances(summary: Mapping[str, Any]) -> list[str]:
    lines = [
        "## Balance, and units never used", "", "![balance](figures/balance.png)", "",
        "Evenness is the entropy of a modality's uses over that of an even spread (1: all units alike). It needs many tokens to be seen: compare "
        "modalities with their numbers in mind.", "",
    ]  # fmt: skip
    for m, one in summary["unused"].items():
        lines.append(
            f"- {m}: {one['units']} of {one['of']} {summary['units']} were never used, over {one['tokens']} tokens of {one['examples']} examples; such a unit is used by "
            f"at most {one['bound']:.2%} of tokens if tokens were independent draws, and in at most {one['bound_examples']:.0%} of examples (95 %)"
        )
    return [*lines, ""]
