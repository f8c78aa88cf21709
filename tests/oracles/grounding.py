"""Slow, obvious versions of what scores a map over a picture."""

import math
from collections.abc import Sequence

import numpy as np


def iou(a: np.ndarray, b: np.ndarray) -> float:
    ours = {(int(i), int(j)) for i, j in np.argwhere(a)}
    theirs = {(int(i), int(j)) for i, j in np.argwhere(b)}
    return len(ours & theirs) / len(ours | theirs) if ours | theirs else 0.0


def auc(table: np.ndarray, mask: np.ndarray) -> float:
    """The share of pairs (inside, outside) in which the inner cell is the higher one."""
    inside = [table[i, j] for i, j in np.ndindex(table.shape) if mask[i, j]]
    outside = [table[i, j] for i, j in np.ndindex(table.shape) if not mask[i, j]]
    won = sum(1.0 if a > b else 0.5 if a == b else 0.0 for a in inside for b in outside)
    return won / (len(inside) * len(outside))


def otsu_mask(table: np.ndarray) -> np.ndarray:
    """The foreground of the value above which lies the foreground that makes the within-class variance least."""
    best, found = math.inf, np.zeros(table.shape, dtype=bool)
    for cut in sorted(set(table.ravel().tolist()))[:-1]:
        above, below = table[table > cut], table[table <= cut]
        within = len(above) * above.var() + len(below) * below.var()
        if within < best - 1e-12:
            best, found = within, table > cut
    return found


def pieces(mask: np.ndarray) -> list[set[tuple[int, int]]]:
    """Connected pieces, corners included, by flood fill."""
    left = {(int(i), int(j)) for i, j in np.argwhere(mask)}
    found = []
    while left:
        wave, piece = {min(left)}, set()
        while wave:
            piece |= wave
            left -= wave
            wave = {(i + a, j + b) for i, j in wave for a in (-1, 0, 1) for b in (-1, 0, 1)} & left
        found.append(piece)
    return found


def entropy(table: np.ndarray) -> float:
    sizes = [len(piece) for piece in pieces(table > table.mean())]
    return -sum(size / sum(sizes) * math.log(size / sum(sizes)) for size in sizes)


def box_of(piece: set[tuple[int, int]], shape: Sequence[int]) -> tuple[float, float, float, float]:
    rows, columns = [i for i, _ in piece], [j for _, j in piece]
    return min(columns) / shape[1], min(rows) / shape[0], (max(columns) + 1) / shape[1], (max(rows) + 1) / shape[0]


def raster(values: np.ndarray, area: Sequence[float], size: tuple[int, int], side: int) -> np.ndarray:
    """One map, pixel by pixel: bilinear between the centres of the four nearest cells, nothing outside of the area."""
    rows, columns = values.shape
    left, top, right, bottom = area
    made = np.zeros((side, side))
    for i in range(side):
        for j in range(side):
            x, y = (j + 0.5) / side * size[0], (i + 0.5) / side * size[1]
            if not (left <= x <= right and top <= y <= bottom):
                continue
            u = (x - left) / (right - left) * columns - 0.5
            v = (y - top) / (bottom - top) * rows - 0.5
            total = 0.0
            for a, b in ((0, 0), (0, 1), (1, 0), (1, 1)):
                row, column = math.floor(v) + a, math.floor(u) + b
                weight = (1 - abs(v - row)) * (1 - abs(u - column))
                total += weight * values[min(rows - 1, max(0, row)), min(columns - 1, max(0, column))]
            made[i, j] = total
    cells_of_the_picture = rows * columns * size[0] * size[1] / ((right - left) * (bottom - top))
    return made * cells_of_the_picture / side**2
