"""Training batches: one scene, many questions, each question blind to the others.

A row holds a prefix (system words and the picture or the text twin) and then several questions with their answers.
The attention mask lets each question see the prefix and itself only, and its positions start where the prefix ends, so
that every question is trained exactly as it will be asked: alone.
"""

from dataclasses import dataclass
from functools import cache
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from studies.demo import picture, world
from studies.demo.build import INPUT, PATCH, SYSTEM
from studies.demo.data import SUFFIX

Telling = Literal["text", "picture", "nothing"]
IMAGE_TOKENS = (INPUT // PATCH) ** 2


@dataclass(frozen=True)
class Diet:
    """What a batch is made of."""

    rows: int
    questions: int
    kinds: tuple[str, ...] = world.PICTURE_KINDS
    long: float = 0.5  # share of long phrasings
    bare: float = 0.0  # share of questions without suffix and header: the answer follows the question's last word
    unsuffixed: float = 0.15  # share of the other questions without the answer-format suffix
    sizes: tuple[int, int] = (3, 7)  # things in a scene
    moving: float = 0.0  # share of scenes in which things move
    held_out: bool = False


@dataclass
class Batch:
    """Row-wise tensors of one batch, and the questions that stand in each row."""

    ids: Tensor  # batch position
    positions: Tensor  # batch position
    mask: Tensor  # batch 1 position position, True where attention may look
    answers: Tensor  # batch position: True where the token is part of an answer
    pixels: Tensor | None  # batch 3 height width
    presence: Tensor  # batch (colour x name), 1 where the scene holds that combination
    cells: Tensor  # (batch, cell, 2): colour and name of what stands in each cell, one past the last where nothing does
    phrases: Tensor  # (batch, position, 4): colour, name, cell and move at the end of each phrase of a twin, -1 elsewhere
    questions: list[list[world.Question]]

    def to(self, device: torch.device) -> "Batch":
        moved = {k: v.to(device) for k, v in vars(self).items() if isinstance(v, Tensor)}
        return Batch(**{**vars(self), **moved})


class Batcher:
    """Draws scenes and lays them out; the same seed gives the same batches."""

    def __init__(self, tokenizer: object, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.encode = cache(lambda text: tuple(tokenizer.encode(text, add_special_tokens=False)))  # type: ignore[attr-defined]
        self.image_id = tokenizer.image_token_id  # type: ignore[attr-defined]

    def draw(self, diet: Diet, telling: Telling) -> Batch:
        drawn = [self._asked(diet) for _ in range(diet.rows)]
        scenes, asked = [scene for scene, _ in drawn], [questions for _, questions in drawn]
        rows = [self._row(scene, questions, diet, telling) for scene, questions in zip(scenes, asked, strict=True)]
        pixels = None
        if telling == "picture":
            pixels = torch.stack([pixels_of(scene, diet.held_out) for scene in scenes])
        return _pad(rows, pixels, scenes, asked)

    def pictures(self, rows: int, held_out: bool = False) -> Batch:
        """Pictures of scenes and what stands where, without questions."""
        scenes = [world.sample_scene(self.rng, held_out) for _ in range(rows)]
        blank: list[tuple] = [([self.image_id], [0], [0], [False], {}) for _ in scenes]
        return _pad(blank, torch.stack([pixels_of(scene, held_out) for scene in scenes]), scenes, [[] for _ in scenes])

    def _asked(self, diet: Diet) -> tuple[world.Scene, list[world.Question]]:
        """A scene and questions about it; a scene that allows none of the kinds is passed over."""
        while True:
            scene = world.sample_scene(self.rng, diet.held_out, self.rng.random() < diet.moving, diet.sizes)
            questions = [world.ask(self.rng, scene, diet.kinds, diet.long) for _ in range(diet.questions)]
            if None not in questions:
                return scene, [question for question in questions if question]

    def _row(self, scene: world.Scene, questions: list[world.Question], diet: Diet, telling: Telling) -> tuple:
        prefix = list(self.encode(f"<s>{SYSTEM} USER:"))
        ends: dict[int, tuple[int, int, int, int]] = {}
        if telling == "picture":
            prefix += [self.image_id] * IMAGE_TOKENS
        elif telling == "text":
            for thing in scene.things:
                prefix += self.encode(f" {world.phrase(thing)}")
                ends[len(prefix) - 1] = _facts(thing)
        ids, positions, blocks, answers = list(prefix), list(range(len(prefix))), [0] * len(prefix), [False] * len(prefix)
        for block, question in enumerate(questions, 1):
            end = "" if self.rng.random() < diet.bare else " ASSISTANT:"
            if end and self.rng.random() > diet.unsuffixed:
                end = f" {SUFFIX}{end}"
            body = self.encode(f" {question.text}") + self.encode(end)
            answer = self.encode(f" {question.answer.capitalize()}</s>")
            ids += body + answer
            positions += range(len(prefix), len(prefix) + len(body) + len(answer))
            blocks += [block] * (len(body) + len(answer))
            answers += [False] * len(body) + [True] * len(answer)
        return ids, positions, blocks, answers, ends


def pixels_of(scene: world.Scene, held_out: bool) -> Tensor:
    """The picture as the demo's image processor gives it: averaged to 64 x 64, (x / 255 - 0.25) / 0.25."""
    image, _ = picture.draw(scene, held_out)
    small = np.asarray(image.resize((INPUT, INPUT), Image.Resampling.BOX), np.float32)
    return torch.from_numpy((small / 255 - 0.25) / 0.25).permute(2, 0, 1)


def _facts(thing: world.Thing) -> tuple[int, int, int, int]:
    move = world.MOVES.index(thing.move) if thing.move else len(world.MOVES)
    return world.COLOURS.index(thing.colour), world.NAMES.index(thing.name), thing.cell, move


def _presence(scene: world.Scene) -> Tensor:
    table = torch.zeros(len(world.COLOURS), len(world.NAMES))
    for thing in scene.things:
        table[world.COLOURS.index(thing.colour), world.NAMES.index(thing.name)] = 1
    return table.flatten()


def _pad(rows: list[tuple], pixels: Tensor | None, scenes: list[world.Scene], questions: list) -> Batch:
    length = max(len(row[0]) for row in rows)

    def column(index: int, fill: int) -> Tensor:
        return torch.tensor([list(row[index]) + [fill] * (length - len(row[index])) for row in rows])

    blocks = column(2, -1)
    phrases = torch.full((len(rows), length, 4), -1)
    for number, row in enumerate(rows):
        for position, facts in row[4].items():
            phrases[number, position] = torch.tensor(facts)
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    same = (blocks[:, None, :] == blocks[:, :, None]) | (blocks[:, None, :] == 0)
    return Batch(
        ids=column(0, 0), positions=column(1, 0), mask=(causal & same)[:, None], answers=column(3, 0).bool(),
        pixels=pixels, presence=torch.stack([_presence(scene) for scene in scenes]),
        cells=torch.stack([_cells(scene) for scene in scenes]), phrases=phrases, questions=questions,
    )  # fmt: skip


def _cells(scene: world.Scene) -> Tensor:
    table = torch.tensor([[len(world.COLOURS), len(world.NAMES)]] * len(world.CELLS))
    for thing in scene.things:
        table[thing.cell] = torch.tensor([world.COLOURS.index(thing.colour), world.NAMES.index(thing.name)])
    return table
