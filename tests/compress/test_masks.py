"""Attention masks: exactly the pairs that each method says, on every family, in batches and from the cache."""

from contextlib import contextmanager

import pytest
import torch

from compress import saving
from compress.budget import Budget
from compress.cost import cost
from compress.layer_cost import Convention
from compress.passes.layers import RemoveLayers
from compress.passes.masks import Masks
from compress.passes.skips import Composite
from compress.passes.tokens import Tokens
from compress.recipe import compress
from compress.tokens.pairs import MASKS
from compress.tokens.spans import Reader
from probe import Example, Knockout, Mass, load, sweep, trace
from probe.errors import PassError
from probe.generation import trace_generation
from probe.media import Clip
from probe.tracing import last_logits
from tests import toys
from tests.oracles import masks as oracle

FAMILIES = (
    "llava", "llava_pixtral", "llava_next", "llava_onevision", "video_llava", "llava_next_video", "mistral3", "qwen2_vl", "qwen2_5_vl",
    "qwen3_vl", "qwen3_vl_moe", "qwen2_5_omni", "qwen2_audio", "internvl", "gemma3", "gemma4", "idefics3", "smolvlm", "paligemma",
)  # fmt: skip
BOTH = ("llava", "qwen3_vl", "idefics3")  # families whose batches are padded on the right as well
NOTHING_NEW = {("gemma3", "croc"), ("paligemma", "aki"), ("paligemma", "croc")}
LAYER = 2


@contextmanager
def masked(subject, *passes):
    smaller = compress(subject, list(passes), in_place=True)  # what hangs on the toy comes off again
    try:
        yield smaller
    finally:
        smaller.detach()


def entering(subject, encoded, layer=LAYER):
    """What a layer is called with: its states, and everything else by name."""
    found = []
    handle = subject.layers[layer].register_forward_pre_hook(
        lambda _, args, kwargs: found.append((args, kwargs)), with_kwargs=True
    )
    try:
        last_logits(subject, encoded)
    finally:
        handle.remove()
    args, kwargs = found[0]
    return (args[0] if args else kwargs["hidden_states"]), {k: v for k, v in kwargs.items() if k != "hidden_states"}


def specials(subject):
    return {i for i, token in subject.tokenizer.added_tokens_decoder.items() if token.special}


def as_pairs(mask, row, n):
    """Row `row` of a layer's mask as booleans (query key)."""
    if mask is None:
        return torch.ones(n, n, dtype=torch.bool).tril()
    one = mask[min(row, len(mask) - 1), 0]
    return one if one.dtype == torch.bool else one > torch.finfo(one.dtype).min / 2


seen_cases = []


@pytest.mark.parametrize(
    ("family", "side"), [*((family, "left") for family in FAMILIES), *((family, "right") for family in BOTH)]
)
def test_exactly_the_pairs_that_the_method_says(toy, family, side):
    subject = toy(family)
    encoded = subject.encode(toys.pair(subject), side)
    n, plain = len(encoded.maps[0]), entering(subject, encoded)[1].get("attention_mask")
    for method in MASKS:
        if (family, method) in NOTHING_NEW:
            with pytest.raises(PassError, match="already"):
                compress(subject, [Masks(method=method)], in_place=True)
            continue
        with masked(subject, Masks(method=method, layers=(LAYER,))) as smaller:
            there = entering(smaller, encoded)[1]["attention_mask"]
        for row, token_map in enumerate(encoded.maps):
            before, got = as_pairs(plain, row, n), as_pairs(there, row, n)
            want = oracle.allowed(method, token_map, family, specials(subject), before)
            real = torch.tensor([segment != "pad" for segment in token_map.segments])
            assert torch.equal(got[real][:, real], want[real][:, real])
            assert not torch.equal(got[real], before[real])
            assert not got[real][:, ~real].any()
            assert got[real].any(1).all()
            seen_cases.append((family, side, method, row))


def test_how_many_were_compared():
    assert len(seen_cases) == 2 * (len(MASKS) * (len(FAMILIES) + len(BOTH)) - len(NOTHING_NEW))


