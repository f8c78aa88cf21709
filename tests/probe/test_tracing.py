"""trace(): the same logits, the right rows, the right masses, nothing left behind."""

import threading

import pytest
import torch

from probe import Ablate, Example, Knockout, Lens, Mass, Patch, Patterns, Residual, Rows, load, sweep, trace
from probe.errors import EditError, ExampleError
from probe.tracing import last_logits
from tests import toys
from tests.oracles.attention import eager_logits_with_mask, eager_patterns, logits_with_whole_mask

SIDES = ("left", "right")
CASES = [(family, side) for family in toys.PLAIN for side in SIDES]


def test_every_family_is_covered_on_both_sides():
    assert len(CASES) == 12
    assert len({family for family, _ in CASES}) == 6


@pytest.mark.parametrize(("family", "side"), CASES)
def test_rows_and_masses_equal_eager_attention(toy, pair, family, side):
    subject = toy(family)
    encoded = subject.encode(pair, side)
    assert any("pad" in m.segments for m in encoded.maps) or family in ("llava_next", "llava_onevision")
    found = trace(subject, encoded, [Mass(rows=("question", "last")), Rows("question"), Patterns(layers=[1], heads=[0, 2])])
    eager = eager_patterns(subject, encoded)
    for layer, pattern in enumerate(eager):
        for i, token_map in enumerate(encoded.maps):
            question = token_map.positions("question")
            rows = pattern[i][:, question]
            got = found["rows"].at(layer=layer, batch=i)[:, : len(question)]
            torch.testing.assert_close(got, rows, atol=1e-5, rtol=0)
            for group in found["mass"].labels["column_group"]:
                expected = rows[:, :, token_map.positions(group)].sum(-1).mean(1)
                got_mass = found["mass"].at(layer=layer, batch=i, row_group="question", column_group=group)
                torch.testing.assert_close(got_mass, expected, atol=1e-5, rtol=0)
            entropy = torch.special.entr(rows).sum(-1).mean(1)
            torch.testing.assert_close(
                found["entropy"].at(layer=layer, batch=i, row_group="question"), entropy, atol=1e-4, rtol=0
            )
            sink = rows[:, :, token_map.first].mean(1)
            torch.testing.assert_close(found["sink"].at(layer=layer, batch=i, row_group="question"), sink, atol=1e-5, rtol=0)
    real = encoded.inputs["attention_mask"].bool()
    full = found["patterns"].at(layer=1)
    for i in range(2):
        torch.testing.assert_close(full[i][:, real[i]], eager[1][i][[0, 2]][:, real[i]], atol=1e-5, rtol=0)


