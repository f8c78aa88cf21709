"""Scoring rules: hand-sized numbers, slow versions, and what is not defined is None."""

import numpy as np
import pytest

from probe.analysis.stats import ends, mcnemar, paired_difference, wilson
from probe.errors import DataError, StudyError
from probe.likelihood import Likelihood
from studies.tasks.scores import Score, average, drawable, proportion
from studies.tasks.scores_bigbench import bigbench
from studies.tasks.scores_chair import chair, read_caption
from studies.tasks.scores_chef import bins, ece, following, mr, riam, rr, rrm
from studies.tasks.scores_choice import by_generation, by_likelihood, circular, parse_choice, rotations
from studies.tasks.scores_mmevalpro import PARTS, by_source, mmevalpro
from studies.tasks.scores_pope import asked_object, auroc, parse_yes_no, pope
from studies.tasks.scores_text import exact_match, vqa_accuracy, vqa_answer, vqa_item
from studies.tasks.vocabulary import Vocabulary, coco, singular
from studies.telling import above, below, bracketed, ranged
from studies.work import interval, share
from tests.oracles.scores import area_by_pairs, ece_by_hand, vqa_by_subsets


def test_a_score_is_a_number_or_none():
    assert proportion("x", 3, 4).value == 0.75
    assert (proportion("x", 3, 4).low, proportion("x", 3, 4).high) == wilson(3, 4)
    assert proportion("x", 0, 0).value is None
    found = average("x", [1.0, None, 0.0], 0)
    assert (found.value, found.n, found.n_dropped) == (0.5, 2, 1)
    assert average("x", [None]).value is None
    with pytest.raises(DataError, match="came out as nan"):
        Score("x", float("nan"), None, None, 0, 0, 0)


def test_exact_match_names_its_normalisation():
    said, answers = ["Red.", "the dog", "2", "x"], ["red", "dog", "two", None]
    assert [exact_match(said, answers, n).numerator for n in ("none", "plain", "vqa")] == [0, 1, 3]
    assert exact_match(said, answers).n_dropped == 1
    with pytest.raises(StudyError, match=r"there is no normalisation 'vqaa' .did you mean 'vqa'"):
        exact_match(said, answers, "vqaa")


NORMALISED = {
    "The dog's, big!": "dog's big", "two": "2", "None": "0", "1,000": "1000", "3.5": "3.5", "ok.": "ok", "dont": "don't",
    "red/blue": "red blue", "a man": "man", "shouldntve x": "shouldntve x", "couldnt've": "couldn't've", "left-hand": "left hand",
}  # fmt: skip


@pytest.mark.parametrize("text", NORMALISED)
def test_vqa_normalises_as_the_official_script(text):
    assert vqa_answer(text) == NORMALISED[text]
    assert len(NORMALISED) == 12


@pytest.mark.parametrize(("count", "expected"), [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)])
def test_vqa_accuracy_leaves_one_out(count, expected):
    humans = ["red"] * count + ["blue"] * (10 - count)
    assert vqa_item("Red", humans) == pytest.approx(expected)
    assert vqa_item("red", humans) == pytest.approx(vqa_by_subsets("red", humans))


def test_vqa_accuracy_of_few_people_and_the_published_reading():
    assert vqa_item("red", ["red"]) is None
    assert vqa_accuracy(["red", "x"], [["red"] * 10, ["y"]]).n_dropped == 1
    assert vqa_item("2", ["two"] * 9 + ["three"]) == 1.0
    assert vqa_item("2", ["two"] * 9 + ["three"], compat="official") == 0.0
    with pytest.raises(StudyError, match="no compat='paper'"):
        vqa_item("2", ["two"] * 2, compat="paper")