@pytest.mark.parametrize("method", MASKS)
def test_a_row_moves_with_the_keys_that_it_may_see_and_with_no_other(toy, method):
    """One hot: each position's state is changed by itself at the input of one layer; which rows of its output move?"""
    subject = toy("qwen2_vl")
    encoded = subject.encode(Example("a", toys.WORDS[0][0], (toys.picture(),), suffix="one"))
    n = len(encoded.maps[0])
    want = oracle.allowed(method, encoded.maps[0], "qwen2_vl", specials(subject), as_pairs(None, 0, n))
    with masked(subject, Masks(method=method, layers=(LAYER,))) as smaller:
        state, options = entering(smaller, encoded)
    options = {k: v for k, v in options.items() if k not in ("past_key_values", "use_cache")}
    options["attention_mask"] = options["attention_mask"].expand(n, -1, -1, -1)
    probes = state.repeat(n, 1, 1)
    probes[range(n), range(n)] += torch.linspace(-3, 3, state.shape[-1])
    with torch.no_grad():
        clean, moved = (
            run[0] if isinstance(run, tuple) else run
            for run in (subject.layers[LAYER](x, **options) for x in (state.repeat(n, 1, 1), probes))
        )
    got = ((moved - clean).abs().amax(-1) > 1e-6).T  # query key
    assert torch.equal(got, want)
    assert got.diagonal().all()
    above = torch.triu(got, 1).sum()
    assert (above > 0) == (method in ("aki", "croc"))
    text = encoded.maps[0].positions("text")
    assert not torch.triu(got, 1)[text].any()  # no row of words sees what comes later, whatever the method


def test_hand_sized_pairs():
    """Two words, a picture of two, two words, the header, one written word; and a second picture."""
    from compress.tokens.spans import Spans

    t, f = True, False
    spans = Spans(
        torch.tensor([[t] * 7]), torch.tensor([[-1, 0, 0, -1, -1, -1, -1]]), torch.tensor([[t, f, f, t, t, t, t]]),
        torch.tensor([[0, 5, 5, 0, 0, 0, 0]]), torch.tensor([[t, t, t, t, t, t, f]]),
    )  # fmt: skip
    found = {name: mask.pairs(spans) for name, mask in MASKS.items()}
    assert torch.nonzero(found["aki"].opened[0]).tolist() == [[1, 3], [1, 4], [2, 3], [2, 4]]
    assert torch.nonzero(found["naavit"].closed[0]).tolist() == [[1, 2], [2, 1]]
    assert torch.nonzero(found["croc"].opened[0]).tolist() == [[1, 1], [1, 2], [2, 1], [2, 2]]
    shut = found["unimodal"].closed[0]
    assert [torch.nonzero(row)[:, 0].tolist() for row in shut] == [
        [1, 2],
        [0, 3, 4, 5, 6],
        [0, 3, 4, 5, 6],
        [1, 2],
        [1, 2],
        [1, 2],
        [],
    ]
    real = spans.real
    assert [found[name].count(real) for name in MASKS] == [28 + 4, 28 - 1, 28 + 1, 28 - 8]


WRITING = [("llava", m) for m in MASKS] + [
    ("qwen3_vl", "unimodal"),
    ("gemma3", "aki"),
    ("internvl", "croc"),
    ("qwen2_audio", "aki"),
]


@pytest.mark.parametrize(("family", "method"), WRITING)
def test_what_is_written_from_the_cache_is_what_full_passes_say(toy, family, method):
    """Four tokens of a padded batch: the answer is causal, and no row of the prompt has seen it."""
    subject = toy(family)
    encoded = subject.encode(toys.pair(subject))
    with masked(subject, Masks(method=method)) as smaller:
        with subject.lock, torch.no_grad():
            made = subject.model.generate(
                **encoded.inputs,
                max_new_tokens=4,
                min_new_tokens=4,
                do_sample=False,
                output_logits=True,
                return_dict_in_generate=True,
            )
        written = made.sequences[:, encoded.inputs["input_ids"].shape[1] :]
        whole = [whole_pass(smaller, encoded, written[:, :step]) for step in range(4)]
        for step, logits in enumerate(made.logits):
            torch.testing.assert_close(logits, whole[step][:, -1], atol=2e-4, rtol=1e-3)
        for step in range(3):  # the prompt's logits do not know what was written
            torch.testing.assert_close(whole[3][:, -2 - step], whole[2 - step][:, -1], atol=2e-4, rtol=1e-3)
    plain = whole_pass(subject, encoded, written[:, :3])
    assert (plain[:, -1] - made.logits[3]).abs().max() > 1e-3


def whole_pass(subject, encoded, written):
    """Logits (batch position vocabulary) of one pass over prompt and written tokens, without a cache."""
    with subject.lock, torch.no_grad():
        return subject.model(**toys.extended(encoded, written), use_cache=False).logits.float()


@pytest.mark.parametrize("side", ["left", "right"])
def test_batches_and_padding_change_nothing(toy, side):
    subject = toy("llava_next")
    examples = toys.pair(subject)
    for method in MASKS:
        with masked(subject, Masks(method=method)) as smaller:
            apart = torch.cat([last_logits(smaller, smaller.encode(example)) for example in examples])
            together = last_logits(smaller, smaller.encode(examples[::-1], side))[[1, 0]]
        torch.testing.assert_close(together, apart, atol=1e-4, rtol=1e-4)


