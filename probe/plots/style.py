"""The look that all figures share: a palette that survives grey print and colour blindness, quiet axes."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

# Okabe and Ito's palette, dark enough for lines on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#4D4D4D")
RC: dict[str, Any] = {
    "figure.constrained_layout.use": True, "font.family": "DejaVu Sans", "font.size": 9, "axes.titlesize": 10,
    "axes.titleweight": "bold", "axes.titlelocation": "left", "axes.spines.top": False, "axes.spines.right": False,
    "axes.grid": True, "grid.color": "#E6E6E6", "grid.linewidth": 0.6, "axes.axisbelow": True, "legend.frameon": False,
    "legend.fontsize": 8, "lines.linewidth": 1.8, "lines.markersize": 4, "savefig.facecolor": "white",
}  # fmt: skip
LAYOUT: dict[str, Any] = {
    "template": "plotly_white", "font": {"family": "Inter, DejaVu Sans, sans-serif", "size": 13}, "hovermode": "x unified",
    "margin": {"l": 60, "r": 20, "t": 60, "b": 50},
}  # fmt: skip


@contextmanager
def styled() -> Iterator[Any]:
    """Matplotlib's Figure, without a display, in the house style; global settings are left alone."""
    import matplotlib.figure

    with matplotlib.rc_context(RC):
        yield matplotlib.figure.Figure


def band(colour: str, alpha: float) -> str:
    """A hex colour as rgba, for plotly's fills."""
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red},{green},{blue},{alpha})"


def ticks(layers: list[int]) -> list[int]:
    """At most a dozen layer numbers, evenly spaced, first and last among them."""
    step = max(1, -(-(len(layers) - 1) // 11))
    return layers[::step]
