"""How many tokens may stay, in the units that papers use, turned into one number for each picture."""

from collections.abc import Sequence
from math import ceil, floor
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from probe.errors import PassError

Unit = Literal["kept_after", "avg_per_layer", "flops_ratio"]
Rounding = Literal["round", "floor", "ceil"]


class Budget(BaseModel):
    """What is kept of the tokens of a picture, clip or sound.

    `keep` is a share in (0, 1] or a whole number of tokens. `kept_after` counts what survives the pruning layer (FastV's
    R); `avg_per_layer` is the mean over layers of the tokens that are processed (SparseVLM's tables), layers before the pruning one
    with all of them; `flops_ratio` is the share of the decoder's visual multiply-adds, attention's square included.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    keep: Annotated[int | float, Field(gt=0)] = 0.5
    unit: Unit = "kept_after"
    rounding: Rounding = "round"

    @field_validator("keep", mode="before")
    @classmethod
    def _said_clearly(cls, keep: Any) -> Any:
        if isinstance(keep, bool):
            raise ValueError("keep is a share (0.5) or a whole number of tokens (16), not yes or no")
        if isinstance(keep, float) and keep > 1 and keep != int(keep):
            raise ValueError(f"keep is a share up to 1.0 or a whole number of tokens, and {keep:g} is neither")
        return keep

    def count(self, n: int, layer: int = 0, n_layers: int = 1, cost: Sequence[float] = (1.0, 0.0)) -> int:
        """Tokens that stay of `n` when they are dropped at the input of `layer` of `n_layers`.

        `cost` are the multiply-adds of one token in one layer, alone and for each token that it attends to. Raises PassError for
        a budget that cannot be met: more tokens than there are, or a mean below what the layers before the drop take.
        """
        if n < 1:
            raise PassError("a budget needs at least one token to choose from")
        if self.unit == "flops_ratio":
            return self._by_flops(n, layer, n_layers, *cost)
        wanted = self.keep * n if self.keep <= 1 and not self._whole else self.keep
        if self.unit == "avg_per_layer":
            wanted = (wanted * n_layers - layer * n) / (n_layers - layer)
            if wanted < 0.5:
                raise PassError(
                    f"a mean of {self.keep:g} tokens in each of {n_layers} layers cannot be met: the {layer} layers before the drop "
                    f"take {layer * n / n_layers:.1f} of it, so drop earlier or keep more"
                )
        return self._rounded(wanted, n)

    @property
    def _whole(self) -> bool:
        """1 is one token when it is written as a whole number, and everything when written as 1.0."""
        return isinstance(self.keep, int) or self.keep > 1

    def _rounded(self, wanted: float, n: int) -> int:
        if wanted > n + 1e-9:
            raise PassError(f"{wanted:g} tokens cannot be kept of {n}: keep at most {n}, or a share up to 1.0")
        made = {"round": round(wanted), "floor": floor(wanted + 1e-9), "ceil": ceil(wanted - 1e-9)}[self.rounding]
        return min(n, max(1, made))

    def _by_flops(self, n: int, layer: int, n_layers: int, alone: float, each: float) -> int:
        def total(kept: int) -> float:
            return layer * (alone * n + each * n * n) + (n_layers - layer) * (alone * kept + each * kept * kept)

        if not 0 < self.keep <= 1:
            raise PassError(f"a share of the multiply-adds lies in (0, 1], not at {self.keep:g}")
        target = self.keep * total(n)
        if total(1) > target * (1 + 1e-9):
            raise PassError(
                f"{self.keep:.0%} of the multiply-adds cannot be met by dropping at layer {layer} of {n_layers}: one token left is already "
                f"{total(1) / total(n):.0%}"
            )
        return max(kept for kept in range(1, n + 1) if total(kept) <= target * (1 + 1e-9))
