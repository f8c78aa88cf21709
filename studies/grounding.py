"""Does the attention of a word find the pixels that it is about?

The attention of a phrase of the question (and of the position that writes the answer) is laid over the picture, layer by layer and
head by head, and scored against the boxes of what the phrase speaks of. Heads are chosen on one half of the scenes and
scored on the other; a small mask head trained on the maps of the frozen model (F-LMM, arXiv 2406.05821) says how much of
the place they hold together.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from hashlib import sha256
from typing import Any

import numpy as np
import pyarrow as pa

from probe.analysis.grounding import THRESHOLDS, Box
from probe.errors import DataError, StudyError, did_you_mean
from probe.example import Example
from probe.grounding import MERGES, Target, find_targets
from probe.mask_head import MaskHead
from studies.grounding_training import train, training_set
from studies.grounding_units import DRAWN, Choice, Plan, Usable, choose, scoring_rows, selection_rows
from studies.run import Run, finite
from studies.study import Setting, Summary, describe, progress, study, units
from studies.work import Rows, refuse_nothing, sift

SCHEMA = pa.schema([
    ("example", pa.string()), ("scene", pa.string()), ("what", pa.string()), ("phrase", pa.string()), ("key", pa.string()),
    ("values", pa.list_(pa.float64())), ("text", pa.string()),
])  # fmt: skip


@study
def grounding(
    setting: Setting,
    *,
    merge: str = "mean",
    threshold: str = "otsu",
    heads: int = 3,
    generic: str = "Write a general description of the image.",
    mask_head: bool = True,
    train_scenes: int = 160,
    epochs: int = 8,
) -> Summary:
    """Does the attention of a word find the pixels that it is about?

    `merge` is how the rows of a phrase's tokens become one map (`mean` or `max`); `threshold` how a map becomes a mask (`otsu`, or
    `std` for mean plus one standard deviation); `heads` how many localisation heads are taken together; `generic` the prompt
    that attention is compared with (`none`: no comparison); `mask_head` trains F-LMM's mask head on `train_scenes` scenes
    for some `epochs`.
    """
    for option, value, known in (("merge", merge, MERGES), ("threshold", threshold, THRESHOLDS)):
        if value not in known:
            raise StudyError(f"there is no {option} {value!r}{did_you_mean(value, known)}")
    for option, number in (("heads", heads), ("train-scenes", train_scenes), ("epochs", epochs)):
        if number < 1:
            raise StudyError(f"--{option} must be at least 1, not {number}")
    plan = Plan(merge, threshold, heads, generic, mask_head, train_scenes, epochs, setting.seed)
    config = {
        **vars(plan), "data": setting.data.name, "fingerprint": setting.data.fingerprint, "limit": len(setting.data),
        "batch": setting.batch, "padding": setting.padding,
    }  # fmt: skip
    run = Run.open(setting.out, "grounding", config, describe(setting.subject), SCHEMA)
    with run.recorded():
        return _carry_out(setting, plan, run)


def _carry_out(setting: Setting, plan: Plan, run: Run) -> Summary:
    from studies.grounding_report import figures, report, summarise

    usables, sifted = _usables(setting, plan.seed)
    first = f"sifted-{len(setting.data):06d}"
    run.write(first, sifted)
    refuse_nothing(run.rows([first, *_keys(run)]), len(usables))
    selection, scored = split(usables, plan.seed)
    scored = [replace(usable, drawn=i < DRAWN) for i, usable in enumerate(scored)]
    subject, padding = setting.subject, setting.padding
    with progress("grounding", len(usables), setting.quiet) as advance:
        chosen_by = _work(run, "selection", selection, setting.batch, advance,
                          lambda own: selection_rows(subject, own, plan, padding))  # fmt: skip
        choice = choose(run.rows([first, *chosen_by, *_keys(run, "scored", "training")]), plan.heads)
        mark = _mark(choice, selection, setting)
        head, learnt = _head(setting, plan, run, selection, scored, mark)
        scored_by = _work(run, f"scored-{mark}", scored, setting.batch, advance,
                          lambda own: scoring_rows(subject, own, plan, padding, choice, head))  # fmt: skip
    rows = run.rows([first, *chosen_by, *learnt, *scored_by])
    summary = finite(summarise(rows, choice, plan))
    summary["run"] = str(run.folder)
    figures(run, summary, rows, setting)
    run.finish(summary, report(summary, setting))
    return summary


def _keys(run: Run, *begin: str) -> list[str]:
    """Units that the run holds, so that looking at some rows early throws no others away."""
    found = sorted(path.stem.removeprefix("part-") for path in (run.folder / "records").glob("part-*.parquet"))
    return [key for key in found if key.startswith(begin or ("selection", "scored", "training"))]


def _work(
    run: Run, name: str, usables: Sequence[Usable], batch: int, advance: Callable[[int], None],
    read: Callable[[list[Usable]], Rows],
) -> list[str]:  # fmt: skip
    """The units of one split, read where the run does not hold them yet; their keys."""
    work = [(f"{name}-{key}", items) for key, items in units(len(usables), batch)]
    todo = set(run.pending(key for key, _ in work))
    for key, items in work:
        if key in todo:
            run.write(key, read([usables[i] for i in items]))
        advance(len(items))
    return [key for key, _ in work]


def _mark(choice: Choice, selection: Sequence[Usable], setting: Setting) -> str:
    """What scored units depend on beside their examples: more examples to choose by are other units."""
    learnt = [] if setting.data.name == "demo" else [usable.example.id for usable in selection]
    return sha256(repr((choice, learnt)).encode()).hexdigest()[:10]


def _head(
    setting: Setting, plan: Plan, run: Run, selection: list[Usable], scored: list[Usable], mark: str
) -> tuple[MaskHead | None, list[str]]:
    """The mask head, trained where a unit still needs it, and the key of the record of its training."""
    if not plan.mask_head:
        return None, []
    key = f"training-{mark}"
    if not run.pending([key, *(f"scored-{mark}-{unit}" for unit, _ in units(len(scored), setting.batch))]):
        return None, [key]
    learning = training_set(setting.subject, selection, plan, setting.data.name == "demo")
    head, losses = train(setting.subject, learning, plan)
    run.write(
        key,
        [
            {"what": "training", "key": "loss", "values": losses},
            {"what": "training", "key": "scenes", "values": [len(learning)]},
        ],
    )
    return head, [key]


# --- what can be used, and which half it belongs to --------------------------------------------------------------------


def _usables(setting: Setting, seed: int) -> tuple[list[Usable], Rows]:
    """The examples with a target, and rows for those without and for the labels that no word of the question names."""
    found: dict[str, Usable] = {}
    rows: Rows = []

    def check(example: Example) -> None:
        opened = setting.subject.open_media(example)
        targets, unnamed = find_targets(setting.subject, example, setting.subject.encode(example).maps[0])
        rows.extend({"example": example.id, "what": "unnamed", "text": label} for label in unnamed)
        if not targets:
            raise DataError(f"the question {example.prompt!r} names none of its regions ({', '.join(unnamed)})")
        scene = sha256(b"".join(f"{one.size}".encode() + one.tobytes() for one in opened.pictures)).hexdigest()[:16]
        found[example.id] = Usable(example, scene, tuple(targets))

    usable, skipped = sift(setting.data.examples, check)
    usables = [found[example.id] for example in usable]
    return [replace(one, others=_others(usables, i)) for i, one in enumerate(usables)], rows + skipped


def _others(usables: Sequence[Usable], i: int) -> tuple[tuple[Box, ...], ...]:
    """For each target the boxes of something else: what else the question names in the picture, or an example of another scene."""
    own = usables[i]
    elsewhere = next((one for one in [*reversed(usables[:i]), *usables[i + 1 :]] if one.scene != own.scene), None)
    return tuple(_beside(own.targets, target) or (elsewhere.targets[0].boxes if elsewhere else ()) for target in own.targets)


def _beside(targets: Sequence[Target], target: Target) -> tuple[Box, ...]:
    others = (one for one in targets if one.picture == target.picture and not set(one.boxes) & set(target.boxes))
    return next((one.boxes for one in others), ())


def split(usables: Sequence[Usable], seed: int) -> tuple[list[Usable], list[Usable]]:
    """The selection half and the scored half; a scene is in one of them with all its examples.

    Of each two scenes, in the order of the data, a coin says which is selected by: more examples move none to the other
    half. Raises DataError where there is one scene only.
    """
    scenes = list(dict.fromkeys(usable.scene for usable in usables))
    if len(scenes) < 2:
        raise DataError("heads are chosen on some scenes and scored on others: at least two different pictures are needed")
    coins = np.random.default_rng([seed, 11]).random(len(scenes)) < 0.5
    chosen: set[str] = set()
    for pair in range(0, len(scenes), 2):
        chosen.update(scenes[pair + int(coins[pair // 2]) :][:1])
    return [one for one in usables if one.scene in chosen], [one for one in usables if one.scene not in chosen]


__all__: list[Any] = ["grounding", "split"]
