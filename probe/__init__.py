"""One model seen from inside: load it, trace it, edit it, replay sweeps of edits exactly."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from probe.anatomy import Anatomy, Row
    from probe.edits import Ablate, Erase, Knockout, Patch, window
    from probe.example import Example, Region
    from probe.generation import Generation, trace_generation
    from probe.recorders import Confidence, Lens, Mass, Patterns, Residual, Rows
    from probe.replay import Sweep, sweep
    from probe.subject import Encoded, Subject, load
    from probe.tokens import Grid, TokenMap
    from probe.tracing import Trace, trace

_HOMES = {
    "Anatomy": "probe.anatomy", "Row": "probe.anatomy",
    "Ablate": "probe.edits", "Erase": "probe.edits", "Knockout": "probe.edits", "Patch": "probe.edits", "window": "probe.edits",
    "Example": "probe.example", "Region": "probe.example",
    "Generation": "probe.generation", "trace_generation": "probe.generation",
    "Confidence": "probe.recorders", "Lens": "probe.recorders", "Mass": "probe.recorders", "Patterns": "probe.recorders", "Residual": "probe.recorders",
    "Rows": "probe.recorders",
    "Sweep": "probe.replay", "sweep": "probe.replay",
    "Encoded": "probe.subject", "Subject": "probe.subject", "load": "probe.subject",
    "Grid": "probe.tokens", "TokenMap": "probe.tokens",
    "Trace": "probe.tracing", "trace": "probe.tracing",
}  # fmt: skip
__all__ = [
    "Ablate",
    "Anatomy",
    "Confidence",
    "Encoded",
    "Erase",
    "Example",
    "Generation",
    "Grid",
    "Knockout",
    "Lens",
    "Mass",
    "Patch",
    "Patterns",
    "Region",
    "Residual",
    "Row",
    "Rows",
    "Subject",
    "Sweep",
    "TokenMap",
    "Trace",
    "load",
    "sweep",
    "trace",
    "trace_generation",
    "window",
]


def __getattr__(name: str) -> Any:
    """Names are imported when first used: `import probe` alone does not import torch."""
    if name not in _HOMES:
        raise AttributeError(f"module 'probe' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)
