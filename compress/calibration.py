"""Calibration, one decoder layer at a time: what enters its linear maps is summed, the layer is changed, and the next one sees what it then does.

The model itself is never changed. What enters the decoder, and what every layer is called with, is captured once for each batch by a pass in
which the layers do nothing; a layer is then run on the kept states, a private copy of it is shown to a visitor, and the copy as the visitor leaves it
is run again. So a plan needs no more memory than one layer beside the model, and the states that are kept.
"""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from hashlib import sha256
from typing import Any, Literal, get_args

import torch
from jaxtyping import Bool
from torch import Tensor, nn

from compress.measure import encode_all
from compress.statistics import Squares, Statistic
from probe.errors import PassError, did_you_mean
from probe.example import Example
from probe.layerwise import LayerCall
from probe.likelihood import with_answers
from probe.subject import Encoded, Subject
from probe.tokens import TokenMap
from probe.tracing import last_logits

Side = Literal["both", "perceptual", "textual"]
Maps = Mapping[str, Statistic]  # the linear maps of a layer, by their place in it; maps that read one tensor share one entry
Visit = Callable[[int, nn.Module, Maps], None]  # layer index, a copy of the layer that may be changed, what entered its maps
Watch = Callable[[int, int, Tensor], None]  # layer index, batch number, the state that goes on to the next layer


@dataclass(frozen=True)
class Calibration:
    """What a model is calibrated on: examples, with their answers where they have some, and whose tokens count.

    `side` is `both`, `perceptual` (tokens of what is shown; of an example that shows nothing, its context) or `textual` (all other tokens, answers
    among them). Padding never counts.
    """

    examples: tuple[Example, ...]
    side: Side = "both"
    answers: bool = True
    batch: int = 8

    def __post_init__(self) -> None:
        if not self.examples:
            raise PassError("there are no examples to calibrate on: give some, questions with pictures and answers")
        if self.side not in get_args(Side):
            raise PassError(f"there is no side {self.side!r}{did_you_mean(self.side, get_args(Side))}")
        if self.side == "perceptual" and not any(any(e.media.values()) or e.context for e in self.examples):
            raise PassError(
                "no calibration example shows anything: with side perceptual they need pictures, clips, sounds or a context"
            )

    def encoded(self, subject: Subject) -> list[Encoded]:
        """Batches in order, answers after the prompts."""
        batches = encode_all(subject, self.examples, self.batch)
        if not self.answers:
            return batches
        return [with_answers(subject, one, [example.answer for example in one.examples]) for one in batches]

    def of_side(self, side: Side) -> "Calibration":
        """The same examples, another side of them."""
        return replace(self, side=side)

    def only(self, belongs: Callable[[Example], bool]) -> "Calibration":
        """The same for some of the examples."""
        return replace(self, examples=tuple(example for example in self.examples if belongs(example)))

    def told(self) -> dict[str, Any]:
        """As a ledger has it: how many examples, whose tokens, and a fingerprint of their words."""
        words = "\n".join(f"{e.id}\t{e.context}\t{e.prompt}\t{e.options}\t{e.suffix}\t{e.answer}" for e in self.examples)
        return {"examples": len(self.examples), "side": self.side, "answers": self.answers,
                "fingerprint": sha256(words.encode()).hexdigest()[:16]}  # fmt: skip


def perceptual(token_map: TokenMap) -> Bool[Tensor, " position"]:
    """The tokens of what is shown; of an example that shows nothing, its context."""
    found = torch.zeros(len(token_map), dtype=torch.bool)
    media = token_map.positions("media")
    found[torch.from_numpy(media if len(media) else token_map.positions("context"))] = True
    return found


def counted(encoded: Encoded, side: Side = "both") -> Bool[Tensor, "batch position"]:
    """The tokens that count: no padding, and one side of the rest."""
    real = torch.tensor([[segment != "pad" for segment in m.segments] for m in encoded.maps])
    if side == "both":
        return real
    seen = torch.stack([perceptual(m) for m in encoded.maps])
    return real & (seen if side == "perceptual" else ~seen)


