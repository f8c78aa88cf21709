"""The grounding study's units of work: what every head's map says, which heads are chosen, and what the chosen maps find."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from jaxtyping import Float
from torch.nn.functional import interpolate

from probe.analysis.grounding import Box, auc, box_mask, centred_box, localisation_heads, score_map, spatial_entropy
from probe.example import Example
from probe.grounding import SOURCES, PictureMaps, Target, find_targets, read_maps
from probe.mask_head import MaskHead
from probe.subject import Side, Subject
from studies.work import Rows, picked

SIDE = 64  # of the tables on which chosen maps are scored
HEAD_SIDE = 32  # of those on which every head is
MASK_SIDE = 24  # of those that the mask head sees
DRAWN = 4  # scored examples whose maps are kept for the figure
ONE, LOCAL, ALL, RELATIVE, MASK = "one head", "localisation heads", "all heads", "relative", "mask head"
CENTRED, RANDOM = "centred box", "random map"
LAST_OF_ALL = f"{ALL}, last"
BASELINES = (CENTRED, RANDOM, LAST_OF_ALL)
Table = Float[np.ndarray, "side side"]


@dataclass(frozen=True)
class Plan:
    """What is done with each example."""

    merge: str
    threshold: str
    heads: int
    generic: str
    mask_head: bool
    train_scenes: int
    epochs: int
    seed: int


@dataclass(frozen=True)
class Usable:
    """An example that can be scored, the scene that it shows, and for each of its targets the box of something else."""

    example: Example
    scene: str
    targets: tuple[Target, ...]
    others: tuple[tuple[Box, ...], ...] = ()
    drawn: bool = False


@dataclass(frozen=True)
class Choice:
    """What the selection split decides: channels count from the first layer's first head."""

    layers: tuple[int, ...]
    heads: int  # of one layer
    size: tuple[float, float]  # mean width and height of the objects, as shares of the picture
    located: dict[str, list[int]]  # for each source, heads chosen without boxes
    single: dict[str, int]  # the head with the greatest mean AUC
    by_layer: dict[str, list[int]]  # the same in each layer
    relative: int | None  # the layer whose ratio to the generic prompt has the greatest mean AUC, by its place in `layers`

    def name(self, channel: int) -> str:
        """A channel as `layer.head`."""
        return f"{self.layers[channel // self.heads]}.{channel % self.heads}"


# --- reading ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Read:
    """One target of one example, with its raw maps by source and the relative ones, layer by layer."""

    usable: Usable
    target: Target
    others: tuple[Box, ...]
    maps: dict[str, PictureMaps]
    relative: PictureMaps | None
    layers: tuple[int, ...]


def read_targets(subject: Subject, usables: Sequence[Usable], plan: Plan, padding: Side, relative: bool = True) -> list[Read]:
    """The maps of all targets of some examples: one pass, and a second one for the generic prompt."""
    encoded = subject.encode([usable.example for usable in usables], padding)
    targets = [find_targets(subject, usable.example, m)[0] for usable, m in zip(usables, encoded.maps, strict=True)]
    maps, layers = read_maps(subject, encoded, targets, plan.merge)
    plain = _generic_maps(subject, usables, targets, plan, padding) if relative and plan.generic != "none" else None
    made = []
    for i, (usable, own) in enumerate(zip(usables, targets, strict=True)):
        for k, target in enumerate(own):
            ratio = None
            if plain is not None:
                ratio = maps[i][k]["last"].averaged(len(layers)).over(plain[i][k]["last"].averaged(len(layers)))
            others = usable.others[k] if usable.others else ()
            made.append(Read(usable, target, others, maps[i][k], ratio, tuple(layers)))
    return made


def _generic_maps(
    subject: Subject, usables: Sequence[Usable], targets: Sequence[Sequence[Target]], plan: Plan, padding: Side
) -> list[list[dict[str, PictureMaps]]]:
    """Attention of the last position when the same picture comes with a prompt that asks for nothing in particular."""
    asked = []
    for usable in usables:
        marks = "".join(mark * usable.example.prompt.count(mark) for mark in subject.marks.values())
        asked.append(replace(usable.example, prompt=f"{marks}\n{plan.generic}" if marks else plan.generic))
    wordless = [[replace(target, positions=()) for target in own] for own in targets]
    return read_maps(subject, subject.encode(asked, padding), wordless)[0]


def _row(read: Read, what: str, key: str, values: Any) -> dict[str, Any]:
    own = {"example": read.usable.example.id, "scene": read.usable.scene, "phrase": read.target.phrase}
    return {**own, "what": what, "key": key, "values": np.asarray(values, dtype=np.float64).ravel().tolist()}


def _head_auc(read: Read, maps: PictureMaps) -> Float[np.ndarray, "mask channel"]:
    """AUC of each channel against the target's boxes, and against those of something else (NaN where there is nothing else)."""
    masks = [box_mask(boxes, HEAD_SIDE) for boxes in (read.target.boxes, read.others)]
    return auc(maps.raster(HEAD_SIDE).numpy(), *masks)


# --- the selection split ---------------------------------------------------------------------------------------------


