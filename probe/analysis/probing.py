"""Linear probes: what of a fact can be read off states by a linear map, for examples whose picture the probe has not seen.

Multinomial logistic regression on features that are standardised on the training part, with an L2 penalty that is chosen by cross-validation
inside it. Selectivity is accuracy minus that of a control task with one random label for each type (Hewitt and Liang, arXiv 1909.03368).
"""

import warnings
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int
from sklearn import config_context
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression

from probe.analysis.stats import BLOCK, RESAMPLES, benjamini_hochberg, sign_flip
from probe.errors import DataError

STRENGTHS = (0.1, 1.0, 10.0)  # C of features whose squares sum to one on average: no question of how wide they are
FOLDS = 3
BEST = "best single layer"
LEAST = 12  # examples with a fact, below which nothing is probed


@dataclass(frozen=True)
class Fact:
    """The usable examples of one fact: their indices, classes as numbers, and what was left out and why."""

    items: Int[np.ndarray, " item"]
    labels: Int[np.ndarray, " item"]
    classes: tuple[str, ...]
    dropped: tuple[str, ...] = ()


def classes_of(values: Sequence[str | None], usable: Sequence[bool] | None = None) -> Fact:
    """A fact's classes; one with a single member is dropped and named.

    Raises DataError where fewer than two classes, or too few examples, are left.
    """
    known = [i for i, value in enumerate(values) if value is not None and (usable is None or usable[i])]
    counts = {name: sum(values[i] == name for i in known) for name in {values[i] for i in known}}
    names = sorted(str(name) for name, count in counts.items() if count > 1)
    items = [i for i in known if values[i] in names]
    if len(names) < 2:
        raise DataError("fewer than two classes have two examples or more")
    if len(items) < LEAST:
        raise DataError(f"{len(items)} examples are too few to probe: at least {LEAST} are wanted")
    labels = [names.index(str(values[i])) for i in items]
    dropped = tuple(sorted(str(name) for name, count in counts.items() if count == 1))
    return Fact(np.array(items), np.array(labels), tuple(names), dropped)


def folds_of(
    labels: Int[np.ndarray, " item"], groups: Sequence[Hashable], count: int = FOLDS, seed: int = 0
) -> Int[np.ndarray, " item"]:
    """A fold for each item: no group is in two of them, and every class is dealt out over them like cards.

    Raises DataError where there are fewer groups than folds.
    """
    names = list(dict.fromkeys(groups))
    if len(names) < count:
        raise DataError(f"{len(names)} different pictures cannot be split into {count} parts")
    first = {group: int(label) for group, label in reversed(list(zip(groups, labels, strict=True)))}
    order = np.random.default_rng(seed).permutation(len(names))
    dealt = sorted((names[i] for i in order), key=lambda group: first[group])
    fold = {group: i % count for i, group in enumerate(dealt)}
    made = np.array([fold[group] for group in groups])
    for one in range(count):  # what a probe is tested on, it has not been trained on
        inside = {group for group, number in zip(groups, made, strict=True) if number == one}
        assert inside.isdisjoint(group for group, number in zip(groups, made, strict=True) if number != one)
    return made


def predict(
    train: Float[np.ndarray, "train width"], labels: Int[np.ndarray, " train"], test: Float[np.ndarray, "test width"],
    strengths: Sequence[float],
) -> Int[np.ndarray, "strength test"]:  # fmt: skip
    """What logistic regressions of growing C, each starting from the one before, say of the test part.

    The features are turned into the space that the training part spans, where the penalised solution lies: the same
    predictions from fewer numbers where there are fewer examples than dimensions.
    """
    if len(np.unique(labels)) < 2:
        return np.full((len(strengths), len(test)), labels[0])
    mean, spread = train.mean(0), train.std(0)
    kept = spread > 1e-6 * max(1e-30, float(spread.max()))
    if not kept.any():
        return np.full((len(strengths), len(test)), np.bincount(labels).argmax())
    scale = spread[kept] * np.sqrt(kept.sum())
    train, test = ((part[:, kept] - mean[kept]) / scale for part in (train, test))
    if len(train) < train.shape[1]:
        basis = np.linalg.svd(train, full_matrices=False)[2]
        train, test = train @ basis.T, test @ basis.T
    model = LogisticRegression(C=1.0, max_iter=60, tol=1e-3, warm_start=True)
    found = []
    with config_context(assume_finite=True, skip_parameter_validation=True), warnings.catch_warnings():
        # A probe need not be at its optimum: it is judged by what it predicts.
        warnings.simplefilter("ignore", ConvergenceWarning)
        warnings.filterwarnings("ignore", "The number of unique classes", UserWarning)
        for strength in strengths:
            found.append(model.set_params(C=strength).fit(train, labels).predict(test))
    return np.stack(found)


