"""Which weights of a linear map go, and what the others become: magnitude, Wanda, SparseGPT. Pure functions on one matrix.

All keep exact counts: where scores tie, the lower column (for `smallest_of_all`, the earlier weight) goes first.
"""

import re
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from compress.statistics import Gram, Squares, Statistic
from probe.errors import PassError

BLOCK, DAMP = 128, 0.01  # SparseGPT's: columns that choose together; what is added to the diagonal, over its mean


@dataclass(frozen=True)
class Pattern:
    """How much goes: a share of each matrix, or of each `of` consecutive inputs the `gone` least (N:M)."""

    sparsity: float
    gone: int = 0
    of: int = 0

    @classmethod
    def read(cls, text: str) -> "Pattern":
        """`2:4`: two of four go. Raises PassError for what is no such pattern."""
        found = re.fullmatch(r"(\d+):(\d+)", text)
        if not found or not 0 <= int(found[1]) < int(found[2]):
            raise PassError(f"a pattern N:M says that N of M consecutive inputs go, with N below M, as in 2:4, not {text!r}")
        gone, of = int(found[1]), int(found[2])
        return cls(gone / of, gone, of)

    def kept(self, score: Float[Tensor, "out in"], whole: bool = False) -> Bool[Tensor, "out in"]:
        """What stays of a matrix of scores: compared within each output row, or with `whole` over the matrix."""
        if self.of:
            return _of_groups(score, self.gone, self.of)
        return _of_all(score, int(score.numel() * self.sparsity)) if whole else _of_rows(score, self.sparsity)

    def goes(self, shape: tuple[int, int], whole: bool = False) -> int:
        """How many weights go of a matrix."""
        rows, columns = shape
        if self.of:
            return rows * columns // self.of * self.gone
        return int(rows * columns * self.sparsity) if whole else rows * int(columns * self.sparsity)


def _of_rows(score: Tensor, sparsity: float) -> Tensor:
    least = score.sort(dim=1, stable=True).indices[:, : int(score.shape[1] * sparsity)]
    return torch.ones_like(score, dtype=torch.bool).scatter(1, least, False)


def _of_all(score: Tensor, count: int) -> Tensor:
    kept = torch.ones(score.numel(), dtype=torch.bool, device=score.device)
    kept[score.flatten().sort(stable=True).indices[:count]] = False
    return kept.view_as(score)


def _of_groups(score: Tensor, gone: int, of: int) -> Tensor:
    if score.shape[1] % of:
        raise PassError(f"{score.shape[1]} inputs cannot be cut into groups of {of}: leave the map out of the targets")
    groups = score.reshape(-1, of)
    return _of_rows(groups, gone / of).view_as(score) if gone else torch.ones_like(score, dtype=torch.bool)


def magnitude(weight: Float[Tensor, "out in"], pattern: Pattern, whole: bool = True) -> Bool[Tensor, "out in"]:
    """The largest weights stay: of the matrix, or (`whole` False) of each output row."""
    return pattern.kept(weight.float().abs(), whole)


def wanda_score(weight: Float[Tensor, "out in"], sums: Statistic) -> Float[Tensor, "out in"]:
    """|W| times the norm of each input (arXiv 2306.11695, eq. 1)."""
    assert isinstance(sums, Squares | Gram)
    return weight.float().abs() * sums.norms.to(weight.device)


def wanda(weight: Float[Tensor, "out in"], sums: Statistic, pattern: Pattern) -> Bool[Tensor, "out in"]:
    """In each output row those stay whose |W| times the norm of their input is largest."""
    return pattern.kept(wanda_score(weight, sums))


def sparsegpt(weight: Float[Tensor, "out in"], sums: Gram, pattern: Pattern, block: int = BLOCK) -> Float[Tensor, "out in"]:
    """Columns in order: what goes is made up for by the columns that follow (arXiv 2301.00774, algorithm 1).

    Weights choose together within `block` columns, at their values when the block begins (N:M: when the group begins). Inputs that never were other
    than zero go first and disturb nothing. Raises PassError where the inputs' products cannot be inverted.
    """
    made, columns = weight.float().clone(), weight.shape[1]
    if pattern.of and columns % pattern.of:
        raise PassError(f"{columns} inputs cannot be cut into groups of {pattern.of}: leave the map out of the targets")
    factor, dead = _factor(sums, weight.device)
    gone = 0
    step = max(pattern.of, block - block % pattern.of) if pattern.of else block
    for start in range(0, columns, step):
        stop = min(start + step, columns)
        share = int(len(made) * stop * pattern.sparsity) - gone  # so that the whole count is exact, however blocks round
        goes = _chosen(made, factor, dead, (start, stop), share, pattern)
        error = _swept(made, factor, goes, (start, stop), dead, pattern)
        made[:, stop:] -= error @ factor[start:stop, stop:]
        gone += int(share)
    return made.to(weight.dtype)


def _factor(sums: Gram, device: torch.device) -> tuple[Tensor, Tensor]:
    """The upper Cholesky factor of the inverse of the inputs' products, and which inputs were always zero."""
    products = sums.sums.clone() / max(1, sums.n)
    dead = products.diagonal() == 0
    products.diagonal()[dead] = 1.0
    products.diagonal().add_(DAMP * products.diagonal().mean())
    lower, failed = torch.linalg.cholesky_ex(products)
    upper, again = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
    if int(failed) or int(again):
        raise PassError("the products of its inputs cannot be inverted: calibrate on more examples")
    return upper.float().to(device), dead.to(device)


def _saliency(made: Tensor, factor: Tensor, dead: Tensor, span: tuple[int, int]) -> Tensor:
    start, stop = span
    found = (made[:, start:stop] / factor.diagonal()[start:stop]).square()
    return found.masked_fill(dead[start:stop], -1.0)


def _chosen(made: Tensor, factor: Tensor, dead: Tensor, span: tuple[int, int], share: int, pattern: Pattern) -> Tensor:
    """Which weights of a block go; of N:M groups it is said later, as each begins."""
    if pattern.of:
        return torch.zeros(len(made), span[1] - span[0], dtype=torch.bool, device=made.device)
    return ~_of_all(_saliency(made, factor, dead, span), share)


def _swept(
    made: Tensor, factor: Tensor, goes: Tensor, span: tuple[int, int], dead: Tensor, pattern: Pattern
) -> Float[Tensor, "out in"]:  # fmt: skip
    """Goes through a block column by column, in place; the errors that columns after the block make up for."""
    start, stop = span
    errors = torch.zeros_like(made[:, start:stop])
    for column in range(start, stop):
        at = column - start
        if pattern.of and at % pattern.of == 0:
            group = (column, column + pattern.of)
            goes[:, at : at + pattern.of] = ~_of_groups(_saliency(made, factor, dead, group), pattern.gone, pattern.of)
        errors[:, at] = torch.where(goes[:, at], made[:, column], 0.0) / factor[column, column]
        made[:, column] = made[:, column].masked_fill(goes[:, at], 0.0)
        made[:, column + 1 : stop] -= errors[:, at, None] * factor[column, column + 1 : stop]
    return errors
