"""Rows that layers leave out: the same numbers as when they are run and taken out again, fewer rows run, with caches and reducers."""

from functools import cache

import pytest
import torch
from torch.nn.attention.bias import causal_lower_right

from compress import saving
from compress.budget import Budget
from compress.cost import cost, tokens_run
from compress.layer_cost import Convention, LayerSize, Ran
from compress.layer_scores import visual_positions
from compress.passes.skips import Composite, ShortV, Skip, SkipRows
from compress.passes.tokens import Tokens
from compress.recipe import compress
from compress.skips.rows import Rows
from compress.skips.rule import length_layers
from compress.smaller import Smaller
from compress.twin import simulated
from probe import Example, Mass, load, sweep, trace
from probe.edits import Knockout
from probe.errors import PassError, ReplayError
from probe.tracing import last_logits
from tests import toys
from tests.oracles import skips as slow

FAMILIES = (
    "llava", "llava_next", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "internvl", "smolvlm", "gemma3", "qwen2_audio",
)  # fmt: skip
LAYERS = (1, 2)
# Name, pass, and what the oracle takes out of the rows.
PERCEPTUAL = (
    ("block", Skip(layers=LAYERS), {"query": False, "ffn": False}),
    ("ffn", Skip(mode="ffn", layers=LAYERS), {"ffn": False}),
    ("attention", Skip(mode="attention", layers=LAYERS), {"query": False}),
    ("shortv", ShortV(layers=LAYERS), {"query": False, "ffn": False}),
    ("composite", Composite(layers=LAYERS), {"query": False}),
    ("no keys", Skip(layers=LAYERS, kv=False), {"query": False, "ffn": False, "kv": False}),
    ("no keys, ffn", Skip(mode="attention", layers=LAYERS, kv=False), {"query": False, "kv": False}),
)
EVERYONE = tuple(
    (f"{mode}, {when}", Skip(mode=mode, rows="all", when=when, layers=(0, 2)), rule)
    for mode, rule in (("block", {"query": False, "ffn": False}), ("ffn", {"ffn": False}), ("attention", {"query": False}))
    for when in ("prompt", "answer", "both")
)


@cache
def opened(family):
    return load(toys.wide(family))


def visual_rows(subject, encoded):
    rows = torch.zeros_like(encoded.inputs["input_ids"], dtype=torch.bool)
    for row, places in enumerate(visual_positions(subject, encoded)):
        rows[row, places] = True
    return rows


def compressed(subject, *passes):
    """The passes on the subject's own model: what hangs on it comes off with `detach`, and nothing needs to be copied."""
    alone = Smaller(subject.model, subject.processor, subject.anatomy, subject.name)
    return compress(alone, passes, in_place=True)


def said(smaller, encoded):
    try:
        return last_logits(smaller, encoded)
    finally:
        smaller.detach()


def layers_of(subject, one):
    """Where keys are left out, the layer that tells the length of the cache stays as it is (in Gemma 3, the first full one is layer 2)."""
    return tuple(set(one.layers) - length_layers(subject)) if isinstance(one, Skip) and not one.kv else one.layers


seen_cases = []


