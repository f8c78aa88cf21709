"""Every pass at a real strength and at none, and what it says of itself: the rows of the contract.

A new pass is one more `Case`. `claim` is the exact statement that its settings make, checked on the model that it made; `origin` names
the weight of the dense model that a weight must equal, or None for one that the pass is there to change.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from compress.budget import Budget
from compress.passes import METHODS
from compress.passes.base import Pass
from compress.passes.layers import RemoveLayers
from compress.passes.tokens import Pyramid, Tokens, Withdraw
from compress.recipe import compress
from compress.smaller import Smaller
from compress.tokens.media import find_media
from probe import Example, Subject
from probe.media import Clip
from probe.subject import Encoded
from tests import toys

FAMILIES = (
    "llava", "llava_next", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "internvl", "smolvlm", "gemma3", "mllama", "qwen2_audio",
)  # fmt: skip
CLIPS = ("evs", "progressive-pooling", "thumbnail-and-sampling")


@dataclass(frozen=True)
class Made:
    """What a pass made: the dense and the smaller model, one prompt, and the cache that it left in the smaller one."""

    dense: Subject
    smaller: Smaller
    encoded: Encoded
    cache: Any


@dataclass(frozen=True)
class Case:
    """One pass under test. `twin` opens the same decision carried out with masks or hooks alone, where there is such a thing."""

    name: str
    real: Pass
    nothing: Pass
    claim: Callable[[Made], None]
    twin: Callable[[Subject, Encoded], AbstractContextManager[Subject]] | None = None
    origin: Callable[[str, Subject], str | None] = lambda name, subject: name
    clips: bool = False
    evidence: Mapping[str, Any] = field(default_factory=dict)


def toy(family: str) -> tuple[Any, Any]:
    """A toy; Gemma 3's with windows that hold the whole prompt."""
    model, processor = toys.build(family)
    if family == "gemma3":
        model.config.text_config.sliding_window = 256
        for layer in model.model.language_model.layers:
            layer.self_attn.sliding_window = layer.self_attn.sliding_window and 256
    return model, processor


def shown(subject: Subject, clips: bool) -> list[Example]:
    """The pair of examples that a case is about, with pictures (or sounds), or with clips."""
    if not clips:
        return toys.pair(subject)
    pictures = [tuple(toys.picture(56, 56, 4 * i + k) for k in range(4)) for i in range(2)]
    return [
        Example("ab"[i], prompt, videos=(partial(Clip, pictures[i], (0.0, 0.5, 1.0, 1.5)),), suffix=suffix)
        for i, (prompt, suffix) in enumerate(toys.WORDS)
    ]


# --- what passes claim ------------------------------------------------------------------------------------------------


def layers_less(count: int) -> Callable[[Made], None]:
    """So many layers less, in the model, in its configuration, and in the cache."""

    def claim(made: Made) -> None:
        left = made.dense.n_layers - count
        assert made.smaller.n_layers == len(made.cache.layers) == left
        assert made.smaller.config.get_text_config().num_hidden_layers == left

    return claim


def tokens_left(kept: Callable[[int, int], int]) -> Callable[[Made], None]:
    """`kept(n, layer)` of a medium's n tokens are in each layer's cache, and everything else."""

    def claim(made: Made) -> None:
        ids = made.encoded.inputs["input_ids"]
        rest = {k: v for k, v in made.encoded.inputs.items() if k != "input_ids"}
        media = [[len(medium) for medium in row] for row in find_media(made.dense, ids, rest)]
        assert sum(map(sum, media)) == sum(
            int((ids == token).sum())
            for token in (
                made.dense.anatomy.image_token_id,
                made.dense.anatomy.video_token_id,
                made.dense.anatomy.audio_token_id,
            )
            if token is not None
        )
        for layer, cached in enumerate(made.cache.layers):
            gone = min(sum(n - kept(n, layer) for n in row) for row in media)
            assert cached.keys.shape[2] == ids.shape[1] - gone

    return claim


def at(layer: int, share: float) -> Callable[[int, int], int]:
    return lambda n, here: max(1, round(share * n)) if here >= layer else n


# --- twins -----------------------------------------------------------------------------------------------------------


def masked(one: Pass) -> Callable[[Subject, Encoded], AbstractContextManager[Subject]]:
    """The same pass with `simulated`."""

    @contextmanager
    def opened(subject: Subject, encoded: Encoded) -> Iterator[Subject]:
        smaller = compress(subject, [one.model_copy(update={"simulated": True})], in_place=True)
        try:
            yield smaller
        finally:
            smaller.detach()

    return opened


def passed_by(layer: int) -> Callable[[Subject, Encoded], AbstractContextManager[Subject]]:
    """The dense model, one of whose layers gives back what enters it."""

    @contextmanager
    def opened(subject: Subject, encoded: Encoded) -> Iterator[Subject]:
        def back(module: Any, args: Any, kwargs: Any, output: Any) -> Any:
            state = args[0] if args else kwargs["hidden_states"]
            return (state, *output[1:]) if isinstance(output, tuple) else state

        handle = subject.layers[layer].register_forward_hook(back, with_kwargs=True)
        try:
            yield subject
        finally:
            handle.remove()

    return opened


def renumbered(gone: int) -> Callable[[str, Subject], str | None]:
    """Weights of the decoder's layers after a removed one have moved down by one."""

    def origin(name: str, subject: Subject) -> str | None:
        head = f"{subject.anatomy.layers}."
        if not name.startswith(head):
            return name
        number, _, rest = name.removeprefix(head).partition(".")
        return f"{head}{int(number) + (int(number) >= gone)}.{rest}"

    return origin


# --- the table -------------------------------------------------------------------------------------------------------


def _method(name: str) -> Case:
    layer = 2 if METHODS[name].layer else 0
    real = Tokens(method=name, budget=Budget(keep=0.5), layer=layer)
    nothing = Tokens(method=name, budget=Budget(keep=1.0), layer=layer)
    return Case(f"tokens: {name}", real, nothing, tokens_left(at(layer, 0.5)), masked(real), clips=name in CLIPS)


def _pyramid() -> Case:
    places = {"at": (0.5, 0.75), "rounding": "round"}
    real = Pyramid.model_validate({**places, "keep": (0.5, 0.25)})
    nothing = Pyramid.model_validate({**places, "keep": (1.0, 1.0)})
    kept = lambda n, layer: n if layer < 2 else max(1, round(n * (0.5 if layer < 3 else 0.25)))  # noqa: E731
    return Case("pyramid", real, nothing, tokens_left(kept), masked(real))


def _withdraw() -> Case:
    real = Withdraw(layer=3)
    return Case(
        "withdraw", real, Withdraw(layer=4), tokens_left(lambda n, layer: 0 if layer >= 3 else n), masked(real)
    )  # fmt: skip


CASES: dict[str, Case] = {
    case.name: case
    for case in (
        Case("remove-layers", RemoveLayers(layers=(2,)), RemoveLayers(layers=()), layers_less(1), passed_by(2), renumbered(2)),
        *(_method(name) for name in METHODS),
        _pyramid(),
        _withdraw(),
    )
}


def last_state(subject: Subject, encoded: Encoded) -> tuple[torch.Tensor, Any]:
    """Logits of each row's last position (float32), and the cache that the prompt leaves."""
    with subject.lock, torch.no_grad():
        made = subject.model(**encoded.inputs, use_cache=True)
    rows = torch.arange(len(encoded))
    return made.logits[rows, encoded.last - len(encoded.maps[0])].float(), made.past_key_values
