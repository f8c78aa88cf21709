"""Scores of layers: against the slow way, on layers that do nothing, and as passes read them."""

import copy

import numpy as np
import pytest
import torch

from compress import evidence
from compress.layer_scores import COSINES, SCORES, layer_scores, measurable, withdrawal_kl
from compress.passes.layers import RemoveLayers
from compress.passes.tokens import Withdraw
from compress.recipe import compress
from probe import load
from probe.errors import PassError
from probe.tracing import last_logits
from tests import toys
from tests.oracles import layer_scores as slow

FAMILIES = ("llava", "qwen3_vl", "gemma3", "qwen2_audio")


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_are_those_of_the_slow_way(toy, family):
    subject = toy(family)
    examples = toys.pair(subject)
    found = layer_scores(subject, examples)
    assert list(found) == list(SCORES)
    for row, example in enumerate(examples):
        for score, kind in zip(COSINES, ("all", "visual", "text"), strict=True):
            np.testing.assert_allclose(found[score][row], slow.block_influence(subject, example, kind), atol=1e-5)
        np.testing.assert_allclose(found["contribution"][row], slow.contribution(subject, example), atol=1e-5, rtol=1e-3)
        for length, first in ((1, 0), (2, 1), (4, 0)):
            assert found["angular"][row, length - 1, first] == pytest.approx(
                slow.angle(subject, example, length, first), abs=1e-5
            )
    assert np.isnan(found["angular"][0]).sum() == 6  # 4 layers: no first layer 2, 3 ... of the longer blocks


@pytest.mark.parametrize("family", FAMILIES)
def test_withdrawal_is_what_the_pass_would_do(toy, family):
    """KL(full || withdrawn) against the model with the visual tokens really gone."""
    subject = load(toys.wide(family))
    example = toys.pair(subject)[0]
    found = withdrawal_kl(subject, [example])
    encoded = subject.encode(example)
    full = last_logits(subject, encoded)[0]
    compared = 0
    for layer in range(3 if family == "qwen3_vl" else 1, subject.n_layers):
        smaller = compress(subject, [Withdraw(layer=layer)])
        assert found[0, layer] == pytest.approx(slow.kl(full, last_logits(smaller, encoded)[0]), abs=1e-5, rel=1e-3)
        smaller.detach()
        compared += 1
    assert compared == (1 if family == "qwen3_vl" else 3)
    assert found.max() > 1e-4


def emptied(layer):
    """A layer of a toy copied, its maps so that it adds nothing."""
    subject = load(toys.build("llava"))
    block = subject.layers[layer]
    for weight in (block.self_attn.o_proj.weight, block.mlp.down_proj.weight):
        torch.nn.init.zeros_(weight)
    return subject


def test_a_layer_that_does_nothing_scores_nothing():
    subject = emptied(1)
    found = layer_scores(subject, toys.pair(subject))
    for score in (*COSINES, "contribution"):
        np.testing.assert_allclose(found[score][:, 1], 0, atol=1e-6)
        assert (found[score][:, 0] > 1e-4).all()
    np.testing.assert_allclose(found["angular"][:, 0, 1], 0, atol=1e-6)


def test_a_layer_that_only_scales_turns_nothing_and_still_contributes():
    subject = emptied(1)
    scaled = subject.layers[1].register_forward_hook(
        lambda module, args, output: (output[0] * 3, *output[1:]) if isinstance(output, tuple) else output * 3
    )
    found = layer_scores(subject, toys.pair(subject))
    scaled.remove()
    for score in COSINES:
        np.testing.assert_allclose(found[score][:, 1], 0, atol=1e-6)
    np.testing.assert_allclose(found["angular"][:, 0, 1], 0, atol=1e-6)
    assert (found["contribution"][:, 1] > 2e-5).all()  # the next norm takes the scale away, the residual stream does not


