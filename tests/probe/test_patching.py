"""Patching: hand-sized numbers, the definition by plain hooks, slopes by finite differences, and what must come out."""

import numpy as np
import pytest
import torch

from probe import Example, load, sweep
from probe.analysis.patching import agreement, attribution, effect, handover, logit_difference
from probe.patching import SITES, STREAM, attribute, capture, nudges, patches
from probe.tracing import last_logits
from tests import toys
from tests.oracles import patching as oracle

TOKENS = (30, 77)


def two(subject, count=1):
    """The same questions with two pictures each: clean and corrupt."""
    asked = ("is there a dog ?", "what color is the ball ?")[:count]
    sides = ([Example("a", text, (toys.picture(seed=seed + i),)) for i, text in enumerate(asked)] for seed in (0, 5))
    return tuple(sides)


def apart(subject, clean, corrupt):
    """The two tokens whose logits the two runs change most against each other."""
    gap = (last_logits(subject, clean) - last_logits(subject, corrupt))[0]
    return int(gap.argmax()), int(gap.argmin())


def test_effects_by_hand():
    assert effect(np.array([-2.0, 0.0, 3.0, 4.0]), 3.0, -2.0).tolist() == [0.0, 0.4, 1.0, 1.2]
    assert np.isnan(effect(np.array([1.0, 2.0]), 1.05, 1.0)).all()
    assert effect(np.array([1.05]), 1.05, 1.0, least=0.0).tolist() == [1.0]
    assert np.isnan(effect(np.array([1.0]), 1.0, 1.0, least=0.0)).all()
    assert logit_difference(torch.tensor([[5.0, 2.0, 1.0], [0.0, 4.0, 1.0]]), 0, 1).tolist() == [3.0, -4.0]
    states = torch.tensor([[1.0, 2.0], [0.0, 0.0]])
    assert attribution(states, torch.tensor([[0.0, 5.0], [0.0, 1.0]]), torch.tensor([[2.0, 1.0], [1.0, 0.0]])).tolist() == [
        -1.0,
        0.0,
    ]


def test_the_handover_by_hand():
    source = np.array([[1.0, 0.8, 0.3, 0.1], [1.0, 0.6, 0.3, 0.1]])
    target = np.array([[0.0, 0.9, 0.5, 0.9], [0.0, 0.1, 0.5, 0.9]])
    found = handover(source, target)  # mean gaps -1, -0.2, 0.2, 0.8
    assert (found.layer, found.low, found.high) == (2, 1, 2)
    assert handover(target[:1], target[:1]).layer == 4  # never more
    assert handover(source * 0, source).layer == 0


def test_agreement_is_the_correlation_over_pairs_and_sites():
    rng = np.random.default_rng(0)
    exact = rng.normal(size=(6, 4, 3))
    estimate = exact * 0.5 + rng.normal(size=exact.shape) * 0.3
    estimate[2, 1], exact[4, 0, 2] = np.nan, np.nan
    exact[:, :, 1] = 0.25
    found = agreement(exact, estimate)
    for layer in (0, 2):
        known = ~(np.isnan(exact[..., layer]) | np.isnan(estimate[..., layer]))
        want = oracle.correlation(exact[..., layer][known].tolist(), estimate[..., layer][known].tolist())
        assert found.value[layer] == pytest.approx(want, abs=1e-12)
        assert found.low[layer] < found.value[layer] < found.high[layer]
    assert np.isnan([found.value[1], found.low[1], found.high[1]]).all()
    alone = agreement(exact[:1], estimate[:1])
    assert alone.low[0] == alone.value[0] == alone.high[0]


@pytest.mark.parametrize("family", toys.PLAIN)
def test_everything_at_the_input_is_the_clean_run_and_nothing_is_the_corrupt_one(toy, family):
    subject = toy(family)
    clean, encoded = (subject.encode(side) for side in two(subject))
    caught, tokens = capture(subject, clean), apart(subject, clean, encoded)
    real = encoded.maps[0].positions("real").tolist()
    deepstack = 3 if subject.anatomy.row.deepstack else 0  # the corrupt picture's features are added in the first layers
    found = sweep(subject, encoded, [patches(caught, 0, "resid_pre", [deepstack], real), (), patches(caught, 0, "z", [1], [])])
    before, after = (float(logit_difference(x, *tokens)) for x in (caught.logits[0], found.clean[0]))
    assert abs(before - after) > 0.1
    effects = effect(logit_difference(found.edited[0], *tokens).numpy(), before, after)
    np.testing.assert_allclose(effects, [1, 0, 0], atol=1e-4)


