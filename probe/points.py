"""The named points of a decoder, as one table for every backend, and how a hook reaches each.

What a layer adds to the residual stream is what its attention or feed-forward block puts out or, in layers that norm it
before it is added (Gemma 2 to 4, GLM-4, OLMo 2), what that norm puts out: `resid_pre + attn_out + mlp_out` is `resid_post`.
Granite's factor is part of what is added; the gates of Mllama's cross-attention layers are not.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from probe.errors import EditError, did_you_mean
from probe.subject import Subject


@dataclass(frozen=True)
class Point:
    """One row of the table.

    `path` starts at the layer and ends in `input` or `output`; {module} is the part of the layer that makes the tensor,
    {call} the call of the attention function inside it, which nnsight reaches and a hook does not. `transformer_lens` is that
    library's name for it, after `blocks.N.`.
    """

    meaning: str
    shape: str
    path: str
    transformer_lens: str
    item: int = 0  # which one, where several tensors come out


# In the order in which a layer computes them: nnsight must be asked in that order.
POINTS = {
    "resid_pre": Point(
        "what enters a layer (after DeepStack's additions, where a family has them)", "batch position width",
        "input", "hook_resid_pre",
    ),
    "z": Point(
        "what each head read, before the output projection", "batch position head dim",
        "{module}.source.{call}.output", "attn.hook_z",
    ),
    "attn_out": Point(
        "what the attention adds to the residual stream", "batch position width", "{module}.output", "hook_attn_out"
    ),
    "mlp_out": Point("what the feed-forward block adds", "batch position width", "{module}.output", "hook_mlp_out"),
    "resid_post": Point("what leaves a layer, before any norm", "batch position width", "output", "hook_resid_post"),
}  # fmt: skip
# Attention weights: no point, since nothing can be put in their place, but found like one.
PATTERN = Point("attention weights", "batch head query key", POINTS["z"].path, "attn.hook_pattern", item=1)
# (after the attention, after the feed-forward block): a layer with both norms adds what they put out. One with the first
# alone is of Llama's kind, where it stands before the feed-forward block.
_NORMS_AFTER = (
    ("post_attention_layernorm", "post_feedforward_layernorm"), ("post_self_attn_layernorm", "post_mlp_layernorm"),
)  # fmt: skip
Layers = int | range | Iterable[int] | None
Change = Callable[[Tensor], Tensor | None]


def check_point(point: str) -> None:
    """Raises EditError for a point that is not in the table."""
    if point not in POINTS:
        raise EditError(f"there is no point {point!r}{did_you_mean(point, POINTS)}")


def layer_list(layers: Layers, count: int) -> list[int]:
    """Layers as a sorted list; None is all of them.

    Raises EditError for a layer that the model does not have, or for none at all.
    """
    if layers is None:
        return list(range(count))
    chosen = [layers] if isinstance(layers, int) else sorted(set(layers))
    if not chosen:
        raise EditError("an edit or a recorder needs at least one layer")
    if chosen[0] < 0 or chosen[-1] >= count:
        wrong = chosen[0] if chosen[0] < 0 else chosen[-1]
        raise EditError(f"layer {wrong} does not exist: the model has layers 0 to {count - 1}")
    return chosen


def head_list(heads: int | Iterable[int] | None, count: int) -> list[int] | None:
    """Heads as a sorted list; None is all of them. Raises EditError for a head that the model does not have."""
    if heads is None:
        return None
    chosen = [heads] if isinstance(heads, int) else sorted(set(heads))
    if not chosen or chosen[0] < 0 or chosen[-1] >= count:
        wrong = chosen[-1] if chosen and chosen[-1] >= count else (chosen[0] if chosen else "none")
        raise EditError(f"head {wrong} does not exist: the model has heads 0 to {count - 1}")
    return chosen


def hook(subject: Subject, point: str, layer: int, change: Change) -> RemovableHandle:
    """Calls `change` with the tensor at a point; what it returns, unless None, takes the tensor's place.

    `z` is not a module's output: it is reached through the attention function (probe.tracing).
    """
    path, _, end = locate(subject, point, layer).rpartition(".")
    module = subject.layers[layer].get_submodule(path)
    change = of_what_is_added(change, factor(subject, point, layer))
    if end == "input":
        return module.register_forward_pre_hook(_before(change), with_kwargs=True)
    return module.register_forward_hook(_after(change))


def locate(subject: Subject, point: str, layer: int, call: str = "") -> str:
    """The path of a point from its layer, the names of this model filled in.

    Raises EditError for a layer that has no such part.
    """
    path = POINTS[point].path
    return path.format(module=_module(subject, point, layer), call=call) if "{module}" in path else path


def _module(subject: Subject, point: str, layer: int) -> str:
    """The module of a layer that makes the tensor of a point: the row's word, else the norm after it, else the part itself."""
    anatomy = subject.anatomy
    name = (anatomy.mlp if point == "mlp_out" else anatomy.attention)[layer]
    if name is None:
        part = "feed-forward block" if point == "mlp_out" else "attention"
        raise EditError(f"layer {layer} of this {anatomy.family} model has no {part} to hook")
    if point == "z":
        return name
    parts = dict(subject.layers[layer].named_children())
    norms = next((pair for pair in _NORMS_AFTER if all(norm in parts for norm in pair)), (name, name))
    return dict(anatomy.row.adds).get(point, norms[point == "mlp_out"])


def factor(subject: Subject, point: str, layer: int) -> float:
    """What a layer multiplies the output of its blocks with before it adds it to the residual stream."""
    return float(getattr(subject.layers[layer], "residual_multiplier", 1.0)) if point in ("attn_out", "mlp_out") else 1.0


def of_what_is_added(change: Change, factor: float) -> Change:
    """A change of a block's output that sees, and gives back, that output times a factor."""
    if factor == 1:
        return change

    def scaled(state: Tensor) -> Tensor | None:
        new = change(state * factor)
        return None if new is None else new / factor

    return scaled


def _before(change: Change) -> Callable[..., Any]:
    def pre_hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        state = args[0] if args else kwargs["hidden_states"]
        new = change(state)
        if new is None:
            return None
        return ((new, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": new})

    return pre_hook


def _after(change: Change) -> Callable[..., Any]:
    def forward_hook(module: nn.Module, args: Any, output: Any) -> Any:
        new = change(output[0] if isinstance(output, tuple) else output)
        if new is None:
            return None
        return (new, *output[1:]) if isinstance(output, tuple) else new

    return forward_hook
