"""Passes that drop or merge visual tokens: what they share.

A method is a function from what is seen of a medium and a count to a choice (`compress.tokens.choice`); its place, its
default position policy, and what it wants to look at stand beside it in a `Method`. Everything else, guards, quotas for each
picture, compaction, caches and positions, is the runtime's.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal

from pydantic import Field, field_validator

from compress.budget import Budget, Rounding
from compress.passes.base import Change, Evidence, Pass, Stage
from compress.smaller import Smaller
from compress.tokens.choice import Kept
from compress.tokens.guards import Reducer, refuse
from compress.tokens.positions import Policy
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


class WithdrawTokens(Change):
    """Every visual token is gone from a layer on."""

    kind: ClassVar[str] = "withdraw-tokens"
    runs: ClassVar[bool] = True
    layer: int
    policy: Policy = "preserve"
    simulated: bool = False

    def carry_out(self, smaller: Smaller) -> None:
        smaller.add_reducer(Reducer(None, Budget(), self.layer, self.policy, (), self.simulated))


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


class Withdraw(Pass):
    """VTW (arXiv 2405.05803): all visual tokens leave the decoder at a layer.

    Without a `layer`, the first from `first` on whose withdrawal changes the answer's distribution by at most `eta` nats: evidence
    `withdrawal_kl`, one number for each layer.
    """

    title: ClassVar[str] = "withdraw"
    stage: ClassVar[Stage] = "tokens"
    layer: int | None = None
    eta: float = 0.003
    first: int = 1
    positions: Policy = "preserve"
    simulated: bool = False

    def asks(self) -> tuple[str, ...]:
        return () if self.layer is not None else ("withdrawal_kl",)

    def plan(self, subject: Subject, evidence: Evidence) -> Sequence[Change]:
        layer = self.layer if self.layer is not None else self._quiet(subject, evidence)
        if layer == subject.n_layers:
            return []
        if not 1 <= layer < subject.n_layers:
            raise PassError(f"visual tokens can leave at layers 1 to {subject.n_layers - 1}, not at {layer}")
        refuse(subject, [Reducer(None, Budget(), layer, self.positions)])
        return [WithdrawTokens(layer=layer, policy=self.positions, simulated=self.simulated)]

    def _quiet(self, subject: Subject, evidence: Evidence) -> int:
        values = list(self.found(evidence, "withdrawal_kl"))
        return next((i for i in range(max(1, self.first), subject.n_layers) if values[i] <= self.eta), subject.n_layers)


class Pyramid(Pass):
    """The same method at several layers, each keeping its share of all tokens that there were at first.

    Defaults are PyramidDrop's (arXiv 2410.17247): after each quarter of the depth half of what was left, chosen by the attention of the last
    prompt token in the layer about to run. SparseVLM's and AIM's schedules are `at` and `keep` of their own.
    """

    title: ClassVar[str] = "pyramid"
    stage: ClassVar[Stage] = "tokens"
    method: str = "pdrop"
    at: tuple[float, ...] = (0.25, 0.5, 0.75)
    keep: tuple[float, ...] = (0.5, 0.25, 0.125)
    rounding: Rounding = "floor"
    positions: Policy | Literal["default"] = "default"
    settings: Mapping[str, Setting] = Field(default_factory=dict)
    simulated: bool = False
    seed: int = 0

    @field_validator("keep")
    @classmethod
    def _shares(cls, keep: tuple[float, ...]) -> tuple[float, ...]:
        for share in keep:
            if not 0 <= share <= 1:
                raise ValueError(f"a pyramid keeps shares from 0 to 1 of all tokens, not {share:g}")
        return keep

    def plan(self, subject: Subject, evidence: Evidence) -> Sequence[Change]:
        if len(self.at) != len(self.keep):
            raise PassError(f"a pyramid names as many shares as places, not {len(self.keep)} for {len(self.at)}")
        changes: list[Change] = []
        for at, keep in zip(self.at, self.keep, strict=True):
            layer = place(at, subject.n_layers)
            if keep == 0:
                changes.append(WithdrawTokens(layer=layer, simulated=self.simulated))
                break
            one = Tokens(
                method=self.method, budget=Budget(keep=keep, rounding=self.rounding), layer=layer, positions=self.positions,
                settings=self.settings, simulated=self.simulated, seed=self.seed,
            )  # fmt: skip
            changes += one.plan(subject, evidence)
        layers = [change.layer for change in changes if isinstance(change, ReduceTokens | WithdrawTokens)]
        if layers != sorted(set(layers)):
            raise PassError(f"a pyramid's places fall on layers {layers} of this model: name places further apart")
        return changes


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
