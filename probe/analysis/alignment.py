"""Implicit multimodal alignment: how like perceptual and textual tokens are (arXiv 2405.16700, Eq. 3 and appendix E.1).

Paper or code: the paper speaks of the tokens of one example; its published code averages over every pair of examples,
matched or not. Here the two are kept apart: what is alike only because all states of a layer point one way is alike in
unmatched pairs too, and the difference is what an example's own picture and words share.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from scipy import stats
from torch import Tensor

from probe.analysis.stats import Interval

MODES = ("avg", "avg_trimmed", "max", "min", "mean", "median", "max_mean")  # of one pair of sets; `global` is over all examples
DIAGONAL = ("diag_mean", "diag_median", "diag_max")
NORMS = ("norm_of_mean", "norm_min", "norm_median", "norm_max")
TOGETHER = 200  # tokens whose distributions are worked out at once, for the sake of memory and of a processor's cache
DIVERGENCES = ("kl_zipped", "kl_of_means", "js_of_means", "entropy_p", "entropy_t")


def unit(states: Float[Tensor, "*any width"]) -> Float[Tensor, "*any width"]:
    """States of length one (... width), in float32; a state that is zero stays zero."""
    return torch.nn.functional.normalize(states.float(), dim=-1, eps=1e-12)


@dataclass(frozen=True)
class Tokens:
    """A set of tokens, with what every comparison asks of it, worked out once; float32."""

    norms: Float[Tensor, " token"]
    units: Float[Tensor, "token width"]
    mean: Float[Tensor, " width"]
    trimmed: Float[Tensor, " width"]  # the mean without norms beyond theirs by two standard deviations: sinks and registers

    @classmethod
    def of(cls, states: Float[Tensor, "token width"]) -> "Tokens":
        """The set of some states (token width)."""
        states = states.float()
        norms = states.norm(dim=-1)
        usual = norms.mean() + 2 * norms.std(correction=0)
        kept = (norms <= usual * (1 + 1e-6)).float()  # norms that are all the same differ from their mean by rounding
        return cls(norms, states / norms.clamp(min=1e-12)[:, None], states.mean(0), kept @ states / kept.sum())


def similarities(p: Float[Tensor, "p width"], t: Float[Tensor, "t width"]) -> dict[str, float]:
    """The cosine similarities of two sets of tokens in every mode: perceptual (p width) and textual (t width).

    `avg` is SimAvg, the cosine of the mean tokens (`avg_trimmed` without perceptual tokens of massive norm); `max`, `min`,
    `mean` and `median` go over all pairs of tokens; `max_mean` is the mean over perceptual tokens of their best match.
    """
    return dict(zip(MODES, similar(Tokens.of(p), Tokens.of(t)).tolist(), strict=True))


def similar(p: Tokens, t: Tokens) -> Float[Tensor, " mode"]:
    """The values of `similarities`, where they were computed."""
    each = p.units @ t.units.T
    best = each.amax(1)
    means = cosine(torch.stack([p.mean, p.trimmed]), t.mean)
    rest = torch.stack([best.amax(), each.amin(), each.mean(), _median(each.flatten()), best.mean()])
    return torch.cat([means, rest])


def diagonal(a: Float[Tensor, "token width"], b: Float[Tensor, "token width"]) -> dict[str, float]:
    """How like themselves tokens are at two layers: mean, median and maximum of each token's cosine with itself."""
    return dict(zip(DIAGONAL, alike_themselves(unit(a), unit(b)).tolist(), strict=True))


def alike_themselves(a: Float[Tensor, "token width"], b: Float[Tensor, "token width"]) -> Float[Tensor, " mode"]:
    """The values of `diagonal` from states of length one, where they were computed."""
    each = (a * b).sum(-1)
    return torch.stack([each.mean(), _median(each), each.amax()])


def cosine(a: Float[Tensor, "*a width"], b: Float[Tensor, "*b width"]) -> Float[Tensor, "*both"]:
    """Cosine over the last dimension, the others broadcast; 0 with a vector that is zero."""
    return (unit(a) * unit(b)).sum(-1)


