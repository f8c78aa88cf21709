"""Reads sink scores and the last row's attention off one forward pass; states are reduced to one number for each position."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from probe.analysis.sinks import FIRST_LAYER, largest_dimensions, sink_score
from probe.errors import EditError
from probe.recorders import Residual, Rows
from probe.sites import watching
from probe.subject import Encoded, Subject
from probe.tokens import TokenMap
from probe.tracing import trace

KINDS = ("image", "video", "audio")


@dataclass(frozen=True)
class SinkReading:
    """One example, at the layers of `sink_layers`: phi of each position as it enters a layer, and the last row's attention there.

    `control` is the phi of the shown positions in as many other dimensions. `shown` are the positions of what is shown (places in a
    picture, a clip, a sound; not its newlines), `text` those of the text.
    """

    shown: np.ndarray
    text: np.ndarray
    phi: Float[np.ndarray, "layer shown"]
    phi_text: Float[np.ndarray, "layer text"]
    control: Float[np.ndarray, "layer shown"]
    attention: Float[np.ndarray, "layer head shown"]


def places_of(token_map: TokenMap) -> np.ndarray:
    """The positions of what is shown, without separators inside a picture's run."""
    return np.sort(np.concatenate([token_map.positions(kind) for kind in KINDS]))


def sink_layers(subject: Subject, first: int = FIRST_LAYER) -> list[int]:
    """The layers with softmax attention from `first` on: before, no activations are massive (arXiv 2402.17762).

    Raises EditError where there is none.
    """
    found = [i for i, name in enumerate(subject.anatomy.attention) if name is not None and i >= first]
    if not found or first < 0:
        raise EditError(f"there is no attention from layer {first} on: the model has layers 0 to {subject.n_layers - 1}")
    return found


def massive_dimensions(subject: Subject, encoded: Encoded, layers: Sequence[int], count: int = 2) -> tuple[int, ...]:
    """D_sink: the dimensions in which the first position of a batch's first example is largest on its way through the layers."""
    first = [encoded.maps[0].first]
    found = trace(subject, encoded, [Residual("resid_pre", list(layers), first)])["states"]
    return largest_dimensions(found.at(batch=0, position=0), count)


def read_sinks(
    subject: Subject, encoded: Encoded, dimensions: Sequence[int], control: Sequence[int], layers: Sequence[int]
) -> tuple[list[SinkReading], Float[Tensor, "batch vocabulary"]]:
    """One forward pass over a batch: a reading of each example, and the logits of each last position."""
    scores: dict[str, dict[int, Tensor]] = {"own": {}, "control": {}}

    def take(site: str, layer: int, state: Tensor) -> None:
        if layer in layers:
            scores["own"][layer] = sink_score(state, dimensions).cpu()
            scores["control"][layer] = sink_score(state, control).cpu()

    with watching(subject, take, ("in",)):
        seen = trace(subject, encoded, [Rows("last", list(layers))])
    own, other = (torch.stack([table[layer] for layer in layers]).numpy() for table in scores.values())  # layer batch position
    rows = seen["rows"].tensor[:, :, :, 0].numpy()  # layer batch head key
    readings = []
    for i, token_map in enumerate(encoded.maps):
        shown, text = places_of(token_map), token_map.positions("text")
        readings.append(SinkReading(shown, text, own[:, i, shown], own[:, i, text], other[:, i, shown], rows[:, i][..., shown]))
    return readings, seen.logits
