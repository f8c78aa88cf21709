"""What does each attention mask do to a model that was trained without it?

Masks of the literature, and passes that let visual tokens skip a layer's attention, are put on layers of a model that was trained causally, and nothing
is trained again. Beside the dense model: accuracy on the same questions, what it says without a picture, how often it says yes, and where attention
goes.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import pairwise

import numpy as np
import pyarrow as pa
from pydantic import ValidationError

from compress.cost import tokens_run
from compress.measure import answer, encode_all
from compress.passes.base import Pass, titles
from compress.passes.masks import Masks
from compress.recipe import Recipe
from compress.tokens.pairs import MASKS
from probe.errors import StudyError, did_you_mean
from probe.example import Example
from probe.recorders import Mass
from probe.subject import Encoded, Subject
from probe.tracing import trace
from studies import bench as benches
from studies.bench import Bench, Configuration, collect, settled
from studies.pope import questions
from studies.run import Run, finite
from studies.study import Setting, Summary, describe, progress, study
from studies.work import Rows

SCHEMA = pa.schema([*benches.SCHEMA, ("flow", pa.string()), ("layer", pa.int32()), ("mass", pa.float64())])
FLOWS = {
    # name: (rows, columns)
    "image->image": ("media", "media"), "question->image": ("media", "question"), "image->question": ("question", "media"),
    "image->last": ("last", "media"),
}  # fmt: skip
MASSES = Mass(rows=("media", "question", "last"), columns=("media", "question"))
SKIPS = ("composite", "shortv")  # passes that are masks of a kind: visual rows of a layer do not attend
LOOKED = 64  # prompts at most whose attention is read


@study
def masks(setting: Setting, *, methods: str = "all", parts: str = "1,2,4", max_new_tokens: int = 4) -> Summary:
    """What does each attention mask do to a model that was trained without it?

    `methods` are masks by name (all: every mask, and the passes by which visual tokens skip a layer's attention); each is put on every part of the
    depth when that is cut into as many equal `parts` as are named. `max_new_tokens` is how long an answer may be.
    """
    chosen, cuts = _methods(methods), _parts(parts, setting.subject.n_layers)
    if not any(any(example.media.values()) for example in setting.data.examples):
        raise StudyError(f"{setting.data.name} shows the model nothing: a mask acts on pictures, clips and sounds")
    asked = configurations(setting.subject, chosen, cuts)
    config = {
        "data": setting.data.name, "fingerprint": setting.data.fingerprint, "examples": len(setting.data), "methods": chosen, "parts": list(cuts),
        "max_new_tokens": max_new_tokens, "batch": setting.batch, "seed": setting.seed, "padding": setting.padding,
    }  # fmt: skip
    run = Run.open(setting.out, "masks", config, describe(setting.subject), SCHEMA)
    desk = Desk(
        setting, Bench(setting.subject, setting.data, setting.batch, 0, max_new_tokens=max_new_tokens, seed=setting.seed)
    )
    with run.recorded():
        return _carry_out(setting, run, desk, asked)


def _carry_out(setting: Setting, run: Run, desk: "Desk", asked: Sequence[Configuration]) -> Summary:
    from studies.masks_report import figures, report, summarise

    refused: dict[str, str] = {}
    with progress("masks", len(asked), setting.quiet, "configurations") as advance:
        for one in asked:
            if why := settled(run, one, partial(everything, desk)):
                refused[one.name] = why
            advance(1)
    rows = run.rows([one.key for one in asked if one.name not in refused])
    summary = finite(summarise(rows, collect(rows), [one for one in asked if one.name not in refused], setting.seed))
    summary |= {
        "run": str(run.folder),
        "unused": desk.bench.sifted[1],
        "skipped": refused,
        "n_layers": setting.subject.n_layers,
    }
    figures(run, summary)
    run.finish(summary, report(summary, setting))
    return summary


# --- what is asked ---------------------------------------------------------------------------------------------------


def configurations(subject: Subject, methods: Sequence[str], cuts: Sequence[int]) -> list[Configuration]:
    """The dense model, and every method on every part of the depth; a name is `method first-last`, in layers."""
    found = [Configuration("full", baseline="full")]
    for method in methods:
        for layers in spans(subject.n_layers, cuts):
            one = _pass(method, layers)
            name = f"{method} {layers.start}-{layers.stop - 1}"
            found.append(Configuration(name, Recipe((one,), name)))
    return found


def spans(n_layers: int, cuts: Sequence[int]) -> Iterator[range]:
    """The layers of every part, for each number of parts."""
    for count in cuts:
        ends = [round(i * n_layers / count) for i in range(count + 1)]
        yield from (range(a, b) for a, b in pairwise(ends))


def _pass(method: str, layers: range) -> Pass:
    if method in MASKS:
        return Masks.model_validate({"method": method, "layers": tuple(layers)})
    return titles()[method].model_validate({"layers": tuple(layers)})


def known() -> list[str]:
    """The masks of this version, and those of its other passes that are masks of a kind and take layers by number."""
    found = list(MASKS)
    for title in SKIPS:
        if title in titles():
            try:
                _pass(title, range(1))
            except ValidationError:
                continue
            found.append(title)
    return found


def _methods(text: str) -> list[str]:
    if text == "all":
        return known()
    names = [name.strip() for name in text.split(",") if name.strip()]
    if unknown := [name for name in names if name not in known()]:
        raise StudyError(f"there is no attention mask {unknown[0]!r}{did_you_mean(unknown[0], known())}")
    return names


def _parts(text: str, n_layers: int) -> tuple[int, ...]:
    try:
        found = tuple(dict.fromkeys(int(part) for part in text.split(",")))
    except ValueError as error:
        raise StudyError(f"--parts are whole numbers with commas between them, 1,2,4, not {text!r}") from error
    if wrong := [part for part in found if not 1 <= part <= n_layers]:
        raise StudyError(f"{n_layers} layers can be cut into 1 to {n_layers} parts, not into {wrong[0]}")
    return found


# --- one configuration -----------------------------------------------------------------------------------------------


@dataclass(eq=False)
class Desk:
    """What every configuration is asked and looked at with; made once."""

    setting: Setting
    bench: Bench

    @cached_property
    def existence(self) -> list[Encoded]:
        """Questions whether something is there, encoded; none where the data has none."""
        try:
            found: Sequence[Example] = questions(self.setting).examples
        except StudyError:
            return []
        return encode_all(self.setting.subject, found, self.setting.batch)

    @cached_property
    def looked(self) -> list[Encoded]:
        """The prompts whose attention is read."""
        shown = [example for example in self.bench.examples if any(example.media.values())][:LOOKED]
        size = self.setting.batch
        return [
            self.setting.subject.encode(shown[i : i + size], self.setting.padding) for i in range(0, len(shown), size)
        ]  # fmt: skip


def everything(desk: Desk, one: Configuration) -> Rows:
    """All rows of a configuration: the bench's, what it affirms, and where it looks."""
    with desk.bench.opened(one) as subject:
        return [*desk.bench.measure_model(one, subject), *asked_whether(desk, one, subject), *looked_into(desk, one, subject)]


def asked_whether(desk: Desk, one: Configuration, subject: Subject) -> Rows:
    """A row for each question of existence: what was said, whether it is right, and what is the case (`kind`: yes or no)."""
    if not desk.existence:
        return []
    found = answer(subject, desk.existence, desk.bench.max_new_tokens)
    return [
        {"what": "exist", "name": one.name, "example": e.id, "kind": (e.answer or "").lower(), "said": found.said[i], "right": bool(found.right[i])}
        for i, e in enumerate(found.examples)
    ]  # fmt: skip


def looked_into(desk: Desk, one: Configuration, subject: Subject) -> Rows:
    """Attention masses of every prompt by flow and layer, heads averaged; and the share of the causal pairs that is left (`pairs`)."""
    rows: Rows = []
    for encoded in desk.looked:
        found = trace(subject, encoded, [MASSES])["mass"]
        for flow, (looking, seen) in FLOWS.items():
            mass = found.at(row_group=looking, column_group=seen).mean(2).numpy()  # layer batch
            rows += [
                {"what": "mass", "name": one.name, "example": example.id, "flow": flow, "layer": layer, "mass": float(mass[layer, i])}
                for i, example in enumerate(encoded.examples) for layer in range(len(mass))
            ]  # fmt: skip
    rows.append({"what": "pairs", "name": one.name, "mass": float(np.mean([pairs(subject, p) for p in desk.bench.prompts]))})
    return rows


def pairs(subject: Subject, encoded: Encoded) -> float:
    """The query-key pairs that a prompt's masks leave, over all layers, as a share of the causal ones; NaN where some tokens do not ask at all."""
    ran = tokens_run(subject, encoded)
    n = sum(segment != "pad" for segment in encoded.maps[0].segments)
    if any(one.queries != n or one.keys != n for one in ran):
        return float("nan")
    causal = n * (n + 1) / 2
    return sum(causal if one.pairs is None else one.pairs for one in ran) / (len(ran) * causal)
