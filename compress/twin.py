"""A compressed model with all its positions: what it leaves out is hidden by masks, so that it can be looked into like the dense one.

Hiding equals leaving out (`simulated` equals physical), and every position keeps its place in the token map.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

from compress.passes.base import Change
from compress.saving import changes_of
from compress.smaller import Smaller
from compress.tokens.choice import Kept, Seen, Selector
from compress.tokens.guards import Reducer
from probe.errors import PassError
from probe.subject import Encoded
from probe.tracing import last_logits

Choices = dict[tuple[int, int, int], Kept]  # (number of the reducer, layer, what the words of the prompt draw)


@contextmanager
def simulated(smaller: Smaller, prompts: Sequence[Encoded]) -> Iterator[Smaller]:
    """The same model, in place, with masks instead of removed positions, for these prompts; as it was afterwards.

    What is kept of each picture is chosen once, by the model as it is: an edit that is made while looking changes what the kept
    tokens say, not which they are. Raises PassError for a prompt that is none of these, or for tokens merged inside the decoder.
    """
    hanging = [change for change in changes_of(smaller.ledger) if change.runs]
    choices = _choices(smaller, prompts)
    try:
        _hang(smaller, [change.masked() for change in hanging])
        smaller.reducers = [_remembering(one, i, choices) for i, one in enumerate(smaller.reducers)]
        smaller.rewire()
        yield smaller
    finally:
        _hang(smaller, hanging)


def _hang(smaller: Smaller, changes: Sequence[Change]) -> None:
    """Takes off what hangs on the model, and hangs these on it."""
    smaller.detach()
    smaller.reducers.clear()
    for change in changes:
        change.carry_out(smaller)


def _choices(smaller: Smaller, prompts: Sequence[Encoded]) -> Choices:
    """What every reducer keeps of every medium of the prompts: one pass over each."""
    if not any(one.select for one in smaller.reducers):
        return {}
    found: Choices = {}
    plain = smaller.reducers
    smaller.reducers = [
        replace(one, select=_noting(one.select, i, found)) if one.select else one for i, one in enumerate(plain)
    ]
    try:
        smaller.rewire()
        for encoded in prompts:
            last_logits(smaller, encoded)
    finally:
        smaller.reducers = plain
        smaller.rewire()
    return found


def _noting(select: Selector, number: int, found: Choices) -> Selector:
    def choose(seen: Seen, count: int) -> Kept:
        kept = select(seen, count)
        if kept.states is not None and seen.layer:
            raise PassError(
                "tokens that are merged inside the decoder cannot be looked at as if they were there: their states depend on one another"
            )
        found[number, seen.layer, seen.seed] = kept
        return kept

    return choose


def _remembering(one: Reducer, number: int, choices: Choices) -> Reducer:
    def choose(seen: Seen, count: int) -> Kept:
        try:
            return choices[number, seen.layer, seen.seed]
        except KeyError:
            raise PassError("a prompt came that no choice was noted for: name every prompt when the twin is made") from None

    return one if one.select is None else replace(one, select=choose, needs=())
