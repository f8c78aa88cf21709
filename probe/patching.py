"""Activations for patching: captured once from the clean run, and their first-order effect on the corrupt one.

`capture` is one clean pass, `patches` makes edits of it that `sweep` replays on the corrupt run, and `attribute` estimates
all of them at once from one pass forward and back.
"""

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from probe.analysis.patching import attribution
from probe.attention import Call, listening
from probe.edits import Patch
from probe.points import hook
from probe.recorders import Residual
from probe.subject import Encoded, Subject
from probe.tracing import run_to_last, trace

STREAM = ("resid_pre", "attn_out", "mlp_out")  # what enters a layer, and what its two blocks add
SITES = (*STREAM, "z")
Place = tuple[str, int]  # point, layer


@dataclass(frozen=True)
class Activations:
    """What a batch's run computed: for each point (layer batch position width), or (layer batch position head dim) at z."""

    states: dict[str, Tensor]
    logits: Float[Tensor, "batch vocabulary"]


def capture(subject: Subject, encoded: Encoded, points: Sequence[str] = SITES) -> Activations:
    """Activations of every layer and position (padding too, so that positions are indices) in one pass."""
    everywhere = range(len(encoded.maps[0]))
    made = trace(subject, encoded, [Residual(point, positions=everywhere) for point in points])
    names = ["states" if i == 0 else f"states.{i}" for i in range(len(points))]
    return Activations({point: made[name].tensor for point, name in zip(points, names, strict=True)}, made.logits)


def patches(
    clean: Activations, row: int, point: str, layers: Iterable[int], positions: Iterable[int], heads: Sequence[int] | None = None
) -> tuple[Patch, ...]:  # fmt: skip
    """Edits that put the clean activations of one example into another run of the same length, layer by layer."""
    at = sorted(set(positions))
    made = []
    for layer in layers:
        value = clean.states[point][layer, row, at]
        made.append(Patch(point, layer, at, value if heads is None else value[:, sorted(heads)], heads))
    return tuple(made)


def nudges(
    clean: Activations, corrupt: Activations, row: int, point: str, layers: Iterable[int], positions: Iterable[int], seed: Sequence[int]
) -> tuple[Patch, ...]:  # fmt: skip
    """Edits that change another run's states at these positions by as much as `patches` would, each in a random direction.

    corrupt + |clean - corrupt| u with u a unit vector drawn for each layer and position from `seed`: what a change of that size does
    whatever it says.
    """
    at = sorted(set(positions))
    made = []
    for layer in layers:
        before = corrupt.states[point][layer, row, at]
        size = (clean.states[point][layer, row, at].to(before) - before).float().norm(dim=-1, keepdim=True)
        drawn = torch.from_numpy(np.random.default_rng([*seed, layer]).standard_normal(tuple(before.shape)))
        unit = torch.nn.functional.normalize(drawn, dim=-1).to(before.device, torch.float32)
        made.append(Patch(point, layer, at, (before.float() + size * unit).to(before.dtype)))
    return tuple(made)


@dataclass(frozen=True)
class Attribution:
    """First-order effects in logits: for each point (layer batch position), or (layer batch position head) at z.

    `integrated` has the mean gradient along the path between the runs in place of the corrupt run's own; empty unless asked for.
    """

    plain: dict[str, Tensor]
    integrated: dict[str, Tensor]
    difference: Float[Tensor, " batch"]  # logit difference of the corrupt run


def attribute(
    subject: Subject,
    encoded: Encoded,
    clean: Activations,
    tokens: Sequence[tuple[int, int]],
    points: Sequence[str] = SITES,
    steps: int = 0,
) -> Attribution:
    """What patching every site of the corrupt run `encoded` would do to the logit difference, to first order.

    `tokens` are the clean and the corrupt answer's token of each example. One pass forward and back for all sites; `steps`
    more for the integrated variant (EAP-IG, arXiv 2403.17806), whose gradients are taken at the middle of each step on the
    straight line between what enters layer 0 in the two runs, where the published code takes the end of each step.
    """
    states, gradients, difference = _gradients(subject, encoded, tokens, points)
    plain = _scores(clean, states, gradients, points)
    if not steps:
        return Attribution(plain, {}, difference)
    total: dict[Place, Tensor] = {}
    for step in range(steps):
        _, found, _ = _gradients(subject, encoded, tokens, points, clean.states["resid_pre"][0], (step + 0.5) / steps)
        total = {place: total[place] + gradient if total else gradient for place, gradient in found.items()}
    mean = {place: gradient / steps for place, gradient in total.items()}
    return Attribution(plain, _scores(clean, states, mean, points), difference)


def _scores(
    clean: Activations, states: dict[Place, Tensor], gradients: dict[Place, Tensor], points: Sequence[str]
) -> dict[str, Tensor]:
    def one(point: str, layer: int) -> Tensor:
        state, gradient = states[point, layer], gradients[point, layer]
        return attribution(clean.states[point][layer].to(state).float(), state.float(), gradient.float()).cpu()

    return {point: torch.stack([one(point, layer) for layer in range(len(clean.states[point]))]) for point in points}


class _Graph:
    """Keeps the activations of one pass that gradients flow through. The stream that enters layer 0 is where they begin."""

    def __init__(self, towards: Tensor | None, share: float) -> None:
        self.towards, self.share = towards, share
        self.kept: dict[Place, Tensor] = {}

    def begin(self, state: Tensor) -> Tensor:
        start = state.detach()
        if self.towards is not None:
            start = start + self.share * (self.towards.to(start) - start)
        return start.clone().requires_grad_(True)

    def keep(self, point: str, layer: int, state: Tensor) -> Tensor:
        self.kept[point, layer] = state
        return state

    def attend(self, layer: int, call: Call) -> tuple[Tensor, Tensor | None]:
        output, weights = call.run()
        return self.keep("z", layer, output), weights


def _gradients(
    subject: Subject,
    encoded: Encoded,
    tokens: Sequence[tuple[int, int]],
    points: Sequence[str],
    towards: Tensor | None = None,
    share: float = 0.0,
) -> tuple[dict[Place, Tensor], dict[Place, Tensor], Tensor]:
    """Activations, the gradient of the logit difference at each, and the logit difference. Parameters gather no gradients."""
    graph = _Graph(towards, share)
    with ExitStack() as stack:
        stack.enter_context(subject.lock)
        stack.enter_context(torch.enable_grad())
        if "z" in points:
            stack.enter_context(listening(subject, graph))
        changes: list[tuple[str, int, Callable[[Tensor], Tensor]]] = [("resid_pre", 0, graph.begin)]
        changes += [(p, layer, partial(graph.keep, p, layer)) for p in points if p != "z" for layer in range(subject.n_layers)]
        for point, layer, change in changes:
            stack.callback(hook(subject, point, layer, change).remove)
        logits = run_to_last(subject, encoded)
        wanted = torch.tensor(tokens, device=logits.device)
        both = logits.gather(1, wanted)
        difference = both[:, 0] - both[:, 1]
        places = list(graph.kept)
        found = torch.autograd.grad(difference.sum(), [graph.kept[place] for place in places])
    states = {place: state.detach() for place, state in graph.kept.items()}
    return states, dict(zip(places, found, strict=True)), difference.detach()
