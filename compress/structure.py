"""What a decoder layer is wide by: heads, neurons and experts, found in its modules; heads and neurons cut out of them.

Everything is read from the weights. A part that is built otherwise than understood here is refused with the reason, since a cut in
the wrong place would be another model and not a smaller one.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from compress.mixture import Mixture, mixture_of
from probe.errors import PassError
from probe.subject import Subject

Kind = Literal["heads", "neurons", "experts"]
UNIT: dict[Kind, str] = {"heads": "head group", "neurons": "neuron", "experts": "expert"}
_DOWN = ("down_proj", "fc2")
_UP = ("gate_proj", "up_proj", "gate_up_proj", "fc1")
_GATED = ("qwen3_5_text", "qwen3_5_moe_text", "qwen3_next")  # each query head's rows stand together with those of its gate


@dataclass(frozen=True)
class Units:
    """What one layer can be narrowed by: groups of heads (a key head with the query heads that read it), or neurons.

    `writers` make what a unit says, `reader` takes it up: rows of the former and columns of the latter are the unit's. A unit writes
    `width` inputs of the reader; `dim` is the width of one head. All of it is as it was before a cut.
    """

    kind: Kind
    holder: nn.Module
    writers: tuple[nn.Linear, ...]
    reader: nn.Linear
    count: int
    width: int = 1
    dim: int = 1

    @property
    def parts(self) -> tuple[nn.Linear, ...]:
        """The modules that a cut changes."""
        return (*self.writers, self.reader)

    @property
    def least(self) -> int:
        """How many must stay."""
        return 1

    @property
    def form(self) -> tuple[Any, ...]:
        """What two layers that compute alike have in common."""
        return (self.count, self.dim, self.width, getattr(self.holder, "scaling", None))

    @property
    def weights(self) -> int:
        """Numbers in the matrices of one unit."""
        return sum(part.weight.numel() for part in (*self.writers, self.reader)) // self.count

    def columns(self, units: Sequence[int]) -> Tensor:
        """Which inputs of the reader these units write."""
        return (torch.tensor(units, dtype=torch.long)[:, None] * self.width + torch.arange(self.width)).flatten()

    def rows(self, writer: nn.Linear, units: Sequence[int]) -> Tensor:
        """Which outputs of a writer are these units': a head's stand together; in a fused map, all gates before all values."""
        each, chosen = writer.out_features // self.count, torch.tensor(units, dtype=torch.long)
        if self.kind == "heads":
            return (chosen[:, None] * each + torch.arange(each)).flatten()
        return (torch.arange(each)[:, None] * self.count + chosen).flatten()

    def summed(self, values: Mapping[nn.Linear, Tensor]) -> Tensor:
        """The sum over each unit's weights of values shaped like the matrices (unit)."""
        total = values[self.reader].sum(0).view(self.count, -1).sum(1)
        for writer in self.writers:
            rows = values[writer].sum(1)
            total = total + (rows.view(self.count, -1).sum(1) if self.kind == "heads" else rows.view(-1, self.count).sum(0))
        return total

    def keep(self, units: Sequence[int]) -> None:
        """Cuts out all other units, in place."""
        left = len(units)
        for writer in self.writers:
            _keep(writer, self.rows(writer, units), 0)
        _keep(self.reader, self.columns(units), 1)
        told = (
            {"num_heads": left * self.width // self.dim, "num_key_value_heads": left}
            if self.kind == "heads"
            else {"intermediate_size": left}
        )
        for name, value in told.items():
            if isinstance(getattr(self.holder, name, None), int):
                setattr(self.holder, name, value)

    def tell(self, config: Any, left: int) -> None:
        """Writes into a configuration that every layer has so many units."""
        if self.kind == "neurons":
            config.intermediate_size = left
            return
        config.head_dim, config.num_key_value_heads = self.dim, left
        config.num_attention_heads = left * self.width // self.dim


def _keep(part: nn.Linear, chosen: Tensor, dim: int) -> None:
    chosen = chosen.to(part.weight.device)
    part.weight = nn.Parameter(part.weight.detach().index_select(dim, chosen), requires_grad=part.weight.requires_grad)
    if dim == 1:
        part.in_features = len(chosen)
        return
    part.out_features = len(chosen)
    if part.bias is not None:
        part.bias = nn.Parameter(part.bias.detach().index_select(0, chosen), requires_grad=part.bias.requires_grad)


def units_of(subject: Subject, kind: Kind) -> tuple[dict[int, Units], dict[int, str]]:
    """The heads or neurons of every layer that can lose some, and for every other layer the reason why not.

    Raises PassError for a model whose layers share keys and values, when heads are asked for.
    """
    config: Any = subject.config.get_text_config()
    if kind == "heads" and getattr(config, "num_kv_shared_layers", None):
        raise PassError(
            f"layers of this {subject.anatomy.family} share keys and values: heads cannot be removed from one of them"
        )
    return _sorted(
        subject, {layer: (_heads if kind == "heads" else _neurons)(subject, layer) for layer in range(subject.n_layers)}
    )


def mixtures_of(subject: Subject) -> tuple[dict[int, Mixture], dict[int, str]]:
    """The experts of every layer that can lose some, and for every other layer the reason why not."""
    return _sorted(subject, {layer: mixture_of(subject, layer) for layer in range(subject.n_layers)})


def parts_of(subject: Subject, kind: Kind) -> tuple[dict[int, Any], dict[int, str]]:
    """`units_of` or `mixtures_of`."""
    return mixtures_of(subject) if kind == "experts" else units_of(subject, kind)


def _sorted(subject: Subject, layers: Mapping[int, Any]) -> tuple[dict[int, Any], dict[int, str]]:
    """What can be cut, and why the rest cannot: for one, because another module has the same weights."""
    owners = Counter(id(weight) for _, weight in subject.model.named_parameters(remove_duplicate=False))
    found, reasons = {}, {}
    for layer, one in layers.items():
        if not isinstance(one, str) and any(owners[id(weight)] > 1 for part in one.parts for weight in part.parameters()):
            reasons[layer] = "it shares weights with another part of the model"
        elif isinstance(one, str):
            reasons[layer] = one
        else:
            found[layer] = one
    return found, reasons


def _heads(subject: Subject, layer: int) -> Units | str:
    """The heads of a layer, or why none can be removed."""
    name = subject.anatomy.attention[layer]
    if name is None:
        return "it mixes positions without attention heads"
    if subject.anatomy.cross[layer]:
        return "its heads read the picture through cross-attention, whose keys are not the sequence's"
    attention = subject.layers[layer].get_submodule(name)
    out_name = "o_proj" if hasattr(attention, "o_proj") else "out_proj"
    parts = _linear(getattr(attention, part, None) for part in ("q_proj", "k_proj", "v_proj", out_name))
    if parts is None:
        return "its queries, keys and values do not come from three linear maps of their own"
    query, key, value, out = parts
    dim = int(getattr(attention, "head_dim", 0) or 0)
    rows = 2 if subject.config.get_text_config().model_type in _GATED else 1
    if not dim or key.out_features % dim or key.out_features != value.out_features:
        return "its keys and values are not heads of one width"
    count = key.out_features // dim
    if query.out_features != rows * out.in_features or out.in_features % (count * dim):
        return "its query heads do not share its key heads evenly"
    if other := _others(attention, (query, key, value, out), dim):
        return f"its {other} spans all heads"
    return Units("heads", attention, (query, key, value), out, count, out.in_features // count, dim)


def _linear(parts: Iterable[Any]) -> tuple[nn.Linear, ...] | None:
    """The parts, if all are plain linear maps: what quantises or adapts them is not understood."""
    found = tuple(parts)
    return found if all(type(part) is nn.Linear for part in found) else None


def _others(holder: nn.Module, known: Sequence[nn.Module], size: int) -> str:
    """A parameter of a module outside the known maps that is not as wide as one unit, if there is one."""
    inside = {id(weight) for part in known for weight in part.parameters()}
    return next(
        (name for name, weight in holder.named_parameters() if id(weight) not in inside and tuple(weight.shape) != (size,)), ""
    )


def _neurons(subject: Subject, layer: int) -> Units | str:
    """The neurons of a layer's feed-forward block, or why none can be removed."""
    name = subject.anatomy.mlp[layer]
    if name is None:
        return "it has no feed-forward block of its own"
    if (subject.anatomy.experts[layer] or "").startswith(f"{name}."):
        return "its feed-forward block is a mixture of experts: remove experts instead"
    block = subject.layers[layer].get_submodule(name)
    children = dict(block.named_children())
    names = [part for part in _UP if part in children]
    parts = _linear(children.get(part) for part in (*names, next((part for part in _DOWN if part in children), "")))
    if not names or parts is None:
        return "its feed-forward block does not consist of linear maps into neurons and out of them"
    if getattr(block, "activation_sparsity", 0):
        return "which of its neurons are active depends on all of them"
    *ups, down = parts
    count = down.in_features
    if any(up.out_features != count * (2 if name == "gate_up_proj" else 1) for name, up in zip(names, ups, strict=True)):
        return "its maps into and out of neurons differ in width"
    if other := _others(block, parts, 0):
        return f"its {other} is not understood"
    return Units("neurons", block, tuple(ups), down, count)
