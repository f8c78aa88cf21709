"""Names of things in running text: which objects a caption mentions, under which of their names."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
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

    Names are compared word by word in the singular. Raises DataError for a name that two objects share.
    """

    def __init__(self, names: Mapping[str, Iterable[str]], phrases: Mapping[str, str | None] | None = None) -> None:
        self.names = tuple(names)
        self._known: dict[tuple[str, ...], str | None] = {}
        for name, synonyms in names.items():
            for synonym in (name, *synonyms):
                key = tuple(_words(synonym))
                if self._known.setdefault(key, name) != name:
                    raise DataError(f"{synonym!r} names both {self._known[key]!r} and {name!r}: a name belongs to one object")
        for phrase, meaning in (phrases or {}).items():
            if meaning is not None and meaning not in names:
                raise DataError(f"the phrase {phrase!r} stands for {meaning!r}, which is none of the objects")
            self._known[tuple(_words(phrase))] = meaning
        self._longest = max((len(key) for key in self._known), default=0)

    def mentions(self, text: str) -> list[Mention]:
        """Every mention from left to right, the longest name first where several begin at one word; no word is in two."""
        words, found, at = _words(text), [], 0
        while at < len(words):
            for length in range(min(self._longest, len(words) - at), 0, -1):
                key = tuple(words[at : at + length])
                if key in self._known:
                    if (name := self._known[key]) is not None:
                        found.append(Mention(name, " ".join(key), at))
                    at += length
                    break
            else:
                at += 1
        return found

    def objects(self, categories: Iterable[str], captions: Iterable[str] = ()) -> frozenset[str]:
        """What a picture holds: its annotated categories (by any of their names) and what people's captions of it mention.

        Raises DataError for a category that the vocabulary does not know.
        """
        known = set()
        for category in categories:
            name = self._known.get(tuple(_words(category)))
            if name is None:
                raise DataError(f"the vocabulary has no object {category!r}")
            known.add(name)
        return frozenset(known | {mention.name for caption in captions for mention in self.mentions(caption)})


def _words(text: str) -> list[str]:
    return [singular(word) for word in re.findall(r"[a-z]+", text.lower().replace("'s", ""))]


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


@cache
def coco() -> Vocabulary:
    """COCO's 80 objects. "Baby" and "adult" before an animal, and "passenger" before a train or jet, are no persons; "home plate" is nothing.

    The names are this project's own list, not the one of the published metric: numbers of the two are close, not equal.
    """
    names = {}
    for entry in re.split(r"\||\n(?=\S)", _COCO.strip()):
        name, synonyms = entry.split(":", 1)
        names[name.strip()] = tuple(part.strip() for part in synonyms.split(",") if part.strip())
    phrases: dict[str, str | None] = {"home plate": None, "toilet paper": None, "orange juice": None, "apple juice": None}
    for animal in _ANIMALS:
        phrases |= {f"{age} {other}": animal for age in ("baby", "adult") for other in (animal, *names[animal])}
    phrases |= {"passenger train": "train", "passenger jet": "airplane", "passenger plane": "airplane"}
    return Vocabulary(names, phrases)
