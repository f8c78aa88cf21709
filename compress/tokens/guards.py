"""Where tokens are dropped, and what stands in the way of dropping them there."""

from collections.abc import Sequence
from dataclasses import dataclass

from compress.budget import Budget
from compress.layer_cost import layer_sizes
from compress.tokens.choice import Selector
from compress.tokens.positions import Policy
from probe.errors import PassError
from probe.subject import Subject


@dataclass(frozen=True)
class Reducer:
    """A selector at its place: `layer` 0 is before the decoder; `layer` l at the input of layer l.

    `needs` names what the selector looks at: `before` (attention of the layer before), `here` (attention that this layer would
    compute), or names of `compress.tokens.tower.RECORDS`. A `simulated` reducer computes everything and hides what is dropped.
    """

    select: Selector | None  # None drops everything
    budget: Budget
    layer: int = 0
    policy: Policy = "preserve"
    needs: tuple[str, ...] = ()
    simulated: bool = False
    seed: int = 0


def refuse(subject: Subject, reducers: Sequence[Reducer]) -> None:
    """Raises PassError where tokens cannot be dropped from this model, or not at these places."""
    family = subject.anatomy.family
    if not subject.marks and not any(subject.anatomy.cross):
        raise PassError(f"this {family} model is shown nothing but text: there are no visual tokens to drop")
    vision = getattr(subject.config, "vision_config", None)
    planes = len(getattr(vision, "deepstack_visual_indexes", None) or ())
    for reducer in reducers:
        if not 0 <= reducer.layer < subject.n_layers:
            raise PassError(
                f"tokens cannot be dropped at layer {reducer.layer}: the model has layers 0 to {subject.n_layers - 1}"
            )
        if reducer.layer == 0 and {"before", "here"} & set(reducer.needs):
            raise PassError("this reducer reads attention, which is not there before the decoder: drop at layer 1 or later")
        if 0 < reducer.layer < planes:
            raise PassError(
                f"{family} still adds visual features after layer {planes - 1}: drop at layer {planes} or later, or at 0"
            )
    looking = [reducer.layer for reducer in reducers if {"before", "here"} & set(reducer.needs)]
    if crowded := [layer for layer in looking if sum(reducer.layer == layer for reducer in reducers) > 1]:
        raise PassError(
            f"two reducers stand at layer {crowded[0]}, and one of them reads attention there: give each a layer of its own"
        )
    if any(subject.anatomy.cross):
        raise PassError(f"the pictures of {family} are not in the sequence: there are no visual tokens to drop from it")
    if subject.anatomy.row.places == "unmarked":
        raise PassError(f"{family} puts its pictures before the prompt without placeholders: their tokens cannot be told")
    if any(name is None for name in subject.anatomy.attention):
        raise PassError(
            f"{family} has layers that mix positions without attention: their state runs through every token, so that none can be dropped "
            f"in passing"
        )
    if getattr(subject.config.get_text_config(), "num_kv_shared_layers", 0):
        raise PassError(f"layers of this {family} share keys and values with others: tokens cannot be dropped in between")


def refuse_windows(subject: Subject, length: int) -> None:
    """A window counts positions while the prompt is read and what is left of them afterwards: they must not differ."""
    config = subject.config.get_text_config()
    window = getattr(config, "sliding_window", None)
    slides = "sliding_attention" in (getattr(config, "layer_types", None) or ["sliding_attention"])
    if window and slides and getattr(config, "use_sliding_window", True) and length >= window:
        raise PassError(
            f"layers of this {subject.anatomy.family} see {window} positions back, and the prompt has {length}: tokens are dropped from "
            f"prompts that such a window holds whole"
        )


def tokens_kept(subject: Subject, reducer: Reducer, n: int) -> int:
    """Tokens that a reducer leaves of a medium of n. Raises PassError for a budget that cannot be met."""
    cost = per_token(subject) if reducer.budget.unit == "flops_ratio" else (1.0, 0.0)
    return reducer.budget.count(n, reducer.layer, subject.n_layers, cost)


def per_token(subject: Subject) -> tuple[float, float]:
    """Multiply-adds of one token in a decoder layer, on the mean of all: alone, and for each token that it attends to."""
    sizes = layer_sizes(subject)
    alone = sum(size.asking + size.keeping + size.ffn for size in sizes)
    return alone / len(sizes), sum(size.mixing for size in sizes) / len(sizes)
