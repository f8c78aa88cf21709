"""What the studies of attention compute: shifts, sinks, ratios, and what tells two sorts of answers apart."""

from itertools import permutations

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score, roc_auc_score

from probe import Mass, load, trace
from probe.analysis import detection, shift, sinks, svar
from probe.errors import DataError, EditError, TokenError
from probe.sinks import massive_dimensions, places_of, read_sinks, sink_layers
from probe.surroundings import SETS, check_in_sequence, name_surroundings, surroundings
from tests import toys
from tests.oracles import looking
from tests.oracles.attention import eager_patterns

CASES = [(family, side) for family in ("llava", "llava_next", "qwen2_vl", "paligemma") for side in ("left", "right")]


# --- surroundings and shift ------------------------------------------------------------------------------------------


def test_every_case_is_there():
    assert len(CASES) == 8


@pytest.mark.parametrize(("family", "side"), CASES)
def test_masses_are_those_of_eager_attention_and_sum_to_one(toy, pair, family, side):
    subject = toy(family)
    encoded = name_surroundings(subject.encode(pair, side))
    found = trace(subject, encoded, [Mass(("after",), (*SETS, "first", "rest"))])["mass"]
    torch.testing.assert_close(found.tensor[..., :4].sum(-1), torch.ones(()).expand(found.tensor.shape[:-1]), atol=1e-5, rtol=0)
    eager = eager_patterns(subject, encoded)
    for i, token_map in enumerate(encoded.maps):
        wanted = looking.around(token_map)
        assert {name: list(token_map.positions(name)) for name in SETS} == wanted
        for layer in (0, len(eager) - 1):
            for name in ("before", "shown", "after"):
                slow = looking.received(eager[layer][i], token_map, wanted["after"], wanted[name])
                got = found.at(layer=layer, batch=i, row_group="after", column_group=name).mean()
                assert float(got) == pytest.approx(slow, abs=1e-5)


def test_what_has_no_surroundings_is_refused(toy, pair):
    subject = toy("llava")
    blind = subject.encode(subject.without_media(pair[0])).maps[0]
    with pytest.raises(TokenError, match="nothing is shown in the sequence"):
        surroundings(blind)
    with pytest.raises(EditError, match="has its picture in layers of their own, which look at nothing else"):
        check_in_sequence(toy("mllama"))
    check_in_sequence(subject)


def test_shift_is_one_less_the_correlation():
    rng = np.random.default_rng(0)
    before, after = rng.random((2, 5, 9))
    slow = [1 - looking.pearson(list(a), list(b)) for a, b in zip(before, after, strict=True)]
    np.testing.assert_allclose(shift.shift(before, after), slow, atol=1e-12)
    np.testing.assert_allclose(shift.shift(before, before), 0, atol=1e-12)
    np.testing.assert_allclose(shift.shift(before, -before), 2, atol=1e-12)
    np.testing.assert_allclose(shift.shift(before, 3 * after + 7), shift.shift(before, after), atol=1e-12)
    by_hand = shift.shift(np.array([[0.0, 1.0, 0.0]]), np.array([[0.0, 0.0, 1.0]]))
    assert by_hand[0] == pytest.approx(1.5)  # correlation -1/2


def test_a_constant_series_has_no_shift():
    flat, other = np.full((1, 8), 0.25) + 1e-9 * np.arange(8), np.arange(8.0)[None]
    assert np.isnan(shift.shift(flat, other)).all()
    assert np.isnan(shift.shift(other, flat)).all()
    assert np.isnan(shift.shift_of_others(other, flat)).all()
    both = np.concatenate([flat, other])
    assert np.isfinite(shift.shift_of_shuffled(both, both, shuffles=5)).all()


