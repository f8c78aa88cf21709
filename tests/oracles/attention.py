"""Slow, obvious versions of what the attention function computes."""

import torch
from torch import Tensor

from probe.subject import Encoded, Subject


@torch.no_grad()
def eager_patterns(subject: Subject, encoded: Encoded) -> list[Tensor]:
    """transformers' own eager attention, every pattern: for each layer (batch head query key)."""
    config = subject.decoder.config
    before = config._attn_implementation
    subject.model.set_attn_implementation("eager")
    try:
        return list(subject.model(**encoded.inputs, use_cache=False, output_attentions=True).attentions)
    finally:
        subject.model.set_attn_implementation(before)


@torch.no_grad()
def eager_logits_with_mask(subject: Subject, encoded: Encoded, cut: dict[int, Tensor]) -> Tensor:
    """Last-position logits of an eager pass in which `cut[layer]` (query key, True where cut) is subtracted from the mask.

    The mask is edited by a forward pre-hook on each attention module: nothing of the project's own code is used.
    """
    before = subject.decoder.config._attn_implementation
    subject.model.set_attn_implementation("eager")
    handles = []
    try:
        for layer, edges in cut.items():
            attention = getattr(subject.layers[layer], subject.anatomy.attention[layer] or "")

            def hook(module, args, kwargs, edges=edges):
                mask = kwargs["attention_mask"]
                low = torch.finfo(mask.dtype).min
                return args, {**kwargs, "attention_mask": mask.masked_fill(edges, low)}

            handles.append(attention.register_forward_pre_hook(hook, with_kwargs=True))
        logits = subject.model(**encoded.inputs, use_cache=False).logits
    finally:
        for handle in handles:
            handle.remove()
        subject.model.set_attn_implementation(before)
    return logits[torch.arange(len(encoded)), encoded.last]


@torch.no_grad()
def logits_with_whole_mask(subject: Subject, encoded: Encoded, cut: Tensor) -> Tensor:
    """Last-position logits of an eager pass that is given one additive 4-D mask (batch 1 query key) for all of its layers.

    The mask is causal, without padding, and without the edges of `cut` (batch query key, True where cut); where the model makes its own masks
    (Gemma 3, whose picture looks both ways) the edges are taken out of those. It enters the language model where the plain one would.
    """
    real = encoded.inputs["attention_mask"].bool()
    low = torch.finfo(torch.float32).min
    seen = real[:, None, :] & torch.ones(cut.shape[-2:], dtype=torch.bool).tril()
    whole = torch.where(seen & ~cut, 0.0, low)[:, None]

    def enter(module, args, kwargs):
        given = kwargs["attention_mask"]
        if isinstance(given, dict):
            made = {kind: mask.masked_fill(cut[:, None], low) for kind, mask in given.items()}
            return args, {**kwargs, "attention_mask": made}
        return args, {**kwargs, "attention_mask": whole}

    before = subject.decoder.config._attn_implementation
    subject.model.set_attn_implementation("eager")
    handle = subject.decoder.register_forward_pre_hook(enter, with_kwargs=True)
    try:
        logits = subject.model(**encoded.inputs, use_cache=False).logits
    finally:
        handle.remove()
        subject.model.set_attn_implementation(before)
    return logits[torch.arange(len(encoded)), encoded.last]