@dataclass(frozen=True)
class Probed:
    """Whether each item was read rightly, from states of a model that did not train on its picture.

    `control` is the same for the control task, `majority` for the most frequent class of the training part.
    """

    correct: Bool[np.ndarray, "state item"]
    control: Bool[np.ndarray, "state item"]
    majority: Bool[np.ndarray, " item"]
    fold: Int[np.ndarray, " item"]  # in which each was tested
    strengths: tuple[float, ...]  # C of each fold
    inner: Float[np.ndarray, "state fold"]  # accuracy inside the training part, of the states that were looked at; else NaN


def probe_fact(
    states: Float[np.ndarray, "state item width"], labels: Int[np.ndarray, " item"], groups: Sequence[Hashable],
    types: Sequence[Hashable], folds: int = FOLDS, seed: int = 0, choose_from: Sequence[int] | None = None,
) -> Probed:  # fmt: skip
    """Probes every state for one fact, in folds that share no group.

    C is chosen for each fold by two-fold cross-validation inside its training part over the states `choose_from` (the first, the middle
    and the last by default), and is the same for all states, so that their curves can be compared. `types` are what the control task
    gives its random labels to.
    """
    count = len(states)
    look = sorted({0, count // 2, count - 1}) if choose_from is None else list(choose_from)
    fold = folds_of(labels, groups, folds, seed)
    random = control_labels(labels, types, seed)
    correct, control = (np.zeros((count, len(labels)), dtype=bool) for _ in range(2))
    majority, inner, chosen = np.zeros(len(labels), dtype=bool), np.full((count, folds), np.nan), []
    for one in range(folds):
        test, train = np.nonzero(fold == one)[0], np.nonzero(fold != one)[0]
        scores = _inner(states[look][:, train], labels[train], [groups[int(i)] for i in train], seed)
        best = int(scores.mean(0).argmax())
        inner[look, one] = scores[:, best]
        chosen.append(STRENGTHS[best])
        majority[test] = labels[test] == np.bincount(labels[train]).argmax()
        for state in range(count):
            for truth, into in ((labels, correct), (random, control)):
                said = predict(states[state, train], truth[train], states[state, test], [STRENGTHS[best]])[0]
                into[state, test] = said == truth[test]
    return Probed(correct, control, majority, fold, tuple(chosen), inner)


def merge(
    states: Float[np.ndarray, "state item width"], labels: Int[np.ndarray, " item"], groups: Sequence[Hashable],
    merges: Mapping[str, Sequence[int]], folds: int = FOLDS, seed: int = 0,
) -> dict[str, Bool[np.ndarray, " item"]]:  # fmt: skip
    """Which items are read from states laid side by side, and from the best single state (`BEST`), on the same folds.

    The best single state is chosen for each fold inside its training part: chosen by what it is tested on, it would look better than it is.
    """
    every = range(len(states))
    alone = probe_fact(states, labels, groups, list(groups), folds, seed, every)
    best = alone.inner.argmax(0)[alone.fold]
    found = {BEST: alone.correct[best, np.arange(len(labels))]}
    for name, chosen in merges.items():
        beside = np.concatenate([states[state] for state in chosen], -1)[None]
        found[name] = probe_fact(beside, labels, groups, list(groups), folds, seed).correct[0]
    return found


def _inner(
    states: Float[np.ndarray, "state item width"], labels: Int[np.ndarray, " item"], groups: Sequence[Hashable], seed: int
) -> Float[np.ndarray, "state strength"]:
    """Accuracy of each C by two-fold cross-validation; 0 throughout where a training part cannot be split."""
    right = np.zeros((len(states), len(STRENGTHS)))
    if len(set(groups)) < 2:
        return right
    fold = folds_of(labels, groups, 2, seed + 1)
    for one in range(2):
        test, train = fold == one, fold != one
        for i, state in enumerate(states):
            right[i] += (predict(state[train], labels[train], state[test], STRENGTHS) == labels[test]).sum(1)
    return right / len(labels)


def control_labels(labels: Int[np.ndarray, " item"], types: Sequence[Hashable], seed: int = 0) -> Int[np.ndarray, " item"]:
    """A random label for each type, drawn as often as labels occur, so that only a memory of types can be right."""
    rng = np.random.default_rng([seed, 11])
    given = {name: int(rng.choice(labels)) for name in dict.fromkeys(types)}
    return np.array([given[name] for name in types])


# --- how sure ---------------------------------------------------------------------------------------------------------


class Curve(NamedTuple):
    """A mean at each state with its 95 % interval (a bootstrap over groups)."""

    mean: Float[np.ndarray, " state"]
    low: Float[np.ndarray, " state"]
    high: Float[np.ndarray, " state"]


def by_group(
    values: Float[np.ndarray, "state item"], groups: Sequence[Hashable]
) -> tuple[Float[np.ndarray, "group state"], Int[np.ndarray, " group"]]:
    """Sums over each group's items, and how many there are."""
    names = {name: i for i, name in enumerate(dict.fromkeys(groups))}
    at = np.array([names[name] for name in groups])
    sums = np.zeros((len(names), len(values)))
    np.add.at(sums, at, values.T.astype(np.float64))
    return sums, np.bincount(at)


def drawn_means(
    values: Float[np.ndarray, "state item"], groups: Sequence[Hashable], seed: int = 0
) -> Float[np.ndarray, "resample state"]:
    """Means over resampled groups: items that share a picture are drawn together."""
    sums, sizes = by_group(values, groups)
    rng, made = np.random.default_rng(seed), []
    for _ in range(0, RESAMPLES, BLOCK):
        weights = rng.multinomial(len(sums), np.full(len(sums), 1 / len(sums)), size=BLOCK).astype(np.float64)
        made.append((weights @ sums) / (weights @ sizes)[:, None])
    return np.concatenate(made)


def curve_of(values: Float[np.ndarray, "state item"], groups: Sequence[Hashable], seed: int = 0) -> Curve:
    low, high = np.percentile(drawn_means(values, groups, seed), [2.5, 97.5], axis=0)
    return Curve(values.mean(1), low, high)


def above_zero(
    values: Float[np.ndarray, "state item"], groups: Sequence[Hashable], seed: int = 0
) -> tuple[Float[np.ndarray, " state"], Float[np.ndarray, " state"]]:
    """One-sided p-values that paired differences are above zero (sign flips of whole groups), and their q-values over states."""
    p = sign_flip(by_group(values, groups)[0], seed)
    return p, benjamini_hochberg(p)


class Onset(NamedTuple):
    """The first state that reads a fact within a tolerance of the best one, with a 95 % bootstrap interval."""

    state: int
    low: int
    high: int


def onset(
    correct: Float[np.ndarray, "state item"], groups: Sequence[Hashable], tolerance: float = 0.05, seed: int = 0
) -> Onset:
    """From which state on a fact is readable: the first whose accuracy is within `tolerance` of the best state's."""
    draws = drawn_means(correct, groups, seed)
    found = (draws >= draws.max(1, keepdims=True) - tolerance).argmax(1)
    low, high = np.percentile(found, [2.5, 97.5])
    mean = correct.mean(1)
    state = int((mean >= mean.max() - tolerance).argmax())
    return Onset(state, min(state, int(np.floor(low))), max(state, int(np.ceil(high))))
