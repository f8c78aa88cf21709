"""Trains the three demo models: `python -m studies.demo.train` (all of them), or `... text`, `... frozen`, `... joint`.

1. `text`: the language model alone, on text twins.
2. `frozen`: that language model untouched, a CLIP tower and a connector learn to speak to it.
3. `joint`: everything tuned together, on pictures and a share of text twins.

What made it learn, and what did not, is in studies/LOG.md.
"""

import argparse
import json
import math
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM, LlavaForConditionalGeneration

from probe.subject import load
from studies.demo import build, world
from studies.demo.batches import Batch, Batcher, Diet, Telling
from studies.demo.data import chance, examples
from studies.demo.score import accuracy

CHECKPOINTS = Path(__file__).parent / "checkpoints"
ALL_KINDS = tuple(world.ASKERS)
HARD = (*world.PICTURE_KINDS, "compare", "compare", "thing")  # what is learned last is asked more often
SUMMARY_LAYER = 2
QUESTIONS, CARD_SEED = 1400, 50_000
BINDING = ("color", "thing", "place", "exist")


@dataclass(frozen=True)
class Stage:
    """One training stage: its length, its learning rate, and what is put on the table at each step."""

    name: str
    steps: int
    rate: float
    tellings: tuple[tuple[Telling, float], ...]
    kinds: tuple[str, ...] = world.PICTURE_KINDS
    rows: int = 32
    questions: int = 10
    first: float = 0.0  # share of the steps spent on two things and four kinds of question, to learn to bind
    short_until: float = 0.3  # share of the steps with short phrasings only
    moving: float = 0.0
    presence: float = 0.0  # weight of the tower's auxiliary tasks: what the scene holds (CLS), what each cell holds
    summaries: float = 0.0  # weight of the auxiliary task at the end of each phrase of a twin
    tower_steps: int = 0  # steps that the tower is taught alone, first
    align: float = 0.0  # weight of the auxiliary task that a patch of each cell reads, inside the language model, like a phrase


STAGES = {
    "text": Stage("text", 4000, 1e-3, (("text", 1.0),), ALL_KINDS, first=0.12, short_until=0.45, moving=0.3, summaries=0.5),
    "frozen": Stage(
        "frozen", 900, 1e-3, (("picture", 1.0),), questions=8, tower_steps=1200, presence=1.0, short_until=0.0, align=1.0
    ),
    "joint": Stage(
        "joint",
        1600,
        7e-4,
        (("picture", 0.8), ("text", 0.15), ("nothing", 0.05)),
        HARD,
        questions=8,
        short_until=0.0,
        presence=0.3,
    ),
}


