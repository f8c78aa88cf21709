"""Which positions an answer depends on: attention, rollout, gradient-weighted attention, gradients, integrated gradients."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from probe.analysis.relevance import FUSIONS, gradient_step, rollout_step
from probe.attention import Call, attend_rows
from probe.errors import EditError, did_you_mean
from probe.layerwise import Chain, capture
from probe.subject import Encoded, Subject

ATTENTIVE = ("attention", "rollout", "gradient-attention")
METHODS = (*ATTENTIVE, "gradient-input", "integrated-gradients")
SHOWN = ("image", "video", "audio")  # segments of positions that show something


@dataclass(frozen=True)
class Relevance:
    """Scores of every position (batch position) by method, float32 on the CPU; 0 in padding.

    `attention`: weights of the last position, heads and layers averaged. `rollout` and `gradient-attention`: the row of the last position,
    which begins with 1 at itself. `gradient-input` and `integrated-gradients` carry signs; the latter is 0 outside what is shown.
    `targets` are the tokens (batch) whose `logits` (batch) are explained. `gap` (batch) is how far integrated gradients miss
    `rise` (batch), the logit above that of the baseline, which they should sum to.
    """

    scores: dict[str, Float[Tensor, "batch position"]]
    targets: Int[Tensor, " batch"]
    logits: Float[Tensor, " batch"]
    gap: Float[Tensor, " batch"] | None = None
    rise: Float[Tensor, " batch"] | None = None


def relevance(
    subject: Subject,
    encoded: Encoded,
    methods: Sequence[str] = METHODS,
    targets: Int[Tensor, " batch"] | None = None,
    steps: int = 50,
    baseline: str | Float[Tensor, " width"] = "mean",
    fusion: str = "mean",
) -> Relevance:
    """The relevance of every position for the logit of a token at each example's last position (by default the likeliest one).

    One pass, and one backward pass in which one layer at a time is run again; `steps` more of both for integrated gradients.
    No matrix of all positions by all positions is held, of relevance or of attention.

    - `rollout`: Abnar and Zuidema (arXiv 2005.00928), heads fused by `fusion`.
    - `gradient-attention`: Chefer, Gur and Wolf (arXiv 2103.15679), self-attention rule, as one row from the top.
    - `gradient-input`: the state that enters the first layer times its gradient.
    - `integrated-gradients`: what is shown moves from a baseline to its states in `steps` steps (midpoints; arXiv 1703.01365, equation
      3). The baseline is the example's own mean state over these positions, zero, or a given one (the mean over a data set, as in arXiv
      2410.07149). Around a zero state a norm's gradient is steep, and few steps miss much: read `gap`. What DeepStack adds above the
      first layer stays as it is.

    Raises EditError for an unknown method, and for layers that relevance cannot be followed through.
    """
    _check(subject, methods, steps, fusion)
    chain = capture(subject, encoded)
    chosen = (chain.logits.argmax(-1) if targets is None else targets).to(chain.leaving.device)
    found = _Followed(chain, methods, fusion)
    slope = None
    if {*ATTENTIVE, "gradient-input"} & set(methods):
        wanted = bool({"gradient-attention", "gradient-input"} & set(methods))
        visit = found.visit if set(ATTENTIVE) & set(methods) else None
        slope = chain.backward(chain.entering, chain.leaving, chosen, visit, gradient=wanted)
    if slope is not None and "gradient-input" in methods:
        found.rows["gradient-input"] = (slope.float() * chain.entering[0].float()).sum(-1)
    gap = rise = None
    if "integrated-gradients" in methods:
        found.rows["integrated-gradients"], rise = _integrated(chain, chosen, steps, baseline)
        gap = (found.rows["integrated-gradients"].sum(1) - rise.to(chain.entering[0].device)).abs().cpu()
    real = _mask(encoded, ("real",))
    scores = {name: found.rows[name].cpu() * real for name in methods}
    logits = chain.score(chain.leaving, chosen).detach().cpu()
    return Relevance(scores, chosen.cpu(), logits, gap, None if rise is None else rise.cpu())


def _check(subject: Subject, methods: Sequence[str], steps: int, fusion: str) -> None:
    for name in methods:
        if name not in METHODS:
            raise EditError(f"there is no method {name!r}{did_you_mean(name, METHODS)}")
    if not methods:
        raise EditError(f"relevance needs at least one method of {', '.join(METHODS)}")
    if steps < 1:
        raise EditError(f"integrated gradients take at least one step, not {steps}")
    if fusion not in FUSIONS:
        raise EditError(f"there is no fusion {fusion!r}{did_you_mean(fusion, FUSIONS)}")
    missing = [layer for layer, name in enumerate(subject.anatomy.attention) if name is None]
    if missing and set(ATTENTIVE) & set(methods):
        kind = type(subject.layers[missing[0]]).__name__
        raise EditError(
            f"layer {missing[0]} of this {subject.anatomy.family} model ({kind}) mixes positions without softmax attention: ask for "
            f"gradient-input or integrated-gradients"
        )


class _Followed:
    """Rows of relevance (batch position), taken down through the layers."""

    def __init__(self, chain: Chain, methods: Sequence[str], fusion: str) -> None:
        self.layers, self.fusion, self.last = len(chain.calls), fusion, chain.encoded.last
        start = torch.zeros(chain.leaving.shape[:2], device=chain.leaving.device)
        self.rows = {name: start.clone() for name in methods}
        start[torch.arange(len(start)), self.last] = 1.0
        self.rows |= {name: start.clone() for name in ("rollout", "gradient-attention") if name in methods}

    @torch.no_grad()
    def visit(self, layer: int, call: Call, slope: Tensor | None) -> None:
        device = call.query.device
        if call.key.shape[2] != call.query.shape[2]:
            raise EditError(
                f"layer {layer} attends to {call.key.shape[2]} keys from {call.query.shape[2]} positions: not its own"
            )
        rows = {name: row.to(device) for name, row in self.rows.items()}
        if "attention" in rows:
            last = self.last.to(device)[:, None]
            rows["attention"] += attend_rows(call, last, *call.visible(last)).probability.mean(1)[:, 0] / self.layers
        if "rollout" in rows:
            rows["rollout"] = rollout_step(rows["rollout"], call, self.fusion)
        if "gradient-attention" in rows and slope is not None:
            rows["gradient-attention"] = gradient_step(rows["gradient-attention"], call, slope)
        self.rows = rows


def _integrated(
    chain: Chain, targets: Tensor, steps: int, baseline: str | Tensor
) -> tuple[Float[Tensor, "batch position"], Float[Tensor, " batch"]]:
    """Attributions of what is shown, and the logit's rise above that of the baseline."""
    full = chain.entering[0]
    shown = _mask(chain.encoded, SHOWN).to(full.device)
    start = torch.where(shown[..., None], _baseline(full, shown, baseline), full)
    path, total = full.float() - start.float(), torch.zeros_like(full, dtype=torch.float32)
    for step in range(steps):
        state = (start.float() + (step + 0.5) / steps * path).to(full.dtype)
        slope = chain.backward(*chain.forward(state), targets)
        assert slope is not None
        total += slope.float()
    with torch.no_grad():
        rise = chain.score(chain.leaving, targets) - chain.score(chain.forward(start)[1], targets)
    return (path * total / steps).sum(-1), rise


def _baseline(full: Tensor, shown: Bool[Tensor, "batch position"], baseline: str | Tensor) -> Tensor:
    if isinstance(baseline, Tensor):
        if baseline.shape != full.shape[-1:]:
            raise EditError(f"a baseline has the shape {tuple(full.shape[-1:])}, not {tuple(baseline.shape)}")
        return baseline.to(full).expand_as(full)
    if baseline == "zero":
        return torch.zeros_like(full)
    if baseline != "mean":
        raise EditError(f"there is no baseline {baseline!r}{did_you_mean(baseline, ('mean', 'zero'))}")
    count = shown.sum(1).clamp(min=1)[:, None, None]
    return ((full.float() * shown[..., None]).sum(1, keepdim=True) / count).to(full).expand_as(full)


def _mask(encoded: Encoded, groups: Sequence[str]) -> Bool[Tensor, "batch position"]:
    made = torch.zeros(len(encoded), len(encoded.maps[0]), dtype=torch.bool)
    for i, token_map in enumerate(encoded.maps):
        for group in groups:
            made[i, torch.from_numpy(token_map.positions(group))] = True
    return made
