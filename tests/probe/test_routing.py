"""Routing: experts as a loop over positions sees them, neurons as the block's own activation; golden divergences."""

import numpy as np
import pytest
import torch
import transformers as hf

from probe import Example, load
from probe.analysis import routing as r
from probe.errors import EditError
from probe.routing import GROUPS, kind_of, read_use, routed_layers, watching_neurons
from probe.tracing import last_logits
from tests import toys
from tests.oracles import routing as oracle
from tests.toys.base import text, tokenizer


def uses(subject, encoded, **options):
    found = []
    read_use(subject, encoded, found.append, **options)
    return {use.layer: use for use in found}


# --- pure functions --------------------------------------------------------------------------------------------------


def test_golden_divergence_and_information():
    apart, alike, half = ([[4.0, 0], [0, 2]], [[3.0, 1], [6, 2]], [[1.0, 1], [2, 0]])
    assert r.jensen_shannon(np.array(apart)) == pytest.approx(np.log(2))
    assert r.mutual_information(np.array(apart)) == pytest.approx(np.log(3) - 2 / 3 * np.log(2))  # entropy of 4 : 2
    assert r.jensen_shannon(np.array(alike)) == r.mutual_information(np.array(alike)) == pytest.approx(0, abs=1e-12)
    # (1/2, 1/2) and (1, 0): H(3/4, 1/4) - ln(2)/2
    assert r.jensen_shannon(np.array(half)) == pytest.approx(np.log(4) - 0.75 * np.log(3) - 0.5 * np.log(2))
    assert r.balance(np.array([[2.0, 2, 2, 2], [8, 0, 0, 0], [4, 4, 0, 0]])) == pytest.approx([1, 0, 0.5])


def test_divergences_are_those_of_the_loops():
    counts = np.random.default_rng(0).integers(0, 9, (6, 3, 7)).astype(float) + (np.arange(7) == 0)
    counts[0, 1, 3] = 0
    assert r.jensen_shannon(counts) == pytest.approx([oracle.jensen_shannon(rows.tolist()) for rows in counts])
    assert r.mutual_information(counts) == pytest.approx([oracle.mutual_information(rows.tolist()) for rows in counts])
    assert r.distributions(counts).sum(-1) == pytest.approx(np.ones((6, 3)))
    # equal weights: information is divergence
    even = counts / counts.sum(-1, keepdims=True)
    assert r.mutual_information(even) == pytest.approx(r.jensen_shannon(even))
    with_none = np.concatenate([counts, np.zeros((6, 1, 7))], 1)
    assert r.mutual_information(with_none) == pytest.approx(r.mutual_information(counts))


def test_rotations_keep_runs_and_are_never_the_original():
    labels = np.array([0, 0, 0, 3, 3, 3, 3])
    found = r.rotations(labels, 50, 0)
    assert found.shape == (50, 7)
    assert all(sorted(row) == sorted(labels) and not np.array_equal(row, labels) for row in found)
    assert all((np.diff(np.concatenate([row, row[:1]])) != 0).sum() == 2 for row in found)
    with pytest.raises(EditError, match="1 tokens have no other order"):
        r.rotations(labels[:1], 1, 0)


def test_counts_are_those_of_a_loop():
    rng = np.random.default_rng(0)
    used, labels = rng.random((20, 6)) < 0.3, rng.integers(0, 3, (4, 20))
    found = r.count_uses(used, labels, 3)
    for k, order in enumerate(labels):
        for m in range(3):
            assert found[k, m].tolist() == [sum(used[t, u] for t in range(20) if order[t] == m) for u in range(6)]
    assert found.sum((1, 2)).tolist() == [used.sum()] * 4


def test_paired_differences_are_a_t_test():
    from scipy import stats

    values = np.random.default_rng(0).normal(0.3, 1, (30, 4))
    mean, p = r.paired_differences(values.sum(0), (values**2).sum(0), 30)
    assert mean == pytest.approx(values.mean(0))
    assert p == pytest.approx(stats.ttest_1samp(values, 0).pvalue)
    assert r.paired_differences(np.array([0.0, 5.0]), np.array([0.0, 5.0]), 5)[1].tolist() == [1, 0]
    assert np.isnan(r.paired_differences(np.ones(1), np.ones(1), 2)[1]).all()
    assert (r.rule_of_three(2), r.rule_of_three(300)) == (1.0, 0.01)
    assert r.rule_of_three(300) == pytest.approx(1 - 0.05 ** (1 / 300), rel=0.01)


