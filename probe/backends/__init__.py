"""The same named points read through other libraries, which are imported when they are asked for and not before.

A backend is a function `attach(subject, wanted)` that returns something to call in the model's place. While that runs,
`wanted.visit` is given each state and `wanted.weigh` each layer's attention weights as they come by, so that no more than
one layer's are held; what is made of them is the business of probe.tracing, the same for every backend. All work on a `twin`
of the model: the libraries change what they wrap, and the model itself stays as it was.
"""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from torch import Tensor

from probe.errors import BackendError, did_you_mean
from probe.subject import Subject

# name of the library: module that reads through it
BACKENDS = {"nnsight": "probe.backends.nnsight", "transformer_lens": "probe.backends.transformer_lens"}


@dataclass(frozen=True)
class Wanted:
    """What a pass is asked for: states at (point, layer) places, attention weights of layers, and who takes them.

    `visit(point, layer, state)` returns what shall take the state's place, or None; `weigh(layer, pattern)` is given the
    weights (batch head query key).
    """

    places: frozenset[tuple[str, int]]
    patterns: frozenset[int]
    visit: Callable[[str, int, Tensor], Tensor | None]
    weigh: Callable[[int, Tensor], None]


Attach = Callable[[Subject, Wanted], Callable[..., Any]]


def find_backend(name: str) -> Attach:
    """The `attach` of a backend. Raises BackendError for one that does not exist or is not installed."""
    if name not in BACKENDS:
        raise BackendError(f"there is no backend {name!r}{did_you_mean(name, ('hooks', *BACKENDS))}")
    if find_spec(name) is None:
        raise BackendError(f'the backend {name!r} is not installed: pip install "sightline[backends]"')
    found: Attach = import_module(BACKENDS[name]).attach
    return found