def test_the_last_layer_cannot_contribute_through_visual_tokens(toy):
    subject = toy("llava")
    assert layer_scores(subject, toys.pair(subject), ["contribution"])["contribution"][:, -1].max() < 1e-9


def test_the_direction_is_that_of_the_modified_model(toy):
    subject = toy("llava")
    example = toys.pair(subject)[0]
    encoded = subject.encode(example)
    plain = last_logits(subject, encoded)[0]
    one = slow.frozen(subject, encoded, 0)[0]
    found = layer_scores(subject, [example], ["contribution"])["contribution"][0, 0]
    assert found == pytest.approx(slow.kl(one, plain), rel=1e-3)
    assert abs(found - slow.kl(plain, one)) > 1e-3 * found


def test_evidence_is_what_passes_read(toy):
    subject = toy("llava")
    examples = toys.pair(subject)
    found = evidence.gather(subject, examples, ["layer_scores", "withdrawal_kl"])
    scores = found["layer_scores"]
    assert set(scores) == set(SCORES)
    assert [len(scores["angular"][str(n)]) for n in range(1, 5)] == [4, 3, 2, 1]
    for score in (*COSINES, "contribution"):
        ends = found["layer_score_intervals"][score]
        assert all(low <= value <= high for low, value, high in zip(ends["low"], scores[score], ends["high"], strict=True))
        dropped = RemoveLayers(count=1, score=score).plan(subject, found)[0].layers
        assert dropped == (int(np.argmin(scores[score])),)
    first = int(np.argmin(scores["angular"]["2"]))
    assert RemoveLayers(count=2, score="angular").plan(subject, found)[0].layers == (first, first + 1)
    smaller = compress(subject, [RemoveLayers(count=1)], found)
    assert smaller.ledger[0].evidence["layer_scores"]["contribution"] == scores["contribution"]
    kl = found["withdrawal_kl"]
    assert len(kl) == subject.n_layers
    assert Withdraw(eta=max(kl[1:])).plan(subject, found)[0].layer == 1
    assert Withdraw(eta=-1.0).plan(subject, found) == []


def test_what_there_is_no_evidence_for(toy):
    subject = toy("llava")
    with pytest.raises(PassError, match=r"there is no evidence 'layer_score'.*did you mean 'layer_scores'"):
        evidence.gather(subject, toys.pair(subject), ["layer_score"])
    with pytest.raises(PassError, match="give at least one"):
        evidence.gather(subject, [], ["layer_scores"])
    blind = toys.pair(subject, media=False)
    with pytest.raises(PassError, match="needs examples that show something"):
        evidence.gather(subject, blind, ["withdrawal_kl"])
    assert set(evidence.gather(subject, blind, ["layer_scores"])["layer_scores"]) == {
        "block_influence", "block_influence_text", "angular",
    }  # fmt: skip


def test_pictures_outside_the_sequence_are_refused_by_name(toy):
    subject = toy("mllama")
    assert measurable(subject) == ("block_influence", "block_influence_text", "angular")
    with pytest.raises(PassError, match="no score 'block_influence_visual'"):
        layer_scores(subject, toys.pair(subject))
    with pytest.raises(PassError, match="nothing to withdraw"):
        withdrawal_kl(subject, toys.pair(subject))
    assert set(evidence.gather(subject, toys.pair(subject), ["layer_scores"])["layer_scores"]) == set(measurable(subject))


def test_many_examples_are_drawn_from(toy, monkeypatch):
    subject = toy("llava")
    monkeypatch.setattr(evidence, "MOST", 1)
    one, two = toys.pair(subject)
    found = evidence.gather(subject, [one, two], ["withdrawal_kl"], seed=0)
    alone = [evidence.gather(subject, [example], ["withdrawal_kl"]) for example in (one, two)]
    assert found["withdrawal_kl"] in [each["withdrawal_kl"] for each in alone]
    assert copy.deepcopy(found) == evidence.gather(subject, [one, two], ["withdrawal_kl"], seed=0)
