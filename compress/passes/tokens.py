"""Passes that drop or merge visual tokens: what they share, and the baselines that every one of them is held against.

A method is a function from what is seen of a medium and a count to a choice (`compress.tokens.choice`); its place, its
default position policy, and what it wants to look at stand beside it in a `Method`. Everything else, guards, quotas for each
picture, compaction, caches and positions, is the runtime's.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field

from compress.budget import Budget
from compress.passes.base import Change, Evidence, Pass, Stage
from compress.smaller import Smaller
from compress.tokens.choice import Kept, Seen, best
from compress.tokens.positions import Policy
from compress.tokens.runtime import Reducer, refuse
from probe.errors import PassError, did_you_mean
from probe.subject import Subject

Setting = int | float | str | bool | None


@dataclass(frozen=True)
class Method:
    """One way to choose: the function, where it stands, which position policy is its own, and what it looks at.

    `layer` is the default place: 0 before the decoder, a share in (0, 1) of the depth, or a layer. `source` is the paper.
    """

    choose: Callable[..., Kept]
    layer: float = 0
    policy: Literal["preserve", "reindex", "family"] = (
        "family"  # family: reindex, but preserve where positions have several axes
    )
    needs: tuple[str, ...] = ()
    text_conditioned: bool = False
    source: str = ""
    macs: Callable[[int, int, int], float] | None = None  # multiply-adds of choosing (tokens, kept, width); None: not counted


class ReduceTokens(Change):
    """A reducer at its place, as a ledger has it."""

    kind: ClassVar[str] = "reduce-tokens"
    runs: ClassVar[bool] = True
    method: str
    layer: int
    budget: Budget
    policy: Policy
    settings: Mapping[str, Setting] = Field(default_factory=dict)
    simulated: bool = False
    seed: int = 0

    def carry_out(self, smaller: Smaller) -> None:
        method = find_method(self.method)
        choose = partial(method.choose, **self.settings)
        smaller.add_reducer(
            Reducer(choose, self.budget, self.layer, self.policy, method.needs, self.simulated, self.seed)
        )  # fmt: skip


class Tokens(Pass):
    """Drops or merges the tokens of every picture, clip and sound by one method.

    `layer` 0 is before the decoder, l the input of layer l; `positions` the policy that what stays follows (`default`: the
    method's own). `settings` are the method's.
    """

    title: ClassVar[str] = "tokens"
    stage: ClassVar[Stage] = "tokens"
    repeatable: ClassVar[bool] = True
    method: str
    budget: Budget = Budget()
    layer: int | None = None
    positions: Policy | Literal["default"] = "default"
    settings: Mapping[str, Setting] = Field(default_factory=dict)
    simulated: bool = False
    seed: int = 0

    def plan(self, subject: Subject, evidence: Evidence) -> Sequence[Change]:
        method = find_method(self.method)
        layer = place(method.layer, subject.n_layers) if self.layer is None else self.layer
        if method.layer == 0 and layer:
            raise PassError(f"{self.method} chooses before the decoder: its layer is 0, not {layer}")
        if method.layer and not layer:
            raise PassError(f"{self.method} chooses inside the decoder: name a layer from 1 to {subject.n_layers - 1}")
        policy = default_policy(method, subject) if self.positions == "default" else self.positions
        change = ReduceTokens(
            method=self.method, layer=layer, budget=self.budget, policy=policy, settings=self.settings, simulated=self.simulated,
            seed=self.seed,
        )  # fmt: skip
        refuse(subject, [Reducer(method.choose, self.budget, layer, policy, method.needs)])
        if self.budget.keep == 1.0 and not isinstance(self.budget.keep, int) and self.budget.unit != "avg_per_layer":
            return []  # everything stays: nothing is done, bit for bit
        return [change]


def place(layer: float, n_layers: int) -> int:
    """A default place as a layer of this model."""
    return max(1, round(layer * n_layers)) if 0 < layer < 1 else min(int(layer), n_layers - 1)


def default_policy(method: Method, subject: Subject) -> Policy:
    """Before the decoder, models of one position axis count on without gaps (the LLaVA line's convention); else ids are kept."""
    if method.policy != "family":
        return method.policy
    text = subject.config.get_text_config()
    rope = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {}
    return "preserve" if "mrope_section" in rope else "reindex"


def find_method(name: str) -> Method:
    """A method by its name. Raises PassError with the nearest one."""
    from compress.passes import METHODS

    if name not in METHODS:
        raise PassError(f"there is no token reducer {name!r}{did_you_mean(name, METHODS)}")
    return METHODS[name]


# --- baselines -------------------------------------------------------------------------------------------------------


def at_random(seen: Seen, count: int) -> Kept:
    """Any `count` tokens, drawn by the seed of the pass and the number of the medium."""
    generator = torch.Generator().manual_seed(seen.seed)
    return Kept(best(torch.rand(len(seen), generator=generator).to(seen.states.device), count))


def uniform(seen: Seen, count: int) -> Kept:
    """Every n-th token, first and last among them."""
    places = torch.linspace(0, len(seen) - 1, count, device=seen.states.device)
    return Kept(places.round().long().unique()) if count > 1 else Kept(torch.tensor([len(seen) // 2], device=places.device))


def pooled(seen: Seen, count: int) -> Kept:
    """Averages over windows of the grid, as square as the count allows (InfMLLM's pool adapter, training-free).

    Each window stands at its token nearest the middle. Raises PassError where no windows of the grid make the count.
    """
    rows, columns = seen.square
    shape = _windows(rows, columns, count)
    if shape is None:
        fit = sorted({a * b for a in range(1, rows + 1) for b in range(1, columns + 1)})
        near = min(fit, key=lambda n: abs(n - count))
        raise PassError(f"a grid of {rows} x {columns} has no windows that make {count} tokens: keep {near}")
    down = torch.arange(rows, device=seen.states.device) * shape[0] // rows
    across = torch.arange(columns, device=seen.states.device) * shape[1] // columns
    window = (down[:, None] * shape[1] + across[None, :]).flatten()
    total = torch.zeros(count, seen.states.shape[1], device=window.device).index_add_(0, window, seen.states.float())
    size = torch.bincount(window, minlength=count)
    anchor = torch.stack([_middle(torch.nonzero(window == w)[:, 0], columns) for w in range(count)])
    order = anchor.argsort()
    return Kept(anchor[order], (total / size[:, None]).to(seen.states.dtype)[order])


def _windows(rows: int, columns: int, count: int) -> tuple[int, int] | None:
    """Numbers of windows down and across whose product is the count, as near the grid's own shape as can be."""
    pairs = [(a, count // a) for a in range(1, rows + 1) if count % a == 0 and count // a <= columns]
    return min(pairs, key=lambda pair: abs(pair[0] * columns - pair[1] * rows)) if pairs else None


def _middle(members: torch.Tensor, columns: int) -> torch.Tensor:
    """The member nearest the middle of its window; of equal ones the first."""
    at = torch.stack([members // columns, members % columns], 1).float()
    return members[(at - at.mean(0)).square().sum(1).argmin()]


BASELINES: dict[str, Method] = {
    "random": Method(at_random, source="baseline", macs=lambda n, kept, width: 0.0),
    "uniform": Method(uniform, source="baseline", macs=lambda n, kept, width: 0.0),
    "pooling": Method(
        pooled, source="InfMLLM's pool adapter (arXiv 2311.06791), training-free", macs=lambda n, kept, width: float(n * width)
    ),
}


def settings_of(method: Method) -> dict[str, Any]:
    """A method's own settings with their defaults."""
    import inspect

    found = inspect.signature(method.choose).parameters.values()
    return {p.name: p.default for p in found if p.kind is p.KEYWORD_ONLY}
