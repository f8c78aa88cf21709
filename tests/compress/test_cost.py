"""Costs in closed form: the papers' numbers, what torch counts while the model runs, and the bytes of real caches."""

from types import SimpleNamespace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from compress.budget import Budget
from compress.cost import cost, mean_cost, parameters, tokens_run
from compress.layer_cost import Convention, LayerSize, Ran, layer_sizes
from compress.passes import METHODS
from compress.passes.layers import RemoveLayers
from compress.passes.tokens import Method, Pyramid, Tokens, Withdraw
from compress.recipe import compress
from compress.reducers.plain import uniform
from compress.selector_cost import ARITHMETIC
from probe import load
from tests import toys

LLAVA = LayerSize.of(4096, 11008)  # LLaVA-1.5-7B, 32 layers
TWO, THREE = Convention(ffn=2), Convention(ffn=3)


def tera(macs):
    return round(macs / 1e12, 3)


@pytest.mark.parametrize(
    ("n", "how", "want"),
    [(576, TWO, 2.986), (576, THREE, 3.817), (626, THREE, 4.157), (676, THREE, 4.498), (2880, THREE, 20.825)],
)
def test_papers_multiply_adds(n, how, want):
    assert tera(32 * LLAVA.macs(Ran.all(n), how)) == want


def test_papers_flops_are_twice_the_multiply_adds():
    assert tera(2 * 32 * LLAVA.macs(Ran.all(576))) == 7.634
    assert tera(2 * 32 * LLAVA.macs(Ran.all(2880))) == 41.65
    assert [round(2 * 32 * LLAVA.macs(Ran.all(576 + t)) / 1e12, 2) for t in (40, 64, 100)] == [8.18, 8.50, 9.00]


def shares(layers, how=THREE, full=576):
    return sum(LLAVA.macs(ran, how) for ran in layers) / (32 * LLAVA.macs(Ran.all(full), how))


@pytest.mark.parametrize(
    ("k", "kept", "text", "want"),
    [(2, 288, 40, 0.556), (3, 288, 40, 0.571), (2, 432, 0, 0.762), (2, 288, 0, 0.526), (2, 144, 0, 0.293), (2, 432, 64, 0.785),
     (2, 288, 64, 0.572), (2, 144, 64, 0.362)],
)  # fmt: skip
def test_fastv(k, kept, text, want):
    layers = [Ran.all(576 + text)] * k + [Ran.all(kept + text)] * (32 - k)
    assert round(shares(layers, full=576 + text), 3) == want


def test_pyramid_drop():
    counts = [576] * 8 + [288] * 8 + [144] * 8 + [72] * 8
    assert sum(counts) / 32 == 270
    assert tera(sum(LLAVA.macs(Ran.all(n), THREE) for n in counts)) == 1.777


@pytest.mark.parametrize(("text", "want"), [(40, 0.535), (64, 0.552), (100, 0.576)])
def test_shortv_replaces_nineteen_layers(text, want):
    layers = [Ran.all(576 + text)] * 13 + [Ran.text_rows(text, 576, ffn=False)] * 19
    assert round(shares(layers, full=576 + text), 3) == want


@pytest.mark.parametrize(("visual", "want"), [(576, 16.8), (2880, 24.9)])
def test_composite_attention(visual, want):
    assert round(100 * (1 - shares([Ran.text_rows(64, visual, ffn=True)] * 32, full=visual + 64)), 1) == want


def test_causal_pairs_are_counted_exactly():
    exact = Convention(attention="causal")
    size = LayerSize.of(2, 3)
    rest = size.macs(Ran(0, 4, 0)) + 4 * (size.asking + size.ffn)
    assert size.macs(Ran.all(4), exact) - rest == 10 * size.mixing  # 1 + 2 + 3 + 4
    window = LayerSize(0, 0, 0, 1, 0, window=2)
    assert window.macs(Ran.all(4), exact) == 1 + 2 + 2 + 2
    assert LayerSize(0, 0, 0, 1, 0).macs(Ran(1, 4, 1, pairs=3), exact) == 3


@pytest.mark.parametrize(
    ("width", "heads", "layers", "want"),
    [(4096, 4096, 32, 524_288), (3584, 512, 28, 57_344), (2048, 256, 36, 36_864), (2560, 1024, 36, 147_456)],
)
def test_keys_and_values_of_one_token(width, heads, layers, want):
    assert layers * LayerSize.of(width, 4 * width, heads).kv_bytes(Ran.all(1), 2) == want


# --- against what runs -----------------------------------------------------------------------------------------------

COUNTED = (
    "llava", "llava_next", "llava_onevision", "llava_pixtral", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "internvl",
    "smolvlm", "idefics3", "paligemma", "gemma3",
)  # fmt: skip
compared = []


