"""Scenes, their text twins, and questions about them whose answers are known.

A scene is data: coloured things (shapes and handwritten digits) in the cells of a 4 x 4 grid. Sentences (`twin`) and
pictures (`studies.demo.picture`) are two renderings of the same data, so that a question about a scene has the same
answer whichever way the scene is told.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

SHAPES = ("circle", "square", "triangle", "cross", "star", "diamond")
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
NAMES = SHAPES + DIGITS
COLOURS = ("red", "green", "blue", "yellow", "purple", "orange", "cyan", "white")
ODD = "odd"  # any colour that is none of these: things that nobody asks the colour of, to learn names in all colours
GRID = 4
CELLS = tuple(f"{column}{row}" for row in range(1, GRID + 1) for column in "abcd")
MOVES = ("up", "down", "left", "right")
MAX_COUNT = 4

# Some things are common and some keep company, so that POPE's popular and adversarial splits differ from its random one.
POPULARITY = np.array([2.0, 1.6, 1.2, 0.8, 1.4, 0.7, 1.0, 1.5, 0.8, 1.3, 0.7, 1.1, 0.9, 1.4, 0.8, 1.2])
POPULARITY = POPULARITY / POPULARITY.sum()
COMPANION = {name: NAMES[(i + 5) % len(NAMES)] for i, name in enumerate(NAMES)}

# One colour of each thing is never shown in training: 16 of the 128 combinations.
HELD_OUT = frozenset((COLOURS[(3 * i + 1) % len(COLOURS)], name) for i, name in enumerate(NAMES))


@dataclass(frozen=True)
class Thing:
    """One thing in a scene: what it is, its colour, the index of its cell, and where it moves (clips only)."""

    name: str
    colour: str
    cell: int
    move: str | None = None

    @property
    def row(self) -> int:
        return self.cell // GRID

    @property
    def column(self) -> int:
        return self.cell % GRID


@dataclass(frozen=True)
class Scene:
    """Things in cells, and the seed of everything that a rendering adds (jitter, clutter, noise, handwriting)."""

    things: tuple[Thing, ...]
    seed: int

    def named(self, name: str) -> list[Thing]:
        return [thing for thing in self.things if thing.name == name]

    def coloured(self, colour: str) -> list[Thing]:
        return [thing for thing in self.things if thing.colour == colour]

    @property
    def unique(self) -> list[Thing]:
        """The things that no other thing in the scene shares its name with."""
        return [thing for thing in self.things if len(self.named(thing.name)) == 1]


@dataclass(frozen=True)
class Question:
    """A question in one phrasing, its answer, a wrong answer of the same sort, and the things it is about."""

    kind: str
    text: str
    answer: str
    distractor: str
    about: tuple[Thing, ...] = ()
    split: str = ""
    phrasing: str = "short"
    options: tuple[str, ...] = ()


def sample_scene(
    rng: np.random.Generator, held_out: bool = False, moving: bool = False, sizes: tuple[int, int] = (3, 7), odd: float = 0.0
) -> Scene:
    """A random scene of 3 to 7 things; with `held_out`, at least one of them is a combination training never shows.

    `odd` is the share of things in colours without a name.
    """
    count = int(rng.integers(sizes[0], sizes[1] + 1))
    palette = rng.choice(len(COLOURS), size=int(rng.integers(2, 7)), replace=False)
    cells = rng.choice(len(CELLS), size=count, replace=False)
    things: list[Thing] = []
    for i in range(count):
        name = _next_name(rng, [thing.name for thing in things])
        wanted = held_out and (i == 0 or rng.random() < 0.3)
        colours = _colours(name, palette, wanted)
        move = str(rng.choice(MOVES)) if moving else None
        colour = ODD if odd and rng.random() < odd else str(rng.choice(colours))
        things.append(Thing(name, colour, int(cells[i]), move))
    order = rng.permutation(count)
    return Scene(tuple(things[i] for i in order), int(rng.integers(2**31)))


def _next_name(rng: np.random.Generator, present: Sequence[str]) -> str:
    draw = rng.random()
    if present and draw < 0.12:
        return str(rng.choice(present))
    if present and draw < 0.4:
        return COMPANION[str(rng.choice(present))]
    return str(rng.choice(NAMES, p=POPULARITY))


def _colours(name: str, palette: np.ndarray, held_out: bool) -> list[str]:
    """The colours that this thing may take; outside the palette when the palette offers none."""
    if held_out:
        return [colour for colour in COLOURS if (colour, name) in HELD_OUT]
    allowed = [colour for colour in COLOURS if (colour, name) not in HELD_OUT]
    return [COLOURS[i] for i in palette if COLOURS[i] in allowed] or allowed


def twin(scene: Scene) -> str:
    """The scene as a sentence: `red circle at b3 ; white seven at a1 going left ;`."""
    return " ".join(phrase(thing) for thing in scene.things)


def phrase(thing: Thing) -> str:
    """One thing as words."""
    going = f" going {thing.move}" if thing.move else ""
    return f"{thing.colour} {thing.name} at {CELLS[thing.cell]}{going} ;"


# --- questions -------------------------------------------------------------------------------------------------------

Item = TypeVar("Item")
Asker = Callable[[np.random.Generator, Scene, float], Question | None]


def _pick(rng: np.random.Generator, items: Sequence[Item]) -> Item:
    return items[int(rng.integers(len(items)))]


def _phrased(rng: np.random.Generator, long: float, short_text: str, long_text: str) -> tuple[str, str]:
    return (long_text, "long") if rng.random() < long else (short_text, "short")


def _other(rng: np.random.Generator, answer: str, present: Sequence[str], everything: Sequence[str]) -> str:
    """A wrong answer of the same sort, from the scene where it offers one."""
    options = sorted(set(present) - {answer, ODD}) or sorted(set(everything) - {answer})
    return str(_pick(rng, options))


def ask_colour(rng: np.random.Generator, scene: Scene, long: float) -> Question | None:
    named = [thing for thing in scene.unique if thing.colour != ODD]
    if not named:
        return None
    thing = _pick(rng, named)
    text, phrasing = _phrased(rng, long, f"color of {thing.name}", f"what color is the {thing.name} ?")
    wrong = _other(rng, thing.colour, [t.colour for t in scene.things], COLOURS)
    return Question("color", text, thing.colour, wrong, (thing,), phrasing=phrasing)


def ask_thing(rng: np.random.Generator, scene: Scene, long: float) -> Question | None:
    alone = [thing for thing in scene.things if len(scene.coloured(thing.colour)) == 1 and thing.colour != ODD]
    if not alone:
        return None
    thing = _pick(rng, alone)
    text, phrasing = _phrased(rng, long, f"thing in {thing.colour}", f"what is the {thing.colour} thing ?")
    wrong = _other(rng, thing.name, [t.name for t in scene.things], NAMES)
    return Question("thing", text, thing.name, wrong, (thing,), phrasing=phrasing)


def ask_count(rng: np.random.Generator, scene: Scene, long: float) -> Question | None:
    by_count: dict[int, list[str]] = {}
    for colour in COLOURS:
        by_count.setdefault(len(scene.coloured(colour)), []).append(colour)
    counts = [n for n in by_count if n <= MAX_COUNT]
    # Many counts are 0 or 1: the larger ones are drawn more often, so that no constant answer is right half of the time.
    weights = np.array([1.0 if n == 0 else 1.0 + n for n in counts])
    count = int(rng.choice(counts, p=weights / weights.sum()))
    colour = _pick(rng, by_count[count])
    text, phrasing = _phrased(rng, long, f"count of {colour}", f"how many things are {colour} ?")
    answers = [str(n) for n in range(MAX_COUNT + 1)]
    wrong = _other(rng, str(count), [str(abs(count - 1)), str(count + 1)], answers)
    return Question("count", text, str(count), wrong, tuple(scene.coloured(colour)), phrasing=phrasing)


def ask_existence(rng: np.random.Generator, scene: Scene, long: float) -> Question:
    """POPE: as many yes as no; what is asked about in vain is random, the most frequent, or the likeliest company."""
    present = {thing.name for thing in scene.things}
    absent = [name for name in NAMES if name not in present]
    split = str(rng.choice(("random", "popular", "adversarial")))
    if rng.random() < 0.5:
        name, answer = str(_pick(rng, sorted(present))), "yes"
    elif split == "random":
        name, answer = str(_pick(rng, absent)), "no"
    elif split == "popular":
        name, answer = str(_pick(rng, sorted(absent, key=lambda n: -POPULARITY[NAMES.index(n)])[:3])), "no"
    else:
        company = [COMPANION[name] for name in sorted(present) if COMPANION[name] in absent]
        name, answer = str(_pick(rng, company or absent)), "no"
    text, phrasing = _phrased(rng, long, f"any {name}", f"is there a {name} ?")
    wrong = "no" if answer == "yes" else "yes"
    return Question("exist", text, answer, wrong, tuple(scene.named(name)), split, phrasing, ("yes", "no"))


def ask_place(rng: np.random.Generator, scene: Scene, long: float) -> Question | None:
    if not scene.unique:
        return None
    thing = _pick(rng, scene.unique)
    text, phrasing = _phrased(rng, long, f"place of {thing.name}", f"where is the {thing.name} ?")
    wrong = _other(rng, CELLS[thing.cell], [CELLS[t.cell] for t in scene.things], CELLS)
    return Question("place", text, CELLS[thing.cell], wrong, (thing,), phrasing=phrasing)


def ask_relation(rng: np.random.Generator, scene: Scene, long: float) -> Question | None:
    if len(scene.unique) < 2:
        return None
    a, b = (scene.unique[i] for i in rng.choice(len(scene.unique), 2, replace=False))
    across = a.column != b.column and (a.row == b.row or rng.random() < 0.5)
    if across:
        options, answer = ("left", "right"), "left" if a.column < b.column else "right"
    else:
        options, answer = ("above", "below"), "above" if a.row < b.row else "below"
    first, second = options
    text, phrasing = _phrased(
        rng, long,
        f"{first} or {second} {a.name} {b.name}",
        f"is the {a.name} {first} or {second} of the {b.name} ?",
    )  # fmt: skip
    wrong = second if answer == first else first
    return Question("relation", text, answer, wrong, (a, b), phrasing=phrasing, options=options)


def ask_comparison(rng: np.random.Generator, scene: Scene, long: float) -> Question | None:
    named = [thing for thing in scene.unique if thing.colour != ODD]
    pairs = [(a, b) for a in named for b in named if a is not b]
    same = [pair for pair in pairs if pair[0].colour == pair[1].colour]
    different = [pair for pair in pairs if pair[0].colour != pair[1].colour]
    if not pairs:
        return None
    # A pair told apart by "no other thing has this colour" asks for no comparison: pairs of shared colours come first.
    for shared in (2, 1):
        hard = [pair for pair in different if sum(len(scene.coloured(thing.colour)) > 1 for thing in pair) >= shared]
        if hard and rng.random() < 0.8:
            different = hard
            break
    # Scenes offer more different pairs than like ones: a scene without a like pair is passed over half of the time.
    if not same and rng.random() < 0.5:
        return None
    a, b = _pick(rng, same if same and (not different or rng.random() < 0.62) else different)
    answer = "yes" if a.colour == b.colour else "no"
    text, phrasing = _phrased(rng, long, f"same color {a.name} {b.name}", f"are the {a.name} and the {b.name} the same color ?")
    wrong = "no" if answer == "yes" else "yes"
    return Question("compare", text, answer, wrong, (a, b), phrasing=phrasing, options=("yes", "no"))


def ask_direction(rng: np.random.Generator, scene: Scene, long: float) -> Question | None:
    moving = [thing for thing in scene.unique if thing.move]
    if not moving:
        return None
    thing = _pick(rng, moving)
    text, phrasing = _phrased(rng, long, f"direction of {thing.name}", f"which way does the {thing.name} go ?")
    assert thing.move is not None
    wrong = _other(rng, thing.move, MOVES, MOVES)
    return Question("direction", text, thing.move, wrong, (thing,), phrasing=phrasing)


ASKERS: dict[str, Asker] = {
    "color": ask_colour,
    "thing": ask_thing,
    "count": ask_count,
    "exist": ask_existence,
    "place": ask_place,
    "relation": ask_relation,
    "compare": ask_comparison,
    "direction": ask_direction,
}
PICTURE_KINDS = tuple(kind for kind in ASKERS if kind != "direction")
ANSWERS = (*COLOURS, *NAMES, *(str(n) for n in range(MAX_COUNT + 1)), "yes", "no", *CELLS, "left", "right", "above",
           "below", "up", "down")  # fmt: skip


def ask(
    rng: np.random.Generator,
    scene: Scene,
    kinds: Sequence[str] = PICTURE_KINDS,
    long: float = 0.5,
) -> Question | None:
    """A random question about the scene, None where it allows none; `long` is the probability of the long phrasing."""
    for kind in rng.permutation(kinds):
        question = ASKERS[str(kind)](rng, scene, long)
        if question is not None:
            return question
    return None


def held_out(rng: np.random.Generator, count: int, kinds: Sequence[str] = PICTURE_KINDS) -> Iterator[tuple[Scene, Question]]:
    """`count` questions, each about its own scene that holds an unseen combination, kinds in turn."""
    made = 0
    while made < count:
        scene = sample_scene(rng, held_out=True, moving="direction" in kinds)
        question = ASKERS[kinds[made % len(kinds)]](rng, scene, 0.5)
        if question is not None:
            made += 1
            yield scene, question
