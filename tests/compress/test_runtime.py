"""Tokens really removed: the same numbers as when they are hidden, with caches, padding, and every position policy."""

from functools import cache

import pytest
import torch

from compress.budget import Budget
from compress.passes.tokens import Tokens
from compress.recipe import compress
from compress.reducers.inside import fastv
from compress.tokens.choice import Kept, best
from compress.tokens.guards import Reducer
from compress.tokens.runtime import TokenRuntime
from probe import Example, Mass, load, trace
from probe.errors import PassError
from probe.tracing import last_logits
from tests import toys

FAMILIES = (
    "llava",
    "llava_next",
    "llava_onevision",
    "qwen2_vl",
    "qwen2_5_vl",
    "qwen3_vl",
    "internvl",
    "smolvlm",
    "gemma3",
    "qwen2_audio",
)
DEEP = {"qwen3_vl": 3}  # its visual features are added after the first layers


@cache
def opened(family):
    return load(toys.wide(family))


def drawn(seen, count):
    """Tokens drawn by a seed that neither batch nor padding changes."""
    generator = torch.Generator().manual_seed(len(seen))
    return Kept(best(torch.rand(len(seen), generator=generator), count))


def run(subject, encoded, *reducers):
    runtime = TokenRuntime(subject, reducers)
    try:
        return last_logits(subject, encoded)
    finally:
        runtime.detach()


def reducer(layer, policy="preserve", simulated=False, keep=0.5):
    return Reducer(drawn, Budget(keep=keep), layer, policy, simulated=simulated)


