"""What does each step of compression cost in accuracy, and what does it save?

Every pass and method that this version has is applied by itself at several strengths, and layers and tokens together; each is measured on the
same questions as the dense model, beside four baselines: the full model, random tokens, pooled tokens, and a smaller picture. A plan made from
evidence stands among them, and beside it the same budget met without evidence.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from compress.evidence import gather
from compress.passes import METHODS
from compress.passes.base import Evidence
from compress.planning import Cost
from compress.recipe import Recipe, parse
from probe.analysis.stats import benjamini_hochberg, paired_difference, sign_flip
from probe.errors import PassError, StudyError, did_you_mean
from probe.example import Example
from studies.bench import SCHEMA, Bench, Configuration, collect, settled
from studies.configurations import configurations, left_out
from studies.planning import planned, set_apart, told
from studies.points import figure
from studies.run import Run, finite
from studies.study import Setting, Summary, describe, progress, study
from studies.tradeoffs_report import report

PLANS: dict[Cost, str] = {"flops": "evidence plan", "time": "evidence plan by time"}


@study
def tradeoffs(
    setting: Setting, *, shares: str = "0.5,0.25,0.125", methods: str = "all", rounds: int = 12, tokens: int = 8, budget: float = 0.6,
    time_budget: float = 0.9, runs: str = "", evidence_data: str = "",
) -> Summary:  # fmt: skip
    """What does each step of compression cost in accuracy, and what does it save?

    `shares` are the shares of visual tokens that stay (of more than eight methods each takes the first two), `methods` the token
    reducers (`all`, or names), `rounds` how often each configuration is timed in turns with the dense model (0 leaves times out),
    `tokens` how many tokens each timed answer has. `budget` is the share of the dense FLOPs that the plan from evidence may take, `time_budget` that of
    measured time for another one (0: no plan); they rest on `evidence_data` (other scenes of the demo) and on `runs` of information-flow and
    implicit-alignment, folders with commas between.
    """
    kept, chosen = shares_of(shares), chosen_methods(methods)
    data, evident, whence = set_apart(setting.data, evidence_data)
    setting = replace(setting, data=data)
    config = {
        "data": data.name, "fingerprint": data.fingerprint, "examples": len(data), "shares": list(kept),
        "methods": chosen, "rounds": rounds, "tokens": tokens, "batch": setting.batch, "seed": setting.seed,
        "budget": budget, "time_budget": time_budget, "runs": runs, "evidence_data": evidence_data,
    }  # fmt: skip
    run = Run.open(setting.out, "tradeoffs", config, describe(setting.subject), SCHEMA)
    bench = Bench(setting.subject, setting.data, setting.batch, rounds, tokens, seed=setting.seed)
    with run.recorded():
        budgets: dict[Cost, float] = {"flops": budget, "time": time_budget if rounds else 0.0}
        plans = {
            cost: _plan(setting, run, cost, share, [one for one in runs.split(",") if one], evident, whence)
            for cost, share in budgets.items()
        }
        asked = [*configurations(setting.subject, kept, chosen), *_planned_configurations(plans)]
        refused = _measure(setting, run, bench, asked, evident)
        rows = run.rows([one.key for one in asked if one.name not in refused])
        points = collect(rows)
    summary: Summary = finite({
        "run": str(run.folder), "n": len(bench.examples), "unused": bench.sifted[1], "points": points, "skipped": {**refused, **left_out()},
        "frontier": [point["name"] for point in points if point["on_frontier"]],
        "evidence_plan": next((point for point in points if point["name"] == PLANS["flops"]), None),
        "plans": {PLANS[cost]: {**plan, "against": _against(rows, points, plan, setting.seed)} for cost, plan in plans.items() if plan},
    })  # fmt: skip
    run.figure("frontier", *figure(points))
    run.finish(summary, report(summary))
    return summary


def _measure(
    setting: Setting, run: Run, bench: Bench, asked: Sequence[Configuration], evident: Sequence[Example]
) -> dict[str, str]:
    """Measures what the run does not hold yet; names and reasons of what the model refuses."""
    refused: dict[str, str] = {}
    evidence = _evidence(setting, run, asked, evident)
    with progress("configurations", len(asked), setting.quiet, "configurations") as advance:
        for one in asked:
            if why := settled(run, one, partial(bench.measure, evidence=evidence)):
                refused[one.name] = why
            advance(1)
    return refused


def _evidence(setting: Setting, run: Run, asked: Sequence[Configuration], evident: Sequence[Example]) -> Evidence | None:
    """What the passes that are still to be measured ask for; what the model does not give is left out, and its passes say so."""
    todo = set(run.pending(one.key for one in asked))
    passes = [one for c in asked if c.key in todo and c.recipe for one in c.recipe.passes]
    names = dict.fromkeys(name for one in passes for name in one.asks())
    found: dict[str, Any] = {}
    for name in names:
        try:
            found |= gather(setting.subject, evident, [name], setting.seed)
        except PassError:
            continue
    return found


# --- the plan ----------------------------------------------------------------------------------------------------------


def _plan(
    setting: Setting, run: Run, cost: Cost, budget: float, runs: Sequence[str], evident: Sequence[Example], whence: str
) -> dict[str, Any] | None:  # fmt: skip
    """The plan as JSON, made once for a run; with a reason in place of a recipe where there is none."""
    if not budget:
        return None
    kept = run.folder / f"plan-{cost}.json"
    if not kept.is_file():
        try:
            made = planned(setting.subject, evident, budget, runs, setting.seed, setting.quiet, cost)
            text = {
                **made.told(),
                "whence": f"{whence}, and from runs: {', '.join(runs)}" if runs else whence,
                "words": told(made),
            }
        except PassError as error:
            text = {"refused": str(error)}
        run.write_json(kept.name, finite(text))
    found: dict[str, Any] = json.loads(kept.read_text())
    return found


def _planned_configurations(plans: Mapping[Cost, Mapping[str, Any] | None]) -> list[Configuration]:
    """The plans, and the budget of FLOPs met without evidence."""
    made = {cost: plan for cost, plan in plans.items() if plan and "refused" not in plan}
    found = [Configuration(PLANS[cost], _recipe(plan["recipe"])) for cost, plan in made.items()]
    rivals = made["flops"]["rivals"] if "flops" in made else {}
    return [*found, *(Configuration(name, _recipe(text)) for name, text in rivals.items())]


def _recipe(text: str) -> Recipe:
    import yaml

    return parse(yaml.safe_load(text))


def _against(rows: Any, points: Sequence[Mapping[str, Any]], plan: Mapping[str, Any], seed: int) -> dict[str, Any]:
    """The plan's accuracy less that of the same budget without evidence, item by item; what was drawn several times is averaged first.

    `p` is a two-sided sign-flip test over items, `q` its correction over the comparisons.
    """
    if "refused" in plan or plan["cost"] != "flops":
        return {}
    table = rows.to_pandas()
    items = table[table["what"] == "item"].pivot(index="example", columns="name", values="right").astype(float)
    flops = {point["name"]: point["flops_ratio"] for point in points}
    groups: dict[str, list[str]] = {}
    for name in plan["rivals"]:
        if name in items:
            groups.setdefault(name.rstrip("0123456789 "), []).append(name)
    found = {}
    for group, names in groups.items():
        own, theirs = items[PLANS["flops"]].to_numpy(), items[names].mean(axis=1).to_numpy()
        value, low, high = (float(side) for side in paired_difference(own, theirs, seed))
        gap = (own - theirs)[:, None]
        p = float(min(1.0, 2 * min(sign_flip(gap, seed)[0], sign_flip(-gap, seed)[0])))
        found[group] = {
            "value": value, "low": low, "high": high, "p": p, "draws": len(names), "accuracy": float(items[names].to_numpy().mean()),
            "flops_ratio": float(np.mean([flops[name] for name in names])),
        }  # fmt: skip
    q: Any = benjamini_hochberg(np.array([one["p"] for one in found.values()], dtype=np.float64)) if found else []
    return {group: {**one, "q": float(value)} for (group, one), value in zip(found.items(), q, strict=True)}


# --- options -------------------------------------------------------------------------------------------------------------


def shares_of(text: str) -> tuple[float, ...]:
    """Shares from an option. Raises StudyError for what is none."""
    try:
        found = tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise StudyError(f"--shares are numbers with commas between them, 0.5,0.25, not {text!r}") from error
    if not all(0 < share < 1 for share in found):
        raise StudyError(f"a share of the tokens lies between 0 and 1, not at {next(s for s in found if not 0 < s < 1):g}")
    return found


def chosen_methods(text: str) -> list[str]:
    """Token reducers from an option. Raises StudyError with the nearest name."""
    if text == "all":
        return list(METHODS)
    names = [name.strip() for name in text.split(",") if name.strip()]
    if unknown := [name for name in names if name not in METHODS]:
        raise StudyError(f"there is no token reducer {unknown[0]!r}{did_you_mean(unknown[0], METHODS)}")
    return names