@pytest.mark.parametrize(("point", "name"), [("attn_out", "self_attn"), ("mlp_out", "mlp")])
def test_a_patch_is_what_a_plain_hook_does(toy, point, name):
    subject = toy("llava")
    clean, corrupt = (subject.encode(side) for side in two(subject))
    caught = capture(subject, clean)
    at = corrupt.maps[0].positions("image")[2:7].tolist()
    found = sweep(subject, corrupt, [patches(caught, 0, point, [layer], at) for layer in range(4)])
    for layer in range(4):

        def change(state, layer=layer):
            state[at] = caught.states[point][layer, 0, at]
            return state

        module = getattr(subject.layers[layer], name)
        want = oracle.patched_difference(subject.model, corrupt.inputs, module, change, TOKENS, corrupt.maps[0].last)
        assert float(logit_difference(found.edited[0][layer], *TOKENS)) == pytest.approx(want, abs=1e-4)


def double(family="llava"):
    model, processor = toys.build(family)
    return load((model.double(), processor))


def test_attribution_is_the_slope(toy):
    """The gradient times a direction is the finite difference along it, for each block's output and for single heads."""
    subject = double()
    clean, corrupt = (subject.encode(side) for side in two(subject))
    caught = capture(subject, clean)
    found = attribute(subject, corrupt, caught, [TOKENS])
    own = capture(subject, corrupt)
    last = corrupt.maps[0].last
    for layer in (0, 2, 3):
        for point, module in (
            ("attn_out", subject.layers[layer].self_attn), ("mlp_out", subject.layers[layer].mlp),
            ("resid_pre", subject.layers[layer - 1]),
        ):  # fmt: skip
            if point == "resid_pre" and layer == 0:
                continue
            for at in ([last], [3, 9]):
                direction = (caught.states[point] - own.states[point])[layer, 0, at]
                want = oracle.slope(subject.model, corrupt.inputs, module, at, direction, TOKENS, last)
                assert float(found.plain[point][layer, 0, at].sum()) == pytest.approx(want, abs=5e-4, rel=2e-3)
    # heads: their sum is the slope along what the output projection makes of all of them
    projection = subject.layers[2].self_attn.o_proj
    change = (caught.states["z"] - own.states["z"])[2, 0, [last]].flatten(1)
    want = oracle.slope(subject.model, corrupt.inputs, projection, [last], projection(change).detach(), TOKENS, last)
    assert float(found.plain["z"][2, 0, last].sum()) == pytest.approx(want, abs=5e-4, rel=2e-3)
    assert found.plain["z"].shape == (4, 1, len(corrupt.maps[0]), 4)


def test_attribution_is_exact_where_the_readout_is_linear():
    """With the final norm out of the way, the logits are linear in what the last block adds at the last position."""
    subject = double()
    subject.model.set_submodule(subject.anatomy.final_norm, torch.nn.Identity())
    clean, corrupt = (subject.encode(side) for side in two(subject))
    caught = capture(subject, clean)
    last = corrupt.maps[0].last
    found = attribute(subject, corrupt, caught, [TOKENS])
    swept = sweep(subject, corrupt, [patches(caught, 0, point, [3], [last]) for point in ("mlp_out", "attn_out")])
    moved = logit_difference(swept.edited[0] - swept.clean[0], *TOKENS)
    assert float(found.plain["mlp_out"][3, 0, last]) == pytest.approx(float(moved[0]), abs=1e-5)
    assert abs(float(moved[0])) > 0.05
    assert float(found.plain["attn_out"][3, 0, last]) != pytest.approx(
        float(moved[1]), abs=1e-4
    )  # a feed-forward block in between


