"""What a vision tower and its connector cost for given inputs, as closed forms of their weights and of the patches."""

from collections.abc import Mapping
from math import prod
from typing import Any

from torch import Tensor, nn

from compress.layer_cost import linear_maps
from probe.subject import Subject

_ATTENTIONS = ("self_attn", "attn", "attention")
# Layouts of pictures whose towers are plain vision transformers behind one connector of linear maps on their patches.
_PLAIN = ("plain", "anyres", "ragged", "merged", "thumbnail_last", "named_tiles", "pooled")


def tower_macs(subject: Subject, inputs: Mapping[str, Any]) -> tuple[float | None, float | None, str]:
    """Multiply-adds of the tower and of the connector for all pictures and clips of a batch, and what is not counted.

    Patches, linear maps and attention of plain vision transformers (class token, tiles, merged patches, windows); None where a tower or a
    connector has parts of another kind, with their name. (0, 0, "") where nothing is shown.
    """
    anatomy = subject.anatomy
    if any(inputs.get(name) is not None for name in ("input_features", "input_audio_embeds")):
        return None, None, f"the audio tower of {anatomy.family}"
    shown = [name for name in ("pixel_values", "pixel_values_videos", "pixel_values_images") if inputs.get(name) is not None]
    if not shown:
        return 0.0, 0.0, ""
    if anatomy.vision is None:
        return None, None, f"how {anatomy.family} sees"
    tower = subject.model.get_submodule(anatomy.vision)
    layers, patch = _layers(tower), _patch(tower)
    if layers is None or patch is None or anatomy.row.geometry not in _PLAIN or _has_more(subject, tower, layers, patch):
        return None, None, f"the vision tower of {anatomy.family}"
    spans = [span for name in shown for span in _spans(subject, tower, name, inputs, patch)]
    extra = extra_tokens(tower)
    rows = sum(span + extra for span in spans)
    seen = float(sum(spans) * patch.weight.numel() if isinstance(patch, nn.Conv2d | nn.Conv3d) else 0)
    if isinstance(patch, nn.Linear):
        seen = float(sum(spans) * patch.weight.numel())
    for number, layer in enumerate(layers):
        seen += rows * sum(linear_maps(layer).values())
        squares = sum((size + extra) ** 2 for size in _attended(subject, tower, number, spans, inputs))
        seen += 2.0 * squares * _head_width(layer)
    filmed = "pixel_values_videos" in shown and inputs.get("video_grid_thw") is None  # families pool their frames differently
    connector = None if filmed else _connector(subject, layers, sum(spans), rows)
    return seen, connector, "" if connector is not None else f"the connector of {anatomy.family}"


def _layers(tower: nn.Module) -> nn.ModuleList | None:
    """The tower's transformer layers: the first list whose members attend."""
    for module in tower.modules():
        if isinstance(module, nn.ModuleList) and len(module) and _attention(module[0]) is not None:
            return module
    return None


def _has_more(subject: Subject, tower: nn.Module, layers: nn.ModuleList, patch: nn.Module) -> bool:
    """Whether the tower has linear maps beside its layers, its patches and the connector: a second transformer, a pooling head."""
    known = [*layers, patch, *_connectors(subject)]
    counted = {id(module) for part in known for module in part.modules()}
    return any(hasattr(module, "in_features") and id(module) not in counted for module in tower.modules())


def _attention(layer: nn.Module) -> nn.Module | None:
    return next((getattr(layer, name) for name in _ATTENTIONS if isinstance(getattr(layer, name, None), nn.Module)), None)


def _head_width(layer: nn.Module) -> int:
    attention = _attention(layer)
    for name in ("out_proj", "o_proj", "proj", "projection_layer"):
        found = getattr(getattr(attention, name, None), "in_features", None)
        if isinstance(found, int):
            return found
    return max(int(getattr(part, "in_features", 0)) for part in layer.modules())


