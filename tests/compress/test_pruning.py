"""Pruning and allocation on single matrices and lists of numbers: against plain versions, exact counts, ties, golden numbers."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compress.allocation import ecoflap_shares, importance, outlier_share, owl_shares, tamp_shares
from compress.pruning import Pattern, magnitude, sparsegpt, wanda
from compress.statistics import Gram, Squares
from probe.errors import PassError
from tests.oracles import pruning as oracle


def drawn(rows=6, columns=12, tokens=40, seed=0):
    draw = torch.Generator().manual_seed(seed)
    mixing = torch.randn(columns, columns, generator=draw)
    return torch.randn(rows, columns, generator=draw), torch.randn(tokens, columns, generator=draw) @ mixing


def summed(kind, rows):
    sums = kind()
    sums.add(rows)
    return sums


@given(st.integers(1, 5), st.integers(1, 9), st.floats(0, 0.99), st.integers(0, 3))
@settings(max_examples=40, deadline=None)
def test_wanda_is_what_loops_say_ties_and_all(rows, columns, sparsity, seed):
    draw = np.random.default_rng(seed)
    weight = torch.tensor(draw.integers(-2, 3, (rows, columns)), dtype=torch.float32)  # few values: many ties
    inputs = torch.tensor(draw.integers(0, 3, (4, columns)), dtype=torch.float32)
    sums = summed(Squares, inputs)
    kept = wanda(weight, sums, Pattern(sparsity))
    want = oracle.wanda(weight.numpy(), sums.norms.square().numpy(), sparsity)
    assert kept.sum(1).tolist() == [columns - int(columns * sparsity)] * rows
    scores = weight.abs() * sums.norms
    exact = all(
        scores[i].tolist() == [abs(w) * float(n) for w, n in zip(weight[i], sums.norms, strict=True)] for i in range(rows)
    )
    assert exact
    again = np.array([[j not in oracle.least(row, int(columns * sparsity)) for j in range(columns)] for row in scores.tolist()])
    assert np.array_equal(kept.numpy(), again)
    assert want.sum() == kept.sum()


@pytest.mark.parametrize("pattern", ["2:4", "1:4", "3:4", "1:2", "0:4"])
def test_groups_lose_what_the_pattern_says(pattern):
    weight, rows = drawn()
    one = Pattern.read(pattern)
    kept = wanda(weight, summed(Squares, rows), one)
    assert np.array_equal(
        kept.numpy(), oracle.wanda(weight.numpy(), summed(Squares, rows).sums.numpy(), gone=one.gone, of=one.of)
    )
    assert set((~kept).view(-1, one.of).sum(1).tolist()) == {one.gone}
    assert int((~magnitude(weight, one)).sum()) == one.goes((6, 12)) == 72 * one.gone // one.of


def test_golden_scores_two_by_three():
    weight = torch.tensor([[3.0, -1.0, 2.0], [1.0, 1.0, 1.0]])
    sums = summed(Squares, torch.tensor([[1.0, 0.0, 2.0], [1.0, 4.0, 0.0]]))  # norms 1, sqrt 8, sqrt 2
    assert wanda(weight, sums, Pattern(0.34)).tolist() == [
        [True, False, True],
        [False, True, True],
    ]  # 3, 2.83, 2.83 : the lower column
    assert magnitude(weight, Pattern(0.5)).tolist() == [[True, False, True], [False, False, True]]
    assert magnitude(weight, Pattern(0.34), whole=False).tolist() == [[True, False, True], [False, True, True]]


@pytest.mark.parametrize(("sparsity", "gone", "of"), [(0.5, 0, 0), (0.3, 0, 0), (0.8, 0, 0), (0.5, 2, 4), (0.25, 1, 4)])
@pytest.mark.parametrize("block", [4, 5, 128])
def test_sparsegpt_is_optimal_brain_surgery_column_by_column(sparsity, gone, of, block):
    weight, rows = drawn()
    rows[:, 3] = 0  # an input that never was other than zero
    made = sparsegpt(weight, summed(Gram, rows), Pattern(sparsity, gone, of), block)
    want = oracle.sparsegpt(weight.numpy(), rows.double().numpy(), sparsity, gone, of, block)
    torch.testing.assert_close(made.double(), torch.from_numpy(want), atol=1e-4, rtol=1e-4)
    assert int((made == 0).sum()) == Pattern(sparsity, gone, of).goes((6, 12), whole=True)


@pytest.mark.parametrize("pattern", [Pattern(0.5), Pattern(0.7), Pattern.read("2:4")])
def test_sparsegpt_rebuilds_outputs_better_than_magnitude(pattern):
    """No theorem for every matrix (with inputs that are nearly one direction it loses): true of ten whose inputs are half mixed."""
    losses = []
    for seed in range(10):
        draw = torch.Generator().manual_seed(seed)
        mixing = 0.5 * torch.eye(64) + 0.5 * torch.randn(64, 64, generator=draw) / 8
        weight, rows = torch.randn(16, 64, generator=draw), torch.randn(256, 64, generator=draw) @ mixing
        both = sparsegpt(weight, summed(Gram, rows), pattern, 8), weight * magnitude(weight, pattern)
        losses.append([float(((weight - made) @ rows.T).square().sum()) for made in both])
    ours, theirs = np.array(losses).T
    assert (ours <= theirs).all()
    assert ours.sum() < 0.9 * theirs.sum()


def test_all_equal_scores_and_nothing_to_go_on():
    weight = torch.ones(2, 4)
    assert wanda(weight, summed(Squares, torch.zeros(3, 4)), Pattern(0.5)).tolist() == [[False, False, True, True]] * 2
    assert wanda(weight, summed(Squares, torch.ones(3, 4)), Pattern.read("1:2")).tolist() == [[False, True, False, True]] * 2
    assert torch.equal(wanda(weight, summed(Squares, torch.ones(3, 4)), Pattern(0.0)), torch.ones(2, 4, dtype=torch.bool))
    broken = summed(Gram, torch.full((3, 4), float("inf")))
    with pytest.raises(PassError, match="cannot be inverted"):
        sparsegpt(weight, broken, Pattern(0.5))


@pytest.mark.parametrize(("text", "message"), [("4:4", "N below M"), ("half", "a pattern N:M"), ("2:", "a pattern N:M")])
def test_patterns_that_are_none(text, message):
    with pytest.raises(PassError, match=message):
        Pattern.read(text)
    with pytest.raises(PassError, match="6 inputs cannot be cut into groups of 4"):
        wanda(torch.ones(2, 6), summed(Squares, torch.ones(1, 6)), Pattern.read("2:4"))


# --- allocation ------------------------------------------------------------------------------------------------------


def test_golden_allocations():
    # OWL: outliers 0, 1/2, 1 of the way keep 0, .08, .16 above; their mean .08 is given back to all.
    assert owl_shares([0.0, 1.0, 2.0], [1, 1, 1], 0.5) == pytest.approx([0.58, 0.5, 0.42])
    assert owl_shares([3.0, 3.0], [1, 1], 0.5) == [0.5, 0.5]
    # ECoFLaP: each keeps .4 of 10, the 2 left go 1 to 3.
    assert ecoflap_shares([1.0, 3.0], [10, 10], 0.5) == pytest.approx([0.55, 0.45])
    # .05 is kept of each; of the 30 that are left the second layer takes no more than it has (9.5), and the rest is the first's.
    assert ecoflap_shares([1.0, 9.0], [10, 10], 0.05, above=0.9) == pytest.approx([0.1, 0.0])
    # TAMP: kept .5 x importance / mean, not below .4: 1.2 and .8 become .6 and .4.
    assert tamp_shares([1.2, 0.8], [10, 10], 0.5) == pytest.approx([0.4, 0.6])
    assert tamp_shares([3.0, 0.1], [10, 10], 0.5) == pytest.approx([0.4, 0.6])
    assert outlier_share(torch.tensor([1.0, 1, 1, 1, 1, 1, 1, 1, 1, 21])) == pytest.approx(
        0.1
    )  # mean 3: above 15 is one of ten


@given(st.lists(st.tuples(st.floats(0.01, 100), st.integers(1, 1000)), min_size=1, max_size=12), st.floats(0.2, 0.8))
@settings(max_examples=80, deadline=None)
def test_every_rule_meets_its_budget_within_its_bounds(layers, sparsity):
    scores, sizes = [s for s, _ in layers], [n for _, n in layers]
    for rule, low, high in ((owl_shares, -0.161, 0.161), (ecoflap_shares, -1, 0.1), (tamp_shares, -1, 0.1)):
        shares = rule(scores, sizes, sparsity)
        assert np.average(shares, weights=sizes) == pytest.approx(sparsity, abs=1e-6)
        assert all(-1e-9 <= share <= 1 for share in shares)
        assert all(sparsity + low - 1e-6 <= share <= sparsity + high + 1e-6 for share in shares)
        order = sorted(range(len(scores)), key=lambda i: scores[i] / (sizes[i] if rule is ecoflap_shares else 1))
        assert all(shares[a] >= shares[b] - 1e-6 for a, b in itertools.pairwise(order))


def test_what_rules_cannot_do():
    with pytest.raises(PassError, match=r"owl would take .* choose one between 0\.16 and 0\.84"):
        owl_shares([0.0, 1.0], [1, 1], 0.95)
    with pytest.raises(PassError, match="importance 0"):
        tamp_shares([0.0, 1.0], [1, 1], 0.5)


def test_importance_is_what_pairs_say():
    seen, words = (
        torch.randn(5, 7, generator=torch.Generator().manual_seed(1)),
        torch.randn(3, 7, generator=torch.Generator().manual_seed(2)),
    )

    def cos(a, b):
        return float(a @ b / (a.norm() * b.norm()))

    def density(side):
        pairs = [cos(side[i], side[j]) for i in range(len(side)) for j in range(i + 1, len(side))]
        return float(np.mean([p for p in pairs if p > 0]))

    across = float(np.mean([cos(a, b) for a in seen for b in words]))
    assert importance(seen, words) == pytest.approx(3 - density(seen) - density(words) - across, abs=1e-5)
    assert importance(torch.ones(2, 3), torch.ones(2, 3)) == pytest.approx(0.0, abs=1e-6)  # everything alike: nothing to lose
