"""Every pass at a real strength and at none, and what it says of itself: the rows of the contract.

A new pass is one more `Case`. `claim` is the exact statement that its settings make, checked on the model that it made; `origin` names
the weight of the dense model that a weight must equal, or None for one that the pass is there to change.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pytest
import torch

from compress.budget import Budget
from compress.calibration import Calibration
from compress.passes import METHODS
from compress.passes.base import Evidence, Pass
from compress.passes.experts import Experts
from compress.passes.layers import RemoveLayers
from compress.passes.masks import Masks
from compress.passes.prune import Prune, Subnet
from compress.passes.skips import Composite, ShortV, Skip
from compress.passes.tokens import Pyramid, Tokens, Withdraw
from compress.passes.width import Width
from compress.recipe import compress
from compress.smaller import Smaller
from compress.tokens.media import find_media
from probe import Example, Subject
from probe.calibration import linear_maps
from probe.media import Clip
from probe.subject import Encoded
from tests import toys

FAMILIES = (
    "llava", "llava_next", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "internvl", "smolvlm", "gemma3", "mllama", "qwen2_audio",
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
    evidence: Callable[[Subject], Evidence] = lambda subject: {}


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


def rows_run(layer: int, query: bool, ffn: bool) -> Callable[[Made], None]:
    """In a layer only words attend, or go through the feed-forward block; everywhere else all do, and all keys are kept."""

    def claim(made: Made) -> None:
        one = made.smaller.encode(made.encoded.examples[:1])
        media = find_media(made.dense, one.inputs["input_ids"], {k: v for k, v in one.inputs.items() if k != "input_ids"})
        n, visual = one.inputs["input_ids"].shape[1], sum(map(len, media[0]))
        anatomy, asked = made.smaller.anatomy, {}
        for i, block in enumerate(made.smaller.layers):  # the last map of each half: the halves themselves may be stood in for
            asked[i, "query"] = block.get_submodule(f"{anatomy.attention[i]}.o_proj")
            if not anatomy.experts[i]:  # stacked experts are no modules
                asked[i, "ffn"] = block.get_submodule(f"{anatomy.mlp[i]}.down_proj")
        counted = dict.fromkeys(asked, 0)
        handles = [
            module.register_forward_pre_hook(
                lambda m, args, key=key: counted.update({key: counted[key] + args[0].shape[:-1].numel()})
            )
            for key, module in asked.items()
        ]
        try:
            cache = last_state(made.smaller, one)[1]
        finally:
            for handle in handles:
                handle.remove()
        for (i, part), rows in counted.items():
            assert rows == (n if i != layer or {"query": query, "ffn": ffn}[part] else n - visual), (i, part, rows, n, visual)
        assert {cached.keys.shape[2] for cached in cache.layers} == {n}

    return claim


def nothing_saved(made: Made) -> None:
    """Every layer's cache holds every position: a mask removes nothing."""
    assert {cached.keys.shape[2] for cached in made.cache.layers} == {made.encoded.inputs["input_ids"].shape[1]}
    assert [len(one.layers) for one in made.smaller.attached] == [2]


def zeros(per: str, share: float = 0.5) -> Callable[[Made], None]:
    """So many zeros in every row, every matrix, or every four inputs; at least so many of a subnetwork, which says how many."""

    def claim(made: Made) -> None:
        told = {one["name"]: one["sparsity"] for one in made.smaller.ledger[-1].changes[0]["maps"]}
        seen = 0
        for name, module in linear_maps(made.smaller):
            if name not in told:
                continue
            gone = module.weight == 0
            assert float(gone.float().mean()) == pytest.approx(told[name], abs=1e-6)
            if per == "row":
                assert set(gone.sum(1).tolist()) == {int(share * gone.shape[1])}
            elif per == "matrix":
                assert int(gone.sum()) == int(share * gone.numel())
            elif per == "four":
                assert set(gone.view(len(gone), -1, 4).sum(-1).flatten().tolist()) == {2}
            else:
                assert told[name] >= share
            seen += 1
        assert seen == len(told) > 0

    return claim


