"""Peak memory of a call, and of its phases: CUDA's own count, or on a CPU the bytes of tensors alive at once."""

import gc
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function

from probe.subject import Encoded, Subject

_MARK = "sightline: "


def peak_memory(call: Callable[[], Any], device: torch.device) -> int:
    """Bytes above the resting level at the worst moment of a call, its result held."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        held = call()
        peak = torch.cuda.max_memory_allocated(device) - before
        del held
        return int(peak)
    return max(_levels(call)[0].values())


def peaks_by_phase(subject: Subject, encoded: Encoded, tokens: int) -> dict[str, int]:
    """Bytes above the resting level in each phase of an answer of `tokens` tokens: `vision`, `prefill` (which it is part of), `decode`."""
    from compress.latency import generate_exactly

    gc.collect()
    call = lambda: generate_exactly(subject, encoded, tokens)  # noqa: E731
    if subject.device.type == "cuda":
        return _on_cuda(subject, call)
    with ExitStack() as stack:
        for module, phase in _phases(subject):
            stack.enter_context(_marked(module, phase))
        peaks, decode = _levels(call)
    return {**{phase: peaks[phase] for phase in ("vision", "prefill") if phase in peaks}, "decode": decode}


def _phases(subject: Subject) -> list[tuple[nn.Module, str]]:
    anatomy = subject.anatomy
    vision = [(subject.model.get_submodule(anatomy.vision), "vision")] if anatomy.vision else []
    return [*vision, (subject.model, "prefill")]


@contextmanager
def _marked(module: nn.Module, phase: str) -> Iterator[None]:
    """Names the first call of a module in the profile."""
    marks: list[Any] = []

    def enter(*_: Any) -> None:
        if not marks:
            marks.append(record_function(_MARK + phase))
            marks[0].__enter__()

    def leave(*_: Any) -> None:
        if len(marks) == 1:
            marks[0].__exit__(None, None, None)
            marks.append(None)

    handles = [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _levels(call: Callable[[], Any]) -> tuple[dict[str, int], int]:
    """The highest level in the whole call (`all`) and in each named span, and the highest after the last span."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        held = call()
    del held
    events = list(record.profiler.kineto_results.events())
    spans = {e.name().removeprefix(_MARK): (e.start_ns(), e.end_ns()) for e in events if e.name().startswith(_MARK)}
    last = max((end for _, end in spans.values()), default=0)
    peaks, after, level = dict.fromkeys([*spans, "all"], 0), 0, 0
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        level += event.nbytes()
        peaks["all"] = max(peaks["all"], level)
        for name, (start, end) in spans.items():
            if start <= event.start_ns() <= end:
                peaks[name] = max(peaks[name], level)
        if event.start_ns() > last:
            after = max(after, level)
    return peaks, after


def _on_cuda(subject: Subject, call: Callable[[], Any]) -> dict[str, int]:
    device = subject.device
    torch.cuda.synchronize(device)
    resting = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    peaks: dict[str, int] = {}

    def note(phase: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            if phase in peaks:
                return
            torch.cuda.synchronize(device)
            peaks[phase] = torch.cuda.max_memory_allocated(device) - resting
            if phase == "prefill":  # what comes after is decoding; the tower's peak is part of the prefill's
                torch.cuda.reset_peak_memory_stats(device)

        return hook

    handles = [module.register_forward_hook(note(phase)) for module, phase in _phases(subject)]
    try:
        call()
        torch.cuda.synchronize(device)
    finally:
        for handle in handles:
            handle.remove()
    return {**peaks, "decode": torch.cuda.max_memory_allocated(device) - resting}
