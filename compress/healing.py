"""Healing: a smaller model is taught by the one that it was made from, with the losses of `compress.distillation`."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from inspect import signature
from typing import Any, Literal

import torch
from torch import Tensor, nn

from compress.distillation import Kind, Weights, relation, response_kl, visual_kl
from compress.ledger import Step
from compress.passes.learned import Distilled
from compress.smaller import Smaller
from probe.anatomy.readout import capped
from probe.errors import DataError, PassError
from probe.example import Example
from probe.generation import extended
from probe.likelihood import with_answers
from probe.subject import Encoded, Subject

PARTS = ("connector", "decoder")
PAPER = Weights()
WRITTEN = 32  # tokens of a teacher's answer at most
TAIL = 20  # steps that the ledger's losses are the mean of


@dataclass(frozen=True)
class Losses:
    """The terms of one step, not yet weighted, and their weighted sum."""

    answer: float
    response: float
    visual: float
    relation: float
    total: float


def distil(
    student: Smaller,
    teacher: Subject,
    examples: Sequence[Example],
    steps: int,
    rate: float = 1e-3,
    batch: int = 16,
    parts: Sequence[str] = PARTS,
    weights: Weights = PAPER,
    kind: Kind = "forward",
    answers: Literal["teacher", "given"] = "teacher",
    seed: int = 0,
    advance: Callable[[Losses], None] = lambda losses: None,
) -> list[Losses]:
    """Trains `parts` of a student (its `connector`, its `decoder`) to say what the teacher says, and notes it in the student's ledger.

    Both read the examples with answers: the teacher's own, greedy, which need no labels, or those `given` with the examples (spelled as the model
    spells them, or it is taught another spelling). `steps` batches are drawn by `seed`; AdamW, warm-up and cosine, no dropout: the same call
    gives the same weights. `advance` is told the losses of each step. Gives the losses of all steps.

    Raises PassError for two vocabularies, weights that are not float32, a student that drops tokens (their positions have no counterpart), or
    parts that it does not have; DataError for an example without an answer.
    """
    _refuse(student, teacher, examples, parts, steps, answers)
    told: dict[int, list[int]] = {}
    learned: list[Losses] = []
    with _training(student, parts) as trained:
        optimiser = torch.optim.AdamW(trained, lr=rate, betas=(0.9, 0.98), weight_decay=0.0)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: _pace(step, steps))
        for chosen in _draws(len(examples), batch, steps, seed):
            encoded = student.encode([examples[i] for i in chosen])
            if answers == "given":
                encoded = with_answers(student, encoded, [examples[i].answer for i in chosen])
            else:
                encoded = extended(student, encoded, _written(teacher, encoded, chosen, told))
            terms = losses(student, teacher, encoded, kind)
            total = sum(getattr(weights, name) * value for name, value in terms.items())
            assert isinstance(total, Tensor)
            optimiser.zero_grad()
            total.backward()
            nn.utils.clip_grad_norm_(trained, 1.0)
            optimiser.step()
            schedule.step()
            learned.append(
                Losses(**{name: float(value.detach()) for name, value in terms.items()}, total=float(total.detach()))
            )
            advance(learned[-1])
    if learned:
        _note(student, teacher, learned, Distilled(
            teacher=teacher.name, parts=tuple(parts), steps=steps, rate=rate, batch=batch, examples=len(examples),
            weights=asdict(weights), divergence=kind, answers=answers, last=_last(learned),
        ), seed)  # fmt: skip
    return learned


def losses(student: Subject, teacher: Subject, encoded: Encoded, kind: Kind = "forward") -> dict[str, Tensor]:
    """The four terms (`answer response visual relation`) of one batch that holds prompts and answers, with the student's gradients."""
    maps = encoded.maps
    with torch.no_grad():
        theirs = states(teacher, encoded)
    mine = states(student, encoded)
    if mine.shape[1] != len(maps[0]):
        raise PassError("a student that drops tokens has no state at their positions: take its reducers off before it learns")
    heads = tuple(_head(one) for one in (teacher, student))
    media = [torch.as_tensor(token_map.positions("media"), device=mine.device) for token_map in maps]
    before, after = _answers(encoded)
    rows, said = heads[1](mine[before]), encoded.inputs["input_ids"][after]
    with torch.no_grad():
        told = heads[0](theirs[before])
    shown = [i for i, places in enumerate(media) if len(places)]
    its, own = ([one[i, media[i]] for i in shown] for one in (theirs, mine))
    everywhere = torch.ones(1, len(rows), dtype=torch.bool, device=rows.device)
    return {
        "answer": nn.functional.cross_entropy(rows.float(), said),
        "response": response_kl(told[None], rows[None], everywhere, kind),
        "visual": visual_kl(torch.cat(its), torch.cat(own), (heads[0], heads[1]), kind) if shown else mine.sum() * 0.0,
        "relation": relation(its, own),
    }


def states(subject: Subject, encoded: Encoded) -> Tensor:
    """The states after the final norm (batch position width), as gradients can flow through them."""
    found: list[Tensor] = []
    handle = subject.decoder.register_forward_hook(lambda module, args, output: found.append(output.last_hidden_state))
    keep = {"logits_to_keep": 1} if "logits_to_keep" in signature(subject.model.forward).parameters else {}
    try:
        with subject.lock:
            subject.model(**encoded.inputs, use_cache=False, **keep)
    finally:
        handle.remove()
    return found[0]


