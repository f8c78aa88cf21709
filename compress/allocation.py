"""How much of each decoder layer goes, where all layers together are to lose a given share: the published rules."""

from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from compress.calibration import Maps, counted, sequential
from compress.pruning import wanda_score
from probe.errors import PassError
from probe.subject import Encoded, Subject

Rule = Literal["uniform", "owl", "ecoflap", "tamp"]
OUTLIER, SPREAD = 5.0, 0.08  # OWL's M and lambda
ABOVE = 0.1  # ECoFLaP's and TAMP's: no layer loses more than the budget and this much
EPSILON, MEASURED = 1e-3, 16  # ECoFLaP's step; on so many examples its losses are measured


# --- from importance to shares: pure functions ----------------------------------------------------------------------


def owl_shares(outliers: Sequence[float], sizes: Sequence[int], sparsity: float, spread: float = SPREAD) -> list[float]:
    """OWL (arXiv 2310.05175): layers with more outliers lose less; all lie within `spread` of the budget's either side, which their mean meets."""
    low, high = min(outliers), max(outliers)
    if high == low:
        return [sparsity] * len(outliers)
    kept = [(value - low) / (high - low) * 2 * spread for value in outliers]
    mean = sum(k * n for k, n in zip(kept, sizes, strict=True)) / sum(sizes)
    found = [sparsity + mean - k for k in kept]
    if not all(0 <= share <= 1 for share in found):
        raise PassError(
            f"owl would take {min(found):.3f} to {max(found):.3f} of a layer for a sparsity of {sparsity:g}: choose one between {2 * spread:g} "
            f"and {1 - 2 * spread:g}"
        )
    return found


def ecoflap_shares(scores: Sequence[float], sizes: Sequence[int], sparsity: float, above: float = ABOVE) -> list[float]:
    """ECoFLaP (arXiv 2310.02998): every layer keeps 1 - (sparsity + above); the rest goes by score, and what a full layer cannot take to the others."""
    floor = 1 - min(1.0, sparsity + above)
    kept = [floor * n for n in sizes]
    rest = (1 - sparsity) * sum(sizes) - sum(kept)
    open_layers = [i for i, score in enumerate(scores) if score > 0]
    if not open_layers:
        return [sparsity] * len(sizes)
    while rest > 1e-9 * sum(sizes) and open_layers:
        total = sum(scores[i] for i in open_layers)
        wanted = {i: rest * scores[i] / total for i in open_layers}
        for i, more in wanted.items():
            given = min(more, sizes[i] - kept[i])
            kept[i], rest = kept[i] + given, rest - given
        open_layers = [i for i in open_layers if sizes[i] - kept[i] > 1e-9 * sizes[i]]
    return [1 - k / n for k, n in zip(kept, sizes, strict=True)]


def tamp_shares(importance: Sequence[float], sizes: Sequence[int], sparsity: float, above: float = ABOVE) -> list[float]:
    """TAMP (arXiv 2504.09897): what is kept is proportional to importance, at least 1 - (sparsity + above) and at most all of it; the scale by bisection."""
    floor, wanted = 1 - min(1.0, sparsity + above), (1 - sparsity) * sum(sizes)
    if min(importance) <= 0:
        raise PassError(
            f"tamp found a layer of importance {min(importance):.3g}: its rule is for positive ones, take another allocation"
        )

    def kept(scale: float) -> list[float]:
        return [min(1.0, max(floor, scale * value)) for value in importance]

    low, high = 0.0, 1 / min(importance)
    for _ in range(100):
        middle = (low + high) / 2
        enough = sum(k * n for k, n in zip(kept(middle), sizes, strict=True)) >= wanted
        low, high = (low, middle) if enough else (middle, high)
    return [1 - k for k in kept(high)]


# --- importance of layers -------------------------------------------------------------------------------------------


def outlier_shares(
    subject: Subject, batches: Sequence[Encoded], side: Literal["both", "perceptual", "textual"], wanted: Callable[[int, str], bool],
    times: float = OUTLIER,
) -> list[float]:  # fmt: skip
    """OWL's layer outlier ratio: the share of a layer's |W| x input norm that lies above `times` their mean, in the dense model."""
    found: list[float] = []

    def visit(index: int, layer: nn.Module, maps: Maps) -> None:
        scores = [wanda_score(_weight(layer, name), sums).flatten() for name, sums in maps.items()]
        found.append(outlier_share(torch.cat(scores), times) if scores else 0.0)

    sequential(subject, batches, visit, side=side, wanted=wanted, dense=True)
    return found


def outlier_share(scores: Float[Tensor, " weight"], times: float = OUTLIER) -> float:
    """The share of scores above `times` their mean."""
    return float((scores > times * scores.mean()).float().mean())


def _weight(layer: nn.Module, name: str) -> Tensor:
    return layer.get_submodule(name).get_parameter("weight")


def redundancy(subject: Subject, batches: Sequence[Encoded]) -> list[float]:
    """TAMP's importance of each layer in the dense model: (1 - density) of perceptual, of textual, and of both against each other, summed.

    A density is the mean over examples of the mean cosine of tokens as they leave the layer: of pairs on one side the positive ones, across sides all.
    Raises PassError where no example has tokens on both sides.
    """
    sides = [(counted(one, "perceptual"), counted(one, "textual")) for one in batches]
    found: list[list[float]] = [[] for _ in range(subject.n_layers)]

    def watch(index: int, number: int, state: Tensor) -> None:
        for i, (seen, words) in enumerate(zip(*sides[number], strict=True)):
            if seen.sum() > 1 and words.sum() > 1:
                found[index].append(
                    importance(state[i, seen.to(state.device)].float(), state[i, words.to(state.device)].float())
                )

    sequential(subject, batches, lambda index, layer, maps: None, wanted=lambda layer, name: False, dense=True, watch=watch)
    if not found[0]:
        raise PassError(
            "tamp compares what is shown with words, and no calibration example has both: calibrate on examples with pictures"
        )
    return [sum(values) / len(values) for values in found]


