"""Words read without a table of the vocabulary, directions erased, and what is counted of them."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from probe import Example, Patch, load, sweep, trace
from probe.analysis.clustered import auroc_draws, auroc_of_cases, auroc_over_examples
from probe.analysis.lens import best_layer, correspondence
from probe.anatomy import verify
from probe.edits import Erase
from probe.errors import AnatomyError, EditError, ReplayError
from probe.generation import trace_generation
from probe.recorders import Confidence, Residual
from probe.recorders import Lens as LensOf
from probe.spelling import spell, word_direction
from probe.tracing import last_logits
from probe.vocabulary import Vocabulary
from tests import toys
from tests.oracles import lens as oracle

WORDS = ((5, (9, 11, 40)), ((7,), (200, 8)))
FAMILIES = ("llava", "qwen2_vl", "qwen3_vl", "gemma3", "gemma4", "blip2")


def test_six_families_are_read():
    assert len(FAMILIES) == 6
    assert toys.FAMILIES.keys() > set(FAMILIES)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("norm", ["final", "none"])
@pytest.mark.parametrize("family", FAMILIES)
def test_words_are_read_as_by_the_full_lens(toy, family, norm, side):
    subject, examples = toy(family), toys.pair(toy(family))
    found = trace(subject, subject.encode(examples, side), [Confidence(WORDS, top=3, norm=norm)])
    for i, example in enumerate(examples):
        full, token_map = oracle.log_probs(subject, example, norm)
        full = full[:, token_map.positions("image")]
        count = full.shape[1]
        read = found["confidence_log_prob"].tensor[:, i]
        for w, ids in enumerate(WORDS[i]):
            expected = full[..., [ids] if isinstance(ids, int) else list(ids)].amax(-1)
            torch.testing.assert_close(read[:, :count, w], expected, atol=1e-5, rtol=1e-5)
            assert found["confidence"].tensor[i, w].item() == pytest.approx(expected.max().exp().item(), abs=1e-5)
        assert (read[:, count:] == -torch.inf).all()
        top = full.topk(3, -1)
        assert (found["confidence_top_ids"].tensor[:, i, :count] == top.indices).float().mean() > 0.99  # near ties apart
        torch.testing.assert_close(found["confidence_top_probs"].tensor[:, i, :count], top.values.exp(), atol=1e-5, rtol=1e-5)


class Largest(TorchDispatchMode):
    """The number of entries of the largest tensor that anything made."""

    def __init__(self):
        super().__init__()
        self.entries = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for one in made if isinstance(made, tuple | list) else (made,):
            if isinstance(one, torch.Tensor) and not one._is_view():
                self.entries = max(self.entries, one.numel())
        return made


def test_no_table_of_the_vocabulary_is_held(toy, monkeypatch):
    subject = toy("llava")
    state, ids = torch.randn(2, 64, 32), torch.tensor([[5, 9], [7, 8]])
    whole = Vocabulary(subject).read(1, state, ids, 3)
    with Largest() as seen:
        subject.unembedding(state)
    assert seen.entries == 2 * 64 * subject.vocabulary  # the bound below can be broken
    monkeypatch.setattr("probe.vocabulary.TILE", 2048)
    monkeypatch.setattr("probe.vocabulary.ROWS", 64)
    with Largest() as seen:
        tiled = Vocabulary(subject).read(1, state, ids, 3)
    assert seen.entries <= 2 * 64 * 32  # no larger than the states that came in, or a tile
    assert torch.equal(tiled.top_ids, whole.top_ids)
    for a, b in zip(tiled, whole, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_half_precision_is_read_in_float32(pair):
    model, processor = toys.build("llava")
    expected = trace(load((model, processor)), pair, [Confidence(WORDS)])["confidence_log_prob"].tensor
    found = trace(load((model.to(torch.bfloat16), processor)), pair, [Confidence(WORDS)])["confidence_log_prob"].tensor
    assert found.dtype == torch.float32
    real = expected > -torch.inf
    assert torch.equal(found > -torch.inf, real)
    torch.testing.assert_close(found[real], expected[real], atol=0.6, rtol=0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Confidence(WORDS, norm="first"), "the lens takes the final norm or none, not 'first'"),
        (lambda: Confidence(WORDS[:1]), "the same number of words for each of the 2 examples"),
        (lambda: Confidence((((),), ((),))), "a word needs at least one token id"),
        (lambda: Confidence(((5,), (10**6,))), "token ids run from 0 to"),
        (lambda: Confidence(WORDS, positions="audio"), "no example of the batch has positions 'audio'"),
    ],
)
def test_what_cannot_be_read_is_refused(toy, pair, make, message):
    with pytest.raises(EditError, match=message):
        trace(toy("llava"), pair, [make()])


# --- words and directions --------------------------------------------------------------------------------------------


def test_a_word_is_spelled_by_whole_tokens_where_there_are_any(toy):
    subject = toy("llava")
    ball = spell(subject, "ball")
    assert ball.whole
    assert {subject.tokenizer.decode([token]).strip().lower() for token in ball.ids} == {"ball"}
    odd = spell(subject, "xyzzyq")
    assert not odd.whole
    assert len(odd.ids) == 1
    assert subject.tokenizer.decode(list(odd.running)).strip() == "xyzzyq"
    with pytest.raises(EditError, match="at least one letter"):
        spell(subject, "  ")


def test_a_direction_is_the_state_of_the_word_alone(toy):
    subject = toy("llava")
    tokens = list(spell(subject, "xyzzyq").running)
    out = subject.model(torch.tensor([[1, *tokens]]), output_hidden_states=True)
    torch.testing.assert_close(word_direction(subject, "xyzzyq", layer=1), out.hidden_states[2][0, -1].detach())
    for source in ("embedding", "unembedding"):
        rows = getattr(subject, source).weight[tokens].detach()
        torch.testing.assert_close(word_direction(subject, "xyzzyq", source), rows.mean(0))
    with pytest.raises(EditError, match="there is no direction 'mean'"):
        word_direction(subject, "ball", "mean")
    with pytest.raises(EditError, match="layer 9 does not exist"):
        word_direction(subject, "ball", layer=9)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", ["llava", "qwen2_vl", "gemma3"])
def test_erasing_is_what_the_formula_says(toy, family, side):
    subject, examples = toy(family), toys.pair(toy(family))
    own = torch.randn(2, 2, 32, generator=torch.Generator().manual_seed(1))
    encoded, record = subject.encode(examples, side), [Residual("resid_post", [1], "real")]
    before = trace(subject, encoded, record)["states"].tensor[0]
    found = trace(subject, encoded, record, [Erase(1, "image", own, 1.5)])
    for i, example in enumerate(examples):
        token_map = encoded.maps[i]
        image = np.searchsorted(token_map.positions("real"), token_map.positions("image"))
        for place in range(len(token_map.positions("real"))):
            expected = before[i, place].tolist()
            if place in image:
                expected = oracle.erased(expected, own[i].tolist(), 1.5)
            np.testing.assert_allclose(found["states"].tensor[0, i, place], expected, atol=2e-5)
        alone = trace(subject, example, edit=[Erase(1, "image", own[i], 1.5)]).logits[0]
        torch.testing.assert_close(found.logits[i], alone, atol=1e-5, rtol=0)
    assert not torch.equal(found.logits, last_logits(subject, encoded))


def test_erasing_by_hand(toy):
    subject, example = toy("llava"), Example("a", "is there a dog ?", (toys.picture(),))
    given = torch.zeros(3, 32)
    given[:, :2] = torch.tensor([[3.0, 1.0], [-3.0, 1.0], [0.0, 2.0]])
    one, both = torch.zeros(1, 32), torch.zeros(2, 32)
    one[0, 0] = 2.0  # 3 is 1.5 times 2: all of it goes at alpha 1; what points away stays
    both[0, 0], both[1, :2] = 2.0, torch.tensor([1.0, 1.0])
    places = subject.encode(example).maps[0].positions("image")[:3].tolist()
    put = Patch("resid_post", 1, places, given)
    for directions, alpha, expected in (
        (one, 1.0, [[0, 1], [-3, 1], [0, 2]]), (one, 2.0, [[-3, 1], [-3, 1], [0, 2]]), (both, 1.0, [[-0.5, 0.5], [-3, 1], [-1, 1]]),
    ):  # fmt: skip
        seen = trace(subject, example, [Residual("resid_post", [1], places)], [put, Erase(1, places, directions, alpha)])
        assert seen["states"].tensor[0, 0, :, :2].tolist() == expected


def test_erasing_leaves_no_trace_and_nothing_erased_changes_nothing(toy, pair):
    subject, some = toy("llava"), torch.randn(1, 32)
    clean = last_logits(subject, subject.encode(pair))
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in subject.model.modules()]
    assert torch.equal(trace(subject, pair, edit=[Erase(1, "image", some, 0.0)]).logits, clean)
    assert torch.equal(trace(subject, pair, edit=[Erase(3, "image", some)]).logits, clean)  # nothing looks there any more
    with pytest.raises(EditError, match="32 wide, the directions to erase 8"):
        trace(subject, pair, edit=[Erase(1, "image", torch.ones(1, 8))])
    with pytest.raises(EditError, match="directions of 3 examples cannot be erased from a batch of 2"):
        trace(subject, pair, edit=[Erase(1, "image", torch.ones(3, 1, 32))])
    assert torch.equal(last_logits(subject, subject.encode(pair)), clean)
    assert [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in subject.model.modules()] == hooks


def test_what_cannot_be_erased_is_refused():
    with pytest.raises(EditError, match=r"not of shape \(32,\)"):
        Erase(1, "image", torch.ones(32))
    with pytest.raises(EditError, match="a direction of zeros points nowhere"):
        Erase(1, "image", torch.zeros(1, 32))


def test_erasing_in_sweeps_and_generations(toy, pair):
    subject, own = toy("llava"), torch.randn(2, 1, 32, generator=torch.Generator().manual_seed(2))
    erase = Erase(1, "image", own, 3.0)
    encoded = subject.encode(pair)
    expected = trace(subject, encoded, edit=[erase]).logits
    swept = sweep(subject, encoded, [erase], method="naive")
    torch.testing.assert_close(torch.cat(swept.edited), expected, atol=1e-5, rtol=0)
    with pytest.raises(ReplayError, match="run Erase entries with"):
        sweep(subject, encoded, [erase])
    made = trace_generation(subject, pair, edit=[erase], max_new_tokens=2)
    torch.testing.assert_close(made.steps[0].logits, expected, atol=1e-5, rtol=0)


# --- what is counted -------------------------------------------------------------------------------------------------


def test_correspondence_by_hand():
    ids = np.array([[[1, 2], [3, 1], [4, 4]], [[1, 9], [1, 9], [2, 9]]])
    found = correspondence(ids, np.array([0, 1]), (1, 2))
    assert found.first.tolist() == [0.5, 1.0]
    assert found.among.tolist() == [1.0, 1.0]
    assert correspondence(ids, np.array([2]), (2,)).first.tolist() == [0.0, 1.0]
    assert np.isnan(correspondence(ids, np.array([], dtype=int), (1,)).among).all()
    assert best_layer(np.array([0.0, 0.5, 0.5])) == 1
    assert np.isnan(best_layer(np.zeros(3)))


def test_auroc_is_the_share_of_pairs_in_order():
    scores, present = np.array([0.1, 0.4, 0.4, 0.9]), np.array([False, True, False, True])
    assert auroc_of_cases(scores, present) == 0.875 == oracle.auroc(scores, present)
    assert np.isnan(auroc_of_cases(scores, np.ones(4, dtype=bool)))
    rng = np.random.default_rng(0)
    values, labels, example = rng.integers(0, 6, 60) / 5, rng.random(60) < 0.4, np.repeat(np.arange(12), 5)
    assert auroc_of_cases(values, labels) == pytest.approx(oracle.auroc(values, labels))
    drawn = np.random.default_rng(3).multinomial(12, np.full(12, 1 / 12), size=100)
    draws = auroc_draws(values, labels, example, seed=3, resamples=100)
    for weights, value in zip(drawn[:20], draws[:20], strict=True):
        again = np.repeat(np.arange(60), weights[example])
        assert value == pytest.approx(oracle.auroc(values[again], labels[again]))
    found = auroc_over_examples(values, labels, example)
    assert found.low < found.value < found.high
    alone = auroc_over_examples(values[:5], np.array([True, False, True, False, True]), example[:5])
    assert alone.low == alone.value == alone.high


# --- what is captured, against transformers -----------------------------------------------------------------------------

NORMED = ("llava", "qwen2_vl", "gemma3")


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", NORMED)
def test_captured_states_are_those_of_transformers(toy, family, side):
    """h^l is `hidden_states[l]` at every layer, and the last one after the final norm is `hidden_states[-1]`."""
    assert len(NORMED) == 3
    subject = toy(family)
    encoded = subject.encode(toys.pair(subject), side)
    with torch.no_grad():
        expected = subject.model(**encoded.inputs, use_cache=False, output_hidden_states=True).hidden_states
    found = trace(subject, encoded, [Residual("resid_pre"), Residual("resid_post")])
    before, after = found["states"].tensor, found["states.1"].tensor
    assert len(expected) == subject.n_layers + 1 == len(before) + 1 == len(after) + 1
    for i, token_map in enumerate(encoded.maps):
        real = token_map.positions("real")
        for layer in range(subject.n_layers):
            torch.testing.assert_close(before[layer, i, : len(real)], expected[layer][i, real], atol=1e-5, rtol=1e-5)
            if layer + 1 < subject.n_layers:  # what leaves the last layer is not in that list before the norm
                torch.testing.assert_close(after[layer, i, : len(real)], expected[layer + 1][i, real], atol=1e-5, rtol=1e-5)
        with torch.no_grad():
            normed = subject.model.get_submodule(subject.anatomy.final_norm)(after[-1, i, : len(real)])
        torch.testing.assert_close(normed, expected[-1][i, real], atol=1e-5, rtol=1e-5)
        assert not torch.allclose(after[-1, i, : len(real)], expected[-1][i, real], atol=1e-2)


@pytest.fixture(scope="module", params=NORMED)
def scaled(request):
    """A toy whose final norm scales each channel otherwise: with scales of one, norming twice is norming once."""
    model, processor = toys.build(request.param)
    subject = load((model, processor))
    norm = subject.model.get_submodule(subject.anatomy.final_norm)
    with torch.no_grad():
        norm.weight.copy_(torch.linspace(0.2, 3.0, norm.weight.numel()))
    return subject


def test_a_state_normed_twice_is_told_apart(scaled):
    """The lens of the last layer is the model's own output; normed once more it is another one, at that layer and below."""
    encoded = scaled.encode(toys.pair(scaled))
    with torch.no_grad():
        out = scaled.model(**encoded.inputs, use_cache=False, output_hidden_states=True)
    norm = scaled.model.get_submodule(scaled.anatomy.final_norm)
    rows = torch.arange(2)
    found = trace(scaled, encoded, [LensOf("last", track=((5, 9),) * 2)])["lens_logit"].tensor[:, :, 0]
    own = out.logits[rows, encoded.last]
    torch.testing.assert_close(found[-1], own[:, [5, 9]], atol=1e-4, rtol=1e-4)
    states = [*out.hidden_states[1:-1], out.hidden_states[-1]]  # the last one is normed already
    for layer, state in enumerate(states):
        last = state[rows, encoded.last]
        once = last if layer == scaled.n_layers - 1 else norm(last)
        twice = norm(once)
        with torch.no_grad():
            read, wrong = (oracle.raw(scaled, side)[:, [5, 9]] for side in (once, twice))
        torch.testing.assert_close(found[layer], read, atol=1e-4, rtol=1e-4)
        assert (found[layer] - wrong).abs().max() > 0.01