def test_eager_and_sdpa_say_the_same(toy):
    model, processor = toys.build("llava")
    model.set_attn_implementation("eager")
    eager, subject = load((model, processor)), toy("llava")
    encoded = subject.encode(toys.pair(subject))
    for method in MASKS:
        with masked(subject, Masks(method=method)) as one, masked(eager, Masks(method=method)) as other:
            torch.testing.assert_close(last_logits(one, encoded), last_logits(other, encoded), atol=1e-4, rtol=1e-4)


def test_several_pictures(toy):
    """Each picture sees the words that follow it up to the answer, and never the picture after it."""
    subject = toy("llava")
    two = Example("two", "<image> the cat <image> a dog ?", (toys.picture(seed=1), toys.picture(seed=2)))
    side_by_side = Example("two", "<image><image> a dog ?", (toys.picture(seed=1), toys.picture(seed=2)))
    for example in (two, side_by_side):
        encoded = subject.encode(example)
        n = len(encoded.maps[0])
        for method in MASKS:
            with masked(subject, Masks(method=method, layers=(LAYER,))) as smaller:
                got = as_pairs(entering(smaller, encoded)[1]["attention_mask"], 0, n)
            assert torch.equal(got, oracle.allowed(method, encoded.maps[0], "llava", specials(subject), as_pairs(None, 0, n)))
            first, second = encoded.maps[0].pictures
            assert not got[first][:, second].any()


@pytest.mark.parametrize("family", ["qwen2_vl", "llava_onevision", "video_llava"])
def test_clips(toy, family):
    subject = toy(family)
    frames = tuple(toys.picture(28, 28, i) for i in range(4))
    encoded = subject.encode(Example("a", "is there a dog ?", videos=(lambda: Clip(frames, (0.0, 0.5, 1.0, 1.5)),)))
    n = len(encoded.maps[0])
    for method in MASKS:
        with masked(subject, Masks(method=method, layers=(LAYER,))) as smaller:
            got = as_pairs(entering(smaller, encoded)[1]["attention_mask"], 0, n)
        assert torch.equal(got, oracle.allowed(method, encoded.maps[0], family, specials(subject), as_pairs(None, 0, n)))


def test_words_alone_are_left_as_they_are(toy):
    subject = toy("llava")
    encoded = subject.encode(toys.pair(subject, media=False))
    plain = last_logits(subject, encoded)
    for method in MASKS:
        with masked(subject, Masks(method=method)) as smaller:
            assert torch.equal(last_logits(smaller, encoded), plain)


def test_layers_by_name_and_by_range(toy):
    subject = toy("llava")
    encoded = subject.encode(toys.pair(subject))
    plain = last_logits(subject, encoded)
    said = []
    for settings in ({"layers": (1, 2)}, {"start": 1, "stop": 3}, {"stop": 3}, {"start": 1}):
        with masked(subject, Masks(method="naavit", **settings)) as smaller:
            said.append(last_logits(smaller, encoded))
    assert torch.equal(said[0], said[1])
    assert (said[2] - said[0]).abs().max() > 1e-4
    assert torch.equal(said[3], said[0])  # nobody reads what visual rows make of the last layer
    for settings in ({"layers": ()}, {"stop": 0}, {"start": 4}):
        smaller = compress(subject, [Masks(method="naavit", **settings)], in_place=True)
        assert smaller.ledger == ()
        assert torch.equal(last_logits(smaller, encoded), plain)


@pytest.mark.parametrize("method", MASKS)
def test_tokens_that_are_removed_under_a_mask_are_those_that_are_hidden(toy, method):
    subject = toy("qwen2_5_vl")
    encoded = subject.encode(toys.pair(subject))
    said = {}
    for simulated in (False, True):
        reducers = [
            Tokens(method="uniform", budget=Budget(keep=0.8), simulated=simulated, positions="preserve"),
            Tokens(method="fastv", budget=Budget(keep=0.5), layer=2, simulated=simulated),
        ]
        with masked(subject, Masks(method=method), *reducers) as smaller:
            said[simulated] = last_logits(smaller, encoded)
            assert smaller.runtime is not None
    with masked(subject, *reducers) as smaller:
        plain = last_logits(smaller, encoded)
    torch.testing.assert_close(said[False], said[True], atol=1e-4, rtol=1e-4)
    assert (said[True] - plain).abs().max() > 1e-4