def run(subject, encoded):
    """What torch counts in each module, and the cache that the prompt leaves."""
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        made = subject.model(**encoded.inputs, use_cache=True, logits_to_keep=1)
    counts = {name: sum(flops.values()) for name, flops in counter.get_flop_counts().items()}
    counts[f"{type(subject.model).__name__}."] = counts["Global"]
    return lambda path: counts.get(f"{type(subject.model).__name__}.{path}", 0), made.past_key_values


def cached(cache):
    return [layer.keys.nbytes + layer.values.nbytes for layer in cache.layers]


def one(subject):
    return subject.encode(toys.questions(subject)[:1])


@pytest.mark.parametrize("family", COUNTED)
def test_what_torch_counts(toy, family):
    subject = toy(family)
    encoded = one(subject)
    counted, cache = run(subject, encoded)
    found = cost(subject, encoded)
    anatomy = subject.anatomy
    sparse = family == "qwen3_vl_moe"  # torch does not count the grouped products of experts
    if not sparse:
        assert [2 * macs for macs in found.layers] == [counted(f"{anatomy.layers}.{i}") for i in range(subject.n_layers)]
    assert 2 * found.macs["head"] == counted(anatomy.unembedding)
    connector = counted(anatomy.connector)
    for i in range(len(getattr(subject.model.get_submodule(anatomy.vision), "deepstack_merger_list", None) or ())):
        connector += counted(f"{anatomy.vision}.deepstack_merger_list.{i}")
    if found.macs["connector"] is None:
        assert found.notes == (f"the connector of {anatomy.family}",)
    else:
        assert 2 * found.macs["connector"] == connector
    inside = connector if anatomy.connector.startswith(f"{anatomy.vision}.") else 0
    assert 2 * found.macs["vision"] == counted(anatomy.vision) - inside
    assert list(found.kv_bytes) == cached(cache)
    compared.append(family)


def test_how_many_were_counted():
    assert tuple(compared) == COUNTED


def test_experts_count_for_the_tokens_that_visit_them(toy):
    subject = toy("qwen3_vl_moe")
    config = subject.config.get_text_config()
    each = 3 * config.hidden_size * config.moe_intermediate_size
    want = config.num_experts_per_tok * each + config.num_experts * config.hidden_size
    assert [size.ffn for size in layer_sizes(subject)] == [want] * subject.n_layers


REDUCED = {
    "before": [Tokens(method="uniform", budget=Budget(keep=0.5))],
    "inside": [Tokens(method="drawn", budget=Budget(keep=0.25), layer=2)],
    "both": [Tokens(method="uniform", budget=Budget(keep=12)), Tokens(method="drawn", budget=Budget(keep=5), layer=1)],
    "pyramid": [Pyramid(method="drawn")],
    "withdrawn": [Withdraw(layer=3)],
    "layer and tokens": [RemoveLayers(layers=(1,)), Tokens(method="uniform", budget=Budget(keep=0.5))],
}


@pytest.fixture
def drawn(monkeypatch):
    """A method inside the decoder, that chooses like `uniform`."""
    monkeypatch.setitem(METHODS, "drawn", Method(lambda seen, count: uniform(seen, count), layer=2))


@pytest.mark.parametrize("family", ["llava", "qwen2_vl", "internvl"])
@pytest.mark.parametrize("case", REDUCED)
def test_reduced_models(toy, drawn, family, case):
    subject = toy(family)
    smaller = compress(subject, REDUCED[case])
    encoded = one(smaller)
    counted, cache = run(smaller, encoded)
    found = cost(smaller, encoded)
    assert [2 * macs for macs in found.layers] == [counted(f"{smaller.anatomy.layers}.{i}") for i in range(smaller.n_layers)]
    assert list(found.kv_bytes) == cached(cache)
    assert sum(found.kv_bytes) < sum(cost(subject, encoded).kv_bytes)
    assert found.notes == (
        () if case in ("before", "withdrawn", "layer and tokens") else ("the arithmetic of choosing by drawn",)
    )
    smaller.detach()


CHOOSING = (
    "fopru",
    "fastervlm",
    "visionzip",
    "prumerge",
    "vispruner",
    "divprune",
    "aim-merge",
    "fastv",
    "pdrop",
    "aim",
    "dart",
    "cdpruner",
    "dpc-knn",
    "uniform",
    "pooling",
)


PATCHES, WIDE = 16, 32
UNSEEN = {"cdpruner": PATCHES * WIDE, "dpc-knn": PATCHES**2 * WIDE}  # a matrix by a vector, and distances: torch counts neither


def choosing(subject, method):
    """Multiply-adds of a choice: what is said, and what torch counts beside the model's own parts.

    Turning positions is beside them too, but the dense model does it as well.
    """
    encoded = one(subject)
    turning = run(subject, encoded)[0]("")
    dense = cost(subject, encoded)
    smaller = compress(subject, [Tokens(method=method, budget=Budget(keep=8))])
    found = cost(smaller, encoded)
    beside = run(smaller, encoded)[0]("") - turning - 2 * (found.total_macs - found.macs["selector"] - dense.total_macs)
    smaller.detach()
    assert found.notes == ()
    return found.macs["selector"], beside / 2