def importance(seen: Float[Tensor, "token width"], words: Float[Tensor, "word width"]) -> float:
    """(1 - density) of each side and across them, for one example at one layer."""
    a, b = (nn.functional.normalize(one, dim=-1) for one in (seen, words))
    return float(3 - _positive(a) - _positive(b) - (a @ b.T).mean())


def _positive(unit: Tensor) -> Tensor:
    pairs = (unit @ unit.T)[torch.triu_indices(len(unit), len(unit), 1).unbind()]
    positive = pairs[pairs > 0]
    return positive.mean() if len(positive) else pairs.new_zeros(())


def sensitivity(
    subject: Subject, batches: Sequence[Encoded], wanted: Callable[[int, str], bool], seed: int = 0, epsilon: float = EPSILON,
) -> list[float]:  # fmt: skip
    """ECoFLaP's score of each layer: the sum of |w| |g| over its weights, g from two losses with a matrix moved by +- epsilon z, z normal.

    The loss is that of the answers' tokens. Every matrix is put back bit for bit. Raises PassError where no example has an answer.
    """
    few = _first(batches, MEASURED)
    found = []
    with subject.lock, torch.no_grad():
        for index, layer in enumerate(subject.layers):
            total = 0.0
            for number, (name, module) in enumerate(layer.named_modules()):
                if isinstance(module, nn.Linear) and wanted(index, name):
                    draw = torch.Generator().manual_seed((seed * 1009 + index) * 1009 + number)
                    slope = _slope(subject, few, module.weight, draw, epsilon)
                    total += abs(slope) * float(module.weight.float().abs().sum())
            found.append(total)
    return found


def _first(batches: Sequence[Encoded], count: int) -> list[Encoded]:
    few, seen = [], 0
    for one in batches:
        if seen < count:
            few.append(one)
        seen += len(one)
    return few


def _slope(subject: Subject, batches: Sequence[Encoded], weight: Tensor, draw: torch.Generator, epsilon: float) -> float:
    before = weight.clone()
    moved = torch.randn(weight.shape, generator=draw).to(weight.device)
    losses = []
    try:
        for sign in (1.0, -1.0):
            weight.copy_(before.float() + sign * epsilon * moved)
            losses.append(loss(subject, batches))
    finally:
        weight.copy_(before)
    return (losses[0] - losses[1]) / (2 * epsilon)


def loss(subject: Subject, batches: Sequence[Encoded]) -> float:
    """The mean negative log-likelihood (nats) of the answers' tokens. Raises PassError where there are none."""
    total, count = 0.0, 0
    for one in batches:
        rows, columns = zip(*_answered(one), strict=True) if _answered(one) else ((), ())
        if not rows:
            continue
        first = min(columns) - 1
        logits = subject.model(**one.inputs, use_cache=False).logits[:, first:].float().log_softmax(-1)
        where = torch.tensor(rows), torch.tensor(columns)
        ids = one.inputs["input_ids"].cpu()[where].to(logits.device)
        total -= float(logits[where[0], where[1] - 1 - first].gather(1, ids[:, None]).sum())
        count += len(rows)
    if not count:
        raise PassError(
            "ecoflap measures the loss of answers, and no calibration example has one: give answers, or another allocation"
        )
    return total / count


def _answered(encoded: Encoded) -> list[tuple[int, int]]:
    return [(i, j) for i, m in enumerate(encoded.maps) for j, segment in enumerate(m.segments) if segment == "answer"]


def allocated(
    rule: Rule, subject: Subject, batches: Sequence[Encoded], sizes: Mapping[int, int], sparsity: float,
    side: Literal["both", "perceptual", "textual"], wanted: Callable[[int, str], bool], seed: int = 0,
) -> dict[int, float]:  # fmt: skip
    """The sparsity of each layer that has weights to lose (`sizes`: how many), whose mean over weights is the budget.

    Raises PassError naming the layer, what was wanted and what came, where a rule misses it.
    """
    layers = list(sizes)
    counts = [sizes[layer] for layer in layers]
    if rule == "uniform":
        return dict.fromkeys(layers, sparsity)
    if rule == "owl":
        every = outlier_shares(subject, batches, side, lambda layer, name: layer in sizes and wanted(layer, name))
        shares = owl_shares([every[layer] for layer in layers], counts, sparsity)
    elif rule == "ecoflap":
        every = sensitivity(subject, batches, wanted, seed)
        shares = ecoflap_shares([every[layer] for layer in layers], counts, sparsity)
    else:
        every = redundancy(subject, batches)
        shares = tamp_shares([every[layer] for layer in layers], counts, sparsity)
    met = sum(share * n for share, n in zip(shares, counts, strict=True)) / sum(counts)
    if abs(met - sparsity) > 1e-6:
        raise PassError(
            f"{rule} shares out {met:.4f} over the layers where {sparsity:g} was wanted: take another sparsity or allocation"
        )
    return dict(zip(layers, shares, strict=True))