def norms(states: Float[Tensor, "token width"]) -> dict[str, float]:
    """The norm of the mean token, and the least, median and largest norm of a token."""
    return dict(zip(NORMS, sizes(Tokens.of(states)).tolist(), strict=True))


def sizes(tokens: Tokens) -> Float[Tensor, " kind"]:
    """The values of `norms`, where they were computed."""
    each = tokens.norms
    return torch.stack([tokens.mean.norm(), each.amin(), _median(each), each.amax()])


def _median(values: Float[Tensor, " n"]) -> Float[Tensor, ""]:
    """The median as NumPy has it: the mean of the middle two of an even number."""
    return (values.median() - (-values).median()) / 2  # torch's is the lower of the middle two


def mean_over_pairs(
    a: Float[Tensor, "*any width"], b: Float[Tensor, "*any width"], n_a: int, n_b: int
) -> Float[Tensor, "*any"]:
    """The mean cosine over every pair of two sets, from the sums of their unit vectors: (sum a) . (sum b) / (n_a n_b)."""
    return (a.double() * b.double()).sum(-1) / (n_a * n_b)


def mean_over_unmatched(
    a: Float[Tensor, "*any width"], b: Float[Tensor, "*any width"], matched: Float[Tensor, "*any"], n: int
) -> Float[Tensor, "*any"]:
    """The mean cosine over pairs of different examples: all pairs without the n matched ones, whose cosines sum to `matched`."""
    return ((a.double() * b.double()).sum(-1) - matched.double()) / (n * (n - 1))


def of_centroids(
    p: Float[np.ndarray, "group state width"], t: Float[np.ndarray, "group state width"], counts: Sequence[int]
) -> Interval:
    """The mode `global` at each state: the cosine of both sides' centroids over all tokens of all examples (appendix E.1).

    From the sums of all token states of some groups of examples, each of so many (`counts`): memory does not grow with examples. The 95 % interval is
    a jackknife that leaves one group out at a time, which may differ in size (Busing, Meijer and van der Leeden 1999), with Student's t, on
    Fisher's scale, where a cosine has no bounds. Its ends are NaN with fewer than four groups. That centroids of few examples are less alike than
    those of many is no matter of the interval.
    """
    value = _cosines(p.sum(0), t.sum(0))
    groups = len(p)
    if groups < 4:
        return Interval(value, np.full_like(value, np.nan), np.full_like(value, np.nan))
    whole, without = _fisher(value), _fisher(_cosines(p.sum(0) - p, t.sum(0) - t))
    size = np.asarray(counts, dtype=np.float64)[:, None]
    times = size.sum() / size
    centre = groups * whole - ((1 - 1 / times) * without).sum(0)
    variance = ((times * whole - (times - 1) * without - centre) ** 2 / (times - 1)).mean(0)
    half = stats.t.ppf(0.975, groups - 1) * np.sqrt(variance)
    return Interval(value, np.tanh(whole - half), np.tanh(whole + half))


def _cosines(a: Float[np.ndarray, "*any width"], b: Float[np.ndarray, "*any width"]) -> Float[np.ndarray, "*any"]:
    """As `cosine`, in the precision that sums over many examples want; 0 with a vector that is zero."""
    return np.asarray((a * b).sum(-1) / np.maximum(np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1), 1e-12))


def _fisher(cosines: Float[np.ndarray, "*any"]) -> Float[np.ndarray, "*any"]:
    return np.arctanh(np.clip(cosines, -1 + 1e-12, 1 - 1e-12))