@pytest.mark.parametrize(("family", "side"), CASES)
def test_masses_sum_to_one_and_logits_are_bitwise_the_plain_ones(toy, pair, family, side):
    subject = toy(family)
    encoded = subject.encode(pair, side)
    found = trace(subject, encoded, [Mass(), Rows(), Lens(), Residual()])
    torch.testing.assert_close(
        found["mass"].tensor.sum(-1), torch.ones(()).expand(found["mass"].tensor.shape[:-1]), atol=1e-5, rtol=0
    )
    assert torch.equal(found.logits, last_logits(subject, encoded))
    with torch.no_grad():
        plain = subject.model(**encoded.inputs, use_cache=False).logits[torch.arange(2), encoded.last]
    torch.testing.assert_close(found.logits, plain, atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", toys.PLAIN)
def test_a_padded_batch_equals_batches_of_one(toy, pair, family):
    subject = toy(family)
    together = trace(subject, pair, [Mass(), Residual("resid_post", positions="question", reduce="mean")])
    for i, example in enumerate(pair):
        alone = trace(
            subject,
            example,
            [
                Mass(columns=together["mass"].labels["column_group"]),
                Residual("resid_post", positions="question", reduce="mean"),
            ],
        )
        torch.testing.assert_close(together.logits[i], alone.logits[0], atol=1e-5, rtol=0)
        torch.testing.assert_close(together["mass"].tensor[:, i], alone["mass"].tensor[:, 0], atol=1e-5, rtol=0)
        torch.testing.assert_close(together["states"].tensor[:, i], alone["states"].tensor[:, 0], atol=1e-5, rtol=0)


CUT_FAMILIES = ("llava", "qwen2_vl", "gemma3")


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("family", CUT_FAMILIES)
def test_image_to_last_cut_in_all_layers_equals_one_whole_mask(toy, pair, family, side):
    assert len(CUT_FAMILIES) == 3
    subject = toy(family)
    encoded = subject.encode(pair, side)
    cut = torch.zeros(2, *(encoded.inputs["input_ids"].shape[1],) * 2, dtype=torch.bool)
    for i, token_map in enumerate(encoded.maps):
        cut[i, token_map.positions("last")[0], token_map.positions("image")] = True
    assert cut.any((1, 2)).all()
    clean = last_logits(subject, encoded)
    found = trace(subject, encoded, edit=[Knockout("last", "image")]).logits
    torch.testing.assert_close(found, logits_with_whole_mask(subject, encoded, cut), atol=1e-5, rtol=0)
    torch.testing.assert_close(clean, logits_with_whole_mask(subject, encoded, torch.zeros_like(cut)), atol=1e-5, rtol=0)
    assert (found - clean).abs().max() > 1e-4  # the cut is felt: equal masks would show nothing


@pytest.mark.parametrize(("family", "side"), CASES)
def test_a_knockout_equals_an_edited_mask(toy, pair, family, side):
    subject = toy(family)
    encoded = subject.encode(pair, side)
    edit = Knockout("question", "image", [1, 2])
    size = len(encoded.maps[0])
    edges = torch.zeros(2, 1, size, size, dtype=torch.bool)
    for i, token_map in enumerate(encoded.maps):
        rows, columns = token_map.positions("question"), token_map.positions("image")
        edges[i, 0, rows[:, None], columns] = True
    expected = eager_logits_with_mask(subject, encoded, {1: edges, 2: edges})
    found = trace(subject, encoded, [Rows("question")], [edit])
    torch.testing.assert_close(found.logits, expected, atol=1e-5, rtol=0)
    assert (found.logits - last_logits(subject, encoded)).abs().max() > 1e-3
    for layer, cut in ((0, False), (1, True), (2, True), (3, False)):
        for i, token_map in enumerate(encoded.maps):
            question = token_map.positions("question")
            seen = found["rows"].at(layer=layer, batch=i)[:, : len(question)][..., token_map.positions("image")]
            assert bool((seen == 0).all()) is cut


def test_an_empty_knockout_changes_nothing(toy, pair):
    subject = toy("llava")
    encoded = subject.encode(pair)
    changed = trace(subject, encoded, edit=[Knockout("question", [])]).logits
    torch.testing.assert_close(changed, last_logits(subject, encoded), atol=1e-5, rtol=0)


def test_a_row_that_may_look_nowhere_reads_zero(toy):
    subject = toy("llava")
    encoded = subject.encode(Example("a", "is there a dog ?", (toys.picture(),)))
    found = trace(
        subject, encoded, [Rows("last"), Residual("z", layers=[0], positions="last")], [Knockout("last", "real", [0])]
    )
    assert found["rows"].at(layer=0).abs().sum() == 0
    assert found["states"].tensor.abs().sum() == 0
    assert torch.isfinite(found.logits).all()


def test_a_group_that_is_empty_cuts_and_records_nothing(toy, pair):
    subject = toy("llava")
    encoded = subject.encode(pair)
    found = trace(subject, encoded, [Rows("options")], [Knockout("options", "image"), Knockout([], "image")])
    assert torch.equal(found.logits, last_logits(subject, encoded))
    assert found["rows"].tensor.shape[3] == 0


def test_heads_can_be_cut_one_by_one(toy):
    subject = toy("llava")
    encoded = subject.encode(Example("a", "is there a dog ?", (toys.picture(),)))
    found = trace(subject, encoded, [Rows("last")], [Knockout("last", "image", [0], heads=[1, 3])])
    mass = found["rows"].at(layer=0, batch=0)[:, 0][:, encoded.maps[0].positions("image")].sum(-1)
    assert mass[[1, 3]].tolist() == [0.0, 0.0]
    assert (mass[[0, 2]] > 0).all()


def test_lens_at_the_last_layer_is_the_models_output(toy, pair):
    for family in toys.PLAIN:
        subject = toy(family)
        found = trace(subject, pair, [Lens(top=3, track=((5, 6), (7, 8)))])
        logits, ids = found["lens_logit"].tensor[-1, :, 0], torch.tensor([[5, 6], [7, 8]])
        torch.testing.assert_close(logits, found.logits.gather(1, ids), atol=1e-5, rtol=0)
        probs = found.logits.softmax(-1)
        torch.testing.assert_close(found["lens_prob"].tensor[-1, :, 0], probs.gather(1, ids), atol=1e-6, rtol=0)
        assert found["lens_top_ids"].tensor[-1, :, 0, 0].tolist() == found.logits.argmax(-1).tolist()
        ranks = (found.logits[:, None] > logits[:, :, None]).sum(-1)
        assert found["lens_rank"].tensor[-1, :, 0].tolist() == ranks.tolist()


def test_the_raw_lens_is_not_the_normed_one(toy, pair):
    subject = toy("llava")
    raw, normed = (trace(subject, pair, [Lens(norm=norm)])["lens_top_probs"].tensor for norm in ("none", "final"))
    assert (raw - normed).abs().max() > 1e-3


def test_residual_points_add_up(toy, pair):
    for family in toys.PLAIN:
        subject = toy(family)
        points = ("resid_pre", "attn_out", "mlp_out", "resid_post")
        found = trace(subject, pair, [Residual(point) for point in points])
        pre, attention, mlp, post = (found[name].tensor for name in ("states", "states.1", "states.2", "states.3"))
        torch.testing.assert_close(pre + attention + mlp, post, atol=1e-5, rtol=1e-5)


def test_deepstack_enters_between_the_layers(toy, pair):
    found = trace(toy("qwen3_vl"), pair, [Residual("resid_pre", positions="image"), Residual("resid_post", positions="image")])
    pre, post = found["states"].tensor, found["states.1"].tensor
    gaps = [(pre[layer + 1] - post[layer]).abs().max().item() for layer in range(3)]
    assert gaps[0] > 1e-3
    assert gaps[1] > 1e-3
    assert gaps[2] == 0


def test_patching_a_state_with_itself_changes_nothing_and_with_another_carries_it_over(toy, pair):
    subject = toy("llava")
    a, b = (subject.encode(example) for example in pair)
    states = trace(subject, a, [Residual("resid_post", layers=[3], positions="last")])["states"].tensor[0, 0]
    same = trace(subject, a, edit=[Patch("resid_post", 3, "last", states)]).logits
    assert torch.equal(same, last_logits(subject, a))
    carried = trace(subject, b, edit=[Patch("resid_post", 3, "last", states)]).logits
    torch.testing.assert_close(carried, last_logits(subject, a), atol=1e-5, rtol=0)


def test_ablations_do_what_they_say(toy, pair):
    subject = toy("llava")
    encoded = subject.encode(pair)
    record = Residual("mlp_out", layers=[1], positions="question")
    clean = trace(subject, encoded, [record])["states"].tensor[0]
    zero = trace(subject, encoded, [record], [Ablate("mlp_out", 1, "question")])["states"].tensor[0]
    assert zero.abs().sum() == 0
    mean = trace(subject, encoded, [record], [Ablate("mlp_out", 1, "question", how="mean")])["states"].tensor[0]
    count = len(encoded.maps[0].positions("question"))
    torch.testing.assert_close(mean[0, :count], clean[0, :count].mean(0).expand(count, -1), atol=1e-6, rtol=0)
    noisy = [
        trace(subject, encoded, [record], [Ablate("mlp_out", 1, "question", how="noise", seed=s)])["states"].tensor[0]
        for s in (0, 0, 1)
    ]
    assert torch.equal(noisy[0], noisy[1])
    assert not torch.equal(noisy[0], noisy[2])
    spread = (noisy[0][0, :count] - clean[0, :count]).std() / clean[0, :count].std()
    assert 2.0 < spread < 4.0
    heads = trace(subject, encoded, [Residual("z", layers=[1], positions="question")], [Ablate("z", 1, "question", heads=[2])])[
        "states"
    ].tensor[0]
    assert heads[:, :, 2].abs().sum() == 0
    assert heads[:, :, 1].abs().sum() > 0


def test_the_model_is_as_it_was_after_traces_sweeps_and_errors(toy, pair):
    subject = toy("llava")
    before = _state(subject)
    trace(subject, pair, [Mass(), Rows(), Lens(), Residual()], [Knockout("last", "image"), Ablate("mlp_out", 1)])
    assert _state(subject) == before
    with pytest.raises(EditError):
        trace(subject, pair, [Mass()], [Patch("resid_post", 1, "last", torch.zeros(3, 3))])
    with pytest.raises(RuntimeError, match="stop here"):
        _broken(subject, pair)
    assert _state(subject) == before
    sweep(subject, pair, [Knockout("last", "image")])
    assert _state(subject) == before
    sweep(subject, pair, [Knockout("last", "image"), Ablate("mlp_out", 1)], "naive")
    assert _state(subject) == before
    for method in ("replay", "naive"):
        with pytest.raises(RuntimeError, match="stop here"):
            _broken(subject, pair, lambda method=method: sweep(subject, pair, [Knockout("last", "image")], method))
        assert _state(subject) == before


def test_hooks_of_the_caller_stay_and_fire(toy, pair):
    """Somebody else's hooks run as often as the passes that were asked for, during and after, and none is taken off."""
    subject = toy("llava")
    fired = []
    handles = [
        subject.layers[1].register_forward_hook(lambda *a: fired.append("after")),
        subject.layers[1].register_forward_pre_hook(lambda *a: fired.append("before")),
    ]
    try:
        trace(subject, pair, [Mass(), Rows()], [Knockout("last", "image")])
        assert fired == ["before", "after"]
        sweep(subject, pair, [Knockout("last", "image")], "naive")
        subject.generate(subject.encode(pair), 2)
        passes = len(fired)
        assert passes >= 2 * 4
        last_logits(subject, subject.encode(pair))
        assert fired[passes:] == ["before", "after"]
    finally:
        for handle in handles:
            handle.remove()


def _broken(subject, pair, run=None):
    def stop(module, args, output):
        raise RuntimeError("stop here")

    handle = subject.layers[2].register_forward_hook(stop)
    try:
        (run or (lambda: trace(subject, pair, [Mass()], [Knockout("last", "image")])))()
    finally:
        handle.remove()


def _state(subject):
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in subject.model.modules())
    kernels = [
        m.config._attn_implementation
        for m in subject.model.modules()
        if hasattr(m, "config") and hasattr(m.config, "_attn_implementation")
    ]
    weights = sum(float(p.detach().double().sum()) for p in subject.model.parameters())
    return hooks, kernels, weights, [p.requires_grad for p in subject.model.parameters()]