@pytest.mark.parametrize("method", CHOOSING)
def test_what_choosing_costs(toy, method):
    assert toy("llava").config.text_config.hidden_size == WIDE
    said, counted = choosing(toy("llava"), method)
    assert said == counted + UNSEEN.get(method, 0)


def test_raters_are_counted_as_if_all_words_were_some(toy):
    said, counted = choosing(toy("llava"), "sparsevlm")
    assert 0 < counted < said


def test_every_method_says_what_choosing_costs():
    assert set(ARITHMETIC) <= set(METHODS)
    assert len(ARITHMETIC) >= 21


def test_a_setting_that_changes_the_arithmetic_is_not_guessed_at(toy):
    subject = toy("llava")
    smaller = compress(subject, [Tokens(method="divprune", settings={"cen": True})])
    assert cost(smaller, one(smaller)).notes == ("the arithmetic of choosing by divprune",)
    smaller.detach()


def test_a_simulated_reducer_saves_nothing(toy):
    subject = toy("llava")
    smaller = compress(subject, [Tokens(method="uniform", simulated=True)])
    assert cost(smaller, one(smaller)).layers == cost(subject, one(subject)).layers


def test_what_lets_tokens_pass_is_asked(toy):
    subject = toy("llava")
    smaller = compress(subject, [])
    frozen = SimpleNamespace(
        ran=lambda layer, ran, text, visual: Ran.text_rows(text, visual, False) if layer == 1 else ran, detach=lambda: None
    )
    smaller.attached.append(frozen)
    encoded = one(smaller)
    dense, found = tokens_run(subject, encoded), tokens_run(smaller, encoded)
    assert [a == b for a, b in zip(dense, found, strict=True)] == [True, False, True, True]
    assert found[1] == Ran(dense[1].keys - 16, dense[1].keys, dense[1].keys - 16)
    assert cost(smaller, encoded).kv_bytes == cost(subject, encoded).kv_bytes


def test_narrower_weights_are_read_not_the_configuration():
    subject = load(toys.build("llava"), check=False)
    mlp = subject.layers[2].mlp
    for name, out in (("gate_proj", True), ("up_proj", True), ("down_proj", False)):
        weight = getattr(mlp, name).weight.data
        thin = torch.nn.Linear(32 if out else 40, 40 if out else 32, bias=False)
        thin.weight.data = (weight[:40] if out else weight[:, :40]).clone()
        setattr(mlp, name, thin)
    encoded = one(subject)
    counted, _ = run(subject, encoded)
    found = cost(subject, encoded)
    assert 2 * found.layers[2] == counted(f"{subject.anatomy.layers}.2") < 2 * found.layers[1]


@pytest.mark.parametrize("family", ["llava", "qwen3_vl", "mllama", "qwen2_audio", "llama"])
def test_parameters_by_part(toy, family):
    subject = toy(family)
    found = parameters(subject)
    assert sum(found.values()) == sum(weight.numel() for weight in subject.model.parameters())
    assert found["decoder"] > 0
    assert ("vision" in found) == (subject.anatomy.vision is not None)
    assert ("audio" in found) == (subject.anatomy.audio is not None)


@pytest.mark.parametrize(("family", "note"), [("mllama", "the vision tower of"), ("qwen2_audio", "the audio tower of")])
def test_what_is_not_counted_is_named(toy, family, note):
    subject = toy(family)
    found = cost(subject, one(subject))
    assert found.macs["vision"] is None
    assert note in found.notes[0]
    assert found.total_macs == found.macs["prefill"] + found.macs["head"]
    assert found.told()["not_counted"] == list(found.notes)


def test_the_next_token_reads_what_is_left(toy):
    subject = toy("llava")
    encoded = one(subject)
    n = sum(segment != "pad" for segment in encoded.maps[0].segments)
    with torch.no_grad():
        cache = subject.model(**encoded.inputs, use_cache=True).past_key_values
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            mask = torch.ones(1, n + 1, dtype=torch.long)
            subject.model(input_ids=torch.tensor([[5]]), attention_mask=mask, past_key_values=cache)
    counts = {name: sum(flops.values()) for name, flops in counter.get_flop_counts().items()}
    want = sum(counts[f"LlavaForConditionalGeneration.{subject.anatomy.layers}.{i}"] for i in range(4))
    assert 2 * cost(subject, encoded).decode == want + counts["LlavaForConditionalGeneration.lm_head"]


def test_means_over_prompts(toy):
    subject = toy("llava")
    prompts = [subject.encode(example) for example in toys.pair(subject)]
    found, each = mean_cost(subject, prompts), [cost(subject, prompt) for prompt in prompts]
    assert found.flops == pytest.approx(sum(one.flops for one in each) / 2)
    assert each[0].flops != each[1].flops
    assert found.by_phase["vision"] == each[0].macs["vision"]
    with pytest.raises(ValueError, match="that of one prompt, not of 2"):
        cost(subject, subject.encode(toys.pair(subject)))