@pytest.mark.parametrize("method", MASKS)
def test_rows_that_skip_a_layer_under_a_mask_are_those_that_are_taken_out_again(toy, method):
    subject = toy("qwen2_5_vl")
    encoded = subject.encode(toys.pair(subject))
    skips = [Composite(layers=(1, 2), simulated=simulated) for simulated in (False, True)]
    said = []
    for one in skips:
        with masked(subject, one, Masks(method=method)) as smaller:
            said.append(last_logits(smaller, encoded))
    with masked(subject, skips[0]) as smaller:
        plain = last_logits(smaller, encoded)
    torch.testing.assert_close(said[0], said[1], atol=1e-4, rtol=1e-4)
    assert (said[0] - plain).abs().max() > 1e-4


def test_a_static_cache_is_refused_and_the_model_goes_on(toy):
    subject = toy("llava")
    encoded = subject.encode(toys.pair(subject))
    with masked(subject, Masks(method="aki")) as smaller:
        before = last_logits(smaller, encoded)
        with subject.lock, torch.no_grad(), pytest.raises(PassError, match="a static cache brings a mask of its own"):
            subject.model.generate(**encoded.inputs, max_new_tokens=2, cache_implementation="static")
        assert torch.equal(last_logits(smaller, encoded), before)


def test_masks_are_traced_like_any_model(toy):
    """No attention goes where a mask has closed it, in a trace and in a generation."""
    subject = toy("llava")
    encoded = subject.encode(toys.pair(subject))
    with masked(subject, Masks(method="unimodal", stop=2)) as smaller:
        mass = trace(smaller, encoded, [Mass(rows=("question",), columns=("media",))])["mass"].tensor
        later = trace_generation(smaller, encoded, [Mass(rows=("last",), columns=("media",))], max_new_tokens=2)
    assert (mass[:2] == 0).all()
    assert (mass[2:] > 0).all()
    written, prompt = later["mass"].at(step=1), later["mass"].at(step=0)
    assert (prompt[:2] == 0).all()
    assert (written > 0).all()  # what is written reads a cache that holds everything


def test_a_masked_model_is_replayed_exactly_where_it_is_causal(toy):
    subject = toy("llava")
    encoded = subject.encode(toys.pair(subject))
    entries = [Knockout("question", "image", [1]), Knockout("last", "question", [2])]
    for method in ("naavit", "unimodal"):
        with masked(subject, Masks(method=method, stop=2)) as smaller:
            fast, slow = (sweep(smaller, encoded, entries, method=how) for how in ("replay", "naive"))
        for one, other in zip(fast.edited, slow.edited, strict=True):
            torch.testing.assert_close(one, other, atol=1e-5, rtol=0)


def test_a_saved_mask_says_the_same(toy, tmp_path):
    smaller = compress(toy("llava"), [RemoveLayers(layers=(0,)), Masks(method="aki", stop=1), Masks(method="naavit", start=1)])
    encoded = smaller.encode(toys.pair(smaller))
    saving.save(smaller, tmp_path / "m")
    again = saving.load(tmp_path / "m", device="cpu", check=False)
    assert (len(again.ledger), len(again.attached)) == (3, 2)
    torch.testing.assert_close(last_logits(again, encoded), last_logits(smaller, encoded), atol=1e-5, rtol=1e-5)
    assert again.generate(encoded, 4) == smaller.generate(encoded, 4)
    assert saving.loads_in_transformers(smaller) == "yes, without mask"


def test_what_a_mask_saves_in_theory_and_not_in_kernels(toy):
    """Pairs, one by one by the oracle; under a dense kernel every pair is computed all the same."""
    subject = toy("llava")
    encoded = subject.encode(toys.pair(subject)[0])
    n = len(encoded.maps[0])
    causal, plain = cost(subject, encoded, Convention(attention="causal")), cost(subject, encoded)
    for method in MASKS:
        want = oracle.pairs_left(oracle.allowed(method, encoded.maps[0], "llava", specials(subject), as_pairs(None, 0, n)))
        with masked(subject, Masks(method=method, layers=(1,))) as smaller:
            found = cost(smaller, encoded, Convention(attention="causal"))
            assert [one.pairs for one in found.ran] == [None, want, None, None]
            assert cost(smaller, encoded).total_macs == plain.total_macs
            assert found.kv_bytes == causal.kv_bytes
            assert found.decode == causal.decode
        width = subject.config.get_text_config().hidden_size
        assert found.total_macs - causal.total_macs == pytest.approx((want - n * (n + 1) / 2) * 2 * width)


