"""Scenes as clips: the things of a picture, each crossing its cell, with the box of each thing in each frame.

A thing goes from one side of its cell to the other, REACH pixels on either side of the middle. It reaches into the next
cells, but its middle never leaves its own: **its place is the cell of the first frame**, and of every other frame too,
so that every question about a picture has the same answer for a clip. At the lower edge a bar grows with time, as
players draw it: a model that encodes each frame by itself can see that a thing stands left of its cell's middle, and
without the bar not whether it is coming or going. A frame without its bar begins one clip and ends another.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from studies.demo.picture import CELL, SIZE, Box, develop, ground, paint, silhouette, tint
from studies.demo.world import Scene, Thing

FRAMES = 4
INTERVAL = 0.25  # seconds from one frame to the next
REACH, JITTER = 9, 2  # pixels: half of a thing's way, and how far from the middle of the cell the way may pass
BAR = 4  # height of the bar, pixels
STEPS = {None: (0, 0), "up": (0, -1), "down": (0, 1), "left": (-1, 0), "right": (1, 0)}  # across, down


@dataclass(frozen=True)
class Clip:
    """Frames (RGB, 128 x 128), the second at which each was taken, and the box of each thing in each."""

    frames: tuple[Image.Image, ...]
    times: tuple[float, ...]
    boxes: tuple[dict[Thing, Box], ...]


@dataclass(frozen=True)
class _Actor:
    thing: Thing
    form: np.ndarray
    colour: np.ndarray
    middle: tuple[float, float]  # of its way, pixels across and down

    def corner(self, number: int) -> tuple[int, int]:
        """Its left upper corner in a frame, pixels."""
        gone = REACH * (2 * number / (FRAMES - 1) - 1)
        x, y = (at + gone * step for at, step in zip(self.middle, STEPS[self.thing.move], strict=True))
        return round(x - len(self.form) / 2), round(y - len(self.form) / 2)


def film(scene: Scene, held_out: bool = False, numbers: Sequence[int] = range(FRAMES)) -> Clip:
    """The clip of a scene, or some of its frames; the same scene always gives the same frames. Things without a move stand."""
    rng = np.random.default_rng(scene.seed)
    still, actors = ground(rng), [_cast(thing, rng, held_out) for thing in scene.things]
    taken = [_frame(scene, still.copy(), actors, number) for number in numbers]
    frames, boxes = zip(*taken, strict=True)
    return Clip(frames, tuple(number * INTERVAL for number in numbers), boxes)


def _cast(thing: Thing, rng: np.random.Generator, held_out: bool) -> _Actor:
    form, colour = silhouette(thing.name, rng, held_out), tint(thing.colour, rng)
    x, y = ((place + 0.5) * CELL + float(rng.uniform(-JITTER, JITTER)) for place in (thing.column, thing.row))
    return _Actor(thing, form, colour, (x, y))


def _frame(scene: Scene, canvas: np.ndarray, actors: list[_Actor], number: int) -> tuple[Image.Image, dict[Thing, Box]]:
    boxes = {actor.thing: paint(canvas, actor.form, actor.colour, *actor.corner(number)) for actor in actors}
    canvas[-BAR:] = 20
    canvas[-BAR:, : SIZE * (number + 1) // FRAMES] = 230
    # Each frame has its own noise, whichever frames are asked for.
    return develop(canvas, np.random.default_rng((scene.seed, number))), boxes
