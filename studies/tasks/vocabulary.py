"""Names of things in running text: which objects a caption mentions, under which of their names."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cache

from probe.errors import DataError

_IRREGULAR = {
    "people": "person", "men": "man", "women": "woman", "children": "child", "mice": "mouse", "geese": "goose", "teeth": "tooth",
    "feet": "foot", "oxen": "ox", "knives": "knife", "wolves": "wolf", "calves": "calf", "loaves": "loaf", "shelves": "shelf",
    "leaves": "leaf", "halves": "half", "wives": "wife", "lives": "life", "movies": "movie", "cookies": "cookie",
    "ties": "tie", "pies": "pie", "shoes": "shoe", "buses": "bus", "axes": "axe",
}  # fmt: skip
_UNCHANGED = frozenset(
    ("bus", "gas", "lens", "glass", "series", "species", "tennis", "christmas", "canvas", "always", "is", "this")
)


def singular(word: str) -> str:
    """An English noun's singular by rule, with the exceptions that captions have; a word that is no plural stays as it is."""
    if word in _IRREGULAR:
        return _IRREGULAR[word]
    if word.endswith("men") and len(word) > 4:
        return word[:-2] + "an"
    if word in _UNCHANGED or len(word) < 4 or not word.endswith("s") or word.endswith(("ss", "us", "is")):
        return word
    if word.endswith("ies"):
        return word[:-3] + "y"
    if word.endswith(("ches", "shes", "sses", "xes", "zes", "oes")):
        return word[:-2]
    return word[:-1]


@dataclass(frozen=True)
class Mention:
    """One mention: the object, the words that name it, and which word of the text is the first of them."""

    name: str
    words: str
    at: int


class Vocabulary:
    """Objects and their names. `phrases` say what other runs of words mean: an object, or nothing at all (None).

    Names are compared word by word in the singular; a comma or a full stop ends a name. Raises DataError for a name that two objects share.
    """

    def __init__(self, names: Mapping[str, Iterable[str]], phrases: Mapping[str, str | None] | None = None) -> None:
        self.names = tuple(names)
        self._known: dict[tuple[str, ...], str | None] = {}
        for name, synonyms in names.items():
            for synonym in (name, *synonyms):
                key = tuple(word for word, _ in _words(synonym))
                if self._known.setdefault(key, name) != name:
                    raise DataError(f"{synonym!r} names both {self._known[key]!r} and {name!r}: a name belongs to one object")
        for phrase, meaning in (phrases or {}).items():
            if meaning is not None and meaning not in names:
                raise DataError(f"the phrase {phrase!r} stands for {meaning!r}, which is none of the objects")
            self._known[tuple(word for word, _ in _words(phrase))] = meaning
        self._longest = max((len(key) for key in self._known), default=0)

    def mentions(self, text: str) -> list[Mention]:
        """Every mention from left to right, the longest name first where several begin at one word; no word is in two.

        Names of one object that stand side by side ("TV screen") are one mention.
        """
        words = _words(text)
        found: list[Mention] = []
        at, end = 0, -1  # of the next word, and of the last mention
        while at < len(words):
            key = self._at(words, at)
            name = self._known.get(key)
            if name is not None:
                if found and end == at and found[-1].name == name and words[at][1]:
                    found[-1] = replace(found[-1], words=" ".join((found[-1].words, *key)))
                else:
                    found.append(Mention(name, " ".join(key), at))
                end = at + len(key)
            at += max(1, len(key))
        return found

    def _at(self, words: list[tuple[str, bool]], at: int) -> tuple[str, ...]:
        """The longest name or phrase that begins at a word; empty where none does."""
        for length in range(min(self._longest, len(words) - at), 0, -1):
            run = words[at : at + length]
            key = tuple(word for word, _ in run)
            if key in self._known and all(joined for _, joined in run[1:]):
                return key
        return ()

    def objects(self, categories: Iterable[str], captions: Iterable[str] = ()) -> frozenset[str]:
        """What a picture holds: its annotated categories (by any of their names) and what people's captions of it mention.

        Raises DataError for a category that the vocabulary does not know.
        """
        known = set()
        for category in categories:
            name = self._known.get(tuple(word for word, _ in _words(category)))
            if name is None:
                raise DataError(f"the vocabulary has no object {category!r}")
            known.add(name)
        return frozenset(known | {mention.name for caption in captions for mention in self.mentions(caption)})


def _words(text: str) -> list[tuple[str, bool]]:
    """Words in the singular, each with whether nothing but a space or a hyphen parts it from the one before."""
    text = text.lower().replace("\u2019", "'").replace("'s", "")
    found, end = [], 0
    for word in re.finditer(r"[a-z]+", text):
        found.append((singular(word.group()), re.fullmatch(r"[\s_'-]*", text[end : word.start()]) is not None))
        end = word.end()
    return found


