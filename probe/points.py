"""The named points of a decoder, as one table, and how a hook reaches each.

| point | tensor | shape |
|---|---|---|
| resid_pre | what enters a layer (after DeepStack's additions, where a family has them) | batch position width |
| attn_out | what the attention adds to the residual stream | batch position width |
| mlp_out | what the feed-forward block adds | batch position width |
| resid_post | what leaves a layer, before any norm | batch position width |
| z | what each head read, before the output projection | batch position head dim |
"""

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from probe.errors import EditError, did_you_mean
from probe.subject import Subject

POINTS = ("resid_pre", "attn_out", "mlp_out", "resid_post", "z")
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
    block = subject.layers[layer]
    if point == "resid_pre":
        return block.register_forward_pre_hook(_before(change), with_kwargs=True)
    if point == "resid_post":
        return block.register_forward_hook(_after(change))
    name = (subject.anatomy.attention if point == "attn_out" else subject.anatomy.mlp)[layer]
    if name is None:
        part = "attention" if point == "attn_out" else "feed-forward block"
        raise EditError(f"layer {layer} of this {subject.anatomy.family} model has no {part} to hook")
    return getattr(block, name).register_forward_hook(_after(change))


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
