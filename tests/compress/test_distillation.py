"""Distillation: losses against paper and pencil, gradients, and a student that learns."""

from dataclasses import replace

import pytest
import torch

from compress import saving
from compress.budget import Budget
from compress.distillation import Weights, divergence, relation, response_kl, visual_kl
from compress.healing import distil, losses, states
from compress.passes.base import apply
from compress.passes.layers import RemoveLayers
from compress.passes.learned import Distilled
from compress.passes.masks import Masks
from compress.passes.tokens import Tokens
from compress.recipe import compress
from probe import Example, load
from probe.errors import DataError, PassError
from probe.likelihood import with_answers
from probe.tracing import last_logits
from tests import toys
from tests.oracles import distillation as oracle

KINDS = ("forward", "reverse", "js")


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 2


@pytest.mark.parametrize("kind", KINDS)
def test_the_divergence_is_that_of_paper_and_pencil(kind):
    teacher, student = drawn(2, 5, 7), drawn(2, 5, 7, seed=1)
    where = torch.tensor([[True, False, True, False, False], [False, False, False, True, True]])
    want = oracle.response_kl(teacher.tolist(), student.tolist(), where.tolist(), kind)
    assert float(response_kl(teacher, student, where, kind)) == pytest.approx(want, abs=1e-6)
    rows = where.nonzero()
    got = visual_kl(
        torch.eye(len(rows)), torch.eye(len(rows)), (lambda x: x @ teacher[where], lambda x: x @ student[where]), kind, 3
    )
    assert float(got) == pytest.approx(want, abs=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_divergences_of_half_precision_are_those_of_its_numbers(kind):
    """The softmax is that of float32: in half precision a large vocabulary's would lose small probabilities."""
    teacher, student = (drawn(3, 4000, seed=i).half() for i in (0, 1))
    found = divergence(teacher, student, kind)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, divergence(teacher.double().float(), student.double().float(), kind), atol=0, rtol=0)


def test_golden_numbers():
    """Two words: a half and a half against 3/4 and 1/4."""
    half, other = torch.zeros(1, 2), torch.tensor([[3.0, 1.0]]).log()
    assert float(divergence(half, other)[0]) == pytest.approx(0.5 * torch.log(torch.tensor(4 / 3)).item(), abs=1e-6)
    assert float(divergence(half, other, "reverse")[0]) == pytest.approx(0.130812, abs=1e-6)
    assert float(divergence(half, other, "js")[0]) == pytest.approx(0.033822, abs=1e-6)
    # Gram matrices [[1, 0], [0, 1]] and [[1, 1], [1, 1]]: cosine 2 / (sqrt 2 * 2)
    assert float(relation([torch.eye(2)], [torch.ones(2, 1)])) == pytest.approx(1 - 2**-0.5, abs=1e-6)


def test_a_word_without_probability_counts_nothing():
    teacher, student = torch.tensor([[0.0, -torch.inf, 0.0]]), torch.tensor([[0.0, 1.0, 0.0]])
    assert float(divergence(teacher, student)[0]) == pytest.approx(torch.log(torch.tensor((2 + torch.e) / 2)).item(), abs=1e-5)
    assert float(divergence(teacher, teacher, "js")[0]) == 0.0


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_to_learn_where_student_and_teacher_agree(kind):
    teacher, where = drawn(2, 5, 7), torch.ones(2, 5, dtype=torch.bool)
    student = teacher.clone().requires_grad_(True)
    loss = response_kl(teacher, student, where, kind)
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-6)
    assert student.grad.abs().max() < 1e-6
    state, head = drawn(9, 4).requires_grad_(True), drawn(4, 7)
    loss = visual_kl(state.detach(), state, (lambda x: x @ head, lambda x: x @ head), kind, 4)
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-6)
    assert state.grad.abs().max() < 1e-6
    state.grad = None
    loss = relation([state.detach()], [state])
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-6)
    assert state.grad.abs().max() < 1e-6


def test_only_the_positions_of_the_mask_learn():
    teacher, student = drawn(2, 5, 7), drawn(2, 5, 7, seed=1).requires_grad_(True)
    where = torch.zeros(2, 5, dtype=torch.bool)
    where[0, 2] = where[1, 4] = True
    response_kl(teacher, student, where).backward()
    assert torch.equal(student.grad.abs().sum(-1) > 0, where)
    nothing = response_kl(teacher, student, torch.zeros_like(where))
    nothing.backward()
    assert nothing.item() == 0.0


@pytest.mark.parametrize("chunk", [1, 4, 100])
def test_chunks_change_neither_the_loss_nor_its_gradient(chunk):
    teacher, student = drawn(10, 6), drawn(10, 5, seed=1).requires_grad_(True)
    heads = drawn(6, 30, seed=2), drawn(5, 30, seed=3).requires_grad_(True)
    visual_kl(teacher, student, (lambda x: x @ heads[0], lambda x: x @ heads[1]), "forward", chunk).backward()
    got = student.grad.clone(), heads[1].grad.clone()
    student.grad = heads[1].grad = None
    plain = divergence(teacher @ heads[0], student @ heads[1]).mean()
    plain.backward()
    torch.testing.assert_close(got, (student.grad, heads[1].grad), atol=1e-6, rtol=1e-5)