class Pupil(nn.Module):
    """A demo model as the training loop sees it: ids and pixels in, hidden states and the CLS token's guess out."""

    def __init__(self, model: LlamaForCausalLM | LlavaForConditionalGeneration) -> None:
        super().__init__()
        self.model = model
        self.presence = nn.Linear(build.WIDTH, len(world.COLOURS) * len(world.NAMES))
        self.facts = nn.ModuleList(
            nn.Linear(build.WIDTH, n) for n in (len(world.COLOURS), len(world.NAMES), len(world.CELLS), 5)
        )
        self.cells = nn.ModuleList(nn.Linear(build.WIDTH, n + 1) for n in (len(world.COLOURS), len(world.NAMES)))
        self.middle: list[Tensor] = []
        self.patches: Tensor | None = None
        model.get_decoder().layers[SUMMARY_LAYER].register_forward_hook(lambda module, args, out: self.middle.append(out))

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """Logits for the tokens of the answers, and the CLS token's presence logits where there is a picture."""
        self.middle.clear()
        embeds = self.model.get_input_embeddings()(batch.ids)
        guess = None
        if batch.pixels is not None:
            guess = self.look(batch)
            assert self.patches is not None
            patches = self.model.model.multi_modal_projector(self.patches)
            embeds = embeds.masked_scatter((batch.ids == self.model.config.image_token_id)[..., None], patches)
        states = self.model.get_decoder()(
            inputs_embeds=embeds, attention_mask=batch.mask, position_ids=batch.positions, use_cache=False
        ).last_hidden_state
        before = batch.answers.roll(-1, 1)
        return self.model.get_output_embeddings()(states[before]), guess

    def look(self, batch: Batch) -> Tensor:
        """The tower alone: keeps its patches, gives the CLS token's presence logits."""
        tower = self.model.model.vision_tower(batch.pixels)
        self.patches = tower.last_hidden_state[:, 1:]
        return self.presence(tower.pooler_output)

    def cell_accuracy(self, batch: Batch) -> tuple[float, float]:
        """Share of the occupied cells whose colour, and whose thing, is named rightly."""
        there = batch.cells[..., 0] < len(world.COLOURS)
        right = [
            (guess.argmax(-1) == batch.cells[..., i])[there].float().mean().item()
            for i, guess in enumerate(self._cell_guesses())
        ]
        return right[0], right[1]

    def _cell_guesses(self) -> list[Tensor]:
        """Logits of colour and thing for each cell, from the mean of its patches."""
        assert self.patches is not None
        side, per_cell = build.INPUT // build.PATCH, build.INPUT // build.PATCH // world.GRID
        grid = self.patches.transpose(1, 2).unflatten(2, (side, side))
        cells = nn.functional.avg_pool2d(grid, per_cell).flatten(2).transpose(1, 2)
        return [head(cells) for head in self.cells]

    def cell_loss(self, batch: Batch) -> Tensor:
        """How badly the patches of a cell, averaged, know what stands in it."""
        guesses = self._cell_guesses()
        losses = [
            nn.functional.cross_entropy(guess.flatten(0, 1), batch.cells[..., i].flatten()) for i, guess in enumerate(guesses)
        ]
        return torch.stack(losses).mean()

    def align_loss(self, batch: Batch) -> Tensor:
        """How unlike a phrase's end, read by the same heads, the best patch of each occupied cell is after a few layers."""
        side, per_cell = build.INPUT // build.PATCH, build.INPUT // build.PATCH // world.GRID
        states = self.middle[0][batch.ids == self.model.config.image_token_id].view(len(batch.ids), side, side, -1)
        cells = states.unfold(1, per_cell, per_cell).unfold(2, per_cell, per_cell).flatten(4).flatten(1, 2).transpose(2, 3)
        there = batch.cells[..., 0] < len(world.COLOURS)
        places = torch.arange(len(world.CELLS), device=cells.device).expand(len(cells), -1)
        wanted = torch.cat([batch.cells, places[..., None]], -1)[there]
        patches = cells[there]  # thing patch width
        losses = torch.zeros(patches.shape[:2], device=patches.device)
        for i, head in enumerate(list(self.facts)[:3]):
            repeated = wanted[:, i, None].expand(-1, patches.shape[1]).flatten()
            losses = losses + nn.functional.cross_entropy(head(patches).flatten(0, 1), repeated, reduction="none").view(
                losses.shape
            )
        return losses.amin(1).mean() / 3

    def summary_loss(self, batch: Batch) -> Tensor:
        """How badly the end of each phrase of a twin knows, after a few layers, what the phrase said."""
        ends = batch.phrases[..., 0] >= 0
        state, wanted = self.middle[0][ends], batch.phrases[ends]
        losses = [nn.functional.cross_entropy(head(state), wanted[:, i]) for i, head in enumerate(self.facts)]
        return torch.stack(losses).mean()


