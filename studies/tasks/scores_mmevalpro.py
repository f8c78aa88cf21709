"""MMEvalPro (arXiv 2407.00468): a question counts when what it rests on, seeing and knowing, is answered as well."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float

from probe.analysis.stats import resampled_means
from studies.tasks.scores import Score, from_draws, proportion

PARTS = ("Origin", "Perception", "Knowledge")


@dataclass(frozen=True)
class Triplets:
    """Scores over complete triplets, and the ids of those that were left out because a member was missing or stood there twice."""

    scores: dict[str, Score]
    incomplete: tuple[str, ...]


@dataclass(frozen=True)
class Sources:
    """Scores over all triplets together (`micro`), their mean over the sources (`macro`), and those of each source (`of`)."""

    micro: Triplets
    macro: dict[str, Score]
    of: dict[str, Triplets]


def mmevalpro(answers: Iterable[tuple[str, str, bool]], seed: int = 0) -> Triplets:
    """Scores from (triplet id, `Origin` | `Perception` | `Knowledge`, right?).

    AA: accuracy over all questions. OA, PA, KA: over the original, the perception and the knowledge questions. GA, genuine accuracy: the share of
    triplets that are right in all three. CG, the consistency gap: accuracy on the original questions less GA, which is the share of triplets that
    are right for the wrong reason. PC, KC: how often the perception (knowledge) question is right where the original one is;
    None where none is. AA's interval is a bootstrap over triplets, since the three questions of one are not independent. The published script divides the accuracies of the parts by all questions, that is by three times too many.
    """
    whole, incomplete = _complete(answers)
    n, dropped = len(whole), len(incomplete)
    count = {part: sum(parts[part] for parts in whole.values()) for part in PARTS}
    genuine = sum(all(parts.values()) for parts in whole.values())
    after = {part: sum(parts["Origin"] and parts[part] for parts in whole.values()) for part in ("Perception", "Knowledge")}

    def share(metric: str, hits: int, of: int) -> Score:
        return proportion(metric, hits, of, n, dropped)

    scores = {
        "AA": _average([sum(parts.values()) / 3 for parts in whole.values()], seed, dropped), "OA": share("accuracy on originals", count["Origin"], n),
        "PA": share("accuracy on perception", count["Perception"], n), "KA": share("accuracy on knowledge", count["Knowledge"], n),
        "GA": share("genuine accuracy", genuine, n), "CG": share("consistency gap", count["Origin"] - genuine, n),
        "PC": share("perception where the original is right", after["Perception"], count["Origin"]),
        "KC": share("knowledge where the original is right", after["Knowledge"], count["Origin"]),
    }  # fmt: skip
    return Triplets(scores, incomplete)


def _complete(answers: Iterable[tuple[str, str, bool]]) -> tuple[dict[str, dict[str, bool]], tuple[str, ...]]:
    """Which parts are right of each triplet that has all three once, and the ids of the others."""
    kept: dict[str, dict[str, bool]] = {}
    seen: Counter[tuple[str, str]] = Counter()
    for triplet, part, right in answers:
        seen[triplet, part] += 1
        kept.setdefault(triplet, {})[part] = right
    whole = {name: parts for name, parts in kept.items() if set(parts) == set(PARTS) and all(seen[name, p] == 1 for p in PARTS)}
    return whole, tuple(sorted(set(kept) - set(whole)))


def _average(shares: list[float], seed: int, dropped: int) -> Score:
    """Accuracy over all questions from each triplet's share of right answers."""
    n, hits = len(shares), float(round(3 * sum(shares)))
    if not n:
        return Score("average accuracy", None, None, None, 0.0, 0.0, 0, dropped)
    draws = resampled_means(np.array(shares), seed)
    return replace(from_draws("average accuracy", hits / (3 * n), draws, hits, 3.0 * n, n), n_dropped=dropped)


# --- several sources -------------------------------------------------------------------------------------------------


def named(source: str, triplet: str) -> str:
    """A triplet's id among those of all sources."""
    return f"{source}/{triplet}" if source else triplet


def by_source(answers: Iterable[tuple[str, str, str, bool]], seed: int = 0) -> Sources:
    """Scores from (source, triplet id, part, right?); triplets of two sources are two, though their ids be one.

    `macro` is the plain mean over sources (MMMU, ScienceQA and MathVista as published), with a bootstrap over the triplets of each; its numerator is the
    sum over sources and its denominator their number. None where one source has none, of a source without a complete triplet say. A source of one triplet
    adds nothing to the interval, as it has no spread.
    """
    told: dict[str, list[tuple[str, str, bool]]] = {}
    for source, triplet, part, right in answers:
        told.setdefault(source, []).append((triplet, part, right))
    every = ((named(source, t), part, right) for source, mine in told.items() for t, part, right in mine)
    of = {source: mmevalpro(told[source], seed) for source in sorted(told)}
    draws = [_draws(told[source], seed + k) for k, source in enumerate(of)]  # a seed each: sources are drawn apart
    return Sources(mmevalpro(every, seed), _macro(of, draws), of)


def _macro(of: Mapping[str, Triplets], draws: list[dict[str, np.ndarray]]) -> dict[str, Score]:
    made = {}
    for name, first in next(iter(of.values()), Triplets({}, ())).scores.items():
        scores = [one.scores[name] for one in of.values()]
        values = [one.value for one in scores if one.value is not None]
        total, n, known = float(sum(values)), sum(one.n for one in scores), len(values) == len(scores)
        drawn = np.mean([one[name] for one in draws], axis=0) if known else np.empty(0)
        score = from_draws(
            f"{first.metric}, mean over sources", total / len(scores) if known else None, drawn, total, float(len(scores)), n
        )
        made[name] = replace(score, n_dropped=sum(one.n_dropped for one in scores))
    return made


def _draws(answers: Iterable[tuple[str, str, bool]], seed: int) -> dict[str, Float[np.ndarray, " resample"]]:
    """Every score of one source over resampled triplets; NaN where it is not defined in a resample."""
    whole, _ = _complete(answers)
    if not whole:
        return {}
    o, p, k = np.array([[parts[name] for name in PARTS] for parts in whole.values()], dtype=np.float64).T
    columns = np.stack([(o + p + k) / 3, o, p, k, o * p * k, o * p, o * k], axis=1)
    average, origin, seen, knew, genuine, both_seen, both_knew = resampled_means(columns, seed).T
    with np.errstate(invalid="ignore", divide="ignore"):
        return {
            "AA": average, "OA": origin, "PA": seen, "KA": knew, "GA": genuine, "CG": origin - genuine, "PC": both_seen / origin,
            "KC": both_knew / origin,
        }  # fmt: skip
