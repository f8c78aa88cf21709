"""CKA, CKNNA and mutual neighbours against slow versions, on invariants and on cases small enough to count."""

import numpy as np
import pytest
import torch

from probe.analysis import similarity
from probe.analysis.similarity import Kernels, beside_permuted, cka, cknna, compare, hsic, linear_kernel, mutual_knn, prepared
from probe.errors import DataError
from tests.oracles import similarity as oracle


def draw(n, width, seed=0):
    return torch.tensor(np.random.default_rng(seed).normal(size=(n, width)))


def related(n=24, seed=1):
    a = draw(n, 7, seed)
    return a, a @ draw(7, 5, seed + 1) + 0.5 * draw(n, 5, seed + 2)


def test_metrics_are_the_slow_ones():
    checked = 0
    for seed in range(4):
        a, b = related(seed=seed)
        x, y = a.numpy(), b.numpy()
        for unbiased in (True, False):
            slow = (oracle.hsic_unbiased if unbiased else oracle.hsic_biased)(x @ x.T, y @ y.T)
            assert float(hsic(linear_kernel(a), linear_kernel(b), unbiased)) == pytest.approx(slow, rel=1e-9)
            assert cka(a, b, unbiased) == pytest.approx(oracle.cka(x, y, unbiased), rel=1e-9)
        for k in (2, 5):
            assert mutual_knn(a, b, k) == pytest.approx(oracle.mutual_knn(x, y, k))
            assert cknna(a, b, k) == pytest.approx(oracle.cknna(x, y, k), rel=1e-9)
            checked += 1
    assert checked == 8


def test_a_set_is_like_itself_turned_and_scaled():
    a, b = related()
    turn, _ = torch.linalg.qr(draw(7, 7, 9))
    for unbiased in (True, False):
        assert cka(a, a, unbiased) == pytest.approx(1)
        assert cka(a @ turn * 3.7, b, unbiased) == pytest.approx(cka(a, b, unbiased))
        assert cka(a, b, unbiased) == pytest.approx(cka(b, a, unbiased))
    assert cknna(a, a, 4) == pytest.approx(1)
    assert mutual_knn(a, a @ turn, 4) == 1
    assert mutual_knn(a, b, 23) == 1  # every other example is a neighbour


def test_independent_sets_are_unlike_but_for_the_bias():
    found = [(cka(draw(40, 200, i), draw(40, 200, 100 + i)), cka(draw(40, 200, i), draw(40, 200, 100 + i), False)) for i in range(12)]  # fmt: skip
    unbiased, biased = np.array(found).T
    assert abs(unbiased.mean()) < 0.02
    assert biased.min() > 0.7  # fewer examples than dimensions


def test_neighbours_by_hand_the_earlier_of_equally_near_ones():
    a = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0], [1.0, 1.0]])
    b = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0], [1.0, 0.0], [0.0, 0.0]])
    assert similarity.neighbours(linear_kernel(a), 1)[:, 0].tolist() == [1, 0, 3, 2, 0]
    assert similarity.neighbours(linear_kernel(b), 1)[:, 0].tolist() == [3, 2, 1, 0, 0]
    assert mutual_knn(a, b, 1) == pytest.approx(1 / 5)  # the last example alone keeps its neighbour


def test_a_grid_is_its_cells_and_an_order_pairs_other_examples():
    a, b = (torch.stack([draw(16, 6, s + i) for i in range(count)]) for s, count in ((0, 3), (50, 2)))
    a[1] = b[0] @ draw(6, 6, 7)
    ours, theirs = (Kernels(linear_kernel(states), 3) for states in (a, b))
    order = torch.randperm(16, generator=torch.Generator().manual_seed(3))
    for turn in (None, order):
        grid = compare(ours, theirs, order=turn)
        for i in range(3):
            for j in range(2):
                other = b[j] if turn is None else b[j][turn]
                for name, value in (("cka", cka(a[i], other)), ("knn", mutual_knn(a[i], other, 3)), ("cknna", cknna(a[i], other, 3))):  # fmt: skip
                    np.testing.assert_allclose(grid[name][i, j], value, rtol=1e-9, atol=1e-12)
    assert {name: grid[name].shape for name in grid} == dict.fromkeys(("cka", "knn", "cknna"), (3, 2))


