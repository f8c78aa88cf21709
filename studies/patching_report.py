"""The patching study's numbers and figures, made from its records."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa

from probe.analysis.patching import agreement, handover
from probe.analysis.stats import benjamini_hochberg, sign_flip
from probe.patching import STREAM
from probe.plots import patching as plots
from studies.pairs import GROUPS
from studies.patching_words import report
from studies.run import Run
from studies.study import Summary
from studies.work import curve, interval, picked, refuse_nothing, skipped

__all__ = ["figures", "report", "summarise"]
VARIANTS = ("attribution", "integrated")


class Table:
    """The records as arrays (pair layer), pairs in the order of the records, NaN where a pair has no such group."""

    def __init__(self, rows: pa.Table, n_layers: int) -> None:
        self.pairs = picked(rows, what="pair")["example"].to_pylist()
        self.kinds = picked(rows, what="pair")["kind"].to_pylist()
        self.layers = range(n_layers)
        frame = rows.to_pandas()
        for name in ("what", "point", "group", "example"):
            frame[name] = frame[name].astype(object)
        self.parts = dict(list(frame.groupby(["what", "point", "group", "head"], dropna=True)))

    def values(self, what: str, point: str, group: str, column: str = "effect", head: int = -1) -> np.ndarray:
        part = self.parts.get((what, point, group, head))
        if part is None:
            return np.full((len(self.pairs), len(self.layers)), np.nan)
        wide: pd.DataFrame = part.pivot(index="example", columns="layer", values=column)
        return wide.reindex(index=self.pairs, columns=list(self.layers)).to_numpy(dtype=np.float64)

    def heads(self) -> list[int]:
        return sorted({int(head) for what, *_, head in self.parts if what == "head"})

    def size(self, point: str, group: str) -> float:
        part = self.parts.get(("site", point, group, -1))
        return float("nan") if part is None else float(part.groupby("example")["n_positions"].first().mean())


def summarise(rows: pa.Table, broken: Mapping[str, str], n_layers: int, seed: int) -> Summary:
    """Everything that the report says, as numbers. Raises DataError when no pair could be used."""
    table = Table(rows, n_layers)
    refuse_nothing(rows, len(table.pairs))
    dropped = Counter(picked(rows, what="skipped")["reason"].to_pylist())
    if broken:
        dropped["not a whole pair"] += len(broken)
    sites = {point: _groups(table, "site", point, seed) for point in STREAM}
    found = picked(rows, what="pair")
    every = table.values("all", "resid_pre", "real")[:, 0]
    return {
        "run": "", "n": len(table.pairs), "dropped": dict(dropped),
        "skipped": [*skipped(rows), *(f"{name}: {why}" for name, why in broken.items())],
        **_headline(table, seed),
        "groups": {group: table.size("resid_pre", group) for group in GROUPS if group in sites["resid_pre"]},
        "sites": sites,
        "windows": {point: _groups(table, "window", point, seed) for point in STREAM if ("window", point, "last", -1) in table.parts},
        "control": _control(table, seed), "kinds": _kinds(table, seed), "heads": _heads(table, seed),
        "agreement": _agreement(table, seed), "scatter": _scatter(table, seed),
        "difference_clean": interval(found["clean"].to_numpy(), seed), "difference_corrupt": interval(found["corrupt"].to_numpy(), seed),
        "all_max_error": float(np.abs(every - 1).max()),
    }  # fmt: skip


def _groups(table: Table, what: str, point: str, seed: int) -> dict[str, Any]:
    """The curve of each group that any pair has."""
    made = {}
    for group in (*GROUPS, "nudged"):
        values = _known(table.values(what, point, group))
        if len(values):
            made[group] = curve(values, seed=seed)
    return made


def _known(values: np.ndarray) -> np.ndarray:
    return values[~np.isnan(values).all(1)]


def _early(table: Table, group: str) -> np.ndarray:
    """Each pair's effect of a group in the stream, averaged over the first quarter of the layers."""
    count = max(1, len(table.layers) // 4)
    return table.values("site", "resid_pre", group)[:, :count].mean(1)


def _headline(table: Table, seed: int) -> Summary:
    """The object at early layers beside its control, and where the last position takes over."""
    own, control = _early(table, "object"), _early(table, "random")
    both = ~np.isnan(own - control)
    gap = (own - control)[both]
    nudged = _early(table, "nudged")
    beyond = (own - nudged)[~np.isnan(own - nudged)]
    last, carried = table.values("site", "resid_pre", "last"), table.values("site", "resid_pre", "object")
    moved = handover(_known(carried), last[~np.isnan(carried).all(1)], seed) if both.any() else None
    return {
        "early_layers": max(1, len(table.layers) // 4),
        "object_early": interval(own, seed), "random_early": interval(control, seed),
        "object_above_random": {**interval(gap, seed), "p_value": float(sign_flip(gap, seed)) if len(gap) > 1 else None},
        "nudged_early": interval(nudged, seed),
        "object_above_nudged": {**interval(beyond, seed), "p_value": float(sign_flip(beyond, seed)) if len(beyond) > 1 else None},
        "last_early": interval(_early(table, "last"), seed), "last_final": interval(last[:, -1], seed),
        "handover": None if moved is None else moved._asdict(),
    }  # fmt: skip


def _control(table: Table, seed: int) -> dict[str, Any]:
    """Object minus each control, pair by pair, at each point and layer; q-values over all of them."""
    gaps = {
        f"{what} {point}{name}": _known(table.values(what, point, "object") - table.values(what, point, arm))
        for arm, name in (("random", ""), ("nudged", " nudged")) for what in ("site", "window") for point in STREAM
    }  # fmt: skip
    gaps = {name: gap for name, gap in gaps.items() if len(gap) > 1}
    if not gaps:
        return {}
    q = benjamini_hochberg(np.stack([sign_flip(gap, seed) for gap in gaps.values()]))
    return {name: {**curve(gap, seed=seed), "q": row.tolist()} for (name, gap), row in zip(gaps.items(), q, strict=True)}


def _kinds(table: Table, seed: int) -> dict[str, Any]:
    """Sort of fact by sort of fact: the object and its control at early layers, and the last position before the last layer."""
    made = {}
    final = table.values("site", "resid_pre", "last")[:, -1]
    for kind in sorted({kind for kind in table.kinds if kind}):
        own = np.array([other == kind for other in table.kinds])
        made[kind] = {
            "n": int(own.sum()), "object": interval(_early(table, "object")[own], seed),
            "random": interval(_early(table, "random")[own], seed), "nudged": interval(_early(table, "nudged")[own], seed), "last": interval(final[own], seed),
        }  # fmt: skip
    return made


def _heads(table: Table, seed: int) -> dict[str, Any]:
    """Mean effect of each head at the last position (layer head), interval, and the q-value that it is above zero."""
    values = np.stack([table.values("head", "z", "last", head=head) for head in table.heads()], -1)  # pair layer head
    flat = curve(values.reshape(len(values), -1), seed=seed)
    shape = values.shape[1:]
    p = sign_flip(values, seed)
    made = {name: np.array(flat[name], dtype=float).reshape(shape).tolist() for name in ("mean", "low", "high")}
    return {**made, "q": benjamini_hochberg(p).tolist(), "n": len(values)}


def _both(table: Table, point: str, variant: str) -> tuple[np.ndarray, np.ndarray]:
    """Exact effects and their estimates (pair site layer): groups, without the control that is a part of another, or heads."""
    keys: list[tuple[str, str, int]] = [("site", group, -1) for group in GROUPS if group != "random"]
    if point == "z":
        keys = [("head", "last", head) for head in table.heads()]
    exact, estimate = (
        np.stack([table.values(what, point, group, column, head) for what, group, head in keys], 1)
        for column in ("effect", variant)
    )
    return exact, estimate


def _agreement(table: Table, seed: int) -> dict[str, Any]:
    """For each variant and point: the correlation by layer, over all layers, and the mean distance between the two."""
    made: dict[str, Any] = {}
    for variant in VARIANTS:
        for point in (*STREAM, "z"):
            exact, estimate = _both(table, point, variant)
            if np.isnan(estimate).all():
                continue
            by_layer = agreement(exact, estimate, seed)
            flat, guess = (values.reshape(len(values), -1, 1) for values in (exact, estimate))
            whole = agreement(flat, guess, seed)
            made.setdefault(variant, {})[point] = {
                "layers": list(table.layers), "n": len(exact),
                **{name: np.asarray(side).tolist() for name, side in zip(("mean", "low", "high"), by_layer, strict=True)},
                "overall": {name: float(side[0]) for name, side in zip(("value", "low", "high"), whole, strict=True)},  # type: ignore[index]
                "distance": float(np.nanmean(np.abs(exact - estimate))),
            }  # fmt: skip
    return made


def _scatter(table: Table, seed: int) -> dict[str, dict[str, Any]]:
    """Exact effects and estimates of each group, layer by layer: means over pairs (exact estimate) and the ends of their intervals."""
    made: dict[str, dict[str, Any]] = {}
    for point in STREAM:
        for group in GROUPS:
            both = [_known(table.values("site", point, group, column)) for column in ("effect", "attribution")]
            if len(both[0]) and group != "random":
                curves = [curve(values, seed=seed) for values in both]
                made.setdefault(point, {})[group] = {
                    "mean": [one["mean"] for one in curves], "low": [one["low"] for one in curves], "high": [one["high"] for one in curves],
                    "n": len(both[0]),
                }  # fmt: skip
    return made


def figures(run: Run, summary: Summary) -> None:
    """The figures of a run."""
    n = summary["n"]
    drawn: Sequence[tuple[str, Any]] = (
        ("sites", plots.sites(summary["sites"], n)), ("object-and-control", plots.controlled(summary["sites"], n)),
        ("windows", plots.sites(summary["windows"], n, windowed=True)),
        ("windows-and-control", plots.controlled(summary["windows"], n, windowed=True)),
        ("heads", plots.heads(summary["heads"])), ("exact-and-estimate", plots.scatter(summary["scatter"], n)),
        ("agreement", plots.agreement(summary["agreement"], n)),
    )  # fmt: skip
    for name, pair in drawn:
        run.figure(name, *pair)
