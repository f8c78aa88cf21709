"""The training stages of each demo model, as data."""

from dataclasses import dataclass

from studies.demo import world
from studies.demo.batches import Telling

ALL_KINDS = tuple(world.ASKERS)
HARD = (*world.PICTURE_KINDS, "compare", "compare", "thing")  # what is learned last is asked more often
# What a frozen language model is slow to do with what it is shown, asked more often.
SEEING = (
    "color", "exist", "place", *["thing"] * 3, *["count"] * 3, *["relation"] * 2, *["compare"] * 3,
)  # fmt: skip
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
    # weight of the tower's auxiliary tasks: what the scene holds (where it has CLS), what each cell holds
    presence: float = 0.0
    odd: float = 0.0  # share of things in colours without a name
    mentions: float = 0.0  # weight of the auxiliary task that a thing's name in a `compare` question knows its colour
    summaries: float = 0.0  # weight of the auxiliary task at the end of each phrase of a twin
    tower_steps: int = 0  # steps that the tower is taught alone, first
    tower_rate: float = 1.5e-3  # the learning rate of those
    # weight of the auxiliary task that a position of each cell reads, inside the language model, like a phrase
    align: float = 0.0
    along: tuple[int, ...] = ()  # steps before which what is being trained is saved, to see alignment grow


# Each model's stages, one after the other; what holds last is polished on its own.
STAGES: dict[str, tuple[Stage, ...]] = {
    "text": (
        Stage("text", 4000, 1e-3, (("text", 1.0),), ALL_KINDS, first=0.12, short_until=0.45, moving=0.3, summaries=0.5),
        Stage(
            "text-polish", 1200, 6e-4, (("text", 1.0),), (*ALL_KINDS, *["compare"] * 4), short_until=0.0, moving=0.3,
            mentions=0.5,
        ),
    ),
    "frozen": (
        Stage(
            "frozen", 2300, 1.2e-3, (("picture", 1.0),), SEEING, questions=8, short_until=0.0, presence=0.6, tower_steps=2500,
            align=0.6, odd=0.3, mentions=0.5, along=(0, 100, 250, 500, 1000, 1700),
        ),
        Stage(
            "frozen-polish", 600, 6e-4, (("picture", 1.0),), SEEING, questions=8, short_until=0.0, presence=0.6, odd=0.2,
            mentions=0.5,
        ),
    ),
    "joint": (
        Stage(
            "joint", 1200, 1e-3, (("picture", 0.85), ("text", 0.1), ("nothing", 0.05)), (*SEEING, "thing"), questions=8,
            short_until=0.0, presence=0.3, mentions=0.3, odd=0.3,
        ),
        Stage(
            "joint-polish", 800, 6e-4, (("picture", 0.88), ("text", 0.07), ("nothing", 0.05)), (*SEEING, "thing", "count"),
            questions=8, short_until=0.0, presence=0.3, mentions=0.3, odd=0.12,
        ),
        Stage(
            "joint-finish", 350, 4e-4, (("picture", 0.88), ("text", 0.07), ("nothing", 0.05)), (*SEEING, "thing", "exist"),
            questions=8, short_until=0.0, presence=0.3, mentions=0.3, odd=0.12,
        ),
    ),
    "video": (
        Stage(
            "video", 1000, 1e-3, (("clip", 1.0),), ALL_KINDS, rows=24, questions=8, short_until=0.0, moving=0.9, presence=1.0,
            tower_steps=1000, tower_rate=7e-4, align=1.0,
        ),
        Stage(
            "video-polish", 200, 4e-4, (("clip", 1.0),), (*ALL_KINDS, "compare", "thing"), rows=24, short_until=0.0, moving=0.9
        ),
    ),
    "audio": (
        Stage("audio", 900, 1e-3, (("sound", 1.0),), questions=8, short_until=0.0, presence=1.0, tower_steps=500, align=1.0),
        Stage("audio-polish", 250, 4e-4, (("sound", 1.0),), HARD, short_until=0.0),
    ),
}  # fmt: skip