CHOICES = {
    "B": 1, "(b)": 1, "B. blue": 1, "The answer is C.": 2, "Answer: A": 0, "blue": 1, "It is the blue one": 1, "red or blue": None, "": None,
    "E": None, "A hot dog": 3, "A dog, I think": 2, "the answer is a dog": 2,
    # several, or a denial
    "A or B": None, "Option A or option B": None, "Neither A nor B.": None, "The answer is not B.": None, "It is not red": None,
    "The answer is B or C": None, "A, B": None, "B rather than C": None, "(B) is not right": None, "I don't think that it is red": None,
    "There is no dog": None, "A. red B. blue": None, "B is wrong, and so is C": None, "The answer is A or B.": None, "B/C": None,
    # denials of something else
    "B. It is not red": 1, "The answer is B, because it is not C.": 1, "No, it is red": 0, "B, as nothing is not blue": 1,
    # Markdown
    "**B**": 1, "the answer is: **B**": 1, "**Answer:** `C`": 2, "### B": 1, "_blue_": 1, "**B.** blue": 1, "It is **not** red": None,
    "B, I think": 1, "B. A dog": 1, "**Option B** or **option C**": None,
}  # fmt: skip


@pytest.mark.parametrize("text", CHOICES)
def test_an_answer_names_an_option_or_none(text):
    assert parse_choice(text, ["red", "blue", "dog", "hot dog"]) == CHOICES[text]
    assert len(CHOICES) == 42


def test_what_an_option_says_itself_is_no_letter_and_no_denial():
    options = ["Vitamin D", "Vitamin C", "not enough light", "none of these"]
    assert parse_choice("B. Vitamin C", options) == 1
    assert parse_choice("It is vitamin C.", options) == 1
    assert parse_choice("C) not enough light", options) == 2
    assert parse_choice("There is not enough light", options) == 2
    assert parse_choice("None of these is right", options) == 3
    assert [parse_choice(text, ["yes", "no"]) for text in ("No it is not there", "no", "There is no", "yes or no")] == [
        1,
        1,
        1,
        None,
    ]


def test_without_letters_a_letter_is_a_word():
    assert parse_choice("A", ["red", "blue"], lettered=False) is None
    assert parse_choice("b3", ["a1", "b3"], lettered=False) == 1


def test_choices_are_scored_both_ways():
    accuracy, unknown = by_generation([0, 1, None, 1], [0, 0, 0, 1])
    assert (accuracy.value, unknown.value) == (0.5, 0.25)
    one = Likelihood(("a", "bbbb"), ((-1.0,), (-0.6, -0.6)), (True, False))
    assert [one.best(r) for r in ("mean", "sum", "per-byte")] == [1, 0, 1]
    assert one.probabilities("sum").sum() == pytest.approx(1)
    assert by_likelihood([one, one], [1, 0]).value == 0.5
    assert rotations(3) == [(0, 1, 2), (1, 2, 0), (2, 0, 1)]
    assert circular([[True, True], [True, False]]).value == 0.5


PARSED = {  # text: (what is said, what the published parser takes it for)
    "Yes": ("yes", "yes"), "yes, there is": ("yes", "yes"), "No": ("no", "no"), "no.": ("no", "no"), "There is not a dog": ("no", "no"),
    "nothing": ("no", "yes"), "": ("unknown", "yes"), "banana": ("unknown", "yes"), "There isn't any": ("no", "yes"),
    "There is a dog. No cat.": ("yes", "yes"), "NO": ("no", "yes"), "I cannot see one": ("no", "yes"), "well yes and not": ("unknown", "no"),
    "No, there is": ("no", "no"), "1. Yes": ("yes", "yes"), "1) No.": ("no", "no"), "- Yes": ("yes", "yes"), "there's a dog": ("yes", "yes"),
    "There\u2019s one": ("yes", "yes"), "It is not clear": ("unknown", "no"), "I am not sure": ("unknown", "no"), "I can't tell": ("unknown", "yes"),
    "It cannot be determined": ("unknown", "yes"), "It isn't entirely clear": ("unknown", "yes"), "There is no way to tell": ("unknown", "no"),
    "There is not a clear dog": ("no", "no"), "The dog is not visible": ("no", "no"), "**Yes**": ("yes", "yes"), "2 dogs": ("unknown", "yes"),
}  # fmt: skip


@pytest.mark.parametrize("text", PARSED)
def test_yes_and_no_are_told_apart(text):
    assert (parse_yes_no(text), parse_yes_no(text, "official")) == PARSED[text]
    assert len(PARSED) == 29


