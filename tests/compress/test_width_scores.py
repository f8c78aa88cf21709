"""FLAP, Taylor and magnitude against slow versions; which units go, by hand; and the bias that makes up for them."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from compress import allotment, width_scores
from compress.calibration import Calibration
from compress.passes.removal import removal
from compress.passes.width import Width
from compress.recipe import compress
from compress.saving import load as load_saved
from compress.saving import save
from compress.smaller import Smaller
from compress.statistics import Moments
from compress.structure import Units, units_of
from probe.errors import PassError
from probe.tracing import last_logits
from tests import toys
from tests.oracles import width as oracle

FAMILIES = ("llava", "gemma3")  # grouped heads; head widths of their own, and norms after the blocks
KINDS = ("heads", "neurons")


def calibration(subject, **how):
    return Calibration(tuple(replace(e, answer=a) for e, a in zip(toys.pair(subject), ("red", "two cats"), strict=True)), **how)


@pytest.fixture(scope="module")
def parts(toy):
    return {family: {kind: units_of(toy(family), kind)[0] for kind in KINDS} for family in FAMILIES}


def alone(subject, given):
    """Each example by itself, its answer after it, without padding."""
    return [Calibration((example,)).encoded(subject)[0] for example in given.examples]


@pytest.mark.parametrize("family", FAMILIES)
def test_flap(toy, parts, family):
    subject, given = toy(family), calibration(toy(family), batch=2)
    prompts = [one.inputs for one in alone(subject, given)]
    moments = width_scores.entering(subject, parts[family], given)
    for kind in KINDS:
        scores = width_scores.flap(parts[family][kind], moments[kind])
        assert sorted(scores) == list(range(subject.n_layers))
        for layer in (0, 3):
            units = parts[family][kind][layer]
            rows = oracle.inputs_of(subject.model, units.reader, prompts)
            want = oracle.flap(rows, units.reader.weight.detach(), kind, units.count)
            torch.testing.assert_close(scores[layer], torch.tensor(want, dtype=torch.float64), atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(moments[kind][layer].mean, rows.mean(0), atol=1e-6, rtol=1e-5)


def test_flap_counts_the_tokens_of_one_side(toy, parts):
    subject = toy("llava")
    found = {
        side: width_scores.entering(subject, parts["llava"], calibration(subject, side=side))["neurons"][1].n
        for side in ("both", "perceptual", "textual")
    }
    assert found["perceptual"] == 2 * 16
    assert found["both"] == found["perceptual"] + found["textual"]


@pytest.mark.parametrize("family", FAMILIES)
def test_taylor(toy, parts, family):
    subject, given = toy(family), calibration(toy(family), batch=2)
    weights = [part.weight for found in parts[family].values() for one in found.values() for part in one.parts]
    frozen = weights[0].requires_grad_(False)
    scores = width_scores.taylor(subject, parts[family], given)
    assert not frozen.requires_grad
    frozen.requires_grad_(True)
    assert all(weight.grad is None for weight in weights)

    losses = []
    for one in alone(subject, given):
        logits = subject.model(**one.inputs, use_cache=False).logits[0].log_softmax(-1)
        ids, segments = one.inputs["input_ids"][0], one.maps[0].segments
        losses += [-logits[i - 1, ids[i]] for i, segment in enumerate(segments) if segment == "answer"]
    assert len(losses) >= 3
    try:
        (sum(losses) / len(losses)).backward()
        for kind, found in parts[family].items():
            for layer, units in found.items():
                of = lambda matrix: matrix.weight.detach() * matrix.weight.grad  # noqa: E731
                want = oracle.summed(subject.layers[layer], kind, units.count, of, units.dim)
                torch.testing.assert_close(scores[kind][layer], torch.tensor(want), atol=1e-5, rtol=1e-3)
    finally:
        subject.model.zero_grad()


@pytest.mark.parametrize("family", FAMILIES)
def test_magnitude(toy, parts, family):
    for kind, found in parts[family].items():
        scores = width_scores.magnitude(found)
        for layer, units in found.items():
            want = oracle.summed(toy(family).layers[layer], kind, units.count, lambda matrix: matrix.weight.detach(), units.dim)
            torch.testing.assert_close(scores[layer], torch.tensor(want), atol=1e-3, rtol=1e-4)


def test_what_never_fluctuates_is_scored_alike():
    reader = nn.Linear(4, 2)
    units = Units("neurons", nn.Module(), (nn.Linear(2, 4),), reader, 4)
    moments = Moments()
    moments.add(torch.ones(3, 4))
    assert width_scores.flap({0: units}, {0: moments})[0].tolist() == [0, 0, 0, 0]


def test_chance_is_the_seeds(parts):
    found = parts["llava"]["neurons"]
    one, same, other = (width_scores.at_random(found, seed) for seed in (0, 0, 1))
    assert all(torch.equal(one[layer], same[layer]) for layer in one)
    assert not torch.equal(one[0], other[0])
    assert not torch.equal(one[0], one[1])


def test_taylor_without_answers_is_refused(toy, parts):
    with pytest.raises(PassError, match="no calibration example has one: give examples with answers"):
        width_scores.taylor(toy("llava"), parts["llava"], calibration(toy("llava"), answers=False))


# --- which go --------------------------------------------------------------------------------------------------------

SCORES = {0: torch.tensor([3.0, 1.0, 1.0, 9.0]), 1: torch.tensor([0.0, 0.5, 0.5, 0.5])}


@pytest.mark.parametrize(
    ("share", "multiple", "want"),
    [
        (0.0, 1, {0: (), 1: ()}),
        (0.25, 1, {0: (1,), 1: (0,)}),
        (0.5, 1, {0: (1, 2), 1: (0, 1)}),  # ties: the lower number
        (0.49, 1, {0: (1,), 1: (0,)}),
        (0.75, 2, {0: (1, 2), 1: (0, 1)}),  # one would stay, and two stay together
        (0.25, 4, {0: (), 1: ()}),
        (0.9, 3, {0: (1,), 1: (0,)}),
    ],
)
def test_as_many_of_every_layer(share, multiple, want):
    assert allotment.even(SCORES, share, multiple) == want


@pytest.mark.parametrize(
    ("share", "multiple", "want"),
    [
        (0.0, 1, {0: (), 1: ()}),
        (0.5, 1, {0: (1,), 1: (0, 1, 2)}),  # at least one stays in layer 1, and the next lowest are layer 0's
        (0.625, 1, {0: (1, 2), 1: (0, 1, 2)}),
        (0.9, 1, {0: (0, 1, 2), 1: (0, 1, 2)}),
        (0.5, 2, {0: (1, 2), 1: (0, 1)}),
    ],
)
def test_the_lowest_over_all_layers(share, multiple, want):
    assert allotment.over_layers(SCORES, share, multiple) == want


def test_heads_and_neurons_in_one_order():
    heads = {0: torch.tensor([-1.0, 2.0])}
    neurons = {0: torch.tensor([-2.0, 0.0, 1.0, 5.0])}
    found = [{0: SimpleNamespace(count=2, weights=30)}, {0: SimpleNamespace(count=4, weights=10)}]  # 100 in all
    go = lambda share: [each[0] for each in allotment.jointly([heads, neurons], found, share, [1, 1])]  # noqa: E731
    assert go(0.0) == [(), ()]
    assert go(0.1) == [(), (0,)]
    assert go(0.2) == [(), (0,)]  # 10 or 40 are gone: 10 is nearer to 20
    assert go(0.4) == [(0,), (0,)]
    assert go(0.5) == [(0,), (0, 1)]
    assert go(0.6) == [(0,), (0, 1, 2)]
    assert go(0.9) == [(0,), (0, 1, 2)]  # one of each stays


def test_a_head_weighs_what_its_matrices_hold():
    """512 / 3 neurons for one of LLaMA's heads, as published."""
    d, dim, inner = 4096, 128, 11008
    with torch.device("meta"):
        head = Units("heads", nn.Module(), tuple(nn.Linear(d, d) for _ in range(3)), nn.Linear(d, d), d // dim, dim, dim)
        neuron = Units("neurons", nn.Module(), tuple(nn.Linear(d, inner) for _ in range(2)), nn.Linear(inner, d), inner)
    assert head.weights / neuron.weights == pytest.approx(512 / 3)


# --- end to end ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "score"),
    [("llava", "flap"), ("qwen3_vl", "flap"), ("smolvlm", "flap"), ("qwen2_audio", "flap"), ("qwen2_vl", "taylor"),
     ("internvl", "taylor"), ("mllama", "taylor")],
)  # fmt: skip
def test_what_scores_lowest_is_cut(toy, family, score):
    subject = toy(family)
    given = {"calibration": calibration(subject)}
    one = Width(neurons=0.25, heads=0.5, score=score)
    before = [weight.clone() for weight in subject.model.parameters()]
    smaller = compress(subject, [one], given)
    assert all(map(torch.equal, before, subject.model.parameters()))  # neither planning nor cutting changed the dense model
    assert smaller.ledger[0].evidence["calibration"]["examples"] == 2
    found = {"neurons": units_of(subject, "neurons")[0]}
    scores = (
        width_scores.taylor(subject, found, given["calibration"])["neurons"] if score == "taylor"
        else width_scores.flap(found["neurons"], width_scores.entering(subject, found, given["calibration"])["neurons"])
    )  # fmt: skip
    gone = next(change["units"] for change in smaller.ledger[0].changes if "neurons" in change["kind"])
    assert len(gone) == subject.n_layers
    for layer, units in gone.items():
        assert set(units) == set(scores[int(layer)].topk(16, largest=False).indices.tolist())