def test_nulls_of_shift():
    rng = np.random.default_rng(1)
    before, after = rng.random((2, 6, 4))
    every = [shift.shift(before, after[:, list(order)]).mean() for order in permutations(range(4))]
    drawn = shift.shift_of_shuffled(before, after, shuffles=4000)
    assert np.abs(drawn[:, None] - np.array(every)).min(1).max() < 1e-12  # each draw is one of the 24 orders
    assert drawn.mean() == pytest.approx(1.0, abs=0.03)
    others = [np.mean([1 - looking.pearson(list(before[i]), list(after[j])) for j in range(6) if j != i]) for i in range(6)]
    np.testing.assert_allclose(shift.shift_of_others(before, after), others, atol=1e-12)
    assert np.isnan(shift.shift_of_others(before[:1], after[:1])).all()


def test_densities_take_the_causal_bias_away():
    visible = np.tril(np.ones((4, 4)))
    attention = visible / visible.sum(1, keepdims=True)  # each row spreads evenly over what it sees
    rows, sets = [2, 3], [[0, 1], [2, 3]]
    mass = np.array([[attention[rows][:, s].sum(1).mean() for s in sets]])
    pairs = np.array([[int(visible[rows][:, s].sum()) for s in sets]])
    assert pairs.tolist() == [[4, 3]]
    expected = [attention[rows][:, s].sum() / n for s, n in zip(sets, pairs[0], strict=True)]
    np.testing.assert_allclose(shift.densities(mass, 2, pairs)[0], expected)
    assert shift.densities(mass, 2, np.zeros((1, 2), dtype=np.int64)).tolist() == [[0.0, 0.0]]


# --- sinks -----------------------------------------------------------------------------------------------------------


def test_phi_of_an_injected_massive_dimension():
    states = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    states[1, 7] = 1000.0
    found = sinks.sink_score(states, (7, 30))
    assert found.tolist() == pytest.approx([looking.phi(state, (7, 30)) for state in states.tolist()], rel=1e-5)
    assert found[1] == pytest.approx(8.0, rel=1e-3)  # all of a state in one of 64 dimensions: sqrt(64)
    assert found[0] < 3 > found[2]
    torch.testing.assert_close(sinks.sink_score(5 * states, (7, 30)), found, rtol=1e-4, atol=1e-4)
    assert sinks.largest_dimensions(states[1:2], 1) == (7,)


@pytest.mark.parametrize("family", ["llava", "qwen2_vl"])
def test_a_massive_dimension_is_found_in_a_model(family, pair):
    """The first position's embedding and the picture's are made massive in one dimension: both are found, the words are not."""
    subject = load(toys.build(family))
    first = subject.encode(pair[0]).maps[0].tokens[0]
    with torch.no_grad():
        subject.model.get_input_embeddings().weight[first, 11] = 900.0
        connector = subject.model.get_submodule(subject.anatomy.connector)
        last = [module for module in connector.modules() if isinstance(module, torch.nn.Linear)][-1]
        last.bias[11] = 900.0
    layers = sink_layers(subject)
    assert layers == [2, 3]
    encoded = subject.encode(pair)
    dimensions = massive_dimensions(subject, subject.encode(pair[0]), layers)
    assert dimensions[0] == 11
    readings, _ = read_sinks(subject, encoded, dimensions, [3, 4], layers)
    for reading, token_map in zip(readings, encoded.maps, strict=True):
        assert reading.shown.tolist() == places_of(token_map).tolist()
        assert (reading.phi > 5).all()  # at most sqrt(32)
        assert reading.phi_text[0, 0] > 5
        assert (reading.phi_text[:, 1:] < 5).all()
        assert (reading.control < 5).all()


@pytest.mark.parametrize(("family", "side"), CASES[:6])
def test_readings_are_what_loops_over_hidden_states_and_eager_attention_give(toy, pair, family, side):
    subject = toy(family)
    encoded = subject.encode(pair, side)
    layers = sink_layers(subject, 1)
    readings, logits = read_sinks(subject, encoded, (3, 9), (4, 5), layers)
    with torch.no_grad():
        hidden = subject.model(**encoded.inputs, output_hidden_states=True, use_cache=False).hidden_states
    eager = eager_patterns(subject, encoded)
    for i, (reading, token_map) in enumerate(zip(readings, encoded.maps, strict=True)):
        for k, layer in enumerate(layers):
            states = hidden[layer][i].tolist()
            slow = [looking.phi(states[position], (3, 9)) for position in reading.shown]
            np.testing.assert_allclose(reading.phi[k], slow, atol=1e-4)
            np.testing.assert_allclose(
                reading.attention[k].sum(-1), looking.ratio(eager[layer][i], token_map.last, reading.shown), atol=1e-5
            )
    assert logits.shape == (2, subject.vocabulary)


