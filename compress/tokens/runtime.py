"""Stands in a model's forward pass and removes positions: before the decoder, at the input of a layer, or both.

Nothing but hooks: the modelling code stays transformers' own, `generate` works with its own cache, and detaching leaves the model as
it was. The choice is made once, in the pass that reads the prompt; what comes after reads the cache that this pass left
behind, layer by layer as long as that layer's keys, with position ids that go on by the policy.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary
from zlib import crc32

import torch
from torch import Tensor, nn

from compress.tokens import masks
from compress.tokens.choice import Kept, Seen
from compress.tokens.guards import Reducer, refuse, refuse_windows, tokens_kept
from compress.tokens.media import Medium, find_media
from compress.tokens.prompt import Prompt
from compress.tokens.tower import Tower
from probe.attention import Call, listening
from probe.errors import EditError, PassError
from probe.subject import Subject


@dataclass
class _Pass:
    """A call of the model that reads a prompt: what was found before the decoder, and what is recorded on the way."""

    media: list[list[Medium]]
    real: Tensor
    draws: list[int]  # a number for each row that follows from its words alone, for reducers that draw
    stack: ExitStack = field(default_factory=ExitStack)
    call: Call | None = None
    prompt: Prompt | None = None


class TokenRuntime:
    """Reducers attached to a subject's model; `detach` takes them off again.

    Raises PassError for layers that do not exist, or a place where this architecture cannot lose positions.
    """

    def __init__(self, subject: Subject, reducers: Sequence[Reducer]) -> None:
        self.subject = subject
        self.reducers = sorted(reducers, key=lambda reducer: reducer.layer)
        refuse(subject, self.reducers)
        self.reading: _Pass | None = None
        self.past: Prompt | None = None
        self.read: Prompt | None = None  # the prompt that was read last, and what was left of it
        self.prompts: WeakKeyDictionary[Any, Prompt] = WeakKeyDictionary()
        self.asking: list[Call] | None = None  # while a layer is asked which attention it would compute
        self.handles: list[Any] = []
        self.tower: Tower | None = None
        self.choosing: Callable[[], AbstractContextManager[Any]] = nullcontext  # entered around every choice, by who times it
        self.grids: list[Tensor] = []  # (frames, rows, columns) of the media that the tower has seen since the last prompt
        self.attach()

    def attach(self) -> None:
        model, decoder = self.subject.model, self.subject.decoder
        records = {need for reducer in self.reducers for need in reducer.needs} - {"before", "here"}
        if records:  # `generate` runs the tower before it calls the model: what is recorded waits for the prompt
            self.tower = Tower(self.subject, records)  # first, since it may refuse, and then nothing must hang on the model
        self.handles = [
            *(self.tower.handles if self.tower else []),
            model.register_forward_pre_hook(self._begin, with_kwargs=True),
            model.register_forward_hook(self._end, with_kwargs=True, always_call=True),
            decoder.register_forward_pre_hook(self._enter_decoder, with_kwargs=True),
        ]
        for index, layer in enumerate(self.subject.layers):
            self.handles.append(layer.register_forward_pre_hook(self._entering(index), with_kwargs=True))
        if self.subject.anatomy.vision:
            tower = model.get_submodule(self.subject.anatomy.vision)
            self.handles.append(tower.register_forward_pre_hook(self._see_grid, with_kwargs=True))

    def detach(self) -> None:
        """Takes the hooks off; the model is as it was."""
        for handle in self.handles:
            handle.remove()
        self.handles, self.tower = [], None

    def _see_grid(self, tower: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """`generate` encodes pictures before it calls the model, and tells the model nothing of their grids."""
        grid = kwargs.get("grid_thw", args[1] if len(args) > 1 else None)
        if isinstance(grid, Tensor) and grid.dim() == 2 and grid.shape[1] == 3:
            self.grids.append(grid)

    # --- a call of the whole model ---

    def _begin(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self.reading = self.past = None
        cache = kwargs.get("past_key_values")
        if cache is not None and getattr(cache, "is_compileable", False):
            raise PassError("a static cache has one length for all layers: tokens are dropped with the default, dynamic cache")
        if cache is not None and cache.get_seq_length():
            self.past = self.prompts.get(cache)
            return None if self.past is None else (args, _remembered(self.past, kwargs))
        ids = args[0] if args else kwargs.get("input_ids")
        if not isinstance(ids, Tensor):
            return None
        media = find_media(self.subject, ids, {**self._told(ids), **kwargs})
        if any(media):
            refuse_windows(self.subject, ids.shape[1])
            mask = kwargs.get("attention_mask")
            real = mask.bool() if isinstance(mask, Tensor) and mask.dim() == 2 else torch.ones_like(ids, dtype=torch.bool)
            self.reading = self._listen(_Pass(media, real, [_draw(line[kept]) for line, kept in zip(ids, real, strict=True)]))
        return None

    def _told(self, ids: Tensor) -> dict[str, Any]:
        kinds = [("image", self.subject.anatomy.image_token_id), ("video", self.subject.anatomy.video_token_id)]
        there = [f"{kind}_grid_thw" for kind, token in kinds if token is not None and bool((ids == token).any())]
        grids, self.grids = self.grids, []
        return dict(zip(there, grids, strict=False))

    def _listen(self, reading: _Pass) -> _Pass:
        needs = {need for reducer in self.reducers for need in reducer.needs}
        try:
            if needs & {"before", "here"}:
                reading.stack.enter_context(listening(self.subject, self))
        except EditError as error:
            raise PassError("a model that chooses tokens by attention cannot be traced at the same time") from error
        return reading

    def _end(self, model: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        reading, self.reading, self.past = self.reading, None, None
        if reading is None:
            return
        reading.stack.close()
        if self.tower is not None:
            self.tower.forget()
        self.read = reading.prompt
        cache = getattr(output, "past_key_values", None)
        if cache is not None and reading.prompt is not None:
            self.prompts[cache] = reading.prompt

    def attend(self, layer: int, call: Call) -> tuple[Tensor, Tensor | None]:
        """Keeps the call of a layer whose attention a reducer wants."""
        if self.asking is not None:
            self.asking.append(call)
            return torch.zeros_like(call.query.transpose(1, 2)), None
        if self.reading and any(reducer.layer == layer + 1 and "before" in reducer.needs for reducer in self.reducers):
            self.reading.call = call
        return call.run()

    # --- the decoder and its layers ---

    def _enter_decoder(self, decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self.past is not None:
            return args, {**kwargs, "position_ids": _ids_after(self.past, kwargs)}
        reading = self.reading
        if reading is None:
            return None
        given = kwargs.get("position_ids")
        prompt = reading.prompt = Prompt.of(reading.media, reading.real, given, kwargs["inputs_embeds"])
        embeds = self._reduce(reading, prompt, 0, kwargs["inputs_embeds"])
        if any("before" in reducer.needs for reducer in self.reducers):
            prompt.entered = masks.gathered(embeds, _whole(prompt, embeds))
        ids = prompt.ids if given is not None and given.dim() == 3 else prompt.ids[0]
        kwargs = {**kwargs, "inputs_embeds": embeds, "position_ids": ids}
        kwargs["attention_mask"] = _decoder_mask(prompt, kwargs.get("attention_mask"))
        if kwargs.get("visual_pos_masks") is not None:
            kwargs = _compact_planes(prompt, kwargs)
        return args, kwargs

    def _entering(self, index: int) -> Callable[..., Any]:
        def hook(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if self.reading is None and self.past is None:
                return None
            state = args[0] if args else kwargs["hidden_states"]
            if self.past is not None:
                return args, self._layer_after(self.past, index, kwargs, state)
            assert self.reading is not None
            state, kwargs = self._layer_of_prompt(self.reading, index, layer, state, kwargs)
            return ((state, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": state})

        return hook

    def _layer_of_prompt(
        self, reading: _Pass, index: int, layer: nn.Module, state: Tensor, kwargs: dict[str, Any]
    ) -> tuple[Tensor, dict[str, Any]]:
        prompt = reading.prompt
        assert prompt is not None
        here = [reducer for reducer in self.reducers if index and reducer.layer == index]
        if any("here" in reducer.needs for reducer in here):
            with self.choosing():
                reading.call = self._ask(index, layer, state, self._arguments(prompt, kwargs, state))
        if here:
            state = self._reduce(reading, prompt, index, state)
        kwargs = self._arguments(prompt, kwargs, state)
        prompt.enter_layer()
        return state, kwargs

    def _arguments(self, prompt: Prompt, kwargs: dict[str, Any], state: Tensor) -> dict[str, Any]:
        """A layer's arguments, made for what entered the decoder, cut down to what is left at this layer."""
        first = prompt.columns_at[0] if prompt.columns_at else prompt.now
        turned = kwargs.get("position_embeddings")
        if prompt.now.shape[1] != first.shape[1]:
            where = prompt.standing()
            kwargs = {**kwargs, "attention_mask": masks.compact(kwargs.get("attention_mask"), where)}
            if isinstance(kwargs.get("position_ids"), Tensor):
                kwargs["position_ids"] = prompt.ids[0]
            if isinstance(turned, tuple):
                kwargs["position_embeddings"] = tuple(masks.gathered(part.expand(len(where), -1, -1), where) for part in turned)
        if prompt.renumbered_inside and isinstance(turned, tuple):
            kwargs = {**kwargs, "position_embeddings": self._rotary(state, prompt.ids)}
        if prompt.simulates:
            hidden = masks.picked(prompt.hidden, prompt.now)
            kwargs = {**kwargs, "attention_mask": masks.hide(kwargs.get("attention_mask"), hidden, state)}
        return kwargs

    def _layer_after(self, past: Prompt, index: int, kwargs: dict[str, Any], state: Tensor) -> dict[str, Any]:
        """A layer's arguments for what is generated: its own keys, its own position ids."""
        here, cache = past.columns_at[index], kwargs["past_key_values"].layers[index]
        if here.shape[1] != past.columns_at[0].shape[1]:
            sizes = cache.get_mask_sizes(state.shape[1])
            mask = masks.after(kwargs.get("attention_mask"), masks.picked(past.real, here), sizes, state)
            kwargs = {**kwargs, "attention_mask": mask}
        if not torch.equal(past.next_at[index], past.next_at[0]) and isinstance(kwargs.get("position_embeddings"), tuple):
            done = cache.get_seq_length() - here.shape[1]
            ids = past.next_at[index][:, :, None] + done + torch.arange(state.shape[1], device=state.device)
            kwargs = {**kwargs, "position_embeddings": self._rotary(state, ids)}
        hidden = past.hidden_at[index]
        if bool(hidden.any()):
            keys = int(cache.get_seq_length()) + state.shape[1]
            kwargs = {**kwargs, "attention_mask": masks.hide(kwargs.get("attention_mask"), hidden, state, keys)}
        return kwargs

    def _rotary(self, state: Tensor, ids: Tensor) -> Any:
        rotary = getattr(self.subject.decoder, "rotary_emb", None)
        if rotary is None or getattr(rotary, "layer_types", None):
            raise PassError(
                f"{self.subject.anatomy.family} turns its layers differently: inside it, tokens are dropped with the policy preserve only"
            )
        return rotary(state, ids[0] if len(ids) == 1 else ids[-3:])

    def _ask(self, index: int, layer: nn.Module, state: Tensor, kwargs: dict[str, Any]) -> Call:
        """The attention call that a layer would make on these states; its kernel is not run."""
        norm = getattr(layer, "input_layernorm", None)
        if norm is None:
            raise PassError(
                f"{self.subject.anatomy.family} has no input norm by that name: use a method that reads the layer before"
            )
        clean = {k: v for k, v in kwargs.items() if k not in ("hidden_states", "past_key_values", "use_cache")}
        self.asking = []
        try:
            getattr(layer, self.subject.anatomy.attention[index] or "")(
                hidden_states=norm(state), past_key_values=None, **clean
            )
            return self.asking[0]
        finally:
            self.asking = None

    # --- a choice ---

    def _reduce(self, reading: _Pass, prompt: Prompt, index: int, state: Tensor) -> Tensor:
        """Every reducer of a layer, one after the other; the states of what they leave."""
        for reducer in (one for one in self.reducers if one.layer == index):
            keep = prompt.shown_now()
            state = state.clone()
            for row, number in [(i, k) for i, own in enumerate(prompt.media) for k in range(len(own))]:
                places = prompt.places_of(row, number)
                with self.choosing():
                    kept = self._chosen(reading, prompt, reducer, state, row, number, places)
                if kept.states is not None:
                    state[row, places[kept.index]] = kept.states.to(state.dtype)
                gone = torch.ones(len(places), dtype=torch.bool, device=places.device)
                gone[kept.index] = False
                keep[row, places[gone]] = False
            prompt.renumber(reducer.policy, keep)
            if reducer.simulated:
                prompt.hide(keep)
            else:
                state = prompt.drop(keep, state)
        return state

    def _chosen(
        self, reading: _Pass, prompt: Prompt, reducer: Reducer, state: Tensor, row: int, number: int, places: Tensor
    ) -> Kept:
        medium = prompt.media[row][number]
        if reducer.select is None:
            return Kept(places[:0])
        count = tokens_kept(self.subject, reducer, len(medium))
        if count >= len(places):
            return Kept(torch.arange(len(places), device=places.device))
        before = sum(len(media) for media in prompt.media[:row]) + number
        words = prompt.words(row, int(places[-1]))
        seen = Seen(
            states=state[row, places], text=state[row, words], grid=medium.grid, layer=reducer.layer, n_layers=self.subject.n_layers,
            kind=medium.kind, tower=self.tower.of(medium, before, prompt.media) if self.tower else {}, call=reading.call,
            row=row, places=places, words=words, alive=(prompt.real_now() & prompt.shown_now())[row],
            last=int(torch.nonzero(prompt.real_now()[row])[-1]),
            seed=reducer.seed + reading.draws[row] + number,
            before=None if prompt.entered is None else prompt.entered[row, prompt.now[row].clamp(min=0)],
        )  # fmt: skip
        kept = reducer.select(seen, count)
        if len(kept.index) != count or bool((kept.index[1:] <= kept.index[:-1]).any()):
            raise PassError(f"a reducer kept {len(kept.index)} tokens, or not in order, where {count} were asked for")
        return kept


