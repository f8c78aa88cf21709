"""What a pupil goes through: the lessons of a stage, and before them those of its heads and of its tower alone."""

import math
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from studies.demo.batches import Batch, Batcher, Diet, Telling
from studies.demo.pupil import Pupil, answer_loss, presence_loss
from studies.demo.stages import BINDING, Stage


def train(
    stage: Stage, pupil: Pupil, tokenizer: object, seed: int, device: torch.device, along: Path | None = None
) -> None:  # fmt: skip
    """Runs one stage in place; prints the loss and held-out accuracy as it goes.

    What is being trained is saved into the folder `along` before the steps that the stage names.
    """
    batcher = Batcher(tokenizer, seed)
    weights = [p for p in pupil.parameters() if p.requires_grad]
    decay = [p for p in weights if p.dim() >= 2]
    plain = [p for p in weights if p.dim() < 2]
    optimiser = torch.optim.AdamW(
        [{"params": decay, "weight_decay": 0.05}, {"params": plain, "weight_decay": 0.0}], lr=stage.rate, betas=(0.9, 0.98)
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, _warm_then_cosine(stage.steps))
    start = time.time()
    batches = ahead(lambda step: batcher.draw(_diet(stage, step / stage.steps), _telling(batcher, stage)), stage.steps)
    for step, batch in enumerate(drawn.to(device) for drawn in batches):
        if along is not None and step in stage.along:
            save_trained(pupil, along / f"step-{step:05d}.safetensors")
        loss, total = losses(stage, pupil, batch)
        optimiser.zero_grad()
        total.backward()
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimiser.step()
        schedule.step()
        if step % 50 == 49 or step == stage.steps - 1:
            report = checkpoint_accuracy(
                pupil, tokenizer, stage.tellings[0][0], stage.kinds, scenes=64, device=device,
                long=_diet(stage, step / stage.steps).long,
            )  # fmt: skip
            shown = " ".join(f"{kind} {hits / n:.2f}" for kind, (hits, n) in report.items())
            minutes = (time.time() - start) / 60
            _say(f"{stage.name} {step + 1} loss {loss.item():.3f} of {total.item():.3f} {minutes:.1f} min | {shown}")


def save_trained(pupil: Pupil, path: Path) -> None:
    """The weights that training changes, in half precision: the rest is another model's."""
    path.parent.mkdir(parents=True, exist_ok=True)
    changed = {name: p.detach().half().cpu() for name, p in pupil.model.named_parameters() if p.requires_grad}
    save_file(changed, path)


def losses(stage: Stage, pupil: Pupil, batch: Batch) -> tuple[Tensor, Tensor]:
    """The loss on the answers, and its sum with those of the auxiliary tasks of the stage."""
    logits, guess = pupil(batch)
    loss = total = answer_loss(logits, batch)
    if guess is not None and stage.presence:
        total = total + stage.presence * 10 * presence_loss(guess, batch.presence)
    if batch.shown is not None and stage.presence:
        total = total + stage.presence * pupil.cell_loss(batch)
    if batch.shown is not None and stage.align:
        total = total + stage.align * pupil.align_loss(batch)
    if stage.summaries and bool((batch.phrases >= 0).any()):
        total = total + stage.summaries * pupil.summary_loss(batch)
    if stage.mentions and bool((batch.mentions >= 0).any()):
        total = total + stage.mentions * pupil.mention_loss(batch)
    return loss, total


def ahead(draw: Callable[[int], Batch], steps: int) -> Iterator[Batch]:
    """`draw(0)`, `draw(1)`, ...: the next batch is drawn by another thread while this one is learned from."""
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(draw, 0)
        for step in range(1, steps + 1):
            batch = coming.result()
            if step < steps:
                coming = pool.submit(draw, step)
            yield batch


