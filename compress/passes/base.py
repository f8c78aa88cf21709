"""What a pass is: a small configuration, a pure plan, and changes that carry it out.

A pass is written in a recipe by its title. `plan` looks at the subject and at evidence and changes nothing, so that a study can
score a plan without applying it; the changes that it gives are data, so that a saved model can be made again from its ledger.
"""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any, ClassVar, Literal, Protocol, runtime_checkable

from pydantic import BaseModel, ConfigDict

from compress.ledger import Step
from compress.smaller import Smaller
from probe.errors import PassError, did_you_mean
from probe.subject import Subject

# In this order: what changes shapes comes before what names layers, and what rounds numbers comes last.
STAGES = ("distil", "layers", "weights", "skips", "masks", "tokens", "quantise")
Stage = Literal["distil", "layers", "weights", "skips", "masks", "tokens", "quantise"]
Evidence = Mapping[str, Any]


@runtime_checkable
class Tells(Protocol):
    """A piece of evidence that says itself what a ledger keeps of it."""

    def told(self) -> dict[str, Any]: ...


class Change(BaseModel):
    """One thing that a plan does to a model, as data. `kind` names it in a ledger.

    `shapes` says whether weights have another shape afterwards, `in_config` whether the configuration says so too (transformers then builds that shape
    by itself), `runs` whether something hangs on the model while it runs. A change with none of these is in the weights.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    kind: ClassVar[str]
    shapes: ClassVar[bool] = False
    in_config: ClassVar[bool] = False
    runs: ClassVar[bool] = False

    @abstractmethod
    def carry_out(self, smaller: Smaller) -> None:
        """Does it. Raises PassError where it does not fit the model."""

    def masked(self) -> "Change":
        """The same done by masks, where there is such a way: every position stays where it is."""
        return self.model_copy(update={"simulated": True}) if "simulated" in type(self).model_fields else self

    def described(self) -> dict[str, Any]:
        """As a ledger has it."""
        return {"kind": self.kind, **self.model_dump(mode="json")}


class Pass(BaseModel):
    """One compression method with its settings.

    `simulated` runs the same decision with masks alone: it saves nothing, and shows that removing is exact.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    title: ClassVar[str]
    stage: ClassVar[Stage]
    needs: ClassVar[tuple[str, ...]] = ()  # names of evidence without which there is no plan, however it is set
    repeatable: ClassVar[bool] = False  # may stand in a recipe twice

    @abstractmethod
    def plan(self, subject: Subject, evidence: Evidence) -> Sequence[Change]:
        """What would be done. Changes nothing. Raises PassError for what the model lacks."""

    def asks(self) -> tuple[str, ...]:
        """The evidence that this pass, as it is set, cannot plan without."""
        return self.needs

    def found(self, evidence: Evidence, name: str) -> Any:
        """A piece of evidence. Raises PassError naming where it comes from."""
        if name not in evidence:
            raise PassError(
                f"the pass {self.title} needs evidence {name!r}: gather it with compress.evidence, or pass it to apply"
            )
        return evidence[name]


def apply(smaller: Smaller, one: Pass, evidence: Evidence | None = None, seed: int = 0) -> Smaller:
    """Plans a pass, carries it out in place, and notes it in the ledger.

    `seed` is that of a pass which draws and is set no seed of its own. Raises PassError for a pass that may not follow those that the ledger has.
    """
    one = seeded(one, seed)
    refuse_order([step.title for step in smaller.ledger], one)
    changes = list(one.plan(smaller, evidence or {}))
    if not changes:
        return smaller
    for change in changes:
        change.carry_out(smaller)
    note = {name: brief(evidence[name]) for name in one.asks() if evidence and name in evidence}
    versions = {name: version(name) for name in ("sightline", "torch", "transformers")}
    step = Step(one.title, one.model_dump(mode="json"), tuple(change.described() for change in changes), note, seed, versions)
    smaller.ledger = (*smaller.ledger, step)
    return smaller


def seeded(one: Pass, seed: int) -> Pass:
    """A pass that draws, with this seed unless it was given its own."""
    drawing = "seed" in type(one).model_fields and "seed" not in one.model_fields_set
    return one.model_copy(update={"seed": seed}) if drawing else one


def brief(value: Any) -> Any:
    """A piece of evidence as a ledger keeps it: numbers and short lists as they are, the rest by what it is."""
    if isinstance(value, int | float | str | bool | type(None)):
        return value
    if isinstance(value, Tells):
        return value.told()
    if isinstance(value, list | tuple) and len(value) <= 256 and all(isinstance(v, int | float | str) for v in value):
        return list(value)
    if isinstance(value, Mapping):
        return {str(key): brief(item) for key, item in value.items()} if len(value) <= 64 else f"{len(value)} entries"
    return type(value).__name__


def refuse_order(before: Sequence[str], one: Pass) -> None:
    """Raises PassError where a pass comes twice, or after one of a later stage."""
    known = titles()
    if one.title in before and not one.repeatable:
        raise PassError(f"the pass {one.title} was applied already: it may stand in a recipe once")
    for title in before:
        other = known.get(title)
        if other is not None and STAGES.index(other.stage) > STAGES.index(one.stage):
            raise PassError(
                f"the pass {one.title} ({one.stage}) cannot follow {title} ({other.stage}): put it before, since stages come in the order "
                f"{', '.join(STAGES)}"
            )


def titles() -> dict[str, type[Pass]]:
    """Every pass by its title."""
    from compress.passes import PASSES

    return {one.title: one for one in PASSES}


def find_pass(title: str) -> type[Pass]:
    """A pass by its title. Raises PassError with the nearest one."""
    known = titles()
    if title not in known:
        raise PassError(f"there is no pass {title!r}{did_you_mean(title, known)}")
    return known[title]


def find_change(kind: str) -> type[Change]:
    """A change by its kind. Raises PassError for one that this version does not know."""
    from compress.passes import CHANGES

    known = {one.kind: one for one in CHANGES}
    if kind not in known:
        raise PassError(f"there is no change {kind!r}{did_you_mean(kind, known)}")
    return known[kind]
