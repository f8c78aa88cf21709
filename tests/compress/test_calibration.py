"""The sequential loop: layers run by themselves are the model, and what is summed is what enters their maps."""

import copy
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

from compress.calibration import Calibration, _crowded, counted, sequential
from compress.passes.base import brief
from compress.statistics import Gram, Moments, Squares
from probe.calibration import linear_maps
from probe.errors import PassError
from probe.example import Example
from tests import toys

FAMILIES = [name for name in toys.FAMILIES if name != "mllama"]
SOME = ("qwen3_vl", "gemma3", "blip2")
RAN: list[str] = []


def plain(model, subject, batches):
    """What enters every layer, and leaves the last, of every batch: an ordinary pass; slow and obvious."""
    found = [[] for _ in batches]
    norm = model.get_submodule(subject.anatomy.final_norm)
    for one, states in zip(batches, found, strict=True):
        take = partial(_take, states)
        watched = [*model.get_submodule(subject.anatomy.layers), norm]
        hooks = [module.register_forward_pre_hook(take, with_kwargs=True) for module in watched]
        with torch.no_grad():
            model(**one.inputs, use_cache=False)
        for hook in hooks:
            hook.remove()
    return found


def _take(states, module, args, kwargs):
    states.append((args[0] if args else kwargs["hidden_states"]).clone())


def watched(subject, batches, visit=lambda index, layer, maps: None, **how):
    found = [[] for _ in batches]
    sequential(subject, batches, visit, watch=lambda index, number, state: found[number].append(state.clone()), **how)
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_a_visit_that_changes_nothing_is_a_plain_pass(toy, family):
    subject = toy(family)
    batches = Calibration(tuple(toys.questions(subject)), batch=2).encoded(subject)
    for want, got in zip(plain(subject.model, subject, batches), watched(subject, batches), strict=True):
        assert len(want) == subject.n_layers + 1
        for a, b in zip(want[1:], got, strict=True):
            assert torch.equal(a, b)
    RAN.append(family)


def test_every_family_but_one_was_run(toy):
    assert len(RAN) == len(toys.FAMILIES) - 1 == 24
    with pytest.raises(PassError, match=r"layer 1 of this .* reads the picture through cross-attention"):
        sequential(toy("mllama"), [toy("mllama").encode(toys.pair(toy("mllama")))], lambda i, layer, maps: None)


def halve(index, layer, maps):
    for module in layer.modules():
        if isinstance(module, nn.Linear):
            module.weight.data[:, ::2] = 0


