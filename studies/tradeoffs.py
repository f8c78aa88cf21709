"""What does each step of compression cost in accuracy, and what does it save?

Every pass and method that this version has is applied by itself at several strengths, and layers and tokens together; each is measured on the
same questions as the dense model, beside four baselines: the full model, random tokens, pooled tokens, and a smaller picture.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from pydantic import ValidationError

from compress.budget import Budget
from compress.passes import METHODS, PASSES
from compress.passes.base import Evidence, Pass
from compress.passes.layers import RemoveLayers
from compress.passes.tokens import Tokens
from compress.recipe import Recipe
from probe.analysis.stats import benjamini_hochberg
from probe.errors import SightlineError, StudyError, did_you_mean
from probe.subject import Subject
from studies.bench import SCHEMA, Bench, Configuration, collect
from studies.measuring import evidence_module
from studies.points import broken, figure, sentence, table
from studies.run import Run
from studies.search import measured
from studies.study import Setting, Summary, describe, progress, study

BASE = ("random", "pooling")
MANY = 8  # of more methods than these each is measured at the first two shares only


@study
def tradeoffs(
    setting: Setting, *, shares: str = "0.5,0.25,0.125", methods: str = "all", rounds: int = 12, tokens: int = 8
) -> Summary:
    """What does each step of compression cost in accuracy, and what does it save?

    `shares` are the shares of visual tokens that stay (of more than eight methods each takes the first two), `methods` the token
    reducers (`all`, or names), `rounds` how often each configuration is timed in turns with the dense model (0 leaves times out),
    `tokens` how many tokens each timed answer has.
    """
    kept = shares_of(shares)
    chosen = chosen_methods(methods)
    evidence, plan = gathered(setting)
    asked = [*configurations(setting.subject, kept, chosen), *([Configuration("evidence plan", plan)] if plan else [])]
    config = {
        "data": setting.data.name, "fingerprint": setting.data.fingerprint, "examples": len(setting.data), "shares": list(kept),
        "methods": chosen, "rounds": rounds, "tokens": tokens, "batch": setting.batch, "seed": setting.seed, "padding": setting.padding,
    }  # fmt: skip
    run = Run.open(setting.out, "tradeoffs", config, describe(setting.subject), SCHEMA)
    bench = Bench(setting.subject, setting.data, setting.batch, rounds, tokens, seed=setting.seed)
    refused: dict[str, str] = {}
    with run.recorded(), progress("configurations", len(asked), setting.quiet, "configurations") as advance:
        for one in asked:
            if why := measured(run, bench, one, evidence):
                refused[one.name] = why
            advance(1)
        points = collect(run.rows([one.key for one in asked if one.name not in refused]))
    summary: Summary = {
        "run": str(run.folder), "n": len(bench.examples), "unused": bench.sifted[1], "points": points, "skipped": {**refused, **left_out()},
        "frontier": [point["name"] for point in points if point["on_frontier"]],
        "evidence_plan": next((point for point in points if point["name"] == "evidence plan"), None),
    }  # fmt: skip
    run.figure("frontier", *figure(points))
    run.finish(summary, _report(summary))
    return summary


# --- what is measured ------------------------------------------------------------------------------------------------


def configurations(subject: Subject, shares: Sequence[float], methods: Sequence[str]) -> list[Configuration]:
    """Baselines, every method at every share, every other pass, layers, and layers with tokens; names are unique."""
    found = [Configuration("full", baseline="full")]
    for share in shares:
        found.append(Configuration(f"down-sampling {share:g}", baseline="down-sampling", side=share**0.5))
    for method in dict.fromkeys([*BASE, *methods]):
        base = method if method in BASE else ""
        at = shares if base or len(methods) <= MANY else shares[:2]
        found += [_recipe(f"{method} {share:g}", _reduced(method, share), baseline=base) for share in at]
    for layer in range(subject.n_layers) if subject.n_layers <= 12 else range(0, subject.n_layers, subject.n_layers // 8):
        found.append(_recipe(f"without layer {layer}", RemoveLayers(layers=(layer,))))
    middle = subject.n_layers // 2
    for count in (2, 3):
        if count < subject.n_layers - middle:
            found.append(_recipe(f"without {count} middle layers", RemoveLayers(layers=tuple(range(middle, middle + count)))))
    for share in shares:
        found.append(
            _recipe(f"without layer {middle}, pooling {share:g}", RemoveLayers(layers=(middle,)), _reduced("pooling", share))
        )
    for one in _others():
        found.append(_recipe(one.title, one))
    return found


def _recipe(name: str, *passes: Pass, baseline: str = "") -> Configuration:
    return Configuration(name, Recipe(passes, name), baseline)


def _reduced(method: str, share: float) -> Tokens:
    return Tokens(method=method, budget=Budget(keep=share))


def _others() -> Iterator[Pass]:
    """Passes that are neither layers nor tokens, as they are when nothing is set."""
    for kind in PASSES:
        if kind not in (RemoveLayers, Tokens):
            try:
                yield kind()
            except ValidationError:  # it has no defaults of its own: `left_out` says so
                continue


def left_out() -> dict[str, str]:
    """Passes that are not among the configurations, and why."""
    found = {}
    for kind in PASSES:
        if kind not in (RemoveLayers, Tokens):
            try:
                kind()
            except ValidationError as error:
                found[kind.title] = f"needs settings: {', '.join(str(one['loc'][0]) for one in error.errors() if one['loc'])}"
    return found


def gathered(setting: Setting) -> tuple[Evidence | None, Recipe | None]:
    """Evidence and a plan made from it, where `compress.evidence` is there: `plan(subject, examples, seed) -> (Recipe, Evidence)`."""
    module = evidence_module()
    if module is None or not hasattr(module, "plan"):
        return None, None
    try:
        recipe, evidence = module.plan(setting.subject, setting.data.examples, setting.seed)
    except SightlineError:
        return None, None
    return evidence, recipe


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


# --- the report ------------------------------------------------------------------------------------------------------


def _report(summary: Mapping[str, Any]) -> str:
    points = summary["points"]
    full = next(point for point in points if point["baseline"] == "full")
    steps = [point for point in points if not point["baseline"]]
    lines = [
        "# Tradeoffs", "", "*What does each step of compression cost in accuracy, and what does it save?*", "", _answer(summary, full, steps), "",
        "![accuracy and cost](figures/frontier.png)", "",
        "Left: measured time of reading the prompt, over the dense model's in the same round. Right: multiply-adds in closed form. Bars are 95 % "
        "intervals (Wilson for accuracy, order statistics for times). Baselines have marks of their own. A hollow point is beaten by another one's "
        "values and cannot be told from it on these questions; a grey one is beaten beyond both 95 % intervals (paired on the same questions, each pair by "
        "itself).", "",
        "## Every configuration", "", table(points), "", _null(full), "",
    ]  # fmt: skip
    worst = surely_worse(steps)
    lines += ["## What surely cost accuracy", ""]
    lines += [f"- {sentence(point)[:-1]}; q = {q:.3g}." for point, q in worst] or [
        "No step by McNemar's test at a false discovery rate of 5 %, which is not to say that nothing was lost."
    ]
    kept = next((p for p in sorted(steps, key=lambda p: p["flops_ratio"]) if p["on_frontier"] and p.get("by_kind")), None)
    if kept:
        lines += ["", f"## Which questions the cheapest step on the frontier changed ({kept['name']})", "", broken(kept)]
    if summary["unused"]:
        lines += ["", f"## Examples that could not be used ({len(summary['unused'])})", ""]
        lines += [f"- {name}: {why}" for name, why in list(summary["unused"].items())[:20]]
    if summary["skipped"]:
        lines += ["", "## What was skipped", "", *(f"- {name}: {why}" for name, why in summary["skipped"].items())]
    uncounted = sorted({note for point in points for note in point["not_counted"]})
    if uncounted:
        lines += ["", f"Not in the FLOPs: {'; '.join(uncounted)}."]
    return "\n".join([*lines, ""])


def surely_worse(steps: Sequence[Mapping[str, Any]]) -> list[tuple[Mapping[str, Any], float]]:
    """Steps that are right less often than the dense model at a false discovery rate of 5 % over all of them, with their q-values, worst first."""
    paired = [point for point in steps if point.get("difference")]
    if not paired:
        return []
    q = benjamini_hochberg(np.array([point["p"] for point in paired], dtype=np.float64))
    found = [(p, float(v)) for p, v in zip(paired, q, strict=True) if v < 0.05 and p["difference"]["value"] < 0]
    return sorted(found, key=lambda one: one[0]["difference"]["value"])


def _answer(summary: Mapping[str, Any], full: Mapping[str, Any], steps: Sequence[Mapping[str, Any]]) -> str:
    """The answer in a few sentences."""
    kept = [p for p in steps if p.get("difference") and p["difference"]["low"] > -0.05]
    cheapest = min(kept, key=lambda p: p["flops_ratio"], default=None)
    faster, slower = (sum(p["verdict"] == verdict for p in steps) for verdict in ("faster", "slower"))
    text = f"The dense model answers {full['accuracy']:.1%} of {summary['n']} questions [{full['accuracy_low']:.1%}, {full['accuracy_high']:.1%}]. "
    if cheapest:
        change = cheapest["difference"]
        text += (
            f"The step that saves most while losing less than 5 points by its interval is *{cheapest['name']}*: {cheapest['flops_ratio']:.0%} of the FLOPs, "
            f"{change['value']:+.1%} [{change['low']:+.1%}, {change['high']:+.1%}]. It was picked among {len(steps)} on the questions that it is judged by: "
            f"confirm it on others. "
        )
    else:
        text += "No step loses less than 5 points by its interval. "
    if full["ratios"]:
        share = full["amdahl"]["prefill_share"]
        text += (
            f"Of {len(steps)} steps {faster} make an answer measurably faster and {slower} slower; the decoder's reading of the prompt is {share:.0%} of an "
            f"answer: without any of it the answer would come {full['amdahl']['bound']:.2f} times as fast, and no faster."
        )
    return text


def _null(full: Mapping[str, Any]) -> str:
    if not full["ratios"]:
        return "Times were not measured."
    ratio = full["ratios"]["answer"]
    return f"The null beside the times: the dense model in turns with itself takes {ratio['value']:.3f} of its own time ({ratio['verdict']})."