def compared(subject, name, examples, side):
    """One rule on one batch: left out, run and taken out again by the pass, and by the oracle."""
    one, rule = next((one, rule) for other, one, rule in PERCEPTUAL if other == name)
    one = one.model_copy(update={"layers": layers_of(subject, one)})
    encoded = subject.encode(examples, side)
    plain = last_logits(subject, encoded)
    physical = said(compressed(subject, one), encoded)
    masked = said(compressed(subject, one.model_copy(update={"simulated": True})), encoded)
    wanted = slow.logits(subject, encoded, visual_rows(subject, encoded), one.layers, **rule)
    torch.testing.assert_close(physical, masked, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(physical, wanted, atol=1e-5, rtol=1e-5)
    assert (physical - plain).abs().max() > 1e-3
    assert torch.equal(last_logits(subject, encoded), plain)  # detached without a trace
    seen_cases.append((subject.anatomy.family, name, side, len(encoded)))


@pytest.mark.parametrize("name", [name for name, _, _ in PERCEPTUAL])
def test_what_is_left_out_is_what_is_taken_out(name):
    subject = opened("llava")
    for examples, side in ((toys.pair(subject)[:1], "left"), (toys.pair(subject), "left"), (toys.pair(subject), "right")):
        compared(subject, name, examples, side)


@pytest.mark.parametrize("family", FAMILIES[1:])
def test_so_it_is_in_every_family(family):
    subject = opened(family)
    compared(subject, "block", toys.pair(subject)[:1], "left")
    compared(subject, "ffn", toys.pair(subject)[1:], "left")
    compared(subject, "composite", toys.pair(subject), "left")
    compared(subject, "no keys, ffn", toys.pair(subject), "right")


@pytest.mark.parametrize("family", ["llava", "gemma3"])
@pytest.mark.parametrize("mode", ["block", "ffn", "attention"])
def test_words_that_rest(family, mode):
    """The contrast: pictures run on, the words do not; what is written are words, too."""
    subject = opened(family)
    rule = {"block": {"query": False, "ffn": False}, "ffn": {"ffn": False}, "attention": {"query": False}}[mode]
    one = Skip(mode=mode, rows="text", layers=(1,))
    encoded = subject.encode(toys.pair(subject))
    words = ~visual_rows(subject, encoded)
    physical = compressed(subject, one)
    ran = tokens_run(physical, subject.encode(toys.pair(subject)[0]))[1]
    found = said(physical, encoded)
    wanted = slow.logits(subject, encoded, words, (1,), **rule)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(
        said(compressed(subject, one.model_copy(update={"simulated": True})), encoded), wanted, atol=1e-5, rtol=1e-5
    )
    assert ran.queries == (ran.keys if mode == "ffn" else int((~words)[0].sum()))
    if family == "llava":
        check_written(subject, one, rule, lambda encoded: words, (1,), beyond=True)


def test_how_many_were_compared():
    assert len(seen_cases) == len(PERCEPTUAL) * 3 + (len(FAMILIES) - 1) * 4
    assert len({family for family, *_ in seen_cases}) == len(FAMILIES)


def counted(subject, layer, call):
    """Rows that go through the maps of a layer: q, k and the feed-forward block's way back."""
    block, rows, handles = subject.layers[layer], {}, []
    for name, module in (("q", block.self_attn.q_proj), ("k", block.self_attn.k_proj), ("ffn", block.mlp.down_proj)):

        def count(module, args, output, name=name):
            if module.__dict__.get("forward") is None:  # a map that something stands in for is not run
                rows[name] = rows.get(name, 0) + args[0].shape[:-1].numel()

        handles.append(module.register_forward_hook(count))
    call()
    for handle in handles:
        handle.remove()
    return {name: rows.get(name, 0) for name in ("q", "k", "ffn")}


@pytest.mark.parametrize("family", ["llava", "smolvlm", "gemma3", "qwen2_vl"])
def test_rows_that_are_left_out_are_not_run(family):
    """One contiguous picture, several tiles, and a batch under a mask; and the costs say the same."""
    subject = opened(family)
    encoded = subject.encode(toys.pair(subject)[0])
    n, v = len(encoded.maps[0]), int(visual_rows(subject, encoded).sum())
    t = n - v
    wanted = {
        "block": (t, n, t), "ffn": (n, n, t), "attention": (t, n, n), "shortv": (t, n, t), "composite": (t, n, n),
        "no keys": (t, t, t), "no keys, ffn": (t, t, n),
    }  # fmt: skip
    for name, one, _ in PERCEPTUAL:
        smaller = compressed(subject, one.model_copy(update={"layers": (1,)}))
        rows = counted(smaller, 1, lambda smaller=smaller: last_logits(smaller, encoded))
        assert tuple(rows.values()) == wanted[name], name
        ran = tokens_run(smaller, encoded)[1]
        assert (ran.queries, ran.keys, ran.ffn) == wanted[name]
        assert counted(smaller, 2, lambda smaller=smaller: last_logits(smaller, encoded)) == {"q": n, "k": n, "ffn": n}
        smaller.detach()
    assert v > 0


def test_keys_of_updated_tokens():
    for family in ("llava", "qwen3_vl", "gemma3"):
        subject = opened(family)
        encoded = subject.encode(toys.pair(subject))
        one = Composite(layers=LAYERS, kv_from_updated=True)
        physical = said(compressed(subject, one), encoded)
        masked = said(compressed(subject, one.model_copy(update={"simulated": True})), encoded)
        torch.testing.assert_close(physical, masked, atol=1e-5, rtol=1e-5)
        assert (physical - said(compressed(subject, Composite(layers=LAYERS)), encoded)).abs().max() > 1e-3


def test_visual_states_are_unchanged_by_a_frozen_layer():
    subject = opened("llava")
    encoded = subject.encode(toys.pair(subject))
    rows = visual_rows(subject, encoded)
    smaller = compress(subject, [ShortV(layers=(1,))])
    entered, left = {}, {}
    for layer in (1, 2):
        smaller.layers[layer].register_forward_pre_hook(
            lambda m, a, k, layer=layer: entered.update({layer: a[0]}), with_kwargs=True
        )
        smaller.layers[layer].register_forward_hook(lambda m, a, o, layer=layer: left.update({layer: o}))
    last_logits(smaller, encoded)
    assert torch.equal(entered[1][rows], left[1][rows])
    assert not torch.equal(entered[1][~rows], left[1][~rows])
    assert not torch.equal(entered[2][rows], left[2][rows])


def test_two_calls_equal_one_under_a_dense_mask():
    """Words before and words behind a picture, each causal at the end, against rows of a written mask; aligned at the start it is wrong."""
    torch.manual_seed(0)
    visual = torch.zeros(1, 12, dtype=torch.bool)
    visual[0, 3:8] = True
    rows = Rows.of(visual)
    assert rows.segments == ((0, 3), (8, 12))
    q, k, v = torch.randn(3, 1, 2, 12, 8).unbind(0)
    attend = torch.nn.functional.scaled_dot_product_attention
    words = rows.running[0]
    dense = attend(q[:, :, words], k, v, attn_mask=torch.ones(12, 12, dtype=torch.bool).tril()[words])
    before = attend(q[:, :, :3], k[:, :, :3], v[:, :, :3], is_causal=True)
    behind = attend(q[:, :, 8:], k, v, attn_mask=causal_lower_right(4, 12))
    torch.testing.assert_close(torch.cat([before, behind], 2), dense, atol=1e-6, rtol=1e-5)
    assert (attend(q[:, :, 8:], k, v, is_causal=True) - behind).abs().max() > 1e-2


@pytest.mark.parametrize("family", ["llava", "smolvlm"])
def test_both_ways_of_attending_agree_in_the_model(family, monkeypatch):
    subject = opened(family)
    encoded = subject.encode(toys.pair(subject)[0])
    from compress.skips import runtime

    taken = []
    calls = runtime._calls

    def noting(rows, mask, length, kernel):
        found = calls(rows, mask, length, kernel)
        taken.append(len(found))
        return found

    monkeypatch.setattr(runtime, "_calls", noting)
    fast = said(compressed(subject, ShortV(layers=LAYERS)), encoded)
    monkeypatch.setattr(
        runtime,
        "_calls",
        lambda rows, mask, length, kernel: [(rows.running, None, runtime.mask_of(None, rows.running, length))],
    )
    dense = said(compressed(subject, ShortV(layers=LAYERS)), encoded)
    torch.testing.assert_close(fast, dense, atol=1e-5, rtol=1e-5)
    assert taken == [2, 2] if family == "llava" else all(count == 1 for count in taken)  # one run of a picture, several tiles


def generated(smaller, encoded):
    """Five tokens with their logits from the cache."""
    with smaller.lock, torch.no_grad():
        return smaller.model.generate(
            **encoded.inputs, max_new_tokens=5, min_new_tokens=5, do_sample=False, output_logits=True, return_dict_in_generate=True,
        )  # fmt: skip


def check_written(subject, one, rule, rows_of, layers, beyond=False):
    """Each of five tokens of a padded batch from the cache, against whole passes without one, what the rule leaves out taken out."""
    encoded = subject.encode(toys.pair(subject))
    length = encoded.inputs["input_ids"].shape[1]
    for masked in (False, True) if subject.anatomy.family == "LLaVA" else (False,):
        smaller = compressed(subject, one.model_copy(update={"simulated": masked}))
        made = generated(smaller, encoded)
        smaller.detach()
        written = made.sequences[:, length:]
        for step, logits in enumerate(made.logits):
            inputs = toys.extended(encoded, written[:, :step])
            rows = torch.nn.functional.pad(rows_of(encoded), (0, step), value=beyond)
            if one.rows == "all":
                rows = torch.ones_like(rows)
                rows[:, :length] &= one.when != "answer"
                rows[:, length:] &= one.when != "prompt"
            with torch.no_grad():
                wanted = slow.run(
                    subject, lambda inputs=inputs: subject.model(**inputs, use_cache=False).logits[:, -1].float(), rows, layers, **rule
                )  # fmt: skip
            torch.testing.assert_close(logits, wanted, atol=2e-5, rtol=1e-4)
    return made


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "qwen3_vl", "smolvlm", "gemma3"])
def test_what_is_written_from_the_cache_is_what_whole_passes_say(family):
    subject = opened(family)
    for name in ("block", "attention", "no keys") if family in ("llava", "gemma3") else ("no keys, ffn",):
        one, rule = next((one, rule) for other, one, rule in PERCEPTUAL if other == name)
        one = one.model_copy(update={"layers": layers_of(subject, one)})
        check_written(subject, one, rule, lambda encoded: visual_rows(subject, encoded), one.layers)