def test_integrated_gradients_add_up():
    """Over all positions of the input, the integrated estimate is the whole difference between the runs; the plain one is not."""
    subject = double()
    clean, corrupt = (subject.encode(side) for side in two(subject))
    caught, tokens = capture(subject, clean), apart(subject, clean, corrupt)
    found = attribute(subject, corrupt, caught, [tokens], ("resid_pre",), steps=24)
    whole = float(logit_difference(caught.logits[0], *tokens) - found.difference[0])
    assert abs(whole) > 0.1
    assert float(found.integrated["resid_pre"][0].sum()) == pytest.approx(whole, rel=0.03)
    assert float(found.plain["resid_pre"][0].sum()) != pytest.approx(whole, rel=0.03)


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "qwen3_vl", "mllama"])
def test_batch_and_padding_change_nothing_and_the_model_is_left_alone(toy, family):
    subject = toy(family)
    clean, corrupt = two(subject, 2)
    before = [parameter.requires_grad for parameter in subject.model.parameters()]
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in subject.layers.modules()]
    found = {}
    for side in ("left", "right"):
        batches = [subject.encode(one, side) for one in (clean, corrupt)]
        found[side] = (batches[1], attribute(subject, batches[1], capture(subject, batches[0]), [TOKENS] * 2, steps=2))
    for i in range(2):
        one = subject.encode(corrupt[i])
        alone = attribute(subject, one, capture(subject, subject.encode(clean[i])), [TOKENS], steps=2)
        for encoded, batched in found.values():
            real = encoded.maps[i].positions("real")
            assert batched.difference[i].item() == pytest.approx(alone.difference[0].item(), abs=1e-4)
            for variant in ("plain", "integrated"):
                for point in SITES:
                    a, b = getattr(batched, variant)[point][:, i, real], getattr(alone, variant)[point][:, 0]
                    torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-3)
                    assert torch.isfinite(getattr(batched, variant)[point]).all()
    assert all(parameter.grad is None for parameter in subject.model.parameters())
    assert before == [parameter.requires_grad for parameter in subject.model.parameters()]
    # transformers leaves hooks of its own on a layer once somebody has asked for hidden states
    assert hooks == [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in subject.layers.modules()]


def test_frozen_parameters_are_no_obstacle():
    model, processor = toys.build("llava")
    subject = load((model.requires_grad_(False), processor))
    clean, corrupt = (subject.encode(side) for side in two(subject))
    found = attribute(subject, corrupt, capture(subject, clean), [TOKENS])
    assert found.plain["resid_pre"].abs().sum() > 0


def test_a_nudge_changes_as_much_and_says_nothing(toy):
    """Of each state: the same place, the same size of change, a direction that is drawn and has next to nothing to do with the fact."""
    subject = toy("llava")
    clean, corrupt = (subject.encode(examples) for examples in two(subject, 2))
    caught, before = capture(subject, clean), capture(subject, corrupt, STREAM)
    at = clean.maps[1].positions("image").tolist()
    cosines, seen = [], 0
    for point in STREAM:
        asked = (point, [0, 2], at)
        made, real = nudges(caught, before, 1, *asked, seed=[3]), patches(caught, 1, *asked)
        again, other = nudges(caught, before, 1, *asked, seed=[3]), nudges(caught, before, 1, *asked, seed=[4])
        for nudge, patch, same, different in zip(made, real, again, other, strict=True):
            assert (nudge.point, nudge.layer, nudge.positions) == (patch.point, patch.layer, patch.positions)
            start = before.states[point][patch.layer, 1, at]
            sizes = [(torch.as_tensor(one.value) - start).norm(dim=-1) for one in (nudge, patch)]
            torch.testing.assert_close(*sizes, rtol=1e-3, atol=1e-4)
            assert torch.equal(nudge.value, same.value)
            assert not torch.equal(nudge.value, different.value)
            changes = (torch.as_tensor(one.value) - start for one in (nudge, patch))
            cosines.append(torch.nn.functional.cosine_similarity(*changes).mean().item())
            seen += 1
    assert seen == 6
    assert abs(np.mean(cosines)) < 0.1