def test_pope_by_hand():
    found = pope(["yes", "yes", "no", "unknown", "no", "unknown"], [True, False, False, True, True, False])
    values = {name: one.value for name, one in found.items()}
    assert values == {
        "accuracy": 2 / 6, "precision": 1 / 2, "recall": 1 / 3, "f1": 2 / 5, "yes_ratio": 2 / 6, "unknown_rate": 2 / 6, "hallucination": 1 / 3,
    }  # fmt: skip
    nothing = pope(["no", "no"], [False, False])
    assert [nothing[name].value for name in ("precision", "recall", "f1")] == [None] * 3
    assert pope([], [])["accuracy"].value is None
    assert asked_object("Is there an umbrella in the image?") == "umbrella"
    assert [asked_object(q) for q in ("any four", "is there a star ?", "where?")] == ["four", "star", "where?"]


def test_the_area_is_that_over_pairs():
    rng = np.random.default_rng(0)
    scores, there = rng.integers(0, 5, 40) / 4, rng.random(40) < 0.5
    found = auroc(scores, there)
    assert found.value == pytest.approx(area_by_pairs(scores.tolist(), there.tolist()))
    assert found.low < found.value < found.high
    assert auroc([0.1, 0.2], [True, True]).value is None


def test_golden_captions():
    assert [m.name for m in coco().mentions("A hot dog and two wine glasses on a toilet seat")] == [
        "hot dog",
        "wine glass",
        "toilet",
    ]
    assert [m.name for m in coco().mentions("A baby elephant near people")] == ["elephant", "person"]
    assert [m.name for m in coco().mentions("two knives, scissors and buses at home plate")] == ["knife", "scissors", "bus"]
    assert len(coco().names) == 80
    assert [singular(w) for w in ("dogs", "glass", "men", "ladies", "boxes", "tennis")] == [
        "dog",
        "glass",
        "man",
        "lady",
        "box",
        "tennis",
    ]
    read = read_caption("the toilet has a seat", {"toilet"})
    assert [m.name for m in read.mentions] == ["toilet"]
    found = chair(["a dog and a dog and a cat", "a hot dog", "nothing"], [{"dog"}, {"dog", "pizza"}, set()])
    assert (found["chair_i"].value, found["chair_s"].value, found["recall"].value) == (2 / 4, 2 / 3, 1 / 3)
    assert chair(["nothing"], [{"dog"}])["chair_i"].value is None
    assert coco().objects(["Hot Dogs"], ["a puppy"]) == {"hot dog", "dog"}


def test_a_caption_without_mentions_counts_nothing_or_as_published_zero():
    none = chair(["nothing", "so it is"], [{"dog"}, set()], compat="published")
    assert (none["chair_i"].value, none["chair_i"].low, none["chair_i"].denominator, none["chair_s"].value) == (
        0.0,
        None,
        0.0,
        0.0,
    )
    assert none["recall"].value == 0.0
    assert chair([], [], compat="published")["chair_i"].value is None  # no captions, and not none with a mention
    said, there = ["a dog and a cat", "nothing", "nothing"], [{"dog"}, set(), set()]
    plain, published = chair(said, there), chair(said, there, compat="published")
    assert plain["chair_i"].value == published["chair_i"].value == 0.5
    assert (plain["chair_i"].low, published["chair_i"].low) == (
        None,
        0.0,
    )  # resamples of the two others alone are left out, or 0
    with pytest.raises(StudyError, match="no compat='paper': there is 'published'"):
        chair(["a dog"], [{"dog"}], compat="paper")


CAPTIONS = {
    "a baseball player": ["person"], "a baseball game": [], "a basketball court": [], "a football stadium": [], "a volleyball match and a ball": ["sports ball"],
    "two baseball players with baseball bats and a baseball": ["person", "baseball bat", "sports ball"], "baseball teams": [],
    "a table tennis racket": ["tennis racket"], "a game of table tennis": [], "a TV screen": ["tv"], "a computer monitor": ["tv"],
    "a laptop screen": ["laptop"], "a desk chair": ["chair"], "a desk, chair and computer": ["dining table", "chair", "laptop"],
    "a computer desk": ["dining table"], "a baby girl": ["person"], "a man, woman and child": ["person"] * 3, "a hot, dog": ["dog"],
    "a teddy bear, bear cub": ["teddy bear", "bear"], "the dog's puppy": ["dog"], "a television and a TV": ["tv", "tv"], "a stop-sign": ["stop sign"],
}  # fmt: skip


