"""Figures of how experts, or neurons, are shared between modalities. Each takes the summary of the study."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from probe.plots.modality import COLOUR
from probe.plots.panels import GREY, Line, Pair, curves, tables

Summary = Mapping[str, Any]


def divergence_figure(summary: Summary) -> Pair:
    """Divergence between modalities and information about them at each layer, each beside the null of moved labels."""
    panels: list[tuple[str, list[Line]]] = [
        (title, [("as labelled", summary["specialised"][key]["own"], "#0072B2", False),
                 ("labels moved along the sequence", summary["specialised"][key]["null"], GREY, True)])
        for title, key in (("Jensen-Shannon divergence", "js"), ("Information about the modality", "mi"))
    ]  # fmt: skip
    return curves(panels, [summary["layers"]] * 2, "layer", "nats", share=False)


def differences_figure(summary: Summary) -> Pair:
    """How much more often each unit is used by a token of a medium than by a word: layers down, units across."""
    found = summary["media"]
    width = max(len(row) for one in found.values() for row in one["table"])
    filled = [[[*row, *[float("nan")] * (width - len(row))] for row in one["table"]] for one in found.values()]
    reach = max(0.01, float(np.nanmax(np.abs(np.array(filled)))))
    quantiles = any(one["quantiles"] for one in found.values())
    across = f"{summary['units']}, sorted in each layer (%)" if quantiles else summary["units"].removesuffix("s")
    columns = [str(round(100 * i / (width - 1))) if quantiles else str(i) for i in range(width)]
    return tables(
        [f"{m} less text" for m in found], filled, [str(layer) for layer in summary["layers"]], columns, (-reach, reach), "RdBu_r",
        "difference in share of tokens", down="layer", across=across,
    )  # fmt: skip


def leanings_figure(summary: Summary) -> Pair:
    """The share of each layer's units that lean to a medium, and to words."""
    panels: list[tuple[str, list[Line]]] = [
        (f"{m} and text", [(f"lean to {m}", {"mean": one["to_medium"]}, COLOUR[m], False),
                           ("lean to text", {"mean": one["to_text"]}, COLOUR["text"], True)])
        for m, one in summary["media"].items()
    ]  # fmt: skip
    return curves(panels, [summary["layers"]] * len(panels), "layer", f"share of {summary['units']}")


def balance_figure(summary: Summary) -> Pair:
    """How evenly each modality uses the units of each layer, and the share of them that it never uses."""
    even: list[Line] = [(m, {"mean": values}, COLOUR[m], m == "text") for m, values in summary["balance"].items()]
    unused: list[Line] = [(m, {"mean": one["by_layer"]}, COLOUR[m], m == "text") for m, one in summary["unused"].items()]
    panels = [("Evenness of use", even), ("Never used", unused)]
    return curves(panels, [summary["layers"]] * 2, "layer", "share", share=False)
