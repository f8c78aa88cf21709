"""A compressed model looked into through its twin: the same numbers, every position in place, and the model as it was afterwards."""

from functools import cache

import pytest
import torch

from compress.budget import Budget
from compress.passes import METHODS
from compress.passes.layers import RemoveLayers
from compress.passes.tokens import Method, Tokens, Withdraw
from compress.recipe import compress
from compress.tokens.choice import Kept
from compress.twin import simulated
from probe import Knockout, load
from probe.errors import PassError
from probe.replay import sweep
from probe.tracing import last_logits
from tests import toys

FAMILIES = ("llava", "qwen2_vl", "qwen3_vl", "internvl")
CASES = {
    "merged before": [Tokens(method="aim-merge", budget=Budget(keep=0.5))],
    "chosen before, a layer less": [RemoveLayers(layers=(3,)), Tokens(method="divprune", budget=Budget(keep=0.5))],
    "chosen inside": [Tokens(method="fastv", budget=Budget(keep=0.5), layer=3)],
    "withdrawn": [Withdraw(layer=3)],
}
covered = []


@cache
def opened(family):
    return load(toys.build(family))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("case", CASES)
def test_the_twin_says_what_the_model_says(family, case):
    smaller = compress(opened(family), CASES[case])
    encoded = smaller.encode(toys.pair(smaller))
    physical = last_logits(smaller, encoded)
    edits = [Knockout("last", "media", range(smaller.n_layers)), Knockout("question", "media", range(1))]
    with simulated(smaller, [encoded, *(smaller.encode(one) for one in encoded.examples)]) as twin:
        torch.testing.assert_close(last_logits(twin, encoded), physical, atol=1e-4, rtol=1e-4)
        replayed, naive = sweep(twin, encoded, edits), sweep(twin, encoded, edits, method="naive")
        for a, b in zip(replayed.edited, naive.edited, strict=True):
            torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
        if twin.runtime is not None and case != "withdrawn":
            hidden = twin.runtime.read.hidden.sum(1)
            assert (hidden > 0).all()  # left out, and still in its place
    assert torch.equal(last_logits(smaller, encoded), physical)
    smaller.detach()
    covered.append((family, case))


def test_how_many_were_compared():
    assert len(covered) == len(FAMILIES) * len(CASES)


def test_an_edit_does_not_change_what_is_kept():
    """The model chooses by attention; cut from the picture, it would choose otherwise, the twin does not."""
    smaller = compress(opened("llava"), CASES["chosen inside"])
    encoded = smaller.encode(toys.pair(smaller)[:1])
    with simulated(smaller, [encoded]) as twin:
        clean = last_logits(twin, encoded)
        kept = twin.runtime.read.hidden.clone()
        cut = sweep(twin, encoded, [Knockout("last", "media", range(twin.n_layers))], method="naive")
        assert torch.equal(twin.runtime.read.hidden, kept)
        assert (cut.edited[0] - clean[0]).abs().max() > 1e-4
    smaller.detach()


def test_a_prompt_that_was_not_named_is_refused():
    smaller = compress(opened("llava"), CASES["merged before"])
    one, other = toys.pair(smaller)
    with simulated(smaller, [smaller.encode(one)]) as twin, pytest.raises(PassError, match="name every prompt"):
        last_logits(twin, twin.encode(other))
    smaller.detach()


def folded(seen, count):
    """A method of no paper: the first tokens, each with the mean of all."""
    return Kept(torch.arange(count), seen.states[:count] + seen.states.mean(0))


def test_what_is_merged_inside_is_refused(monkeypatch):
    monkeypatch.setitem(METHODS, "folded", Method(folded, 3, "preserve"))
    smaller = compress(opened("llava"), [Tokens(method="folded", budget=Budget(keep=0.5))])
    encoded = smaller.encode(toys.pair(smaller))
    plain = last_logits(smaller, encoded)
    with pytest.raises(PassError, match="merged inside the decoder"), simulated(smaller, [encoded]):
        pass
    assert torch.equal(last_logits(smaller, encoded), plain)
    smaller.detach()
