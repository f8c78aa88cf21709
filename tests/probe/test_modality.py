"""Modality importance: the hand cases, the definition in a loop, Shapley values exactly; MM-SHAP on toys."""

from dataclasses import replace
from itertools import product

import numpy as np
import pytest

from probe.analysis.modality import CATEGORIES, category, importance, name_of, shapley, shares, subsets
from probe.errors import EditError, ExampleError
from probe.shares import contributions, players_of
from probe.tracing import last_logits
from tests import toys
from tests.oracles import modality as oracle

# right from V, from S, from both: importance of V, of S, category
HAND = {
    (0, 0, 1): (1, 1, "complementary"), (0, 1, 1): (0, 1, "S-biased"), (1, 0, 1): (1, 0, "V-biased"),
    (1, 1, 1): (0, 0, "agnostic-correct"), (0, 0, 0): (0, 0, "agnostic-incorrect"), (0, 1, 0): (-1, 0, "S-biased"),
    (1, 1, 0): (-1, -1, "none"), (1, 0, 0): (0, -1, "V-biased"),
}  # fmt: skip


def test_the_hand_cases_are_all_cases():
    assert set(HAND) == set(product((0, 1), repeat=3))
    for (v, s, both), (of_v, of_s, kind) in HAND.items():
        right = {frozenset("V"): float(v), frozenset("S"): float(s), frozenset("VS"): float(both)}
        assert importance(right, "VS") == {"V": of_v, "S": of_s}
        assert category(right, "VS") == kind


@pytest.mark.parametrize("names", ["VS", "VSA", "VSAT"])
def test_importance_is_the_definition_for_any_number(names):
    assert len(subsets(names)) == 2 ** len(names) - 1
    rng = np.random.default_rng(0)
    for binary in (True, False) * 5:
        values = rng.integers(0, 2, len(subsets(names))).astype(float) if binary else rng.random(len(subsets(names)))
        scores = dict(zip(subsets(names), values, strict=True))
        spelt = {"".join(sorted(s)): v for s, v in scores.items()}
        found = importance(scores, names)
        assert found == pytest.approx(oracle.importance(spelt, names))
        assert all(-1 <= value <= 1 for value in found.values())
        assert category(scores, names) in (*CATEGORIES, *(f"{m}-biased" for m in names))


def test_of_three_modalities_a_bias_is_one_modality_alone():
    right = {s: float(s != frozenset("C")) for s in subsets("ABC")}
    assert category(right, "ABC") == "none"  # A and B both help, beside C that does not
    right = {s: float("A" in s) for s in subsets("ABC")}
    assert importance(right, "ABC") == pytest.approx({"A": 1, "B": 0, "C": 0})
    assert category(right, "ABC") == "A-biased"


def test_bad_scores_are_refused():
    with pytest.raises(EditError, match="two or more are needed, not 1"):
        importance({frozenset("V"): 1.0}, "V")
    with pytest.raises(EditError, match=r"S\+V has none"):
        importance({frozenset("V"): 1.0, frozenset("S"): 1.0}, "VS")
    assert name_of(frozenset()) == "nothing"


def test_shapley_values_are_exact_on_small_games():
    weights = np.array([1.0, -2.0, 0.5, 3.0])

    def linear(some):
        return float(sum(weights[i] for i in some))

    def glove(some):  # two left gloves, one right one: only pairs are worth something
        return float(bool({0, 1} & set(some)) and 2 in some)

    assert shapley(lambda many: [linear(one) for one in many], 4, 2) == pytest.approx(weights)
    exact = oracle.shapley(glove, 3)
    assert exact == pytest.approx([1 / 6, 1 / 6, 4 / 6])
    drawn = shapley(lambda many: [glove(one) for one in many], 3, 600)
    assert drawn == pytest.approx(exact, abs=0.05)
    assert drawn.sum() == pytest.approx(1)


def test_shares_sum_to_one():
    assert shares(np.array([1.0, -1.0, 2.0]), ["image", "image", "text"]) == {"image": 0.5, "text": 0.5}
    assert shares(np.zeros(2), ["image", "text"]) == {"image": 0.5, "text": 0.5}


@pytest.mark.parametrize("family", ["llava", "qwen2_vl", "qwen2_audio"])
def test_contributions_sum_to_what_everything_adds(toy, family):
    subject = toy(family)
    example = toys.pair(subject)[0]
    encoded = subject.encode(example)
    found = contributions(subject, example, groups=2, samples=2)
    medium = "audio" if family == "qwen2_audio" else "image"
    assert found.owners == (medium, medium, "text", "text")
    assert found.values.sum() == pytest.approx(found.full - found.empty, abs=1e-4)
    assert found.full == pytest.approx(float(last_logits(subject, encoded)[0].log_softmax(-1).max()), abs=1e-4)
    assert np.abs(found.values).min() > 0
    assert sum(found.sizes[:2]) == len(encoded.maps[0].positions(medium))
    one_by_one = contributions(subject, example, groups=2, samples=2, batch=1)
    assert one_by_one.values == pytest.approx(found.values, abs=1e-4)


def test_tokens_that_cannot_be_hidden_are_refused(toy):
    with pytest.raises(EditError, match="no softmax attention: no token can be hidden"):
        contributions(toy("qwen3_5"), toys.pair(toy("qwen3_5"))[0])
    subject = toy("llava")
    blind = replace(toys.pair(subject)[0], images=())
    with pytest.raises(ExampleError, match="no tokens of a medium beside its words"):
        players_of(subject.encode(blind).maps[0], blind, 4)
    with pytest.raises(ExampleError, match="no tokens of a medium"):
        contributions(toy("mllama"), toys.pair(toy("mllama"))[0])