def test_relations_know_nothing_of_rotations_scale_and_width():
    teacher, student = drawn(8, 6), drawn(8, 4, seed=1)
    want = oracle.relation(teacher.tolist(), student.tolist())
    assert float(relation([teacher], [student])) == pytest.approx(want, abs=1e-5)
    turn = torch.linalg.qr(drawn(4, 4, seed=2)).Q
    assert float(relation([teacher], [3.7 * student @ turn])) == pytest.approx(want, abs=1e-5)
    assert float(relation([teacher], [student + 1])) != pytest.approx(want, abs=1e-3)
    assert float(relation([teacher], [student[torch.randperm(8)]])) != pytest.approx(want, abs=1e-3)
    both = relation([teacher, student], [student, student])
    assert float(both) == pytest.approx(want / 2, abs=1e-5)
    assert float(relation([], [])) == 0.0


def test_what_cannot_be_compared_says_why():
    with pytest.raises(PassError, match="two vocabularies"):
        divergence(drawn(2, 7), drawn(2, 8))
    with pytest.raises(PassError, match="8 tokens in the teacher and 7 in the student"):
        relation([drawn(8, 3)], [drawn(7, 3)])


# --- whole models ----------------------------------------------------------------------------------------------------


FAMILIES = ("llava", "qwen2_5_vl", "idefics3", "gemma3", "qwen2_audio")


@pytest.mark.parametrize("family", FAMILIES)
def test_the_losses_of_a_model_are_those_of_its_full_logits(toy, family):
    teacher = toy(family)
    student = compress(teacher, [RemoveLayers(layers=(1,))])
    encoded = with_answers(teacher, teacher.encode(toys.pair(teacher)), ["yes", "one two"])
    found = losses(student, teacher, encoded)
    with torch.no_grad():
        full = [one.model(**encoded.inputs, use_cache=False).logits.float() for one in (teacher, student)]
        final = [states(one, encoded) for one in (teacher, student)]
    where = torch.zeros(full[0].shape[:2], dtype=torch.bool)
    visual, grams, answers = where.clone(), [], []
    for i, token_map in enumerate(encoded.maps):
        places = token_map.positions("answer")
        assert len(places)
        where[i, places - 1] = True
        visual[i, token_map.positions("media")] = True
        grams.append(oracle.relation(*(one[i, token_map.positions("media")].tolist() for one in final)))
        answers += [-full[1][i, p - 1].log_softmax(-1)[encoded.inputs["input_ids"][i, p]].item() for p in places]
    lists = [one.tolist() for one in full]
    assert found["response"].item() == pytest.approx(oracle.response_kl(*lists, where.tolist()), abs=1e-4)
    assert found["visual"].item() == pytest.approx(oracle.response_kl(*lists, visual.tolist()), abs=1e-4)
    assert found["relation"].item() == pytest.approx(sum(grams) / len(grams), abs=1e-4)
    assert found["answer"].item() == pytest.approx(sum(answers) / len(answers), abs=1e-4)


@pytest.fixture(scope="module")
def lessons():
    return [Example(str(i), text, (toys.picture(seed=i),)) for i, text in enumerate(["is there a cat ?", "what color ?"] * 2)]


def healed(subject, lessons, steps=4, **settings):
    student = compress(subject, [RemoveLayers(layers=(1,)), Masks(method="naavit", start=2)])
    try:
        told = distil(student, subject, lessons, steps, batch=2, **settings)
    finally:
        student.detach()
    return student, told


def test_a_student_learns_and_the_ledger_knows(toy, lessons, tmp_path):
    subject = toy("llava")
    before = {name: weight.clone() for name, weight in subject.model.named_parameters()}
    seen = []
    student, told = healed(subject, lessons, 12, rate=1e-2, advance=seen.append)
    assert seen == told
    assert told[-1].total < 0.7 * told[0].total
    assert all(
        one.total == pytest.approx(one.answer + one.response + one.visual + 0.5 * one.relation, rel=1e-5) for one in told
    )
    assert all(torch.equal(before[name], weight) for name, weight in subject.model.named_parameters())
    start = compress(subject, [RemoveLayers(layers=(1,))])
    fresh = dict(start.model.named_parameters())
    moved = {name for name, weight in student.model.named_parameters() if not torch.equal(weight, fresh[name])}
    still = set(fresh) - moved
    assert moved
    assert all(
        name.startswith(("model.multi_modal_projector.", "model.language_model.layers.", "model.language_model.norm"))
        for name in moved
    )
    assert all(".vision_tower." in name or "embed_tokens" in name or "lm_head" in name for name in still)
    assert all(weight.grad is None and weight.requires_grad for weight in student.model.parameters())
    assert [step.title for step in student.ledger] == ["remove-layers", "mask", "distil"]
    change = student.ledger[-1].changes[0]
    assert change["teacher"] == subject.name
    assert change["steps"] == 12
    assert change["last"]["total"] == pytest.approx(sum(one.total for one in told) / 12, abs=1e-5)
    saving.save(student, tmp_path / "m")
    again = saving.load(tmp_path / "m", device="cpu")
    assert [step.title for step in again.ledger] == ["remove-layers", "mask", "distil"]
    again.detach()
    encoded = student.encode(toys.pair(student))
    torch.testing.assert_close(last_logits(again, encoded), last_logits(student, encoded), atol=1e-5, rtol=1e-5)


