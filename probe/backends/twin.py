"""A copy of a model's structure that shares its weights: something for a library to take apart."""

from copy import deepcopy
from typing import Any

from transformers import PreTrainedModel

from probe.subject import Subject


def twin(model: PreTrainedModel) -> PreTrainedModel:
    """The model's modules, buffers and configuration copied, its parameters shared: it costs milliseconds and no memory.

    It is made anew for each pass and not kept. A kept one would go on giving the numbers of the model as it was after its
    layers, devices or configuration have changed, and nothing would tell.
    """
    return deepcopy(model, {id(weight): weight for weight in model.parameters()})


def attend_eagerly(model: Any, subject: Subject) -> None:
    """Switches the decoder of a twin to eager attention, the only kind that has weights to show."""
    for module in model.get_submodule(subject.anatomy.decoder).modules():
        if hasattr(module, "config"):
            module.config._attn_implementation_internal = "eager"
