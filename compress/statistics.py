"""What is summed of the inputs of linear maps while a model is calibrated: small accumulators, fed with rows of tokens."""

from typing import Protocol

import torch
from jaxtyping import Float, Float64
from torch import Tensor


class Statistic(Protocol):
    """A sum over tokens. `n` counts them."""

    n: int

    def add(self, rows: Float[Tensor, "row in"]) -> None: ...


class Squares:
    """The sum of the squares of every input: what Wanda asks for (arXiv 2306.11695). Each batch in float32, batches in float64."""

    def __init__(self) -> None:
        self.n, self.sums = 0, torch.zeros(0, dtype=torch.float64)

    def add(self, rows: Float[Tensor, "row in"]) -> None:
        found = rows.float().square().sum(0).double()
        self.sums, self.n = found if not self.n else self.sums + found, self.n + len(rows)

    @property
    def norms(self) -> Float[Tensor, " in"]:
        """The root of the mean square of each input, float32; its scale is the same for every weight of a row."""
        return (self.sums / max(1, self.n)).sqrt().float()


class Gram:
    """X^T X: what SparseGPT asks for (arXiv 2301.00774). Products of float32, summed in float64."""

    def __init__(self) -> None:
        self.n, self.sums = 0, torch.zeros(0, 0, dtype=torch.float64)

    def add(self, rows: Float[Tensor, "row in"]) -> None:
        wide = rows.float()
        found = (wide.T @ wide).double()
        self.sums, self.n = found if not self.n else self.sums.add_(found), self.n + len(rows)

    @property
    def norms(self) -> Float[Tensor, " in"]:
        """As `Squares` has it: the diagonal is the same sum."""
        return (self.sums.diagonal() / max(1, self.n)).sqrt().float()


class Moments:
    """Mean and variance of every input: what FLAP asks for (arXiv 2312.11983). Batches are merged by their means, so that nothing cancels."""

    def __init__(self) -> None:
        self.n, self.mean, self.deviations = 0, torch.zeros(0, dtype=torch.float64), torch.zeros(0, dtype=torch.float64)

    def add(self, rows: Float[Tensor, "row in"]) -> None:
        if not len(rows):
            return
        wide = rows.double()
        mean = wide.mean(0)
        around = (wide - mean).square().sum(0)
        if not self.n:
            self.n, self.mean, self.deviations = len(rows), mean, around
            return
        n, gap = self.n + len(rows), mean - self.mean
        self.deviations = self.deviations + around + gap.square() * (self.n * len(rows) / n)
        self.mean, self.n = self.mean + gap * (len(rows) / n), n

    @property
    def variance(self) -> Float64[Tensor, " in"]:
        """Divided by one less than the number of tokens."""
        return self.deviations / max(1, self.n - 1)

    @property
    def squares(self) -> Float64[Tensor, " in"]:
        """The sum of the squares, as `Squares` has it."""
        return self.deviations + self.n * self.mean.square()