def fit_facts(pupil: Pupil, tokenizer: object, device: torch.device, moving: float, steps: int = 250) -> None:
    """Trains the heads that read a phrase's facts off its end, on text twins, the language model untouched."""
    batcher = Batcher(tokenizer, 3)
    optimiser = torch.optim.AdamW(pupil.facts.parameters(), lr=1e-2)
    for step in range(steps):
        batch = batcher.draw(Diet(32, 1, moving=moving), "text").to(device)
        with torch.no_grad():
            pupil(batch)
        loss = pupil.summary_loss(batch)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        if step == steps - 1:
            _say(f"facts read off phrases: loss {loss.item():.4f}")
    pupil.facts.requires_grad_(False)


def teach_tower(pupil: Pupil, tokenizer: object, device: torch.device, stage: Stage, rows: int = 64) -> None:
    """Trains the tower alone to name what stands in each cell, and in its summary what the scene holds: its pre-training."""
    assert pupil.sense is not None
    batcher, telling = Batcher(tokenizer, 4), pupil.sense.telling
    weights = [*pupil.sense.tower.parameters(), *pupil.cells.parameters(), *pupil.presence.parameters()]
    weights = [weight for weight in weights if weight.requires_grad]
    optimiser = torch.optim.AdamW(weights, lr=stage.tower_rate, weight_decay=0.05, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, _warm_then_cosine(stage.tower_steps))
    start = time.time()
    unseen = Batcher(tokenizer, 5).glimpses(256, telling, held_out=True).to(device)
    batches = ahead(lambda step: batcher.glimpses(rows, telling, odd=stage.odd), stage.tower_steps)
    for step, batch in enumerate(drawn.to(device) for drawn in batches):
        guess = pupil.look(batch)
        loss = pupil.cell_loss(batch)
        if guess is not None:
            loss = loss + 5 * presence_loss(guess, batch.presence)
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimiser.step()
        schedule.step()
        if step % 100 == 99 or step == stage.tower_steps - 1:
            with torch.no_grad():
                pupil.look(unseen)
                named = zip(("colour", "name", "move"), pupil.cell_accuracy(unseen), strict=False)
            shown = " ".join(f"{fact} {share:.3f}" for fact, share in named)
            _say(f"tower {step + 1} loss {loss.item():.3f} {(time.time() - start) / 60:.1f} min | {shown}")


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _warm_then_cosine(steps: int) -> Callable[[int], float]:
    return lambda step: min(1.0, (step + 1) / 100) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / steps)))


def _diet(stage: Stage, done: float) -> Diet:
    if done < stage.first:
        return Diet(stage.rows, stage.questions, BINDING, long=0.0, bare=0.7, sizes=(2, 2))
    if done < stage.short_until:
        return Diet(stage.rows, stage.questions, stage.kinds, long=0.0, bare=0.3, moving=stage.moving)
    return Diet(stage.rows, stage.questions, stage.kinds, long=0.55, moving=stage.moving, odd=stage.odd)


def _telling(batcher: Batcher, stage: Stage) -> Telling:
    names, shares = zip(*stage.tellings, strict=True)
    return names[int(batcher.rng.choice(len(names), p=shares))]


@torch.no_grad()
def checkpoint_accuracy(
    pupil: Pupil,
    tokenizer: object,
    telling: Telling,
    kinds: tuple[str, ...],
    scenes: int,
    device: torch.device,
    seed: int = 1,
    long: float = 0.5,
) -> dict[str, tuple[int, int]]:
    """Hits and questions per kind on held-out scenes, `all` last."""
    batcher = Batcher(tokenizer, seed)
    tally: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    moving = 1.0 if "direction" in kinds else 0.0
    for _ in range(scenes // 32):
        batch = batcher.draw(Diet(32, 10, kinds, long=long, moving=moving, held_out=True), telling).to(device)
        logits, _ = pupil(batch)
        guessed = logits.argmax(-1)[::2]  # every answer is one token and the end mark
        right = guessed == batch.ids[batch.answers][::2]
        for question, hit in zip((q for row in batch.questions for q in row), right.tolist(), strict=True):
            for key in (question.kind, "all"):
                tally[key][0] += hit
                tally[key][1] += 1
    return {kind: (tally[kind][0], tally[kind][1]) for kind in (*kinds, "all")}
