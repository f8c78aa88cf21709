"""Do two sets of states represent the same examples alike? CKA, CKNNA and mutual nearest neighbours, layer against layer.

Linear CKA is arXiv 1905.00414 with the unbiased HSIC of Song et al. (2012), CKNNA and mutual k-nearest neighbours are arXiv 2405.07987
(Platonic Representation Hypothesis). Row i of both sets is the same example.

Paper or code: the published code adds 1e-6 to CKA's and CKNNA's denominators and reports the best pair of layers. Here nothing is added, a
similarity that is not defined is NaN, and whole grids come with what permuted pairs give. The biased HSIC goes to 1 with fewer
examples than dimensions: the unbiased one is the default.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from probe.errors import DataError

METRICS = ("cka", "cknna", "knn")
LEAST = 4  # examples: the unbiased HSIC divides by n - 3
PARTS = 20  # of the jackknife


def prepared(
    states: Float[Tensor, "*any n width"], clip: float = 0.95, normalise: bool = True
) -> Float[Tensor, "*any n width"]:
    """States with outliers clipped and of length one, in float64, as the reference prepares them.

    `clip` is a quantile of the absolute values of each example; their mean over examples is the limit, for each set of states by itself (the
    reference takes one limit for all layers). 1 clips nothing.
    """
    states = states.double()
    if clip < 1:
        limit = states.abs().quantile(clip, dim=-1).mean(-1)[..., None, None]
        states = states.clamp(-limit, limit)
    return torch.nn.functional.normalize(states, dim=-1) if normalise else states


def linear_kernel(states: Float[Tensor, "*any n width"]) -> Float[Tensor, "*any n n"]:
    """Inner products of examples."""
    return states @ states.mT


def rbf_kernel(states: Float[Tensor, "*any n width"], sigma: float = 1.0) -> Float[Tensor, "*any n n"]:
    """exp(-|a - b|^2 / (2 sigma^2))."""
    return torch.exp(-torch.cdist(states, states).square() / (2 * sigma**2))


def centred(kernel: Float[Tensor, "*any n n"], unbiased: bool = True) -> Float[Tensor, "*any n n"]:
    """A kernel centred so that HSIC is an inner product of two of them, but for a factor.

    Biased: HKH. Unbiased: the U-centred kernel, whose diagonal is 0. Raises DataError for fewer than 4 examples.
    """
    n = kernel.shape[-1]
    if n < LEAST:
        raise DataError(f"how alike representations are takes at least {LEAST} examples, not {n}")
    if not unbiased:
        return kernel - kernel.mean(-1, keepdim=True) - kernel.mean(-2, keepdim=True) + kernel.mean((-2, -1), keepdim=True)
    diagonal = torch.eye(n, dtype=torch.bool, device=kernel.device)
    kernel = kernel.masked_fill(diagonal, 0)
    rows = kernel.sum(-1, keepdim=True) / (n - 2)
    whole = kernel.sum((-2, -1), keepdim=True) / ((n - 1) * (n - 2))
    return (kernel - rows - rows.mT + whole).masked_fill(diagonal, 0)


def hsic(k: Float[Tensor, "n n"], l: Float[Tensor, "n n"], unbiased: bool = True) -> Float[Tensor, ""]:  # noqa: E741
    """The Hilbert-Schmidt independence criterion of two kernels: tr(KHLH), or Song's unbiased estimate of it over n (n - 3)."""
    product = (centred(k, unbiased) * centred(l, unbiased)).sum()
    n = len(k)
    return product / (n * (n - 3)) if unbiased else product


def cka(a: Float[Tensor, "n a"], b: Float[Tensor, "n b"], unbiased: bool = True) -> float:
    """Linear CKA of two sets of states; 1 for one set and itself, about 0 (unbiased) for sets that have nothing to do with each other."""
    return float(_ratio(*(_flat(linear_kernel(states.double())[None], unbiased) for states in (a, b))))


def neighbours(kernel: Float[Tensor, "*any n n"], k: int) -> Int[Tensor, "*any n k"]:
    """Each example's k nearest others by inner product; of equally near ones the earlier.

    Raises DataError where there are not that many others.
    """
    n = kernel.shape[-1]
    if not 1 <= k < n:
        raise DataError(f"{n} examples have 1 to {n - 1} neighbours each, not {k}")
    others = kernel.masked_fill(torch.eye(n, dtype=torch.bool, device=kernel.device), -torch.inf)
    return others.sort(dim=-1, descending=True, stable=True).indices[..., :k]


def mutual_knn(a: Float[Tensor, "n a"], b: Float[Tensor, "m b"], k: int = 10) -> float:
    """The share of an example's k nearest neighbours that it has in both sets; k / (n - 1) by chance."""
    return float(compare(_one(a, k), _one(b, k), ("knn",))["knn"][0, 0])