def sequential(
    subject: Subject,
    batches: Sequence[Encoded],
    visit: Visit,
    *,
    side: Side = "both",
    statistic: Callable[[], Statistic] = Squares,
    wanted: Callable[[int, str], bool] = lambda layer, name: True,
    dense: bool = False,
    offload: bool | None = None,
    watch: Watch | None = None,
    check: bool = True,
    advance: Callable[[int], None] = lambda n: None,
) -> None:
    """Goes through the decoder layer by layer; `visit(layer, copy, maps)` sees what entered each linear map and may change the copy.

    The next layer sees what the changed copy gives; with `dense`, what the unchanged layer gave, which runs each layer once only. `wanted(layer, name)`
    names the maps that are summed, `statistic` makes their sums. With `offload` states wait in the memory of the CPU (None: where they would
    take more than a quarter of what is free on the GPU); `watch(layer, batch, state)` sees
    every state that goes on; `advance(1)` is called after each layer. `check=False` leaves out `refuse`, for callers who have asked it.

    Raises PassError for no batches, a side without tokens, and an architecture whose layers cannot be run by themselves.
    """
    if not batches:
        raise PassError("there are no examples to calibrate on: give some, questions with pictures and answers")
    with subject.lock, torch.no_grad():
        if check:
            refuse(subject, batches[0])
        waits = _crowded(subject, batches) if offload is None else offload
        runs = [_captured(subject, one, side, waits) for one in batches]
        if not any(bool(run.rows.any()) for run in runs):
            raise PassError(f"no calibration example has {side} tokens: calibrate on others, or with side both")
        for index in range(subject.n_layers):
            last = index == subject.n_layers - 1
            _one_layer(subject, index, runs, visit, statistic, wanted, dense, last, watch)
            advance(1)


def _crowded(subject: Subject, batches: Sequence[Encoded]) -> bool:
    """Whether the states of all batches together leave too little room beside the model for a layer to run."""
    if subject.device.type != "cuda":
        return False
    width = subject.embedding.get_parameter("weight").shape[-1]
    states = sum(one.inputs["input_ids"].numel() for one in batches) * width * subject.dtype.itemsize
    return bool(states > torch.cuda.mem_get_info(subject.device)[0] / 4)


def _one_layer(
    subject: Subject, index: int, runs: list["_Run"], visit: Visit, statistic: Callable[[], Statistic],
    wanted: Callable[[int, str], bool], dense: bool, last: bool, watch: Watch | None,
) -> None:  # fmt: skip
    """Sums, the visit, and what goes on: that of the changed copy, which need not run where nothing follows."""
    layer = subject.layers[index]
    with _summing(layer, index, statistic, lambda name: wanted(index, name)) as sums:
        for run in runs:
            sums.rows, sums.every = run.rows, run.every
            left = run.through(layer, index)
            if dense:
                run.go_on(index, left)
    changed = copy.deepcopy(layer, {id(config): config for config in _configs(layer)})
    visit(index, changed, sums.found)
    if not dense and (watch is not None or not last):
        for run in runs:
            run.go_on(index, run.through(changed, index))
    if watch is not None:
        for number, run in enumerate(runs):
            watch(index, number, run.state)


def _configs(layer: nn.Module) -> list[Any]:
    """Configurations are shared with the model: a layer's copy must follow the same attention kernel."""
    return [module.config for module in layer.modules() if hasattr(module, "config")]


# --- what a batch is on its way through the decoder ------------------------------------------------------------------


@dataclass
class _Run:
    """One batch: its state, what its layers are called with, and the tokens that count."""

    state: Tensor
    calls: list[LayerCall]
    rows: Bool[Tensor, "batch position"]
    device: torch.device  # where it is computed; the state may wait elsewhere
    offload: bool = False
    every: bool = False  # whether all tokens count

    def through(self, layer: nn.Module, index: int) -> Tensor:
        """What the layer makes of the state, with what the family adds to the stream after it."""
        call = self.calls[index]
        # A clone: a layer may write into what it is given.
        made = layer(self.state.to(self.device, copy=True), *call.args, **call.kwargs)
        left: Tensor = made[0] if isinstance(made, tuple) else made
        return left if call.added is None else left + call.added

    def go_on(self, index: int, left: Tensor) -> None:
        """The next layer's turn; what this one was called with is not needed again."""
        self.calls[index] = LayerCall()
        self.state = left.cpu() if self.offload else left


def _captured(subject: Subject, encoded: Encoded, side: Side, offload: bool) -> _Run:
    """What the decoder is given, from a pass in which no layer computes anything."""
    seen = _Idle()
    with seen.layers(subject.layers):
        last_logits(subject, encoded)
    if seen.first is None or len(seen.calls) != subject.n_layers:
        raise PassError(
            f"{len(seen.calls)} of {subject.n_layers} layers of this {subject.anatomy.family} model run: it cannot be calibrated layer by layer"
        )
    state = seen.first
    rows = counted(encoded, side)
    every = bool(rows.all())
    return _Run(state.cpu() if offload else state, seen.calls, rows.to(state.device), state.device, offload, every)


