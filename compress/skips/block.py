"""One decoder layer, run by its own code with its attention or its feed-forward block stood in for."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from inspect import signature
from typing import Any

from torch import Tensor, nn

from compress.skips.rows import KeysAlone, Taken
from probe.subject import Subject

Forward = Callable[..., Any]
Half = Callable[[Tensor], Tensor]


@contextmanager
def standing_in(module: nn.Module, forward: Forward | None) -> Iterator[None]:
    """While this is open, a module computes something else; its hooks see that. None changes nothing."""
    if forward is None:
        yield
        return
    before = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        restore(module, before)


def restore(module: nn.Module, before: Forward | None) -> None:
    """Gives a module the forward back that it had: its class's, unless somebody had set another."""
    if before is None:
        del module.__dict__["forward"]
    else:
        module.forward = before


class Block:
    """A decoder layer of a subject. What its attention adds and what its feed-forward block adds can be taken out for a call.

    Both are added to the residual stream behind norms without an offset, if any: a half that puts out zero adds nothing.
    """

    def __init__(self, subject: Subject, index: int) -> None:
        self.layer = subject.layers[index]
        self.attention = self.layer.get_submodule(subject.anatomy.attention[index] or "")
        self.mlp = self.layer.get_submodule(subject.anatomy.mlp[index] or "")
        self.before = self.layer.__dict__.get("forward")
        self.forward, self.attend, self.feed = self.layer.forward, self.attention.forward, self.mlp.forward
        self.names = list(signature(type(self.layer).forward).parameters)[1:]

    def named(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
        """A call's state, and its other arguments by name."""
        given = {**dict(zip(self.names, args, strict=False)), **kwargs}
        return given.pop(self.names[0]), given

    def run(self, state: Tensor, kwargs: dict[str, Any], attention: Forward | None = None, mlp: Forward | None = None) -> Any:
        """The layer's own forward, with what stands in for its halves."""
        with standing_in(self.attention, attention), standing_in(self.mlp, mlp):
            return self.forward(state, **kwargs)

    def only_keys(self, cache: Any) -> tuple[Forward, Taken]:
        """An attention that adds nothing, and what takes its keys and values (into `cache`); queries are not computed."""
        taken = Taken(cache)

        def forward(*args: Any, **kwargs: Any) -> tuple[Tensor, None]:
            normed = normed_of(args, kwargs)
            with standing_in(self.attention.get_submodule("q_proj"), self._no_query), suppress(KeysAlone):
                self.attend(*args, **{**kwargs, "past_key_values": taken})
            return normed.new_zeros(normed.shape), None

        return forward, taken

    def _no_query(self, normed: Tensor) -> Tensor:
        width = int(self.attention.get_submodule("q_proj").out_features)  # type: ignore[arg-type]
        return normed.new_zeros(1).expand(*normed.shape[:-1], width)


def normed_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The normed state that an attention is called with."""
    found: Tensor = args[0] if args else kwargs["hidden_states"]
    return found


def silent(*args: Any, **kwargs: Any) -> tuple[Tensor, None]:
    """An attention that adds nothing and keeps nothing."""
    normed = normed_of(args, kwargs)
    return normed.new_zeros(normed.shape), None


def nothing(normed: Tensor) -> Tensor:
    """A feed-forward block that adds nothing."""
    return normed.new_zeros(normed.shape)


def state_of(output: Any) -> Tensor:
    """The state among what a layer gives."""
    found: Tensor = output[0] if isinstance(output, tuple) else output
    return found


def with_state(output: Any, state: Tensor) -> Any:
    """What a layer gives, with another state."""
    return (state, *output[1:]) if isinstance(output, tuple) else state
