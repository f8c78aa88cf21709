"""The implicit-alignment study's numbers, figures and words, made from its records."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from probe.alignment import INTERVALS, SIDES
from probe.analysis.alignment import (
    DIAGONAL,
    MODES,
    NORMS,
    in_the_plane,
    layers_for_vocabulary,
    mean_over_pairs,
    mean_over_unmatched,
    of_centroids,
)
from probe.analysis.stats import RESAMPLES, benjamini_hochberg, bootstrap_mean, correlate, sign_flip
from probe.errors import DataError
from probe.plots import alignment as plots
from probe.plots import family
from probe.sites import SITES
from studies.implicit_alignment_weights import weights as overlaps
from studies.implicit_alignment_words import report
from studies.modalities import Part
from studies.run import Run
from studies.study import Summary
from studies.work import interval, picked, share, skipped

__all__ = ["figures", "report", "summarise"]
SKILLS = ("accuracy", "existence", "hallucination")
TESTED = ("accuracy", "hallucination")  # what the paper claims of
READINGS = ("input", "same")
GROUPS = 32  # of examples, each left out once for the interval of what is of all examples together
STREAM = ("in", "mid", "out")  # sites of the residual stream; the others lie inside a block


def summarise(rows: pa.Table, parts: Sequence[Part], sparsity: float, seed: int) -> Summary:
    """Everything that the report says, as numbers. Raises DataError when no example of a modality could be used."""
    found = {part.modality: _modality(picked(rows, modality=part.modality), part, seed) for part in parts}
    first = found[parts[0].modality]
    weights = overlaps(rows, parts, sparsity, seed)
    members = _members(rows, seed)
    return {
        "run": "", "n": sum(one["n"] for one in found.values()),
        "score": {name: one["score"] for name, one in found.items()},
        "matched": first["similar"]["avg"]["matched"]["mean"], "unmatched": first["similar"]["avg"]["unmatched"]["mean"],
        "p_value": first["similar"]["avg"]["p"],
        "iou": weights["across"], "chance_iou": weights["chance"], "permuted_iou": weights["permuted"],
        "magnitude_iou": weights["magnitude"], "correlation": members["correlation"],
        "modalities": found, "spaces": _spaces(rows, parts), "plane": _plane(rows, parts, seed), "weights": weights, "members": members["members"],
        "growth": _growth(members["members"]),
    }  # fmt: skip


# --- one modality ----------------------------------------------------------------------------------------------------


def _curves(rows: pa.Table, what: str, key: str) -> np.ndarray:
    """(example layer) of one curve, the examples in the order of the records; NaN where a layer has no such value."""
    found = picked(rows, what=what, key=key)["values"].to_pylist()
    return np.array([[np.nan if value is None else value for value in row] for row in found], dtype=np.float64)


def _curve(values: np.ndarray, seed: int) -> dict[str, Any]:
    """Mean and interval over examples at each layer; None throughout where there are none."""
    if not values.size:
        return {"mean": None, "low": None, "high": None, "n": 0}
    known = ~np.isnan(values).all(0)
    made = {name: np.full(values.shape[1], np.nan) for name in ("mean", "low", "high")}
    if known.any():
        for name, side in zip(made, bootstrap_mean(values[:, known], seed), strict=True):
            made[name][known] = side
    return {**{name: side.tolist() for name, side in made.items()}, "n": len(values)}


def _modality(rows: pa.Table, part: Part, seed: int) -> Summary:
    matched = _curves(rows, "similar", "matched/avg")
    if not matched.size:
        reason = next(iter(skipped(rows)), "the data set is empty")
        raise DataError(f"none of the {len(part.data)} {part.modality} examples could be used; the first: {reason}")
    similar = {mode: _paired(rows, "similar", mode, seed) for mode in MODES}
    similar["global"] = _global(rows, *matched.shape)
    return {
        "model": part.subject.name, "data": part.data.name, "n": len(matched), "n_skipped": len(skipped(rows)),
        "skipped": skipped(rows),
        "similar": similar, "score": _score(rows, seed),
        "sites": {site: _site(rows, site, seed) for site in SITES}, "inside": _inside(rows, seed),
        "norm": {side: {kind: _curve(_curves(rows, "norm", f"{side}/{kind}"), seed) for kind in NORMS} for side in SIDES},
        "drift": {
            side: {str(n): _drift(rows, f"{side}/{n}", seed) for n in INTERVALS} for side in SIDES
        },
        "words": {
            "states": layers_for_vocabulary(part.subject.n_layers + 1),
            **{
                reading: {kind: _curve(_curves(rows, "words", f"{reading}/{kind}"), seed) for kind in _KINDS}
                for reading in READINGS
            },
        },
        "within": _within(rows), "within_interval": {side: _within_interval(rows, side, seed) for side in SIDES},
        "pairs": _pairs(rows, matched),
    }  # fmt: skip


def _drift(rows: pa.Table, of: str, seed: int) -> dict[str, Any]:
    """How like itself a token stays at each state, averaged over an example's tokens; under `modes` in every way, each with its mean over states."""
    modes = {}
    for mode in ("avg", *DIAGONAL):
        values = _curves(rows, "drift", f"{of}/{mode}")
        overall = interval(np.nanmean(values, 1), seed) if values.size else None
        modes[mode] = {**_curve(values, seed), "overall": overall}
    return {**{key: modes["diag_mean"][key] for key in ("mean", "low", "high", "n")}, "modes": modes}


