"""Training batches: one scene, many questions, each question blind to the others.

A row holds a prefix (system words and the picture or the text twin) and then several questions with their answers.
The attention mask lets each question see the prefix and itself only, and its positions start where the prefix ends, so
that every question is trained exactly as it will be asked: alone.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from studies.demo import clip, picture, sound, world
from studies.demo.build import INPUT, PATCH, STRIDE, SYSTEM, extractor
from studies.demo.data import SUFFIX

UNNAMED = -100  # the colour of a thing whose colour has no name: what cross-entropy leaves out
Telling = Literal["text", "picture", "clip", "sound", "nothing"]


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
    odd: float = 0.0  # share of things in colours without a name (pictures only)


@dataclass
class Batch:
    """Row-wise tensors of one batch, and the questions that stand in each row."""

    ids: Tensor  # batch position
    positions: Tensor  # batch position
    mask: Tensor  # batch 1 position position, True where attention may look
    answers: Tensor  # batch position: True where the token is part of an answer
    shown: Tensor | None  # pictures: batch 3 height width; clips: batch frame 3 height width; sounds: batch mel time
    presence: Tensor  # batch (colour x name), 1 where the scene holds that combination
    cells: Tensor  # (batch, cell, 3): colour, name and move of what stands in each cell, one past the last where nothing does
    phrases: Tensor  # (batch, position, 4): colour, name, cell and move at the end of each phrase of a twin, -1 elsewhere
    barred: Tensor  # (batch, position, 2): answers that would make a combination kept from training, -1 elsewhere
    mentions: Tensor  # batch position: colour of the thing that a word of a `compare` question names, -1 elsewhere
    questions: list[list[world.Question]]

    def to(self, device: torch.device) -> "Batch":
        moved = {k: v.to(device) for k, v in vars(self).items() if isinstance(v, Tensor)}
        return Batch(**{**vars(self), **moved})


class Batcher:
    """Draws scenes and lays them out; the same seed gives the same batches."""

    def __init__(self, tokenizer: object, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.encode = cache(lambda text: tuple(tokenizer.encode(text, add_special_tokens=False)))  # type: ignore[attr-defined]
        self.marks = {telling: tokenizer.convert_tokens_to_ids(show.mark) for telling, show in SHOWS.items()}  # type: ignore[attr-defined]

    def draw(self, diet: Diet, telling: Telling) -> Batch:
        drawn = [self._asked(diet, diet.odd if telling == "picture" else 0.0) for _ in range(diet.rows)]
        scenes, asked = [scene for scene, _ in drawn], [questions for _, questions in drawn]
        rows = [self._row(scene, questions, diet, telling) for scene, questions in zip(scenes, asked, strict=True)]
        shown = None
        if telling in SHOWS:
            shown = torch.stack([SHOWS[telling].render(scene, diet.held_out) for scene in scenes])
        return _pad(rows, shown, scenes, asked)

    def glimpses(self, rows: int, telling: Telling, held_out: bool = False, odd: float = 0.0) -> Batch:
        """What scenes look or sound like and what stands where, without questions; of a clip, one frame."""
        scenes = [world.sample_scene(self.rng, held_out, telling == "clip", odd=odd) for _ in range(rows)]
        blank: list[tuple] = [([self.marks[telling]], [0], [0], [False], {}, {}, {}) for _ in scenes]
        if telling == "clip":
            numbers = self.rng.integers(clip.FRAMES, size=rows).tolist()
            shown = [frames_of(scene, held_out, (number,)) for scene, number in zip(scenes, numbers, strict=True)]
        else:
            shown = [SHOWS[telling].render(scene, held_out) for scene in scenes]
        return _pad(blank, torch.stack(shown), scenes, [[] for _ in scenes])

    def _asked(self, diet: Diet, odd: float) -> tuple[world.Scene, list[world.Question]]:
        """A scene and questions about it; a scene that allows none of the kinds is passed over."""
        while True:
            scene = world.sample_scene(self.rng, diet.held_out, self.rng.random() < diet.moving, diet.sizes, odd)
            questions = [world.ask(self.rng, scene, diet.kinds, diet.long) for _ in range(diet.questions)]
            if None not in questions:
                return scene, [question for question in questions if question]

    def _row(self, scene: world.Scene, questions: list[world.Question], diet: Diet, telling: Telling) -> tuple:
        prefix = list(self.encode(f"<s>{SYSTEM} USER:"))
        ends: dict[int, tuple[int, int, int, int]] = {}
        if telling in SHOWS:
            prefix += [self.marks[telling]] * SHOWS[telling].positions
        elif telling == "text":
            for thing in scene.things:
                prefix += self.encode(f" {world.phrase(thing)}")
                ends[len(prefix) - 1] = _facts(thing)
        mentions: dict[int, int] = {}
        barred: dict[int, list[int]] = {}
        ids, positions, blocks, answers = list(prefix), list(range(len(prefix))), [0] * len(prefix), [False] * len(prefix)
        for block, question in enumerate(questions, 1):
            end = "" if self.rng.random() < diet.bare else " ASSISTANT:"
            if end and self.rng.random() > diet.unsuffixed:
                end = f" {SUFFIX}{end}"
            body = self.encode(f" {question.text}") + self.encode(end)
            answer = self.encode(f" {question.answer.capitalize()}</s>")
            barred[len(ids) + len(body)] = [self.encode(f" {word.capitalize()}")[0] for word in _kept_apart(question)]
            if question.kind == "compare":
                for thing in question.about:
                    word = len(ids) + body.index(self.encode(f" {thing.name}")[0])
                    mentions[word] = world.COLOURS.index(thing.colour)
            ids += body + answer
            positions += range(len(prefix), len(prefix) + len(body) + len(answer))
            blocks += [block] * (len(body) + len(answer))
            answers += [False] * len(body) + [True] * len(answer)
        return ids, positions, blocks, answers, ends, mentions, barred


def pixels_of(scene: world.Scene, held_out: bool) -> Tensor:
    """The picture as the demo's image processor gives it (3 height width)."""
    return _reduced(picture.draw(scene, held_out)[0])