@dataclass(frozen=True)
class Spoken:
    """The vocabulary distributions of a set of tokens: log-probabilities of the first of them and of their mean, and their mean entropy in nats."""

    each: Float[Tensor, "first vocabulary"]
    mean: Float[Tensor, " vocabulary"]
    entropy: Float[Tensor, ""]

    @classmethod
    def of(cls, logits: Float[Tensor, "token vocabulary"], first: int) -> "Spoken":
        """The distributions of some logits, or log-probabilities (token vocabulary); of so many tokens they are kept one by one."""
        total, entropy = logits.new_zeros(logits.shape[-1], dtype=torch.float32), logits.new_zeros((), dtype=torch.float32)
        for some in logits.split(TOGETHER):
            log_probs = some.float().log_softmax(-1)
            probs = log_probs.exp()
            total += probs.sum(0)
            # Whatever lies below the bound is nothing in float32, and minus infinity times nothing is no number.
            entropy -= (probs * log_probs.clamp(min=-200)).sum()
        # The exponentials are there for the entropies; where their mean is nothing in float32, its logarithm needs another way.
        mean = total / len(logits)
        usual = bool((mean > 1e-30).all())
        log_mean = mean.log() if usual else logits.float().log_softmax(-1).logsumexp(0) - math.log(len(logits))
        return cls(logits[:first].float().log_softmax(-1), log_mean, entropy / len(logits))


def divergences(p: Float[Tensor, "p vocabulary"], t: Float[Tensor, "t vocabulary"]) -> dict[str, float]:
    """How unlike the vocabulary distributions of two sets of tokens are, from their log-probabilities; natural logarithms.

    `kl_zipped` compares the k-th perceptual with the k-th textual token up to the shorter set, as published (section 4 of
    arXiv 2405.16700); `kl_of_means` and `js_of_means` (at most ln 2) compare the mean distributions, which does not depend
    on which token comes first. `entropy_p` and `entropy_t` are means over tokens.
    """
    return dict(zip(DIVERGENCES, diverging(Spoken.of(p, len(t)), Spoken.of(t, len(p))).tolist(), strict=True))


def diverging(p: Spoken, t: Spoken) -> Float[Tensor, " kind"]:
    """The values of `divergences`, where they were computed."""
    short = min(len(p.each), len(t.each))
    middle = torch.logaddexp(p.mean, t.mean) - math.log(2)
    js = (kl(p.mean, middle) + kl(t.mean, middle)) / 2
    return torch.stack([kl(p.each[:short], t.each[:short]).mean(), kl(p.mean, t.mean), js, p.entropy, t.entropy])


def kl(p: Float[Tensor, "*any vocabulary"], q: Float[Tensor, "*any vocabulary"]) -> Float[Tensor, "*any"]:
    """KL(p || q) of log-probabilities, nats; where p is 0 there is nothing to add."""
    probs = p.exp()
    return torch.where(probs > 0, probs * (p - q), 0.0).sum(-1).clamp(min=0)


def layers_for_vocabulary(n_states: int, count: int = 10) -> list[int]:
    """Indices of about `count` evenly spaced states, both ends among them: 0, 2, 4, 8, ... of the paper, for any depth."""
    return sorted({round(i * (n_states - 1) / (count - 1)) for i in range(count)})


def score(similar: Sequence[float]) -> float:
    """The IMA score: the mean over layers of an example's similarities (Fig. 9 of arXiv 2405.16700)."""
    return sum(similar) / len(similar)


def in_the_plane(clouds: Sequence[Float[np.ndarray, "_ width"]], seed: int = 0) -> dict[str, list[Float[np.ndarray, "_ 2"]]]:
    """Kinds of states laid out together, by `PCA` and by `t-SNE` (perplexity 30, or what so few points allow): by way, the points of each kind.

    A way that wants more points than there are is left out: PCA three, t-SNE seven.
    """
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE

    together = np.concatenate(list(clouds))
    made = {"PCA": PCA(2, random_state=seed).fit_transform(together)} if len(together) > 2 else {}
    near = min(30.0, (len(together) - 1) / 3)
    if near >= 2:
        made["t-SNE"] = TSNE(2, perplexity=near, init="pca", random_state=seed).fit_transform(together)
    ends = np.cumsum([len(cloud) for cloud in clouds])[:-1]
    return {way: np.split(points, ends) for way, points in made.items()}