def test_shares_heads_and_places_by_hand():
    attention = np.array([[[0.3, 0.1, 0.0], [0.0, 0.0, 0.0], [0.05, 0.3, 0.05]]])  # one layer, three heads, three positions
    chosen = np.array([[True, False, False]])
    np.testing.assert_allclose(sinks.sink_share(attention, chosen), [[0.75, 0.0, 0.125]])
    assert sinks.image_centric(attention, chosen).tolist() == [[False, False, True]]
    assert sinks.on_background(chosen, np.array([True, True, False])) == (1.0, pytest.approx(2 / 3))
    none, chance = sinks.on_background(np.zeros((1, 3), dtype=bool), np.array([True, False, False]))
    assert np.isnan(none)
    assert chance == pytest.approx(1 / 3)
    assert sinks.counts(np.array([[1.0, 5.0, 20.0], [0.0, 30.0, 20.0]]), (4.0, 20.0)).tolist() == [2.0, 0.5]
    rank = sinks.attention_and_score(np.array([[[0.1, 0.2, 0.3, 0.4]]]), np.array([[1.0, 2.0, 3.0, 9.0]]))
    assert rank.tolist() == pytest.approx([1.0])


def test_moved_sinks_are_as_many_and_none_of_them():
    rng = np.random.default_rng(0)
    chosen = np.zeros((3, 10), dtype=bool)
    chosen[:, 2] = chosen[1, 5] = True
    made = sinks.moved(chosen, rng)
    assert made.sum(1).tolist() == chosen.sum(1).tolist() == [1, 2, 1]
    assert not (made & chosen.any(0)).any()
    crowded = np.ones((1, 4), dtype=bool)
    assert sinks.moved(crowded, rng).sum() == 0


def test_layers_without_attention_are_refused(toy):
    with pytest.raises(EditError, match="there is no attention from layer 9 on: the model has layers 0 to 3"):
        sink_layers(toy("llava"), 9)


# --- ratios ----------------------------------------------------------------------------------------------------------


def test_windows_are_the_published_ones_at_32_layers():
    found = svar.windows(32)
    assert {name: (layers.start, layers.stop - 1) for name, layers in found.items()} == {
        "early": (0, 4), "middle": (5, 18), "late": (19, 31), "all": (0, 31),
    }  # fmt: skip
    assert svar.windows(8)["middle"] == range(1, 5)
    for count in range(1, 50):
        parts = svar.windows(count)
        assert [i for name in ("early", "middle", "late") for i in parts.get(name, ())] == list(range(count))


@pytest.mark.parametrize(("family", "side"), CASES[:6])
def test_svar_is_a_sum_over_layers_of_means_over_heads(toy, pair, family, side):
    subject = toy(family)
    encoded = subject.encode(pair, side)
    found = trace(subject, encoded, [Mass(("last",), ("media",))])["mass"]
    eager = eager_patterns(subject, encoded)
    for i, token_map in enumerate(encoded.maps):
        ratio = found.at(batch=i, row_group="last", column_group="media").numpy()
        slow = 0.0
        for layer in svar.windows(subject.n_layers)["middle"]:
            each = looking.ratio(eager[layer][i], token_map.last, token_map.positions("media"))
            slow += sum(each) / len(each)
        assert float(svar.svar(ratio, svar.windows(subject.n_layers)["middle"])) == pytest.approx(slow, abs=1e-5)
    # layers that have no attention to record are passed over
    assert float(svar.svar(np.ones((2, 3)), range(4), [1, 3])) == 2.0
    assert float(svar.svar(np.ones((2, 3)), range(2), [1, 3])) == 1.0