_KINDS = ("kl_zipped", "kl_of_means", "js_of_means", "entropy_p", "entropy_t")


def _paired(rows: pa.Table, what: str, key: str, seed: int) -> dict[str, Any]:
    """Matched beside unmatched, their difference, and the test that it is above zero at each layer, with q-values over layers."""
    matched, other = _curves(rows, what, f"matched/{key}"), _curves(rows, what, f"unmatched/{key}")
    made = {"matched": _curve(matched, seed), "unmatched": _curve(other, seed)}
    if other.shape != matched.shape:
        return {**made, "gap": _curve(np.empty((0, 0)), seed), "p": None, "q": None}
    p = sign_flip(matched - other, seed)
    return {**made, "gap": _curve(matched - other, seed), "p": p.tolist(), "q": benjamini_hochberg(p).tolist()}


def _score(rows: pa.Table, seed: int) -> dict[str, Any]:
    """Both readings of the score: the perceptual side as it enters the model, or at the same layer as the words."""
    made = {}
    for reading, what, key in (("input", "from_input", ""), ("same", "similar", "/avg")):
        matched, other = (_curves(rows, what, pairing + key) for pairing in ("matched", "unmatched"))
        own = np.nanmean(matched, 1)
        theirs = np.nanmean(other, 1) if other.shape == matched.shape else None
        made[reading] = {
            **interval(own, seed), "unmatched": None if theirs is None else interval(theirs, seed),
            "gap": None if theirs is None else interval(own - theirs, seed),
        }  # fmt: skip
    return made


def _site(rows: pa.Table, site: str, seed: int) -> dict[str, Any] | None:
    """A site's similarity averaged over the layers that have it, with the gap to unmatched pairs; None where no layer has it."""
    matched, other = _curves(rows, "site", f"matched/{site}"), _curves(rows, "site", f"unmatched/{site}")
    known = ~np.isnan(matched).all(0) if matched.size else np.zeros(0, bool)
    if not known.any():
        return None
    own = matched[:, known].mean(1)
    made: dict[str, Any] = {
        "matched": interval(own, seed),
        "layers": np.nonzero(known)[0].tolist(),
        "unmatched": None,
        "gap": None,
    }
    if other.shape == matched.shape:
        theirs = other[:, known].mean(1)
        made |= {"unmatched": interval(theirs, seed), "gap": interval(own - theirs, seed)}
    return made


