"""What single steps do to an answer's distribution, each alone: the prices of a plan. Nothing is changed.

All are KL(dense || changed) in nats at the position that predicts the answer's first token, one number for each example.
"""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from compress.layer_scores import divergence, visual_positions
from compress.passes.base import Evidence, Pass
from compress.passes.removal import Hidden, chosen
from compress.recipe import compress
from compress.structure import Kind
from probe.edits import Patch
from probe.errors import ReplayError
from probe.example import Example
from probe.replay import sweep
from probe.sites import watching
from probe.subject import Encoded, Subject
from probe.tracing import last_logits

KINDS = ("remove", "freeze", "ffn")
Damage = Float[np.ndarray, "example layer"]


def layer_damage(
    subject: Subject, examples: Sequence[Example], kinds: Sequence[str] = KINDS, advance: Callable[[int], None] = lambda n: None
) -> dict[str, Damage]:  # fmt: skip
    """Each layer changed alone: `remove` (every token passes it by), `freeze` (visual tokens do, and are still looked at), `ffn` (visual
    tokens pass its feed-forward block by).

    Exact: the states that would enter the next layer are patched in, and what follows is run again. NaN for an example that shows
    nothing, where only visual tokens are concerned.
    """
    rows: dict[str, list[np.ndarray]] = {kind: [] for kind in kinds}
    for example in examples:
        encoded = subject.encode(example)
        found = _one(subject, encoded, kinds)
        for kind in kinds:
            rows[kind].append(found[kind])
        advance(1)
    return {kind: np.stack(values) for kind, values in rows.items()}


def _one(subject: Subject, encoded: Encoded, kinds: Sequence[str]) -> dict[str, np.ndarray]:
    entered: dict[int, Tensor] = {}

    def take(site: str, layer: int, state: Tensor) -> None:
        entered[layer] = state[0].clone()

    with torch.no_grad(), watching(subject, take, ("in",)):
        last_logits(subject, encoded)
    every = encoded.maps[0].positions("real")
    visual = visual_positions(subject, encoded)[0] if set(kinds) - {"remove"} else np.empty(0, np.int64)
    patches: list[Patch] = []
    for kind in kinds:
        at = every if kind == "remove" else visual
        for layer in sorted(entered) if len(at) else ():
            state = entered[layer][torch.from_numpy(at).to(entered[layer].device)]
            patches.append(
                Patch("mlp_out", layer, at.tolist(), torch.zeros_like(state))
                if kind == "ffn"
                else Patch("resid_post", layer, at.tolist(), state)
            )
    try:
        swept = sweep(subject, encoded, patches)
    except ReplayError:
        swept = sweep(subject, encoded, patches, "naive")
    kl = divergence(swept.clean.expand_as(swept.edited[0]), swept.edited[0])
    found = {kind: np.full(subject.n_layers, np.nan) for kind in kinds}
    start = 0
    for kind in kinds:
        if kind == "remove" or len(visual):
            found[kind][sorted(entered)] = kl[start : start + len(entered)]
            start += len(entered)
    return found


def hidden_damage(
    subject: Subject, kind: Kind, units: Mapping[int, Sequence[int]], batches: Sequence[Encoded], clean: Sequence[Tensor]
) -> Float[np.ndarray, " example"]:  # fmt: skip
    """Heads or neurons of some layers silenced while encoded examples are read, which is what removing them does; `clean` as in `step_damage`."""
    hidden = Hidden(chosen(subject, kind, units).values())
    try:
        return np.concatenate([divergence(was, last_logits(subject, one)) for was, one in zip(clean, batches, strict=True)])
    finally:
        hidden.detach()


def step_damage(
    subject: Subject, steps: Sequence[Pass], batches: Sequence[Encoded], clean: Sequence[Tensor] | None = None, in_place: bool = False,
    evidence: Evidence | None = None,
) -> Float[np.ndarray, " example"]:  # fmt: skip
    """Several steps applied together to a copy, measured on encoded examples; `clean` are the dense model's last logits of each batch,
    `evidence` what the steps ask for.

    `in_place` spares the copy, for steps that only hang on the model while it runs: it is as it was afterwards.
    """
    before = [last_logits(subject, one) for one in batches] if clean is None else clean
    smaller = compress(subject, list(steps), evidence, in_place=in_place)
    try:
        each = [divergence(was, last_logits(smaller, one)) for was, one in zip(before, batches, strict=True)]
        return np.concatenate(each)
    finally:
        smaller.detach()
