"""Linear probes on planted facts, on labels that mean nothing, and against scikit-learn as a person would call it."""

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from probe.analysis import probing
from probe.analysis.probing import (
    above_zero,
    classes_of,
    control_labels,
    curve_of,
    drawn_means,
    folds_of,
    merge,
    onset,
    predict,
    probe_fact,
)
from probe.errors import DataError
from tests.oracles import probing as oracle


def planted(n=90, width=12, classes=3, states=2, seed=0):
    """States whose last one, and only that, holds a fact of three classes."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, n)
    x = rng.normal(size=(states, n, width))
    x[-1] += 8 * np.eye(width)[labels]
    return x, labels


def test_a_planted_fact_is_read_and_only_where_it_is():
    x, labels = planted()
    found = probe_fact(x, labels, list(range(90)), list(range(90)))
    assert found.correct[1].all()
    assert 0.15 < found.correct[0].mean() < 0.5
    assert found.control.mean() < 0.5  # a type that is seen once cannot be remembered
    assert found.inner[1].min() == 1
    assert len(found.strengths) == 3


def test_what_two_layers_hold_is_read_from_both():
    """One state holds one half of a fact, another the other: only laid side by side do they say all of it."""
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 2, (2, 120))
    x = rng.normal(size=(3, 120, 8))
    x[0, :, 0] += 8 * a
    x[2, :, 0] += 8 * b
    found = merge(x, 2 * a + b, list(range(120)), {"both": [0, 2], "one": [0]})
    assert list(found) == [probing.BEST, "both", "one"]
    assert found["both"].mean() > 0.9
    assert 0.3 < found[probing.BEST].mean() < 0.65
    assert 0.3 < found["one"].mean() < 0.65


def test_random_labels_are_read_by_chance():
    rng = np.random.default_rng(3)
    right = [
        probe_fact(rng.normal(size=(1, 80, 20)), rng.permutation(np.arange(80) % 4), range(80), range(80)).correct
        for _ in range(6)
    ]
    assert np.mean(right) == pytest.approx(0.25, abs=0.06)


def test_what_is_known_of_a_type_reads_the_control_task_too():
    """A state that holds nothing but the type: as good at random labels as at true ones, so that nothing is selective."""
    rng = np.random.default_rng(1)
    types = rng.integers(0, 6, 120)
    x, labels = 6 * np.eye(6)[types][None] + rng.normal(size=(1, 120, 6)), types % 2
    found = probe_fact(x, labels, list(range(120)), types.tolist())
    assert found.correct.mean() > 0.95
    assert found.control.mean() > 0.95


def test_no_picture_is_in_two_parts():
    rng = np.random.default_rng(0)
    checked = 0
    for seed in range(20):
        groups = rng.integers(0, 15, 60).tolist()
        fold = folds_of(rng.integers(0, 4, 60), groups, 3, seed)
        for one in range(3):
            inside = {g for g, f in zip(groups, fold, strict=True) if f == one}
            assert inside
            assert inside.isdisjoint(g for g, f in zip(groups, fold, strict=True) if f != one)
            checked += 1
    assert checked == 60


def test_a_picture_seen_before_would_give_its_fact_away():
    """Features that name the picture alone: with its twin in training they would say everything, apart they say nothing."""
    rng = np.random.default_rng(5)
    pictures = np.repeat(np.arange(40), 2)
    x, labels = (rng.normal(size=(40, 60)) * 3)[pictures][None], rng.integers(0, 2, 40)[pictures]
    apart = probe_fact(x, labels, pictures.tolist(), pictures.tolist()).correct.mean()
    leaked = probe_fact(x, labels, list(range(80)), pictures.tolist()).correct.mean()
    assert apart < 0.6 < 0.7 < leaked


def test_classes_are_dealt_out_evenly():
    labels = np.repeat([0, 1, 2], 9)
    fold = folds_of(labels, list(range(27)), 3, seed=4)
    assert [[int((labels[fold == f] == c).sum()) for c in range(3)] for f in range(3)] == [[3, 3, 3]] * 3


def test_predictions_are_scikit_learns():
    rng = np.random.default_rng(2)
    checked = 0
    for n, width in ((60, 10), (30, 80)):  # more examples than dimensions, and fewer
        x, labels = rng.normal(size=(n, width)), rng.integers(0, 3, n)
        x[:, :3] += 2 * np.eye(3)[labels]
        test = rng.normal(size=(40, width)) + 2 * np.eye(width)[rng.integers(0, 3, 40)]
        scale = StandardScaler().fit(x)
        for strength in (0.1, 1.0):
            plain = LogisticRegression(C=strength, max_iter=5000, tol=1e-8)
            plain.fit(scale.transform(x) / width**0.5, labels)
            said = predict(x, labels, test, [strength])[0]
            assert (said == plain.predict(scale.transform(test) / width**0.5)).mean() > 0.97
            checked += 1
    assert checked == 4


def test_degenerate_features_and_labels():
    assert predict(np.zeros((6, 3)), np.array([0, 0, 1, 1, 1, 0]), np.ones((2, 3)), [1.0]).tolist() == [[0, 0]]
    assert predict(np.eye(3), np.array([2, 2, 2]), np.eye(3), [1.0]).tolist() == [[2, 2, 2]]


def test_classes_with_one_member_are_dropped_and_named():
    values = [*"aaaaaaa", *"bbbbbbb", "c", None]
    found = classes_of(values)
    assert (found.classes, found.dropped) == (("a", "b"), ("c",))
    assert found.items.tolist() == list(range(14))
    assert np.bincount(found.labels).tolist() == [7, 7]
    assert classes_of(values, [i != 0 for i in range(16)]).items.tolist() == list(range(1, 14))
    with pytest.raises(DataError, match="fewer than two classes"):
        classes_of(["a"] * 20 + ["b"])
    with pytest.raises(DataError, match="4 examples are too few to probe: at least 12 are wanted"):
        classes_of(["a", "a", "b", "b"])
    with pytest.raises(DataError, match="2 different pictures cannot be split into 3 parts"):
        folds_of(np.array([0, 1, 0]), ["x", "y", "x"])


def test_the_control_task_gives_each_type_one_label():
    labels, types = np.array([0, 0, 0, 1] * 50), [i % 20 for i in range(200)]
    given = control_labels(labels, types, 1)
    assert all(len(set(given[np.array(types) == t].tolist())) == 1 for t in range(20))
    drawn = np.concatenate([control_labels(labels, range(200), seed) for seed in range(10)])
    assert drawn.mean() == pytest.approx(0.25, abs=0.04)


def test_intervals_draw_whole_pictures():
    rng = np.random.default_rng(0)
    groups = np.repeat(np.arange(25), 4).tolist()
    values = np.repeat(rng.random((2, 25)), 4, axis=1)
    fast, slow = curve_of(values, groups), oracle.grouped_interval(values[0], groups)
    assert (fast.low[0], fast.high[0]) == pytest.approx(slow, abs=0.02)
    alone = curve_of(values, list(range(100)))
    assert (fast.high - fast.low > 1.5 * (alone.high - alone.low)).all()
    assert drawn_means(values, groups).shape == (2000, 2)
    p, q = above_zero(np.stack([np.ones(40), rng.choice([-1.0, 1.0], 40)]), list(range(40)))
    assert p[0] < 0.01 < 0.05 < p[1]
    assert (q >= p).all()


def test_the_onset_by_hand():
    correct = np.zeros((4, 200))
    correct[1, ::2] = 1
    correct[2:, :190] = 1
    found = onset(correct, list(range(200)), 0.05)
    assert (found.state, found.low, found.high) == (2, 2, 2)
    assert onset(correct, list(range(200)), 0.6).state == 1
    assert probing.LEAST == 12