@pytest.mark.parametrize("caption", CAPTIONS)
def test_what_a_caption_mentions(caption):
    assert [m.name for m in coco().mentions(caption)] == CAPTIONS[caption]
    assert len(CAPTIONS) == 22


def test_names_side_by_side_are_one_mention_with_all_their_words():
    (found,) = coco().mentions("on the TV screen")
    assert (found.words, found.at) == ("tv screen", 2)


def test_a_vocabulary_of_ones_own():
    own = Vocabulary({"circle": ["ring", "disc"], "digit": ["number"]}, {"key ring": None})
    assert [m.name for m in own.mentions("rings, a key ring, and numbers")] == ["circle", "digit"]
    with pytest.raises(DataError, match="'x' names both 'a' and 'b'"):
        Vocabulary({"a": ["x"], "b": ["x"]})
    with pytest.raises(DataError, match="the vocabulary has no object 'dog'"):
        own.objects(["dog"])


def test_triplets():
    rng = np.random.default_rng(1)
    rows = [(str(t), part, bool(rng.random() < 0.6)) for t in range(200) for part in PARTS]
    found = mmevalpro([*rows, ("odd", "Origin", True)])
    value = {name: one.value for name, one in found.scores.items()}
    assert found.incomplete == ("odd",)
    assert found.scores["GA"].n_dropped == 1
    assert value["GA"] <= min(value[name] for name in ("OA", "PA", "KA"))
    assert value["CG"] == pytest.approx(value["OA"] - value["GA"])
    assert value["CG"] >= 0
    assert value["AA"] == pytest.approx((value["OA"] + value["PA"] + value["KA"]) / 3)
    again = [np.random.default_rng(k).choice(200, 200) for k in range(400)]  # triplets drawn with all their questions
    shares = np.array([right for _, _, right in rows], float).reshape(200, 3).mean(1)
    low, high = np.percentile([shares[draw].mean() for draw in again], [2.5, 97.5])
    assert (found.scores["AA"].low, found.scores["AA"].high) == pytest.approx((low, high), abs=0.01)
    none = mmevalpro([("1", "Origin", False), ("1", "Perception", True), ("1", "Knowledge", True)]).scores
    assert none["PC"].value is none["KC"].value is None
    assert mmevalpro([]).scores["AA"].value is None


def test_sources_by_hand():
    """Two sources: one triplet wholly right of one, and of four one wholly right and two right for the wrong reason."""
    rights = {"MMMU": [(1, 1, 1)], "ScienceQA": [(1, 1, 1), (1, 0, 1), (1, 1, 0), (0, 1, 1)]}
    rows = [
        (source, str(t), part, bool(right))
        for source, triplets in rights.items()
        for t, triplet in enumerate(triplets)
        for part, right in zip(PARTS, triplet, strict=True)
    ]
    found = by_source([*rows, ("ScienceQA", "9", "Origin", True)])
    assert {name: one.scores["GA"].value for name, one in found.of.items()} == {"MMMU": 1.0, "ScienceQA": 0.25}
    macro = {name: one.value for name, one in found.macro.items()}
    assert macro == pytest.approx({
        "AA": (1 + 9 / 12) / 2, "OA": (1 + 3 / 4) / 2, "PA": (1 + 3 / 4) / 2, "KA": (1 + 3 / 4) / 2, "GA": (1 + 1 / 4) / 2, "CG": 2 / 4 / 2,
        "PC": (1 + 2 / 3) / 2, "KC": (1 + 2 / 3) / 2,
    })  # fmt: skip
    assert macro["CG"] == pytest.approx(macro["OA"] - macro["GA"])
    one = found.macro["GA"]
    assert (one.numerator, one.denominator, one.n, one.n_dropped) == (1.25, 2.0, 5, 1)
    assert found.micro.scores["GA"].value == 2 / 5
    assert found.micro.incomplete == ("ScienceQA/9",)  # "0" of either is a triplet of its own


