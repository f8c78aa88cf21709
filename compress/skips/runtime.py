"""Stands in for the forward of some decoder layers and leaves out what a rule says.

Visual rows are really not run: the words go through the layer's own code by themselves, and what they look at is put together in the place of
the cache. Where an example has one run of visual tokens and no mask is needed, the words before it and the words behind it are two calls
(causal, and causal aligned at the end), which keeps the fast kernels; else the words' rows of the mask are picked.
"""

from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Bool
from torch import Tensor, nn
from torch.nn.attention.bias import causal_lower_right

from compress.layer_cost import Ran
from compress.skips.block import Block, Forward, normed_of, nothing, restore, silent, state_of, with_state
from compress.skips.rows import Joined, Rows, mask_of, picked_arguments, put
from compress.skips.rule import Rule, length_layers, refuse
from compress.smaller import Smaller
from compress.tokens import masks
from compress.tokens.media import find_media
from probe.attention import PREFIX
from probe.errors import PassError, ReplayError


@dataclass(frozen=True)
class _Split:
    """The rows of a pass that rest, told once for all layers that have the same positions."""

    now: Tensor | None  # the columns that it was made for; held, so that no other tensor takes its place in memory
    resting: Bool[Tensor, "batch position"]
    real: Bool[Tensor, "batch position"]
    rows: Rows
    some: bool
    every: bool


@dataclass
class _Pass:
    """A call of the model: whether it reads a prompt, which of its positions are visual and which are real."""

    prompt: bool
    visual: Bool[Tensor, "batch position"] | None
    real: Bool[Tensor, "batch position"] | None
    splits: dict[int, _Split] = field(default_factory=dict)
    left: dict[int, Tensor] = field(default_factory=dict)  # for each layer without visual keys, which of its keys are real
    hidden: dict[int, Tensor] = field(default_factory=dict)  # the same where that is simulated: which of its keys are visual


