"""Heads and neurons cut out: the same answers as when they are silenced, caches, costs, and what is refused."""

from functools import cache

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from compress import saving
from compress.budget import Budget
from compress.calibration import Calibration
from compress.cost import cost
from compress.passes.layers import RemoveLayers
from compress.passes.removal import HideUnits, RemoveHeads, RemoveNeurons
from compress.passes.skips import Skip
from compress.passes.tokens import Tokens
from compress.passes.width import Width
from compress.recipe import compress
from compress.smaller import Smaller
from compress.structure import units_of
from probe import Knockout, Mass, Rows, load, trace
from probe.errors import EditError, PassError
from probe.tracing import last_logits
from tests import toys

FAMILIES = (
    "llava", "qwen2_vl", "qwen3_vl", "internvl", "smolvlm", "gemma3", "mllama", "qwen2_audio", "phi4_multimodal", "qwen3_5",
)  # fmt: skip
# In toys of two head groups and 64 neurons in each of 4 layers.
EVEN = {"heads": {"heads": 0.5}, "neurons": {"neurons": 0.3}}
UNEVEN = {"heads": {"heads": 0.3, "allocation": "global"}, "neurons": {"neurons": 0.3, "allocation": "global", "round_to": 1}}
CASES = [
    (family, kind, name)
    for family in FAMILIES
    for kind in ("heads", "neurons")
    for name in ("even", "uneven")
    if (family, kind) != ("phi4_multimodal", "heads") and (family, kind, name) != ("qwen3_5", "heads", "uneven")
]  # fmt: skip  (one map makes Phi-4's queries, keys and values; one layer of Qwen3.5's has heads)
# Whether plain transformers builds the even shape: Qwen2-VL divides its width by its heads, Mllama's and Qwen3.5's layers differ.
UNTOLD = {("qwen2_vl", "heads"), ("mllama", "heads"), ("qwen3_5", "heads")}


def settings(kind, name):
    return {"score": "magnitude", **(EVEN if name == "even" else UNEVEN)[kind]}


@cache
def subject_of(family):
    return load(toys.build(family))


@cache
def made(family, kind, name):
    return compress(subject_of(family), [Width(**settings(kind, name))])


@cache
def encoded(family):
    subject = subject_of(family)
    return subject.encode(toys.questions(subject) if family != "phi4_multimodal" else toys.pair(subject, media=False))


def gone(smaller):
    return {int(layer): units for change in smaller.ledger[-1].changes for layer, units in change["units"].items()}


seen = []


@pytest.mark.parametrize(("family", "kind", "name"), CASES)
def test_what_is_cut_is_what_is_silenced(family, kind, name):
    subject, smaller = subject_of(family), made(family, kind, name)
    twin = compress(subject, [Width(**settings(kind, name), simulated=True)], in_place=True)
    try:
        silenced = last_logits(twin, encoded(family))
    finally:
        twin.detach()
    plain = last_logits(subject, encoded(family))
    torch.testing.assert_close(last_logits(smaller, encoded(family)), silenced, atol=1e-5, rtol=1e-5)
    assert (silenced - plain).abs().max() > 1e-2
    seen.append((family, kind, name))


def test_how_many_were_compared():
    assert seen == CASES
    assert len(seen) == 37


@pytest.mark.parametrize(("family", "kind", "name"), CASES)
def test_counts_are_those_asked_for(family, kind, name):
    before, after = (units_of(one, kind)[0] for one in (subject_of(family), made(family, kind, name)))
    counts = [(before[layer].count, after[layer].count) for layer in before]
    if name == "even":
        assert counts == [(2, 1) if kind == "heads" else (64, 48)] * len(before)  # 64 - 19 = 45, and then the next eight
    else:
        assert sum(old - new for old, new in counts) == int(0.3 * sum(old for old, _ in counts))
    told = (kind, name) == (kind, "even") and (family, kind) not in UNTOLD
    assert saving.is_regular(made(family, kind, name)) == told
    config = made(family, kind, name).config.get_text_config()
    if kind == "neurons":
        assert config.intermediate_size == (48 if told else 64)
    else:
        assert (config.num_attention_heads, config.num_key_value_heads) == ((2, 1) if told else (4, 2))


@pytest.mark.parametrize("family", ["llava", "gemma3", "qwen3_5"])
def test_nothing_asked_is_nothing_done(family):
    subject = subject_of(family)
    smaller = compress(subject, [Width()])
    assert smaller.ledger == ()
    assert torch.equal(last_logits(smaller, encoded(family)), last_logits(subject, encoded(family)))


@cache
def both(family, name):
    """Heads and neurons removed in one pass, where there are both."""
    kinds = [kind for kind in ("heads", "neurons") if (family, kind, name) in CASES]
    return compress(subject_of(family), [Width(**{k: v for kind in kinds for k, v in settings(kind, name).items()})])


