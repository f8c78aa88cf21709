"""MMEvalPro (arXiv 2407.00468): a question counts when what it rests on, seeing and knowing, is answered as well."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np

from probe.analysis.stats import resampled_means
from studies.tasks.scores import Score, from_draws, proportion

PARTS = ("Origin", "Perception", "Knowledge")


@dataclass(frozen=True)
class Triplets:
    """Scores over complete triplets, and the ids of those that were left out because a member was missing or stood there twice."""

    scores: dict[str, Score]
    incomplete: tuple[str, ...]


def mmevalpro(answers: Iterable[tuple[str, str, bool]], seed: int = 0) -> Triplets:
    """Scores from (triplet id, `Origin` | `Perception` | `Knowledge`, right?).

    AA: accuracy over all questions. PA, KA: over the perception and the knowledge questions. GA, genuine accuracy: the share of triplets
    that are right in all three. CG, the consistency gap: accuracy on the original questions less GA, which is the share of triplets that
    are right for the wrong reason. PC, KC: how often the perception (knowledge) question is right where the original one is;
    None where none is. AA's interval is a bootstrap over triplets, since the three questions of one are not independent. The published script divides the accuracies of the parts by all questions, that is by three times too many.
    """
    kept: dict[str, dict[str, bool]] = {}
    seen: Counter[tuple[str, str]] = Counter()
    for triplet, part, right in answers:
        seen[triplet, part] += 1
        kept.setdefault(triplet, {})[part] = right
    whole = {name: parts for name, parts in kept.items() if set(parts) == set(PARTS) and all(seen[name, p] == 1 for p in PARTS)}
    n, dropped = len(whole), len(kept) - len(whole)
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
    return Triplets(scores, tuple(sorted(set(kept) - set(whole))))


def _average(shares: list[float], seed: int, dropped: int) -> Score:
    """Accuracy over all questions from each triplet's share of right answers."""
    n, hits = len(shares), float(round(3 * sum(shares)))
    if not n:
        return Score("average accuracy", None, None, None, 0.0, 0.0, 0, dropped)
    draws = resampled_means(np.array(shares), seed)
    return replace(from_draws("average accuracy", hits / (3 * n), draws, hits, 3.0 * n, n), n_dropped=dropped)