# --- detection -------------------------------------------------------------------------------------------------------


def _drawn(n=60, seed=0):
    rng = np.random.default_rng(seed)
    return np.round(rng.normal(size=n), 1), rng.random(n) < 0.4, rng.integers(0, 3, n)


def test_auroc_and_precision_are_sklearns():
    for seed in range(5):
        scores, positive, strata = _drawn(seed=seed)
        assert len(np.unique(scores)) < len(scores)  # there are ties
        assert detection.auroc(scores, positive) == pytest.approx(roc_auc_score(positive, scores))
        assert detection.average_precision(scores, positive) == pytest.approx(average_precision_score(positive, scores))
        assert detection.auroc(scores, positive, strata) == pytest.approx(looking.auroc(scores, positive, strata))


def test_auroc_of_ties_by_hand():
    positive = np.array([True, True, False, False])
    assert detection.auroc(np.array([1.0, 1.0, 1.0, 1.0]), positive) == 0.5
    assert detection.auroc(np.array([3.0, 1.0, 1.0, 0.0]), positive) == 0.875
    assert detection.average_precision(np.array([1.0, 1.0, 1.0, 1.0]), positive) == 0.5
    with pytest.raises(DataError, match="no two examples can be compared"):
        detection.auroc(np.array([1.0, 2.0]), np.array([True, True]))
    with pytest.raises(DataError, match="no two examples can be compared"):
        detection.auroc(np.array([1.0, 2.0]), np.array([True, False]), np.array([0, 1]))


def test_detection_of_something_and_of_nothing():
    rng = np.random.default_rng(3)
    positive = np.arange(200) < 60
    good = detection.detect(rng.normal(size=200) + 2 * positive, positive)
    assert 0.85 < good.low < good.auroc < good.high <= 1
    assert good.p == pytest.approx(1 / 2001)
    assert good.null_low < 0.5 < good.null_high
    assert good.base == pytest.approx(0.3)
    assert good.ap_low <= good.ap <= good.ap_high
    nothing = detection.detect(rng.normal(size=200), positive)
    assert nothing.p > 0.05
    assert nothing.low < 0.5 < nothing.high
    np.testing.assert_array_equal(
        detection.resampled_auroc(np.arange(200.0), positive), detection.resampled_auroc(2 * np.arange(200.0), positive)
    )


def test_permuted_labels_stay_in_their_strata():
    scores, positive, strata = _drawn()
    labels = detection.permuted_labels(positive, strata, permutations=50)
    for group in range(3):
        assert (labels[:, strata == group].sum(1) == positive[strata == group].sum()).all()
    assert (labels != positive).any(1).all()
    null = detection.null_auroc(scores, positive, strata)
    again = [looking.auroc(scores, row, strata) for row in detection.permuted_labels(positive, strata)[:5]]
    np.testing.assert_allclose(null[:5], again)


def test_differences_are_within_strata():
    rng = np.random.default_rng(4)
    strata = np.repeat([0, 1, 2], [40, 40, 4])
    positive = np.concatenate([np.arange(40) < 30, np.arange(40) < 5, np.ones(4, dtype=bool)])  # the third has no negative
    values = rng.normal(size=(84, 2, 3)) + 5 * strata[:, None, None]  # what differs is the stratum, not the label
    values[:, 1, 2] += 2 * positive
    mean, low, high, p = detection.difference(values, positive, strata)
    slow = [[looking.matched_gap(values[:, i, j], positive, strata) for j in range(3)] for i in range(2)]
    np.testing.assert_allclose(mean, slow)
    assert (low < mean).all()
    assert (mean < high).all()
    assert p[1, 2] == pytest.approx(1 / 2001)
    assert (np.delete(p.ravel(), 5) > 0.01).all()
    raw, *_, apart = detection.difference(values, positive)
    assert abs(raw[0, 0]) > 1
    assert apart[0, 0] < 0.01