def _inside(rows: pa.Table, seed: int) -> dict[str, Any] | None:
    """The gap between matched and unmatched pairs, averaged over the sites inside the block and over those of the stream, and the
    difference of the two example by example; None where there are no unmatched pairs.
    """
    gaps: dict[str, list[np.ndarray]] = {"inside": [], "outside": []}
    for site in SITES:
        matched, other = _curves(rows, "site", f"matched/{site}"), _curves(rows, "site", f"unmatched/{site}")
        known = ~np.isnan(matched).all(0) if matched.size else np.zeros(0, bool)
        if known.any() and other.shape == matched.shape:
            gaps["outside" if site in STREAM else "inside"].append((matched - other)[:, known].mean(1))
    if not all(gaps.values()):
        return None
    inside, outside = (np.mean(found, 0) for found in gaps.values())
    return {
        "inside": interval(inside, seed),
        "outside": interval(outside, seed),
        "difference": interval(inside - outside, seed),
    }


# --- over pairs of examples, from sums ---------------------------------------------------------------------------------


def _sums(rows: pa.Table, side: str, half: int | None = None) -> tuple[np.ndarray, int]:
    """The sum of unit mean states (state width) of one side, and of how many examples."""
    keys = [f"{side}/{half}"] if half is not None else [f"{side}/0", f"{side}/1"]
    total, count = None, 0
    for key in keys:
        own = picked(rows, what="sum", key=key)
        for vector, n in zip(own["vector"], own["n"].to_pylist(), strict=True):
            found = vector.values.to_numpy().astype(np.float64)
            total, count = found if total is None else total + found, count + n
    states = len(picked(rows, what="similar", key="matched/avg")["values"][0])
    return (np.zeros((states, 1)) if total is None else total.reshape(states, -1)), count


def _within(rows: pa.Table) -> dict[str, list[float] | None]:
    """How like tokens of one side are over different examples: even against odd ones."""
    made: dict[str, list[float] | None] = {}
    for side in SIDES:
        (a, n), (b, m) = _sums(rows, side, 0), _sums(rows, side, 1)
        made[side] = mean_over_pairs(torch.tensor(a), torch.tensor(b), n, m).tolist() if n and m else None
    return made


def _within_interval(rows: pa.Table, side: str, seed: int) -> dict[str, Any] | None:
    """The same with a bootstrap interval over units of examples (only sums of units are kept); None with fewer than four units.

    No example meets itself however often its unit is drawn, since even ones meet odd ones.
    """
    states = len(picked(rows, what="similar", key="matched/avg")["values"][0])
    halves = [picked(rows, what="sum", key=f"{side}/{half}") for half in (0, 1)]
    if min(len(half) for half in halves) < 4 or len(halves[0]) != len(halves[1]):
        return None
    even, odd = (
        np.stack([v.values.to_numpy().astype(np.float64).reshape(states, -1) for v in half["vector"]]) for half in halves
    )
    n, m = (half["n"].to_numpy().astype(np.float64) for half in halves)
    products = np.einsum("usw,vsw->suv", even, odd)
    weights = np.random.default_rng(seed).multinomial(len(n), np.full(len(n), 1 / len(n)), size=RESAMPLES).astype(np.float64)
    drawn = np.einsum("bu,suv,bv->bs", weights, products, weights, optimize=True) / ((weights @ n) * (weights @ m))[:, None]
    low, high = np.percentile(drawn, [2.5, 97.5], axis=0)
    mean = products.sum((1, 2)) / (n.sum() * m.sum())
    return {"mean": mean.tolist(), "low": low.tolist(), "high": high.tolist(), "n": len(n)}


