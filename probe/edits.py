"""What can be changed in a forward pass: edges of attention, activations at a point."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, SupportsIndex

from torch import Tensor

from probe.errors import EditError
from probe.points import Layers, check_point

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
    """Activations at a point of one layer replaced by given ones: `value` is (position width), or (position head dim) at z."""

    point: str
    layer: int
    positions: Group
    value: Tensor

    def __post_init__(self) -> None:
        check_point(self.point)


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