def selection_rows(subject: Subject, usables: Sequence[Usable], plan: Plan, padding: Side) -> Rows:
    """Of each target, every head's AUC, mass on the picture and spatial entropy, by source."""
    rows: Rows = []
    for read in read_targets(subject, usables, plan, padding):
        rows.append(_row(read, "layers", "", read.layers))
        rows += [_row(read, "size", "", (b[2] - b[0], b[3] - b[1])) for b in read.target.boxes]
        for source in SOURCES:
            maps = read.maps[source]
            entropy = [spatial_entropy(table) for table in maps.finest.float().numpy()]
            rows.append(_row(read, "selection", f"auc/{source}", _head_auc(read, maps)[0]))
            rows.append(_row(read, "selection", f"mass/{source}", maps.mass))
            rows.append(_row(read, "selection", f"entropy/{source}", entropy))
        if read.relative is not None:
            rows.append(_row(read, "selection", "auc/relative", _head_auc(read, read.relative)[0]))
    return rows


def choose(rows: pa.Table, heads: int) -> Choice:
    """The heads and the layer that the scored split will be read through."""
    layers = tuple(int(layer) for layer in table_of(rows, "layers")[0])
    size = table_of(rows, "size").mean(0)
    found = {source: table_of(rows, "selection", f"auc/{source}") for source in SOURCES}
    area = {source: np.nan_to_num(np.nanmean(found[source], 0)) for source in SOURCES}
    per_layer = len(area["word"]) // len(layers)
    relative = table_of(rows, "selection", "auc/relative")
    stats = {source: [table_of(rows, "selection", f"{stat}/{source}") for stat in ("mass", "entropy")] for source in SOURCES}
    return Choice(
        layers, per_layer, (float(size[0]), float(size[1])),
        {source: localisation_heads(stats[source][0], stats[source][1], heads) for source in SOURCES},
        {source: int(area[source].argmax()) for source in SOURCES},
        {source: _best_by_layer(area[source], per_layer) for source in SOURCES},
        int(np.nan_to_num(relative.mean(0)).argmax()) if relative.size else None,
    )  # fmt: skip


def _best_by_layer(area: Float[np.ndarray, " channel"], per_layer: int) -> list[int]:
    best = area.reshape(-1, per_layer).argmax(1)
    return [layer * per_layer + int(head) for layer, head in enumerate(best)]


def table_of(rows: pa.Table, what: str, key: str = "") -> np.ndarray:
    """(target value) of one sort of rows, in the order of the records."""
    return np.array(picked(rows, what=what, key=key)["values"].to_pylist(), dtype=np.float64)


# --- the scored split ------------------------------------------------------------------------------------------------


def scoring_rows(
    subject: Subject, usables: Sequence[Usable], plan: Plan, padding: Side, choice: Choice, head: MaskHead | None
) -> Rows:
    """Of each target, every head's AUC, and all scores of every method and baseline, beside those for another object's box."""
    rows: Rows = []
    for read in read_targets(subject, usables, plan, padding, choice.relative is not None):
        for source in SOURCES:
            maps = read.maps[source]
            own, other = _head_auc(read, maps)
            rows.append(_row(read, "auc", source, own))
            rows.append(_row(read, "null auc", source, other))
            rows.append(_row(read, "layer auc", source, _head_auc(read, maps.averaged(len(choice.layers)))[0]))
        for name, table, marked in _methods(read, plan, choice, head):
            rows.append(_row(read, "score", name, score_map(table, read.target.boxes, marked, plan.threshold)))
            if read.others:
                rows.append(_row(read, "null score", name, score_map(table, read.others, marked, plan.threshold)))
            if read.usable.drawn and name not in BASELINES:
                rows.append(_row(read, "map", name, table))
        if read.usable.drawn:
            rows.append(_row(read, "boxes", str(read.target.picture), read.target.boxes))
    return rows


def _methods(read: Read, plan: Plan, choice: Choice, head: MaskHead | None) -> list[tuple[str, Table, np.ndarray | None]]:
    """(name, map, foreground where no threshold draws it) of every method and baseline."""
    made: list[tuple[str, Table, np.ndarray | None]] = []
    for source in SOURCES:
        maps = read.maps[source]
        made.append((f"{ONE}, {source}", _single(maps.picked([choice.single[source]])), None))
        made.append((f"{LOCAL}, {source}", _single(maps.picked(choice.located[source]).shared().averaged()), None))
        made.append((f"{ALL}, {source}", _single(maps.averaged()), None))
    if read.relative is not None and choice.relative is not None:
        made.append((f"{RELATIVE}, last", _single(read.relative.picked([choice.relative])), None))
    if head is not None:
        table = masked(head, read.maps["word"])
        made.append((f"{MASK}, word", table, table > 0.5))
    made.append((CENTRED, *centred_box(choice.size, SIDE)))
    made.append((RANDOM, _single(_noise(read, plan.seed)), None))
    return made


def _single(maps: PictureMaps) -> Table:
    return maps.raster(SIDE)[0].numpy()


@torch.no_grad()
def masked(head: MaskHead, maps: PictureMaps) -> Table:
    """What the mask head makes of a target's maps, as probabilities."""
    logits = head(maps.shared().raster(MASK_SIDE)[None])
    return interpolate(logits[None], size=(SIDE, SIDE), mode="bilinear", align_corners=False)[0, 0].sigmoid().numpy()


def _noise(read: Read, seed: int) -> PictureMaps:
    """A map of uniform noise on the same cells, drawn by the example and the phrase."""
    rng = np.random.default_rng([seed, *read.usable.example.id.encode(), 0, *read.target.phrase.encode()])
    maps = read.maps["word"]
    parts = tuple((torch.from_numpy(rng.random((1, *part.shape[1:]))), area) for part, area in maps.parts)
    return PictureMaps(parts, maps.size)
