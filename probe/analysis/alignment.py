"""Implicit multimodal alignment: how like perceptual and textual tokens are (arXiv 2405.16700, Eq. 3 and appendix E.1).

Paper or code: the paper speaks of the tokens of one example; its published code averages over every pair of examples,
matched or not. Here the two are kept apart: what is alike only because all states of a layer point one way is alike in
unmatched pairs too, and the difference is what an example's own picture and words share.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

MODES = ("avg", "avg_trimmed", "max", "min", "mean", "median", "max_mean")
DIAGONAL = ("diag_mean", "diag_median", "diag_max")
NORMS = ("norm_of_mean", "norm_min", "norm_median", "norm_max")


def unit(states: Float[Tensor, "*any width"]) -> Float[Tensor, "*any width"]:
    """States of length one (... width), in float32; a state that is zero stays zero."""
    return torch.nn.functional.normalize(states.float(), dim=-1, eps=1e-12)


def trimmed(states: Float[Tensor, "token width"]) -> Float[Tensor, "kept width"]:
    """The states without those whose norm is beyond the mean by two standard deviations: sinks and registers."""
    norms = states.float().norm(dim=-1)
    kept = norms <= norms.mean() + 2 * norms.std(correction=0)
    return states[kept]


def similarities(p: Float[Tensor, "p width"], t: Float[Tensor, "t width"]) -> dict[str, float]:
    """The cosine similarities of two sets of tokens in every mode: perceptual (p width) and textual (t width).

    `avg` is SimAvg, the cosine of the mean tokens (`avg_trimmed` without perceptual tokens of massive norm); `max`, `min`,
    `mean` and `median` go over all pairs of tokens; `max_mean` is the mean over perceptual tokens of their best match.
    """
    p, t = p.float(), t.float()
    each = unit(p) @ unit(t).T
    best = each.amax(1)
    values = [
        cosine(p.mean(0), t.mean(0)), cosine(trimmed(p).mean(0), t.mean(0)), best.amax(), each.amin(), each.mean(),
        _median(each.flatten()), best.mean(),
    ]  # fmt: skip
    return dict(zip(MODES, torch.stack(values).tolist(), strict=True))


def diagonal(a: Float[Tensor, "token width"], b: Float[Tensor, "token width"]) -> dict[str, float]:
    """How like themselves tokens are at two layers: mean, median and maximum of each token's cosine with itself."""
    each = cosine(a, b)
    return dict(zip(DIAGONAL, torch.stack([each.mean(), _median(each), each.amax()]).tolist(), strict=True))


def cosine(a: Float[Tensor, "*a width"], b: Float[Tensor, "*b width"]) -> Float[Tensor, "*both"]:
    """Cosine over the last dimension, the others broadcast; 0 with a vector that is zero."""
    return (unit(a) * unit(b)).sum(-1)


def norms(states: Float[Tensor, "token width"]) -> dict[str, float]:
    """The norm of the mean token, and the least, median and largest norm of a token."""
    each = states.float().norm(dim=-1)
    values = [states.float().mean(0).norm(), each.amin(), _median(each), each.amax()]
    return dict(zip(NORMS, torch.stack(values).tolist(), strict=True))


def _median(values: Float[Tensor, " n"]) -> Float[Tensor, ""]:
    """The median as NumPy has it: the mean of the middle two of an even number."""
    n = len(values)
    upper = values.kthvalue(n // 2 + 1).values
    return upper if n % 2 else (values.kthvalue(n // 2).values + upper) / 2


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


def divergences(p: Float[Tensor, "p vocabulary"], t: Float[Tensor, "t vocabulary"]) -> dict[str, float]:
    """How unlike the vocabulary distributions of two sets of tokens are, from their log-probabilities; natural logarithms.

    `kl_zipped` compares the k-th perceptual with the k-th textual token up to the shorter set, as published (section 4 of
    arXiv 2405.16700); `kl_of_means` and `js_of_means` (at most ln 2) compare the mean distributions, which does not depend
    on which token comes first. `entropy_p` and `entropy_t` are means over tokens.
    """
    p, t = p.float(), t.float()
    short = min(len(p), len(t))
    mean_p, mean_t = _log_mean(p), _log_mean(t)
    middle = torch.logaddexp(mean_p, mean_t) - torch.log(torch.tensor(2.0))
    return {
        "kl_zipped": float(kl(p[:short], t[:short]).mean()),
        "kl_of_means": float(kl(mean_p, mean_t)),
        "js_of_means": float((kl(mean_p, middle) + kl(mean_t, middle)) / 2),
        "entropy_p": float(entropy(p).mean()),
        "entropy_t": float(entropy(t).mean()),
    }


def kl(p: Float[Tensor, "*any vocabulary"], q: Float[Tensor, "*any vocabulary"]) -> Float[Tensor, "*any"]:
    """KL(p || q) of log-probabilities, nats; where p is 0 there is nothing to add."""
    return torch.where(p.exp() > 0, p.exp() * (p - q), 0.0).sum(-1).clamp(min=0)


def entropy(p: Float[Tensor, "*any vocabulary"]) -> Float[Tensor, "*any"]:
    """Entropy of log-probabilities, nats."""
    return -torch.where(p.exp() > 0, p.exp() * p, 0.0).sum(-1)


def _log_mean(p: Float[Tensor, "token vocabulary"]) -> Float[Tensor, " vocabulary"]:
    return p.logsumexp(0) - torch.log(torch.tensor(float(len(p))))


def layers_for_vocabulary(n_states: int, count: int = 10) -> list[int]:
    """Indices of about `count` evenly spaced states, both ends among them: 0, 2, 4, 8, ... of the paper, for any depth."""
    return sorted({round(i * (n_states - 1) / (count - 1)) for i in range(count)})


def score(similar: Sequence[float]) -> float:
    """The IMA score: the mean over layers of an example's similarities (Fig. 9 of arXiv 2405.16700)."""
    return sum(similar) / len(similar)