# --- caches and costs ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_written_from_the_cache_is_what_full_passes_say(family):
    """Three tokens of a padded batch, each from a cache whose layers differ in heads, against the same tokens read whole."""
    model, inputs = both(family, "uneven").model, dict(encoded(family).inputs)
    with torch.no_grad():
        made = model.generate(
            **inputs, max_new_tokens=3, min_new_tokens=3, do_sample=False, output_logits=True, return_dict_in_generate=True
        )
        length = inputs["input_ids"].shape[1]
        for step, logits in enumerate(made.logits):
            written = made.sequences[:, length : length + step]
            whole = {**inputs, "input_ids": torch.cat([inputs["input_ids"], written], 1)}
            whole["attention_mask"] = torch.cat([inputs["attention_mask"], torch.ones_like(written)], 1)
            for name in ("token_type_ids", "mm_token_type_ids"):
                if name in inputs:
                    whole[name] = torch.cat([inputs[name], torch.zeros_like(written)], 1)
            if "cross_attention_mask" in inputs:
                crossed = inputs["cross_attention_mask"]
                whole["cross_attention_mask"] = torch.cat([crossed, crossed[:, -1:].expand(-1, step, -1, -1)], 1)
            full = model(**whole, use_cache=False).logits[:, -1]
            torch.testing.assert_close(logits, full, atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize("family", ["llava", "qwen2_vl", "qwen3_vl", "internvl", "smolvlm", "gemma3"])
def test_costs_are_those_of_what_is_left(family):
    smaller, subject = both(family, "uneven"), subject_of(family)
    one = smaller.encode(toys.questions(smaller)[:1])
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        cached = smaller.model(**one.inputs, use_cache=True, logits_to_keep=1).past_key_values
    counts = {name: sum(flops.values()) for name, flops in counter.get_flop_counts().items()}
    found, dense = cost(smaller, one), cost(subject, one)
    root = f"{type(smaller.model).__name__}.{smaller.anatomy.layers}"
    assert [2 * macs for macs in found.layers] == [counts[f"{root}.{i}"] for i in range(smaller.n_layers)]
    assert list(found.kv_bytes) == [layer.keys.nbytes + layer.values.nbytes for layer in cached.layers]
    assert sum(found.kv_bytes) < sum(dense.kv_bytes)
    less = sum(dense.parameters.values()) - sum(found.parameters.values())
    assert less == sum(p.numel() for p in subject.model.parameters()) - sum(p.numel() for p in smaller.model.parameters()) > 0


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "settings", "message"),
    [
        ("llava", {"heads": 1.0}, "heads is the share that is removed, 0 or more and below 1: 1 is not"),
        ("llava", {"neurons": -0.1}, "neurons is the share that is removed"),
        ("llava", {"share": 0.2, "heads": 0.5}, "or one share of both: not all three"),
        ("llava", {"share": 0.2}, "only the score flap compares heads with neurons"),
        ("llava", {"heads": 0.4}, "0.4 of 2 head groups in a layer is less than one"),
        ("llava", {"neurons": 0.1}, "0.1 of 64 neurons in a layer is less than one, and 8 stay together"),
        ("llava", {"neurons": (0.5, 0.0)}, "neurons has 2 shares and the model 4 layers"),
        ("llava", {"neurons": (0.5, 0.0, 0.0, 0.0), "allocation": "global"}, "leaves nothing to allocate"),
        ("llava", {"neurons": (0.5, 0.0, 0.0, 1.0)}, "neurons is the share that is removed"),
        ("llava", {"neurons": 0.5, "round_to": 0}, "multiples of round_to, 1 or more: 0 is not"),
        ("llava", {"neurons": 0.5, "simulated": True, "compensate": True}, "hides units and gives no bias"),
        ("llava", {"neurons": 0.5, "score": "flap"}, "needs evidence 'calibration'"),
        ("paligemma", {"heads": 0.5}, "0.5 of 1 head groups in a layer is less than one"),
        ("phi4_multimodal", {"heads": 0.5}, "do not come from three linear maps"),
        ("qwen3_vl_moe", {"neurons": 0.5}, "a mixture of experts: remove experts instead"),
        ("blip2", {"neurons": 0.5}, "no feed-forward block of its own"),
    ],
)
def test_what_cannot_be_removed_says_why(family, settings, message):
    with pytest.raises(PassError, match=message):
        compress(subject_of(family), [Width(**{"score": "magnitude", **settings})])


@pytest.mark.parametrize(
    ("family", "change", "message"),
    [
        ("llava", RemoveHeads(units={0: (2,)}), "layer 0 has no head group 2: it has 0 to 1"),
        ("llava", RemoveHeads(units={0: (0, 1)}), "layer 0 needs 1 of its 2 heads, and 2 are to go"),
        ("llava", RemoveNeurons(units={4: (0,)}), "layer 4 does not exist"),
        (
            "mllama",
            RemoveHeads(units={1: (0,)}),
            "layer 1 of this .* can lose no heads: its heads read the picture through cross",
        ),
        ("qwen3_5", HideUnits(of="heads", units={0: (0,)}), "it mixes positions without attention heads"),
    ],
)
def test_a_change_that_does_not_fit_says_why(family, change, message):
    with pytest.raises(PassError, match=message):
        change.carry_out(Smaller.of(subject_of(family)))