def test_whose_tokens_count_is_the_passes_to_say(toy):
    subject = toy("llava")
    given, words = (calibration(subject, side=side) for side in ("both", "textual"))
    said = compress(subject, [Width(neurons=0.25, side="textual")], {"calibration": given})
    same = compress(subject, [Width(neurons=0.25)], {"calibration": words})
    other = compress(subject, [Width(neurons=0.25)], {"calibration": given})
    assert said.ledger[0].changes == same.ledger[0].changes != other.ledger[0].changes


def test_a_decoder_that_cannot_be_calibrated_layer_by_layer_says_so(toy):
    with pytest.raises(PassError, match="reads the picture through cross-attention"):
        compress(toy("mllama"), [Width(neurons=0.5)], {"calibration": calibration(toy("mllama"))})


def test_one_share_of_heads_and_neurons(toy):
    subject = toy("llava")
    smaller = compress(subject, [Width(share=0.3, round_to=1)], {"calibration": calibration(subject)})
    counts = [sum(w.numel() for layer in one.layers for w in layer.parameters() if w.dim() > 1) for one in (smaller, subject)]
    neuron = 3 * 32
    assert abs(1 - counts[0] / counts[1] - 0.3) <= 6 * 2 * 8 * 32 / counts[1]  # at most one group of heads beside it
    assert (counts[1] - counts[0]) % neuron == 0


