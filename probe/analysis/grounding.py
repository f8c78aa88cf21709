"""Maps over a picture: how well one finds a box, and which heads make maps that do.

Word-to-pixel maps and their training-free scores follow F-LMM (arXiv 2406.05821), the choice of heads without labels the
localisation heads of arXiv 2503.06287. A map is a table (row column) over the whole picture, in any resolution: all
scores are the same when the picture is stretched.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float
from scipy import ndimage
from scipy.stats import rankdata

from probe.errors import StudyError, did_you_mean

Box = tuple[float, float, float, float]  # left, top, right, bottom, as shares of the picture's width and height
THRESHOLDS = ("otsu", "std")
_TOUCHING = np.ones((3, 3), dtype=int)  # cells that share a corner belong together


class Scores(NamedTuple):
    """How well a map finds a target's boxes.

    `iou` of the foreground with the boxes' union; `box_iou` of the box around the largest piece of the foreground with the
    nearest of the boxes; `hit`, whether that is at least 0.5 (Acc@0.5); `pointing`, the share of the map's maxima that lie
    in a box; `auc`, the area under the ROC curve over cells.
    """

    iou: float
    box_iou: float
    hit: float
    pointing: float
    auc: float


def box_mask(boxes: Sequence[Box], side: int) -> Bool[np.ndarray, "side side"]:
    """Which cells of a table of the picture have their centre in one of the boxes; a box too thin for that has the cell it lies in."""
    made = np.zeros((side, side), dtype=bool)
    for left, top, right, bottom in boxes:
        made[_cells(top, bottom, side), _cells(left, right, side)] = True
    return made


def _cells(start: float, stop: float, side: int) -> slice:
    first, last = int(np.ceil(start * side - 0.5)), int(np.ceil(stop * side - 0.5))
    if last <= first:
        first = min(side - 1, max(0, int((start + stop) / 2 * side)))
        last = first + 1
    return slice(max(0, first), min(side, last))


def mask_iou(a: Bool[np.ndarray, "*place"], b: Bool[np.ndarray, "*place"]) -> float:
    """Intersection over union of two sets of cells; 0 where both are empty."""
    union = (a | b).sum()
    return float((a & b).sum() / union) if union else 0.0


def box_iou(a: Box, b: Box) -> float:
    """Intersection over union of two boxes."""
    across = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
    down = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    both = across * down
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - both
    return both / union if union > 0 else 0.0


def otsu(values: Float[np.ndarray, "*place"]) -> float:
    """Otsu's threshold: the cut between two values that leaves the most variance between the sides.

    Every cut is tried, with no histogram in between. A constant map gives its own value: nothing lies above it.
    """
    ordered = np.sort(values.ravel()).astype(np.float64)
    count = np.arange(1, len(ordered))
    below = ordered.cumsum()[:-1]
    above = ordered.sum() - below
    between = count * count[::-1] * (below / count - above / count[::-1]) ** 2
    between[ordered[1:] == ordered[:-1]] = -1.0  # no cut lies between equal values
    if not len(between) or between.max() < 0:
        return float(ordered[0])
    at = int(between.argmax())
    return float((ordered[at] + ordered[at + 1]) / 2)


def foreground(table: Float[np.ndarray, "row column"], rule: str = "otsu") -> Bool[np.ndarray, "row column"]:
    """The cells above Otsu's threshold (`otsu`), or above mean plus one standard deviation (`std`)."""
    if rule not in THRESHOLDS:
        raise StudyError(f"there is no threshold {rule!r}{did_you_mean(rule, THRESHOLDS)}")
    return table > (otsu(table) if rule == "otsu" else table.mean() + table.std())


def largest_box(mask: Bool[np.ndarray, "row column"]) -> Box | None:
    """The box around the largest connected piece of a mask; None where it is empty."""
    pieces, count = ndimage.label(mask, _TOUCHING)
    if not count:
        return None
    sizes = np.bincount(pieces.ravel())[1:]
    rows, columns = ndimage.find_objects(pieces)[int(sizes.argmax())]
    height, width = mask.shape
    return columns.start / width, rows.start / height, columns.stop / width, rows.stop / height


def pointing(table: Float[np.ndarray, "row column"], mask: Bool[np.ndarray, "row column"]) -> float:
    """The pointing game: the share of the map's maxima that lie in the mask (1 or 0 where there is one maximum)."""
    return float(mask[table == table.max()].mean())