def test_sources_are_drawn_apart_and_one_alone_is_the_pool():
    rng = np.random.default_rng(3)
    rows = [(s, str(t), part, bool(rng.random() < 0.6)) for s in "ab" for t in range(100) for part in PARTS]
    found, alone = by_source(rows), by_source([row for row in rows if row[0] == "a"])
    for name, score in alone.macro.items():
        assert score.value == pytest.approx(alone.micro.scores[name].value)
    right = {s: np.array([r for source, _, _, r in rows if source == s]).reshape(100, 3).all(1) for s in "ab"}
    again = [np.mean([right[s][rng.integers(0, 100, 100)].mean() for s in "ab"]) for _ in range(4000)]
    macro = found.macro["GA"]
    assert (macro.low, macro.high) == pytest.approx(tuple(np.percentile(again, [2.5, 97.5])), abs=0.015)
    assert by_source([]).macro == {}
    broken = by_source([*rows, ("c", "1", "Origin", True)])
    assert broken.macro["GA"].value is None  # a source without a complete triplet has no share
    assert broken.micro.scores["GA"].value == found.micro.scores["GA"].value
    never = [("a", "1", part, part != "Origin") for part in PARTS]
    assert by_source([*never, *rows[300:]]).macro["PC"].value is None
    assert by_source([*never, *rows[300:]]).macro["GA"].value is not None


def test_questions_of_one_triplet_are_not_independent():
    """Where all three of a triplet are right, or none, there are 30 observations and not 90."""
    found = mmevalpro([(str(t), part, t % 2 == 0) for t in range(30) for part in PARTS]).scores
    low, high = wilson(15, 30)
    assert (found["AA"].numerator, found["AA"].denominator, found["AA"].n) == (45, 90, 30)
    assert found["AA"].high - found["AA"].low == pytest.approx(high - low, abs=0.04)
    assert found["AA"].high - found["AA"].low > 1.5 * (wilson(45, 90)[1] - wilson(45, 90)[0])


