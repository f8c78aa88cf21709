"""Losses that teach a smaller model what a larger one says: LLaVA-KD (arXiv 2410.16236), as pure functions of logits and states.

Three terms: the distribution of the answer, the distribution at visual positions over the whole vocabulary, and how visual tokens stand to one
another. Everything is computed in float32. Both models read the same prompt, token by token, and speak one vocabulary.

Paper or code: the paper sums over positions, the published utilities average; here is the mean, so that a weight means the same at any length. The
paper does not say which way round its divergence was trained; forward, KL(teacher || student), is the default.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from probe.errors import PassError

Kind = Literal["forward", "reverse", "js"]
Head = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Weights:
    """What each term counts: `answer` is the cross-entropy of the right answer; the others are LLaVA-KD's, 1, 1 and 0.5 in both of its stages."""

    answer: float = 1.0
    response: float = 1.0
    visual: float = 1.0
    relation: float = 0.5


def divergence(
    teacher: Float[Tensor, "*rows vocabulary"], student: Float[Tensor, "*rows other"], kind: Kind = "forward"
) -> Float[Tensor, "*rows"]:
    """Divergence of two models' logits at each position, in nats, over the whole vocabulary.

    `forward` is KL(teacher || student), `reverse` KL(student || teacher), `js` the mean of both to the mean distribution.
    Raises PassError for two vocabularies.
    """
    if teacher.shape[-1] != student.shape[-1]:
        raise PassError(
            f"two vocabularies ({teacher.shape[-1]} and {student.shape[-1]} tokens) have no divergence: a student is taught by a model that "
            f"speaks its own"
        )
    t, s = teacher.float().log_softmax(-1), student.float().log_softmax(-1)
    if kind == "forward":
        return _kl(t, s)
    if kind == "reverse":
        return _kl(s, t)
    middle = torch.logaddexp(t, s) - torch.log(torch.tensor(2.0))
    return (_kl(t, middle) + _kl(s, middle)) / 2


def _kl(p: Tensor, q: Tensor) -> Tensor:
    """KL(p || q) of log-probabilities; what has probability 0 in p counts nothing, however unlikely it is in q."""
    gap = torch.where(p > -torch.inf, p - q, 0.0)
    return (p.exp() * gap).sum(-1)


def response_kl(
    teacher: Float[Tensor, "batch position vocabulary"],
    student: Float[Tensor, "batch position other"],
    where: Bool[Tensor, "batch position"],
    kind: Kind = "forward",
) -> Float[Tensor, ""]:
    """L_res: the mean divergence over the positions that predict the answer (`where`); 0 where there are none."""
    found = divergence(teacher[where], student[where], kind)
    return found.mean() if len(found) else student.sum() * 0.0


def visual_kl(
    teacher: Float[Tensor, "token width"],
    student: Float[Tensor, "token other"],
    heads: tuple[Head, Head],
    kind: Kind = "forward",
    chunk: int = 128,
) -> Float[Tensor, ""]:
    """L_vis: the mean divergence at visual positions, over the whole vocabulary.

    Takes the states after the final norm of all visual tokens, and each model's `heads` (teacher's, student's) from states to logits. Logits exist for
    `chunk` positions at a time, in the backward pass too: of 729 positions and 151,000 words they would else take 440 MB for each model.
    """
    if not len(student):
        return student.sum() * 0.0

    def part(t: Tensor, s: Tensor) -> Tensor:
        with torch.no_grad():
            logits = heads[0](t)
        return divergence(logits, heads[1](s), kind).sum()

    pieces = zip(teacher.split(chunk), student.split(chunk), strict=True)
    total = torch.stack([checkpoint(part, t, s, use_reentrant=False) for t, s in pieces]).sum()
    return total / len(student)


def relation(teacher: Sequence[Float[Tensor, "_ width"]], student: Sequence[Float[Tensor, "_ other"]]) -> Float[Tensor, ""]:
    """L_rel: 1 - cosine of the two models' Gram matrices of visual tokens, the mean over pictures.

    One tensor of states after the final norm (token width) for each picture. Widths may differ: a Gram matrix (token token) knows nothing of them, nor of
    rotations and the scale of states. 0 where there is no picture. Raises PassError where a picture has other tokens in the two models.
    """
    found = [1 - torch.nn.functional.cosine_similarity(*_grams(t, s), dim=0) for t, s in zip(teacher, student, strict=True)]
    return torch.stack(found).mean() if found else torch.zeros(())


def _grams(teacher: Tensor, student: Tensor) -> tuple[Tensor, Tensor]:
    if len(teacher) != len(student):
        raise PassError(
            f"a picture has {len(teacher)} tokens in the teacher and {len(student)} in the student: relations are compared token by token"
        )
    first, second = ((one.float() @ one.float().T).flatten() for one in (teacher, student))
    return first, second