def test_two_subjects_in_two_threads_do_not_see_each_other(pair):
    subjects = [load(toys.build("llava", seed)) for seed in (0, 1)]
    expected = [trace(s, pair, [Mass()]) for s in subjects]
    found: list[list] = [[], []]

    def work(i):
        for _ in range(5):
            found[i].append(trace(subjects[i], pair, [Mass()], [Knockout("last", "image", [0])] if i else []))

    threads = [threading.Thread(target=work, args=(i,)) for i in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [len(f) for f in found] == [5, 5]
    for one in found[0]:
        assert torch.equal(one.logits, expected[0].logits)
        torch.testing.assert_close(one["mass"].tensor, expected[0]["mass"].tensor)
    assert all(not torch.equal(one.logits, expected[1].logits) for one in found[1])


def test_bf16_keeps_the_plain_logits_and_the_masses_sum_to_one(pair):
    model, processor = toys.build("llava")
    subject = load((model.to(torch.bfloat16), processor))
    encoded = subject.encode(pair)
    found = trace(subject, encoded, [Mass()])
    assert torch.equal(found.logits, last_logits(subject, encoded))
    torch.testing.assert_close(found["mass"].tensor.sum(-1), torch.ones(4, 2, 4, 2), atol=1e-4, rtol=0)
    full = load(toys.build("llava"))
    torch.testing.assert_close(found["mass"].tensor, trace(full, pair, [Mass()])["mass"].tensor, atol=0.05, rtol=0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_gives_the_cpus_masses(pair):
    model, processor = toys.build("llava")
    expected = trace(load((model, processor)), pair, [Mass()], [Knockout("last", "image", [1])])
    found = trace(load((model.cuda(), processor)), pair, [Mass()], [Knockout("last", "image", [1])])
    torch.testing.assert_close(found["mass"].tensor, expected["mass"].tensor, atol=1e-3, rtol=0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Mass(layers=[9]), "layer 9 does not exist: the model has layers 0 to 3"),
        (lambda: Rows(heads=[4]), "head 4 does not exist: the model has heads 0 to 3"),
        (lambda: Mass(rows=("qestion",)), "there is no token group 'qestion' (did you mean 'question'?)"),
        (lambda: Residual("resid_pst"), "there is no point 'resid_pst' (did you mean 'resid_post'?)"),
        (lambda: Lens(norm="first"), "the lens takes the final norm or none, not 'first'"),
    ],
)
def test_what_a_recorder_cannot_record_is_refused_in_one_sentence(toy, pair, make, message):
    with pytest.raises(ValueError, match=r"^" + message.replace("(", r"\(").replace(")", r"\)").replace("?", r"\?")):
        trace(toy("llava"), pair, [make()])


def test_a_batch_with_and_without_pictures_is_refused(toy, pair):
    with pytest.raises(ExampleError, match="encode them apart"):
        toy("llava").encode([pair[0], pair[1].without_media()])