def auc(tables: Float[np.ndarray, "map row column"], *masks: Bool[np.ndarray, "row column"]) -> Float[np.ndarray, "mask map"]:
    """Area under the ROC curve of each map against each mask, ties counted half; NaN where a mask is empty or everything."""
    ranks = rankdata(tables.reshape(len(tables), -1), axis=-1)
    made = np.full((len(masks), len(tables)), np.nan)
    for i, mask in enumerate(masks):
        inside = int(mask.sum())
        if 0 < inside < mask.size:
            surplus = ranks[:, mask.ravel()].sum(-1) - inside * (inside + 1) / 2
            made[i] = surplus / (inside * (mask.size - inside))
    return made


def score_map(
    table: Float[np.ndarray, "side side"], boxes: Sequence[Box], marked: Bool[np.ndarray, "side side"] | None = None,
    rule: str = "otsu",
) -> Scores:  # fmt: skip
    """All scores of one map against a target's boxes; `marked` is its foreground where the rule is not to draw it."""
    marked = foreground(table, rule) if marked is None else marked
    wanted = box_mask(boxes, len(table))
    found = largest_box(marked)
    nearest = max(box_iou(found, box) for box in boxes) if found else 0.0
    area = float(auc(table[None], wanted)[0, 0])
    return Scores(mask_iou(marked, wanted), nearest, float(nearest >= 0.5), pointing(table, wanted), area)


def centred_box(size: tuple[float, float], side: int) -> tuple[Float[np.ndarray, "side side"], Bool[np.ndarray, "side side"]]:
    """The baseline that looks at nothing: a box of some width and height in the middle, and a map that falls off from there."""
    width, height = size
    middle = (np.arange(side) + 0.5) / side - 0.5
    away = np.maximum(np.abs(middle)[None, :] / (width / 2), np.abs(middle)[:, None] / (height / 2))
    return -away, box_mask([(0.5 - width / 2, 0.5 - height / 2, 0.5 + width / 2, 0.5 + height / 2)], side)


# --- which heads -----------------------------------------------------------------------------------------------------


def spatial_entropy(table: Float[np.ndarray, "row column"]) -> float:
    """How scattered a map is: entropy (nats) of the sizes of the pieces that lie above its mean.

    One piece has entropy 0. A constant map has none: it counts as scattered over all cells.
    """
    pieces, count = ndimage.label(table > table.mean(), _TOUCHING)
    if not count:
        return float(np.log(table.size))
    share = np.bincount(pieces.ravel())[1:] / (pieces > 0).sum()
    return float(-(share * np.log(share)).sum())


def elbow(values: Float[np.ndarray, " n"]) -> float:
    """The least value on the upper side of the bend of a sorted series; the least of all where it does not bend.

    The bend is the point farthest from the line between the greatest and the least: where it lies below the line, a few
    values stand out and the bend belongs to the rest; where it lies above, a few fall off and it is the last of the others.
    """
    ordered = np.sort(values)[::-1]
    if len(ordered) < 3 or ordered[0] == ordered[-1]:
        return float(ordered[-1])
    height = (ordered - ordered[-1]) / (ordered[0] - ordered[-1]) + np.arange(len(ordered)) / (len(ordered) - 1) - 1
    at = int(np.abs(height).argmax())
    if abs(height[at]) < 1e-9:
        return float(ordered[-1])
    return float(ordered[at - 1] if height[at] < 0 else ordered[at])


def localisation_heads(
    mass: Float[np.ndarray, "example head"], entropy: Float[np.ndarray, "example head"], count: int = 3, best: int = 10
) -> list[int]:
    """The heads that look at the picture, and at one place in it, chosen without boxes (arXiv 2503.06287).

    Heads whose mean mass on the picture reaches the elbow of all heads' are kept; each example names the `best` of them by
    spatial entropy; the `count` heads named most often are chosen (fewer where fewer look at the picture), the lower mean
    entropy first among equals.
    """
    means = mass.mean(0)
    kept = np.nonzero(means >= elbow(means))[0]
    order = np.argsort(entropy[:, kept], axis=1, kind="stable")[:, :best]
    named = np.bincount(order.ravel(), minlength=len(kept))
    ranking = np.lexsort((entropy[:, kept].mean(0), -named))
    return [int(head) for head in kept[ranking[:count]]]
