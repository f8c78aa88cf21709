"""Other attention masks while a prompt is read: hooks on the model and on chosen layers, nothing else.

The pairs are found from the ids when the model is called, so that `generate`, batches and padding on either side work as ever. Words that the
model writes are causal, and read a cache as long as the dense model's: decoding costs what it did.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from compress.layer_cost import Ran
from compress.tokens.pairs import MASKS, Pairs, changed
from compress.tokens.spans import Reader, Spans
from probe.attention import PREFIX
from probe.errors import PassError, did_you_mean
from probe.subject import Encoded, Subject


def refuse(subject: Subject, method: str, layers: Sequence[int]) -> None:
    """Raises PassError where a mask cannot be put on these layers, or would change nothing."""
    if method not in MASKS:
        raise PassError(f"there is no attention mask {method!r}{did_you_mean(method, MASKS)}")
    anatomy, family = subject.anatomy, subject.anatomy.family
    if outside := [layer for layer in layers if not 0 <= layer < subject.n_layers]:
        raise PassError(f"layer {outside[0]} does not exist: the model has layers 0 to {subject.n_layers - 1}")
    if any(anatomy.cross):
        raise PassError(f"the pictures of {family} are not in the sequence: no mask of it stands between them and words")
    if anatomy.row.places == "unmarked":
        raise PassError(f"{family} puts its pictures before the prompt without placeholders: their tokens cannot be told")
    if not any((anatomy.image_token_id, anatomy.video_token_id, anatomy.audio_token_id)):
        raise PassError(f"{subject.name} is shown nothing: a mask {method!r} has no visual tokens to act on")
    if without := [layer for layer in layers if anatomy.attention[layer] is None]:
        raise PassError(
            f"layer {without[0]} of this {family} mixes positions without attention, and has no mask: name layers that attend"
        )
    kernel = (subject.decoder.config._attn_implementation or "").removeprefix(PREFIX)
    if kernel not in ("sdpa", "eager"):
        raise PassError(f'{kernel} attention takes no mask of its own for each pair: load with attn_implementation="sdpa"')
    if sees := _already(subject, method):
        raise PassError(f"the pictures of {family} see {sees} already: the mask {method!r} would change nothing")
    if MASKS[method].asks and not Reader(subject).header:
        raise PassError(
            f"nothing in the prompts of this {family} marks where the answer begins: {method} cannot tell it from the question"
        )


def _already(subject: Subject, method: str) -> str:
    """What the pictures of a family see by themselves, where a mask would add nothing to it; empty where it would."""
    kind, both = subject.anatomy.model_type, getattr(subject.config.get_text_config(), "use_bidirectional_attention", None)
    if kind == "paligemma" and method in ("aki", "croc"):
        return "the whole prompt"
    return "all of themselves" if method == "croc" and (kind == "gemma3" or both in ("vision", "all")) else ""


class MaskedAttention:
    """A mask on some layers of a subject; `detach` takes it off again. Raises PassError where it cannot stand there."""

    def __init__(self, subject: Subject, method: str, layers: Sequence[int]) -> None:
        refuse(subject, method, layers)
        self.subject, self.method, self.layers = subject, method, tuple(layers)
        self.reader = Reader(subject)
        self.reading: Pairs | None = None
        model = subject.model
        self.handles = [
            model.register_forward_pre_hook(self._begin, with_kwargs=True),
            model.register_forward_hook(self._end, always_call=True),
            *(subject.layers[i].register_forward_pre_hook(self._entering(i), with_kwargs=True) for i in self.layers),
        ]

    def detach(self) -> None:
        """Takes the hooks off; the model is as it was."""
        for handle in self.handles:
            handle.remove()
        self.handles = []

    def pairs(self, ids: Tensor, real: Tensor, inputs: Mapping[str, Any]) -> Pairs | None:
        """What is opened and closed in a batch of prompts; None where nothing is shown in it."""
        spans = self.reader.read(ids, real, inputs)
        if not bool(spans.shown.any()):
            return None
        self._check(spans)
        return MASKS[self.method].pairs(spans)

    def _check(self, spans: Spans) -> None:
        if MASKS[self.method].asks and bool((spans.until < 0).any()):
            raise PassError(
                f"a prompt has no {self.subject.tokenizer.decode(list(self.reader.header)).strip()!r} after its picture: {self.method} cannot tell "
                f"where its question ends and the answer begins"
            )

    def _begin(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.reading = None
        ids = args[0] if args else kwargs.get("input_ids")
        cache = kwargs.get("past_key_values")
        if getattr(cache, "is_compileable", False):
            raise PassError("a static cache brings a mask of its own: read prompts with the default, dynamic cache")
        if not isinstance(ids, Tensor):
            if kwargs.get("inputs_embeds") is not None and not _goes_on(cache):
                raise PassError("a mask tells words from visual tokens by their ids: call the model with input_ids")
            return
        if _goes_on(cache):
            # A placeholder by itself is one that the model wrote.
            if ids.shape[1] > 1 and bool(self.reader.read(ids, torch.ones_like(ids, dtype=torch.bool), {}).shown.any()):
                raise PassError(f"the mask {self.method!r} wants a prompt in one piece: show pictures in its first pass")
            return
        mask = kwargs.get("attention_mask")
        if isinstance(mask, Tensor) and mask.dim() != 2:
            raise PassError(f"the mask {self.method!r} cannot be combined with one that the caller brings: give one of keys")
        real = mask.bool() if isinstance(mask, Tensor) else torch.ones_like(ids, dtype=torch.bool)
        self.reading = self.pairs(ids, real, kwargs)

    def _end(self, model: nn.Module, args: Any, output: Any) -> None:
        self.reading = None

    def _entering(self, index: int) -> Callable[..., Any]:
        def hook(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if self.reading is None:
                return None
            state = args[0] if args else kwargs["hidden_states"]
            return args, {**kwargs, "attention_mask": self._masked(self.reading, kwargs.get("attention_mask"), state)}

        return hook

    def _masked(self, pairs: Pairs, mask: Any, state: Tensor) -> Tensor:
        """A layer's mask; where reducers stand before the decoder, for the columns that they leave."""
        runtime = getattr(self.subject, "runtime", None)
        prompt = runtime.reading.prompt if runtime is not None and runtime.reading is not None else None
        if prompt is not None:  # its hook comes after this one, and cuts the mask down to what is left at this layer
            return changed(mask, pairs.at(prompt.columns_at[0] if prompt.columns_at else prompt.now))
        if state.shape[1] != pairs.shape[1]:
            raise PassError(
                f"a layer runs {state.shape[1]} of the {pairs.shape[1]} positions that its mask is made for: put the mask on other layers"
            )
        return changed(mask, pairs)

    def seen(self, layer: int, ran: Ran, encoded: Encoded) -> Ran:
        """The same tokens with the query-key pairs that this mask leaves of one prompt, where the layer runs all of them."""
        attention = self.subject.layers[layer].get_submodule(self.subject.anatomy.attention[layer] or "")
        n = int((~_pads(encoded)).sum())
        if layer not in self.layers or not ran.queries == ran.keys == n or getattr(attention, "sliding_window", None):
            return ran
        inputs = {key: value for key, value in encoded.inputs.items() if key != "input_ids"}
        real = ~_pads(encoded).to(encoded.inputs["input_ids"].device)
        pairs = self.pairs(encoded.inputs["input_ids"], real, inputs)
        return ran if pairs is None else replace(ran, pairs=float(pairs.count(real)))


def _goes_on(cache: Any) -> bool:
    return cache is not None and int(cache.get_seq_length()) > 0


def _pads(encoded: Encoded) -> Tensor:
    return torch.tensor([[segment == "pad" for segment in token_map.segments] for token_map in encoded.maps])
