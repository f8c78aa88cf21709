"""`sightline search`: the frontier of accuracy and cost over a recipe's free numbers, baselines beside it."""

import json
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal

from compress.budget import Budget
from compress.passes.base import Evidence
from compress.passes.tokens import Tokens
from compress.recipe import Recipe
from compress.search import Space, search
from probe.errors import PassError
from studies.bench import SCHEMA, Bench, Configuration, collect, settled
from studies.points import figure, sentence, table
from studies.run import Run
from studies.study import describe, progress

Cost = Literal["flops", "prefill", "answer"]
STORAGE = "search.db"
SHARES = (0.5, 0.25)


def baselines(shares: tuple[float, ...] = SHARES) -> list[Configuration]:
    """Full, random, pooling, and the down-sampled picture: on every plot, whatever else is on it."""
    found = [Configuration("full", baseline="full")]
    for share in shares:
        for method in ("random", "pooling"):
            one = Tokens(method=method, budget=Budget(keep=share))
            found.append(Configuration(f"{method} {share:g}", Recipe((one,), f"{method} {share:g}"), method))
        found.append(Configuration(f"down-sampling {share:g}", baseline="down-sampling", side=share**0.5))
    return found


def explore(
    space: Space, bench: Bench, out: Path | None, trials: int, cost: Cost, quiet: bool, evidence: Evidence | None = None,
    whence: str = "",
) -> dict[str, Any]:  # fmt: skip
    """Searches a space; `run n refused points frontier`. Killed and asked again with the same `out`, it goes on.

    `evidence` is what the space's passes ask for, and `whence` says where it comes from: a run is continued with the same.
    """
    config = {
        "space": json.loads(json.dumps(space.text, default=str)), "data": bench.data.name, "fingerprint": bench.data.fingerprint,
        "examples": len(bench.data), "cost": cost, "rounds": bench.rounds, "tokens": bench.tokens, "seed": bench.seed,
        "evidence": whence,
    }  # fmt: skip
    run = Run.open(out, "search", config, describe(bench.dense), SCHEMA)
    with run.recorded(), progress("searching", trials, quiet, "points") as advance:
        base = baselines()
        refused = {one.name: why for one in base if (why := settled(run, one, bench.measure))}

        def evaluate(recipe: Recipe) -> tuple[float, float]:
            one = configured(recipe)
            if why := settled(run, one, partial(bench.measure, evidence=evidence)):
                raise PassError(why)
            return _objectives(run, one, cost)

        found = search(space, evaluate, ("maximize", "minimize"), run.folder / STORAGE, trials, bench.seed, advance)
        tried = list(dict.fromkeys(configured(space.recipe(trial.values)).key for trial in found if trial.objectives))
        keys = list(dict.fromkeys([*(one.key for one in base), *tried]))
        points = collect(run.rows(keys))
    summary = {
        "run": str(run.folder), "n": len(bench.examples), "unused": bench.sifted[1], "trials": len(found), "cost": cost, "points": points,
        "refused": {**refused, **{json.dumps(trial.values): trial.refused for trial in found if trial.refused}},
        "frontier": [point["name"] for point in points if point["on_frontier"]],
    }  # fmt: skip
    run.figure("frontier", *figure(points))
    run.finish(summary, _report(summary))
    return summary


def configured(recipe: Recipe) -> Configuration:
    """A recipe of the search, named after what is in it."""
    return Configuration(f"{recipe.name} {sha256(recipe.dumped().encode()).hexdigest()[:8]}", recipe)


def _objectives(run: Run, one: Configuration, cost: Cost) -> tuple[float, float]:
    point = json.loads(next(row["text"] for row in run.rows_of(one.key).to_pylist() if row["what"] == "point"))
    return point["accuracy"], point["flops_ratio"] if cost == "flops" else point["ratios"][cost]["value"]


def _report(summary: dict[str, Any]) -> str:
    best = [sentence(point) for point in summary["points"] if point["on_frontier"]]
    lines = [
        "# A search for smaller models", "", f"{summary['trials']} points of the space and {sum(bool(p['baseline']) for p in summary['points'])} "
        f"baselines, {summary['n']} questions each. On the frontier:", "", *(f"- {text}" for text in best), "",
        "![accuracy and cost](figures/frontier.png)", "",
        "Hollow points are beaten by another one's values, but not surely: their intervals cannot be told apart on these questions.", "",
        table(summary["points"]), "",
    ]  # fmt: skip
    if summary["refused"]:
        lines += ["## What was refused", "", *(f"- {name}: {why}" for name, why in summary["refused"].items()), ""]
    return "\n".join(lines)
