"""Relevance as one row from the top, against the rules that multiply whole matrices and autograd through the whole model."""

import numpy as np
import pytest
import torch

from probe import load
from probe.analysis import relevance as pure
from probe.attention import Call
from probe.errors import EditError
from probe.relevance import METHODS, relevance
from probe.tracing import last_logits
from tests import toys
from tests.oracles import relevance as oracle
from tests.probe.test_lens import Largest

FAMILIES = (
    "llava", "llava_next", "qwen2_vl", "qwen3_vl", "qwen3_vl_moe", "gemma3", "gemma4", "paligemma", "internvl", "qwen2_audio"
)  # fmt: skip
RULES = ("attention", "rollout", "gradient-attention", "gradient-input")


def test_ten_families_are_followed():
    assert len(FAMILIES) == 10


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", FAMILIES)
def test_one_row_is_the_row_of_the_full_rule(toy, family, side):
    """Grouped heads, sliding windows, soft caps, DeepStack, experts, bidirectional prefixes; padding on either side."""
    subject, examples = toy(family), toys.pair(toy(family))
    encoded = subject.encode(examples, side)
    found = relevance(subject, encoded, RULES)
    for i, example in enumerate(examples):
        expected = oracle.by_the_rules(subject, subject.encode(example), found.targets[i : i + 1])
        real = encoded.maps[i].positions("real")
        assert set(expected) == set(RULES)
        for name, row in expected.items():
            scale = float(row.abs().max())
            near = 5e-5 if name == "gradient-input" else 1e-5  # a difference of large terms
            torch.testing.assert_close(found.scores[name][i][real] / scale, row / scale, atol=near, rtol=0)
            assert found.scores[name][i][encoded.maps[i].positions("pad")].abs().sum() == 0


@pytest.mark.parametrize("family", ["llava", "qwen2_vl", "qwen3_5"])
def test_integrated_gradients_are_those_of_the_whole_model(toy, family):
    subject, examples = toy(family), toys.pair(toy(family))
    encoded = subject.encode(examples)
    given = torch.randn(32, generator=torch.Generator().manual_seed(0)) * 0.1
    found = relevance(subject, encoded, ["integrated-gradients", "gradient-input"], steps=4, baseline=given)
    for i, example in enumerate(examples):
        alone = subject.encode(example)
        if family != "qwen3_5":  # eager attention of the oracle needs attentions
            shown = torch.from_numpy(alone.maps[0].positions("image"))
            scores, rise = oracle.integrated(subject, alone, found.targets[i : i + 1], shown, given, 4)
            real = encoded.maps[i].positions("real")
            torch.testing.assert_close(found.scores["integrated-gradients"][i][real], scores, atol=1e-5, rtol=1e-4)
            assert float(found.rise[i]) == pytest.approx(rise, abs=1e-5)
        outside = np.setdiff1d(np.arange(len(encoded.maps[i])), encoded.maps[i].positions("image"))
        assert found.scores["integrated-gradients"][i][outside].abs().sum() == 0


def test_more_steps_come_nearer_to_completeness(toy, pair):
    subject = toy("llava")
    encoded = subject.encode(pair)
    gaps = [float(relevance(subject, encoded, ["integrated-gradients"], steps=n).gap.max()) for n in (1, 4, 16)]
    assert gaps[2] < 0.2 * gaps[1] < 0.2 * gaps[0]
    found = relevance(subject, encoded, ["integrated-gradients"], steps=16, baseline="zero")
    left = (found.scores["integrated-gradients"].sum(1) - found.rise).abs()
    torch.testing.assert_close(found.gap, left, atol=1e-5, rtol=0)
    assert float(found.gap.max()) > gaps[2]  # a norm is steep around zero: that the steps miss it is said


def test_targets_can_be_given_and_are_the_likeliest_otherwise(toy, pair):
    subject = toy("llava")
    encoded = subject.encode(pair)
    logits = last_logits(subject, encoded)
    found = relevance(subject, encoded, ["gradient-input"])
    assert found.targets.tolist() == logits.argmax(-1).tolist()
    torch.testing.assert_close(found.logits, logits.amax(-1), atol=1e-5, rtol=0)
    other = relevance(subject, encoded, ["gradient-input"], targets=torch.tensor([5, 9]))
    torch.testing.assert_close(other.logits, logits.gather(1, torch.tensor([[5], [9]]))[:, 0], atol=1e-5, rtol=0)
    assert not torch.equal(other.scores["gradient-input"], found.scores["gradient-input"])


def test_rollout_fuses_heads_and_keeps_its_mass(toy, pair):
    subject = toy("llava")
    rows = {
        fusion: relevance(subject, subject.encode(pair), ["rollout"], fusion=fusion).scores["rollout"]
        for fusion in pure.FUSIONS
    }
    for row in rows.values():
        torch.testing.assert_close(row.sum(1), torch.ones(2), atol=1e-5, rtol=0)
    assert not torch.allclose(rows["mean"], rows["max"])


def _call(n, heads=2, groups=1, seed=0):
    rng = torch.Generator().manual_seed(seed)
    query = torch.randn(1, heads, n, 4, generator=rng)
    key, value = (torch.randn(1, groups, n, 4, generator=rng) for _ in range(2))
    return Call(torch.nn.Identity(), query, key, value, None, {"is_causal": True}, lambda *a, **k: None)


