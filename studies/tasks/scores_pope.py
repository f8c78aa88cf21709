"""POPE (arXiv 2305.10355): does a model affirm that things are there which are not?"""

import re
from collections.abc import Sequence
from typing import Literal

import numpy as np
from scipy import stats

from probe.analysis.stats import RESAMPLES
from probe.errors import StudyError
from studies.tasks.scores import Score, from_draws, proportion

Verdict = Literal["yes", "no", "unknown"]
SPLITS = ("random", "popular", "adversarial")
_YES = frozenset(("yes", "yeah", "yep", "yup", "sure", "certainly"))
_NO = frozenset(("no", "nope", "not", "none", "nothing", "never", "neither", "cannot"))
_UNSURE = re.compile(
    r"(?:\bnot|n't)(?: (?!an?\b|the\b|any\b)\w+)? (?:clear|sure|certain|possible)\b"
    r"|(?:\bnot|n't|\bcannot)(?: be)? (?:know|tell|say|determined?)\b|\bno way (?:to|of)\b|\b(?:unclear|unsure|uncertain)\b"
)
_THERE = ("there is", "there are", "there's", "there're")
_ASKED = (
    re.compile(r"^is there an? (.+?) in the (?:image|picture|imange)\s*\?", re.IGNORECASE),
    re.compile(r"^is there an? (.+?)\s*\?$", re.IGNORECASE),
    re.compile(r"^any (.+?)\s*\??$", re.IGNORECASE),
)


def parse_yes_no(text: str, compat: str | None = None) -> Verdict:
    """What an answer says: yes, no, or unknown.

    The first sentence counts. A first word that is a yes or a no decides; otherwise a denial anywhere (no, not, n't, none, nothing) is a
    no, a yes anywhere a yes, "there is ..." a yes, and everything else unknown, as is a sentence that says both, or that it is not clear. A
    number or a dash before the sentence is skipped.
    `compat="official"` does as the published script: no where `No`, `not` or `no` is a word of the first sentence, and yes for
    everything else, an empty answer and "nothing" included. Raises StudyError for another `compat`.
    """
    if compat == "official":
        words = text.split(".")[0].replace(",", "").split(" ")
        return "no" if {"No", "not", "no"} & set(words) else "yes"
    if compat is not None:
        raise StudyError(f"the parser of yes and no has no compat={compat!r}: there is 'official'")
    sentence = re.split(r"[.!?\n]", re.sub(r"^\W*\d+[.):]\s*", "", text.strip().lower().replace("\u2019", "'")).strip())[0]
    told = re.findall(r"[a-z]+(?:'[a-z]+)?", sentence)
    if told and told[0] in ("yes", "no"):
        return "yes" if told[0] == "yes" else "no"
    affirmed = any(word in _YES for word in told)
    denied = any(word in _NO or word.endswith("n't") for word in told)
    if (affirmed and denied) or _UNSURE.search(" ".join(told)):
        return "unknown"
    if denied:
        return "no"
    return "yes" if affirmed or " ".join(told).startswith(_THERE) else "unknown"


def asked_object(prompt: str) -> str:
    """What a question asks for, by POPE's template or the demo world's; the prompt itself where it follows neither."""
    text = prompt.strip()
    return next((found.group(1) for pattern in _ASKED if (found := pattern.match(text))), text)


def pope(verdicts: Sequence[Verdict], truth: Sequence[bool], seed: int = 0) -> dict[str, Score]:
    """Accuracy, precision, recall, F1 (yes is the positive side), yes-ratio, unknown rate, and the hallucination rate.

    An unknown verdict is a wrong one, and no yes. Precision is None where nothing was affirmed, recall where nothing is there, F1
    where there is neither. The hallucination rate is the share of what is not there that is affirmed.
    """
    said = np.array([verdict == "yes" for verdict in verdicts], dtype=bool)
    denied = np.array([verdict == "no" for verdict in verdicts], dtype=bool)
    there = np.array(truth, dtype=bool)
    n = len(there)
    hit, false, missed = int((said & there).sum()), int((said & ~there).sum()), int((~said & there).sum())
    return {
        "accuracy": proportion("accuracy", hit + int((denied & ~there).sum()), n),
        "precision": proportion("precision", hit, hit + false, n),
        "recall": proportion("recall", hit, hit + missed, n),
        "f1": _f1(hit, false, missed, n, seed),
        "yes_ratio": proportion("yes-ratio", int(said.sum()), n),
        "unknown_rate": proportion("unknown rate", int((~said & ~denied).sum()), n),
        "hallucination": proportion("hallucination rate", false, false + int((~said & ~there).sum()), n),
    }


def _f1(hit: int, false: int, missed: int, n: int, seed: int) -> Score:
    """Resampling items is drawing the three counts and the rest from a multinomial."""
    below = 2 * hit + false + missed
    if not below:
        return Score("F1", None, None, None, 0.0, 0.0, n)
    rng = np.random.default_rng(seed)
    shares = np.array([hit, false, missed, n - hit - false - missed]) / n
    drawn = rng.multinomial(n, shares, size=RESAMPLES).astype(np.float64)
    with np.errstate(invalid="ignore"):
        draws = 2 * drawn[:, 0] / (2 * drawn[:, 0] + drawn[:, 1] + drawn[:, 2])
    return from_draws("F1", 2 * hit / below, draws, 2.0 * hit, float(below), n)


def _areas(scores: np.ndarray, there: np.ndarray) -> np.ndarray:
    """Mann-Whitney, for each row: how often something that is there scores higher than something that is not, ties by halves."""
    above = there.sum(-1)
    below = there.shape[-1] - above
    with np.errstate(invalid="ignore", divide="ignore"):
        found: np.ndarray = ((stats.rankdata(scores, axis=-1) * there).sum(-1) - above * (above + 1) / 2) / (above * below)
    return found


def auroc(p_yes: Sequence[float], truth: Sequence[bool], seed: int = 0, resamples: int = 1000) -> Score:
    """The area under the ROC curve of p(yes) with its bootstrap interval over items; None where all are there, or none is."""
    scores, there = np.array(p_yes, dtype=np.float64), np.array(truth, dtype=bool)
    n = len(there)
    if not there.any() or there.all():
        return Score("AUROC", None, None, None, 0.0, 0.0, n)
    area = float(_areas(scores[None], there[None])[0])
    rng = np.random.default_rng(seed)
    draws = np.concatenate([_areas(scores[k], there[k]) for k in np.array_split(rng.integers(0, n, (resamples, n)), 10)])
    pairs = float(there.sum()) * float((~there).sum())
    return from_draws("AUROC", area, draws, area * pairs, pairs, n)
