"""The one clean pass of a sweep: what every layer was called with, saw and gave; refused where a replay would not be exact."""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from probe.attention import Call, listening
from probe.errors import ReplayError
from probe.replay.plan import Plan
from probe.subject import Encoded, Subject
from probe.tracing import last_logits, read_out


@dataclass
class CleanLayer:
    """What one layer saw and was called with in the clean pass."""

    call: Call | None = None
    entering: Tensor | None = None  # batch row width, from the first row that any entry needs
    leaving: Tensor | None = None
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)


@dataclass
class Clean:
    logits: Tensor
    first_row: int
    length: int
    layers: list[CleanLayer]


class _Recorder:
    def __init__(self, clean: list[CleanLayer]) -> None:
        self.clean = clean

    def attend(self, layer: int, call: Call) -> tuple[Tensor, Tensor | None]:
        if self.clean[layer].call is not None:
            raise ReplayError(f"layer {layer} attends twice in one pass: this architecture cannot be replayed")
        self.clean[layer].call = call
        return call.run()


def record(subject: Subject, encoded: Encoded, plans: list[Plan]) -> Clean:
    first_row = min([plan.first_row for plan in plans] + [token_map.last for token_map in encoded.maps])
    layers = [CleanLayer() for _ in range(subject.n_layers)]
    with ExitStack() as stack:
        stack.enter_context(listening(subject, _Recorder(layers)))
        for index, block in enumerate(subject.layers):
            stack.callback(block.register_forward_pre_hook(_keep_input(layers[index], first_row), with_kwargs=True).remove)
            stack.callback(block.register_forward_hook(_keep_output(layers[index], first_row)).remove)
        logits = last_logits(subject, encoded)
    clean = Clean(logits, first_row, len(encoded.maps[0]), layers)
    _refuse_what_is_not_exact(subject, encoded, clean, {(plan.example, plan.first_row) for plan in plans})
    return clean


def _keep_input(clean: CleanLayer, first_row: int) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        state = args[0] if args else kwargs["hidden_states"]
        clean.entering = state[:, first_row:]
        clean.args, clean.kwargs = args[1:], {k: v for k, v in kwargs.items() if k != "hidden_states"}

    return hook


def _keep_output(clean: CleanLayer, first_row: int) -> Callable[..., None]:
    def hook(module: nn.Module, args: Any, output: Any) -> None:
        clean.leaving = (output[0] if isinstance(output, tuple) else output)[:, first_row:]

    return hook


def _refuse_what_is_not_exact(subject: Subject, encoded: Encoded, clean: Clean, starts: set[tuple[int, int]]) -> None:
    family = subject.anatomy.family
    if getattr(subject.config.get_text_config(), "num_kv_shared_layers", 0):
        raise ReplayError(
            f'layers of this {family} model share keys and values with other layers: run the sweep with method="naive"'
        )
    for index, layer in enumerate(clean.layers):
        if subject.anatomy.cross[index]:
            if layer.call is None:
                raise ReplayError(
                    f"the cross-attention layers of this {family} model are passed over where an example has no picture: run the "
                    f'sweep with method="naive"'
                )
            continue  # its keys are the picture's: no edit of the decoder changes them
        if layer.call is None:
            kind = type(subject.layers[index]).__name__
            raise ReplayError(
                f"layer {index} of this {family} model ({kind}) mixes positions without softmax attention, so that a clean "
                f'prefix cannot be reused: run the sweep with method="naive"'
            )
        if layer.call.key.shape[2] != clean.length:
            raise ReplayError(
                f"layer {index} of this {family} model attends to {layer.call.key.shape[2]} keys in a prompt of {clean.length} "
                f'positions (cross-attention or a rolling cache): run the sweep with method="naive"'
            )
        for example, first_row in sorted(starts):
            _refuse_lookahead(index, layer.call, example, first_row, family)
    state = torch.stack([clean.layers[-1].leaving[i, m.last - clean.first_row] for i, m in enumerate(encoded.maps)])  # type: ignore[index]
    gap = (read_out(subject, state).float().to(clean.logits.device) - clean.logits).abs().max().item()
    scale = 1e-4 if subject.dtype == torch.float32 else 5e-2
    if gap > scale * max(1.0, clean.logits.abs().max().item()):
        raise ReplayError(
            f"the logits of this {family} model are not its final norm and unembedding of the last layer (difference {gap:.1e}): "
            f'run the sweep with method="naive"'
        )


def _refuse_lookahead(index: int, call: Call, example: int, first_row: int, family: str) -> None:
    """No position before the first row may look at it or beyond, or the clean prefix would not be clean."""
    mask = call.mask
    if isinstance(mask, Tensor) and mask.dim() == 4:
        ahead = mask[example if len(mask) > 1 else 0, :, :first_row, first_row:]
        open_ahead = ahead.any() if ahead.dtype == torch.bool else (ahead > torch.finfo(ahead.dtype).min / 2).any()
        if bool(open_ahead):
            raise ReplayError(
                f"layer {index} of this {family} model lets positions look ahead (a bidirectional prefix), so that rows before "
                f'an edit change too: run the sweep with method="naive"'
            )
    elif not call.options.get("is_causal", getattr(call.module, "is_causal", True)):
        raise ReplayError(f'layer {index} of this {family} model is not causal: run the sweep with method="naive"')