def test_the_check_of_the_lens_fails_on_states_that_are_normed_already(scaled):
    """A model that norms inside its last layer: reading it through the norm again is what the check is there to find."""
    inputs = scaled.encode(toys.pair(scaled)[0]).inputs
    assert all(check.held for check in verify(scaled.model, scaled.anatomy, inputs) if check.name == "lens")
    owner, _, name = scaled.anatomy.final_norm.rpartition(".")
    parent, norm = scaled.model.get_submodule(owner), scaled.model.get_submodule(scaled.anatomy.final_norm)

    def normed(module, args, output):
        return (norm(output[0]), *output[1:]) if isinstance(output, tuple) else norm(output)

    handle = scaled.layers[-1].register_forward_hook(normed)
    setattr(parent, name, torch.nn.Identity())
    parent.add_module("kept_norm", norm)
    try:
        anatomy = replace(scaled.anatomy, final_norm=f"{owner}.kept_norm")
        with pytest.raises(AnatomyError, match="fails the check 'lens'"):
            verify(scaled.model, anatomy, inputs)
        once = verify(scaled.model, scaled.anatomy, inputs)  # read through what the model does after its last layer: nothing
        assert [check.held for check in once if check.name == "lens"] == [True]
    finally:
        handle.remove()
        setattr(parent, name, norm)
        del parent.kept_norm
