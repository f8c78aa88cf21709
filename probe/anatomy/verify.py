"""Does each part do what its name says? Small causal experiments on the opened model."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from probe.anatomy.readout import capped
from probe.anatomy.resolve import Anatomy
from probe.errors import AnatomyError

_CHANGE = "the largest change of a logit where"


@dataclass(frozen=True)
class Check:
    """One experiment: its name, whether it held, what was seen, and what that is a measure of, with its limit."""

    name: str
    held: bool
    seen: str
    means: str


@torch.no_grad()
def verify(model: PreTrainedModel, anatomy: Anatomy, inputs: dict[str, Any]) -> tuple[Check, ...]:
    """Runs the experiments on one encoded example (`inputs`: what the model is called with).

    - an identity patch of a middle layer changes nothing, bit for bit;
    - a middle layer whose output is replaced by zeros changes the logits;
    - the final norm and the unembedding turn the last layer's output into the logits;
    - what the model is shown reaches the logits (other pixels, other sound: other logits). A fresh Gemma 3 or Mllama
      fails this one honestly, its projection or its gates being zero.

    Raises AnatomyError naming the first of the first three that fails; the last is for the reader.
    """
    layers = model.get_submodule(anatomy.layers)
    middle = layers[len(layers) // 2]
    states: list[Tensor] = []

    def keep(output: Tensor) -> Tensor:
        states.append(output)
        return output

    clean = _logits(model, inputs, layers[-1], keep)
    same = _logits(model, inputs, middle, lambda out: out.clone())
    zeroed = _logits(model, inputs, middle, torch.zeros_like)
    norm, unembedding = model.get_submodule(anatomy.final_norm), model.get_submodule(anatomy.unembedding)
    lens = capped(unembedding(norm(states[0])), model.config)
    gap = (lens - clean).abs().max().item()
    limit = (1e-4 if clean.dtype == torch.float32 else 0.1) * max(1.0, clean.abs().max().item())
    checks = (
        Check(
            "identity",
            torch.equal(clean, same),
            _largest(clean, same),
            f"{_CHANGE} a middle layer's output is put back as it was: must be 0",
        ),
        Check(
            "felt",
            not torch.allclose(clean, zeroed),
            _largest(clean, zeroed),
            f"{_CHANGE} a middle layer's output is zeros: must be more than rounding",
        ),
        Check(
            "lens",
            gap <= limit,
            f"{gap:.1e}",
            f"the logits against the unembedding of the normed last state: at most {limit:.1e}",
        ),
    )
    for check in checks:
        if not check.held:
            raise AnatomyError(
                f"{anatomy.model_type!r} fails the check {check.name!r} (difference {check.seen}): its parts are not where "
                f"they seem to be, add a row for it to probe/anatomy/rows.py"
            )
    shown = next((name for name in ("pixel_values", "pixel_values_images", "input_features") if name in inputs), None)
    if shown is None:
        return checks
    other = _logits(model, {**inputs, shown: inputs[shown].flip(-1)}, middle, lambda out: out)
    means = f"{_CHANGE} what is shown is mirrored: must be more than 0"
    return (*checks, Check("seen", not torch.equal(clean, other), _largest(clean, other), means))


def _largest(a: Tensor, b: Tensor) -> str:
    return f"{(a - b).abs().max().item():.1e}"


def _logits(model: PreTrainedModel, inputs: dict[str, Any], layer: nn.Module, change: Any) -> Tensor:
    def hook(module: nn.Module, inputs: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return (change(output[0]), *output[1:])
        return change(output)

    handle = layer.register_forward_hook(hook)
    try:
        return model(**inputs, use_cache=False).logits
    finally:
        handle.remove()