# The 80 objects of COCO, each with the names that captions use for it.
_COCO = """
person: man, woman, boy, girl, child, kid, baby, lady, guy, adult, human, player, skier, surfer, rider, skateboarder, snowboarder, cyclist,
  pedestrian, passenger, driver, chef, toddler, infant, teenager, gentleman, batter, pitcher, umpire, swimmer, tourist, crowd
bicycle: bike | car: automobile, sedan, suv, taxi, cab, van, jeep, convertible, minivan
motorcycle: motorbike, scooter, moped, dirt bike, motor bike, motor cycle | airplane: plane, aeroplane, jet, aircraft, airliner, air plane, jetliner
bus: minibus, school bus, double decker | train: locomotive, tram, subway, trolley | truck: pickup, lorry, fire truck, semi
boat: ship, sailboat, canoe, kayak, ferry, yacht, rowboat, gondola, raft | traffic light: stop light, stoplight, traffic signal, street light
fire hydrant: hydrant | stop sign: | parking meter: meter | bench: pew | bird: duck, goose, seagull, pigeon, parrot, owl, swan, gull, eagle,
  hawk, penguin, chicken, rooster, flamingo, ostrich, dove, peacock, crow | cat: kitten, kitty, feline | dog: puppy, pup, canine, terrier,
  poodle, bulldog, retriever | horse: pony, foal, mare, stallion, colt | sheep: lamb, ram, ewe | cow: cattle, bull, calf, ox, bison
elephant: | bear: cub, grizzly, panda, polar bear | zebra: | giraffe: | backpack: rucksack, knapsack | umbrella: parasol
handbag: purse, pocketbook, wallet | tie: necktie, bow tie | suitcase: luggage, briefcase, suit case | frisbee: disc, disk | skis: ski
snowboard: | sports ball: ball, baseball, basketball, soccer ball, tennis ball, football, volleyball | kite: | baseball bat: bat
baseball glove: glove, mitt | skateboard: skate board | surfboard: surf board, boogie board, longboard | tennis racket: racket, racquet
bottle: water bottle, beer bottle | wine glass: goblet | cup: mug, teacup | fork: | knife: pocketknife | spoon: | bowl: | banana: | apple: | sandwich: burger,
  hamburger, cheeseburger, sub | orange: tangerine, clementine | broccoli: | carrot: | hot dog: hotdog | pizza: | donut: doughnut, bagel
cake: cupcake, cheesecake, birthday cake | chair: seat, stool, armchair, recliner | couch: sofa, loveseat, futon | potted plant: houseplant, house plant
bed: mattress, bunk bed | dining table: table, desk, countertop | toilet: urinal, commode, lavatory, toilet seat | tv: television, monitor, screen, television set
laptop: laptop computer, notebook computer, macbook, computer | mouse: | remote: remote control, controller | keyboard:
cell phone: phone, cellphone, smartphone, mobile phone, iphone, telephone | microwave: microwave oven | oven: stove, stovetop, stove top oven
toaster: | sink: basin | refrigerator: fridge, freezer | book: novel | clock: alarm clock | vase: | scissors: shears | teddy bear: teddy, stuffed bear
hair drier: hair dryer, hairdryer, blow dryer | toothbrush: tooth brush
"""
_ANIMALS = ("bird", "cat", "dog", "horse", "sheep", "cow", "elephant", "bear", "zebra", "giraffe")
_SPORTS = ("ball", "baseball", "basketball", "football", "volleyball")
_OF_SPORTS = (
    "court",
    "field",
    "game",
    "stadium",
    "match",
    "team",
    "arena",
    "diamond",
    "pitch",
    "park",
    "uniform",
    "jersey",
    "cap",
)
_PHRASES: dict[str, str | None] = {
    "home plate": None, "toilet paper": None, "orange juice": None, "apple juice": None, "table tennis": None, "computer game": None,
    "passenger train": "train", "passenger jet": "airplane", "passenger plane": "airplane", "table tennis racket": "tennis racket",
    "computer monitor": "tv", "computer screen": "tv", "laptop screen": "laptop", "laptop monitor": "laptop", "phone screen": "cell phone",
    "computer keyboard": "keyboard", "laptop keyboard": "keyboard", "computer mouse": "mouse", "computer desk": "dining table",
    "computer table": "dining table", "computer chair": "chair", "desk chair": "chair", "table chair": "chair", "dining table chair": "chair",
}  # fmt: skip


@cache
def coco() -> Vocabulary:
    """COCO's 80 objects, named by this project's own list: numbers are close to the published metric's, not equal.

    Where they depart: names that stand side by side for one object ("TV screen", "baby girl") are one mention, where the published
    script counts each; no name reaches over a comma. "Baby" and "adult" before an animal, and "passenger" before a train or jet, are no
    persons, as published. Not published are the rest of the phrases: what belongs to a game (a baseball field, a basketball court, a
    football team) shows no ball, and a baseball player is a person alone; table tennis has no dining table; a computer's or laptop's
    monitor, keyboard, mouse, desk or chair is one object and not two; "home plate", "toilet paper" and juices are nothing.
    """
    names = {}
    for entry in re.split(r"\||\n(?=\S)", _COCO.strip()):
        name, synonyms = entry.split(":", 1)
        names[name.strip()] = tuple(part.strip() for part in synonyms.split(",") if part.strip())
    phrases = dict(_PHRASES)
    for animal in _ANIMALS:
        phrases |= {f"{age} {other}": animal for age in ("baby", "adult") for other in (animal, *names[animal])}
    for sport in _SPORTS:
        phrases |= {f"{sport} {thing}": None for thing in _OF_SPORTS} | {f"{sport} player": "person"}
    return Vocabulary(names, phrases)
