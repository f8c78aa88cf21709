"""Which visual tokens can go, and which way of choosing them is best?

Every reducer at every budget answers the same questions as the dense model, beside the baselines: random tokens, evenly spaced ones, pooled
ones, the grid made smaller, and a smaller picture. What each of them keeps of every picture is recorded: how alike the choices are, and how often the
patches of the things that a question is about are among them.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pyarrow as pa

from compress.budget import Budget
from compress.cost import mean_cost
from compress.downsampling import shrunk
from compress.measure import answer, encode_all
from compress.passes.tokens import Tokens
from compress.recipe import Recipe
from compress.smaller import Smaller
from compress.tokens.choice import Kept, Seen
from compress.tokens.media import find_media
from probe.errors import SightlineError
from probe.example import Example
from probe.subject import Encoded, Subject
from probe.tokens import TokenMap
from studies.bench import Bench, Configuration
from studies.run import Run, finite
from studies.study import Setting, Summary, describe, progress, study
from studies.token_reduction_report import BASELINES, DENSE, SMALLER, figures, report, summarise
from studies.tradeoffs import chosen_methods, shares_of
from studies.work import Rows

SCHEMA = pa.schema([
    ("what", pa.string()), ("name", pa.string()), ("method", pa.string()), ("share", pa.float64()), ("example", pa.string()),
    ("kind", pa.string()), ("right", pa.bool_()), ("said", pa.string()), ("total", pa.int32()), ("kept", pa.list_(pa.int32())),
    ("own", pa.list_(pa.int32())), ("flops", pa.float64()), ("text", pa.string()),
])  # fmt: skip
DRAWS = 3  # of the random baseline: one draw can be lucky


@study
def token_reduction(setting: Setting, *, shares: str = "0.5,0.25,0.125,0.0625", methods: str = "all") -> Summary:
    """Which visual tokens can go, and which way of choosing them is best?

    `shares` are the shares of visual tokens that stay, `methods` the token reducers (`all`, or names with commas between them); the baselines
    are always among them.
    """
    kept, chosen = shares_of(shares), chosen_methods(methods)
    config = {
        "data": setting.data.name, "fingerprint": setting.data.fingerprint, "examples": len(setting.data), "shares": list(kept), "methods": chosen,
        "batch": setting.batch, "seed": setting.seed,
    }  # fmt: skip
    run = Run.open(setting.out, "token-reduction", config, describe(setting.subject), SCHEMA)
    with run.recorded():
        return _carry_out(setting, run, configurations(kept, chosen, setting.seed))


def configurations(shares: Sequence[float], methods: Sequence[str], seed: int) -> list[tuple[str, float, Configuration]]:
    """The dense model, every baseline and every method at every share: (method, share, configuration), names unique."""
    found = [(DENSE, 1.0, Configuration(DENSE, baseline="full"))]
    for share in shares:
        found.append((SMALLER, share, Configuration(f"{SMALLER} {share:g}", side=share**0.5)))
    for method in dict.fromkeys([*BASELINES[:-1], *methods]):
        for share in shares:
            for draw in range(DRAWS if method == "random" else 1):
                name = f"{method} {share:g}" + (f" draw {draw}" if method == "random" else "")
                one = Tokens(method=method, budget=Budget(keep=share), seed=seed + draw)
                found.append((method, share, Configuration(name, Recipe((one,), name))))
    return found


def _carry_out(setting: Setting, run: Run, asked: list[tuple[str, float, Configuration]]) -> Summary:
    bench = Bench(setting.subject, setting.data, setting.batch, seed=setting.seed)
    todo = set(run.pending(one.key for _, _, one in asked))
    with progress("configurations", len(asked), setting.quiet, "configurations") as advance:
        for method, share, one in asked:
            if one.key in todo:
                run.write(one.key, [{"method": method, "share": share, "name": one.name, **row} for row in unit(bench, one)])
            advance(1)
    rows = run.rows([one.key for _, _, one in asked])
    summary = finite(summarise(rows, setting.seed)) | {"unused": bench.sifted[1], "run": str(run.folder)}
    figures(run, summary)
    run.finish(summary, report(summary))
    return summary


# --- one configuration -----------------------------------------------------------------------------------------------


def unit(bench: Bench, one: Configuration) -> Rows:
    """A row of each example: what was said, and which visual tokens stayed. One row with the reason where the model refuses."""
    if one.side is None and one.recipe is None:
        return _dense(bench)
    try:
        with bench.opened(one) as subject:
            batches, prompts = bench.batches, bench.prompts
            if one.side is not None:
                shown = tuple(shrunk(subject, bench.examples, one.side))
                batches, prompts = encode_all(subject, shown, bench.batch), [subject.encode(e) for e in shown[: len(prompts)]]
            found = [row for encoded in batches for row in _answered(subject, encoded, bench.max_new_tokens)]
            flops = mean_cost(subject, prompts).flops
    except SightlineError as error:
        return [{"what": "refused", "text": str(error)}]
    if one.side is not None:  # its tokens are others, of a smaller grid
        found = [{**row, "kept": None, "total": len(row["kept"])} for row in found]
    return [{**row, "flops": flops} for row in found]


def _answered(subject: Subject, encoded: Encoded, max_new_tokens: int) -> Rows:
    """What is said to one batch, and the numbers of the visual tokens that stay; media that a reducer had no need to look at stay whole."""
    with watched(subject) as choices:
        answers = answer(subject, [encoded], max_new_tokens)
    visual = _visual(subject, encoded)
    left = [set(range(len(columns))) for columns in visual]
    for row, columns, index in choices:
        numbers = np.searchsorted(visual[row], columns)
        left[row] -= set(numbers.tolist()) - set(numbers[index].tolist())
    return [
        {"what": "item", "example": e.id, "kind": e.tags.get("kind", ""), "right": bool(answers.right[i]), "said": answers.said[i],
         "total": len(visual[i]), "kept": sorted(left[i])}
        for i, e in enumerate(encoded.examples)
    ]  # fmt: skip


def _dense(bench: Bench) -> Rows:
    """The dense model's answers, how many visual tokens each example has, and which of them show what the question is about."""
    flops = mean_cost(bench.dense, bench.prompts).flops
    rows: Rows = []
    for encoded in bench.batches:
        found = _answered(bench.dense, encoded, bench.max_new_tokens)
        places = zip(encoded.maps, encoded.examples, _visual(bench.dense, encoded), strict=True)
        rows += [{**row, "flops": flops, "own": _own(*place)} for row, place in zip(found, places, strict=True)]
    return rows


