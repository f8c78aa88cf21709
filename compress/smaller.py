"""Smaller: a Subject that passes have been applied to, with the ledger of what they did."""

import copy
from dataclasses import dataclass, field
from typing import Any

from compress.ledger import Step
from compress.tokens.guards import Reducer
from compress.tokens.runtime import TokenRuntime
from probe.anatomy import resolve
from probe.errors import PassError
from probe.subject import Subject


@dataclass(eq=False)
class Smaller(Subject):
    """A Subject with a ledger. What passes change while it runs hangs on it, and comes off with `detach`."""

    ledger: tuple[Step, ...] = ()
    parents: tuple[str, ...] = ()  # what it was made from
    reducers: list[Reducer] = field(default_factory=list)
    runtime: TokenRuntime | None = field(default=None, repr=False)
    attached: list[Any] = field(default_factory=list, repr=False)  # whatever else has a `detach`

    @classmethod
    def of(cls, subject: Subject, in_place: bool = False) -> "Smaller":
        """A subject that passes may change: a copy of its model, or the model itself.

        Raises PassError for one that is compressed already and is to be copied: what hangs on a model cannot be copied with it.
        """
        if isinstance(subject, Smaller):
            if in_place:
                return subject
            raise PassError(
                "a compressed model is compressed further in place (in_place=True), or saved and loaded again first"
            )
        model = subject.model if in_place else copy.deepcopy(subject.model)
        return cls(model, subject.processor, subject.anatomy, subject.name, subject.checks, parents=(subject.name,))

    def add_reducer(self, reducer: Reducer) -> None:
        """One more place where tokens are dropped. Raises PassError where this model cannot."""
        self.reducers.append(reducer)
        try:
            self.rewire()
        except Exception:
            self.reducers.pop()
            self.rewire()
            raise

    def rewire(self) -> None:
        """The reducers attached anew, after layers or reducers have changed."""
        if self.runtime is not None:
            self.runtime.detach()
            self.runtime = None
        if self.reducers:
            self.runtime = TokenRuntime(self, self.reducers)

    def reshaped(self) -> None:
        """Finds the parts again after layers, heads or experts have gone."""
        self.anatomy = resolve(self.model, self.anatomy.row)
        self.__dict__.pop("n_heads", None)
        self.rewire()

    def detach(self) -> None:
        """Takes off everything that hangs on the model while it runs; weights and shapes stay as passes left them."""
        if self.runtime is not None:
            self.runtime.detach()
            self.runtime = None
        for one in self.attached:
            one.detach()
        self.attached.clear()
