"""What some rows of a layer do without: their query, their feed-forward block, their keys and values."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from probe.errors import PassError
from probe.subject import Subject

Who = Literal["perceptual", "text", "all"]
When = Literal["prompt", "answer", "both"]


@dataclass(frozen=True)
class Rule:
    """What the rows of one layer do.

    `query` says whether they attend, `ffn` whether they go through the feed-forward block, `kv` whether others may look at them. With
    `updated` their keys and values are those of what the feed-forward block has made of them. `parallel` lets the feed-forward block read what
    the attention reads. `compat` is the published code where it differs: see `Skip`. A `simulated` rule computes everything and takes
    it out again.
    """

    rows: Who = "perceptual"
    when: When = "both"
    query: bool = True
    ffn: bool = True
    kv: bool = True
    updated: bool = False
    parallel: bool = False
    compat: bool = False
    simulated: bool = False


def refuse(subject: Subject, rule: Rule, layers: Sequence[int]) -> None:
    """Raises PassError where these layers of this model cannot be skipped so."""
    family = subject.anatomy.family
    if rule.rows != "all" and not subject.marks and not any(subject.anatomy.cross):
        raise PassError(f"this {family} model is shown nothing but text: there are no visual tokens that could pass a layer by")
    if rule.rows != "all":
        _refuse_apart(subject, rule, layers)
    for layer in layers:
        if not 0 <= layer < subject.n_layers:
            raise PassError(f"layer {layer} does not exist: the model has layers 0 to {subject.n_layers - 1}")
        if subject.anatomy.cross[layer] and rule.rows == "all":
            raise PassError(
                f"layer {layer} of this {family} reads the picture by cross-attention: only its other layers can be skipped"
            )
        if subject.anatomy.attention[layer] is None:
            raise PassError(
                f"layer {layer} of this {family} mixes positions without attention: its state runs through every token, so that none can pass it by"
            )
        if subject.anatomy.mlp[layer] is None:
            raise PassError(f"layer {layer} of this {family} has no feed-forward block of its own that could be passed by")
        attention = subject.layers[layer].get_submodule(subject.anatomy.attention[layer] or "")
        if not rule.query and not hasattr(attention, "q_proj"):
            raise PassError(
                f"layer {layer} of this {family} makes queries, keys and values in one map: no row can be spared its query alone"
            )
    if getattr(subject.config.get_text_config(), "num_kv_shared_layers", 0):
        raise PassError(f"layers of this {family} share keys and values with others: no row can pass one of them by")


def _refuse_apart(subject: Subject, rule: Rule, layers: Sequence[int]) -> None:
    family = subject.anatomy.family
    if any(subject.anatomy.cross):
        raise PassError(
            f'the pictures of {family} are not in the sequence: there are no visual rows to skip in it, only all rows (rows: "all")'
        )
    if subject.anatomy.row.places == "unmarked":
        raise PassError(f"{family} puts its pictures before the prompt without placeholders: their rows cannot be told")
    if rule.when == "answer":
        raise PassError(
            'an answer has no perceptual rows: skip them in the prompt (when: "prompt" or "both"), or skip all rows'
        )
    if not rule.kv and rule.query:
        raise PassError("rows that attend need keys of their own: keys and values can be left out with the query only")
    told = [layer for layer in layers if layer in length_layers(subject)]
    if not rule.kv and told:
        raise PassError(
            f"transformers reads the length of its cache from layer {told[0]}, which must keep the keys of every token: leave it out"
        )


def length_layers(subject: Subject) -> frozenset[int]:
    """The layers that tell transformers how long a cache is: the first of each kind of attention."""
    types = getattr(subject.config.get_text_config(), "layer_types", None) or ["full_attention"] * subject.n_layers
    return frozenset(types.index(kind) for kind in set(types[: subject.n_layers]))
