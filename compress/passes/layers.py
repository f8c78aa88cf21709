"""Whole decoder layers removed: caches renumbered, the configuration told, so that plain transformers loads the result."""

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

from torch import nn

from compress.passes.base import Change, Evidence, Pass, Stage
from compress.smaller import Smaller
from probe.errors import PassError
from probe.subject import Subject


class DropLayers(Change):
    """Decoder layers, by number, that are gone."""

    kind: ClassVar[str] = "drop-layers"
    shapes: ClassVar[bool] = True
    in_config: ClassVar[bool] = True
    layers: tuple[int, ...]

    def carry_out(self, smaller: Smaller) -> None:
        kept = [i for i in range(smaller.n_layers) if i not in self.layers]
        refuse_layers(smaller, self.layers)
        decoder, blocks = smaller.decoder, smaller.layers
        name = smaller.anatomy.layers.rsplit(".", 1)[-1]
        setattr(decoder, name, nn.ModuleList([blocks[i] for i in kept]))
        for number, block in enumerate(getattr(decoder, name)):
            for module in block.modules():
                if isinstance(getattr(module, "layer_idx", None), int):
                    module.layer_idx = number
        _tell(smaller.config.get_text_config(), kept)
        if decoder.config is not smaller.config.get_text_config():
            _tell(decoder.config, kept)
        smaller.reshaped()


def _tell(config: Any, kept: Sequence[int]) -> None:
    """The configuration of what is left: how many layers, and of which type each."""
    if config.num_hidden_layers == len(kept):
        return
    types = getattr(config, "layer_types", None)
    config.num_hidden_layers = len(kept)
    if types is not None and len(types) > len(kept):
        config.layer_types = [types[i] for i in kept]


def refuse_layers(subject: Subject, layers: Sequence[int]) -> None:
    """Raises PassError for layers that the model does not have or cannot do without."""
    outside = [layer for layer in layers if not 0 <= layer < subject.n_layers]
    if outside:
        raise PassError(f"layer {outside[0]} does not exist: the model has layers 0 to {subject.n_layers - 1}")
    if len(set(layers)) >= subject.n_layers:
        raise PassError("a model needs at least one layer: remove fewer")
    vision = getattr(subject.config, "vision_config", None)
    planes = len(getattr(vision, "deepstack_visual_indexes", None) or ())
    if any(layer < planes for layer in layers):
        raise PassError(
            f"{subject.anatomy.family} adds visual features after each of its first {planes} layers: they cannot be removed"
        )
    if any(subject.anatomy.cross):
        raise PassError(
            f"{subject.anatomy.family} tells its cross-attention layers by number: its layers cannot be removed and renumbered"
        )
    if getattr(subject.config.get_text_config(), "num_kv_shared_layers", 0):
        raise PassError(f"layers of this {subject.anatomy.family} share keys and values: they cannot be removed one by one")


class RemoveLayers(Pass):
    """Removes decoder layers: those named, or the `count` that a score ranks lowest.

    Scores come as evidence `layer_scores`: one list for each name, one number for each layer, low where a layer does little
    (`compress.evidence`): `block_influence` (ShortGPT, arXiv 2403.03853: 1 - cosine of what enters and leaves, over all tokens),
    `block_influence_visual`, `block_influence_text`, or `contribution` (ShortV, arXiv 2504.00502). `angular` (arXiv 2403.17887)
    ranks blocks of `count` consecutive layers by the angle of the last token across them: it has one list for each count (by its decimal
    name), one number for each first layer.
    """

    title: ClassVar[str] = "remove-layers"
    stage: ClassVar[Stage] = "layers"
    layers: tuple[int, ...] | None = None
    count: int | None = None
    score: Literal[
        "block_influence", "block_influence_visual", "block_influence_text", "contribution", "angular"
    ] = "block_influence"  # fmt: skip

    def asks(self) -> tuple[str, ...]:
        return () if self.layers is not None else ("layer_scores",)

    def plan(self, subject: Subject, evidence: Evidence) -> Sequence[Change]:
        if (self.layers is None) == (self.count is None):
            raise PassError("remove-layers takes either layers or a count")
        chosen = self.layers if self.layers is not None else self._ranked(subject, evidence)
        if not chosen:
            return []
        refuse_layers(subject, chosen)
        return [DropLayers(layers=tuple(sorted(set(chosen))))]

    def _ranked(self, subject: Subject, evidence: Evidence) -> tuple[int, ...]:
        assert self.count is not None
        if not 0 <= self.count < subject.n_layers:
            raise PassError(f"{self.count} of {subject.n_layers} layers cannot be removed: 0 to {subject.n_layers - 1} can")
        if self.count == 0:
            return ()
        scores = self.found(evidence, "layer_scores")
        if self.score not in scores:
            raise PassError(f"the evidence has no layer scores {self.score!r}: it has {', '.join(scores)}")
        if self.score == "angular":
            values = list(scores["angular"][str(self.count)])
            start = min(range(subject.n_layers - self.count + 1), key=lambda i: (values[i], i))
            return tuple(range(start, start + self.count))
        values = list(scores[self.score])
        return tuple(sorted(range(len(values)), key=lambda i: (values[i], i))[: self.count])