def frames_of(scene: world.Scene, held_out: bool, numbers: Sequence[int] = range(clip.FRAMES)) -> Tensor:
    """The frames of the clip, or some of them, as the demo's image processor gives each (frame 3 height width)."""
    return torch.stack([_reduced(frame) for frame in clip.film(scene, held_out, numbers).frames])


def _reduced(image: Image.Image) -> Tensor:
    """Averaged to 64 x 64, (x / 255 - 0.25) / 0.25."""
    small = np.asarray(image.resize((INPUT, INPUT), Image.Resampling.BOX), np.float32)
    return torch.from_numpy((small / 255 - 0.25) / 0.25).permute(2, 0, 1)


def features_of(scene: world.Scene, held_out: bool) -> Tensor:
    """The sound as Whisper's feature extractor gives it (mel time)."""
    samples = sound.play(scene, held_out)[0]
    return torch.from_numpy(_extractor()([samples], sampling_rate=sound.RATE)["input_features"][0])


@cache
def _extractor() -> Any:
    return extractor()


@dataclass(frozen=True)
class Show:
    """What stands in a prompt for something shown, how many positions it takes, and what the tower is given."""

    mark: str
    positions: int
    render: Callable[[world.Scene, bool], Tensor]


SHOWS: dict[str, Show] = {
    "picture": Show("<image>", (INPUT // PATCH) ** 2, pixels_of),
    "clip": Show("<video>", clip.FRAMES * (INPUT // PATCH // 2) ** 2, frames_of),
    "sound": Show("<audio>", sound.SAMPLES // STRIDE, features_of),
}


def _kept_apart(question: world.Question) -> list[str]:
    """The answers that would join the question's thing or colour to what training never shows it with."""
    if question.kind == "color":
        return [colour for colour, name in world.HELD_OUT if name == question.about[0].name]
    if question.kind == "thing":
        return [name for colour, name in world.HELD_OUT if colour == question.about[0].colour]
    return []


def _facts(thing: world.Thing) -> tuple[int, int, int, int]:
    move = world.MOVES.index(thing.move) if thing.move else len(world.MOVES)
    colour = UNNAMED if thing.colour == world.ODD else world.COLOURS.index(thing.colour)
    return colour, world.NAMES.index(thing.name), thing.cell, move


def _presence(scene: world.Scene) -> Tensor:
    table = torch.zeros(len(world.COLOURS), len(world.NAMES))
    for thing in (thing for thing in scene.things if thing.colour != world.ODD):
        table[world.COLOURS.index(thing.colour), world.NAMES.index(thing.name)] = 1
    return table.flatten()


def _pad(rows: list[tuple], shown: Tensor | None, scenes: list[world.Scene], questions: list) -> Batch:
    length = max(len(row[0]) for row in rows)

    def column(index: int, fill: int) -> Tensor:
        return torch.tensor([list(row[index]) + [fill] * (length - len(row[index])) for row in rows])

    blocks = column(2, -1)
    phrases = torch.full((len(rows), length, 4), -1)
    for number, row in enumerate(rows):
        for position, facts in row[4].items():
            phrases[number, position] = torch.tensor(facts)
    mentions = torch.full((len(rows), length), -1)
    for number, row in enumerate(rows):
        for position, colour in row[5].items():
            mentions[number, position] = colour
    barred = torch.full((len(rows), length, 2), -1)
    for number, row in enumerate(rows):
        for position, words in row[6].items():
            barred[number, position, : len(words)] = torch.tensor(words, dtype=torch.long)
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    same = (blocks[:, None, :] == blocks[:, :, None]) | (blocks[:, None, :] == 0)
    return Batch(
        ids=column(0, 0), positions=column(1, 0), mask=(causal & same)[:, None], answers=column(3, 0).bool(),
        shown=shown, presence=torch.stack([_presence(scene) for scene in scenes]),
        cells=torch.stack([_cells(scene) for scene in scenes]), phrases=phrases, mentions=mentions, barred=barred,
        questions=questions,
    )  # fmt: skip


def _cells(scene: world.Scene) -> Tensor:
    table = torch.tensor([[len(world.COLOURS), len(world.NAMES), len(world.MOVES)]] * len(world.CELLS))
    for thing in scene.things:
        colour, name, _, move = _facts(thing)
        table[thing.cell] = torch.tensor([colour, name, move])
    return table
