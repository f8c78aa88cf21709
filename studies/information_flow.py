"""Where, in which layers, does what the model saw reach its answer?

The whole of Cross-modal Information Flow (arXiv 2411.18620) on any model and any data: attention edges are knocked out
in windows of layers, and the change in the probability of the model's own first answer token says which edges carried
it. Beside the causal flow stands the soft one (attention mass on the same edges); beside the windows, the cumulative
cut-off (the image hidden from layer l on), the answer's probability read off every layer, and the controls.
"""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from probe.analysis.flow import FLOWS, METRICS, change, default_window, flow_edges
from probe.edits import Knockout, window
from probe.errors import DataError, ExampleError, SightlineError, StudyError, did_you_mean
from probe.example import Example
from probe.recorders import Lens, Mass
from probe.replay import Entry, sweep
from probe.subject import Encoded, Side, Subject
from probe.tokens import TokenMap
from probe.tracing import Trace, last_logits, trace
from studies.run import Run, finite
from studies.study import Setting, Summary, describe, progress, study, units

SCHEMA = pa.schema([
    ("example", pa.string()), ("kind", pa.string()), ("what", pa.string()), ("flow", pa.string()), ("layer", pa.int32()),
    ("start", pa.int32()), ("stop", pa.int32()), ("n_rows", pa.int32()), ("n_columns", pa.int32()),
    *((name, pa.float64()) for name in ("p_before", "p_after", *METRICS)),
    ("mass", pa.float64()), ("entropy", pa.float64()), ("sink", pa.float64()), ("word", pa.string()), ("prob", pa.float64()),
    ("rank", pa.int32()), ("text", pa.string()), ("correct", pa.bool_()),
])  # fmt: skip
CONTROLS = {"random->question": ("question", "random"), "random->last": ("last", "random-question")}
MASSES = Mass(rows=("question", "last"), columns=("media", "question", "last", "related", "other"))
WORDS = ("lower-case", "capitalised", "false option")


@dataclass(frozen=True)
class Plan:
    """What is done with each example."""

    flows: tuple[str, ...]
    width: int
    norm: str
    only_correct: bool
    max_new_tokens: int
    seed: int
    method: str
    padding: Side = "left"


@study
def information_flow(
    setting: Setting,
    *,
    flows: str = "all",
    window_width: int | None = None,
    tolerance: float = 2.0,
    norm: str = "final",
    only_correct: bool = True,
    max_new_tokens: int = 16,
    method: str = "replay",
) -> Summary:
    """Where, in which layers, does what the model saw reach its answer?

    `flows` is `all` or names separated by commas; `window_width` the layers knocked out at once (default: 9 from 40
    layers up, 7 from 28 up, else 0.22 of them); `tolerance` the percent change of the answer's probability below which
    the image no longer matters; `norm` the lens (`final`, or `none` as in the published code); `method` is `replay` or
    `naive`, one forward for each entry, for architectures that cannot be replayed.
    """
    subject, data = setting.subject, setting.data
    chosen = tuple(FLOWS) if flows == "all" else tuple(name.strip() for name in flows.split(","))
    for name in chosen:
        flow_edges(name)
    for option, value, known in (("norm", norm, ("final", "none")), ("method", method, ("replay", "naive"))):
        if value not in known:
            raise StudyError(f"there is no {option} {value!r}{did_you_mean(value, known)}")
    width = default_window(subject.n_layers) if window_width is None else window_width
    window(0, width, subject.n_layers)
    plan = Plan(chosen, width, norm, only_correct, max_new_tokens, setting.seed, method, setting.padding)
    config = {**vars(plan), "tolerance": tolerance, "data": data.name, "fingerprint": data.fingerprint,
              "limit": len(data), "batch": setting.batch}  # fmt: skip
    run = Run.open(setting.out, "information-flow", config, describe(subject), SCHEMA)
    with run.recorded():
        return _carry_out(setting, plan, run, tolerance)


def _carry_out(setting: Setting, plan: Plan, run: Run, tolerance: float) -> Summary:
    from studies.information_flow_report import figures, report, summarise

    work = units(len(setting.data), setting.batch)
    todo = set(run.pending(key for key, _ in work))
    with progress("information flow", len(setting.data), setting.quiet) as advance:
        for key, items in work:
            if key in todo:
                run.write(key, unit(setting.subject, [setting.data.examples[i] for i in items], plan))
            advance(len(items))
    rows = run.sorts(key for key, _ in work)
    summary = finite(summarise(rows, plan, setting.subject.n_layers, tolerance))
    summary["run"] = str(run.folder)
    figures(run, summary)
    run.finish(summary, report(run, summary, setting))
    return summary


