"""Which positions, at which layers, carry the fact that was changed?

Activation patching between two runs that differ in one fact (NOTICE, arXiv 2406.16320): activations of the clean run are put into
the corrupt one, position group by position group, layer by layer, point by point, in windows of layers (MultiModalCausalTrace, arXiv
2406.04236) and head by head. Every patch is replayed from one pass of the corrupt run; beside the exact effects stands what one
pass forward and back estimates.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
import torch

from probe.analysis.flow import default_window
from probe.analysis.patching import effect, logit_difference
from probe.edits import Patch, window
from probe.errors import DataError, SightlineError, StudyError, did_you_mean
from probe.example import Example
from probe.patching import SITES, STREAM, Activations, Attribution, attribute, capture, nudges, patches
from probe.replay import sweep
from probe.subject import Encoded, Subject
from studies.data import Data
from studies.pairs import ROLES, Pair, begin, check_pair, groups_of, pairs_of
from studies.run import Run, finite
from studies.study import Setting, Summary, describe, study
from studies.work import Rows, read_units, sift

SCHEMA = pa.schema([
    ("example", pa.string()), ("kind", pa.string()), ("what", pa.string()), ("point", pa.string()), ("group", pa.string()),
    *((name, pa.int32()) for name in ("layer", "start", "stop", "head", "n_positions")),
    *((name, pa.float64()) for name in ("clean", "corrupt", "patched", "effect", "p_clean", "attribution", "integrated")),
    ("text", pa.string()), ("reason", pa.string()),
])  # fmt: skip
NUDGED = "nudged"  # the object's positions, changed by as much in a random direction: no group of positions, but a control
WINDOWED = ("attn_out", "mlp_out")  # a state put into the stream takes the place of all that earlier layers added


@dataclass(frozen=True)
class Plan:
    """What is done with each pair."""

    width: int
    least: float
    only_correct: bool
    max_new_tokens: int
    steps: int
    method: str
    seed: int


@dataclass(frozen=True)
class Site:
    """One thing that is patched: a row of the records without its numbers."""

    what: str
    point: str
    group: str
    layer: int
    layers: range
    positions: np.ndarray
    head: int = -1

    def patch(self, clean: Activations, corrupt: Activations, row: int, seed: Sequence[int]) -> tuple[Patch, ...]:
        if self.group == NUDGED:
            return nudges(clean, corrupt, row, self.point, self.layers, self.positions.tolist(), seed)
        heads = None if self.head < 0 else [self.head]
        return patches(clean, row, self.point, self.layers, self.positions.tolist(), heads)

    def estimate(self, found: dict[str, torch.Tensor], row: int) -> float | None:
        """The first-order effect in logits; None where several layers are patched together, or nothing was estimated."""
        if not found or self.what not in ("site", "head") or self.group == NUDGED:
            return None
        scores = found[self.point][self.layer, row, self.positions]
        return float((scores[:, self.head] if self.head >= 0 else scores).sum())


@study
def patching(
    setting: Setting,
    *,
    window_width: int | None = None,
    least: float = 0.1,
    ig_steps: int = 0,
    only_correct: bool = True,
    max_new_tokens: int = 16,
    method: str = "replay",
) -> Summary:
    """Which positions, at which layers, carry the fact that was changed?

    `window_width` are the layers whose blocks are patched together (default: that of the study information-flow); `least` the
    logits by which the two runs must differ for an effect to be defined; `ig_steps` the steps of the integrated attribution (0:
    none; 5 are usual); `method` is `replay` or `naive`, one forward for each patch, for architectures that cannot be replayed. Raises
    StudyError for a model with layers without softmax attention, whose heads are none to patch.
    """
    subject = setting.subject
    if None in subject.anatomy.attention:
        raise StudyError(
            f"the study patches the heads of every layer, and layer {subject.anatomy.attention.index(None)} of this {subject.anatomy.family} model "
            f"has no softmax attention: it takes models whose layers all attend"
        )
    if method not in ("replay", "naive"):
        raise StudyError(f"there is no method {method!r}{did_you_mean(method, ('replay', 'naive'))}")
    if least < 0 or ig_steps < 0:
        raise StudyError("the least difference and the steps of the integrated attribution cannot be below zero")
    width = default_window(subject.n_layers) if window_width is None else window_width
    window(0, width, subject.n_layers)
    plan = Plan(width, least, only_correct, max_new_tokens, ig_steps, method, setting.seed)
    found, broken = pairs_of(setting.data, setting.seed)
    config = {**vars(plan), "data": setting.data.name, "fingerprint": setting.data.fingerprint, "limit": len(setting.data),
              "batch": setting.batch, "padding": setting.padding}  # fmt: skip
    run = Run.open(setting.out, "patching", config, describe(subject), SCHEMA)
    with run.recorded():
        return _carry_out(setting, plan, run, found, broken)


def _carry_out(setting: Setting, plan: Plan, run: Run, found: list[Pair], broken: dict[str, str]) -> Summary:
    from studies.patching_report import figures, report, summarise

    pairs = {pair.clean.id: pair for pair in found}
    data = Data(setting.data.name, tuple(pair.clean for pair in found), setting.data.fingerprint)
    rows = read_units(
        replace(setting, data=data), run, "patching",
        lambda examples: unit(setting, [pairs[example.id] for example in examples], plan),
    )  # fmt: skip
    summary = finite(summarise(rows, broken, setting.subject.n_layers, plan.seed))
    summary |= {"run": str(run.folder), "window": plan.width, "deepstack": setting.subject.anatomy.row.deepstack}
    figures(run, summary)
    run.finish(summary, report(summary, setting))
    return summary


# --- one unit of work ------------------------------------------------------------------------------------------------


def unit(setting: Setting, pairs: Sequence[Pair], plan: Plan) -> Rows:
    """All rows of some pairs; a pair that cannot be used is a row that says why."""
    subject = setting.subject
    by_id = {pair.clean.id: pair for pair in pairs}
    usable, rows = sift([pair.clean for pair in pairs], lambda example: check_pair(subject, by_id[example.id]))
    rows = [{**row, "reason": "cannot be compared"} for row in rows]
    answered = [(by_id[example.id], told) for example, told in zip(usable, _told(setting, usable, by_id, plan), strict=True)]
    ready: list[tuple[Pair, tuple[int, int]]] = []
    for pair, told in answered:
        try:
            ready.append((pair, _tokens(subject, pair, told, plan)))
        except SightlineError as error:
            rows.append(
                {
                    "example": pair.clean.id,
                    "what": "skipped",
                    "text": str(error),
                    "reason": "not answered correctly and differently",
                }
            )
    return rows + (_patched(setting, [p for p, _ in ready], [t for _, t in ready], plan) if ready else [])  # fmt: skip


def _told(setting: Setting, usable: Sequence[Example], by_id: dict[str, Pair], plan: Plan) -> list[tuple[str, str]]:
    """What the model answers to both examples of each pair."""
    if not usable:
        return []
    corrupt = [by_id[example.id].corrupt for example in usable]
    both = (setting.subject.generate(list(examples), plan.max_new_tokens) for examples in (usable, corrupt))
    return list(zip(*both, strict=True))


def _tokens(subject: Subject, pair: Pair, told: tuple[str, str], plan: Plan) -> tuple[int, int]:
    """The first tokens of the two answers, as the model writes them where it is right.

    Raises DataError for a pair that it does not answer correctly, where only such pairs count, or whose answers begin alike.
    """
    answers = []
    for role, example, said in zip(ROLES, (pair.clean, pair.corrupt), told, strict=True):
        right = said.strip().lower().rstrip(".") == (example.answer or "").strip().lower()
        if plan.only_correct and not right:
            raise DataError(f"its {role} question is answered {said!r}, not {example.answer!r}")
        answers.append(said if right else (example.answer or ""))
    return begin(subject, pair, answers)


def _patched(setting: Setting, pairs: list[Pair], tokens: list[tuple[int, int]], plan: Plan) -> Rows:
    """One clean pass, one corrupt pass forward and back, and the replay of every patch."""
    subject = setting.subject
    clean_encoded = subject.encode([pair.clean for pair in pairs], setting.padding)
    encoded = subject.encode([pair.corrupt for pair in pairs], setting.padding)
    clean, corrupt = capture(subject, clean_encoded), capture(subject, encoded, STREAM)
    estimated = attribute(subject, encoded, clean, tokens, SITES, plan.steps)
    sites = [
        list(_sites(groups_of(pair, clean_encoded, encoded, i, plan.seed), encoded, i, subject, plan))
        for i, pair in enumerate(pairs)
    ]
    seeds = [[plan.seed, *pair.clean.id.encode()] for pair in pairs]
    entries = iter([[site.patch(clean, corrupt, i, seeds[i]) for site in each] for i, each in enumerate(sites)])
    swept = sweep(subject, encoded, lambda _: next(entries), method=plan.method)  # type: ignore[arg-type]
    return [
        row for i, pair in enumerate(pairs)
        for row in _rows(pair, i, tokens[i], sites[i], clean.logits[i], swept.clean[i], swept.edited[i], estimated, plan)
    ]  # fmt: skip


def _sites(groups: dict[str, np.ndarray], encoded: Encoded, row: int, subject: Subject, plan: Plan) -> Iterator[Site]:
    """Everything that is patched in one example. First all positions as they enter layer 0, which gives back the clean run."""
    layers = range(subject.n_layers)
    yield Site("all", "resid_pre", "real", 0, range(1), encoded.maps[row].positions("real"))
    for group, positions in {**groups, NUDGED: groups["object"]}.items():
        if not len(positions):
            continue
        for point in STREAM:
            yield from (Site("site", point, group, layer, range(layer, layer + 1), positions) for layer in layers)
        for point in WINDOWED:
            yield from (
                Site("window", point, group, layer, window(layer, plan.width, subject.n_layers), positions) for layer in layers
            )
    for layer in layers:
        for head in range(subject.n_heads):
            yield Site("head", "z", "last", layer, range(layer, layer + 1), groups["last"], head)


def _rows(
    pair: Pair, i: int, tokens: tuple[int, int], sites: list[Site], clean_logits: torch.Tensor, corrupt_logits: torch.Tensor,
    edited: torch.Tensor, estimated: Attribution, plan: Plan,
) -> Rows:  # fmt: skip
    own = {"example": pair.clean.id, "kind": pair.kind}
    clean, corrupt = (float(logit_difference(logits.double(), *tokens)) for logits in (clean_logits, corrupt_logits))
    patched = logit_difference(edited.double(), *tokens).cpu().numpy()
    effects = effect(patched, clean, corrupt, plan.least)
    if np.isnan(effects).any():
        text = f"its runs differ by {clean - corrupt:.3f} logits: an effect is not defined"
        return [{**own, "what": "skipped", "text": text, "reason": "runs too alike"}]
    shares = edited.double().softmax(-1)[:, tokens[0]].cpu().numpy()
    before, after = (float(logits.double().softmax(-1)[tokens[0]]) for logits in (corrupt_logits, clean_logits))
    rows: Rows = [
        {**own, "what": "pair", "clean": clean, "corrupt": corrupt, "text": f"{pair.clean.answer} / {pair.corrupt.answer}"},
        {**own, "what": "probability", "clean": after, "corrupt": before},
    ]
    for k, site in enumerate(sites):
        estimates = {
            name: None if (logits := site.estimate(found, i)) is None else logits / (clean - corrupt)
            for name, found in (("attribution", estimated.plain), ("integrated", estimated.integrated))
        }
        rows.append({
            **own, "what": site.what, "point": site.point, "group": site.group, "layer": site.layer, "start": site.layers.start,
            "stop": site.layers.stop, "head": site.head, "n_positions": len(site.positions), "patched": float(patched[k]),
            "effect": float(effects[k]), "p_clean": float(shares[k]), **estimates,
        })  # fmt: skip
    return rows
