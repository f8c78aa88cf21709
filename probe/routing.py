"""Which experts each token is sent to, or, in a decoder without experts, which neurons of its feed-forward blocks it uses.

Experts are read where they are called: transformers' mixtures hand their experts the chosen indices and weights, whatever the
router does to get there (softmax, sigmoid, groups, a bias for balance). Llama 4 hands over scaled states only; there the router's own
scores are read. Neurons are the inner activations of a feed-forward block; a token uses those of the greatest magnitude.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from probe.errors import EditError
from probe.sites import missing, watching
from probe.subject import Encoded, Subject
from probe.tracing import last_logits

GROUPS = {  # whose tokens are compared: the media's own, and words; no padding, no beginning of the sequence, no separators
    "image": ("image",), "video": ("video",), "audio": ("audio",),
    "text": ("system", "context", "question", "options", "suffix", "header", "answer"),
}  # fmt: skip


@dataclass(frozen=True)
class Use:
    """Which units of one layer the tokens of a batch use, and how much: a router's weight, or a neuron's magnitude; 0 where unused."""

    layer: int
    used: Bool[Tensor, "batch position unit"]
    weight: Float[Tensor, "batch position unit"]


Take = Callable[[Use], None]


def kind_of(subject: Subject) -> str:
    """`experts` for a decoder that has any, else `neurons`."""
    return "experts" if any(subject.anatomy.experts) else "neurons"


def routed_layers(subject: Subject, kind: str) -> tuple[int, ...]:
    """The layers whose units can be read. Raises EditError for a model that has no such layer, naming why."""
    anatomy = subject.anatomy
    if kind == "experts":
        found = tuple(layer for layer, name in enumerate(anatomy.experts) if name)
        if not found:
            raise EditError(f"this {anatomy.family} model has no mixture of experts: read its neurons instead")
        return found
    gone = missing(subject)
    found = tuple(layer for layer in range(subject.n_layers) if ("fc1", layer) not in gone)
    if not found:
        raise EditError(f"this {anatomy.family} model has no feed-forward neurons to read: {gone['fc1', 0]}")
    return found


def read_use(subject: Subject, encoded: Encoded, take: Take, kind: str = "experts", share: float = 0.1) -> None:
    """One forward pass over a batch; `take` is given the use of every layer that has units, in order, as the pass reaches it.

    `share` is the part of a layer's neurons that each token uses, at least one. Raises EditError for a model without such units.
    """
    watch = watching_experts(subject, encoded, take) if kind == "experts" else watching_neurons(subject, take, share)
    with watch:
        last_logits(subject, encoded)


# --- experts ---------------------------------------------------------------------------------------------------------


@contextmanager
def watching_experts(subject: Subject, encoded: Encoded, take: Take) -> Iterator[None]:
    """While this is open, `take` sees the experts that each token of the batch is sent to."""
    shape = (len(encoded), len(encoded.maps[0]))
    with subject.lock, ExitStack() as stack:
        for layer in routed_layers(subject, "experts"):
            name = subject.anatomy.experts[layer] or ""
            experts = subject.layers[layer].get_submodule(name)
            holder = subject.layers[layer].get_submodule(name.rpartition(".")[0])
            router = getattr(holder, "router", None)
            see = partial(_see_choice, layer, shape, _count(experts, layer), take)
            if isinstance(router, nn.Linear):  # Llama 4: scores of all experts, zero where one was not chosen
                see_scores = partial(_see_scores, layer, shape, take)
                stack.callback(router.register_forward_hook(see_scores).remove)
            else:
                stack.callback(experts.register_forward_pre_hook(see, with_kwargs=True).remove)
        yield


def _count(experts: nn.Module, layer: int) -> int:
    """How many experts a module holds: the leading dimension of its weights."""
    weight = next(experts.parameters(), None)
    if weight is None or weight.dim() < 2 or isinstance(experts, nn.ModuleList):
        raise EditError(
            f"the experts of layer {layer} are no stack of weights that is called at once: their routing cannot be read"
        )
    return int(weight.shape[0])


def _see_choice(
    layer: int, shape: tuple[int, int], count: int, take: Take, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    given = [*args, *kwargs.values()]
    index = next((one for one in given if isinstance(one, Tensor) and not one.is_floating_point()), None)
    weights = given[-1] if index is not None else None
    if index is None or not isinstance(weights, Tensor) or index.shape[0] != shape[0] * shape[1]:
        raise EditError(
            f"the experts of layer {layer} are not told which of them each token goes to: their routing cannot be read"
        )
    if weights.shape != index.shape:  # weights of all experts, not of the chosen ones
        weights = weights.gather(-1, index.clamp(max=count - 1))
    # An index beyond the last expert stands for none (of a token that another device serves).
    used = torch.zeros(len(index), count + 1, dtype=torch.bool, device=index.device).scatter_(1, index.clamp(max=count), True)
    weight = torch.zeros(len(index), count + 1, device=index.device).scatter_(
        1, index.clamp(max=count), weights.detach().float()
    )
    take(Use(layer, used[:, :count].view(*shape, count), weight[:, :count].view(*shape, count)))


def _see_scores(layer: int, shape: tuple[int, int], take: Take, module: nn.Module, args: Any, output: Any) -> None:
    scores, logits = output
    chosen = logits.topk(int(module.top_k), -1).indices  # type: ignore[arg-type]
    used = torch.zeros_like(logits, dtype=torch.bool).scatter_(1, chosen, True)
    weight = scores.detach().float() * used
    take(Use(layer, used.view(*shape, -1), weight.view(*shape, -1)))


# --- neurons ---------------------------------------------------------------------------------------------------------


@contextmanager
def watching_neurons(subject: Subject, take: Take, share: float = 0.1) -> Iterator[None]:
    """While this is open, `take` sees the neurons that each token uses: the `share` of a layer with the greatest magnitude.

    A neuron that is exactly zero is not used. Raises EditError for a share that is not above 0 and below 1.
    """
    if not 0 < share < 1:
        raise EditError(f"the share of neurons that a token uses lies between 0 and 1, not at {share:g}")
    layers = set(routed_layers(subject, "neurons"))

    def see(site: str, layer: int, state: Tensor) -> None:
        if layer in layers:
            take(Use(layer, *_strongest(state, share)))

    with watching(subject, see, ["fc1"]):
        yield


def _strongest(state: Tensor, share: float) -> tuple[Tensor, Tensor]:
    size = state.detach().float().abs()
    chosen = size.topk(max(1, round(share * size.shape[-1])), -1).indices
    used = torch.zeros_like(size, dtype=torch.bool).scatter_(-1, chosen, True) & (size > 0)
    return used, size * used


__all__ = ["GROUPS", "Use", "kind_of", "read_use", "routed_layers", "watching_experts", "watching_neurons"]