@pytest.mark.parametrize("name", [name for name, _, _ in EVERYONE])
def test_all_rows_when_asked(name):
    subject = opened("gemma3" if "both" in name else "llava")
    one, rule = next((one, rule) for other, one, rule in EVERYONE if other == name)
    made = check_written(subject, one, rule, lambda encoded: visual_rows(subject, encoded), one.layers)
    assert made.sequences.shape[1] > 5


def test_a_layer_that_nobody_reads_keeps_no_keys():
    subject = opened("llava")
    encoded = subject.encode(toys.pair(subject))
    smaller = compressed(subject, Skip(rows="all", layers=(0, 2)))
    lengths = [layer.get_seq_length() for layer in generated(smaller, encoded).past_key_values.layers]
    costs = tokens_run(smaller, subject.encode(toys.pair(subject)[0]))
    smaller.detach()
    whole = encoded.inputs["input_ids"].shape[1] + 4
    assert lengths == [whole, whole, 0, whole]  # layer 0 tells the length
    assert [(ran.queries, ran.keys > 0, ran.ffn) for ran in (costs[0], costs[2])] == [(0, True, 0), (0, False, 0)]


def test_what_the_next_token_costs():
    subject = opened("llava")
    encoded = subject.encode(toys.pair(subject)[0])
    dense = cost(subject, encoded)
    head = dense.macs["head"]
    for mode, when, fewer in (
        ("block", "both", True),
        ("block", "answer", True),
        ("ffn", "both", True),
        ("block", "prompt", False),
    ):
        smaller = compressed(subject, Skip(mode=mode, rows="all", when=when, layers=(1, 2)))
        found = cost(smaller, encoded)
        smaller.detach()
        assert (found.decode < dense.decode) == fewer
        assert (found.macs["prefill"] < dense.macs["prefill"]) == (when != "answer")
        if mode == "block" and fewer:
            assert found.decode - head == pytest.approx((dense.decode - head) / 2)


