"""Visual attention ratios: how much of a row's attention goes to what is shown (arXiv 2411.16724, section 3).

VAR of a layer and head is the attention that the row which produces a token gives to the image; SVAR sums it over a window of
layers, heads averaged. Paper or code: layers 5 to 18 of LLaVA-1.5-7B's 32 become 0.16 to 0.56 of any model's. The published index of
the row is off by one on newer transformers; here it is the last position of the prompt.
"""

import numpy as np
from jaxtyping import Float

MIDDLE = (0.16, 0.56)  # of the layers: 5 to 18 of 32
WINDOWS = ("early", "middle", "late", "all")


def windows(n_layers: int, middle: tuple[float, float] = MIDDLE) -> dict[str, range]:
    """The windows of a model's layers: early, middle, late, all. One that would hold no layer is left out."""
    start, stop = (round(share * n_layers) for share in middle)
    stop = min(stop, n_layers - 1) + 1  # both ends are part of the window
    found = (range(start), range(start, stop), range(stop, n_layers), range(n_layers))
    return {name: layers for name, layers in zip(WINDOWS, found, strict=True) if len(layers)}


def svar(
    ratio: Float[np.ndarray, "*any layer head"], layers: range, recorded: list[int] | None = None
) -> Float[np.ndarray, "*any"]:
    """Attention ratios (... layer head) summed over a window of layers, averaged over heads.

    `recorded` are the layers that the ratios are of, where some have no attention to record.
    """
    known = list(range(ratio.shape[-2])) if recorded is None else recorded
    return np.asarray(ratio[..., [layer in layers for layer in known], :].mean(-1).sum(-1))
