"""Do two kinds of tokens use the same weights? Wanda's subnetworks and how much they overlap (arXiv 2405.16700, section 5)."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def wanda_kept(
    weight: Float[Tensor, "out in"], squares: Float[Tensor, " in"], sparsity: float
) -> Bool[Tensor, "out in"]:  # fmt: skip
    """Which weights Wanda keeps (arXiv 2306.11695): in each output row all but the int(in x sparsity) least |W| sqrt(squares).

    `squares` are sums (or means) of the squared inputs over calibration tokens. Ties go to the earlier column being
    pruned, as in a stable sort.
    """
    score = weight.float().abs() * squares.float().sqrt()
    count = int(weight.shape[1] * sparsity)
    kept = torch.ones_like(score, dtype=torch.bool)
    return kept.scatter(1, score.sort(dim=1, stable=True).indices[:, :count], False)


def magnitude_kept(weight: Float[Tensor, "out in"], sparsity: float) -> Bool[Tensor, "out in"]:
    """Which weights are kept by their magnitude alone: what Wanda keeps when every input is as large as every other."""
    return wanda_kept(weight, torch.ones(weight.shape[1], device=weight.device), sparsity)


def iou(a: Bool[Tensor, "out in"], b: Bool[Tensor, "out in"]) -> float:
    """Intersection over union of the kept weights."""
    return float((a & b).sum() / (a | b).sum().clamp(min=1))


def chance_iou(sparsity: float) -> float:
    """What two random masks of this sparsity reach: k / (2 - k) with the share k = 1 - sparsity that is kept."""
    return (1 - sparsity) / (1 + sparsity)
