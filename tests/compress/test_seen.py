"""What a reducer is shown when a model runs: records of the tower, attention, words; and that no neighbour in a batch changes it."""

import numpy as np
import pytest
import torch

from compress.budget import Budget
from compress.passes import METHODS
from compress.passes.tokens import Tokens
from compress.recipe import compress
from compress.reducers import diverse
from compress.reducers.inside import fastv
from compress.tokens.choice import Kept, Seen
from compress.tokens.guards import Reducer
from compress.tokens.runtime import TokenRuntime
from compress.tokens.tower import RECORDS
from probe import Example
from probe.errors import PassError
from probe.tracing import last_logits
from tests import toys
from tests.compress.cases import CLIPS
from tests.oracles import reducers as oracle
from tests.oracles.attention import eager_patterns

alone_and_together = []


def shown(subject, encoded, needs=(), layer=0, policy="preserve", budget=0.5):
    """Everything that reducers at a layer are shown, medium by medium."""
    found = []

    def look(seen, count):
        found.append(seen)
        return Kept(torch.arange(count))

    runtime = TokenRuntime(subject, [Reducer(look, Budget(keep=budget), layer, policy, needs)])
    try:
        last_logits(subject, encoded)
    finally:
        runtime.detach()
    return found


@pytest.mark.parametrize("side", ["left", "right"])
def test_records_of_the_tower_are_its_own(toy, side):
    """Two prompts of two pictures each, against transformers' eager CLIP: class row and column cut out, the layer that the connector reads."""
    subject = toy("llava")
    pictures = [toys.picture(seed=seed) for seed in range(4)]
    examples = [
        Example("a", "<image><image> what ?", tuple(pictures[:2])),
        Example("b", "<image> the ball <image> what color is it ?", tuple(pictures[2:])),
    ]
    encoded = subject.encode(examples, side)
    found = shown(subject, encoded, RECORDS)
    assert len(found) == 4
    tower = subject.model.get_submodule(subject.anatomy.vision)
    before = tower.config._attn_implementation
    tower.set_attn_implementation("eager")
    try:
        with torch.no_grad():
            told = tower(encoded.inputs["pixel_values"], output_attentions=True, output_hidden_states=True)
    finally:
        tower.set_attn_implementation(before)
    at = subject.config.vision_feature_layer
    assert at == -2
    layer = tower.encoder.layers[at]
    for number, seen in enumerate(found):
        state, weight = told.hidden_states[at][number], told.attentions[at][number]
        torch.testing.assert_close(seen.tower["tower_states"], state[1:], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(seen.tower["class_attention"], weight[:, 0, 1:], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(seen.tower["tower_attention"], weight[:, 1:, 1:], atol=1e-5, rtol=1e-5)
        entered = layer.layer_norm1(told.hidden_states[at - 1][number])
        keys = layer.self_attn.k_proj(entered).unflatten(-1, (weight.shape[0], -1)).mean(1)
        torch.testing.assert_close(seen.tower["tower_keys"], keys[1:], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(found[0].tower["tower_states"], found[3].tower["tower_states"])


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", ["llava", "qwen2_vl"])
def test_attention_is_that_of_the_layer_before(toy, family, side):
    """FastV's row at layer 2: eager patterns of layer 1, the last real row, the picture's columns."""
    subject = toy(family)
    encoded = subject.encode(toys.pair(subject), side)
    layer = 2
    patterns = eager_patterns(subject, encoded)[layer - 1]
    found = shown(subject, encoded, METHODS["fastv"].needs, layer)
    for row, (seen, token_map) in enumerate(zip(found, encoded.maps, strict=True)):
        last = int(np.flatnonzero(np.array(token_map.segments) != "pad")[-1])
        columns = token_map.positions("media")
        expected = patterns[row][:, last, columns]
        torch.testing.assert_close(seen.attention, expected.float(), atol=1e-5, rtol=1e-4)
        kept = fastv(seen, 3).index.tolist()
        assert kept == oracle.top(expected.float().mean(0).double().numpy().round(7), 3)


def test_pyramiddrop_looks_in_the_layer_that_is_about_to_run(toy):
    subject = toy("llava")
    encoded = subject.encode(toys.pair(subject))
    patterns = eager_patterns(subject, encoded)
    found = shown(subject, encoded, METHODS["pdrop"].needs, 2)
    for row, (seen, token_map) in enumerate(zip(found, encoded.maps, strict=True)):
        columns = token_map.positions("media")
        torch.testing.assert_close(seen.attention, patterns[2][row][:, -1, columns].float(), atol=1e-5, rtol=1e-4)
        assert not torch.allclose(seen.attention, patterns[1][row][:, -1, columns].float(), atol=1e-4)


@pytest.mark.parametrize("name", sorted(METHODS))
def test_no_neighbour_and_no_padding_changes_a_choice(toy, name):
    """Each method on two prompts of different lengths: one by one, and together with padding on either side."""
    subject = toy("llava")
    try:
        smaller = compress(subject, [Tokens(method=name, budget=Budget(keep=4))])
        examples = toys.pair(subject)
        alone = torch.cat([last_logits(smaller, subject.encode(one)) for one in examples])
    except PassError:  # methods of clips
        alone_and_together.append((name, "refused"))
        return
    plain = last_logits(subject, subject.encode(examples))
    assert (alone - plain).abs().max() > 1e-3
    written = [said for one in examples for said in smaller.generate(subject.encode(one), 3)]
    assert smaller.generate(subject.encode(examples), 3) == written
    # DART measures keys as they were turned: in a plain pass padding on the left moves them, where transformers counts it (generate does not)
    for side in ("right",) if name == "dart" else ("left", "right"):
        together = last_logits(smaller, subject.encode(examples, side))
        torch.testing.assert_close(together, alone, atol=1e-4, rtol=1e-4)
    alone_and_together.append((name, "same"))


def test_how_many_methods_were_compared():
    assert len(alone_and_together) == len(METHODS)
    assert {name for name, how in alone_and_together if how == "refused"} == set(CLIPS)


def test_words_are_those_after_the_picture(toy):
    subject = toy("llava")
    around = Example("a", "is the ball <image> what color is it ?", (toys.picture(seed=1),))
    encoded = subject.encode(around)
    (seen,) = shown(subject, encoded)
    media = encoded.maps[0].positions("media")
    real = encoded.maps[0].positions("real")
    later = [int(p) for p in real if p > media[-1]]
    assert seen.words.tolist() == later
    assert len(later) < len(real) - len(media)  # there are words before it too
    last = Example("b", "is the ball <image>", (toys.picture(seed=1),), suffix="")
    encoded = subject.encode(last)
    (seen,) = shown(subject, encoded)
    media, real = encoded.maps[0].positions("media"), encoded.maps[0].positions("real")
    others = [int(p) for p in real if p > media[-1]] or [int(p) for p in real if p not in set(media.tolist())]
    assert seen.words.tolist() == others


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_states_are_compared_in_full_precision(dtype):
    """DivPrune on rounded states: the set of the float64 loop over the same values."""
    states = torch.randn(40, 16, generator=torch.Generator().manual_seed(3)).to(dtype)
    seen = Seen(states, states[:2], None, 0, 4)
    for count in (2, 7, 20):
        found = diverse.divprune(seen, count).index.tolist()
        assert found == sorted(oracle.divprune(states.double().numpy(), count))
