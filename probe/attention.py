"""The one attention function: the model's own kernel, and beside it only the rows that somebody asked for.

The function is registered with transformers once for each kernel (`sightline_sdpa`, `sightline_flash_attention_2`, ...)
with that kernel's own mask, so that the model's output comes from the kernel it would use anyway, bit for bit. What a
trace or a replay wants is found through a context variable: other threads and other models see the plain kernel.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from probe.errors import EditError
from probe.subject import Subject

PREFIX = "sightline_"
Kernel = Callable[..., tuple[Tensor, Tensor | None]]


@dataclass
class Call:
    """One attention call: post-RoPE q (batch head query dim), un-repeated k and v (batch kv_head key dim), and the rest."""

    module: nn.Module
    query: Tensor
    key: Tensor
    value: Tensor
    mask: Any
    options: dict[str, Any]
    kernel: Kernel = field(repr=False)

    def run(self) -> tuple[Tensor, Tensor | None]:
        """The model's own kernel."""
        return self.kernel(self.module, self.query, self.key, self.value, self.mask, **self.options)

    @property
    def scaling(self) -> float:
        given = self.options.get("scaling")
        return float(given) if given is not None else self.query.shape[-1] ** -0.5

    def check(self) -> None:
        """Raises EditError for kinds of attention whose rows would come out wrong."""
        for option in ("s_aux", "position_bias"):
            if self.options.get(option) is not None:
                raise EditError(
                    f"{type(self.module).__name__} attends with {option}, which rows and knock-outs do not reproduce yet: "
                    f"record the residual stream instead"
                )

    def visible(self, rows: Tensor) -> tuple[Tensor, Tensor | None]:
        """What each row may look at: (batch, 1, row, key) booleans, and an additive bias where the mask is one.

        `rows` are query indices (batch row).
        """
        length, keys = self.query.shape[2], self.key.shape[2]
        batch = torch.arange(rows.shape[0], device=rows.device)[:, None]
        if isinstance(self.mask, Tensor) and self.mask.dim() == 4:
            picked = self.mask.expand(rows.shape[0], -1, -1, -1)[..., :keys][batch, :, rows].transpose(1, 2)
            if picked.dtype == torch.bool:
                return picked, None
            return picked > torch.finfo(picked.dtype).min / 2, picked
        if self.mask is not None and not isinstance(self.mask, Tensor):
            raise EditError(
                f"attention rows cannot be read through a {type(self.mask).__name__}: load the model with "
                f'attn_implementation="sdpa"'
            )
        place = torch.arange(keys, device=rows.device)
        seen = torch.ones(rows.shape[0], 1, rows.shape[1], keys, dtype=torch.bool, device=rows.device)
        causal = self.options.get("is_causal")
        if (causal if causal is not None else getattr(self.module, "is_causal", True)) and length > 1:
            at = rows[:, None, :, None] + keys - length
            seen = place <= at
            if window := self.options.get("sliding_window"):
                seen = seen & (place > at - window)
        if self.mask is not None:  # flash attention's padding mask (batch key)
            seen = seen & self.mask[:, None, None, :keys].bool()
        return seen, None


@dataclass
class RowAttention:
    """Attention of chosen rows, not yet normalised: `weight / total` are the probabilities (batch head row key)."""

    rows: Int[Tensor, "batch row"]
    score: Float[Tensor, "batch head row key"]  # minus the row's maximum; the dtype's minimum where hidden
    weight: Float[Tensor, "batch head row key"]  # exp(score), 0 where hidden
    total: Float[Tensor, "batch head row 1"]

    @classmethod
    def picked(
        cls,
        pattern: Float[Tensor, "batch head query key"],
        rows: Int[Tensor, "batch row"],
        real: Bool[Tensor, "batch key"],
    ) -> "RowAttention":
        """Rows of a pattern that somebody else has computed: its probabilities are the weights, and the total is one.

        `real` is False where a key is padding. A query that may look nowhere is spread by eager attention over all keys,
        padding too, which no other query sees: such a row has weight 0 everywhere, as from `attend_rows`.
        """
        heads, keys = pattern.shape[1], pattern.shape[3]
        weight = pattern.gather(2, rows[:, None, :, None].expand(-1, heads, -1, keys)).float()
        lost = (weight * ~real[:, None, None, :]).sum(-1, keepdim=True) > 0
        weight = weight.masked_fill(lost, 0.0)
        score = weight.clamp(min=torch.finfo(weight.dtype).tiny).log()
        return cls(rows, score, weight, torch.ones_like(weight[..., :1]))

    def after(self, forgotten: int) -> "RowAttention":
        """The same rows among more keys: the first ones, which the rows did not see, have weight 0."""
        pad = torch.nn.functional.pad
        low = torch.finfo(self.score.dtype).min
        return RowAttention(self.rows, pad(self.score, (forgotten, 0), value=low), pad(self.weight, (forgotten, 0)), self.total)

    @property
    def probability(self) -> Tensor:
        return self.weight / self.total

    @property
    def entropy(self) -> Tensor:
        """Natural-log entropy of each row (batch head row)."""
        return (self.total.log() - (self.weight * self.score).sum(-1, keepdim=True) / self.total)[..., 0]