@pytest.mark.parametrize(
    ("family", "name"),
    [(family, name) for family in ("llava", "smolvlm") for name in ("block", "ffn", "composite", "no keys")]
    + [("qwen3_vl", "block"), ("gemma3", "composite")],
)
def test_with_tokens_dropped_before_and_inside(family, name):
    subject = opened(family)
    one = next(one for other, one, _ in PERCEPTUAL if other == name)
    deep = 3 if family == "qwen3_vl" else 2
    one = one.model_copy(update={"layers": (1, deep) if name != "no keys" else (1,)})
    encoded = subject.encode(toys.pair(subject))
    for layer, method in ((0, "uniform"), (deep, "dart" if family != "smolvlm" else "fastv")):
        both = []
        for masked in (False, True):
            tokens = Tokens(method=method, layer=layer, budget=Budget(keep=0.5), positions="preserve", simulated=masked)
            smaller = compressed(subject, one.model_copy(update={"simulated": masked}), tokens)
            both.append((last_logits(smaller, encoded), generated(smaller, encoded)))
            smaller.detach()
        torch.testing.assert_close(both[0][0], both[1][0], atol=1e-4, rtol=1e-4)
        for a, b in zip(both[0][1].logits, both[1][1].logits, strict=True):
            torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
        alone = said(compressed(subject, one), encoded)
        assert (both[0][0] - alone).abs().max() > 1e-3


