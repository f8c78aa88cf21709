"""Flow statistics: against the obvious version, on invariants, on golden numbers."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from probe.analysis.flow import FLOWS, change, cutoff_layer, default_window, flow_edges, window_mean
from probe.analysis.stats import bootstrap_mean, resampled_means, spearman, wilson
from probe.errors import EditError
from tests.oracles.flow import kl, relative_change

logits = st.lists(st.floats(-6, 6, width=32), min_size=4, max_size=4)


@settings(max_examples=60, deadline=None)
@given(clean=logits, edited=st.lists(logits, min_size=1, max_size=3), token=st.integers(0, 3))
def test_change_is_the_obvious_one(clean, edited, token):
    found = change(torch.tensor(clean), torch.tensor(edited), token)
    for i, row in enumerate(edited):
        assert found.relative[i] == pytest.approx(relative_change(clean, row, token), rel=1e-4, abs=1e-4)
        assert found.kl[i] == pytest.approx(kl(clean, row), rel=1e-4, abs=1e-5)
        assert found.logit[i] == pytest.approx(row[token] - clean[token], abs=1e-5)
        assert found.flip[i] == (int(np.argmax(row)) != int(np.argmax(clean)))


def test_no_change_is_zero():
    clean = torch.tensor([1.0, 2.0, -1.0])
    found = change(clean, clean[None], 1)
    assert [float(v[0]) for v in (found.relative, found.logit, found.log_prob, found.flip, found.kl)] == [0.0] * 5


def test_golden_change():
    # p goes from 1/2 to 1/4: -50 %, the logit stays, the log-probability falls by ln 2
    found = change(torch.tensor([0.0, 0.0]), torch.tensor([[0.0, float(np.log(3))]]), 0)
    assert found.relative[0] == pytest.approx(-50)
    assert found.logit[0] == 0
    assert found.log_prob[0] == pytest.approx(-np.log(2))
    assert found.flip[0] == 1


def test_golden_cutoff():
    # two examples, four layers: the mean change is -50, -10, -1, 0 percent
    relative = np.array([[-60.0, -12.0, -1.0, 0.0], [-40.0, -8.0, -1.0, 0.0]])
    assert cutoff_layer(relative, tolerance=2.0).layer == 2
    assert cutoff_layer(relative, tolerance=0.5).layer == 3
    assert cutoff_layer(relative, tolerance=15.0).layer == 1
    assert cutoff_layer(relative, tolerance=100.0).layer == 0
    assert cutoff_layer(np.array([[0.0, 0.0, -9.0]]), tolerance=2.0).layer == 3  # matters to the end
    bump = np.array([[-30.0, 0.0, -5.0, 0.0]])
    assert cutoff_layer(bump, tolerance=2.0).layer == 3  # quiet in between does not count
    found = cutoff_layer(relative, tolerance=10.0)
    assert found.low <= found.layer <= found.high


def test_default_windows_follow_the_published_plots():
    assert [default_window(n) for n in (40, 80, 32, 28, 16, 8, 4, 2)] == [9, 9, 7, 7, 3, 3, 3, 2]


def test_flows_are_the_published_six():
    assert list(FLOWS) == [
        "image->question",
        "image->last",
        "question->last",
        "last->last",
        "related->question",
        "other->question",
    ]
    assert flow_edges("image->question") == ("question", "media")
    with pytest.raises(EditError, match=r"there is no flow 'image->lst' .did you mean 'image->last'"):
        flow_edges("image->lst")


def test_window_mean():
    mass = np.array([[1.0, 2.0, 6.0]])
    assert window_mean(mass, [range(2), range(3), range(2, 3)]).tolist() == [[1.5, 3.0, 6.0]]


def test_bootstrap_covers_the_mean_and_leaves_out_what_is_missing():
    rng = np.random.default_rng(0)
    inside = 0
    for trial in range(200):
        found = bootstrap_mean(rng.normal(3, 1, (40, 1)), seed=trial, resamples=500)
        inside += bool(found.low[0] <= 3 <= found.high[0])
    assert 180 <= inside <= 200  # 95 % of 200, with room for chance
    values = np.array([[1.0, np.nan], [3.0, 5.0]])
    found = bootstrap_mean(values)
    assert found.value.tolist() == [2.0, 5.0]
    assert bootstrap_mean(np.array([[7.0]])) == (7.0, 7.0, 7.0)


def test_resampling_equals_drawing_rows():
    values = np.arange(5.0)[:, None]
    draws = resampled_means(values, seed=3, resamples=4000)
    assert draws.mean() == pytest.approx(2.0, abs=0.05)
    assert draws.std() == pytest.approx(np.sqrt(2.0 / 5), rel=0.05)


def test_wilson_golden():
    low, high = wilson(8, 10)
    assert (round(low, 4), round(high, 4)) == (0.4902, 0.9433)
    assert wilson(0, 0) == (0.0, 1.0)


def test_spearman_golden_and_undefined():
    assert spearman(np.array([1.0, 2.0, 3.0]), np.array([10.0, 20.0, 90.0])) == pytest.approx(1.0)
    assert np.isnan(spearman(np.array([1.0, 1.0, 1.0]), np.array([1.0, 2.0, 3.0])))
    assert np.isnan(spearman(np.array([1.0, np.nan, 3.0]), np.array([1.0, 2.0, 3.0])))
