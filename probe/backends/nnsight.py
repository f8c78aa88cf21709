"""nnsight: the model runs while a block of our own code waits, in the order of execution, for what comes by.

The block reads what enters and leaves modules and, inside the attention, the call of transformers' attention function, whose
results are z and the eager weights. What stays in the process after `import nnsight` is nnsight's own doing: `.save` on every
object, unless its configuration says PYMOUNT: false (nothing here needs it).
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from operator import attrgetter
from typing import Any

from nnsight import Envoy, NNsight, TransformersModel
from nnsight.intervention.interleaver import OutOfOrderError
from torch import Tensor
from transformers import PreTrainedModel

from probe.backends import Wanted
from probe.backends.twin import attend_eagerly, twin
from probe.errors import BackendError
from probe.points import PATTERN, POINTS, factor, locate, of_what_is_added
from probe.subject import Subject


def attach(subject: Subject, wanted: Wanted) -> Callable[..., Any]:
    """Something to call in the model's place, read by nnsight.

    Raises BackendError where z or attention weights are asked of an attention that does not go through transformers'
    attention interface, and EditError for a part that a layer does not have.
    """
    model = twin(subject.model)
    if wanted.patterns:
        attend_eagerly(model, subject)
    layers = NNsight(model.get_submodule(subject.anatomy.layers))  # what stands around them need not be wrapped
    stops = _stops(subject, layers, wanted)

    def forward(**inputs: Any) -> Any:
        results = []
        try:
            with layers.trace(**inputs, fn=model) as tracer:
                for stop in stops:
                    stop.wait()
                results.append(tracer.result)
        except OutOfOrderError as error:
            first = str(error).split("\n")[0]
            raise BackendError(f"nnsight did not come by every point that was asked for: {first}") from error
        return results[0]

    return forward


@dataclass(frozen=True)
class _Stop:
    """One tensor to wait for: `end` (input or output) of an envoy, and who takes it."""

    envoy: Any
    end: str
    item: int
    take: Callable[[Tensor], Tensor | None]

    def wait(self) -> None:
        found = getattr(self.envoy, self.end)  # here our code stands still until the model has come so far
        several = isinstance(found, tuple)
        new = self.take(found[self.item] if several else found)
        if new is not None:
            setattr(self.envoy, self.end, (*found[: self.item], new, *found[self.item + 1 :]) if several else new)


def _stops(subject: Subject, layers: Any, wanted: Wanted) -> list[_Stop]:
    """All that is wanted, in the order in which the model comes by."""
    stops = []
    for layer in range(subject.n_layers):
        for name, point in POINTS.items():
            takers: list[tuple[int, Callable[[Tensor], Tensor | None]]] = []
            if (name, layer) in wanted.places:
                takers.append((point.item, of_what_is_added(partial(wanted.visit, name, layer), factor(subject, name, layer))))
            if point.path == PATTERN.path and layer in wanted.patterns:
                takers.append((PATTERN.item, partial(wanted.weigh, layer)))
            if takers:
                call = _call(subject, layers, layer) if "{call}" in point.path else ""
                holder, _, end = locate(subject, name, layer, call).rpartition(".")
                envoy = attrgetter(holder)(layers[layer]) if holder else layers[layer]
                stops += [_Stop(envoy, end, item, take) for item, take in takers]
    return stops


def _call(subject: Subject, layers: Any, layer: int) -> str:
    """The name that nnsight gives the call of the attention function in a layer."""
    module = getattr(layers[layer], str(subject.anatomy.attention[layer]))
    calls = [name for name in module.source.names if name.startswith("attention_interface_")]
    if not calls:
        raise BackendError(
            f"nnsight finds no call of transformers' attention interface in {type(module._module).__name__}: z and attention "
            f"weights of this {subject.anatomy.family} model cannot be read through it"
        )
    return calls[-1]


def unwrap(wrapped: Envoy) -> tuple[PreTrainedModel, Any]:
    """The Hugging Face model and the processor (of a text-only model, the tokenizer) inside a TransformersModel: `load` takes them.

    The model stays wrapped, its `forward` nnsight's own, which does nothing outside a trace of the wrapper.

    Raises BackendError for a wrapper that has no processor, or whose weights are not loaded yet.
    """
    model: PreTrainedModel = wrapped._module
    if not isinstance(wrapped, TransformersModel):
        raise BackendError(
            f"an {type(wrapped).__name__} has no processor: load((model, processor)) with the model that it was made from"
        )
    if any(weight.is_meta for weight in model.parameters()):
        raise BackendError("the weights of this nnsight model are not loaded yet: make it with dispatch=True")
    return model, wrapped.processor or wrapped.tokenizer
