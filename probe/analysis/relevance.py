"""Relevance through attention, one row at a time: rollout, gradient-weighted attention, and what is done with scores.

The rules multiply matrices of all positions by all positions, layer after layer; the answer needs one row of the product. Read from
the top, r <- r M for each layer's matrix M, the row is a vector and no matrix of the product is ever held. M itself is
made and used up a block of rows at a time.
"""

from collections.abc import Iterator

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from probe.attention import Call, attend_rows

RANDOM = "random"  # the order that the others are held against
BLOCK = 2**24  # attention weights that are held at once: 64 MiB in float32,
PARTS, FEWEST = 8, 64  # and never more than this part of a layer's, but for so few rows
FUSIONS = ("mean", "min", "max")


def blocks(call: Call, relevance: Float[Tensor, "batch position"]) -> Iterator[tuple[Tensor, Tensor]]:
    """Blocks of query rows that carry relevance: the rows, and their attention (batch head row key), in float32."""
    batch, heads, length, _ = call.query.shape
    size = max(1, min(BLOCK // (batch * heads * call.key.shape[2]), max(FEWEST, length // PARTS)))
    for rows in torch.arange(length, device=relevance.device).split(size):
        if bool((relevance[:, rows] != 0).any()):  # above the topmost layers most rows; in the topmost all but one
            picked = rows.expand(batch, -1)
            yield rows, attend_rows(call, picked, *call.visible(picked)).probability


def rollout_step(
    relevance: Float[Tensor, "batch position"], call: Call, fusion: str = "mean"
) -> Float[Tensor, "batch position"]:
    """R A', where A' is the layer's attention, heads fused, plus the identity, each row normalised (arXiv 2005.00928, section 4)."""
    made = torch.zeros_like(relevance)
    for rows, attention in blocks(call, relevance):
        fused = attention.mean(1) if fusion == "mean" else getattr(attention, f"a{fusion}")(1)
        fused[:, torch.arange(len(rows)), rows] += 1
        made += (relevance[:, None, rows] @ (fused / fused.sum(-1, keepdim=True)))[:, 0]
    return made


def gradient_step(
    relevance: Float[Tensor, "batch position"], call: Call, slope: Float[Tensor, "batch position head dim"]
) -> Float[Tensor, "batch position"]:
    """R + r A', where A' is the mean over heads of the positive part of gradient times attention (arXiv 2103.15679, equations 5 and 6).

    `slope` is the gradient of what the heads read. What a row reads is its weights times the values: the gradient of a weight is
    the slope's product with the value that it weighs.
    """
    heads, groups = call.query.shape[1], call.value.shape[1]
    values = call.value.float().repeat_interleave(heads // groups, 1).transpose(2, 3)  # batch head dim key
    made = relevance.clone()
    for rows, attention in blocks(call, relevance):
        of_weights = slope[:, rows].float().transpose(1, 2) @ values
        made += (relevance[:, None, rows] @ (attention * of_weights).clamp_(min=0).mean(1))[:, 0]
    return made


def share_inside(scores: Float[np.ndarray, " position"], inside: Int[np.ndarray, " index"]) -> float:
    """The share of the positive scores that lies inside; NaN where nothing is positive."""
    positive = np.clip(scores, 0, None)
    return float(positive[inside].sum() / positive.sum()) if positive.sum() > 0 else float("nan")


def ranked(scores: Float[np.ndarray, " position"]) -> Int[np.ndarray, " position"]:
    """Indices from the highest score to the lowest, earlier positions first among equals."""
    return np.argsort(-scores, kind="stable")