class SkipRuntime:
    """A rule attached to layers of a compressed model; `detach` takes it off. Raises PassError where the model cannot follow it."""

    def __init__(self, smaller: Smaller, rule: Rule, layers: tuple[int, ...]) -> None:
        self.smaller, self.rule, self.layers = smaller, rule, layers
        refuse(smaller, rule, layers)
        taken = {layer for one in smaller.attached if isinstance(one, SkipRuntime) for layer in one.layers}
        if twice := sorted(taken & set(layers)):
            raise PassError(f"layer {twice[0]} is skipped by another pass already: name each layer in one of them")
        self.telling = length_layers(smaller)
        self.current: _Pass | None = None
        self.past: WeakKeyDictionary[Any, _Pass] = WeakKeyDictionary()
        self.blocks = {layer: Block(smaller, layer) for layer in layers}
        for layer, block in self.blocks.items():
            block.layer.forward = partial(self._forward, layer)
        self.handles = [
            smaller.model.register_forward_pre_hook(self._begin, with_kwargs=True),
            smaller.model.register_forward_hook(self._end, with_kwargs=True, always_call=True),
        ]

    def detach(self) -> None:
        """Gives the layers their own forward back."""
        for handle in self.handles:
            handle.remove()
        for block in self.blocks.values():
            restore(block.layer, block.before)
        self.handles, self.blocks = [], {}

    # --- what it saves (compress.cost) ---

    def ran(self, layer: int, ran: Ran, text: int, visual: int) -> Ran:
        """What a layer runs of a prompt of `text` words and `visual` tokens; query-key pairs as if the words stood behind the pictures."""
        rule = self.rule
        if layer not in self.layers or rule.simulated or self._read(layer):
            return ran
        if rule.rows == "all":
            if rule.when == "answer":
                return ran
            keys = ran.keys if rule.query or rule.when == "prompt" or layer in self.telling else 0
            return Ran(ran.queries * rule.query, keys, ran.ffn * rule.ffn, ran.pairs if rule.query else 0)
        running, resting = (text, visual) if rule.rows == "perceptual" else (visual, text)
        fed = text + visual if rule.ffn else running
        if rule.query:
            return replace(ran, ffn=fed)
        seen = visual if rule.kv and rule.rows == "perceptual" else 0
        return Ran(running, running + resting * rule.kv, fed, running * seen + running * (running + 1) / 2)

    def ran_next(self, layer: int) -> Ran | None:
        """What a layer runs of one token after the prompt; None for all of it."""
        rule = self.rule
        if layer not in self.layers or rule.simulated or rule.rows == "perceptual" or rule.when == "prompt":
            return None
        kept = rule.query or rule.rows == "text" or layer in self.telling
        return Ran(int(rule.query), int(kept), int(rule.ffn))

    # --- a call of the whole model ---

    def _begin(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        cache = kwargs.get("past_key_values")
        if cache is not None and getattr(cache, "is_compileable", False):
            raise PassError("a static cache has one length for all layers: rows are skipped with the default, dynamic cache")
        if cache is not None and cache.get_seq_length():  # what is read after a prompt runs whole, a later picture too
            self.current = replace(self.past.get(cache) or _Pass(False, None, None), prompt=False, splits={})
            return
        ids = args[0] if args else kwargs.get("input_ids")
        visual = None if self.rule.rows == "all" else self._visual(ids, kwargs)
        mask = kwargs.get("attention_mask")
        real = mask.bool() if isinstance(mask, Tensor) and mask.dim() == 2 else None
        self.current = _Pass(True, visual, torch.ones_like(visual) if real is None and visual is not None else real)

    def _visual(self, ids: Any, kwargs: dict[str, Any]) -> Bool[Tensor, "batch position"]:
        if not isinstance(ids, Tensor):
            raise PassError("visual rows are told by their ids: call the model with input_ids")
        visual = torch.zeros_like(ids, dtype=torch.bool)
        for row, media in enumerate(find_media(self.smaller, ids, {k: v for k, v in kwargs.items() if k != "input_ids"})):
            for medium in media:
                visual[row, medium.positions] = True
        return visual

    def _end(self, model: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        current, self.current = self.current, None
        cache = getattr(output, "past_key_values", None)
        if current is not None and cache is not None and (current.left or current.hidden):
            self.past[cache] = current

    # --- a layer ---

    def _forward(self, layer: int, *args: Any, **kwargs: Any) -> Any:
        if self.current is None:
            raise ReplayError(
                f'layer {layer} leaves out rows of a prompt, and cannot be run by itself: run a sweep with method="naive"'
            )
        block, rule, current = self.blocks[layer], self.rule, self.current
        state, kwargs = block.named(args, kwargs)
        if rule.when != "both" and rule.when != ("prompt" if current.prompt else "answer"):
            return block.run(state, kwargs)
        if rule.rows == "all":
            return self._all(layer, block, state, kwargs)
        if not current.prompt and rule.rows == "text":
            return self._all(layer, block, state, kwargs)
        if not current.prompt:
            return block.run(state, self._without_visual_keys(layer, kwargs, state))
        split = self._split_now(current)
        if split.every:
            return self._all(layer, block, state, kwargs)
        if not split.some:
            return block.run(state, kwargs)
        if rule.query or self._simulates(layer):
            return self._in_place(layer, block, state, kwargs, split.resting)
        found, output = self._apart(layer, block, state, kwargs, split)
        return with_state(output, found)

    def _simulates(self, layer: int) -> bool:
        """Whether everything is computed: asked for, or since somebody reads the attention of every row."""
        if self.rule.simulated:
            return True
        kernel = self.smaller.decoder.config._attn_implementation
        if not (kernel or "").startswith(PREFIX):
            return False
        runtime = self.smaller.runtime
        choosing = runtime is not None and runtime.reading is not None and runtime.reading.prompt is not None and any(
            {"before", "here"} & set(reducer.needs) for reducer in runtime.reducers
        )  # fmt: skip
        return self._read(layer) if choosing else True

    def _read(self, layer: int) -> bool:
        """Whether a reducer chooses by the attention of this layer."""
        return any(one.layer == layer + 1 and "before" in one.needs for one in self.smaller.reducers)

    def _split_now(self, current: _Pass) -> _Split:
        """The resting rows among the positions that reducers have left."""
        assert current.visual is not None
        assert current.real is not None
        reading = self.smaller.runtime.reading if self.smaller.runtime else None
        now = reading.prompt.now if reading is not None and reading.prompt is not None else None
        if id(now) not in current.splits:
            visual, real = (one if now is None else masks.picked(one, now) for one in (current.visual, current.real))
            resting = visual if self.rule.rows == "perceptual" else ~visual
            some, every = bool(resting.any()), bool(resting.all())
            current.splits[id(now)] = _Split(now, resting, real, Rows.of(resting), some, every)
        return current.splits[id(now)]

    def _all(self, layer: int, block: Block, state: Tensor, kwargs: dict[str, Any]) -> Any:
        """Every row: what the rule leaves out is not run, or run and taken out again."""
        rule = self.rule
        everywhere = torch.ones(state.shape[:2], dtype=torch.bool, device=state.device)
        if rule.query or self._simulates(layer):
            return self._in_place(layer, block, state, kwargs, everywhere)
        prompt = self.current is not None and self.current.prompt
        read = rule.rows == "text" or (rule.when == "prompt" and prompt)
        kept = layer in self.telling or read  # else nobody ever looks at these keys
        cache = kwargs.get("past_key_values")
        attention = block.only_keys(cache)[0] if kept and cache is not None else silent
        return self._split(block, state, kwargs, attention, everywhere)

    def _in_place(
        self, layer: int, block: Block, state: Tensor, kwargs: dict[str, Any], rows: Bool[Tensor, "batch row"]
    ) -> Any:
        """The whole layer, the rows' share taken out of what its halves add."""
        rule = self.rule
        if not rule.kv:
            assert self.current is not None
            self.current.hidden[layer] = rows
            kwargs = {**kwargs, "attention_mask": masks.hide(kwargs.get("attention_mask"), rows, state)}
        moved = self._updated(block, state, kwargs, rows) if rule.updated else None

        def attention(*args: Any, **more: Any) -> Any:
            found = block.attend(*args, **more) if moved is None else self._attend_moved(block, args, more, rows, moved)
            if rule.query:
                return found
            return (found[0].masked_fill(rows[..., None], 0.0), *found[1:])

        return self._split(block, state, kwargs, attention, rows)

    def _split(self, block: Block, state: Tensor, kwargs: dict[str, Any], attention: Forward, rows: Tensor) -> Any:
        """The layer with this attention, and the feed-forward block that the rule leaves to these rows."""
        rule, normed = self.rule, {}

        def attend(*args: Any, **more: Any) -> Any:
            normed["state"] = normed_of(args, more)
            return attention(*args, **more)

        def feed(own: Tensor) -> Tensor:
            if rule.ffn:
                shared = rule.parallel or (rule.compat and not rule.query)
                return block.feed(torch.where(rows[..., None], normed["state"], own) if shared else own)
            if rule.simulated:
                found = block.feed(own).masked_fill(rows[..., None], 0.0)
            else:
                words = masks.left_over(~rows)
                found = own.new_zeros(own.shape)
                if words.shape[1]:
                    found = put(found, words, block.feed(masks.gathered(own, words)))
            return torch.where(rows[..., None], own, found) if rule.compat and rule.query else found

        return block.run(state, kwargs, attend, feed)

    def _updated(self, block: Block, state: Tensor, kwargs: dict[str, Any], rows: Tensor) -> Tensor:
        """The normed states that keys and values of visual rows are made of once the feed-forward block has changed them."""
        normed = {}

        def keep(*args: Any, **more: Any) -> tuple[Tensor, None]:
            normed["state"] = normed_of(args, more)
            return silent(*args, **more)

        clean = {**kwargs, "past_key_values": None}
        block.run(state_of(block.run(state, clean, silent)), clean, keep, nothing)
        return normed["state"]

    def _attend_moved(self, block: Block, args: Any, kwargs: Any, rows: Tensor, moved: Tensor) -> Any:
        """The attention, its keys and values of some rows made of other states."""

        def swap(module: nn.Module, given: tuple[Any, ...]) -> tuple[Tensor]:
            return (torch.where(rows[..., None], moved, given[0]),)

        handles = [block.attention.get_submodule(f"{part}_proj").register_forward_pre_hook(swap) for part in "kv"]
        try:
            return block.attend(*args, **kwargs)
        finally:
            for handle in handles:
                handle.remove()

    # --- the rows that run by themselves ---

    def _apart(self, layer: int, block: Block, state: Tensor, kwargs: dict[str, Any], split: _Split) -> tuple[Tensor, Any]:
        """The running rows through the layer, the others past what they do without: the new state, and what the layer gave."""
        cache, mask, length, rows = kwargs.get("past_key_values"), kwargs.get("attention_mask"), state.shape[1], split.rows
        own = picked_arguments({**kwargs, "attention_mask": None, "past_key_values": None}, rows.resting, length)
        beside, keys = self._beside(block, masks.gathered(state, rows.resting), own)
        whole = put(state.clone(), rows.resting, beside, rows.alike) if self.rule.ffn else state.clone()
        if not self.rule.kv:
            assert self.current is not None
            self.current.left[layer] = masks.picked(split.real, rows.running)
            given = {**picked_arguments(kwargs, rows.running, length), "attention_mask": masks.compact(mask, rows.running)}
            output = block.run(masks.gathered(state, rows.running), given)
            return put(whole, rows.running, state_of(output)), output
        assert keys is not None
        joined = Joined(cache, keys, rows, length)
        kernel = (self.smaller.decoder.config._attn_implementation or "").removeprefix(PREFIX)
        output = None
        for index, stop, seen in _calls(rows, mask, length, kernel):
            joined.index, joined.stop = index, stop
            given = {**picked_arguments(kwargs, index, length), "attention_mask": seen, "past_key_values": joined}
            output = block.run(masks.gathered(state, index), given)
            put(whole, index, state_of(output), rows.alike)
        return whole, output

    def _beside(
        self, block: Block, state: Tensor, kwargs: dict[str, Any]
    ) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:  # fmt: skip
        """Rows that do not attend: what becomes of them, and their keys and values, if they have any."""
        rule, everywhere = self.rule, torch.ones(state.shape[:2], dtype=torch.bool, device=state.device)
        if not rule.ffn and not rule.kv:
            return state, None
        if not rule.kv:
            return state_of(self._split(block, state, kwargs, silent, everywhere)), None
        attention, taken = block.only_keys(None)
        if rule.updated:
            found = state_of(self._split(block, state, kwargs, silent, everywhere))
            block.run(found, kwargs, attention, nothing)
        else:
            found = state_of(self._split(block, state, kwargs, attention, everywhere))
        return found, taken.found

    def _without_visual_keys(self, layer: int, kwargs: dict[str, Any], state: Tensor) -> dict[str, Any]:
        """The arguments of what is written, in a layer that lacks the visual keys or hides them."""
        assert self.current is not None
        cache: Any = kwargs.get("past_key_values")
        if layer in self.current.left:
            sizes = cache.layers[layer].get_mask_sizes(state.shape[1])
            return {
                **kwargs,
                "attention_mask": masks.after(kwargs.get("attention_mask"), self.current.left[layer], sizes, state),
            }
        if layer in self.current.hidden:
            keys = int(cache.layers[layer].get_seq_length()) + state.shape[1]
            return {
                **kwargs,
                "attention_mask": masks.hide(kwargs.get("attention_mask"), self.current.hidden[layer], state, keys),
            }
        return kwargs


def _calls(rows: Rows, mask: Any, length: int, kernel: str) -> list[tuple[Tensor, int | None, Any]]:
    """The calls in which the words run: their rows, where the keys that they see end (None: at the end), and their mask."""
    if (
        mask is None
        and rows.alike
        and rows.segments[-1][1] == length
        and ("flash" in kernel or (kernel == "sdpa" and len(rows.runs) <= 2))
    ):
        return [
            (index, None if stop == length else stop, _aligned(stop - start, stop, kernel))
            for index, (start, stop) in zip(rows.runs, rows.segments, strict=True)
        ]
    return [(rows.running, None, mask_of(mask, rows.running, length))]


def _aligned(query: int, keys: int, kernel: str) -> Any:
    """A causal mask aligned at the end; flash kernels have none and align so by themselves, and one row sees everything."""
    return None if query in (1, keys) or kernel != "sdpa" else causal_lower_right(query, keys)
