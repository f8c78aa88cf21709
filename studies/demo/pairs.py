"""Pairs of scenes that differ in one fact: the colour, the name or the place of the thing that is asked about.

Both scenes have one seed, and the new fact takes as many random draws to render as the old one did, so that every pixel outside
the cells of the changed thing is the same in both pictures.
"""

from dataclasses import replace

import numpy as np

from probe.example import Example
from studies.demo import world
from studies.demo.data import SEED, as_example

KINDS = ("color", "thing", "place")  # questions whose answer is one fact of one thing


def pairs(count: int, telling: str = "picture", seed: int = SEED) -> list[tuple[Example, Example]]:
    """`count` pairs of a clean and a corrupt Example with the same question and two right answers; kinds in turn.

    Their tags hold the pair and the role, as those of any other data set of pairs do.
    """
    found = world.held_out(np.random.default_rng(seed), count, KINDS)
    return [_pair(number, scene, question, telling, seed) for number, (scene, question) in enumerate(found)]


def _pair(number: int, scene: world.Scene, question: world.Question, telling: str, seed: int) -> tuple[Example, Example]:
    other, asked = changed(np.random.default_rng([seed, 11, number]), scene, question)
    question = replace(question, distractor=asked.answer)
    clean, corrupt = (
        replace(made, id=f"{made.id}-{role}", tags={**made.tags, "pair": made.id, "role": role})
        for role, made in (
            ("clean", as_example(number, scene, question, telling)), ("corrupt", as_example(number, other, asked, telling)),
        )
    )  # fmt: skip
    return clean, corrupt


def changed(rng: np.random.Generator, scene: world.Scene, question: world.Question) -> tuple[world.Scene, world.Question]:
    """The scene with the fact that the question asks for changed, and the same question with its new answer.

    A shape becomes a shape and a digit a digit; no new combination of colour and name is one that training never shows.
    """
    (thing,) = question.about
    if question.kind == "color":
        colours = [c for c in world.COLOURS if c != thing.colour and (c, thing.name) not in world.HELD_OUT]
        new = replace(thing, colour=str(rng.choice(colours)))
        answer = new.colour
    elif question.kind == "thing":
        sort = world.SHAPES if thing.name in world.SHAPES else world.DIGITS
        names = [n for n in sort if n != thing.name and (thing.colour, n) not in world.HELD_OUT]
        new = replace(thing, name=str(rng.choice(names)))
        answer = new.name
    else:
        taken = {other.cell for other in scene.things}
        new = replace(thing, cell=int(rng.choice([c for c in range(len(world.CELLS)) if c not in taken])))
        answer = world.CELLS[new.cell]
    things = tuple(new if other == thing else other for other in scene.things)
    return replace(scene, things=things), replace(question, answer=answer, distractor=question.answer, about=(new,))
