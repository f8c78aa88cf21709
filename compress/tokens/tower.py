"""What a reducer wants to know of the vision or audio tower: states and attention of the layer that the connector reads."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import Tensor, nn

from compress.tokens.media import Medium
from probe.errors import PassError
from probe.subject import Subject

RECORDS = ("tower_states", "tower_keys", "class_attention", "tower_attention")


class Tower:
    """Records of a pass through the vision tower, at the layer whose output the connector reads.

    `tower_states` (token width) before the connector; `tower_keys` (token dim) of its attention, heads averaged, not turned;
    `class_attention` (head token) of the class token; `tower_attention` (head token token) between patches, class token cut out.
    Raises PassError for a tower that has no such layer, class token, or separate query and key maps.
    """

    def __init__(self, subject: Subject, names: Iterable[str]) -> None:
        self.subject, self.names = subject, frozenset(names)
        if unknown := self.names - set(RECORDS):
            raise PassError(f"there is no record {sorted(unknown)[0]!r} of the tower: there are {', '.join(RECORDS)}")
        self.layer, self.attention = _read_layer(subject)
        self.taken: dict[str, Tensor] = {}
        self.has_class = _has_class(subject)
        if "class_attention" in self.names and not self.has_class:
            raise PassError(
                f"the vision tower of this {subject.anatomy.family} model has no class token: use a reducer that does not ask for one"
            )
        self.handles = [self.layer.register_forward_hook(self._keep("states"))]
        for part in ("q_proj", "k_proj") if self.names - {"tower_states"} else ():
            self.handles.append(getattr(self.attention, part).register_forward_hook(self._keep(part)))

    def forget(self) -> None:
        """What was recorded belongs to one prompt."""
        self.taken.clear()

    def _keep(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            self.taken[name] = (output[0] if isinstance(output, tuple) else output).detach()

        return hook

    def of(self, medium: Medium, number: int, media: Sequence[Sequence[Medium]]) -> dict[str, Tensor]:
        """The records of one medium, the `number`-th of the batch.

        Raises PassError where the tower's patches are not the medium's positions (merged, tiled or resampled ones).
        """
        if "states" not in self.taken:
            raise PassError(
                "the vision tower did not run for this prompt, and a reducer wants to look into it: pass the pictures"
            )
        states = self.taken["states"]
        skip = int(self.has_class)
        total = sum(len(row) for row in media)
        if states.dim() != 3 or len(states) != total or states.shape[1] - skip != len(medium):
            raise PassError(
                f"the tower of this {self.subject.anatomy.family} model makes {tuple(states.shape)} patches for {total} media and "
                f"{len(medium)} positions of this one: a reducer that looks into the tower needs one patch for each position"
            )
        found = {"tower_states": states[number, skip:]}
        if self.names - {"tower_states"}:
            heads = self.attention.num_heads
            q, k = (self.taken[part][number].unflatten(-1, (heads, -1)).transpose(0, 1) for part in ("q_proj", "k_proj"))
            found["tower_keys"] = k[:, skip:].mean(0)
            weight = (q.float() @ k.float().transpose(1, 2) * q.shape[-1] ** -0.5).softmax(-1)
            found["tower_attention"] = weight[:, skip:, skip:]
            if self.has_class:
                found["class_attention"] = weight[:, 0, 1:]
        return found


def _has_class(subject: Subject) -> bool:
    tower = subject.model.get_submodule(subject.anatomy.vision or "")
    return any(name.split(".")[-1] in ("class_embedding", "cls_token") for name, _ in tower.named_parameters())


def _read_layer(subject: Subject) -> tuple[nn.Module, Any]:
    """The tower's layer whose output the connector reads, and its attention."""
    family = subject.anatomy.family
    if subject.anatomy.vision is None:
        raise PassError(f"this {family} model has no vision tower for a reducer to look into")
    tower = subject.model.get_submodule(subject.anatomy.vision)
    layers = getattr(getattr(tower, "encoder", None), "layers", None)
    if not isinstance(layers, nn.ModuleList):
        raise PassError(f"the layers of the tower of this {family} model are not known to reducers that look into it")
    feature = getattr(subject.config, "vision_feature_layer", -1)
    index = feature[-1] if isinstance(feature, list | tuple) else feature
    layer = layers[index if index < 0 else index - 1]
    attention = getattr(layer, "self_attn", None)
    if not all(hasattr(attention, part) for part in ("q_proj", "k_proj", "num_heads")):
        raise PassError(f"the attention of the tower of this {family} model has no query and key maps of its own to read")
    return layer, attention