def test_several_pictures_side_by_side_and_apart():
    subject = opened("llava")
    beside = Example("two", "<image><image> what color is the ball ?", (toys.picture(seed=1), toys.picture(seed=2)))
    apart = Example("far", "<image> a dog <image> what color is the ball ?", (toys.picture(seed=1), toys.picture(seed=2)))
    for example in (beside, apart):
        encoded = subject.encode(example)
        wanted = slow.logits(subject, encoded, visual_rows(subject, encoded), LAYERS, query=False, ffn=False)
        torch.testing.assert_close(said(compressed(subject, ShortV(layers=LAYERS)), encoded), wanted, atol=1e-5, rtol=1e-5)


def test_a_prompt_without_pictures_is_left_alone():
    subject = opened("llava")
    blind = subject.encode(toys.pair(subject, media=False))
    assert torch.equal(said(compressed(subject, ShortV(layers=LAYERS)), blind), last_logits(subject, blind))


def test_tracing_sees_every_row_and_the_same_numbers():
    subject = opened("llava")
    encoded = subject.encode(toys.pair(subject))
    smaller = compressed(subject, ShortV(layers=LAYERS))
    plain = last_logits(smaller, encoded)
    seen = trace(smaller, encoded, [Mass()])
    torch.testing.assert_close(seen.logits, plain, atol=1e-5, rtol=1e-5)
    assert seen["mass"].tensor.isfinite().all()
    with pytest.raises(ReplayError, match="cannot be run by itself"):
        sweep(smaller, encoded, [Knockout("last", "image")])
    naive = sweep(smaller, encoded, [Knockout("last", "image")], "naive")
    assert naive.edited[0].isfinite().all()
    smaller.detach()


def test_the_twin_runs_every_row_and_says_the_same():
    subject = opened("llava")
    encoded = subject.encode(toys.pair(subject)[0])
    smaller = compressed(subject, ShortV(layers=LAYERS))
    plain, n = last_logits(smaller, encoded), len(encoded.maps[0])
    with simulated(smaller, [encoded]) as twin:
        rows = counted(twin, 1, lambda: torch.testing.assert_close(last_logits(twin, encoded), plain, atol=1e-5, rtol=1e-5))
    assert rows == {"q": n, "k": n, "ffn": n}
    assert counted(smaller, 1, lambda: last_logits(smaller, encoded))["ffn"] < n
    smaller.detach()


def test_saved_and_loaded_it_says_the_same(tmp_path):
    subject = opened("llava")
    encoded = subject.encode(toys.pair(subject))
    smaller = compressed(subject, Skip(mode="ffn", layers=(1,)), Skip(rows="all", layers=(2,)), Composite(layers=(3,)))
    wanted, text = last_logits(smaller, encoded), smaller.generate(encoded, 4)
    saving.save(smaller, tmp_path / "m")
    again = saving.load(tmp_path / "m", device="cpu")
    torch.testing.assert_close(last_logits(again, encoded), wanted, atol=1e-5, rtol=1e-5)
    assert again.generate(encoded, 4) == text
    assert [one.title for one in again.ledger] == ["skip", "skip", "composite"]
    assert saving.loads_in_transformers(again) == "yes, without skip, composite"
    smaller.detach()
    assert torch.equal(last_logits(smaller, encoded), last_logits(subject, encoded))