def test_a_configuration_that_cannot_say_it_is_not_told():
    """Llama's width must be a multiple of its heads: 6 of 8 are left to the ledger, 4 of 8 are told."""
    subject = load(toys.build("llava"))
    config = subject.config.get_text_config()
    config.num_attention_heads, config.num_key_value_heads, config.head_dim = 8, 8, 4
    wide = load((type(subject.model)(subject.config).eval(), subject.processor))
    six, four = (compress(wide, [Width(score="magnitude", heads=share)]) for share in (0.25, 0.5))
    assert (saving.is_regular(six), six.config.get_text_config().num_attention_heads) == (False, 8)
    assert (saving.is_regular(four), four.config.get_text_config().num_attention_heads) == (True, 4)


def test_layers_that_keep_all_their_heads_are_named():
    change = made("mllama", "heads", "even").ledger[-1].changes[0]
    assert change["skipped"].keys() == {"1", "3"}
    assert "cross-attention" in change["skipped"]["1"]


def test_layers_that_share_keys_or_weights_lose_none(monkeypatch):
    subject = load(toys.build("llava"))
    layers = subject.layers
    layers[1].mlp.up_proj.weight = layers[0].mlp.up_proj.weight
    layers[2].self_attn.q_norm = torch.nn.RMSNorm(32)  # over all heads, as OLMo 2 has it
    layers[3].mlp.down_proj = torch.nn.Identity()
    assert units_of(subject, "neurons")[1] == {
        0: "it shares weights with another part of the model", 1: "it shares weights with another part of the model",
        3: "its feed-forward block does not consist of linear maps into neurons and out of them",
    }  # fmt: skip
    assert units_of(subject, "heads")[1] == {2: "its q_norm.weight spans all heads"}
    monkeypatch.setattr(subject.config.get_text_config(), "num_kv_shared_layers", 2, raising=False)
    with pytest.raises(PassError, match="share keys and values"):
        units_of(subject, "heads")


def test_with_other_passes(tmp_path):
    """Layers renumbered before, skipped or emptied of tokens after: one ledger makes it all again."""
    subject = subject_of("llava")
    steps = [
        RemoveLayers(layers=(1,)), Width(score="magnitude", heads=0.4, neurons=0.4, allocation="global"), Skip(layers=(1,), mode="ffn"),
        Tokens(method="fastv", budget=Budget(keep=0.9, unit="flops_ratio"), layer=2),
    ]  # fmt: skip
    smaller = compress(subject, steps)
    again = saving.load(saving.save(smaller, tmp_path / "m"), device="cpu", check=False)
    try:
        torch.testing.assert_close(
            last_logits(again, encoded("llava")), last_logits(smaller, encoded("llava")), atol=1e-5, rtol=1e-5
        )
        one = smaller.encode(toys.pair(smaller)[:1])
        assert cost(smaller, one).layers == cost(again, one).layers
        assert cost(smaller, one).ran[2].queries < cost(smaller, one).ran[0].queries
    finally:
        smaller.detach()
        again.detach()


def test_what_is_recorded_of_layers_that_differ_in_heads():
    smaller = made("llava", "heads", "uneven")
    counts = [units.count for units in units_of(smaller, "heads")[0].values()]
    assert sorted(counts) == [1, 1, 2, 2]
    whole = [layer for layer, count in enumerate(counts) if count == 2]
    for recorder in (Mass(), Rows()):
        with pytest.raises(EditError, match="of this model differ in heads: record layers that have the same number"):
            trace(smaller, encoded("llava"), [recorder])
    assert trace(smaller, encoded("llava"), [Mass(layers=whole)])["mass"].tensor.shape[2] == 4
    with pytest.raises(EditError, match="head 3 does not exist: the model has heads 0 to 1"):
        trace(smaller, encoded("llava"), [], [Knockout("last", "image", heads=[3])])


def test_each_layer_may_lose_a_share_of_its_own(toy):
    subject = toy("llava")
    changes = Width(score="magnitude", neurons=(0.5, 0.0, 0.25, 0.0)).plan(subject, {})
    whole = Width(score="magnitude", neurons=0.5).plan(subject, {})
    assert {layer: len(gone) for layer, gone in changes[0].units.items()} == {0: 32, 2: 16}
    assert changes[0].units[0] == whole[0].units[0]  # those that go of this layer where all lose as much
    assert Width(neurons=(0.0, 0.0, 0.0, 0.0)).plan(subject, {}) == []
    both = Width(score="flap", share=0.3, neurons=(0.0,) * 4).plan(
        subject, {"calibration": Calibration(tuple(toys.pair(subject)))}
    )
    assert {change.of if hasattr(change, "of") else change.kind for change in both} >= {"neurons"}
    assert Width(neurons=(0.0, 0.0, 0.0, 0.0)).asks() == ()
    assert Width(neurons=(0.0, 0.5, 0.0, 0.0)).asks() == ("calibration",)
