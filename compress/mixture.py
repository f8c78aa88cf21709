"""A layer's experts and the router that sends tokens to them, found in its modules, and cut."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from probe.subject import Subject

NAMES = ("num_experts", "n_routed_experts", "num_local_experts", "num_routed_experts")  # how families call their number
_VISITED = ("num_experts_per_tok", "top_k_experts", "moe_topk")
_GROUPED = ("num_group", "n_group")


@dataclass(frozen=True)
class Mixture:
    """The experts of one layer. A token visits `visited` of `count`. The count is that before a cut."""

    owner: nn.Module
    experts: nn.Module
    router: nn.Module
    count: int
    visited: int

    @property
    def parts(self) -> tuple[nn.Module, ...]:
        """The modules that a cut changes."""
        return (self.experts, self.router)

    @property
    def least(self) -> int:
        """How many must stay."""
        return self.visited

    @property
    def form(self) -> tuple[Any, ...]:
        """What two layers that compute alike have in common."""
        return (self.count, self.visited)

    def keep(self, units: Sequence[int]) -> None:
        """Cuts out all other experts, and what the router knows of them, in place."""
        if isinstance(self.experts, nn.ModuleList):
            left = [self.experts[i] for i in units]
            del self.experts[:]
            self.experts.extend(left)
        else:
            _cut(self.experts, self.count, units)
        for part in self.router.modules():
            _cut(part, self.count, units)
            if isinstance(part, nn.Linear):
                part.out_features = len(units)
        for part in (self.owner, self.experts, *self.router.modules()):
            for name in NAMES:
                if getattr(part, name, None) == self.count:
                    setattr(part, name, len(units))

    def tell(self, config: Any, left: int) -> None:
        """Writes into a configuration that every layer has so many experts."""
        for name in NAMES:
            if getattr(config, name, None) == self.count:
                setattr(config, name, left)


def mixture_of(subject: Subject, layer: int) -> Mixture | str:
    """The experts of a layer, or why none can be removed."""
    where = subject.anatomy.experts[layer]
    if where is None:
        return "it has no experts"
    block = subject.layers[layer]
    owner, experts = block.get_submodule(where.rpartition(".")[0]), block.get_submodule(where)
    router = getattr(owner, "gate", None) or getattr(owner, "router", None)
    stacked = [weight for weight in experts.parameters(recurse=False) if weight.dim() > 1]
    count = len(experts) if isinstance(experts, nn.ModuleList) else len(stacked[0]) if stacked else 0
    if not isinstance(router, nn.Module) or not count:
        return "its experts are neither a list nor a stack with a router beside them"
    if any(int(getattr(router, name, 1) or 1) > 1 for name in _GROUPED):
        return "its router chooses groups of experts first: none can leave its group"
    if not isinstance(experts, nn.ModuleList) and any(len(weight) != count for weight in experts.parameters()):
        return "its experts share weights"
    tensors = _tensors(router)
    if not any(len(one) == count for one in tensors) or any(count in one.shape[1:] for one in tensors):
        return "its router does not say one number for each expert"
    config = subject.config.get_text_config()
    visited = getattr(router, "top_k", None) or next((n for name in _VISITED if (n := getattr(config, name, None))), None)
    if not isinstance(visited, int):
        return "how many experts a token visits is not said"
    return Mixture(owner, experts, router, count, visited)


def _tensors(module: nn.Module) -> list[Tensor]:
    return [one for one in (*module.parameters(), *module.buffers()) if one.dim()]


def _cut(part: nn.Module, count: int, units: Sequence[int]) -> None:
    """Keeps the rows of some experts of every tensor of a module that has one for each."""
    for name, one in [*part.named_parameters(recurse=False), *part.named_buffers(recurse=False)]:
        if one.dim() and len(one) == count:
            left = one.detach().index_select(0, torch.tensor(units, device=one.device))
            setattr(part, name, nn.Parameter(left, one.requires_grad) if isinstance(one, nn.Parameter) else left)