def _pairs(rows: pa.Table, matched: np.ndarray) -> dict[str, list[float] | None]:
    """The published reading: the mean over every pair of examples, matched or not; and over the unmatched ones alone."""
    (p, n), (t, _) = _sums(rows, "perceptual"), _sums(rows, "textual")
    everything = mean_over_pairs(torch.tensor(p), torch.tensor(t), n, n).tolist()
    if n < 2:
        return {"all": everything, "unmatched": None}
    others = mean_over_unmatched(torch.tensor(p), torch.tensor(t), torch.tensor(matched.sum(0)), n)
    return {"all": everything, "unmatched": others.tolist()}


def _global(rows: pa.Table, examples: int, states: int) -> dict[str, Any]:
    """The mode `global` at each state, its interval by a jackknife over groups of units; no interval with fewer than four of them.

    All None where some of the examples were read before sums of all tokens were kept.
    """
    own = [picked(rows, what="centroid", key=side) for side in SIDES]
    numbers = own[0]["n"].to_pylist()
    if sum(numbers) != examples:
        return {"mean": None, "low": None, "high": None, "n": 0, "groups": 0}
    groups = min(GROUPS, len(numbers))
    counts = [sum(numbers[i::groups]) for i in range(groups)]
    p, t = (_by_group(side["vector"], groups, states) for side in own)
    found = of_centroids(p, t, counts)
    low, high = (None if np.isnan(end).all() else end.tolist() for end in (found.low, found.high))
    return {"mean": found.value.tolist(), "low": low, "high": high, "n": examples, "groups": groups}


