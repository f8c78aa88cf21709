"""Which positions does the answer depend on, by attention and by gradient?

Five ways of scoring positions for the model's own first answer token: attention, rollout, gradient-weighted attention, gradient times
input, integrated gradients. Each is held against what is known: does it point at the object that the question is about, and does the
answer fall when its highest positions are taken away, further than with random ones?
"""

from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
import torch

from probe.analysis.relevance import FUSIONS, RANDOM, ranked, share_inside
from probe.edits import Ablate, Edit, Knockout
from probe.errors import DataError, ExampleError, StudyError, did_you_mean
from probe.example import Example, Region
from probe.recorders import Residual
from probe.relevance import METHODS, SHOWN, Relevance
from probe.relevance import relevance as score_positions
from probe.subject import Encoded, Subject
from probe.tokens import TokenMap
from probe.tracing import last_logits, trace
from studies.run import Run, finite
from studies.study import Setting, Summary, describe, study
from studies.work import Rows, picked, read_units, refuse_nothing, sift

SCHEMA = pa.schema([
    *((name, pa.string()) for name in ("example", "what", "method", "order", "text")),
    *((name, pa.float64()) for name in ("share", "value", "before", "area")), ("n", pa.int32()), ("values", pa.list_(pa.float64())),
])  # fmt: skip
REFERENCES, DRAWN = 32, 4  # examples whose mean stands for nothing shown; pictures that maps are laid over
BASELINES, DELETIONS = ("mean", "zero"), ("ablate", "knockout")
ORDERS = ("highest", "lowest")


@dataclass(frozen=True)
class Plan:
    """What is done with each example."""

    methods: tuple[str, ...]
    steps: int
    baseline: str
    fusion: str
    deletion: str
    shares: tuple[float, ...]
    seed: int
    drawn: frozenset[str]


@study
def relevance(
    setting: Setting,
    *,
    methods: str = "all",
    steps: int = 50,
    baseline: str = "mean",
    fusion: str = "mean",
    deletion: str = "ablate",
    shares: str = "0.05,0.15,0.4",
) -> Summary:
    """Which positions does the answer depend on, by attention and by gradient?

    `methods` is `all` or names separated by commas (attention, rollout, gradient-attention, gradient-input, integrated-gradients); `steps`
    and `baseline` (`mean`: the mean state of what is shown over the data; `zero`) are those of integrated gradients; `fusion` of
    rollout's heads (`mean`, `min`, `max`). `deletion` takes positions away as `ablate` (their states become the baseline) or `knockout` (nobody
    can look at them), in `shares` of those that show something; the first share is the headline.
    """
    chosen = METHODS if methods == "all" else tuple(name.strip() for name in methods.split(","))
    for option, values, known in (
        ("method", chosen, METHODS), ("baseline", (baseline,), BASELINES), ("deletion", (deletion,), DELETIONS), ("fusion", (fusion,), FUSIONS),
    ):  # fmt: skip
        for value in values:
            if value not in known:
                raise StudyError(f"there is no {option} {value!r}{did_you_mean(value, known)}")
    data = setting.data
    plan = Plan(
        chosen, steps, baseline, fusion, deletion, _shares(shares), setting.seed, frozenset(e.id for e in data.examples[:DRAWN])
    )
    options = {
        "methods": chosen,
        "steps": steps,
        "baseline": baseline,
        "fusion": fusion,
        "deletion": deletion,
        "shares": plan.shares,
    }
    config = {"data": data.name, "fingerprint": data.fingerprint, "limit": len(data), "batch": setting.batch,
              "padding": setting.padding, "seed": setting.seed, **options}  # fmt: skip
    run = Run.open(setting.out, "relevance", config, describe(setting.subject), SCHEMA)
    with run.recorded():
        return _carry_out(setting, plan, run)


def _shares(text: str) -> tuple[float, ...]:
    try:
        found = tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise StudyError(f"shares are numbers separated by commas, not {text!r}") from error
    if not all(0 < share < 1 for share in found):
        raise StudyError(f"shares of positions to take away lie between 0 and 1, unlike {text!r}")
    return found