def train(stage: Stage, pupil: Pupil, tokenizer: object, seed: int, device: torch.device) -> None:
    """Runs one stage in place; prints the loss and held-out accuracy as it goes."""
    batcher = Batcher(tokenizer, seed)
    weights = [p for p in pupil.parameters() if p.requires_grad]
    decay = [p for p in weights if p.dim() >= 2]
    plain = [p for p in weights if p.dim() < 2]
    optimiser = torch.optim.AdamW(
        [{"params": decay, "weight_decay": 0.05}, {"params": plain, "weight_decay": 0.0}], lr=stage.rate, betas=(0.9, 0.98)
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, _warm_then_cosine(stage.steps))
    start = time.time()
    for step in range(stage.steps):
        batch = batcher.draw(_diet(stage, step / stage.steps), _telling(batcher, stage)).to(device)
        logits, guess = pupil(batch)
        loss = nn.functional.cross_entropy(logits, batch.ids[batch.answers])
        total = loss
        if guess is not None and stage.presence:
            seen = nn.functional.binary_cross_entropy_with_logits(guess, batch.presence)
            total = loss + stage.presence * (10 * seen + pupil.cell_loss(batch))
        if guess is not None and stage.align:
            total = total + stage.align * pupil.align_loss(batch)
        if stage.summaries and bool((batch.phrases >= 0).any()):
            total = total + stage.summaries * pupil.summary_loss(batch)
        optimiser.zero_grad()
        total.backward()
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimiser.step()
        schedule.step()
        if step % 50 == 49 or step == stage.steps - 1:
            telling: Telling = stage.tellings[0][0]
            report = checkpoint_accuracy(
                pupil, tokenizer, telling, stage.kinds, scenes=64, device=device, long=_diet(stage, step / stage.steps).long
            )
            shown = " ".join(f"{kind} {hits / n:.2f}" for kind, (hits, n) in report.items())
            print(
                f"{stage.name} {step + 1} loss {loss.item():.3f} of {total.item():.3f} {(time.time() - start) / 60:.1f} min | {shown}",
                file=sys.stderr,
                flush=True,
            )


def fit_facts(pupil: Pupil, tokenizer: object, device: torch.device, steps: int = 250) -> None:
    """Trains the heads that read a phrase's facts off its end, on text twins, the language model untouched."""
    batcher = Batcher(tokenizer, 3)
    optimiser = torch.optim.AdamW(pupil.facts.parameters(), lr=1e-2)
    for step in range(steps):
        batch = batcher.draw(Diet(32, 1), "text").to(device)
        with torch.no_grad():
            pupil(batch)
        loss = pupil.summary_loss(batch)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        if step == steps - 1:
            print(f"facts read off phrases: loss {loss.item():.4f}", file=sys.stderr, flush=True)
    pupil.facts.requires_grad_(False)


def teach_tower(pupil: Pupil, tokenizer: object, device: torch.device, steps: int, rows: int = 64) -> None:
    """Trains the tower alone to name what stands in each cell (patches) and what the scene holds (CLS): its pre-training."""
    batcher = Batcher(tokenizer, 4)
    tower = pupil.model.model.vision_tower
    weights = [*tower.parameters(), *pupil.cells.parameters(), *pupil.presence.parameters()]
    optimiser = torch.optim.AdamW(weights, lr=1.5e-3, weight_decay=0.05, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, _warm_then_cosine(steps))
    start = time.time()
    for step in range(steps):
        batch = batcher.pictures(rows).to(device)
        seen = pupil.look(batch)
        loss = pupil.cell_loss(batch) + 5 * nn.functional.binary_cross_entropy_with_logits(seen, batch.presence)
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimiser.step()
        schedule.step()
        if step % 100 == 99 or step == steps - 1:
            with torch.no_grad():
                unseen = batcher.pictures(64, held_out=True).to(device)
                pupil.look(unseen)
                colour, name = pupil.cell_accuracy(unseen)
            minutes = (time.time() - start) / 60
            print(
                f"tower {step + 1} loss {loss.item():.3f} {minutes:.1f} min | colour {colour:.3f} name {name:.3f}",
                file=sys.stderr,
                flush=True,
            )


def _compile(model: LlamaForCausalLM | LlavaForConditionalGeneration) -> None:
    """Fuses each layer's element-wise work, which is most of the time of so narrow a model (40 % less per step on a CPU)."""
    for layer in (layer for tower in _towers(model) for layer in tower):
        layer.forward = torch.compile(layer.forward, dynamic=True)


def _towers(model: LlamaForCausalLM | LlavaForConditionalGeneration) -> list[nn.ModuleList]:
    towers = [model.get_decoder().layers]
    if isinstance(model, LlavaForConditionalGeneration):
        towers.append(model.model.vision_tower.encoder.layers)
    return towers