def cknna(a: Float[Tensor, "n a"], b: Float[Tensor, "m b"], k: int = 10) -> float:
    """CKA of kernels that keep nothing but the neighbours that both sets agree on; NaN where it is not defined.

    As in the published code: the trace of the product of the two masked kernels, which are not symmetric.
    """
    if k < 2:
        raise DataError(f"CKNNA compares at least 2 neighbours, not {k}")
    return float(compare(_one(a, k), _one(b, k), ("cknna",))["cknna"][0, 0])


def _one(states: Float[Tensor, "n width"], k: int) -> "Kernels":
    return Kernels(linear_kernel(states.double())[None], k)


# --- grids -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Kernels:
    """The kernels of some states (state n n) and what is made of them once."""

    kernel: Float[Tensor, "state n n"]
    k: int = 10
    unbiased: bool = True

    def __len__(self) -> int:
        return self.kernel.shape[-1]

    @cached_property
    def flat(self) -> Float[Tensor, "state cell"]:
        return _flat(self.kernel, self.unbiased)

    @cached_property
    def varies(self) -> Bool[Tensor, " state"]:
        """Whether a state tells examples apart beyond rounding; before the first layer the last position may hold the same for all."""
        whole = self.kernel.square().sum((-2, -1))
        return self.flat.square().sum(-1) > 1e-10 * whole

    @cached_property
    def near(self) -> Int[Tensor, "state n k"]:
        return neighbours(self.kernel, self.k)

    @cached_property
    def member(self) -> Bool[Tensor, "state n n"]:
        """Whether j (last) is among the neighbours of i."""
        return torch.zeros_like(self.kernel, dtype=torch.bool).scatter(-1, self.near, True)

    @cached_property
    def own(self) -> Float[Tensor, " state"]:
        """HSIC of each masked kernel with itself, the denominator of CKNNA."""
        same = torch.arange(len(self))
        return torch.stack([_masked(self.at(i), self.at(i), same)[1][0, 0] for i in range(len(self.kernel))])

    def at(self, state: int) -> "Kernels":
        return Kernels(self.kernel[state : state + 1], self.k, self.unbiased)

    def of(self, chosen: Int[Tensor, " m"]) -> "Kernels":
        """The same for some of the examples, with as many neighbours as there are."""
        return Kernels(self.kernel[:, chosen][:, :, chosen], min(self.k, len(chosen) - 1), self.unbiased)


def _flat(kernel: Float[Tensor, "state n n"], unbiased: bool) -> Float[Tensor, "state cell"]:
    return centred(kernel, unbiased).flatten(1)


def _ratio(a: Float[Tensor, "a n"], b: Float[Tensor, "b n"]) -> Float[Tensor, "a b"]:
    """CKA from flat centred kernels; NaN where a set has no variance (an unbiased HSIC of it that is not above 0)."""
    scale = a.square().sum(-1)[:, None] * b.square().sum(-1)[None]
    return torch.where(scale > 0, (a @ b.T) / scale.clamp(min=1e-300).sqrt(), torch.nan)


def compare(
    a: Kernels, b: Kernels, metrics: tuple[str, ...] = METRICS, order: Int[Tensor, " n"] | None = None
) -> dict[str, np.ndarray]:  # fmt: skip
    """Each metric of every state of `a` with every state of `b` (a b), NaN with a state that does not vary; `order` pairs example i of a with example order[i] of b.

    Raises DataError where the two do not hold as many examples.
    """
    if len(a) != len(b):
        raise DataError(f"the same examples are compared: {len(a)} and {len(b)} are not")
    order = torch.arange(len(b)) if order is None else order
    found: dict[str, np.ndarray] = {}
    if "cka" in metrics:
        moved = b.flat.unflatten(-1, (len(b), len(b)))[:, order][:, :, order].flatten(1)
        found["cka"] = _ratio(a.flat, moved).numpy()
    if "knn" in metrics or "cknna" in metrics:
        shared, alike = _masked(a, b, order)
        if "knn" in metrics:
            found["knn"] = (shared / (len(a) * a.k)).numpy()
        if "cknna" in metrics:
            scale = a.own[:, None] * b.own[None]
            good = (a.own[:, None] > 0) & (b.own[None] > 0)
            found["cknna"] = torch.where(good, alike / scale.clamp(min=1e-300).sqrt(), torch.nan).numpy()
    unknown = ~(a.varies[:, None] & b.varies[None]).numpy()
    return {metric: np.where(unknown, np.nan, grid) for metric, grid in found.items()}