def _draw(ids: Tensor) -> int:
    """A number for a prompt, whichever batch it is in and however it is padded."""
    return crc32(ids.cpu().numpy().tobytes())


def _whole(prompt: Prompt, state: Tensor) -> Tensor:
    """Where each column of the whole prompt stands among what is left; the first place for those that are gone."""
    columns = torch.arange(prompt.length, device=state.device).expand(len(state), -1)
    return masks.among(prompt.now, columns)


def _remembered(past: Prompt, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The mask of what came before is the mask of what is left of it."""
    mask = kwargs.get("attention_mask")
    if not (isinstance(mask, Tensor) and mask.dim() == 2):
        return kwargs
    kept = masks.picked(past.real, past.columns_at[0])
    return {**kwargs, "attention_mask": torch.cat([kept.to(mask.dtype), mask[:, past.length :]], 1)}


def _ids_after(past: Prompt, kwargs: dict[str, Any]) -> Tensor:
    """Ids of what is generated, in the shape that the model gave its own."""
    given, embeds = kwargs.get("position_ids"), kwargs["inputs_embeds"]
    done = int(kwargs["past_key_values"].get_seq_length()) - past.columns_at[0].shape[1]
    ids = past.next_at[0][:, :, None] + done + torch.arange(embeds.shape[1], device=embeds.device)
    return ids if given is not None and given.dim() == 3 else ids[0]


def _decoder_mask(prompt: Prompt, mask: Any) -> Any:
    """A mask of keys, or one for each kind of layer, for what is left.

    Keys are always named: gaps in the position ids would else be taken for the ends of packed sequences.
    """
    if mask is None:
        return prompt.real_now().long()
    if isinstance(mask, dict):
        return {kind: masks.compact(one, prompt.now) for kind, one in mask.items()}
    if isinstance(mask, Tensor) and mask.dim() == 2:
        return masks.picked(mask.bool(), prompt.now).to(mask.dtype)
    return masks.compact(mask, prompt.now)


def _compact_planes(prompt: Prompt, kwargs: dict[str, Any]) -> dict[str, Any]:
    """DeepStack's planes, one row for each visual position, follow the same choice."""
    seen = kwargs["visual_pos_masks"]
    number = seen.flatten().cumsum(0).view_as(seen) - 1  # batch position: the plane's row at each column
    left = masks.picked(seen, prompt.now)
    rows = number.gather(1, prompt.now.clamp(min=0))[left]
    planes = kwargs.get("deepstack_visual_embeds")
    return {**kwargs, "visual_pos_masks": left, "deepstack_visual_embeds": planes and [plane[rows] for plane in planes]}
