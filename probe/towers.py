"""The layers of a vision or audio tower: found, watched while they run, and their patches laid over the picture.

A state of a tower counts what enters its layer 0 as 0 and what leaves layer l as l + 1.
"""

from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from probe.errors import AnatomyError, TokenError
from probe.geometry.layout import has_cls
from probe.subject import Encoded, Subject
from probe.tokens import Grid, TokenMap
from probe.tracing import last_logits

_ATTENTIONS = ("self_attn", "attn", "attention")
_ROW_BY_ROW = ("plain", "pooled")  # geometries whose tower sees one picture as one table of patches, row by row
Groups = Mapping[str, np.ndarray]
Choose = Callable[[int], Groups]


@dataclass(frozen=True)
class Tower:
    """One tower: its kind (vision, audio), the dotted path of its layers from the model, and the states that the connector reads."""

    kind: str
    path: str
    n_layers: int
    read: tuple[int, ...]

    @property
    def n_states(self) -> int:
        return self.n_layers + 1


def find_tower(subject: Subject, kind: str = "vision") -> Tower:
    """The tower of a kind through the anatomy: its longest list of blocks that attend.

    Raises AnatomyError where the model has no such tower, or the tower no such list.
    """
    home = getattr(subject.anatomy, kind)
    if home is None:
        raise AnatomyError(f"this {subject.anatomy.family} model has no {kind} tower whose layers could be read")
    found = [
        (len(module), f"{home}.{name}" if name else home)
        for name, module in subject.model.get_submodule(home).named_modules()
        if isinstance(module, nn.ModuleList) and len(module) and any(hasattr(module[0], part) for part in _ATTENTIONS)
    ]
    if not found:
        raise AnatomyError(f"the {kind} tower of this {subject.anatomy.family} model ({home}) has no list of attention layers")
    count, path = max(found, key=lambda one: one[0])
    return Tower(kind, path, count, _read(subject, kind, count))


def _read(subject: Subject, kind: str, count: int) -> tuple[int, ...]:
    """The states that the connector (and DeepStack) reads: what the configuration names, else the last."""
    if kind == "audio":
        return (count,)
    named = getattr(subject.config, "vision_feature_layer", None)
    read = [count] if named is None else [named] if isinstance(named, int) else list(named)
    vision = getattr(subject.config, "vision_config", None)
    deep = getattr(vision, "deepstack_visual_indexes", None) or getattr(vision, "intermediate_layers_indices", None) or ()
    states = {state if state >= 0 else count + 1 + state for state in read} | {int(layer) + 1 for layer in deep}
    return tuple(sorted(states))


class _Enough(Exception):  # noqa: N818 - no error: it ends a pass once the towers have run
    pass


@torch.no_grad()
def tower_means(
    subject: Subject, encoded: Encoded, tower: Tower, choose: Choose
) -> dict[str, Float[np.ndarray, "state width"]]:  # fmt: skip
    """The mean state of groups of patches at every state of a tower, of the one example that was encoded.

    `choose` is told how many patches the tower holds and names groups of them; an empty group is left out. One pass, which ends where the
    language model would begin. Raises TokenError where the tower does not run, or more than one example is given.
    """
    if len(encoded) != 1:
        raise TokenError(f"a tower is read for one example at a time, not for {len(encoded)}")
    taken: dict[int, list[Tensor]] = {}
    chosen: list[Groups] = []

    def take(state: int, hidden: Tensor) -> None:
        flat = hidden.detach().flatten(0, -2).float()
        if not chosen:
            chosen.append({name: patches for name, patches in choose(len(flat)).items() if len(patches)})
        means = [flat[torch.from_numpy(patches).to(flat.device)].mean(0) for patches in chosen[0].values()]
        taken.setdefault(state, []).append(torch.stack(means).cpu())

    layers: Any = subject.model.get_submodule(tower.path)
    with subject.lock, ExitStack() as stack:
        stack.callback(layers[0].register_forward_pre_hook(partial(_entering, take), with_kwargs=True).remove)
        for i, layer in enumerate(layers):
            stack.callback(layer.register_forward_hook(partial(_leaving, take, i + 1)).remove)
        stack.callback(subject.layers[0].register_forward_pre_hook(_stop).remove)
        with suppress(_Enough):
            last_logits(subject, encoded)
    if sorted(taken) != list(range(tower.n_states)) or any(len(found) > 1 for found in taken.values()):
        raise TokenError(f"the {tower.kind} tower did not run once for this example: one picture (or sound) is read at a time")
    whole = torch.stack([taken[state][0] for state in range(tower.n_states)], 1).numpy()
    return dict(zip(chosen[0], whole, strict=True))


def _entering(take: Callable[[int, Tensor], None], module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    take(0, args[0] if args else kwargs["hidden_states"])


def _leaving(take: Callable[[int, Tensor], None], state: int, module: nn.Module, args: Any, output: Any) -> None:
    take(state, output[0] if isinstance(output, tuple) else output)


def _stop(module: nn.Module, args: Any) -> None:
    raise _Enough


@dataclass(frozen=True)
class Patches:
    """A tower's patches laid over the picture: a grid of cells, and the patches of each cell (cell patch)."""

    grid: Grid
    members: np.ndarray

    def covering(self, box: tuple[float, float, float, float]) -> np.ndarray:
        """The patches that a box of the original picture touches, sorted."""
        cells = self.grid.covering(box)
        return np.sort(self.members[self.grid.positions[:, cells[:, 0], cells[:, 1]].ravel()].ravel())

    @property
    def everything(self) -> np.ndarray:
        return np.sort(self.members.ravel())


def patches_of(subject: Subject, token_map: TokenMap, count: int) -> Patches:
    """Where the `count` patches of a vision tower lie in an example's one picture, through the family's geometry.

    A tower that sees the whole picture as one table (LLaVA, PaliGemma, Gemma 3; a class token comes first in CLIP), or lists its patches by
    merged block (Qwen-VL). Raises TokenError for any other, with the reason.
    """
    geometry, grids = subject.anatomy.row.geometry, token_map.grids
    if len(token_map.pictures) != 1 or len(grids) != 1:
        raise TokenError("the tower's patches are known for one picture that is one grid")
    (grid,) = grids
    frames, rows, columns = grid.shape
    vision = subject.config.vision_config
    if geometry in _ROW_BY_ROW:
        classes = 1 if has_cls(subject.config) else 0
        times = round(((count - classes) / (rows * columns)) ** 0.5)
        if frames == 1 and times and rows * columns * times**2 + classes == count:
            table = np.arange(rows * columns * times**2).reshape(1, rows * times, columns * times)
            return Patches(Grid(0, table, grid.area), np.arange(classes, count)[:, None])
    if geometry == "merged" and not getattr(vision, "fullatt_block_indexes", None):
        each = int(vision.spatial_merge_size) ** 2
        if frames * rows * columns * each == count:
            table = np.arange(frames * rows * columns).reshape(frames, rows, columns)
            return Patches(Grid(0, table, grid.area), np.arange(count).reshape(-1, each))
    why = "its windows reorder the patches" if geometry == "merged" else f"its geometry is {geometry or 'not known'}"
    raise TokenError(f"the tower of this {subject.anatomy.family} model does not say where its {count} patches lie: {why}")