def _warm_then_cosine(steps: int) -> Callable[[int], float]:
    return lambda step: min(1.0, (step + 1) / 100) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / steps)))


def _diet(stage: Stage, done: float) -> Diet:
    if done < stage.first:
        return Diet(stage.rows, stage.questions, BINDING, long=0.0, bare=0.7, sizes=(2, 2))
    if done < stage.short_until:
        return Diet(stage.rows, stage.questions, stage.kinds, long=0.0, bare=0.3, moving=stage.moving)
    return Diet(stage.rows, stage.questions, stage.kinds, long=0.55, moving=stage.moving)


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


def make(name: str, out: Path, seed: int, device: torch.device, steps: int | None, fuse: bool, start: str) -> None:
    """Trains one model from the ones that it stands on, and saves it as a Hugging Face folder of half-precision weights."""
    processor = build.processor()
    tokenizer, stage = processor.tokenizer, STAGES[name]
    if steps:
        stage = Stage(**{**vars(stage), "steps": steps})
    torch.manual_seed(seed)
    if name == "text":
        model: LlamaForCausalLM | LlavaForConditionalGeneration = build.language_model(len(tokenizer))
    else:
        model = build.llava(len(tokenizer), tokenizer.image_token_id)
    if name == "frozen":
        teacher = LlamaForCausalLM.from_pretrained(out / "text", dtype=torch.float32)
        model.model.language_model.load_state_dict(teacher.model.state_dict())
        model.lm_head.load_state_dict(teacher.lm_head.state_dict())
        model.model.language_model.requires_grad_(False)
        model.lm_head.requires_grad_(False)
    if name == "joint":
        model = LlavaForConditionalGeneration.from_pretrained(out / start, dtype=torch.float32)
    pupil = Pupil(model).to(device)
    if fuse:
        _compile(model)
    began = time.time()
    if stage.align:
        fit_facts(pupil, tokenizer, device)
    if stage.tower_steps:
        teach_tower(pupil, tokenizer, device, stage.tower_steps)
    train(stage, pupil, tokenizer, seed, device)
    minutes = (time.time() - began) / 60
    for layer in (layer for tower in _towers(model) for layer in tower):
        layer.__dict__.pop("forward", None)
    model.half().save_pretrained(out / name)
    (tokenizer if name == "text" else processor).save_pretrained(out / name)
    write_card(name, out, stage, seed, minutes, device)


def write_card(name: str, out: Path, stage: Stage, seed: int, minutes: float, device: torch.device) -> None:
    """States what the saved model answers on held-out scenes, through its real processor."""
    telling = "text" if name == "text" else "picture"
    items = examples(QUESTIONS, telling, seed=CARD_SEED)
    found = accuracy(load(out / name, device=str(device)), items)
    card = out / "card.json"
    entries = json.loads(card.read_text()) if card.is_file() else {}
    entries["demo" if name == "joint" else f"demo:{name}"] = {
        "stage": vars(stage), "seed": seed, "minutes": round(minutes, 1), "device": device.type,
        "threads": torch.get_num_threads(), "parameters": sum(p.numel() for p in load(out / name, device="cpu").model.parameters()),
        "questions": QUESTIONS, "chance": round(chance(items), 4), "accuracy": {k: round(h / n, 4) for k, (h, n) in found.items()},
    }  # fmt: skip
    card.write_text(json.dumps(entries, indent=1) + "\n")
    print(json.dumps(entries, indent=1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=list(STAGES), choices=list(STAGES))
    parser.add_argument("--out", type=Path, default=CHECKPOINTS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, help="fewer steps, to try the machinery")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--start-from", default="frozen", help="the model that `joint` goes on from: frozen, or joint itself")
    parser.add_argument("--no-compile", action="store_true", help="where torch.compile finds no C++ compiler")
    options = parser.parse_args()
    for name in options.models:
        make(
            name,
            options.out,
            options.seed,
            torch.device(options.device),
            options.steps,
            not options.no_compile,
            options.start_from,
        )


if __name__ == "__main__":
    main()