@pytest.mark.parametrize("n", [3, 10, 23, 40])
def test_calibration_with_bins_of_equal_mass(n):
    rng = np.random.default_rng(n)
    sure, right = rng.random(n), rng.random(n) < 0.5
    assert ece(sure.tolist(), right.tolist()).value == pytest.approx(ece_by_hand(sure.tolist(), right.tolist(), 10))
    assert [one.n for one in bins(sure, right)] == [size for size in [n // 10 + (i < n % 10) for i in range(10)] if size]
    assert ece([1.0, 0.0], [True, False]).value == 0
    assert ece([], []).value is None
    with pytest.raises(DataError, match="between 0 and 1"):
        ece([2.0], [True])


def test_gains_over_chance_need_something_above_it():
    plain, better, worse = [True] * 6 + [False] * 4, [True] * 8 + [False] * 2, [True] * 4 + [False] * 6
    assert riam(better, plain, 0.25).value == pytest.approx((0.8 - 0.6) / (0.6 - 0.25))
    assert rrm(worse, plain, 0.25).value == pytest.approx(100 * (0.4 - 0.25) / (0.6 - 0.25))
    assert rr(worse, plain).value == pytest.approx(100 * 0.4 / 0.6)
    assert rrm(worse, plain, 0.6).value is riam(better, plain, 0.595).value is None
    assert mr([0, 1, None], [0, 0, None]).numerator == 1


def test_following_by_hand():
    original, right = [0, 1, 2, None], [0, 0, 2, 1]
    chosen = {("natural", 0): [0, 1, 1, 1], ("natural", 1): [0, None, 2, None], ("unnatural", 0): [1, 2, 2, None]}
    found = following(original, chosen, right)
    assert {name: one["mr"].value for name, one in found.items()} == pytest.approx({
        "natural 0": 2 / 4, "natural 1": 2 / 4, "unnatural 0": 1 / 4, "natural": 1 / 2, "unnatural": 1 / 4, "all": 3 / 8,
    })  # fmt: skip
    assert {name: one["accuracy"].value for name, one in found.items()} == pytest.approx({
        "natural 0": 2 / 4, "natural 1": 2 / 4, "unnatural 0": 1 / 4, "natural": 1 / 2, "unnatural": 1 / 4, "all": 3 / 8,
    })  # fmt: skip
    assert [found[name]["unknown"].value for name in ("natural 0", "natural 1", "all")] == [0, 2 / 4, 1 / 4]
    assert found["natural 0"]["mr"].value == mr(chosen["natural", 0], original).value
    assert (found["all"]["mr"].n, found["natural 1"]["mr"].low) == (4, wilson(2, 4)[0])
    assert found["all"]["mr"].low <= found["all"]["mr"].value <= found["all"]["mr"].high
    assert following(original[:3], {("natural", 0): original[:3]}, right[:3])["all"]["mr"].value == 1
    with pytest.raises(DataError, match="under natural names 1 are of 1 items and not of 4"):
        following(original, {("natural", 0): original, ("natural", 1): [0]}, right)
    with pytest.raises(DataError, match="right ones are given of 1"):
        following(original, chosen, [0])


def values(scores):
    return [[one.value for one in row] for row in scores]


def test_instructions_judged_by_hand():
    table = np.array([[[50.0, 50.0, 40.0]], [[30.0, 10.0, 60.0]]])
    found = bigbench(table, top=1)
    assert values(found.best) == [[50.0], [60.0]]
    assert found.best_instruction.tolist() == [[0], [2]]
    assert values(found.hit_ratio) == [[0.0, 100.0, 0.0], [0.0, 0.0, 100.0]]  # a tie goes to the later instruction
    assert found.gain_of_model[0][0].value == pytest.approx(np.mean([25, 100 * 20 / 30, -20]))
    of_second = [100 * (50 - 140 / 3) / (140 / 3), 100 * (10 - 100 / 3) / (100 / 3)]
    assert found.gain_of_instruction[1][0].value == pytest.approx(np.mean(of_second))
    assert found.spread_of_model[0][0].value == pytest.approx(np.std([50, 50, 40]))
    assert (len(found.spread_of_instruction), len(found.spread_of_instruction[0])) == (3, 1)
    assert values(bigbench(np.zeros((2, 1, 3))).gain_of_model) == [[0.0], [0.0]]


def test_scores_of_instructions_have_intervals_over_what_they_are_taken_over():
    rng = np.random.default_rng(0)
    table = rng.uniform(30, 70, (4, 6, 10))
    found = bigbench(table, items=[100, 200, 50, 80, 400, 25])
    assert (found.gain_of_model[0][0].n, found.gain_of_instruction[0][0].n, found.hit_ratio[0][0].n) == (10, 4, 6)
    for name in ("best", "gain_of_model", "gain_of_instruction", "spread_of_model", "spread_of_instruction", "hit_ratio"):
        for one in (one for row in getattr(found, name) for one in row):
            assert one.low <= one.value <= one.high, name
            assert one.value == pytest.approx(one.numerator / one.denominator)
    assert np.sum(values(found.hit_ratio), axis=1) == pytest.approx([100.0] * 4)  # all slots are taken
    gains = 100 * (table - table.mean(0)) / table.mean(0)
    again = np.array([gains[1, 2][rng.integers(0, 10, 10)].mean() for _ in range(4000)])
    one = found.gain_of_model[1][2]
    assert (one.low, one.high) == pytest.approx(tuple(np.percentile(again, [2.5, 97.5])), abs=1.5)
    again = np.array([table[1, 2][rng.integers(0, 10, 10)].std() for _ in range(4000)])
    one = found.spread_of_model[1][2]
    assert (one.low, one.high) == pytest.approx(tuple(np.percentile(again, [2.5, 97.5])), abs=0.8)
    top = found.hit_ratio[0][0]
    assert (top.low, top.high) == pytest.approx(tuple(100 * side / 3 for side in wilson(round(top.value * 18 / 100), 6)))


def test_the_best_has_an_interval_where_items_are_known():
    table = np.array([[[50.0, 75.0]]])
    one = bigbench(table, top=1, items=[8]).best[0][0]
    assert (one.value, one.low, one.high, one.n) == (75.0, *(100 * side for side in wilson(6, 8)), 8)
    bare = bigbench(table, top=1).best[0][0]
    assert (bare.value, bare.low, bare.high, bare.n) == (75.0, None, None, 2)
    assert bigbench(table, top=1).gain_of_instruction[0][0].low is None  # one model: nothing to draw from


BAD_TABLES = {
    "gaps": (np.full((1, 1, 3), np.nan), {}, "has gaps"),
    "shares": (np.full((1, 1, 3), 101.0), {}, "is in per cent"),
    "top": (np.zeros((1, 1, 3)), {"top": 4}, "the 4 best of 3"),
    "items": (np.zeros((1, 2, 3)), {"items": [3]}, r"each of the 2 data sets has a number of items, and \[3\]"),
}


@pytest.mark.parametrize("case", BAD_TABLES)
def test_a_table_that_is_none_is_refused(case):
    table, options, message = BAD_TABLES[case]
    with pytest.raises(DataError, match=message):
        bigbench(table, **options)
    assert len(BAD_TABLES) == 4


def test_paired_comparisons():
    a, b = np.array([1, 1, 1, 1, 1, 0, 1], bool), np.array([0, 0, 0, 0, 0, 1, 1], bool)
    assert mcnemar(a, b) == pytest.approx(2 * 7 / 2**6)  # five and one of six: (1 + 6) / 64 on either side
    assert mcnemar(a, a) == 1.0
    found = paired_difference(a.astype(float), b.astype(float))
    assert float(found.value) == pytest.approx(4 / 7)
    assert found.low <= found.value <= found.high
    assert np.isnan(paired_difference(np.array([np.nan]), np.array([1.0])).value)


def test_where_all_draws_agree_there_is_no_interval():
    found = pope(["yes"] * 3 + ["no"] * 2, [True] * 3 + [False] * 2)
    assert (found["f1"].value, found["f1"].low, found["f1"].high) == (1.0, None, None)
    assert (found["accuracy"].low, found["accuracy"].high) == wilson(5, 5)  # a proportion has one all the same
    apart = auroc([0.9] * 5 + [0.1] * 5, [True] * 5 + [False] * 5)
    assert (apart.value, apart.low, apart.high) == (1.0, None, None)
    assert average("x", [0.3, 0.3, 0.3]).low is None
    assert ends(0.1 + 0.2, 0.3) == (None, None)  # rounding is no spread
    assert ends(0.3, 0.31) == (0.3, 0.31)
    drawn = drawable({"f1": found["f1"].as_dict(), "gone": None})
    assert drawn["f1"]["value"] == 1.0
    assert np.isnan(drawn["f1"]["low"])


def test_reports_say_that_there_is_no_interval():
    same, spread = interval(np.zeros(8)), interval(np.array([0.0, 1.0] * 8))
    assert bracketed(same, "+.2f") == "+0.00 [no interval: all draws agree]"
    assert ranged({"value": 0.5, "low": 0.5, "high": 0.5}, ".1f") == "0.5 (no interval: all draws agree)"
    assert bracketed(interval(np.array([0.7])), ".1f") == "0.7 [no interval: one item]"
    assert ranged({"value": 0.5, "low": 0.25, "high": 0.75}, ".2f") == "0.50 (0.25 to 0.75)"
    assert spread["low"] < 0.5 < spread["high"]
    assert [above(interval(np.ones(n))) for n in (1, 5, 6)] == [False, False, True]
    assert [below(interval(-np.ones(n))) for n in (5, 6)] == [False, True]
    assert [above(same), below(same), above(spread), above(spread, 0.5)] == [False, False, True, False]
    assert not above({"value": None, "low": None, "high": None})


def test_shares_at_the_edge_have_an_interval():
    for hits in (0, 24):
        found = share(np.array([1.0] * hits + [0.0] * (24 - hits)))
        assert (found["value"], found["low"], found["high"], found["n"]) == (hits / 24, *wilson(hits, 24), 24)
    parts = np.array([0.5, 1.0, np.nan])  # two phrases of one scene: no proportion
    assert share(parts) == interval(parts)