@dataclass
class _Idle:
    """Layers that note what they are called with and give zeros, so that what is added between them is seen exactly."""

    calls: list[LayerCall] = field(default_factory=list)
    first: Tensor | None = None

    @contextmanager
    def layers(self, layers: nn.ModuleList) -> Iterator[None]:
        before = [layer.__dict__.get("forward") for layer in layers]
        try:
            for layer in layers:
                layer.forward = self._note
            yield
        finally:
            for layer, own in zip(layers, before, strict=True):
                del layer.forward
                if own is not None:
                    layer.forward = own

    def _note(self, *args: Any, **kwargs: Any) -> Tensor:
        state = args[0] if args else kwargs["hidden_states"]
        if self.first is None:
            self.first = state.detach().clone()
        elif state.any():
            self.calls[-1].added = state.detach().clone()
        self.calls.append(LayerCall(args[1:], {k: v for k, v in kwargs.items() if k != "hidden_states"}))
        return torch.zeros_like(state)


@torch.no_grad()
def refuse(subject: Subject, batch: Encoded) -> None:
    """Raises PassError where the layers, run by themselves, are not what they are in the model; found out on one example."""
    family = subject.anatomy.family
    if any(subject.anatomy.cross):
        raise PassError(
            f"layer {subject.anatomy.cross.index(True)} of this {family} model reads the picture through cross-attention: only models whose "
            f"pictures are in the sequence are calibrated"
        )
    encoded = subject.encode(batch.examples[0])
    want: list[Tensor] = []
    hooks = [
        layer.register_forward_hook(
            lambda module, args, made: want.append((made[0] if isinstance(made, tuple) else made).clone())
        )
        for layer in subject.layers
    ]
    try:
        last_logits(subject, encoded)
    finally:
        for hook in hooks:
            hook.remove()
    run = _captured(subject, encoded, "both", False)
    for index, layer in enumerate(subject.layers):
        added, run.calls[index].added = run.calls[index].added, None
        left = run.through(layer, index)
        gap, scale = float((left - want[index]).abs().max()), float(want[index].abs().max())
        if gap > (1e-4 if subject.dtype == torch.float32 else 5e-2) * max(1.0, scale):
            raise PassError(
                f"layer {index} of this {family} model gives something else when it is run by itself (difference {gap:.1e}): it cannot be "
                f"calibrated layer by layer"
            )
        run.go_on(index, left if added is None else left + added)


# --- what is summed --------------------------------------------------------------------------------------------------


class _Sums:
    """The sums of one layer's maps while batches pass."""

    def __init__(self, index: int, statistic: Callable[[], Statistic]) -> None:
        self.index, self.statistic = index, statistic
        self.found: dict[str, Statistic] = {}
        self.rows: Tensor = torch.zeros(0, dtype=torch.bool)
        self.every = False  # whether they are all of them: then nothing is picked
        self.seen: tuple[Tensor, Statistic] | None = None  # the tensor that was summed last, and where

    def take(self, name: str, entering: Tensor) -> None:
        if self.seen is not None and self.seen[0] is entering:  # q, k and v read one tensor: it is summed once
            self.found.setdefault(name, self.seen[1])
            return
        if entering.shape[:-1] not in (self.rows.shape, (self.rows.numel(),)):
            raise PassError(
                f"the map {name} of layer {self.index} is given {tuple(entering.shape)}, which are not the tokens of the batch in their order: "
                f"leave it out of the targets"
            )
        sums = self.found.setdefault(name, self.statistic())
        self.seen = entering, sums
        tokens = entering.reshape(-1, entering.shape[-1])
        sums.add(tokens if self.every else tokens[self.rows.flatten()])


@contextmanager
def _summing(
    layer: nn.Module, index: int, statistic: Callable[[], Statistic], wanted: Callable[[str], bool]
) -> Iterator[_Sums]:  # fmt: skip
    sums = _Sums(index, statistic)
    handles = [
        module.register_forward_pre_hook(lambda _, args, name=name: sums.take(name, args[0]))
        for name, module in layer.named_modules() if isinstance(module, nn.Linear) and wanted(name)
    ]  # fmt: skip
    try:
        yield sums
    finally:
        sums.seen = None
        for handle in handles:
            handle.remove()
