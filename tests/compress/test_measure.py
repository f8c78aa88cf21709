"""Accuracy, comparisons, latency, memory, the frontier, and the baseline of smaller pictures."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from compress import latency
from compress.budget import Budget
from compress.downsampling import downsampled, shrunk
from compress.frontier import Point, standings
from compress.latency import Spread, Timed, amdahl, generate_exactly, median_interval, ratio, take_turns, time_answer
from compress.measure import Answers, Share, accuracy, affirmed, answer, compare, encode_all, exact, first_token_divergence
from compress.memory import peak_memory, peaks_by_phase
from compress.passes.layers import RemoveLayers
from compress.passes.tokens import Tokens
from compress.recipe import compress
from probe import Example
from probe.analysis.stats import mcnemar
from probe.errors import DataError, PassError
from probe.tracing import last_logits
from tests import toys
from tests.oracles import measure as slow


def said(right, words=None, kinds=None, answers=None, first=None):
    """Answers made by hand."""
    n = len(right)
    words = words or ["yes" if r else "no" for r in right]
    examples = tuple(
        Example(f"e{i}", "?", answer=(answers or ["yes"] * n)[i], tags={"kind": (kinds or ["exist"] * n)[i]}) for i in range(n)
    )
    first = torch.zeros(n, 2).log_softmax(-1) if first is None else first
    return Answers(examples, tuple(words), np.array(right, dtype=bool), first)


def test_what_counts_as_right():
    example = Example("a", "?", answer="Red")
    assert exact(example, " red. ")
    assert not exact(example, "reddish")
    assert not exact(Example("a", "?"), "red")


def test_accuracy_is_a_share_with_an_interval_for_every_kind():
    found = accuracy(said([1, 1, 0, 1], kinds=["color", "color", "count", "count"]))
    assert {kind: (share.value, share.n) for kind, share in found.items()} == {
        "all": (0.75, 4),
        "color": (1.0, 2),
        "count": (0.5, 2),
    }
    assert found["all"].low < 0.75 < found["all"].high
    assert Share.of([]) == Share(None, None, None, 0)


def test_hallucination_is_what_is_affirmed_wrongly():
    found = affirmed(
        said([0, 1, 1, 1], ["yes", "no", "yes", "no"], ["exist", "exist", "exist", "compare"], ["no", "no", "yes", "no"])
    )
    assert (found.value, found.n) == (0.5, 2)


def test_a_comparison_by_hand():
    dense, other = said([1, 1, 0, 0], ["a", "b", "c", "d"]), said([1, 0, 1, 0], ["a", "x", "y", "d"])
    found = compare(dense, other)
    assert found.difference[0] == 0
    assert found.difference[1] < 0 < found.difference[2]
    assert found.p == 1.0
    assert found.agreement.value == 0.5
    assert found.divergence == (0.0, 0.0, 0.0)
    assert vars(found.by_kind["exist"]) == {"broke": ("e1",), "mended": ("e2",), "n": 4}
    with pytest.raises(DataError, match="the same examples in the same order"):
        compare(dense, said([1, 0, 1]))
    with pytest.raises(DataError, match="two vocabularies"):
        first_token_divergence(dense, replace(other, first=torch.zeros(4, 3).log_softmax(-1)))


def test_paired_numbers_are_the_slow_ones():
    rng = np.random.default_rng(0)
    for n in (1, 2, 7, 12):
        a, b = (rng.random(n) < p for p in (0.8, 0.4))
        assert mcnemar(a, b) == pytest.approx(slow.mcnemar(a.tolist(), b.tolist()))
    p, q = (torch.tensor(rng.normal(size=(3, 5)), dtype=torch.float32).log_softmax(-1) for _ in range(2))
    found = first_token_divergence(said([1, 1, 1], first=p), said([1, 1, 1], first=q))
    np.testing.assert_allclose(found, [slow.divergence(x, y) for x, y in zip(p.tolist(), q.tolist(), strict=True)], rtol=1e-5)


# --- answers of a model ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def asked(toy):
    subject = toy("llava")
    return [replace(e, id=f"{e.id}{i}", answer="red") for i in range(3) for e in toys.pair(subject)]


def test_batches_change_nothing(toy, asked):
    subject = toy("llava")
    one, many = (answer(subject, encode_all(subject, asked, size)) for size in (1, 4))
    assert one.said == many.said == tuple(subject.generate(asked, 4))
    torch.testing.assert_close(one.first, many.first, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(many.first, last_logits(subject, subject.encode(asked)).log_softmax(-1), atol=1e-4, rtol=1e-4)


def test_shown_and_unshown_are_encoded_apart(toy, asked):
    subject = toy("llava")
    mixed = [asked[0], subject.without_media(asked[1]), subject.without_media(asked[2]), asked[3]]
    batches = encode_all(subject, mixed, 8)
    assert [len(batch) for batch in batches] == [1, 2, 1]
    assert [e.id for e in answer(subject, batches).examples] == [e.id for e in mixed]


def test_a_question_without_an_answer_is_named(toy):
    subject = toy("llava")
    with pytest.raises(DataError, match="example 'a' has no answer"):
        answer(subject, [subject.encode(toys.pair(subject))])


# --- time and memory -------------------------------------------------------------------------------------------------


def hooks(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_an_answer_is_timed_by_phase_and_leaves_no_trace(toy):
    subject = toy("llava")
    smaller = compress(subject, [Tokens(method="pooling", budget=Budget(keep=4))])
    for one in (subject, smaller):
        encoded = one.encode(toys.pair(one)[0])
        generate_exactly(one, encoded, 2)
        before = hooks(one.model)
        timed = time_answer(one, encoded, 3)
        assert hooks(one.model) == before
        assert 0 < timed.vision <= timed.prefill <= timed.answer
        assert 0 < timed.decode < timed.answer
        assert (timed.selector > 0) == (one is smaller)
    smaller.detach()


def test_every_answer_has_as_many_tokens(toy, monkeypatch):
    subject = toy("llava")
    encoded = subject.encode(toys.pair(subject)[0])
    length = encoded.inputs["input_ids"].shape[1]
    said = int(generate_exactly(subject, encoded, 1)[0, -1])
    monkeypatch.setattr(subject.model.generation_config, "eos_token_id", said)  # what it says first would end it
    assert subject.model.generate(**encoded.inputs, max_new_tokens=7, do_sample=False).shape[1] == length + 1
    assert generate_exactly(subject, encoded, 7).shape[1] == length + 7


def test_models_take_turns_and_change_places(monkeypatch):
    order = []

    def fake(subject, encoded, tokens):
        order.append((subject, encoded))
        return Timed(1, 0, 2, 1, 4)

    monkeypatch.setattr(latency, "time_answer", fake)
    found = take_turns({"dense": ("d", [0, 1]), "this": ("t", [0, 1])}, 3, 8, warm_up=1)
    assert {name: len(times) for name, times in found.items()} == {"dense": 3, "this": 3}
    assert order == [("t", 1), ("d", 1), ("d", 0), ("t", 0), ("t", 1), ("d", 1), ("d", 0), ("t", 0)]
    assert amdahl(found["this"]) == (0.25, pytest.approx(4 / 3))


@pytest.mark.parametrize("n", [1, 5, 6, 7, 12, 20, 25, 51])
def test_the_interval_of_a_median(n):
    values = np.random.default_rng(n).permutation(n).astype(float)
    ranks = slow.median_ranks(n, 0.95)
    want = (ranks[0] - 1, ranks[1] - 1) if ranks else (float("-inf"), float("inf"))
    assert median_interval(values.tolist()) == want


def test_verdicts():
    base = [10.0, 12.0, 9.0, 11.0, 10.0, 13.0]
    assert ratio([0.8 * b for b in base], base).verdict == "faster"
    assert ratio([1.3 * b for b in base], base).verdict == "slower"
    assert ratio([b + (1 if i % 2 else -1) for i, b in enumerate(base)], base).verdict == "no evidence"
    few = ratio([1.0], [10.0])
    assert (few.value, few.low, few.high, few.verdict) == (0.1, None, None, "no evidence")


def test_a_spread():
    found = Spread.of([float(v) for v in range(1, 22)])
    assert (found.median, found.lower, found.upper, found.p90, found.n) == (11, 6, 16, 19, 21)


def test_peaks_by_phase(toy):
    subject = toy("llava")
    encoded = subject.encode(toys.pair(subject)[0])
    generate_exactly(subject, encoded, 2)  # transformers hangs hooks of its own on a model that has run
    before = hooks(subject.model)
    whole = peaks_by_phase(subject, encoded, 3)
    assert set(whole) == {"vision", "prefill", "decode"}
    assert 0 < whole["vision"] <= whole["prefill"]
    assert whole["decode"] > 0
    smaller = compress(subject, [RemoveLayers(layers=(1, 2))])
    assert peaks_by_phase(smaller, encoded, 3)["decode"] < whole["decode"]
    assert hooks(subject.model) == before


def test_the_peak_of_a_call_counts_what_lives_at_once():
    def call():
        for _ in range(3):
            torch.ones(1000, dtype=torch.float32) + 1
        return torch.ones(500)

    assert 8000 <= peak_memory(call, torch.device("cpu")) < 12000


# --- the frontier ----------------------------------------------------------------------------------------------------


def point(name, right, cost, low=None, high=None):
    return Point(name, np.array(right, dtype=bool), (cost, cost if low is None else low, cost if high is None else high))


def test_standings_by_hand():
    n = 40
    many, most, few = [1] * 30 + [0] * 10, [1] * 29 + [0] * 11, [1] * 10 + [0] * 30
    found = standings([
        point("full", many, 1.0), point("good", most, 0.5), point("worse for sure", few, 0.6), point("worse by one", [*most[:28], *[0] * 12], 0.5),
        point("cheap", few, 0.1), point("the same", many, 1.0),
    ])  # fmt: skip
    assert len(many) == len(most) == len(few) == n
    assert found == {
        "full": "frontier", "good": "frontier", "worse for sure": "dominated", "worse by one": "inseparable", "cheap": "frontier",
        "the same": "frontier",
    }  # fmt: skip


def test_what_intervals_cannot_tell_apart_is_not_dominated():
    a, b = [1, 1, 1, 0] * 5, [1, 1, 0, 1] * 4 + [0, 1, 0, 1]
    assert standings([point("a", a, 0.5), point("b", b, 0.5)])["b"] == "inseparable"  # one wins some, the other others
    assert standings([point("a", a, 0.5, 0.4, 0.6), point("b", a, 0.55, 0.5, 0.7)])["b"] == "inseparable"  # costs overlap
    assert standings([point("a", a, 0.5, 0.4, 0.6), point("b", a, 0.75, 0.7, 0.8)])["b"] == "dominated"


def test_the_frontier_is_the_slow_one():
    rng = np.random.default_rng(0)
    points = [point(str(i), rng.random(8) < 0.5, round(float(rng.random()), 1)) for i in range(25)]
    want = slow.standings([(p.name, p.accuracy, p.cost[0]) for p in points])
    assert {name for name, standing in standings(points).items() if standing == "frontier"} == want
    assert 1 <= len(want) < 25


# --- smaller pictures ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "fewer"), [("llava", 12), ("paligemma", 12), ("qwen2_vl", 9), ("llava_pixtral", 12)])
def test_a_smaller_picture_takes_fewer_tokens(toy, family, fewer):
    subject = toy(family)
    example = replace(toys.pair(subject)[0], images=(toys.picture(56, 56),))
    smaller = downsampled(subject, 0.5)
    dense, less = subject.encode(example), smaller.encode(shrunk(smaller, [example], 0.5))
    images = [sum(segment == "image" for segment in encoded.maps[0].segments) for encoded in (dense, less)]
    assert images[0] > images[1] >= 1
    if family in ("llava", "paligemma"):
        assert images[0] - images[1] == fewer
    assert torch.isfinite(last_logits(smaller, less)).all()
    assert len(smaller.generate(shrunk(smaller, [example], 0.5), 2)) == 1
    before = hooks(smaller.model)
    hung = len(smaller.attached)
    smaller.detach()
    assert hooks(smaller.model) == before - hung


def test_a_picture_as_large_as_before_changes_nothing(toy):
    subject = toy("llava")
    smaller = downsampled(subject, 0.99)
    encoded = subject.encode(toys.pair(subject))
    torch.testing.assert_close(
        last_logits(smaller, smaller.encode(toys.pair(subject))), last_logits(subject, encoded), atol=1e-5, rtol=1e-5
    )


def test_what_cannot_be_shown_smaller(toy):
    with pytest.raises(PassError, match="takes pictures of one size: pool its tokens instead"):
        downsampled(toy("internvl"), 0.5)
    with pytest.raises(PassError, match="between 0 and 1, not to 2"):
        downsampled(toy("llava"), 2)
