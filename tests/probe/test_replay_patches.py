"""Patches are replayed exactly, at every point, alone and beside knock-outs; what does not fit is refused by name."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from probe import Example, Knockout, Patch, Residual, load, sweep, trace, window
from probe.errors import EditError, ReplayError
from probe.points import POINTS
from tests import toys

PLACES = ((0, "image"), (2, "question"), (3, "image"), (3, "last"))
CASES = [(family, side) for family in toys.PLAIN for side in ("left", "right")]


def noise(subject, point, rows, heads=None, seed=0):
    config = subject.config.get_text_config()
    width = (config.hidden_size,) if point != "z" else (heads or 4, config.hidden_size // config.num_attention_heads)
    return torch.randn(rows, *width, generator=torch.Generator().manual_seed(seed))


def entries(subject, token_map):
    """Every point at the first, a middle and the last layer; groups and positions, single, several, windows, with cuts."""
    made = []
    for number, point in enumerate(POINTS):
        for layer, group in PLACES:
            rows = len(token_map.positions(group))
            made.append(Patch(point, layer, group, noise(subject, point, rows, seed=number)))
    some = token_map.positions("image")[[1, 4, 5]]
    made.append(Patch("z", 1, some, noise(subject, "z", 3, heads=2), heads=(0, 3)))
    made.append(tuple(Patch("mlp_out", layer, some, noise(subject, "mlp_out", 3)) for layer in window(1, 3, 4)))
    made.append((Patch("attn_out", 1, "last", noise(subject, "attn_out", 1)), Knockout("question", "image", [0, 2])))
    made.append((Knockout("last", "question", [1], heads=[1]), Patch("z", 1, "last", noise(subject, "z", 1, heads=1), 1)))
    made.append(
        (
            Patch("resid_pre", 0, some, noise(subject, "resid_pre", 3)),
            Patch("resid_post", 0, some, noise(subject, "resid_post", 3, seed=2)),
        )
    )
    made.append(Patch("resid_pre", 0, "real", noise(subject, "resid_pre", len(token_map.positions("real")))))
    return made  # fmt: skip


def test_every_case_is_there():
    assert len(CASES) == 2 * 6
    assert list(POINTS) == ["resid_pre", "z", "attn_out", "mlp_out", "resid_post"]


@pytest.mark.parametrize(("family", "side"), CASES)
def test_replay_equals_the_naive_rerun(toy, pair, family, side):
    subject = toy(family)
    encoded = subject.encode(pair, side)
    fast, slow = (sweep(subject, encoded, lambda m: entries(subject, m), method=method) for method in ("replay", "naive"))
    points = [(point, *place) for point in POINTS for place in PLACES]
    # In the last layer, what is put elsewhere than at the last position, after its keys were made, is read by nobody.
    idle = [layer == 3 and group != "last" and point != "resid_pre" for point, layer, group in points]
    for i in range(2):
        assert len(fast.edited[i]) == len(points) + 6
        torch.testing.assert_close(fast.edited[i], slow.edited[i], atol=1e-5, rtol=0)
        moved = (fast.edited[i] - fast.clean[i]).abs().amax(-1) > 1e-4
        assert moved.tolist() == [not none for none in idle] + [True] * 6


@pytest.mark.parametrize("family", ["mllama", "gemma3", "llava"])
def test_one_pass_with_a_patch_is_what_a_trace_gives(toy, family):
    subject = toy(family)
    encoded = subject.encode(toys.pair(subject)[:1])
    token_map = encoded.maps[0]
    group = token_map.positions("question")
    wanted = [Patch(p, layer, group, noise(subject, p, len(group))) for p in POINTS for layer in (1, subject.n_layers - 1)]
    found = sweep(subject, encoded, wanted).edited[0]
    for one, logits in zip(wanted, found, strict=True):
        torch.testing.assert_close(logits, trace(subject, encoded, edit=[one]).logits[0], atol=1e-5, rtol=0)


@st.composite
def any_entry(draw):
    made = []
    for _ in range(draw(st.integers(1, 3))):
        positions = draw(st.lists(st.integers(0, 29), min_size=1, max_size=5, unique=True))
        if draw(st.booleans()):
            columns = draw(st.lists(st.integers(0, 29), min_size=1, max_size=5, unique=True))
            made.append(Knockout(positions, columns, draw(st.lists(st.integers(0, 3), min_size=1, max_size=3, unique=True))))
        else:
            point, layer = draw(st.sampled_from(list(POINTS))), draw(st.integers(0, 3))
            heads = draw(st.sampled_from((None, 2, (0, 3)))) if point == "z" else None
            made.append((point, layer, positions, heads, draw(st.integers(0, 99))))
    return made


@settings(max_examples=25, deadline=None)
@given(drawn=st.lists(any_entry(), min_size=1, max_size=4), family=st.sampled_from(("qwen2_vl", "qwen3_vl", "llava")))
def test_any_mixture_is_replayed_exactly(toy, drawn, family):
    subject = toy(family)
    encoded = subject.encode(Example("a", "is there a dog ?", (toys.picture(),)))
    made = []
    for entry in drawn:
        edits = []
        for one in entry:
            if not isinstance(one, Knockout):
                point, layer, positions, heads, seed = one
                count = None if heads is None else len(np.atleast_1d(heads))
                one = Patch(point, layer, positions, noise(subject, point, len(positions), count, seed), heads)
            edits.append(one)
        made.append(tuple(edits))
    fast, slow = (sweep(subject, encoded, made, method=method) for method in ("replay", "naive"))
    torch.testing.assert_close(fast.edited[0], slow.edited[0], atol=1e-5, rtol=0)


def test_a_state_put_back_changes_nothing_and_another_runs_own_states_give_its_answer(toy):
    subject = toy("llava")
    a, b = (subject.encode(Example("a", "is there a dog ?", (toys.picture(seed=seed),))) for seed in (0, 1))
    states, logits = {}, {}
    for name, encoded in (("a", a), ("b", b)):
        made = trace(subject, encoded, [Residual("resid_pre", positions="real")])
        states[name], logits[name] = made["states"].tensor[:, 0], made.logits[0]
    found = sweep(subject, a, [Patch("resid_pre", layer, "real", states[name][layer]) for name in "ab" for layer in range(4)])
    for layer in range(4):
        torch.testing.assert_close(found.edited[0][layer], logits["a"], atol=1e-5, rtol=0)
        torch.testing.assert_close(found.edited[0][4 + layer], logits["b"], atol=1e-5, rtol=0)


def test_only_rows_and_layers_after_the_patch_are_run(toy):
    subject = toy("llava")
    encoded = subject.encode(Example("a", "is there a dog ?", (toys.picture(),)))
    rows = encoded.maps[0].last + 1 - encoded.maps[0].positions("question")[0]
    size = len(encoded.maps[0].positions("question"))
    found = sweep(subject, encoded, [Patch("mlp_out", layer, "question", noise(subject, "mlp_out", size)) for layer in (1, 3)])
    assert found.layer_rows == rows * (3 + 1)


def test_padding_has_nothing_to_patch(toy, pair):
    subject = toy("llava")
    for side in ("left", "right"):
        encoded = subject.encode(pair, side)
        size = len(encoded.maps[0])
        everywhere = Patch("resid_pre", 1, range(size), noise(subject, "resid_pre", size))
        fast, slow = (sweep(subject, encoded, [everywhere], method=method) for method in ("replay", "naive"))
        for a, b in zip(fast.edited, slow.edited, strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=0)
        shorter = min(range(2), key=lambda i: len(encoded.maps[i].positions("real")))
        pad = encoded.maps[shorter].positions("pad")
        assert len(pad)
        found = sweep(subject, encoded, lambda m, pad=pad: [Patch("resid_pre", 1, pad, noise(subject, "resid_pre", len(pad)))])
        torch.testing.assert_close(found.edited[shorter][0], found.clean[shorter], atol=0, rtol=0)


def test_what_does_not_fit_is_refused(toy, pair):
    subject = toy("llava")
    for method in ("replay", "naive"):
        for patch, message in (
            (Patch("mlp_out", 1, "last", torch.zeros(2, 32)), r"at mlp_out of 1 positions needs a tensor of shape \(1, 32\), not \(2, 32\)"),
            (Patch("mlp_out", 1, "last", torch.zeros(1, 5)), r"of 1 positions needs a tensor of shape \(1, 32\), not \(1, 5\)"),
            (Patch("attn_out", 4, "last", torch.zeros(1, 32)), "layer 4 does not exist"),
            (Patch("z", 1, "last", torch.zeros(1, 1, 8), heads=4), "head 4 does not exist"),
            (Patch("z", 1, "last", torch.zeros(1, 4, 8), heads=0), r"needs a tensor of shape \(1, 1, 8\), not \(1, 4, 8\)"),
        ):  # fmt: skip
            with pytest.raises(EditError, match=message):
                sweep(subject, pair, [patch], method=method)
    with pytest.raises(EditError, match="heads can be patched at the point z, not at mlp_out"):
        Patch("mlp_out", 1, "last", torch.zeros(1, 32), heads=0)


@pytest.mark.parametrize(
    ("family", "message"),
    [("paligemma", "lets positions look ahead"), ("qwen3_5", "mixes positions without softmax attention")],
)
def test_the_refusals_are_those_of_knock_outs(family, message):
    subject = load(toys.build(family))
    prompt = "<image>what is the cat ?" if family == "paligemma" else "what is the cat ?"
    example = Example("a", prompt, (toys.picture(),))
    patch = Patch("resid_pre", 1, [8], noise(subject, "resid_pre", 1))
    with pytest.raises(ReplayError, match=message):
        sweep(subject, example, [patch])
    assert len(sweep(subject, example, [patch], method="naive").edited[0]) == 1
