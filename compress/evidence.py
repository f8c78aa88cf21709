"""Evidence that passes ask for by name: `gather` finds it with the functions of one table.

A source gives its own entry and may give others beside it (an interval); what a pass reads is the entry of its name.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from compress import layer_scores as scoring
from compress.calibration import Calibration
from compress.passes.base import Evidence
from probe.analysis.stats import bootstrap_mean
from probe.errors import PassError, did_you_mean
from probe.example import Example
from probe.subject import Subject

MOST = 64  # examples that evidence is gathered from, drawn where there are more
Source = Callable[[Subject, Sequence[Example], int], Evidence]


def layer_scores(subject: Subject, examples: Sequence[Example], seed: int) -> Evidence:
    """`layer_scores`: score -> one mean for each layer; `angular` -> for each length ("1", "2", ...) one for each first layer.

    `layer_score_intervals` has the ends of their 95 % bootstrap intervals over examples: score -> {low, high}. Scores that the model does not
    have, or that no example tells, are left out.
    """
    found = scoring.layer_scores(subject, examples, scoring.measurable(subject))
    values: dict[str, Any] = {}
    intervals: dict[str, dict[str, list[float]]] = {}
    for score, each in found.items():
        if score == "angular":
            means = each.mean(0)
            values[score] = {str(n + 1): means[n, : len(means) - n].tolist() for n in range(len(means))}
        elif not np.isnan(each).all():
            mean, low, high = bootstrap_mean(each, seed)
            values[score] = np.asarray(mean).tolist()
            intervals[score] = {"low": np.asarray(low).tolist(), "high": np.asarray(high).tolist()}
    return {"layer_scores": values, "layer_score_intervals": intervals}


def withdrawal_kl(subject: Subject, examples: Sequence[Example], seed: int) -> Evidence:
    """`withdrawal_kl`: one mean for each layer; `withdrawal_kl_interval`: {low, high}.

    Raises PassError where no example shows anything.
    """
    each = scoring.withdrawal_kl(subject, examples)
    if np.isnan(each).all():
        raise PassError(
            "evidence withdrawal_kl needs examples that show something: give examples with pictures, clips or sounds"
        )
    mean, low, high = (np.asarray(side).tolist() for side in bootstrap_mean(each, seed))
    return {"withdrawal_kl": mean, "withdrawal_kl_interval": {"low": low, "high": high}}


def calibration(subject: Subject, examples: Sequence[Example], seed: int) -> Evidence:
    """`calibration`: the examples, with their answers, all tokens of which count."""
    return {"calibration": Calibration(tuple(examples))}


SOURCES: dict[str, Source] = {
    "layer_scores": layer_scores, "withdrawal_kl": withdrawal_kl, "calibration": calibration,
}  # fmt: skip


def gather(subject: Subject, examples: Sequence[Example], names: Sequence[str], seed: int = 0) -> dict[str, Any]:
    """The named pieces of evidence, and what their sources give beside them, from at most `MOST` of the examples (drawn by `seed`).

    Raises PassError for a name that no source has, or for no examples at all.
    """
    if unknown := [name for name in names if name not in SOURCES]:
        raise PassError(f"there is no evidence {unknown[0]!r}{did_you_mean(unknown[0], SOURCES)}")
    if not examples:
        raise PassError("evidence is gathered from examples: give at least one")
    chosen = np.sort(np.random.default_rng(seed).permutation(len(examples))[:MOST])
    found: dict[str, Any] = {}
    for name in names:
        if name not in found:
            found |= SOURCES[name](subject, [examples[i] for i in chosen], seed)
    return found
