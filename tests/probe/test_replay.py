"""Replay is exact, cheap, and refuses by name what it cannot do."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from probe import Ablate, Example, Knockout, load, sweep, window
from probe.errors import EditError, ReplayError
from tests import toys

CASES = [(family, side) for family in toys.PLAIN for side in ("left", "right")]
FLOWS = (("question", "image"), ("last", "image"), ("last", "question"), ("last", "last"), ("text", "image"))


def test_every_family_is_covered():
    assert len(CASES) == 2 * 6


@pytest.mark.parametrize(("family", "side"), CASES)
def test_replay_equals_the_naive_rerun(toy, pair, family, side):
    subject = toy(family)
    entries = [Knockout(rows, columns, window(center, 3, 4)) for rows, columns in FLOWS for center in range(4)]
    entries += [Knockout("text", "image", range(start, 4)) for start in range(4)]
    entries += [(Knockout("question", "image", [1]), Knockout("last", "question", [2], heads=[0, 3])), Knockout("question", [])]
    fast, slow = (sweep(subject, pair, entries, method=method, padding=side) for method in ("replay", "naive"))
    for i in range(2):
        torch.testing.assert_close(fast.edited[i], slow.edited[i], atol=1e-5, rtol=0)
        assert fast.edited[i].shape == (len(entries), fast.clean.shape[1])
        # every entry but the last one does something
        assert ((fast.edited[i][:-1] - fast.clean[i]).abs().amax(-1) > 1e-5).sum() >= len(entries) - 2
        torch.testing.assert_close(fast.edited[i][-1], fast.clean[i], atol=1e-5, rtol=0)


def test_gqa_is_really_grouped(toy):
    for family in toys.PLAIN:
        config = toy(family).config.get_text_config()
        assert config.num_key_value_heads * 2 == config.num_attention_heads


@pytest.mark.parametrize("rows", [1, 40, 16384])
def test_the_size_of_a_batch_of_entries_does_not_matter(toy, pair, rows):
    subject = toy("llava")
    entries = [Knockout("question", "image", window(c, 3, 4)) for c in range(4)] + [
        Knockout("last", "question", [c]) for c in range(4)
    ]
    expected, found = sweep(subject, pair, entries), sweep(subject, pair, entries, max_rows=rows)
    for a, b in zip(found.edited, expected.edited, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=0)


def test_the_rows_that_run_are_those_of_the_cost_model(toy):
    subject = toy("llava")
    encoded = subject.encode(Example("a", "is there a dog ?", (toys.picture(),)))
    found = sweep(subject, encoded, [Knockout("last", "image", [start]) for start in range(4)])
    assert found.layer_rows == 4 + 3 + 2 + 1  # one row, from each start to the top
    first = encoded.maps[0].positions("question")[0]
    rows = encoded.maps[0].last + 1 - first
    found = sweep(subject, encoded, [Knockout("question", "image", [start]) for start in range(4)])
    assert found.layer_rows == rows * (4 + 3 + 2 + 1)
    assert found.clean_layer_rows == 4 * len(encoded.maps[0])


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_any_set_of_edges_is_replayed_exactly(toy, data):
    subject = toy("qwen2_vl")
    encoded = subject.encode(Example("a", "is there a dog ?", (toys.picture(),)))
    size = len(encoded.maps[0])
    positions = st.lists(st.integers(0, size - 1), min_size=1, max_size=6, unique=True)
    rows, columns = data.draw(positions), data.draw(positions)
    layers = data.draw(st.lists(st.integers(0, 3), min_size=1, max_size=4, unique=True))
    entry = Knockout(rows, columns, layers)
    fast, slow = (sweep(subject, encoded, [entry], method=method) for method in ("replay", "naive"))
    torch.testing.assert_close(fast.edited[0], slow.edited[0], atol=2e-5, rtol=0)


def test_bf16_agrees_on_the_answer(pair):
    model, processor = toys.build("llava")
    subject = load((model.to(torch.bfloat16), processor))
    entries = [Knockout("question", "image", window(c, 3, 4)) for c in range(4)]
    fast, slow = (sweep(subject, pair, entries, method=method) for method in ("replay", "naive"))
    for a, b in zip(fast.edited, slow.edited, strict=True):
        torch.testing.assert_close(a, b, atol=0.15, rtol=0)


def test_eager_models_are_replayed_too(pair):
    model, processor = toys.build("llava")
    model.set_attn_implementation("eager")
    subject = load((model, processor))
    entries = [Knockout("question", "image", [1]), Knockout("last", "question", [2])]
    fast, slow = (sweep(subject, pair, entries, method=method) for method in ("replay", "naive"))
    for a, b in zip(fast.edited, slow.edited, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=0)


def test_entries_may_depend_on_the_example(toy, pair):
    subject = toy("llava")
    found = sweep(subject, pair, lambda m: [Knockout("last", [p]) for p in m.positions("image")[:3]])
    assert [len(e) for e in found.edited] == [3, 3]


@pytest.mark.parametrize(
    ("family", "message"),
    [
        ("paligemma", "lets positions look ahead .a bidirectional prefix., so that rows before an edit change too"),
        ("qwen3_5", "mixes positions without softmax attention, so that a clean prefix cannot be reused"),
    ],
)
def test_what_cannot_be_exact_is_refused_with_the_reason(family, message):
    subject = load(toys.build(family))
    prompt = "<image>what is the cat ?" if family == "paligemma" else "what is the cat ?"
    example = Example("a", prompt, (toys.picture(),))
    before = [m.config._attn_implementation for m in subject.model.modules() if hasattr(m, "config")]
    with pytest.raises(ReplayError, match=message):
        sweep(subject, example, [Knockout([8], [2])])
    assert before == [m.config._attn_implementation for m in subject.model.modules() if hasattr(m, "config")]
    assert len(sweep(subject, example, [Knockout([8], [2])], method="naive").edited[0]) == 1


def test_each_entrys_own_first_row_is_checked_for_lookahead():
    subject = load(toys.build("paligemma"))
    example = Example("a", "<image>what is the cat ?", (toys.picture(),))
    with pytest.raises(ReplayError, match="lets positions look ahead"):
        sweep(subject, example, [Knockout([0], [0]), Knockout("last", "image")])


def test_examples_without_entries_may_end_earlier(toy, pair):
    subject = toy("llava")
    encoded = subject.encode(pair, "right")
    longest = max(m.last for m in encoded.maps)
    found = sweep(subject, encoded, lambda m: [Knockout("last", "image")] if m.last == longest else [])
    assert sorted(len(e) for e in found.edited) == [0, 1]


def test_other_edits_go_the_naive_way(toy, pair):
    with pytest.raises(ReplayError, match='run Ablate entries with method="naive"'):
        sweep(toy("llava"), pair, [Ablate("mlp_out", 1)])
    assert len(sweep(toy("llava"), pair, [Ablate("mlp_out", 1)], method="naive").edited) == 2


def test_windows_are_the_published_ones():
    assert window(0, 9, 40) == range(5)
    assert window(39, 9, 40) == range(35, 40)
    assert window(10, 7, 32) == range(7, 14)
    assert window(5, 4, 32) == range(3, 7)
    for width in (0, 5, -1):
        with pytest.raises(EditError, match="a window has 1 to 4 layers on this model, not"):
            window(0, width, 4)