def _carry_out(setting: Setting, plan: Plan, run: Run) -> Summary:
    from studies.relevance_report import figures, report, summarise

    nothing = _nothing(setting, plan)
    rows = read_units(setting, run, "relevance", lambda examples: unit(setting, plan, examples, nothing))
    refuse_nothing(rows, len(picked(rows, what="answer")))
    summary = finite(summarise(rows, plan, setting.seed))
    summary["run"] = str(run.folder)
    maps = figures(run, rows, summary, setting, plan)
    run.finish(summary, report(summary, setting, plan, maps))
    return summary


def _nothing(setting: Setting, plan: Plan) -> torch.Tensor:
    """What a position that shows nothing holds as it enters the first layer (width): the mean over examples evenly drawn, or zero."""
    examples = setting.data.examples
    drawn = [examples[i] for i in sorted({round(i) for i in np.linspace(0, len(examples) - 1, min(REFERENCES, len(examples)))})]
    usable, rows = sift(drawn, lambda example: _check(setting.subject, example))
    if not usable:
        raise DataError(f"none of the {len(rows)} examples could be used; the first: {rows[0]['example']}: {rows[0]['text']}")
    means = []
    for example in usable:
        encoded = _grouped(setting.subject.encode(example))
        means.append(trace(setting.subject, encoded, [Residual("resid_pre", [0], "shown", "mean")])["states"].tensor[0, 0])
    mean = torch.stack(means).float().mean(0)
    return mean if plan.baseline == "mean" else torch.zeros_like(mean)


# --- one unit of work ------------------------------------------------------------------------------------------------


def _check(subject: Subject, example: Example) -> None:
    """Raises the reason for which nothing of an example could be scored."""
    token_map = subject.encode(example).maps[0]
    if token_map.crossed is not None:
        raise ExampleError(
            f"the picture of example {example.id!r} is not in the sequence of this {subject.anatomy.family} model"
        )
    if not len(_shown(token_map)):
        raise ExampleError(f"example {example.id!r} shows nothing: it has no picture, video or sound")


def _shown(token_map: TokenMap) -> np.ndarray:
    return np.sort(np.concatenate([token_map.positions(kind) for kind in SHOWN]))


def _grouped(encoded: Encoded) -> Encoded:
    return encoded.with_maps([token_map.with_groups(shown=_shown(token_map)) for token_map in encoded.maps])


def unit(setting: Setting, plan: Plan, examples: list[Example], nothing: torch.Tensor) -> Rows:
    """All rows of some examples; one that shows nothing is a row that says why."""
    subject = setting.subject
    usable, rows = sift(examples, lambda example: _check(subject, example))
    if not usable:
        return rows
    encoded = _grouped(subject.encode(usable, setting.padding))
    found = score_positions(subject, encoded, plan.methods, steps=plan.steps, baseline=nothing, fusion=plan.fusion)
    clean = last_logits(subject, encoded).softmax(-1)
    before = clean.gather(1, found.targets.to(clean.device)[:, None])[:, 0].tolist()
    for i, example in enumerate(usable):
        token = subject.tokenizer.decode([int(found.targets[i])]).strip()
        gap = {} if found.gap is None or found.rise is None else {"value": float(found.gap[i]), "area": float(found.rise[i])}
        rows.append({"example": example.id, "what": "answer", "text": token, "before": before[i], **gap})
        rows += _score_rows(plan, encoded.maps[i], example, found, i)
    return rows + _deletion_rows(subject, plan, encoded, found, before, nothing)


