"""Experts cut out: what their blocks give is the mixture of those left, and what must stay is named."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from compress.calibration import Calibration, counted
from compress.cost import cost
from compress.mixture import Mixture, mixture_of
from compress.passes.experts import Experts, mass
from compress.passes.removal import RemoveExperts
from compress.recipe import compress
from compress.smaller import Smaller
from compress.structure import mixtures_of
from probe import load
from probe.errors import PassError
from probe.tracing import last_logits
from tests import toys
from tests.oracles import width as oracle

UNEVEN = {0: (1, 3), 2: (0,)}  # of 4 in each of 4 layers, of which a token visits 2


@pytest.fixture(scope="module")
def subject(toy):
    return toy("qwen3_vl_moe")


@pytest.fixture(scope="module")
def given(subject):
    examples = tuple(replace(e, answer=a) for e, a in zip(toys.pair(subject), ("red", "two cats"), strict=True))
    return {"calibration": Calibration(examples, batch=2)}


@pytest.fixture(scope="module")
def made(subject, given):
    """Evenly and unevenly."""
    uneven = Smaller.of(subject)
    change = RemoveExperts(units=UNEVEN)
    change.carry_out(uneven)
    return {"even": compress(subject, [Experts(count=1)], given), "uneven": uneven}


def test_a_block_gives_the_mixture_of_those_left(subject, made):
    states = torch.randn(7, 32, generator=torch.Generator().manual_seed(0))
    for layer in range(subject.n_layers):
        kept = [e for e in range(4) if e not in UNEVEN.get(layer, ())]
        with torch.no_grad():
            got = made["uneven"].layers[layer].mlp(states[None])[0]
            want = oracle.mixture(subject.layers[layer].mlp, states, kept, 2)
            whole = subject.layers[layer].mlp(states[None])[0]
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)
        assert torch.equal(got, whole) == (layer not in UNEVEN)


def test_those_with_the_least_mass_go(subject, given, made):
    found = mixtures_of(subject)[0]
    both, seen, read = (mass(subject, found, given["calibration"], side) for side in ("both", "perceptual", "textual"))
    change = made["even"].ledger[0].changes[0]
    assert change["kind"] == "remove-experts-evenly"
    for layer, scores in both.items():
        torch.testing.assert_close(scores, (seen[layer] + read[layer]) / 2)
        assert float(scores.sum()) == pytest.approx(1)  # the router's weights of a token sum to one
        assert change["units"][str(layer)] == [int(scores.argmin())]
    assert made["even"].config.get_text_config().num_experts == 3
    assert {one.count for one in mixtures_of(made["even"])[0].values()} == {3}
    sides = (
        compress(subject, [Experts(share=0.5, of="perceptual")], given),
        compress(subject, [Experts(share=0.5, of="textual")], given),
    )
    assert sides[0].ledger[0].changes != sides[1].ledger[0].changes


def test_mass_is_counted_token_by_token(subject, given):
    """Against the router's own words, read with a hook, example by example."""
    found = mixtures_of(subject)[0]
    want, n = torch.zeros(4, dtype=torch.float64), 0
    for example in given["calibration"].examples:
        one = Calibration((example,)).encoded(subject)[0]
        rows = counted(one, "perceptual")[0]
        seen = []
        handle = subject.layers[1].mlp.gate.register_forward_hook(lambda _, args, out, seen=seen: seen.append(out[1:]))
        last_logits(subject, one)
        handle.remove()
        weights, chosen = seen[0]
        for token in rows.nonzero().flatten().tolist():
            for weight, expert in zip(weights[token].tolist(), chosen[token].tolist(), strict=True):
                want[expert] += weight
            n += 1
    torch.testing.assert_close(mass(subject, found, given["calibration"], "perceptual")[1], want / n, atol=1e-6, rtol=1e-5)


def test_no_experts_asked_is_nothing_done(subject, given):
    for one in (Experts(count=0), Experts(share=0.0)):
        smaller = compress(subject, [one])
        encoded = subject.encode(toys.pair(subject))
        assert smaller.ledger == ()
        assert torch.equal(last_logits(smaller, encoded), last_logits(subject, encoded))


def test_what_is_left_is_what_is_counted(subject, made):
    one = subject.encode(toys.pair(subject)[:1])
    dense, smaller = cost(subject, one), cost(made["uneven"], one)
    each = 3 * 32 * 16
    assert dense.parameters["decoder"] - smaller.parameters["decoder"] == 3 * each + 3 * 32
    assert (
        dense.layers[0] - smaller.layers[0] == 2 * 32 * smaller.ran[0].ffn
    )  # a token visits as many; the router has less to say


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "either a count for each layer or a share"),
        ({"count": 1, "share": 0.5}, "either a count"),
        ({"count": -1}, "a count of experts is 0 or more"),
        ({"count": 1, "allocation": "global"}, "with allocation global give a share"),
        ({"share": 1.0}, "the share of experts that is removed is 0 or more and below 1: 1 is not"),
        ({"share": 0.2}, "0.2 of 4 experts is less than one"),
        ({"count": 3}, "3 of the 4 experts of layer 0 cannot go: a token visits 2"),
    ],
)
def test_what_cannot_be_removed_says_why(subject, given, settings, message):
    with pytest.raises(PassError, match=message):
        compress(subject, [Experts(**settings)], given)


def test_what_has_no_experts_and_what_lacks_evidence(subject, toy):
    with pytest.raises(PassError, match="no layer of this LLaVA model can lose experts: of layer 0, it has no experts"):
        compress(toy("llava"), [Experts(count=1)])
    with pytest.raises(PassError, match="needs evidence 'calibration'"):
        compress(subject, [Experts(count=1)])
    with pytest.raises(PassError, match="layer 0 needs 2 of its 4 experts, and 3 are to go"):
        RemoveExperts(units={0: (0, 1, 2)}).carry_out(Smaller.of(subject))
    words = Calibration(tuple(toys.pair(subject, media=False)))
    with pytest.raises(PassError, match="no calibration example has perceptual tokens"):
        compress(subject, [Experts(count=1)], {"calibration": words})


def test_a_list_of_experts_and_a_linear_router():
    """As remote code has them: the list loses its members, the router its rows and what it knows of each."""
    owner, router = nn.Module(), nn.Linear(8, 4)
    owner.num_experts = 4
    experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))
    router.register_buffer("e_score_correction_bias", torch.arange(4.0))
    kept, row = experts[2], router.weight[2].clone()
    Mixture(owner, experts, router, 4, 2).keep([0, 2])
    assert (len(experts), owner.num_experts, router.out_features) == (2, 2, 2)
    assert experts[1] is kept
    assert torch.equal(router.weight[1], row)
    assert router.e_score_correction_bias.tolist() == [0, 2]
    assert router.bias.shape == (2,)


def test_experts_that_are_not_understood_are_named():
    subject = load(toys.build("qwen3_vl_moe"))
    blocks = [layer.mlp for layer in subject.layers]
    blocks[0].gate.num_group = 2
    blocks[1].gate = nn.Linear(32, 5)
    blocks[2].gate = blocks[3].gate
    assert "groups of experts first" in mixture_of(subject, 0)
    assert "one number for each expert" in mixture_of(subject, 1)
    assert mixtures_of(subject)[1][3] == "it shares weights with another part of the model"