@pytest.mark.parametrize("family", ["llava", "blip2"])
def test_a_bias_makes_up_for_what_is_gone(toy, tmp_path, family):
    """After a layer whose removed inputs are their means, the output is as it was; and the bias is saved."""
    subject = toy(family)
    units = units_of(subject, "heads")[0][1]
    means = {1: torch.randn(units.reader.in_features, dtype=torch.float64)}
    smaller = Smaller.of(subject)
    change = removal(subject, "heads", {1: (0,)}, means)
    change.carry_out(smaller)
    assert change.biased == ((1,) if family == "llava" else ())  # OPT's map has a bias already
    left = units_of(smaller, "heads")[0][1]
    entering = torch.randn(5, units.reader.in_features)
    entering[:, : units.width] = means[1][: units.width].float()
    torch.testing.assert_close(left.reader(entering[:, units.width :]), units.reader(entering), atol=1e-5, rtol=1e-4)
    if family == "llava":
        given = {"calibration": calibration(subject)}
        made = compress(subject, [Width(heads=0.5, neurons=0.5, score="flap", compensate=True)], given)
        again = load_saved(save(made, tmp_path / "m"), device="cpu", check=False)
        encoded = made.encode(toys.pair(made))
        torch.testing.assert_close(last_logits(again, encoded), last_logits(made, encoded), atol=1e-5, rtol=1e-5)
        plain = compress(subject, [Width(heads=0.5, neurons=0.5, score="flap")], given)
        assert (last_logits(plain, encoded) - last_logits(made, encoded)).abs().max() > 1e-3
