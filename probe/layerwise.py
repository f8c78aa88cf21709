"""The decoder as a chain of layers that can be run again: forward from any state, backward one layer at a time.

A pass keeps what entered each layer and nothing of what happened inside it. Going back, one layer is run again with
gradients and its graph is dropped before the next one: memory is that of a checkpointed backward pass, and the model's own
attention kernel runs throughout. What a layer's attention was called with, and the gradient of what it read, is shown to a visitor
on the way, from which the gradient of every attention weight follows without the weights ever being kept.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from probe.attention import Call, listening
from probe.errors import EditError
from probe.subject import Encoded, Subject
from probe.tracing import last_logits, read_out

# (layer, its attention call, gradient of what its heads read (batch query head dim), None where no gradient was asked for)
Visitor = Callable[[int, Call, Tensor | None], None]


@dataclass
class LayerCall:
    """What a layer was called with, and what the family adds to the stream after it (DeepStack), if anything."""

    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    added: Tensor | None = None


@dataclass
class Chain:
    """The decoder's layers as one batch called them. `entering` (layer batch position width) holds the states of the plain pass."""

    subject: Subject
    encoded: Encoded
    calls: list[LayerCall]
    entering: list[Tensor]
    leaving: Tensor
    logits: Float[Tensor, "batch vocabulary"]

    @torch.no_grad()
    def forward(self, state: Float[Tensor, "batch position width"]) -> tuple[list[Tensor], Tensor]:
        """What enters each layer, and leaves the last, when `state` enters the first one."""
        entering = []
        with self.subject.lock:
            for layer, call in enumerate(self.calls):
                entering.append(state)
                state = self._run(layer, state)
                if call.added is not None:
                    state = state + call.added
        return entering, state

    def score(self, leaving: Tensor, targets: Tensor) -> Float[Tensor, " batch"]:
        """The logit of each example's target token, float32, from what leaves the last layer."""
        last = leaving[torch.arange(len(leaving)), self.encoded.last.to(leaving.device)]
        logits = read_out(self.subject, last[:, None])[:, 0].float()
        return logits.gather(1, targets.to(logits.device)[:, None])[:, 0]

    def backward(
        self, entering: Sequence[Tensor], leaving: Tensor, targets: Tensor, visit: Visitor | None = None, gradient: bool = True
    ) -> Tensor | None:
        """The gradient of the targets' logits with respect to what enters the first layer (batch position width).

        `visit` sees each layer's attention on the way, from the last layer down. Without `gradient` the layers are run again
        for it alone, and nothing is returned.
        """
        slope = self._slope_of_score(leaving, targets) if gradient else None
        with self.subject.lock, ExitStack() as stack:
            tap = _Tap()
            if visit is not None:
                stack.enter_context(listening(self.subject, tap))
            for layer in range(len(self.calls) - 1, -1, -1):
                tap.call = tap.read = None
                slope, read_slope = self._one_back(layer, entering[layer], slope, tap)
                if visit is not None and tap.call is not None:
                    visit(layer, tap.call, read_slope)
        return slope

    def _slope_of_score(self, leaving: Tensor, targets: Tensor) -> Tensor:
        with torch.enable_grad():
            state = leaving.detach().requires_grad_(True)
            (slope,) = torch.autograd.grad(self.score(state, targets).sum(), state)
        return slope

    def _one_back(self, layer: int, state: Tensor, slope: Tensor | None, tap: "_Tap") -> tuple[Tensor | None, Tensor | None]:
        if slope is None:
            with torch.no_grad():
                self._run(layer, state)
            return None, None
        with torch.enable_grad():
            state = state.detach().requires_grad_(True)
            output = self._run(layer, state.clone())  # a layer may add to its input in place
            wanted = [state] if tap.read is None else [state, tap.read]
            slopes = torch.autograd.grad(output, wanted, slope.to(output.device))
        return slopes[0], slopes[1] if len(slopes) > 1 else None

    def _run(self, layer: int, state: Tensor) -> Tensor:
        call = self.calls[layer]
        output = self.subject.layers[layer](state, *call.args, **call.kwargs)
        return output[0] if isinstance(output, tuple) else output


@dataclass
class _Tap:
    """Keeps the attention call of the layer that runs, and what its heads read."""

    call: Call | None = None
    read: Tensor | None = None

    def attend(self, layer: int, call: Call) -> tuple[Tensor, Tensor | None]:
        if self.call is not None:
            raise EditError(f"layer {layer} attends twice in one pass, so that relevance cannot be followed through it")
        read, weights = call.run()
        self.call = replace(call, query=call.query.detach(), key=call.key.detach(), value=call.value.detach())
        self.read = read if read.requires_grad else None
        return read, weights


def capture(subject: Subject, encoded: Encoded) -> Chain:
    """One plain pass, from which the decoder can be run again.

    Raises EditError for an architecture in which a layer depends on more than the state that enters it.
    """
    family = subject.anatomy.family
    if getattr(subject.config.get_text_config(), "num_kv_shared_layers", 0):
        raise EditError(f"layers of this {family} model share keys and values, so that gradients cannot go back layer by layer")
    if any(subject.anatomy.cross):
        layer = subject.anatomy.cross.index(True)
        raise EditError(
            f"layer {layer} of this {family} model reads the picture through cross-attention: its positions are not in the "
            f"sequence that relevance is followed through"
        )
    seen = _Pass(family, subject.anatomy.row.deepstack)
    with subject.lock, ExitStack() as stack:
        for block in subject.layers:
            stack.callback(block.register_forward_pre_hook(seen.enter, with_kwargs=True).remove)
            stack.callback(block.register_forward_hook(seen.leave).remove)
        logits = last_logits(subject, encoded)
    assert seen.left is not None
    return Chain(subject, encoded, seen.calls, seen.entering, seen.left, logits)


class _Pass:
    """What the hooks of a plain pass see, layer after layer."""

    def __init__(self, family: str, deepstack: bool) -> None:
        self.family, self.deepstack = family, deepstack
        self.calls: list[LayerCall] = []
        self.entering: list[Tensor] = []
        self.left: Tensor | None = None

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        state = args[0] if args else kwargs["hidden_states"]
        # Kept as it is now: DeepStack may add to the same tensor in place later on.
        state = state.detach().clone()
        if self.left is not None and not torch.equal(self.left.to(state.device), state):
            if not self.deepstack:
                raise EditError(
                    f"something between layers {len(self.calls) - 1} and {len(self.calls)} of this {self.family} model changes the "
                    f"residual stream in a way that is not known to be an addition"
                )
            self.calls[-1].added = state - self.left.to(state.device)
        self.entering.append(state)
        self.calls.append(LayerCall(args[1:], {k: v for k, v in kwargs.items() if k != "hidden_states"}))

    def leave(self, module: nn.Module, args: Any, output: Any) -> None:
        self.left = (output[0] if isinstance(output, tuple) else output).detach().clone()