def test_permuted_pairs_tell_a_likeness_from_none():
    a, b = related(40)
    other = draw(40, 5, 77)
    found = beside_permuted(*(Kernels(linear_kernel(x[None]), 5) for x in (a, b)), permutations=60)
    nothing = beside_permuted(*(Kernels(linear_kernel(x[None]), 5) for x in (a, other)), permutations=60)
    for metric in similarity.METRICS:
        one, none = found[metric].grid, nothing[metric].grid
        assert one.p[0, 0] == pytest.approx(1 / 61)
        assert none.p[0, 0] > 0.05
        assert one.null_low[0, 0] <= one.null[0, 0] <= one.null_high[0, 0] < one.value[0, 0]
        assert one.low[0, 0] < one.value[0, 0] < one.high[0, 0]
        assert found[metric].along.value == pytest.approx(one.value[0, 0])
    assert found["knn"].grid.null[0, 0] == pytest.approx(5 / 39, abs=0.03)
    assert abs(found["cka"].grid.null[0, 0]) < 0.03


def test_states_are_prepared_as_in_the_reference():
    states = torch.tensor([[[1.0, -2.0, 100.0, 0.5], [3.0, 1.0, -1.0, 2.0]]])
    limit = np.mean([np.quantile(np.abs(row), 0.75) for row in states[0].numpy()])
    clipped = np.clip(states[0].numpy(), -limit, limit)
    np.testing.assert_allclose(prepared(states, 0.75, normalise=False)[0], clipped)
    np.testing.assert_allclose(prepared(states, 0.75)[0], clipped / np.linalg.norm(clipped, axis=1, keepdims=True))
    np.testing.assert_allclose(prepared(states, 1.0, normalise=False), states)


def test_rbf_and_depths():
    a = draw(5, 3)
    slow = np.exp(-((a[:, None] - a[None]) ** 2).sum(-1) / (2 * 4.0))
    np.testing.assert_allclose(similarity.rbf_kernel(a, 2.0), slow, atol=1e-12)
    assert similarity.same_depth(3, 3) == [(0, 0), (1, 1), (2, 2)]
    assert similarity.same_depth(3, 5) == [(0, 0), (1, 2), (2, 4)]
    assert similarity.same_depth(1, 4) == [(0, 0)]


def test_what_cannot_be_compared_is_refused():
    a = draw(3, 4)
    with pytest.raises(DataError, match="takes at least 4 examples, not 3"):
        cka(a, a)
    with pytest.raises(DataError, match="8 examples have 1 to 7 neighbours each, not 8"):
        mutual_knn(draw(8, 2), draw(8, 2), 8)
    with pytest.raises(DataError, match="compares at least 2 neighbours, not 1"):
        cknna(draw(8, 2), draw(8, 2), 1)
    with pytest.raises(DataError, match="the same examples are compared: 8 and 7 are not"):
        mutual_knn(draw(8, 2), draw(7, 2), 2)


def test_what_does_not_vary_is_like_nothing():
    assert np.isnan(cka(torch.ones(6, 3), draw(6, 3)))
    a = torch.stack([torch.ones(12, 4, dtype=torch.float64) + 1e-8 * draw(12, 4), draw(12, 4)])  # the first state is rounding
    found = beside_permuted(*(Kernels(linear_kernel(a), 3) for _ in range(2)), permutations=20)
    for metric in similarity.METRICS:
        assert np.isnan(found[metric].grid.value).tolist() == [[True, True], [True, False]]
        assert found[metric].along.value == pytest.approx(1)