def _own(token_map: TokenMap, example: Example, visual: np.ndarray) -> list[int]:
    """Numbers of the visual tokens inside the boxes that the example comes with; none where it has no boxes, or its tokens no places."""
    if not example.regions:
        return []
    try:
        positions = token_map.in_boxes(list(example.regions))
    except SightlineError:
        return []
    return sorted(int(np.searchsorted(visual, p)) for p in positions.tolist() if p in visual)


def _visual(subject: Subject, encoded: Encoded) -> list[np.ndarray]:
    """Columns of every example's visual tokens in a batch, in order."""
    inputs = {key: value for key, value in encoded.inputs.items() if key != "input_ids"}
    rows = find_media(subject, encoded.inputs["input_ids"], inputs)
    return [np.array(sorted(int(p) for medium in media for p in medium.positions), dtype=np.int64) for media in rows]


@contextmanager
def watched(subject: Subject) -> Iterator[list[tuple[int, np.ndarray, np.ndarray]]]:
    """What a reducer chooses, call by call: the row of its batch, the columns of the medium, and which of them stay."""
    choices: list[tuple[int, np.ndarray, np.ndarray]] = []
    runtime = subject.runtime if isinstance(subject, Smaller) else None
    if runtime is None:
        yield choices
        return
    before = runtime.reducers
    runtime.reducers = [replace(one, select=one.select and _watching(one.select, choices)) for one in before]
    try:
        yield choices
    finally:
        runtime.reducers = before


def _watching(select: Callable[..., Kept], choices: list[tuple[int, np.ndarray, np.ndarray]]) -> Callable[..., Kept]:
    def chosen(seen: Seen, count: int) -> Kept:
        kept = select(seen, count)
        choices.append((seen.row, seen.columns.cpu().numpy(), kept.index.cpu().numpy()))
        return kept

    return chosen