def _head(subject: Subject) -> Callable[[Tensor], Tensor]:
    return lambda state: capped(subject.unembedding(state), subject.config)


def _answers(encoded: Encoded) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Indices (row, position) of every position that predicts a token of an answer, and of that token."""
    row = [i for i, token_map in enumerate(encoded.maps) for _ in token_map.positions("answer")]
    place = [int(p) for token_map in encoded.maps for p in token_map.positions("answer")]
    device = encoded.inputs["input_ids"].device
    rows, places = torch.tensor(row, device=device), torch.tensor(place, device=device)
    return (rows, places - 1), (rows, places)


@torch.no_grad()
def _written(teacher: Subject, encoded: Encoded, chosen: Sequence[int], told: dict[int, list[int]]) -> Tensor:
    """The teacher's greedy answers to a batch (row step), their ends included, -1 after them; `told` remembers those of each example."""
    if any(i not in told for i in chosen):
        with teacher.lock:
            made = teacher.model.generate(**encoded.inputs, max_new_tokens=WRITTEN, do_sample=False)
        new = made[:, encoded.inputs["input_ids"].shape[1] :].tolist()
        ends = teacher.model.generation_config.eos_token_id
        ends = set(ends if isinstance(ends, list) else [ends])
        for i, line in zip(chosen, new, strict=True):
            told[i] = line[: next((k + 1 for k, token in enumerate(line) if token in ends), len(line))]
    longest = max(len(told[i]) for i in chosen)
    return torch.tensor([[*told[i], *[-1] * (longest - len(told[i]))] for i in chosen])


# --- what may learn --------------------------------------------------------------------------------------------------


def _refuse(
    student: Smaller, teacher: Subject, examples: Sequence[Example], parts: Sequence[str], steps: int, answers: str
) -> None:
    sizes = [one.unembedding.get_parameter("weight").shape[0] for one in (teacher, student)]
    if sizes[0] != sizes[1] or teacher.tokenizer.get_vocab() != student.tokenizer.get_vocab():
        raise PassError(
            f"{teacher.name} ({sizes[0]} tokens) and {student.name} ({sizes[1]}) have two vocabularies: a student is taught by a model that speaks its own"
        )
    if student.reducers:
        raise PassError("a student that drops tokens has no state at their positions: distil first, and reduce tokens after")
    if teacher.model is student.model:
        raise PassError("a model cannot teach itself: compress a copy (in_place=False)")
    if student.dtype != torch.float32:
        raise PassError(f'weights of {student.dtype} learn too coarsely: load the student with dtype="float32"')
    if unknown := [part for part in parts if part not in PARTS]:
        raise PassError(f"there is no part {unknown[0]!r} that learns: name {', '.join(PARTS)}")
    if not parts or ("connector" in parts and student.anatomy.connector is None):
        raise PassError("the student has no part of this name: name decoder" if parts else "name at least one part that learns")
    if not examples or steps < 0:
        raise DataError("a student learns from at least one example, in 0 steps or more")
    if answers not in ("teacher", "given"):
        raise PassError(f"answers are the teacher's or those given, not {answers!r}")
    if answers == "given" and (blank := next((one.id for one in examples if not one.answer), None)):
        raise DataError(f"example {blank!r} has no answer: let the teacher answer, or give one")


@contextmanager
def _training(student: Smaller, parts: Sequence[str]) -> Iterator[list[nn.Parameter]]:
    """The parameters of some parts, which alone want gradients meanwhile; the embeddings and the head stay as they are."""
    anatomy = student.anatomy
    inside = tuple(f"{getattr(anatomy, part)}." for part in parts)
    fixed = tuple(f"{name}." for name in (anatomy.embedding, anatomy.unembedding))
    before = {name: weight.requires_grad for name, weight in student.model.named_parameters()}
    chosen = []
    for name, weight in student.model.named_parameters():
        weight.requires_grad_(name.startswith(inside) and not name.startswith(fixed))
        chosen += [weight] if weight.requires_grad else []
    try:
        yield chosen
    finally:
        for name, weight in student.model.named_parameters():
            weight.requires_grad_(before[name])
            weight.grad = None


def _draws(count: int, batch: int, steps: int, seed: int) -> Iterator[list[int]]:
    """The examples of each step: all of them in a drawn order, again and again."""
    generator = torch.Generator().manual_seed(seed)
    waiting: list[int] = []
    for _ in range(steps):
        while len(waiting) < min(batch, count):
            waiting += torch.randperm(count, generator=generator).tolist()
        yield waiting[: min(batch, count)]
        waiting = waiting[min(batch, count) :]


def _pace(step: int, steps: int) -> float:
    """Warm-up over a twentieth of the steps, then half a cosine down to a hundredth."""
    warm = max(1, steps // 20)
    if step < warm:
        return (step + 1) / warm
    return 0.01 + 0.99 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm))) / 2


def _last(learned: Sequence[Losses]) -> dict[str, float]:
    tail = learned[-TAIL:]
    return {name: round(sum(getattr(one, name) for one in tail) / len(tail), 6) for name in asdict(tail[0])}


def _note(student: Smaller, teacher: Subject, learned: Sequence[Losses], change: Distilled, seed: int) -> None:
    settings: dict[str, Any] = {k: v for k, v in change.described().items() if k not in ("kind", "last")}
    versions = {name: version(name) for name in ("sightline", "torch", "transformers")}
    student.ledger = (*student.ledger, Step("distil", settings, (change.described(),), {}, seed, versions))