def test_every_other_layer_but_the_ends():
    subject = opened("llava")
    assert Skip().plan(subject, {}) == [SkipRows(layers=(2,), rule=Skip().plan(subject, {})[0].rule)]
    assert Skip(interval=1).plan(subject, {})[0].layers == (1, 2)
    assert Skip(interval=1, start=1, end=4).plan(subject, {})[0].layers == (2, 3)
    assert Skip(interval=3).plan(subject, {}) == []
    assert (
        Skip(layers=()).plan(subject, {}) == ShortV(count=0).plan(subject, {}) == Composite(layers=()).plan(subject, {}) == []
    )


def test_layers_by_their_contribution():
    subject = opened("llava")
    evidence = {"layer_scores": {"contribution": [0.3, 0.1, 0.2, 0.1], "block_influence": [0.0, 1.0, 1.0, 1.0]}}
    assert ShortV(count=3).plan(subject, evidence)[0].layers == (1, 2, 3)
    assert ShortV(count=1, score="block_influence").plan(subject, evidence)[0].layers == (0,)
    assert ShortV(count=1).asks() == ("layer_scores",)
    assert ShortV(layers=(1,)).asks() == ()


def test_the_published_code_where_it_departs():
    """IMA's code: perceptual rows without a feed-forward block get its normed input; without attention, the attention's normed input is fed."""
    subject = opened("llava")
    encoded = subject.encode(toys.pair(subject)[0])
    rows, layer = visual_rows(subject, encoded), subject.layers[1]
    seen = {}

    def keep(module, args, kwargs, output):
        seen["in"], seen["out"] = args[0], output

    smaller = compress(subject, [Skip(mode="ffn", layers=(1,), compat=True)])
    smaller.layers[1].register_forward_hook(keep, with_kwargs=True)
    last_logits(smaller, encoded)
    left = seen["out"]
    smaller.detach()
    plain = compress(subject, [Skip(mode="ffn", layers=(1,))])
    plain.layers[1].register_forward_hook(keep, with_kwargs=True)
    last_logits(plain, encoded)
    between = seen["out"][rows]  # attention alone
    plain.detach()
    torch.testing.assert_close(left[rows], between + layer.post_attention_layernorm(between), atol=1e-5, rtol=1e-5)
    other = compress(subject, [Skip(mode="attention", rows="all", layers=(1,), compat=True)])
    other.layers[1].register_forward_hook(keep, with_kwargs=True)
    last_logits(other, encoded)
    other.detach()
    x = seen["in"]
    torch.testing.assert_close(seen["out"], x + layer.mlp(layer.input_layernorm(x)), atol=1e-5, rtol=1e-5)


def test_both_halves_of_a_parallel_layer_read_the_same():
    subject = opened("llava")
    encoded = subject.encode(toys.pair(subject)[0])
    layer, seen = subject.layers[1], {}
    smaller = compress(subject, [Skip(mode="parallel-attention", rows="all", layers=(1,))])
    smaller.layers[1].register_forward_hook(lambda m, a, k, o: seen.update(x=a[0], y=o, more=k), with_kwargs=True)
    last_logits(smaller, encoded)
    smaller.detach()
    normed = layer.input_layernorm(seen["x"])
    wanted = seen["x"] + layer.self_attn(hidden_states=normed, **seen["more"])[0] + layer.mlp(normed)
    torch.testing.assert_close(seen["y"], wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("family", "one", "message"),
    [
        ("mllama", Skip(), "are not in the sequence: there are no visual rows"),
        ("mllama", Skip(rows="all", layers=(1, 2, 3)), "reads the picture by cross-attention"),
        ("blip2", Skip(layers=(1,)), "without placeholders"),
        ("qwen3_5", Skip(layers=(0,)), "mixes positions without attention"),
        ("llava", Skip(layers=(4,)), "layer 4 does not exist"),
        ("llava", Skip(interval=0), "an interval is 1 or more"),
        ("llava", Skip(when="answer"), "an answer has no perceptual rows"),
        ("llava", Skip(kv=False, layers=(0,)), "reads the length of its cache from layer 0"),
        ("llava", Skip(kv=False, mode="ffn"), "perceptual rows that do not attend"),
        ("llava", Skip(kv=False, rows="all"), "perceptual rows that do not attend"),
        ("llava", ShortV(), "either layers or a count"),
        ("llava", ShortV(count=5), "frozen in 0 to 4 layers, not in 5"),
        ("llava", ShortV(count=2), "needs evidence 'layer_scores'"),
        ("llava", Composite(ffn_for_visual=False, kv_from_updated=True), "nothing updates visual tokens"),
    ],
)
def test_what_cannot_be_skipped_says_why(toy, family, one, message):
    with pytest.raises(PassError, match=message):
        compress(toy(family), [one])