def _by_group(vectors: pa.ChunkedArray, groups: int, states: int) -> np.ndarray:
    """Sums of states added up by group (group state width), one unit after the other."""
    made = np.zeros((groups, states, len(vectors[0]) // states))
    for i, vector in enumerate(vectors):
        made[i % groups] += vector.values.to_numpy().reshape(states, -1)
    return made


def _plane(rows: pa.Table, parts: Sequence[Part], seed: int) -> dict[str, Any]:
    """Mean tokens in two dimensions: by state and way, the points of each kind, an example after the other."""
    kinds = [(part.modality, side) for part in parts for side in SIDES]
    own = picked(rows, what="plane")
    states = sorted({int(key.split("/")[1]) for key in own["key"].to_pylist()})
    points = {}
    for state in states:
        found = [picked(own, modality=name, key=f"{side}/{state}")["vector"] for name, side in kinds]
        width = len(next(v for one in found for v in one))
        clouds = [np.array([v.values.to_numpy() for v in one], dtype=np.float64).reshape(-1, width) for one in found]
        points[str(state)] = {
            way: {f"{name} {side}": cloud.tolist() for (name, side), cloud in zip(kinds, flat, strict=True)}
            for way, flat in in_the_plane(clouds, seed).items()
        }
    return {
        "n": max((len(one) for ways in points.values() for each in ways.values() for one in each.values()), default=0),
        "states": points,
    }


def _spaces(rows: pa.Table, parts: Sequence[Part]) -> dict[str, Any]:
    """Similarity of every kind of token with every other over all pairs of examples, at the input, the middle and the end."""
    kinds = [(part.modality, side) for part in parts for side in SIDES]
    own = {part.modality: picked(rows, modality=part.modality) for part in parts}
    sums = {kind: _sums(own[kind[0]], kind[1]) for kind in kinds}
    states = len(next(iter(sums.values()))[0])
    chosen = {"input": 0, "middle": states // 2, "end": states - 1}
    tables = {}
    for name, index in chosen.items():
        table = np.full((len(kinds), len(kinds)), np.nan)
        for i, a in enumerate(kinds):
            for j, b in enumerate(kinds):
                if i == j:
                    within = _within(own[a[0]])[a[1]]
                    table[i, j] = np.nan if within is None else within[index]
                else:
                    (x, n), (y, m) = sums[a], sums[b]
                    table[i, j] = float(mean_over_pairs(torch.tensor(x[index]), torch.tensor(y[index]), n, m))
        tables[name] = table.tolist()
    return {"kinds": [f"{modality} {side}" for modality, side in kinds], "states": chosen, "tables": tables}


# --- a family --------------------------------------------------------------------------------------------------------


def _members(rows: pa.Table, seed: int) -> Summary:
    """Each member's scores and skills, and their correlation over the family."""
    own = picked(rows, what="member")
    names = list(dict.fromkeys(own["example"].to_pylist()))
    members = []
    for name in names:
        found = picked(own, example=name)
        values = dict(zip(found["key"].to_pylist(), found["values"].to_pylist(), strict=True))
        read = {key: share if key in SKILLS else interval for key in values}  # skills are shares of questions
        members.append({"name": name, **{key: read[key](np.array(v), seed) if v else None for key, v in values.items()}})
    correlation: dict[str, Any] = {}
    for reading in READINGS:
        for skill in SKILLS:
            pairs = [(m[reading]["value"], m[skill]["value"]) for m in members if m.get(reading) and m.get(skill)]
            a, b = (np.array(side) for side in zip(*pairs, strict=True)) if pairs else (np.empty(0), np.empty(0))
            pearson, ranks = correlate(a, b, seed=seed), correlate(a, b, rank=True, seed=seed)
            correlation[f"{reading} and {skill}"] = {
                "pearson": pearson.value, "low": pearson.low, "high": pearson.high, "p_value": pearson.p, "n": pearson.n,
                "spearman": ranks.value, "spearman_low": ranks.low, "spearman_high": ranks.high,
            }  # fmt: skip
    tested = [f"{reading} and {skill}" for skill in TESTED for reading in READINGS]
    q = benjamini_hochberg(np.array([correlation[name]["p_value"] for name in tested], dtype=float))
    for name, value in zip(tested, q, strict=True):
        correlation[name]["q"] = float(value)
    return {"members": members, "correlation": correlation if members else None}


def _growth(members: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Score and skills along each training of which steps (`NAME@STEP`) are among the members, its end last where that is one too."""
    named = {one["name"]: one for one in members}
    saved: dict[str, list[int]] = {}
    for name in named:
        training, at, step = name.rpartition("@")
        if at and step.isdigit():
            saved.setdefault(training, []).append(int(step))
    found = {}
    for training, steps in saved.items():
        path = {str(step): named[f"{training}@{step}"] for step in sorted(steps)}
        path |= {"end": named[training]} if training in named else {}
        if len(path) > 2:
            along = {key: _along(list(path.values()), key) for key in (*READINGS, *SKILLS)}
            found[training] = {"steps": list(path), **along}
    return found


def _along(path: Sequence[Mapping[str, Any]], key: str) -> dict[str, Any] | None:
    """One number of each model in turn, as a curve; an end that a model lacks is the number itself."""
    found = [one[key] for one in path if one.get(key)]
    if len(found) < len(path):
        return None
    ends = {side: [one["value"] if one[side] is None else one[side] for one in found] for side in ("low", "high")}
    return {"mean": [one["value"] for one in found], **ends, "n": min(one["n"] for one in found)}


# --- what is drawn ---------------------------------------------------------------------------------------------------


def figures(run: Run, summary: Summary) -> None:
    """The figures of a run; those about what it does not have are left out."""
    drawn = [("alignment", plots.similarity), ("inside-the-block", plots.sites), ("spaces", plots.spaces), ("plane", plots.plane),
             ("norms-and-drift", plots.norms), ("vocabulary", plots.vocabulary)]  # fmt: skip
    if summary["weights"]["n_matrices"]:
        drawn.append(("weights", plots.weights))
    if len(summary["members"]) > 1:
        drawn.append(("score-and-skill", family.members))
    if summary["growth"]:
        drawn.append(("growth", family.growth))
    for name, draw in drawn:
        run.figure(name, *draw(summary))