@pytest.mark.parametrize(
    ("family", "settings", "message"),
    [
        ("mllama", {"method": "naavit"}, "are not in the sequence"),
        ("blip2", {"method": "naavit"}, "without placeholders"),
        ("llama", {"method": "naavit"}, "is shown nothing"),
        ("qwen3_5", {"method": "naavit"}, "mixes positions without attention"),
        ("voxtral", {"method": "aki"}, "marks where the answer begins"),
        ("llava", {"method": "aki", "layers": (4,)}, "layer 4 does not exist"),
        ("llava", {"method": "aki", "start": 3, "stop": 2}, "not from 3 to before 2"),
        ("llava", {"method": "aki", "layers": (1,), "stop": 2}, "not both"),
    ],
)
def test_what_cannot_have_a_mask_says_why(toy, family, settings, message):
    subject = load(toys.build(family)) if family == "llama" else toy(family)
    with pytest.raises(PassError, match=message):
        compress(subject, [Masks(**settings)], in_place=True)


def test_a_layer_has_one_mask(toy):
    with pytest.raises(PassError, match="layer 1 has a mask already"):
        compress(toy("llava"), [Masks(method="aki", stop=2), Masks(method="croc", start=1)], in_place=True)


def test_calls_that_a_mask_cannot_follow(toy, monkeypatch):
    subject = toy("llava")
    encoded = subject.encode(toys.pair(subject))
    with masked(subject, Masks(method="aki")) as smaller, torch.no_grad():
        ids = encoded.inputs["input_ids"]
        with pytest.raises(PassError, match="call the model with input_ids"):
            smaller.model(inputs_embeds=smaller.embedding(ids))
        with pytest.raises(PassError, match="cannot be combined with one that the caller brings"):
            smaller.model(**{**encoded.inputs, "attention_mask": torch.ones(2, 1, ids.shape[1], ids.shape[1])})
        cut = {key: value[:, :-1] if key in ("input_ids", "attention_mask") else value for key, value in encoded.inputs.items()}
        with pytest.raises(PassError, match="a prompt has no 'ASSISTANT:' after its picture"):
            smaller.model(**cut)
        cache = smaller.model(input_ids=ids[:, :4], use_cache=True).past_key_values
        with pytest.raises(PassError, match="wants a prompt in one piece"):
            smaller.model(input_ids=ids[:, 4:], pixel_values=encoded.inputs["pixel_values"], past_key_values=cache)
    monkeypatch.setattr(subject.decoder.config, "_attn_implementation_internal", "flash_attention_2")
    with pytest.raises(PassError, match="flash_attention_2 attention takes no mask"):
        compress(subject, [Masks(method="aki")], in_place=True)


def test_detached_without_a_trace(toy):
    subject = toy("llava")
    encoded = subject.encode(toys.pair(subject))
    plain = last_logits(subject, encoded)
    with masked(subject, Masks(method="croc")) as smaller:
        assert (last_logits(smaller, encoded) - plain).abs().max() > 1e-4
    assert torch.equal(last_logits(subject, encoded), plain)


@pytest.mark.parametrize("family", ["llava", "internvl"])
def test_in_a_conversation_each_picture_is_asked_about_in_its_own_turn(toy, family):
    """Two prompts with an answer between them in one line: a block's question ends at the first answer that opens after it."""
    subject = toy(family)
    maps = [subject.encode(example).maps[0] for example in toys.pair(subject)]
    said = subject.tokenizer.encode("two red", add_special_tokens=False)
    ids = torch.tensor([[*maps[0].tokens, *said, *maps[1].tokens, *said]])
    start = len(maps[0]) + len(said)
    opens = [int(maps[0].positions("header")[0]), start + int(maps[1].positions("header")[0])]
    spans = Reader(subject).read(ids, torch.ones_like(ids, dtype=torch.bool), {})
    places = [maps[0].positions("image"), start + maps[1].positions("image")]
    for number, (at, until) in enumerate(zip(places, opens, strict=True)):
        assert (spans.block[0, at] == number).all()
        assert (spans.until[0, at] == until).all()
    end = opens[1] + len(maps[1].positions("header"))
    assert spans.prompt[0].tolist() == [i < end for i in range(ids.shape[1])]
    opened = MASKS["aki"].pairs(spans).opened[0]
    asked = [set(torch.nonzero(opened[at[-1]])[:, 0].tolist()) for at in places]
    questions = [set(maps[0].positions("question").tolist()), {start + int(i) for i in maps[1].positions("question")}]
    for number in (0, 1):
        assert questions[number] <= asked[number]
        assert not asked[number] & questions[1 - number]
        assert max(asked[number]) < opens[number]