# --- experts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["left", "right"])
def test_router_counts_are_those_of_a_slow_loop(toy, side):
    subject = toy("qwen3_vl_moe")
    examples = toys.pair(subject)
    encoded = subject.encode(examples, side)
    before = last_logits(subject, encoded)
    found = uses(subject, encoded)
    assert kind_of(subject) == "experts"
    assert tuple(found) == routed_layers(subject, "experts") == tuple(range(subject.n_layers))
    routers = {layer: subject.layers[layer].mlp.gate for layer in found}
    compared = 0
    for i, example in enumerate(examples):
        for (layer, modality), expected in oracle.routing_counts(subject, example, GROUPS, 2, routers).items():
            at = np.concatenate([encoded.maps[i].positions(segment) for segment in GROUPS[modality]])
            counted = found[layer].used[i].numpy()[at].sum(0)
            assert counted.tolist() == expected
            assert counted.sum() == 2 * len(at)
            compared += 1
    assert compared == 2 * 2 * subject.n_layers
    for use in found.values():
        assert use.weight.sum(-1) == pytest.approx(np.ones(use.weight.shape[:2]), abs=1e-5)  # shares of a token sum to one
        assert bool(((use.weight > 0) <= use.used).all())
    assert torch.equal(before, last_logits(subject, encoded))
    assert not any(m._forward_pre_hooks for m in subject.model.modules())


def _mixtral(size):
    return hf.MixtralForCausalLM(hf.MixtralConfig(**text(size), num_local_experts=4, num_experts_per_tok=2))


def _llama4(size):
    config = hf.Llama4TextConfig(
        **text(size), intermediate_size_mlp=64, head_dim=8, num_local_experts=4, num_experts_per_tok=1, interleave_moe_layer_step=2,
        attn_implementation="sdpa",
    )  # fmt: skip
    return hf.Llama4ForCausalLM(config)


def _gemma4(size):
    config = hf.Gemma4TextConfig(
        **text(size), head_dim=8, global_head_dim=8, sliding_window=16, layer_types=["sliding_attention"] * 3 + ["full_attention"],
        vocab_size_per_layer_input=size, hidden_size_per_layer_input=0, enable_moe_block=True, num_experts=4, top_k_experts=2,
        moe_intermediate_size=16,
    )  # fmt: skip
    return hf.Gemma4ForCausalLM(config)


@pytest.mark.parametrize(
    ("build", "router", "top"), [(_mixtral, "mlp.gate", 2), (_llama4, "feed_forward.router", 1), (_gemma4, "router", 2)]
)
def test_other_mixtures_are_read_as_their_routers_choose(build, router, top):
    torch.manual_seed(0)
    tok = tokenizer()
    model = build(len(tok)).eval()
    for weight in model.parameters():
        if weight.dim() >= 2:
            torch.nn.init.normal_(weight, 0, 0.18)
    subject = load((model, tok))
    layers = routed_layers(subject, "experts")
    assert layers == ((1, 3) if build is _llama4 else (0, 1, 2, 3))
    encoded = subject.encode([Example("a", "what color is the ball ?"), Example("b", "is there a dog ?")])
    seen = {}
    handles = [
        subject.layers[i].get_submodule(router).register_forward_hook(lambda _, a, out, i=i: seen.__setitem__(i, out))
        for i in layers
    ]
    found = uses(subject, encoded)
    for handle in handles:
        handle.remove()
    for layer in layers:
        chosen = seen[layer][-1]  # the indices, or for Llama 4 the logits
        rows = chosen.topk(1, -1).indices if build is _llama4 else chosen
        flat = found[layer].used.view(len(rows), -1)
        assert all(set(np.nonzero(flat[t].numpy())[0]) == set(rows[t].tolist()) for t in range(len(rows)))
        assert int(flat.sum()) == top * len(rows)
        assert float(found[layer].weight.view(len(rows), -1)[flat].min()) > 0


def test_a_dense_model_has_no_experts(toy):
    with pytest.raises(EditError, match="this LLaVA model has no mixture of experts"):
        routed_layers(toy("llava"), "experts")
    with pytest.raises(EditError, match="no feed-forward neurons to read"):
        routed_layers(toy("qwen3_vl_moe"), "neurons")
    with pytest.raises(EditError, match="between 0 and 1, not at 1"), watching_neurons(toy("llava"), print, 1.0):
        pass


# --- neurons ---------------------------------------------------------------------------------------------------------


def test_neurons_are_the_strongest_of_the_inner_activation(toy):
    subject = toy("llava")
    encoded = subject.encode(toys.pair(subject))
    inner = {}
    handles = [
        layer.mlp.down_proj.register_forward_pre_hook(lambda _, args, i=i: inner.__setitem__(i, args[0]))
        for i, layer in enumerate(subject.layers)
    ]
    found = uses(subject, encoded, kind="neurons", share=0.1)
    for handle in handles:
        handle.remove()
    assert tuple(found) == tuple(range(subject.n_layers))
    for layer, use in found.items():
        for i in range(2):
            for position in range(0, use.used.shape[1], 7):
                chosen = set(np.nonzero(use.used[i, position].numpy())[0])
                assert chosen == oracle.strongest(inner[layer][i, position], 6)  # a tenth of 64
        assert torch.equal(use.weight, inner[layer].abs() * use.used)


def test_a_neuron_that_is_zero_is_not_used():
    from probe.routing import _strongest

    used, weight = _strongest(torch.tensor([[[0.0, 0, -3, 0]]]), 0.5)
    assert used.tolist() == [[[False, False, True, False]]]
    assert weight.tolist() == [[[0, 0, 3, 0]]]
