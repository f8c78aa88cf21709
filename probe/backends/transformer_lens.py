"""TransformerLens: its bridge takes the model apart and puts hook points between the parts.

The bridge computes attention itself, eagerly, and calls the weights `hook_pattern`. It is built around a twin, by
`build_bridge_from_module`: the library's own `boot_transformers` would install torchvision where it is missing.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import copy, deepcopy
from functools import partial
from importlib.util import find_spec
from typing import Any

from torch import Tensor, nn
from transformer_lens.factories.architecture_adapter_factory import SUPPORTED_ARCHITECTURES
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.generalized_components.base import GeneralizedComponent
from transformer_lens.model_bridge.sources import build_bridge_from_module
from transformer_lens.model_bridge.sources.transformers import helpers
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from probe.backends import Wanted
from probe.backends.twin import twin
from probe.errors import BackendError
from probe.points import PATTERN, POINTS, factor
from probe.subject import Subject


def attach(subject: Subject, wanted: Wanted) -> Callable[..., Any]:
    """Something to call in the model's place, read through TransformerLens's hook points.

    Raises BackendError for an architecture that TransformerLens does not take, and for a point that its bridge does not
    have or does not come by.
    """
    family = subject.anatomy.family
    bridge = _bridge(subject)
    takers: dict[str, Callable[[Tensor], Tensor | None]] = {
        f"blocks.{layer}.{POINTS[point].transformer_lens}": partial(wanted.visit, point, layer)
        for point, layer in wanted.places
    }
    takers |= {f"blocks.{layer}.{PATTERN.transformer_lens}": partial(wanted.weigh, layer) for layer in wanted.patterns}
    waiting = set(takers)

    def come_by(name: str, state: Tensor, hook: Any) -> Tensor | None:
        waiting.discard(name)
        return takers[name](state)

    for point, layer in wanted.places:
        if factor(subject, point, layer) != 1 or (point == "z" and _gated(bridge, layer)):
            raise BackendError(
                f"{point} of this {family} model is scaled or gated on its way, and TransformerLens reads it on the other side: "
                f"leave the backend out"
            )
    for name in takers:
        try:
            bridge.add_hook(name, partial(come_by, name))
        except (AttributeError, KeyError, ValueError) as error:
            raise BackendError(f"TransformerLens has no {name} in this {family} model") from error

    def forward(**inputs: Any) -> Any:
        output = bridge.original_model(**inputs)
        if waiting:
            raise BackendError(f"TransformerLens did not come by {min(waiting)} of this {family} model")
        return output

    return forward


def _gated(bridge: TransformerBridge, layer: int) -> bool:
    """Whether a layer's attention multiplies z by a gate before the output projection reads it."""
    return any(bridge.get_hook_point(f"blocks.{layer}.attn.{gate}") for gate in ("hook_q_gate", "hook_gate"))


def _bridge(subject: Subject) -> TransformerBridge:
    _check(type(subject.model).__name__)
    model = twin(subject.model)
    try:
        with _installing_nothing():
            return build_bridge_from_module(model, type(model).__name__, hf_config=model.config)
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        first = str(error).strip().split("\n")[0]
        raise BackendError(f"TransformerLens cannot take this {subject.anatomy.family} model apart: {first}") from error


def _check(name: str) -> None:
    if name not in SUPPORTED_ARCHITECTURES:
        known = sorted(set(SUPPORTED_ARCHITECTURES) & set(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.values()))
        raise BackendError(
            f"TransformerLens does not take {name}: of the models that read pictures it takes {', '.join(known)}"
        )
    missing = [library for library in SUPPORTED_ARCHITECTURES[name].required_libraries if find_spec(library) is None]
    if missing:
        raise BackendError(f"TransformerLens takes {name} only where {missing[0]} is installed: pip install {missing[0]}")


@contextmanager
def _installing_nothing() -> Iterator[None]:
    """TransformerLens installs torchvision where a processor seems to want it, and with it another torch: not meanwhile."""
    before = helpers._ensure_torchvision
    helpers._ensure_torchvision = lambda: False
    try:
        yield
    finally:
        helpers._ensure_torchvision = before


def unwrap(bridge: TransformerBridge) -> tuple[PreTrainedModel, Any]:
    """The Hugging Face model and the processor (of a text-only model, the tokenizer) inside a bridge: `load` takes them.

    The model that a bridge was made from has been taken apart in place: bridge components stand where its modules stood, and
    its attention does not pass through transformers any more, so that rows and knock-outs would find nothing. What comes
    back is therefore a second tree of the original modules, put together as they were, which shares its weights with the
    bridge; its attention stays eager until `set_attn_implementation` says otherwise. The bridge goes on working.

    Raises BackendError for a bridge that has no processor, or whose weights or forwards are not the model's own any more.
    """
    if bridge.compatibility_mode or bridge._weights_processed:
        raise BackendError("this bridge has rewritten its weights (enable_compatibility_mode): unwrap one that has not")
    processor = bridge.processor or bridge.tokenizer
    if processor is None:
        raise BackendError("this bridge has no processor: set bridge.processor, or call load((model, processor))")
    return _together(bridge.original_model, {}), processor


def _together(module: nn.Module, made: dict[int, Any]) -> Any:
    """The module, its parts the originals again; `made` holds what has been put together, by the id of what it was."""
    while isinstance(module, GeneralizedComponent):
        module = module.original_component
    if id(module) in made:
        return made[id(module)]
    if "forward" in vars(module):
        raise BackendError(f"this bridge has put a forward of its own into {type(module).__name__}: load the model itself")
    new = made[id(module)] = copy(module)
    # A shallow copy of a module shares its registers of parameters, parts and hooks: they are copied too, one level deep.
    vars(new).update({name: copy(value) for name, value in vars(module).items() if isinstance(value, dict)})
    if "config" in vars(module):  # one for all its modules, and not the bridge's
        new.config = deepcopy(module.config, made)
    new._modules = {name: None if part is None else _together(part, made) for name, part in module._modules.items()}
    return new