def score_rows(
    call: Call,
    rows: Int[Tensor, "batch row"],
    visible: Bool[Tensor, "batch heads_or_1 row key"],
    bias: Float[Tensor, "batch heads_or_1 row key"] | None = None,
) -> Float[Tensor, "batch head row key"]:
    """What chosen query rows say of every key before the softmax, in float32; the dtype's minimum where it is hidden."""
    heads, groups, dim = call.query.shape[1], call.key.shape[1], call.query.shape[-1]
    picked = call.query.gather(2, rows[:, None, :, None].expand(-1, heads, -1, dim))
    batch, count = rows.shape
    folded = picked.float().reshape(batch, groups, (heads // groups) * count, dim)
    score = (folded @ call.key.float().transpose(2, 3)).mul_(call.scaling).view(batch, heads, count, call.key.shape[2])
    if cap := call.options.get("softcap"):
        score = cap * torch.tanh(score / cap)
    if bias is not None:
        score = score + bias.float()
    return score.masked_fill_(~visible, torch.finfo(score.dtype).min)


def attend_rows(
    call: Call,
    rows: Int[Tensor, "batch row"],
    visible: Bool[Tensor, "batch heads_or_1 row key"],
    bias: Float[Tensor, "batch heads_or_1 row key"] | None = None,
) -> RowAttention:
    """Softmax attention of chosen query rows, in float32: scaling, soft cap, mask and grouped heads as the model has them.

    `rows` (batch row), `visible` (batch 1|head row key). A row that may look nowhere has weight 0 everywhere.
    """
    score = score_rows(call, rows, visible, bias)
    low = torch.finfo(score.dtype).min
    score = (score - score.amax(-1, keepdim=True)).clamp_(min=low)
    # A row that sees nothing has the same score everywhere: the mask takes it to zero weight, and the total to one.
    weight = score.exp().masked_fill_(~visible, 0.0)
    total = weight.sum(-1, keepdim=True)
    return RowAttention(rows, score, weight, torch.where(total > 0, total, 1.0))


def mix_values(call: Call, attention: RowAttention) -> Float[Tensor, "batch head row dim"]:
    """What the rows read: (batch head row dim), in the value's dtype."""
    heads, groups = call.query.shape[1], call.value.shape[1]
    batch, _, count, keys = attention.weight.shape
    folded = attention.probability.to(call.value.dtype).view(batch, groups, (heads // groups) * count, keys)
    return (folded @ call.value).view(batch, heads, count, call.value.shape[-1])


@runtime_checkable
class Listener(Protocol):
    """Somebody who wants to stand in the attention of some layers."""

    def attend(self, layer: int, call: Call) -> tuple[Tensor, Tensor | None]: ...


@dataclass(frozen=True)
class _Session:
    layer_of: dict[int, int]  # id of the attention module -> layer
    listener: Listener


_SESSION: ContextVar[_Session | None] = ContextVar("sightline_session", default=None)


def _make(kernel_name: str) -> Kernel:
    def attention(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **options: Any
    ) -> tuple[Tensor, Tensor | None]:
        call = Call(module, query, key, value, attention_mask, options, _kernel(kernel_name, module))
        session = _SESSION.get()
        layer = None if session is None else session.layer_of.get(id(module))
        if session is None or layer is None:
            return call.run()
        call.check()
        return session.listener.attend(layer, call)

    return attention


def _kernel(name: str, module: nn.Module) -> Kernel:
    if name == "eager":
        return sys.modules[type(module).__module__].eager_attention_forward  # type: ignore[no-any-return]
    return ALL_ATTENTION_FUNCTIONS[name]  # type: ignore[no-any-return]


def _register(kernel_name: str) -> str:
    name = PREFIX + kernel_name
    if name not in ALL_ATTENTION_FUNCTIONS.valid_keys():
        AttentionInterface.register(name, _make(kernel_name))
        AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[kernel_name])
    return name


@contextmanager
def listening(subject: Subject, listener: Listener) -> Iterator[None]:
    """While this is open, `listener` stands in every decoder attention of the subject; afterwards nothing has changed.

    Raises EditError when the model's attention does not go through transformers' attention interface.
    """
    layer_of: dict[int, int] = {}
    for index, (layer, name) in enumerate(zip(subject.layers, subject.anatomy.attention, strict=True)):
        if name is not None:
            layer_of[id(getattr(layer, name))] = index
            layer_of |= {id(inner): index for inner in getattr(layer, name).modules() if inner is not getattr(layer, name)}
    with subject.lock:
        configs = {
            id(m.config): m.config
            for i, m in enumerate(subject.decoder.modules())
            if id(m) in layer_of and hasattr(m, "config")
        }
        configs[id(subject.decoder.config)] = subject.decoder.config
        before = [(config, config._attn_implementation) for config in configs.values()]
        token = _SESSION.set(_Session(layer_of, listener))
        try:
            for config, kernel in before:
                if kernel is None or kernel.startswith(PREFIX):
                    raise EditError(
                        f'the model\'s attention implementation is {kernel!r}: load it with attn_implementation="sdpa"'
                    )
                config._attn_implementation_internal = _register(kernel)
            yield
        finally:
            _SESSION.reset(token)
            for config, kernel in before:
                config._attn_implementation_internal = kernel