# --- one unit of work ------------------------------------------------------------------------------------------------


def unit(subject: Subject, examples: list[Example], plan: Plan) -> list[dict[str, Any]]:
    """All rows of some examples; an example that cannot be put to the model is a row that says why."""
    usable, rows = _usable(subject, examples)
    if not usable:
        return rows
    encoded = _grouped(subject.encode(usable, plan.padding), plan.seed)
    told = subject.generate(encoded if plan.padding == "left" else subject.encode(usable), plan.max_new_tokens)
    blind = _blind(subject, usable, plan.padding)
    right = [_right(answer, example) for answer, example in zip(told, usable, strict=True)]
    lens = _lens(subject, encoded, told, plan)
    recorded = trace(subject, encoded, [MASSES, lens])
    studied = [ok or not plan.only_correct for ok in right]
    labels = [_entries(m, plan, subject.n_layers, full) for m, full in zip(encoded.maps, studied, strict=True)]
    entries = iter([[entry for *_, entry in each] for each in labels])
    swept = sweep(subject, encoded, lambda _: next(entries), method=plan.method)  # type: ignore[arg-type]
    for i, example in enumerate(usable):
        own = {"example": example.id, "kind": example.tags.get("kind", "")}
        token = int(swept.clean[i].argmax())
        changes = change(swept.clean[i], swept.edited[i], token)
        for j, (what, flow, layer, layers, entry) in enumerate(labels[i]):
            rows.append({**own, "what": what, "flow": flow, "layer": layer, "start": layers.start, "stop": layers.stop,
                         **_sizes(entry, encoded.maps[i]), **{name: float(getattr(changes, name)[j]) for name in changes._fields}})  # fmt: skip
        rows.append({**own, "what": "answer", "text": told[i], "correct": right[i]})
        begins = set(_spellings(subject, example))
        seen = {"intact": swept.clean[i], "hidden-image": swept.edited[i][0]} | (
            {} if blind is None else {"no-image": blind[i]}
        )
        for what, logits in seen.items():
            best = int(logits.argmax())
            rows.append({**own, "what": f"{what} token", "text": subject.tokenizer.decode([best]), "correct": best in begins})
        if studied[i]:
            rows += [{**own, **row} for row in _recorded_rows(recorded, plan, i, encoded.maps[i])]
            rows += [{**own, **row} for row in _lens_rows(recorded, i, lens.track[i], bool(_false_option(example)))]
    return rows


def _blind(subject: Subject, usable: list[Example], padding: Side) -> torch.Tensor | None:
    """What the model says of the same questions with nothing shown; None of a model that always wants a picture (BLIP-2)."""
    try:
        encoded = subject.encode([subject.without_media(example) for example in usable], padding)
    except ExampleError:
        return None
    return last_logits(subject, encoded)


def _usable(subject: Subject, examples: list[Example]) -> tuple[list[Example], list[dict[str, Any]]]:
    """The examples that can be put to the model with a picture and an answer, and a row for each that cannot."""
    usable, rows = [], []
    for example in examples:
        try:
            if example.answer is None:
                raise DataError(f"example {example.id!r} has no answer to compare with")
            if not any(example.media.values()):
                raise DataError(f"example {example.id!r} has no picture, video or sound")
            subject.render(example)
            subject.render(subject.without_media(example))
            subject.open_media(example)
        except SightlineError as error:
            rows.append({"example": example.id, "kind": example.tags.get("kind", ""), "what": "skipped", "text": str(error)})
        else:
            usable.append(example)
    return usable, rows


def _grouped(encoded: Encoded, seed: int) -> Encoded:
    """Names the positions of the related and the other patches, and random ones of equal number as controls."""
    maps = []
    for token_map, example in zip(encoded.maps, encoded.examples, strict=True):
        space = token_map.crossed or token_map  # where the picture's keys are
        shown = np.concatenate([space.positions(kind) for kind in ("image", "video", "audio")])
        rng = np.random.default_rng([seed, *example.id.encode()])
        related = other = np.array([], dtype=np.int64)
        if example.regions and space.geometry:
            related = np.intersect1d(space.in_boxes(example.regions), shown)
            other = np.setdiff1d(shown, related)
        groups = {
            "related": related, "other": other, "random": _draw(rng, other, len(related)),
            "random-question": _draw(rng, shown, len(token_map.positions("question"))),
        }  # fmt: skip
        if token_map.crossed is not None:
            token_map = replace(token_map, crossed=token_map.crossed.with_groups(**groups))
            groups = dict.fromkeys(groups, np.array([], dtype=np.int64))
        maps.append(token_map.with_groups(**groups))
    return encoded.with_maps(maps)