def _score_rows(plan: Plan, token_map: TokenMap, example: Example, found: Relevance, i: int) -> Rows:
    """Where each method's relevance lies: by segment, on the object's patches, on those of the mirrored box."""
    rows: Rows = []
    shown = _shown(token_map)
    boxes = _boxes(token_map, example, shown)
    for method in plan.methods:
        scores = found.scores[method][i].double().numpy().copy()
        own = {"example": example.id, "method": method}
        if method in ("rollout", "gradient-attention"):
            scores[token_map.last] = max(0.0, scores[token_map.last] - 1.0) if method == "gradient-attention" else 0.0
        for segment in dict.fromkeys(token_map.segments):
            if segment != "pad":
                value = share_inside(scores, token_map.positions(segment))
                rows.append({**own, "what": "segment", "text": segment, "value": value})
        for name, inside in boxes.items():
            value = share_inside(scores[shown], np.searchsorted(shown, inside))
            rows.append(
                {**own, "what": "mass", "text": name, "value": value, "area": len(inside) / len(shown), "n": len(inside)}
            )
        grid = next((g for g in reversed(token_map.grids) if (g.kind, g.picture) == ("image", 0)), None)
        if example.id in plan.drawn and grid is not None:
            rows.append({**own, "what": "map", "values": scores[grid.positions[0]].ravel().tolist()})
    return rows


def _boxes(token_map: TokenMap, example: Example, shown: np.ndarray) -> dict[str, np.ndarray]:
    """Positions of what the question is about, and of the same boxes mirrored in the picture's centre, as far as they lie elsewhere."""
    if not example.regions or not token_map.geometry:
        return {}
    inside = np.intersect1d(token_map.in_boxes(example.regions), shown)
    mirrored = [_mirrored(region, *token_map.sizes[region.picture]) for region in example.regions]
    across = np.setdiff1d(np.intersect1d(token_map.in_boxes(mirrored), shown), inside)
    return {name: found for name, found in (("object", inside), ("mirrored", across)) if len(found)}


def _mirrored(region: Region, width: int, height: int) -> Region:
    left, top, right, bottom = region.box
    return replace(region, box=(width - right, height - bottom, width - left, height - top))


# --- taking positions away -------------------------------------------------------------------------------------------


def _deletion_rows(
    subject: Subject, plan: Plan, encoded: Encoded, found: Relevance, before: list[float], nothing: torch.Tensor
) -> Rows:
    """The probability of the answer when a share of what is shown is taken away, by each method's order and at random."""
    orders = {(method, order): _order(encoded, found.scores[method], order) for method in plan.methods for order in ORDERS}
    orders[RANDOM, RANDOM] = [_shuffled(plan, e, m) for e, m in zip(encoded.examples, encoded.maps, strict=True)]
    rows: Rows = []
    for (method, order), places in orders.items():
        for share in plan.shares:
            gone = [each[: max(1, round(share * len(each)))] for each in places]
            maps = [token_map.with_groups(gone=each) for token_map, each in zip(encoded.maps, gone, strict=True)]
            logits = trace(subject, encoded.with_maps(maps), edit=[_deletion(plan, nothing)]).logits
            after = logits.softmax(-1).gather(1, found.targets.to(logits.device)[:, None])[:, 0].tolist()
            rows += [
                {"example": example.id, "what": "deleted", "method": method, "order": order, "share": share, "before": was,
                 "value": was - now, "n": len(each)}
                for example, was, now, each in zip(encoded.examples, before, after, gone, strict=True)
            ]  # fmt: skip
    return rows


def _deletion(plan: Plan, nothing: torch.Tensor) -> Edit:
    if plan.deletion == "knockout":
        return Knockout("text", "gone")
    return Ablate("resid_pre", [0], "gone", "mean", reference=nothing)


def _order(encoded: Encoded, scores: torch.Tensor, order: str) -> list[np.ndarray]:
    made = []
    for i, token_map in enumerate(encoded.maps):
        shown = _shown(token_map)
        own = scores[i].double().numpy()[shown]
        made.append(shown[ranked(own if order == "highest" else -own)])
    return made


def _shuffled(plan: Plan, example: Example, token_map: TokenMap) -> np.ndarray:
    return np.random.default_rng([plan.seed, *example.id.encode()]).permutation(_shown(token_map))