def half_as_wide(made: Made) -> None:
    """Half of the key heads with their query heads, and half of the neurons, are gone from every layer that can lose some."""
    heads, neurons = ({int(layer) for layer in change["units"]} for change in made.smaller.ledger[-1].changes)
    assert neurons == set(range(made.dense.n_layers))
    assert heads == {i for i in neurons if not made.dense.anatomy.cross[i]}
    for i, (thin, wide) in enumerate(zip(made.smaller.layers, made.dense.layers, strict=True)):
        assert thin.mlp.down_proj.in_features == wide.mlp.down_proj.in_features // 2
        if i in heads:
            assert thin.self_attn.o_proj.in_features == wide.self_attn.o_proj.in_features // 2
            keys = made.dense.config.get_text_config().num_key_value_heads // 2
            assert made.cache.layers[i].keys.shape[1] == keys


def experts_less(made: Made) -> None:
    """One expert of four is gone from every layer, from the router too, and the configuration says so."""
    assert made.smaller.config.get_text_config().num_experts == 3
    for layer in made.smaller.layers:
        assert len(layer.mlp.gate.weight) == 3


# --- evidence --------------------------------------------------------------------------------------------------------


def examples(subject: Subject) -> Evidence:
    """The pair as calibration examples."""
    return {"calibration": Calibration(tuple(replace(one, answer="yes") for one in toys.pair(subject)))}


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


def not_in(*parts: str) -> Callable[[str, Subject], str | None]:
    """What stands in these parts of decoder layers may change; nothing else."""

    def origin(name: str, subject: Subject) -> str | None:
        inside = name.startswith(f"{subject.anatomy.layers}.") and any(f".{part}." in name for part in parts)
        return None if inside else name

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


def _skips() -> list[Case]:
    found = [
        ("skip", Skip(layers=(2,)), Skip(layers=()), (False, False)), ("shortv", ShortV(layers=(2,)), ShortV(layers=()), (False, False)),
        ("composite", Composite(layers=(2,)), Composite(layers=()), (False, True)),
    ]  # fmt: skip
    return [Case(name, real, nothing, rows_run(2, *runs), masked(real)) for name, real, nothing, runs in found]


def _masks() -> list[Case]:
    methods = ("aki", "naavit", "croc", "unimodal")
    pairs = [(Masks(method=m, layers=(1, 2)), Masks(method=m, layers=())) for m in methods]
    return [Case(f"mask: {real.method}", real, nothing, nothing_saved) for real, nothing in pairs]


def _weights() -> list[Case]:
    maps = not_in("self_attn", "mlp", "cross_attn")
    dense = Prune(sparsity=0.0)
    return [
        Case("prune: magnitude", Prune(method="magnitude", sparsity=0.5), dense, zeros("matrix"), origin=maps, evidence=examples),
        Case("prune: wanda", Prune(sparsity=0.5), dense, zeros("row"), origin=maps, evidence=examples),
        Case("prune: wanda 2:4", Prune(n_of_m="2:4"), dense, zeros("four"), origin=maps, evidence=examples),
        Case("prune: sparsegpt", Prune(method="sparsegpt", sparsity=0.5), dense, zeros("matrix"), origin=maps, evidence=examples),
        Case(
            "subnet", Subnet(by="side", sparsity=0.5), Subnet(by="side", sparsity=0.0), zeros("at least"), origin=maps, evidence=examples
        ),
    ]  # fmt: skip


def _structured() -> list[Case]:
    width = Width(heads=0.5, neurons=0.5, score="magnitude")
    return [
        Case("width", width, Width(), half_as_wide, masked(width), origin=not_in("self_attn", "mlp")),
        Case("experts", Experts(count=1), Experts(count=0), experts_less, origin=not_in("mlp"), evidence=examples),
    ]


CASES: dict[str, Case] = {
    case.name: case
    for case in (
        Case("remove-layers", RemoveLayers(layers=(2,)), RemoveLayers(layers=()), layers_less(1), passed_by(2), renumbered(2)),
        *_weights(),
        *_structured(),
        *_skips(),
        *_masks(),
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
