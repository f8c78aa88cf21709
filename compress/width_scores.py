"""How much heads and neurons matter: FLAP's fluctuation, Taylor's first order, magnitude, and chance. Low scores go first."""

import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from compress.calibration import Calibration, Maps, sequential
from compress.statistics import Moments
from compress.structure import Kind, Units
from probe.errors import PassError
from probe.subject import Encoded, Subject

Found = Mapping[int, Units]
Scores = dict[int, Float[Tensor, " unit"]]


def magnitude(found: Found) -> Scores:
    """The sum of the absolute weights of each unit: rows that write it, columns that read it."""
    return {
        layer: one.summed({part: part.weight.detach().float().abs() for part in one.parts}).cpu()
        for layer, one in found.items()
    }


def at_random(found: Found, seed: int) -> Scores:
    """Numbers drawn by a seed, for each layer and kind its own."""
    scores = {}
    for layer, one in found.items():
        generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}/{one.kind}/{layer}".encode()))
        scores[layer] = torch.rand(one.count, generator=generator)
    return scores


# --- FLAP ------------------------------------------------------------------------------------------------------------


def entering(subject: Subject, parts: Mapping[Kind, Found], calibration: Calibration) -> dict[Kind, dict[int, Moments]]:
    """Mean and variance of what the readers of all units are given, over the calibration's tokens, in the model as it is."""
    found: dict[Kind, dict[int, Moments]] = {kind: {} for kind in parts}
    names = {
        (layer, name): kind for kind, units in parts.items() for layer, one in units.items()
        for name, module in subject.layers[layer].named_modules() if module is one.reader
    }  # fmt: skip

    def take(layer: int, changed: nn.Module, maps: Maps) -> None:
        for name, moments in maps.items():
            assert isinstance(moments, Moments)
            found[names[layer, name]][layer] = moments

    sequential(
        subject, calibration.encoded(subject), take, side=calibration.side, statistic=Moments, dense=True,
        wanted=lambda layer, name: (layer, name) in names,
    )  # fmt: skip
    return found


def flap(found: Found, moments: Mapping[int, Moments]) -> Scores:
    """FLAP's WIFV (arXiv 2312.11983, eq. 4): the variance of each input of the reader times the squares of the weights that read it.

    For heads it is squared, as the published code has it. Scores of a layer are standardised over its inputs, so that layers and kinds can be
    compared, and a unit's is the mean over the inputs that it writes.
    """
    return {layer: _fluctuation(one, moments[layer].variance.cpu()) for layer, one in found.items()}


def _fluctuation(units: Units, variance: Float[Tensor, " input"]) -> Float[Tensor, " unit"]:
    metric = variance.double() * units.reader.weight.detach().cpu().double().square().sum(0)
    if units.kind == "heads":
        metric = metric.square()
    spread = metric.std()
    standard = (metric - metric.mean()) / spread if spread > 0 else torch.zeros_like(metric)
    return standard.view(units.count, -1).mean(1)


# --- Taylor ----------------------------------------------------------------------------------------------------------


def taylor(subject: Subject, parts: Mapping[Kind, Found], calibration: Calibration) -> dict[Kind, Scores]:
    """LLM-Pruner's first order (arXiv 2305.11627, eq. 5, element-wise): the sum over a unit's weights of |weight * gradient|.

    The gradient is that of the mean negative log-likelihood of the answers' tokens, over all calibration examples. Raises PassError for examples
    that have no answers.
    """
    weights: list[Tensor] = [part.weight for units in parts.values() for one in units.values() for part in one.parts]
    gradients = dict(zip(map(id, weights), _gradients(subject, weights, calibration.encoded(subject)), strict=True))
    return {
        kind: {
            layer: one.summed(
                {part: (part.weight.detach() * gradients[id(part.weight)]).float().abs() for part in one.parts}
            ).cpu()
            for layer, one in units.items()
        }
        for kind, units in parts.items()
    }


def _gradients(subject: Subject, weights: Sequence[Tensor], batches: Sequence[Encoded]) -> list[Tensor]:
    count = sum(int(_answers(one).sum()) for one in batches)
    if not count:
        raise PassError(
            "the score taylor follows the loss of answers, and no calibration example has one: give examples with answers"
        )
    sums = [torch.zeros_like(weight) for weight in weights]
    with subject.lock, torch.enable_grad(), _wanted(weights):
        for one in batches:
            if not _answers(one).any():
                continue
            logits = subject.model(**one.inputs, use_cache=False).logits[:, :-1].float()
            there = _answers(one)[:, 1:].to(logits.device)
            targets = one.inputs["input_ids"][:, 1:].to(logits.device)[there]
            loss = nn.functional.cross_entropy(logits[there], targets, reduction="sum") / count
            for total, gradient in zip(sums, torch.autograd.grad(loss, weights), strict=True):
                total += gradient
    return sums


def _answers(encoded: Encoded) -> Bool[Tensor, "batch position"]:
    return torch.tensor([[segment == "answer" for segment in one.segments] for one in encoded.maps])


@contextmanager
def _wanted(weights: Sequence[Tensor]) -> Iterator[None]:
    """Gradients of these weights, frozen or not."""
    before = [weight.requires_grad for weight in weights]
    try:
        for weight in weights:
            weight.requires_grad_(True)
        yield
    finally:
        for weight, wanted in zip(weights, before, strict=True):
            weight.requires_grad_(wanted)