def test_all_rows_pass_layers_of_a_model_that_cross_attends(toy):
    subject = toy("mllama")
    layers = tuple(layer for layer in range(subject.n_layers) if not subject.anatomy.cross[layer])[-1:]
    encoded = subject.encode(toys.pair(subject))
    everyone = torch.ones_like(encoded.inputs["input_ids"], dtype=torch.bool)
    wanted = slow.logits(subject, encoded, everyone, layers, query=False, ffn=False)
    found = said(compressed(subject, Skip(rows="all", layers=layers)), encoded)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


def test_two_passes_cannot_share_a_layer():
    subject = opened("llava")
    with pytest.raises(PassError, match="layer 1 is skipped by another pass already"):
        compressed(subject, Skip(layers=(1,)), Skip(mode="ffn", layers=(1, 2)))
    encoded = subject.encode(toys.pair(subject))
    assert last_logits(subject, encoded).isfinite().all()


def test_a_static_cache_is_refused():
    subject = opened("llava")
    smaller = compressed(subject, ShortV(layers=LAYERS))
    with smaller.lock, torch.no_grad(), pytest.raises(PassError, match="a static cache has one length"):
        smaller.model.generate(**subject.encode(toys.pair(subject)).inputs, max_new_tokens=2, cache_implementation="static")
    smaller.detach()


def test_costs_are_the_published_ones():
    """ShortV on LLaVA-1.5-7B and EE-MLLM, FLOPs as 2 x MAC, attention counted in full."""
    size, tera = LayerSize.of(4096, 11008), 1e12
    dense, frozen = (2 * size.macs(ran) for ran in (Ran.all(640), Ran.text_rows(64, 576, ffn=False)))
    total = 13 * dense + 19 * frozen
    assert 32 * dense / tera == pytest.approx(8.50, abs=0.005)
    assert total / (32 * dense) == pytest.approx(0.552, abs=0.0005)
    for visual, saved in ((2880, 0.249), (576, 0.168)):
        composite = size.macs(Ran.text_rows(64, visual, ffn=True)) / size.macs(Ran.all(64 + visual))
        assert 1 - composite == pytest.approx(saved, abs=0.0005)


def test_the_costs_of_passes_are_those_of_the_closed_form():
    subject = opened("llava")
    encoded = subject.encode(toys.pair(subject)[0])
    v = int(visual_rows(subject, encoded).sum())
    t = len(encoded.maps[0]) - v
    for one, ffn in ((ShortV(layers=(1, 3)), False), (Composite(layers=(1, 3)), True)):
        smaller = compressed(subject, one)
        found = tokens_run(smaller, encoded)
        smaller.detach()
        closed = Ran.text_rows(t, v, ffn)
        assert [(r.queries, r.keys, r.ffn) for r in found] == [
            (closed.queries, closed.keys, closed.ffn) if layer in (1, 3) else (t + v,) * 3 for layer in range(4)
        ]  # fmt: skip
        size = LayerSize.of(32, 64)
        assert size.macs(found[1], Convention("causal")) < size.macs(found[0], Convention("causal"))
        everything = compressed(subject, one.model_copy(update={"simulated": True}))
        assert tokens_run(everything, encoded) == tokens_run(subject, encoded)
        everything.detach()
