"""Scenes as pictures: coloured shapes and handwritten digits on a noisy, cluttered ground, with the box of each thing."""

from functools import cache

import numpy as np
from PIL import Image, ImageDraw

from studies.demo.world import DIGITS, GRID, ODD, Scene, Thing

SIZE = 128  # side of a picture, pixels
CELL = SIZE // GRID
RGB = {
    "red": (225, 45, 45), "green": (50, 180, 60), "blue": (55, 90, 235), "yellow": (240, 215, 50),
    "purple": (160, 60, 200), "orange": (245, 135, 30), "cyan": (60, 205, 220), "white": (240, 240, 240),
}  # fmt: skip
Box = tuple[float, float, float, float]  # left, top, right, bottom in pixels


@cache
def handwriting(held_out: bool) -> tuple[np.ndarray, ...]:
    """For each digit, the 8 x 8 images of scikit-learn's handwritten digits; a fifth of them is kept from training."""
    from sklearn.datasets import load_digits

    data = load_digits()
    kept = np.random.default_rng(7).random(len(data.target)) < 0.2
    chosen = kept if held_out else ~kept
    return tuple((data.images[chosen & (data.target == d)] * 15.9).astype(np.uint8) for d in range(10))


def draw(scene: Scene, held_out: bool = False) -> tuple[Image.Image, dict[Thing, Box]]:
    """The picture of a scene (RGB, 128 x 128) and the box of each thing; the same scene always gives the same picture."""
    rng = np.random.default_rng(scene.seed)
    canvas = ground(rng)
    boxes: dict[Thing, Box] = {}
    for thing in scene.things:
        form = silhouette(thing.name, rng, held_out)
        left, top = (int(rng.integers(0, CELL - len(form) + 1)) + CELL * place for place in (thing.column, thing.row))
        boxes[thing] = paint(canvas, form, tint(thing.colour, rng), left, top)
    return develop(canvas, rng), boxes


def tint(colour: str, rng: np.random.Generator) -> np.ndarray:
    """A colour as one thing wears it: its RGB, a little off."""
    plain = _odd(rng) if colour == ODD else np.array(RGB[colour])
    return np.clip(plain + rng.normal(0, 9, 3), 0, 255).astype(np.float32)


def _odd(rng: np.random.Generator) -> np.ndarray:
    """A colour that stands out from the ground and lies far from every colour with a name."""
    named = np.array(list(RGB.values()))
    while True:
        colour = rng.uniform(10, 255, 3)
        if colour.max() > 130 and np.linalg.norm(named - colour, axis=1).min() > 60:
            return colour


def paint(canvas: np.ndarray, form: np.ndarray, colour: np.ndarray, left: int, top: int) -> Box:
    """Lays a colour over the canvas (height x width x 3, in place) where the form covers it, cut at the edges; its box."""
    form = form[max(0, -top) : SIZE - top, max(0, -left) : SIZE - left]
    left, top = max(0, left), max(0, top)
    window = canvas[top : top + form.shape[0], left : left + form.shape[1]]
    window += form[..., None] * (colour - window)
    rows, columns = np.nonzero(form.max(1) > 0.3)[0], np.nonzero(form.max(0) > 0.3)[0]
    return float(left + columns[0]), float(top + rows[0]), float(left + columns[-1] + 1), float(top + rows[-1] + 1)


def develop(canvas: np.ndarray, rng: np.random.Generator) -> Image.Image:
    """The canvas with the noise of a camera, as a picture."""
    return Image.fromarray(np.uint8(np.clip(canvas + 5 * rng.standard_normal(canvas.shape, np.float32), 0, 255)))


def ground(rng: np.random.Generator) -> np.ndarray:
    """A grey slope with clutter: strokes and specks that belong to no thing."""
    level, slope = rng.uniform(25, 85), rng.uniform(-25, 25, 2)
    axis = np.linspace(-0.5, 0.5, SIZE)
    grey = level + slope[0] * axis[:, None] + slope[1] * axis[None, :]
    picture = Image.fromarray(np.uint8(np.clip(grey, 0, 255)))
    pen = ImageDraw.Draw(picture)
    for _ in range(int(rng.integers(4, 11))):
        x, y = rng.uniform(0, SIZE, 2)
        dx, dy = rng.uniform(-14, 14, 2)
        pen.line((x, y, x + dx, y + dy), fill=int(rng.uniform(10, 150)), width=int(rng.integers(1, 3)))
    return np.repeat(np.asarray(picture, np.float32)[..., None], 3, axis=2)


def silhouette(name: str, rng: np.random.Generator, held_out: bool) -> np.ndarray:
    """How much of each pixel a thing covers, in [0, 1], on a square of 24 to 28 pixels."""
    size, angle = int(rng.integers(24, 29)), float(rng.uniform(-10, 10))
    if name in DIGITS:
        samples = handwriting(held_out)[DIGITS.index(name)]
        digit = Image.fromarray(samples[int(rng.integers(len(samples)))])
        stretched = digit.resize((size, size), Image.Resampling.BICUBIC).rotate(angle, Image.Resampling.BILINEAR)
        return np.asarray(stretched, np.float32) / 255
    big = Image.new("L", (2 * size, 2 * size))
    _outline(name, ImageDraw.Draw(big), 2 * size)
    return np.asarray(big.rotate(angle, Image.Resampling.BILINEAR).reduce(2), np.float32) / 255


def _outline(name: str, pen: ImageDraw.ImageDraw, size: int) -> None:
    def at(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
        return [(x * size, y * size) for x, y in points]

    match name:
        case "circle":
            pen.ellipse(at([(0.08, 0.08), (0.92, 0.92)]), fill=255)
        case "square":
            pen.rectangle(at([(0.14, 0.14), (0.86, 0.86)]), fill=255)
        case "triangle":
            pen.polygon(at([(0.5, 0.06), (0.94, 0.88), (0.06, 0.88)]), fill=255)
        case "diamond":
            pen.polygon(at([(0.5, 0.02), (0.9, 0.5), (0.5, 0.98), (0.1, 0.5)]), fill=255)
        case "cross":
            pen.rectangle(at([(0.36, 0.06), (0.64, 0.94)]), fill=255)
            pen.rectangle(at([(0.06, 0.36), (0.94, 0.64)]), fill=255)
        case "star":
            angles = [np.pi * (k / 5 - 0.5) for k in range(10)]
            radii = [0.5, 0.2] * 5
            pen.polygon(
                at([(0.5 + r * np.cos(a), 0.52 + r * np.sin(a)) for a, r in zip(angles, radii, strict=False)]), fill=255
            )
