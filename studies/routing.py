"""Do experts specialise by modality?

In a mixture of experts, the router sends every token to a few experts of each layer: which ones do tokens of pictures, clips, sounds
and words go to? In a dense decoder the neurons of the feed-forward blocks stand in place of experts, and a token uses those of the
greatest magnitude. One forward pass for each example; the null moves the labels of the tokens along the same sequence.
"""

from collections.abc import Sequence
from typing import Any
from zlib import crc32

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from probe.analysis.routing import count_uses, jensen_shannon, mutual_information, rotations
from probe.errors import ExampleError, StudyError, did_you_mean
from probe.example import Example
from probe.routing import GROUPS, Use, kind_of, read_use, routed_layers
from probe.tokens import TokenMap
from studies.asking import alike
from studies.run import Run, finite
from studies.study import Setting, Summary, describe, study
from studies.work import Rows, read_units, refuse_nothing, sift

SCHEMA = pa.schema([
    ("example", pa.string()), ("what", pa.string()), ("modality", pa.string()), ("key", pa.string()), ("layer", pa.int32()),
    ("values", pa.list_(pa.float64())), ("vector", pa.list_(pa.float32())), ("n", pa.int64()), ("text", pa.string()),
])  # fmt: skip
NAMES = tuple(GROUPS)
MEASURES = ("js", "mi", "js_null", "mi_null")


@study
def routing(setting: Setting, *, units: str = "auto", share: float = 0.1, draws: int = 20) -> Summary:
    """Do experts specialise by modality?

    `units` are `experts`, `neurons`, or `auto`: experts where the model has any, else its feed-forward neurons. A token uses the `share` of
    a layer's neurons with the greatest magnitude. `draws` is how often each example's labels are moved for the null.
    """
    if units not in ("auto", "experts", "neurons"):
        raise StudyError(f"there are no units {units!r}{did_you_mean(units, ('auto', 'experts', 'neurons'))}")
    if draws < 1:
        raise StudyError(f"the null needs at least one draw, not {draws}")
    if not 0 < share < 1:
        raise StudyError(f"the share of neurons that a token uses lies between 0 and 1, not at {share:g}")
    kind = kind_of(setting.subject) if units == "auto" else units
    layers = routed_layers(setting.subject, kind)
    config = {
        "units": kind, "share": share, "draws": draws, "data": setting.data.name, "fingerprint": setting.data.fingerprint,
        "limit": len(setting.data), "batch": setting.batch, "padding": setting.padding, "seed": setting.seed,
    }  # fmt: skip
    run = Run.open(setting.out, "routing", config, describe(setting.subject), SCHEMA)
    with run.recorded():
        return _carry_out(setting, run, kind, layers, share, draws)


def _carry_out(setting: Setting, run: Run, kind: str, layers: tuple[int, ...], share: float, draws: int) -> Summary:
    from studies.routing_report import figures, report, summarise

    rows = read_units(setting, run, "routing", lambda examples: unit(setting, examples, kind, share, draws))
    n = len(set(rows.filter(pc.equal(rows["what"], "spread"))["example"].to_pylist()))
    refuse_nothing(rows, n)
    summary = finite(summarise(rows, kind, layers, setting.subject.n_layers, share, setting.seed))
    summary["run"] = str(run.folder)
    figures(run, summary)
    run.finish(summary, report(summary, setting))
    return summary


# --- one unit of work ------------------------------------------------------------------------------------------------


def labels_of(token_map: TokenMap, example: Example) -> tuple[np.ndarray, np.ndarray]:
    """The positions that are compared, in order, and the number (in NAMES) of the modality of each.

    Raises ExampleError for an example that has no medium in the sequence, or no words.
    """
    if token_map.crossed is not None:
        raise ExampleError(
            f"the picture of example {example.id!r} is read through cross-attention: its tokens pass through no feed-forward block"
        )
    labels = np.full(len(token_map), -1)
    for number, segments in enumerate(GROUPS.values()):
        for segment in segments:
            labels[token_map.positions(segment)] = number
    at = np.nonzero(labels >= 0)[0]
    if not (labels == NAMES.index("text")).any() or len(np.unique(labels[at])) < 2:
        raise ExampleError(f"example {example.id!r} has no tokens of a medium beside its words to compare")
    return at, labels[at]