def test_two_positions_by_hand():
    """One head, keys and query so that the second row looks at both alike: attention [[1, 0], [1/2, 1/2]]."""
    call = _call(2, heads=1)
    call.query = torch.zeros_like(call.query)
    call.value = torch.tensor([[[[2.0, 0, 0, 0], [0, 4.0, 0, 0]]]])
    start = torch.tensor([[0.0, 1.0]])
    assert pure.rollout_step(start, call).tolist() == [[0.25, 0.75]]
    slope = torch.zeros(1, 2, 1, 4)
    slope[0, 1, 0, :2] = torch.tensor([3.0, -1.0])  # gradients of the second row's weights: 6 and -4, of which the first counts
    assert pure.gradient_step(start, call, slope).tolist() == [[3.0, 1.0]]


def test_no_matrix_of_all_positions_is_held(monkeypatch):
    n, heads = 96, 4
    monkeypatch.setattr(pure, "FEWEST", 1)
    call, slope = _call(n, heads, 2), torch.randn(1, n, heads, 4, generator=torch.Generator().manual_seed(4))
    start = torch.rand(1, n, generator=torch.Generator().manual_seed(5))
    whole = (pure.rollout_step(start, call), pure.gradient_step(start, call, slope))
    with Largest() as seen:
        pure.gradient_step(start, call, slope)
    assert heads * n * n // (2 * pure.PARTS) < seen.entries <= heads * n * n // pure.PARTS
    monkeypatch.setattr(pure, "PARTS", 1)
    with Largest() as seen:
        pure.gradient_step(start, call, slope)
    assert seen.entries >= heads * n * n  # in one block everything is there at once
    monkeypatch.setattr(pure, "BLOCK", heads * n * 4)
    with Largest() as seen:
        tiled = (pure.rollout_step(start, call), pure.gradient_step(start, call, slope))
    assert seen.entries <= heads * n * 4 < n * n
    for a, b in zip(tiled, whole, strict=True):
        torch.testing.assert_close(a, b)


def test_rows_without_relevance_are_not_computed(monkeypatch):
    call, start = _call(32), torch.zeros(1, 32)
    start[0, -1] = 1.0
    monkeypatch.setattr(pure, "BLOCK", 2 * 32)
    assert [rows.tolist() for rows, _ in pure.blocks(call, start)] == [[31]]


def test_the_model_is_as_it_was(toy, pair):
    subject = toy("llava")
    encoded = subject.encode(pair)

    def state():
        hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in subject.model.modules())
        return hooks, subject.decoder.config._attn_implementation, [p.grad for p in subject.model.parameters()]

    before, clean = state(), last_logits(subject, encoded)
    relevance(subject, encoded, steps=2)
    assert state() == before
    assert torch.equal(last_logits(subject, encoded), clean)

    def stop(module, args, output):
        raise RuntimeError("stop here")

    handle = subject.layers[2].register_forward_hook(stop)
    with pytest.raises(RuntimeError, match="stop here"):
        relevance(subject, encoded, steps=2)
    handle.remove()
    assert state() == before


def test_half_precision_gives_finite_scores_of_the_same_order(pair):
    model, processor = toys.build("llava")
    subject = load((model, processor))
    targets = last_logits(subject, subject.encode(pair)).argmax(-1)
    full = relevance(subject, subject.encode(pair), targets=targets, steps=4)
    half = load((model.to(torch.bfloat16), processor))
    found = relevance(half, half.encode(pair), targets=targets, steps=4)
    assert set(found.scores) == set(METHODS)
    for name, scores in found.scores.items():
        assert scores.dtype == torch.float32
        assert scores.isfinite().all()
        assert torch.corrcoef(torch.stack([scores[0], full.scores[name][0]]))[0, 1] > 0.9, name


def test_what_cannot_be_followed_is_refused(toy, pair):
    llava = toy("llava")
    encoded = llava.encode(pair)
    for asked, message in (
        ({"methods": ["rolout"]}, "there is no method 'rolout' .did you mean 'rollout'"),
        ({"methods": []}, "at least one method"),
        ({"steps": 0}, "at least one step, not 0"),
        ({"fusion": "sum"}, "there is no fusion 'sum'"),
        ({"baseline": "blur", "steps": 1}, "there is no baseline 'blur'"),
        ({"baseline": torch.zeros(3), "steps": 1}, r"a baseline has the shape \(32,\), not \(3,\)"),
    ):
        with pytest.raises(EditError, match=message):
            relevance(llava, encoded, **asked)
    hybrid = toy("qwen3_5")
    with pytest.raises(EditError, match=r"layer 0 of this Qwen3\.5 model .* mixes positions without softmax attention"):
        relevance(hybrid, hybrid.encode(toys.pair(hybrid)))
    crossing = toy("mllama")
    with pytest.raises(EditError, match=r"layer 1 of this .*Mllama.* reads the picture through cross-attention"):
        relevance(crossing, crossing.encode(toys.pair(crossing)))


def test_scores_are_counted_by_hand():
    scores = np.array([1.0, -5.0, 3.0, 0.0])
    assert pure.share_inside(scores, np.array([2, 1])) == 0.75
    assert np.isnan(pure.share_inside(-np.ones(3), np.array([0])))
    assert pure.ranked(np.array([1.0, 3.0, 1.0, 2.0])).tolist() == [1, 3, 0, 2]