seen_cases = []


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("place", ["before", "inside"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_what_is_removed_is_what_is_hidden(family, place, side):
    subject = opened(family)
    layer = 0 if place == "before" else DEEP.get(family, 2)
    encoded = subject.encode(toys.pair(subject), side)
    plain = last_logits(subject, encoded)
    for policy in ("preserve", "reindex", "rebase"):
        if policy != "preserve" and place == "inside" and family == "gemma3":
            continue  # refused below
        physical, simulated = (run(subject, encoded, reducer(layer, policy, simulated)) for simulated in (False, True))
        torch.testing.assert_close(physical, simulated, atol=1e-4, rtol=1e-4)
        assert (physical - plain).abs().max() > 1e-4
        seen_cases.append((family, place, side, policy))
    assert torch.equal(last_logits(subject, encoded), plain)  # detached without a trace


def test_how_many_were_compared():
    assert len(seen_cases) == len(FAMILIES) * 2 * 2 * 3 - 4


def full_pass(subject, encoded, written, *reducers):
    """Logits of the next token from one pass over prompt and written tokens, without a cache: the slow way."""
    runtime = TokenRuntime(subject, reducers)
    try:
        with torch.no_grad():
            return subject.model(**toys.extended(encoded, written), use_cache=False).logits[:, -1].float()
    finally:
        runtime.detach()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("policy", ["preserve", "reindex", "rebase"])
def test_what_is_written_from_the_cache_is_what_full_passes_say(family, policy):
    """Five tokens of a padded batch, each from the cache, against the same tokens read whole with the same choice."""
    subject = opened(family)
    inside = () if family == "gemma3" and policy != "preserve" else (reducer(DEEP.get(family, 2), policy, keep=0.6),)
    reducers = (reducer(0, policy, keep=0.8), *inside)
    encoded = subject.encode(toys.pair(subject))
    runtime = TokenRuntime(subject, reducers)
    try:
        with subject.lock, torch.no_grad():
            made = subject.model.generate(
                **encoded.inputs, max_new_tokens=5, min_new_tokens=5, do_sample=False, output_logits=True,
                return_dict_in_generate=True,
            )  # fmt: skip
    finally:
        runtime.detach()
    written = made.sequences[:, encoded.inputs["input_ids"].shape[1] :]
    lengths = [layer.get_seq_length() for layer in made.past_key_values.layers]
    assert lengths[0] < len(encoded.maps[0]) + 4
    if inside:
        assert lengths[-1] < lengths[0]
    for step, logits in enumerate(made.logits):
        torch.testing.assert_close(logits, full_pass(subject, encoded, written[:, :step], *reducers), atol=2e-4, rtol=1e-3)


def test_what_is_drawn_follows_from_the_words_and_not_from_the_batch():
    subject = opened("llava")
    examples = toys.pair(subject)
    smaller = compress(subject, [Tokens(method="random", budget=Budget(keep=0.25))])
    apart = torch.cat([last_logits(smaller, smaller.encode(example)) for example in examples])
    for side, order in (("left", [0, 1]), ("right", [1, 0])):
        together = last_logits(smaller, smaller.encode([examples[i] for i in order], side))
        torch.testing.assert_close(together, apart[order], atol=1e-4, rtol=1e-4)
    other = compress(subject, [Tokens(method="random", budget=Budget(keep=0.25), seed=1)])
    assert (last_logits(other, other.encode(examples)) - apart).abs().max() > 1e-3


def test_a_static_cache_is_refused_and_the_model_goes_on(toy):
    subject = toy("llava")
    encoded = subject.encode(toys.pair(subject))
    plain = last_logits(subject, encoded)
    runtime = TokenRuntime(subject, [reducer(2)])
    try:
        with subject.lock, torch.no_grad(), pytest.raises(PassError, match="a static cache has one length for all layers"):
            subject.model.generate(**encoded.inputs, max_new_tokens=2, cache_implementation="static")
        assert (last_logits(subject, encoded) - plain).abs().max() > 1e-4  # the next call drops tokens as before
    finally:
        runtime.detach()
    assert torch.equal(last_logits(subject, encoded), plain)


@pytest.mark.slow
def test_a_compiled_forward_says_the_same(toy):
    """Dropping breaks the graph: what is compiled around it changes neither the prompt's logits nor what is written."""
    smaller = compress(toy("llava"), [Tokens(method="uniform", budget=Budget(keep=0.5))])
    encoded = smaller.encode(toys.pair(smaller))
    plain, said = last_logits(smaller, encoded), smaller.generate(encoded, 4)
    torch._dynamo.utils.counters.clear()
    smaller.model.forward = torch.compile(smaller.model.forward, backend="eager")
    try:
        torch.testing.assert_close(last_logits(smaller, encoded), plain)
        assert smaller.generate(encoded, 4) == said
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    finally:
        del smaller.model.forward
        torch._dynamo.reset()


def test_a_model_that_chooses_by_attention_is_not_traced_at_the_same_time(toy):
    subject = toy("llava")
    encoded = subject.encode(toys.pair(subject))
    runtime = TokenRuntime(subject, [Reducer(fastv, Budget(keep=0.5), 2, needs=("before",))])
    try:
        with pytest.raises(PassError, match="cannot be traced at the same time"):
            trace(subject, encoded, [Mass()])
    finally:
        runtime.detach()
    assert trace(subject, encoded, [Mass()])["mass"].tensor.isfinite().all()


def test_a_window_shorter_than_the_prompt_is_refused(toy):
    subject = toy("gemma3")  # its windows see eight positions back
    runtime = TokenRuntime(subject, [reducer(0)])
    try:
        with pytest.raises(PassError, match="see 8 positions back, and the prompt has"):
            last_logits(subject, subject.encode(toys.pair(subject)))
    finally:
        runtime.detach()


@pytest.mark.parametrize(
    ("family", "layer", "message"),
    [
        ("mllama", 0, "are not in the sequence"),
        ("blip2", 0, "without placeholders"),
        ("qwen3_5", 0, "mix positions without attention"),
        ("qwen3_vl", 1, "still adds visual features after layer"),
        ("llava", 4, "cannot be dropped at layer 4"),
    ],
)
def test_what_cannot_lose_tokens_says_why(toy, family, layer, message):
    with pytest.raises(PassError, match=message):
        TokenRuntime(toy(family), [reducer(layer)])


def test_layers_that_share_keys_cannot_lose_tokens_in_between(toy, monkeypatch):
    subject = toy("gemma4")
    monkeypatch.setattr(subject.config.get_text_config(), "num_kv_shared_layers", 2)
    with pytest.raises(PassError, match="share keys and values with others"):
        TokenRuntime(subject, [reducer(0)])


def test_pictures_side_by_side_have_quotas_of_their_own(toy):
    subject = toy("llava")
    two = Example("two", "<image><image> what color is the ball ?", (toys.picture(seed=1), toys.picture(seed=2)))
    encoded = subject.encode(two)
    counts = []

    def counting(seen, count):
        counts.append((len(seen), count))
        return drawn(seen, count)

    runtime = TokenRuntime(subject, [Reducer(counting, Budget(keep=0.25))])
    try:
        last_logits(subject, encoded)
    finally:
        runtime.detach()
    assert counts == [(16, 4), (16, 4)]