def _draw(rng: np.random.Generator, positions: np.ndarray, count: int) -> np.ndarray:
    return rng.choice(positions, size=min(count, len(positions)), replace=False)


def _entries(token_map: TokenMap, plan: Plan, n_layers: int, full: bool) -> list[tuple[str, str, int, range, Entry]]:
    """(what, flow, layer, layers, knock-out) of every entry; the image hidden everywhere comes first."""
    everywhere = range(n_layers)
    made: list[tuple[str, str, int, range, Entry]] = [
        ("hidden", "image->text", 0, everywhere, Knockout("text", "media", everywhere)),
    ]
    if not full:
        return made
    made.append(("empty", "nothing->question", 0, everywhere, Knockout("question", [], everywhere)))
    flows = [("flow", name, FLOWS[name]) for name in plan.flows] + [
        ("control", name, edges) for name, edges in CONTROLS.items()
    ]
    for what, name, (rows, columns) in flows:
        if not len(token_map.positions(rows)) or not token_map.reach(columns):
            continue  # no box says where the answer lies, or there is no such text: not a zero, but nothing to measure
        for center in range(n_layers):
            layers = window(center, plan.width, n_layers)
            made.append((what, name, center, layers, Knockout(rows, columns, layers)))
    for start in range(1, n_layers):
        layers = range(start, n_layers)
        made.append(("cumulative", "image->text", start, layers, Knockout("text", "media", layers)))
    return made


def _sizes(entry: Entry, token_map: TokenMap) -> dict[str, int]:
    assert isinstance(entry, Knockout)
    return {"n_rows": len(token_map.positions(entry.rows)), "n_columns": token_map.reach(entry.columns)}


def _spellings(subject: Subject, example: Example) -> list[int]:
    """First tokens of the right answer in lower case, capitalised, and as it was given."""
    answer = (example.answer or "").strip()
    return subject.first_tokens([answer.lower(), answer.capitalize(), answer], example)


def _lens(subject: Subject, encoded: Encoded, told: list[str], plan: Plan) -> Lens:
    track = []
    for example, answer in zip(encoded.examples, told, strict=True):
        wrong = _false_option(example)
        same_case = wrong.capitalize() if answer[:1].isupper() else wrong.lower()
        false_option = subject.first_tokens([same_case], example)[0] if wrong else 0
        track.append((*_spellings(subject, example)[:2], false_option))
    return Lens(track=tuple(track), norm=plan.norm)


def _false_option(example: Example) -> str:
    """The first choice that is not the right answer; empty where there is none."""
    right = (example.answer or "").strip().lower()
    return next((choice.strip() for choice in example.choices if choice.strip().lower() != right), "")


def _recorded_rows(recorded: Trace, plan: Plan, i: int, token_map: TokenMap) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    mass, entropy, sink = recorded["mass"], recorded["entropy"], recorded["sink"]
    for name in plan.flows:
        source, target = FLOWS[name]
        if not len(token_map.positions(source)) or not token_map.reach(target):
            continue
        per_layer = mass.at(batch=i, row_group=source, column_group=target).mean(-1)
        rows += [
            {"what": "mass", "flow": name, "layer": layer, "mass": float(value)}
            for layer, value in zip(mass.labels["layer"], per_layer.tolist(), strict=True)
        ]
    for group in (name for name in mass.labels["row_group"] if len(token_map.positions(name))):
        both = zip(entropy.at(batch=i, row_group=group).mean(-1), sink.at(batch=i, row_group=group).mean(-1), strict=True)
        rows += [
            {"what": "row", "flow": group, "layer": layer, "entropy": float(a), "sink": float(b)}
            for layer, (a, b) in zip(mass.labels["layer"], both, strict=True)
        ]
    return rows


def _lens_rows(recorded: Trace, i: int, track: tuple[int, ...], has_false_option: bool) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    prob, rank = recorded["lens_prob"], recorded["lens_rank"]
    lower, capital, false_option = track
    for word, name in enumerate(WORDS):
        if name == "false option" and (not has_false_option or false_option in (lower, capital)):
            continue
        if name != "false option" and lower == capital:
            continue  # one token for both spellings (a numeral): it is neither
        rows += [
            {"what": "lens", "word": name, "layer": layer, "prob": float(prob.tensor[k, i, 0, word]), "rank": int(rank.tensor[k, i, 0, word])}
            for k, layer in enumerate(prob.labels["layer"])
        ]  # fmt: skip
    return rows


def _right(text: str, example: Example) -> bool:
    """The published filter: the answer, stripped and in lower case, is the right one."""
    return text.strip().lower().rstrip(".") == (example.answer or "").strip().lower()