def _patch(tower: nn.Module) -> nn.Conv2d | nn.Conv3d | nn.Linear | None:
    """The map that turns pixels into patches: a convolution whose step is its size."""
    for name, module in tower.named_modules():
        if isinstance(module, nn.Conv2d | nn.Conv3d) and module.stride == module.kernel_size:
            return module
        if isinstance(module, nn.Linear) and name.split(".")[-1] in ("patch_embedding", "patch_embed", "input_proj"):
            return module
    return None


def extra_tokens(tower: nn.Module) -> int:
    """1 where the tower has a class token."""
    return int(any(name.split(".")[-1] in ("class_embedding", "cls_token") for name, _ in tower.named_parameters()))


def _spans(subject: Subject, tower: nn.Module, name: str, inputs: Mapping[str, Any], patch: Any) -> list[int]:
    """Patches that attend to each other, for each picture, tile or frame."""
    grid = inputs.get("video_grid_thw" if name.endswith("videos") else "image_grid_thw")
    if isinstance(grid, Tensor):
        return [int(h) * int(w) for t, h, w in grid.tolist() for _ in range(int(t))]
    size = patch.kernel_size[-1] if hasattr(patch, "kernel_size") else int(subject.config.vision_config.patch_size)
    if subject.anatomy.row.geometry == "ragged":  # all pictures lie in one sequence, under one mask
        return [sum((int(h) // size) * (int(w) // size) for h, w in inputs["image_sizes"].tolist())]
    shape = tuple(inputs[name].shape)
    return [(shape[-2] // size) * (shape[-1] // size)] * prod(shape[:-3])


def _attended(
    subject: Subject, tower: nn.Module, number: int, spans: list[int], inputs: Mapping[str, Any]
) -> list[int]:  # fmt: skip
    """Lengths of the sequences that a layer attends in: its windows where it has any."""
    vision = getattr(subject.config, "vision_config", None)
    full = getattr(vision, "fullatt_block_indexes", None)
    if full is None or number in full:
        return spans
    merge = int(vision.spatial_merge_size)  # type: ignore[union-attr]
    side = int(vision.window_size) // merge // int(vision.patch_size)  # type: ignore[union-attr]
    found = []
    for name in ("image_grid_thw", "video_grid_thw"):
        for t, h, w in inputs[name].tolist() if isinstance(inputs.get(name), Tensor) else ():
            down, across = (_pieces(int(n) // merge, side) for n in (h, w))
            found += [a * b * merge * merge for a in down for b in across] * int(t)
    return found


def _pieces(length: int, side: int) -> list[int]:
    return [min(side, length - start) for start in range(0, length, side)]


def _connector(subject: Subject, layers: nn.ModuleList, patches: int, rows: int) -> float | None:
    """Linear maps of the connector on patches, or on groups of merged ones; None where it is more than linear maps."""
    if subject.anatomy.connector is None:
        return None
    parts = _connectors(subject)
    if any(weight.dim() >= 3 for part in parts for weight in part.parameters()):
        return None
    linear: list[Any] = [module for part in parts for module in part.modules() if hasattr(module, "in_features")]
    maps = [(int(module.in_features), int(module.out_features)) for module in linear]
    if not maps or sum(a * b for a, b in maps) != sum(w.numel() for p in parts for w in p.parameters() if w.dim() == 2):
        return None
    chosen = getattr(subject.config, "vision_feature_layer", -1)
    stacked = len(chosen) if isinstance(chosen, list | tuple) else 1
    width = int(max(getattr(m, "in_features", 0) for m in _attention(layers[0]).modules()))  # type: ignore[union-attr]
    merged = max(1, maps[0][0] // (width * stacked))
    whole = getattr(subject.config, "vision_feature_select_strategy", None) == "full"
    return (rows if whole else patches) // merged * float(sum(a * b for a, b in maps))


def _connectors(subject: Subject) -> list[nn.Module]:
    """The connector, and DeepStack's further ones: one for each layer that visual features are added after."""
    anatomy = subject.anatomy
    planes = getattr(subject.model.get_submodule(anatomy.vision or ""), "deepstack_merger_list", None)
    return [subject.model.get_submodule(anatomy.connector), *(planes or ())] if anatomy.connector else []