def test_the_same_call_gives_the_same_weights(toy, lessons):
    subject = toy("llava")
    one, other, third = (healed(subject, lessons, 3, seed=seed)[0] for seed in (0, 0, 1))
    assert all(torch.equal(a, b) for a, b in zip(one.model.parameters(), other.model.parameters(), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(one.model.parameters(), third.model.parameters(), strict=True))


def test_no_steps_are_bitwise_nothing(toy, lessons):
    subject = toy("llava")
    student, told = healed(subject, lessons, 0)
    assert told == []
    assert [step.title for step in student.ledger] == ["remove-layers", "mask"]
    start = compress(subject, [RemoveLayers(layers=(1,))])
    assert all(torch.equal(a, b) for a, b in zip(student.model.parameters(), start.model.parameters(), strict=True))


def test_the_connector_alone(toy, lessons):
    subject = toy("llava")
    student = healed(subject, lessons, 2, parts=("connector",), weights=Weights(0, 0, 0, 1.0), kind="js")[0]
    fresh = dict(compress(subject, [RemoveLayers(layers=(1,))]).model.named_parameters())
    moved = [name for name, weight in student.model.named_parameters() if not torch.equal(weight, fresh[name])]
    assert moved
    assert all("multi_modal_projector" in name for name in moved)


def test_a_student_that_is_its_teacher_has_nothing_to_learn(toy, lessons):
    subject = toy("llava")
    student = compress(subject, [])
    told = distil(student, subject, lessons, 1, batch=4, weights=Weights(answer=0.0))
    assert told[0].total == pytest.approx(0, abs=1e-6)  # the step itself is rounding, which Adam makes as large as any other


def test_given_answers_are_those_of_the_examples(toy, lessons):
    subject = toy("llava")
    given = [replace(example, answer="yes") for example in lessons]
    _, told = healed(subject, given, 1, answers="given")
    encoded = with_answers(subject, subject.encode(given[:1]), ["yes"])
    assert len(encoded.maps[0].positions("answer")) >= 1
    _, own = healed(subject, given, 1)
    assert told[0].answer != own[0].answer
    with pytest.raises(DataError, match="example '0' has no answer"):
        healed(subject, lessons, 1, answers="given")


def test_who_cannot_be_taught_says_why(toy, lessons):
    subject, other = toy("llava"), load(toys.build("qwen2_vl"))
    student = compress(subject, [])
    with pytest.raises(PassError, match="have two vocabularies"):
        distil(student, other, lessons, 1)
    with pytest.raises(PassError, match="cannot teach itself"):
        distil(compress(subject, [], in_place=True), subject, lessons, 1)
    with pytest.raises(PassError, match="there is no part 'tower' that learns"):
        distil(student, subject, lessons, 1, parts=("tower",))
    with pytest.raises(PassError, match="at least one part"):
        distil(student, subject, lessons, 1, parts=())
    with pytest.raises(DataError, match="at least one example"):
        distil(student, subject, [], 1)
    dropping = compress(subject, [Tokens(method="uniform", budget=Budget(keep=0.5))])
    with pytest.raises(PassError, match="drops tokens has no state"):
        distil(dropping, subject, lessons, 1)
    dropping.detach()
    student.model.half()
    with pytest.raises(PassError, match="learn too coarsely"):
        distil(student, subject, lessons, 1)


def test_what_was_learned_cannot_be_carried_out_from_a_ledger(toy):
    change = Distilled(
        teacher="t", parts=("decoder",), steps=1, rate=0.1, batch=1, examples=1, weights={}, divergence="forward", answers="teacher", last={}
    )  # fmt: skip
    with pytest.raises(PassError, match="is in the saved weights"):
        change.carry_out(compress(toy("llava"), []))


def test_passes_may_follow_a_healed_model(toy, lessons):
    student, _ = healed(toy("llava"), lessons, 1)
    apply(student, Tokens(method="uniform", budget=Budget(keep=0.5)))
    assert [step.title for step in student.ledger] == ["remove-layers", "mask", "distil", "tokens"]
    student.detach()
