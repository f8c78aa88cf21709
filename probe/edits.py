"""What can be changed in a forward pass: edges of attention, activations at a point."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, SupportsIndex

import torch
from torch import Tensor

from probe.errors import EditError
from probe.points import Layers, check_point, head_list

Group = str | Iterable[SupportsIndex]


@dataclass(frozen=True)
class Knockout:
    """Attention edges cut before the softmax: `rows` cannot look at `columns` in `layers`; the rest renormalises.

    Rows and columns are token groups (`question`, `image`, `last`, ...) or positions. A row that is left with nothing
    to look at reads zero. Cross-modal Information Flow (arXiv 2411.18620), section 3.
    """

    rows: Group
    columns: Group
    layers: Layers = None
    heads: int | Iterable[int] | None = None


@dataclass(frozen=True)
class Ablate:
    """Activations at a point replaced: by zero, by their mean over the chosen positions, or noised.

    Noise is Gaussian with `scale` times the standard deviation of the activations it is added to (3 in ROME, arXiv
    2202.05262). `reference` (width) stands in for the mean where a data-set mean is wanted (arXiv 2410.07149).
    """

    point: str
    layers: Layers = None
    positions: Group = "real"
    how: Literal["zero", "mean", "noise"] = "zero"
    heads: int | Iterable[int] | None = None
    reference: Tensor | None = None
    scale: float = 3.0
    seed: int = 0

    def __post_init__(self) -> None:
        check_point(self.point)
        if self.how not in ("zero", "mean", "noise"):
            raise EditError(f"an ablation is zero, mean or noise, not {self.how!r}")
        if self.heads is not None and self.point != "z":
            raise EditError(f"heads can be ablated at the point z, not at {self.point}")


@dataclass(frozen=True)
class Patch:
    """Activations at a point of one layer replaced by given ones: `value` is (position width), or (position head dim) at z.

    Its rows are those of the positions in ascending order. At z, `heads` names the heads that are replaced, in ascending order.
    """

    point: str
    layer: int
    positions: Group
    value: Tensor
    heads: int | Iterable[int] | None = None

    def __post_init__(self) -> None:
        check_point(self.point)
        if self.heads is not None and self.point != "z":
            raise EditError(f"heads can be patched at the point z, not at {self.point}")

    def check(self, positions: int, *shape: int) -> None:
        """Raises EditError unless the value has a row of this shape (or any, where none is given) for each of the positions."""
        wanted = (positions, *(shape or self.value.shape[1:]))
        if tuple(self.value.shape) != wanted:
            raise EditError(
                f"a patch at {self.point} of {positions} positions needs a tensor of shape {wanted}, not {tuple(self.value.shape)}"
            )

    def put(self, rows: Tensor, of: Tensor, at: Tensor, positions: int) -> None:
        """Writes rows `of` the value to places `at` of an activation, in place: (row width), or (row head dim) at z.

        `positions` is how many the patch has. Raises EditError for a value of another shape, or a head that does not exist.
        """
        heads = None if self.heads is None else head_list(self.heads, rows.shape[1])
        self.check(positions, *(rows.shape[1:] if heads is None else (len(heads), *rows.shape[2:])))
        value = self.value[of.to(self.value.device)].to(rows)
        if heads is None:
            rows[at] = value
        else:
            rows[at[:, None], torch.tensor(heads, device=at.device)] = value


@dataclass(frozen=True)
class Erase:
    """Directions taken out of the residual stream that leaves a layer: h - alpha max(0, h.t / t.t) t, one after the other.

    `directions` is (direction width), or (batch direction width) where each example has its own. What points away from a
    direction stays as it is. With the state of a word for t this erases an object (arXiv 2410.02762, section 5): alpha 1.5 there.
    """

    layer: int
    positions: Group
    directions: Tensor
    alpha: float = 1.5

    def __post_init__(self) -> None:
        if self.directions.dim() not in (2, 3):
            raise EditError(
                f"directions are (direction width) or (batch direction width), not of shape {tuple(self.directions.shape)}"
            )
        if not bool(self.directions.float().norm(dim=-1).gt(0).all()):
            raise EditError("a direction of zeros points nowhere: leave it out")

    @property
    def point(self) -> str:
        return "resid_post"

    def of(self, example: int) -> Tensor:
        """The directions of one example of the batch (direction width)."""
        return self.directions if self.directions.dim() == 2 else self.directions[example]


Edit = Knockout | Ablate | Patch | Erase


def window(center: int, width: int, n_layers: int) -> range:
    """The layers of a knock-out window: `width` layers around `center`, clipped at the ends.

    Cross-modal Information Flow's rule: an even window reaches one layer further down than up. Raises EditError for a
    window of no layers or more layers than the model has.
    """
    if not 1 <= width <= n_layers:
        raise EditError(f"a window has 1 to {n_layers} layers on this model, not {width}")
    return range(max(0, center - width // 2), min(n_layers, center + -(-width // 2)))