def unit(setting: Setting, examples: list[Example], kind: str, share: float, draws: int) -> Rows:
    """All rows of some examples; one without two modalities in its sequence is a row that says why."""
    subject = setting.subject
    usable, rows = sift(examples, lambda e: labels_of(subject.encode(e).maps[0], e))
    tally = Tally()
    for group in alike(usable):
        some = [usable[i] for i in group]
        encoded = subject.encode(some, setting.padding)
        labelled = [labels_of(m, e) for m, e in zip(encoded.maps, some, strict=True)]
        reader = _Reader(some, labelled, draws, setting.seed, tally)
        read_use(subject, encoded, reader.take, kind, share)
        rows += reader.rows()
    return rows + tally.rows()


class _Reader:
    """Looks at the use of each layer as the pass reaches it: the spread of each example, and sums over them all."""

    def __init__(
        self, examples: Sequence[Example], labelled: Sequence[tuple[np.ndarray, np.ndarray]], draws: int, seed: int, tally: "Tally"
    ) -> None:  # fmt: skip
        self.examples, self.labelled, self.tally = examples, labelled, tally
        # The labels as they are, then moved: one product counts them all.
        self.orders = [
            np.concatenate([labels[None], rotations(labels, draws, (seed, crc32(e.id.encode())))])
            for e, (_, labels) in zip(examples, labelled, strict=True)
        ]
        self.spread: list[dict[str, list[float]]] = [{name: [] for name in MEASURES} for _ in examples]

    def take(self, use: Use) -> None:
        for i, (at, labels) in enumerate(self.labelled):
            used = use.used[i].cpu().numpy()[at]
            counts = count_uses(used, self.orders[i], len(NAMES))
            present = np.unique(labels)
            js, mi = jensen_shannon(counts[:, present]), mutual_information(counts)
            for name, value in zip(MEASURES, (js[0], mi[0], js[1:].mean(), mi[1:].mean()), strict=True):
                self.spread[i][name].append(float(value))
            weight = use.weight[i].float().cpu().numpy()[at]
            self.tally.add(use.layer, counts[0], labels, weight)

    def rows(self) -> Rows:
        made: Rows = []
        for example, (_, labels), table in zip(self.examples, self.labelled, self.spread, strict=True):
            made += [{"example": example.id, "what": "spread", "key": name, "values": values} for name, values in table.items()]
            made += [
                {"example": example.id, "what": "tokens", "modality": NAMES[k], "n": int((labels == k).sum())}
                for k in np.unique(labels)
            ]
        return made


class Tally:
    """Sums over examples: how many tokens of each modality use each unit, with what weight, and how media and words differ."""

    def __init__(self) -> None:
        self.sums: dict[tuple[str, str, int], np.ndarray] = {}  # (what is summed, modality, layer): (unit)
        self.counts: dict[tuple[str, str, int], int] = {}  # tokens, or examples, that the sum is over

    def add(self, layer: int, counts: np.ndarray, labels: np.ndarray, weight: np.ndarray) -> None:
        tokens = np.bincount(labels, minlength=len(NAMES))
        text = NAMES.index("text")
        for k in np.nonzero(tokens)[0]:
            self._add("uses", NAMES[k], layer, counts[k], int(tokens[k]))
            self._add("weight", NAMES[k], layer, weight[labels == k].sum(0), int(tokens[k]))
            if k != text:
                gap = counts[k] / tokens[k] - counts[text] / tokens[text]
                self._add("gap", NAMES[k], layer, gap, 1)
                self._add("gap_squared", NAMES[k], layer, gap**2, 1)

    def _add(self, key: str, modality: str, layer: int, vector: np.ndarray, n: int) -> None:
        place = (key, modality, layer)
        self.sums[place] = self.sums.get(place, 0.0) + vector.astype(np.float64)
        self.counts[place] = self.counts.get(place, 0) + n

    def rows(self) -> list[dict[str, Any]]:
        return [
            {"what": "sum", "key": key, "modality": modality, "layer": layer, "vector": vector, "n": self.counts[key, modality, layer]}
            for (key, modality, layer), vector in self.sums.items()
        ]  # fmt: skip