def _masked(
    a: Kernels, b: Kernels, order: Int[Tensor, " n"]
) -> tuple[Float[Tensor, "a b"], Float[Tensor, "a b"]]:  # fmt: skip
    """How many neighbours agree, and the unbiased HSIC of the kernels masked by them; only a's neighbours are looked at."""
    n, states = len(a), torch.arange(len(a.kernel))[:, None, None]
    i, near = torch.arange(n)[None, :, None].expand_as(a.near), a.near
    i_there, near_there = order[i], order[near]
    shared = b.member[:, i_there, near_there]  # b a n k, as what follows
    ours = a.kernel[states, i, near] * shared
    theirs = b.kernel[:, i_there, near_there] * shared
    mutual = a.member[states, near, i] & b.member[:, near_there, i_there]
    trace = (ours * theirs * mutual).sum((2, 3))
    total = ours.sum((2, 3)) * theirs.sum((2, 3)) / ((n - 1) * (n - 2))
    into = torch.zeros(ours.shape[:3], dtype=ours.dtype).scatter_add(
        2, near.flatten(1).expand(len(ours), -1, -1), ours.flatten(2)
    )
    through = (into * theirs.sum(3)).sum(2)  # the sum of all entries of the product of the masked kernels
    alike = (trace + total - 2 * through / (n - 2)) / (n * (n - 3))
    return shared.sum((2, 3)).double().T, alike.T


class Beside(NamedTuple):
    """A similarity, its 95 % interval (a jackknife over parts of the examples), and what permuted pairs give.

    `null_low` to `null_high` hold 95 % of the permutations; `p` is one-sided. Each an array of one shape.
    """

    value: np.ndarray
    low: np.ndarray
    high: np.ndarray
    null: np.ndarray
    null_low: np.ndarray
    null_high: np.ndarray
    p: np.ndarray


class Compared(NamedTuple):
    """One metric: every state against every state (a b), and its mean over some of these cells, which has no shape."""

    grid: Beside
    along: Beside


def same_depth(a: int, b: int) -> list[tuple[int, int]]:
    """The cells of a grid whose states lie at the same depth: the diagonal, or the nearest state of the other model."""
    return [(i, round(i * (b - 1) / max(1, a - 1))) for i in range(a)]


def beside_permuted(
    a: Kernels, b: Kernels, permutations: int = 200, seed: int = 0, metrics: tuple[str, ...] = METRICS,
    cells: Sequence[tuple[int, int]] = (),
) -> dict[str, Compared]:  # fmt: skip
    """Every metric beside that of permuted pairs, which keep each set as it is and lose which example is which.

    `along` is the mean over `cells`, those of the same depth by default.
    """
    rng = np.random.default_rng(seed)
    n, at = len(a), tuple(np.array(list(cells) or same_depth(len(a.kernel), len(b.kernel))).T)
    observed = compare(a, b, metrics)
    drawn = [compare(a, b, metrics, torch.from_numpy(rng.permutation(n))) for _ in range(permutations)]
    left = _without(rng.permutation(n), a, b, metrics)
    made = {}
    for metric in observed:
        value, null, kept = observed[metric], *(np.stack([one[metric] for one in found]) for found in (drawn, left))
        known = [grid[(..., *at)][..., ~np.isnan(value[at])] for grid in (value, null, kept)]
        along = (np.asarray(cell.mean(-1)) if cell.shape[-1] else np.full(cell.shape[:-1], np.nan) for cell in known)
        made[metric] = Compared(_against(value, null, kept), _against(*along))
    return made


def _without(
    order: np.ndarray, a: Kernels, b: Kernels, metrics: tuple[str, ...]
) -> list[dict[str, np.ndarray]]:  # fmt: skip
    """The grids without one part of the examples, for each of up to 20 parts; the whole where a part would leave too few."""
    parts = np.array_split(order, min(PARTS, len(order))) if len(order) > LEAST else []
    kept = [torch.from_numpy(np.setdiff1d(order, part)) for part in parts]
    return [compare(a.of(one), b.of(one), metrics) for one in kept] or [compare(a, b, metrics)]


def _against(value: np.ndarray, null: np.ndarray, left: np.ndarray) -> Beside:
    parts = len(left)
    spread = 1.96 * np.sqrt((parts - 1) / parts * ((left - left.mean(0)) ** 2).sum(0))
    p = (1 + (null >= value - 1e-12).sum(0)) / (len(null) + 1)
    low, high = np.percentile(null, [2.5, 97.5], axis=0)
    found = (value, value - spread, value + spread, null.mean(0), low, high, np.where(np.isnan(value), np.nan, p))
    return Beside(*(np.asarray(one) for one in found))