@pytest.mark.parametrize("family", SOME)
@pytest.mark.parametrize("dense", [False, True])
def test_the_next_layer_sees_what_the_changed_one_gives(toy, family, dense):
    subject = toy(family)
    batches = [subject.encode(toys.pair(subject))]
    before = copy.deepcopy(subject.model.state_dict())
    got = watched(subject, batches, halve, dense=dense)
    assert all(torch.equal(a, b) for a, b in zip(before.values(), subject.model.state_dict().values(), strict=True))
    changed = copy.deepcopy(subject.model)
    for layer in changed.get_submodule(subject.anatomy.layers):
        halve(0, layer, {})
    want = plain(subject.model if dense else changed, subject, batches)
    for a, b in zip(want[0][1:], got[0], strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    assert not torch.equal(want[0][-1], plain(changed if dense else subject.model, subject, batches)[0][-1])


@pytest.mark.parametrize("family", ["llava", "blip2"])
@pytest.mark.parametrize("side", ["both", "perceptual", "textual"])
def test_sums_are_over_the_tokens_that_count_and_no_padding(toy, family, side):
    subject = toy(family)
    examples = tuple(Example(**{**vars(e), "answer": a}) for e, a in zip(toys.pair(subject), ("red", "no two"), strict=True))
    batches = Calibration(examples, batch=2).encoded(subject)
    found = {}
    sequential(
        subject, batches, lambda i, layer, maps: found.update({f"{i}.{n}": m for n, m in maps.items()}), side=side, offload=True
    )
    want = {}
    for batch in batches:
        rows = counted(batch, side).numpy()
        hooks = [
            m.register_forward_pre_hook(lambda _, a, n=n: want.setdefault(n, []).append(a[0].detach()))
            for n, m in linear_maps(subject)
        ]
        with torch.no_grad():
            subject.model(**batch.inputs, use_cache=False)
        for hook in hooks:
            hook.remove()
    assert set(want) == set(found)
    for name, (entered,) in want.items():
        entered = entered.reshape(*rows.shape, -1)  # OPT's feed-forward block flattens the batch
        by_hand = sum(entered[i, j].double().square() for i, j in zip(*np.nonzero(rows), strict=True))
        torch.testing.assert_close(found[name].sums, by_hand, atol=1e-8, rtol=1e-5)
        assert found[name].n == rows.sum()
    shared = [name for name in found if name.endswith(("q_proj", "k_proj", "v_proj"))]
    assert len(shared) == 3 * subject.n_layers
    assert len({id(found[name]) for name in shared}) == subject.n_layers


def test_the_two_sides_are_everything_and_answers_are_textual(toy):
    subject = toy("llava")
    examples = tuple(Example(**{**vars(e), "answer": "red"}) for e in toys.pair(subject))
    (batch,) = Calibration(examples, batch=2).encoded(subject)
    (bare,) = Calibration(examples, batch=2, answers=False).encoded(subject)
    both, seen, words = (counted(batch, side) for side in ("both", "perceptual", "textual"))
    assert torch.equal(seen | words, both)
    assert not (seen & words).any()
    assert int(seen.sum()) == 2 * 16
    said = [list(m.segments).count("answer") for m in batch.maps]
    assert min(said) > 0
    assert int(both.sum()) == int(counted(bare).sum()) + sum(said)
    assert [m.tokens[len(m) - said[0] :] for m in batch.maps] == [tuple(subject.tokenizer.encode(" red"))] * 2
    twin = Example("t", "what is this ?", context="a red ball")
    (told,) = Calibration((twin,), side="perceptual").encoded(subject)
    assert {m for m, kept in zip(told.maps[0].segments, counted(told, "perceptual")[0], strict=True) if kept} == {"context"}


def test_padding_and_batches_change_no_sum(toy):
    subject = toy("qwen2_vl")
    sums = []
    for batch in (1, 2):
        found = {}
        encoded = Calibration(tuple(toys.pair(subject)), batch=batch).encoded(subject)
        sequential(
            subject, encoded, lambda i, layer, maps, found=found: found.update({(i, n): m.sums for n, m in maps.items()})
        )
        sums.append(found)
    assert len(encoded[0].maps[0]) > counted(encoded[0]).sum(1).min()  # something was padded
    for name in sums[0]:
        torch.testing.assert_close(sums[0][name], sums[1][name], atol=1e-6, rtol=1e-4)


def test_statistics_are_those_of_all_rows_together():
    rows = torch.randn(50, 6, generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0, 2, 3, 0, 1e-3, 1]) + 1000
    squares, gram, moments = Squares(), Gram(), Moments()
    for part in (rows[:7], rows[7:7], rows[7:]):
        for one in (squares, gram, moments):
            one.add(part)
    assert squares.n == gram.n == moments.n == 50
    wide = rows.double()
    torch.testing.assert_close(squares.sums, wide.square().sum(0), rtol=1e-6, atol=0)
    torch.testing.assert_close(gram.sums, wide.T @ wide, rtol=1e-5, atol=0)
    torch.testing.assert_close(gram.norms, squares.norms, rtol=1e-5, atol=0)
    torch.testing.assert_close(moments.mean, wide.mean(0))
    torch.testing.assert_close(moments.variance, wide.var(0), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(moments.squares, wide.square().sum(0))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Calibration(()), "no examples to calibrate on"),
        (lambda: Calibration((Example("a", "why ?"),), side="perceptual"), "no calibration example shows anything"),
        (lambda: Calibration((Example("a", "why ?"),), side="visual"), "there is no side 'visual'"),
    ],
)
def test_what_cannot_be_calibrated_on_is_named(make, message):
    with pytest.raises(PassError, match=message):
        make()


def test_a_loop_over_nothing_and_a_side_without_tokens(toy):
    subject = toy("llava")
    with pytest.raises(PassError, match="no examples to calibrate on"):
        sequential(subject, [], lambda i, layer, maps: None)
    with pytest.raises(PassError, match="no calibration example has perceptual tokens"):
        sequential(subject, [subject.encode(Example("a", "why ?"))], lambda i, layer, maps: None, side="perceptual")


def test_the_ledger_is_told_what_it_was():
    one, other = (brief(Calibration((Example("a", "why ?", answer=answer),))) for answer in ("no", "yes"))
    assert one["examples"] == 1
    assert one["fingerprint"] != other["fingerprint"]


def test_states_wait_elsewhere_only_where_they_crowd_a_gpu(toy, monkeypatch):
    subject = toy("llava")
    batches = [subject.encode(toys.pair(subject))]
    assert not _crowded(subject, batches)
    states = (
        batches[0].inputs["input_ids"].numel() * subject.embedding.get_parameter("weight").shape[-1] * subject.dtype.itemsize
    )
    monkeypatch.setattr(type(subject), "device", torch.device("cuda"))
    for free, crowded in ((states * 4, False), (states * 4 - 8, True)):
        monkeypatch.setattr("torch.cuda.mem_get_info", lambda device, free=free: (free, free))
        assert _crowded(subject, batches) is crowded
