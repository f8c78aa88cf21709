"""The bundled world as a data set: held-out scenes as Examples, told in pictures, sentences, clips or sounds."""

from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
from PIL import Image

from probe.example import Example, Region
from studies.demo import clip, picture, sound, world

SUFFIX = "Answer briefly."
SEED = 20_000
KINDS = {"clip": tuple(world.ASKERS)}  # things move in clips; the other tellings answer PICTURE_KINDS


def examples(
    count: int, telling: str = "picture", seed: int = SEED, kinds: tuple[str, ...] | None = None
) -> list[Example]:  # fmt: skip
    """`count` questions, each about its own scene with an unseen combination and unseen handwriting; kinds in turn.

    `telling` is `picture` (a 128 x 128 picture), `text` (the text twin before the question), `clip` (four frames) or
    `sound` (two seconds). `kinds` are all that the telling has answers to, unless some are named.
    """
    kinds = kinds or KINDS.get(telling, world.PICTURE_KINDS)
    rng = np.random.default_rng(seed)
    return [
        as_example(number, scene, question, telling)
        for number, (scene, question) in enumerate(world.held_out(rng, count, kinds))
    ]


def as_example(number: int, scene: world.Scene, question: world.Question, telling: str) -> Example:
    """A question about a scene as an Example, told in pictures, sentences, clips or sounds."""
    tags = {"kind": question.kind, "phrasing": question.phrasing, "split": question.split, **facts(scene, question)}
    common: dict[str, Any] = {
        "id": f"demo-{number:05d}", "prompt": question.text, "suffix": SUFFIX, "answer": question.answer,
        "choices": (question.answer, question.distractor), "tags": {key: value for key, value in tags.items() if value},
    }  # fmt: skip
    if telling == "text":
        return Example(**common, context=world.twin(scene))
    if telling == "clip":
        return Example(**common, videos=(partial(_clip, scene),))
    if telling == "sound":
        return Example(**common, sounds=(partial(_sound, scene),))
    boxes = picture.draw(scene, held_out=True)[1]
    regions = tuple(Region(boxes[thing], f"{thing.colour} {thing.name}") for thing in question.about)
    return Example(**common, images=(partial(_picture, scene),), regions=regions)


def everything(example: Example) -> tuple[Region, ...] | None:
    """Every thing of the scene that an example's picture was drawn from; None for a picture from elsewhere."""
    source = example.images[0] if example.images else None
    if not isinstance(source, partial) or source.func is not _picture:
        return None
    scene: world.Scene = source.args[0]
    boxes = picture.draw(scene, held_out=True)[1]
    return tuple(Region(boxes[thing], f"{thing.colour} {thing.name}") for thing in scene.things)


def facts(scene: world.Scene, question: world.Question) -> dict[str, str]:
    """What probes look for, as tags `fact:...`: of the first thing that the question is about, if any, and of the whole scene."""
    thing = question.about[0] if question.about else None
    of_thing = {"colour": thing.colour, "name": thing.name, "cell": world.CELLS[thing.cell]} if thing else {}
    of_scene = {"things": str(len(scene.things)), "circle": "there" if scene.named("circle") else "not there"}
    return {f"fact:{name}": value for name, value in {**of_thing, **of_scene}.items()}


def _picture(scene: world.Scene) -> Image.Image:
    return picture.draw(scene, held_out=True)[0]


def _clip(scene: world.Scene) -> tuple[list[Image.Image], list[float]]:
    filmed = clip.film(scene, held_out=True)
    return list(filmed.frames), list(filmed.times)


def _sound(scene: world.Scene) -> tuple[np.ndarray, int]:
    return sound.play(scene, held_out=True)[0], sound.RATE


def furnished(example: Example) -> Example:
    """The example with a region for every thing in its picture, not only those that it asks about; as it is without such a picture."""
    regions = everything(example)
    return example if regions is None else replace(example, regions=regions)


def twin(example: Example) -> str:
    """The scene of one of these examples as a sentence; empty for an example that shows no scene of this world."""
    shown = [medium for media in example.media.values() for medium in media]
    makers = (_picture, _clip, _sound)
    scenes = [one.args[0] for one in shown if isinstance(one, partial) and one.func in makers]
    return world.twin(scenes[0]) if len(scenes) == len(shown) == 1 else ""


def chance(items: list[Example]) -> float:
    """Accuracy of the best constant answer to each kind of question."""
    by_kind: dict[str, list[str]] = {}
    for item in items:
        by_kind.setdefault(item.tags["kind"], []).append(item.answer or "")
    best = sum(max(answers.count(answer) for answer in set(answers)) for answers in by_kind.values())
    return best / len(items)
