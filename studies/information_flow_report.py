"""The information-flow study's numbers, figures and words, made from its records."""

from collections.abc import Sequence
from functools import reduce
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from probe.analysis.flow import METRICS, cutoff_layer, default_window, window_mean
from probe.analysis.stats import Correlation, benjamini_hochberg, bootstrap_mean, correlate, spearman, wilson
from probe.edits import window
from probe.errors import DataError
from probe.plots import flow as plots
from studies.run import Run, Sorts
from studies.study import Setting, Summary

Table = pd.DataFrame


def summarise(rows: Sorts, plan: Any, n_layers: int, tolerance: float) -> Summary:
    """Everything that the report says, as numbers. Raises DataError when no example could be used."""
    skipped, answers = _picked(rows, "skipped"), _picked(rows, "answer")
    if not len(answers):
        reason = skipped.text.iloc[0] if len(skipped) else "the data set is empty"
        raise DataError(f"none of the {len(skipped)} examples could be used; the first: {reason}")
    steps = _picked(rows, "cumulative")
    cumulative = _per_example(steps, "relative", range(1, n_layers))
    hidden = _picked(rows, "hidden")
    hidden = hidden[hidden.example.isin(steps.example)]
    from_start = np.concatenate([hidden.set_index("example").relative.loc[cumulative.index].to_numpy()[:, None], cumulative], 1)
    cutoff = cutoff_layer(from_start, tolerance, plan.seed) if len(from_start) else None
    flows = {name: _flow(rows, "flow", name, plan, n_layers) for name in plan.flows if name in _names(rows, "flow", "flow")}
    _add_q(flows)
    return {
        "run": "", "n": len(answers), "n_correct": int(answers.correct.sum()), "n_skipped": len(skipped),
        "skipped": [f"{row.example}: {row.text}" for row in skipped.itertuples()],
        "baseline_accuracy": float(answers.correct.mean()),
        "baseline_interval": wilson(int(answers.correct.sum()), len(answers)),
        "first_token_accuracy": _share(rows, "intact token"),
        "no_image_accuracy": _share(rows, "no-image token"),
        "hidden_image_accuracy": _share(rows, "hidden-image token"),
        "empty_knockout_max_change": float(_picked(rows, "empty")[["logit", "log_prob"]].abs().max().max()),
        "cutoff_layer": cutoff.layer if cutoff else None,
        "cutoff_interval": [cutoff.low, cutoff.high] if cutoff else None,
        "cutoff_tolerance": tolerance,
        "swept": "answered correctly" if plan.only_correct else "(right and wrong answers alike)",
        "window": plan.width, "default_window": default_window(n_layers), "n_layers": n_layers,
        "flows": flows,
        "controls": {name: _flow(rows, "control", name, plan, n_layers) for name in _names(rows, "control", "flow")},
        "cumulative": _curve(from_start, list(range(n_layers))) if len(from_start) else None,
        "lens": {
            word: _curve(_per_example(_picked(rows, "lens", word=word), "prob", range(n_layers)), list(range(n_layers)))
            for word in _names(rows, "lens", "word")
        },
        "rows": {
            group: {
                field: _curve(_per_example(_picked(rows, "row", flow=group), field, range(n_layers)), list(range(n_layers)))
                for field in ("entropy", "sink")
            }
            for group in _names(rows, "row", "flow")
        },
    }  # fmt: skip


def _filtered(rows: Sorts, what: str, where: dict[str, str], columns: Sequence[str] | None = None) -> pa.Table:
    table = rows.of(what)
    kept = reduce(pc.and_, (pc.equal(table[column], value) for column, value in {"what": what, **where}.items()))
    return (table if columns is None else table.select(columns)).filter(kept)


def _picked(rows: Sorts, what: str, **where: str) -> Table:
    """The rows of one sort as a frame."""
    table = _filtered(rows, what, where).to_pandas()
    words = table.select_dtypes("category").columns
    return table.astype(dict.fromkeys(words, object))  # a category would bring every example into each pivot


def _names(rows: Sorts, what: str, column: str) -> list[str]:
    """The values that a column has in the rows of one sort, sorted."""
    return sorted(name for name in pc.unique(_filtered(rows, what, {}, [column])[column]).to_pylist() if name is not None)


def _share(rows: Sorts, what: str) -> float:
    return float(_picked(rows, what).correct.mean())


def _per_example(table: Table, field: str, layers: range) -> Table:
    """A table (example layer) of one field."""
    return table.pivot(index="example", columns="layer", values=field).reindex(columns=list(layers))


def _curve(values: Table | np.ndarray, layers: list[int]) -> dict[str, Any]:
    found = bootstrap_mean(np.asarray(values, dtype=np.float64))
    return {
        "layers": layers,
        "mean": found.value.tolist(),
        "low": found.low.tolist(),
        "high": found.high.tolist(),
        "n": len(values),
    }


def _flow(rows: Sorts, what: str, name: str, plan: Any, n_layers: int) -> dict[str, Any]:
    """One flow: its curve, the other metrics, soft flow, and how well soft predicts causal, layer by layer."""
    own = _picked(rows, what, flow=name)
    layers = list(range(n_layers))
    made = _curve(_per_example(own, "relative", range(n_layers)), layers)
    made["median"] = np.nanmedian(_per_example(own, "relative", range(n_layers)), axis=0).tolist()
    made["columns"] = float(own.n_columns.mean())
    made["rows"] = float(own.n_rows.mean())
    per_column = _per_example(own.assign(each=own.relative / own.n_columns), "each", range(n_layers))
    made["per_column"] = _curve(per_column, layers)
    made["metrics"] = {
        field: _curve(_per_example(own, field, range(n_layers)), layers) for field in METRICS if field != "relative"
    }
    masses = _picked(rows, "mass", flow=name)
    if len(masses):
        soft = _per_example(masses, "mass", range(n_layers))
        made["mass"] = soft.mean().tolist()
        made["mass_interval"] = _curve(soft, layers)
        windows = [window(layer, plan.width, n_layers) for layer in layers]
        seen = window_mean(soft.to_numpy(), windows)
        caused = -_per_example(own, "log_prob", range(n_layers)).reindex(soft.index).to_numpy()
        made["correlation"] = [spearman(seen[:, i], caused[:, i]) for i in layers]
        tests = [_tested(seen[:, i], caused[:, i], plan.seed) for i in layers]
        made["correlation_tests"] = {name: [getattr(one, name) for one in tests] for name in ("low", "high", "p", "n")}
        made["correlation_over_layers"] = spearman(seen.mean(0), np.nanmean(caused, 0))
    return made


def _tested(seen: np.ndarray, caused: np.ndarray, seed: int) -> Correlation:
    """Spearman's correlation over the examples that have both, with its interval and permutation p-value."""
    known = ~(np.isnan(seen) | np.isnan(caused))
    return correlate(seen[known], caused[known], rank=True, seed=seed)


def _add_q(flows: dict[str, Any]) -> None:
    """q-values of the correlations of mass with effect, over all flows and layers."""
    tests = [flow["correlation_tests"] for flow in flows.values() if "mass" in flow]
    if tests:
        q = benjamini_hochberg(np.array([one["p"] for one in tests], dtype=float))
        for one, row in zip(tests, q, strict=True):
            one["q"] = row.tolist()


def figures(run: Run, summary: Summary) -> None:
    """The figures of a run: the flows, the soft flow beside them, and the answer read off every layer."""
    run.figure("information-flow", plots.flow_figure(summary), plots.flow_page(summary))
    run.figure("soft-and-causal", plots.soft_figure(summary), plots.soft_page(summary))
    run.figure("answer-by-layer", plots.lens_figure(summary), plots.lens_page(summary))


def report(run: Run, summary: Summary, setting: Setting) -> str:
    """The report: each figure with a sentence, and the numbers behind it."""
    low, high = summary["baseline_interval"]
    strongest = {
        name: min(zip(flow["mean"], flow["layers"], flow["low"], flow["high"], strict=True))
        for name, flow in summary["flows"].items()
    }
    lines = [
        "# Information flow", "",
        f"*Where, in which layers, does what the model saw reach its answer?* Model `{setting.subject.name}` "
        f"({summary['n_layers']} layers), data `{setting.data.name}`, windows of {summary['window']} layers.", "",
        "## What the model can do", "",
        f"- It answers {summary['baseline_accuracy']:.1%} of {summary['n']} questions (95 % Wilson interval {low:.1%} to {high:.1%}).",
        f"- Scored by the first token alone: intact {summary['first_token_accuracy']:.1%}, {_without(summary)}with the picture there but hidden from all text in all layers "
        f"{summary['hidden_image_accuracy']:.1%}.",
        f"- Knocking out nothing changes logits and log-probabilities by at most {summary['empty_knockout_max_change']:.1e}.",
        f"- {summary['n_skipped']} examples could not be used." if summary["n_skipped"] else "- Every example could be used.",
        *(f"  - {line}" for line in summary["skipped"][:20]), "",
        "## The flows", "", "![information flow](figures/information-flow.png)", "",
        f"Each point: attention edges cut in a window of {summary['window']} layers around it; the change in the probability of the "
        f"model's own first answer token, mean over {next(iter(summary['flows'].values()))['n'] if summary['flows'] else 0} examples "
        f"{summary['swept']}, with a 95 % bootstrap interval. Strongest effect of each flow:", "",
        "| flow | layer | change of p | 95 % interval | n | columns cut | per column |", "|---|---|---|---|---|---|---|",
        *(
            f"| {name} | {layer} | {mean:.1f} % | {low:.1f} to {high:.1f} % | {summary['flows'][name]['n']} | "
            f"{summary['flows'][name]['columns']:.1f} | {summary['flows'][name]['per_column']['mean'][layer]:.2f} % |"
            for name, (mean, layer, low, high) in strongest.items()
        ), "",
        *_controls(summary),
        *_depth(summary),
        "## Soft flow beside causal flow", "", "![soft and causal](figures/soft-and-causal.png)", "",
        "Attention mass on the same edges, averaged over heads and the window's layers, and its rank correlation with the causal "
        "effect (drop of the log-probability) over examples, with bootstrap intervals. At the layer where each flow's effect is strongest:", "",
        *_soft(summary),
        "## The answer, read off every layer", "", "![answer by layer](figures/answer-by-layer.png)", "",
        "The logit lens at the last position: the probability of the answer's first token in lower case and capitalised, and of a "
        "false option in the model's own case.", "",
    ]  # fmt: skip
    return "\n".join(lines)


def _without(summary: Summary) -> str:
    share = summary["no_image_accuracy"]
    return "" if share is None else f"without the picture {share:.1%}, "


def _soft(summary: Summary) -> list[str]:
    """Whether mass goes with effect, where the effect is."""
    lines = ["| flow | layer | rank correlation | 95 % interval | q | layers with q < 0.05 |", "|---|---|---|---|---|---|"]
    for name, flow in summary["flows"].items():
        if "mass" not in flow:
            continue
        tests, at = flow["correlation_tests"], int(np.argmin(flow["mean"]))
        value, low, high, q = (side[at] for side in (flow["correlation"], tests["low"], tests["high"], tests["q"]))
        clear = sum(one is not None and one < 0.05 for one in tests["q"])
        told = "not defined | | |" if value is None or low is None else f"{value:.2f} | {low:.2f} to {high:.2f} | {q:.3f} |"
        lines.append(f"| {name} | {at} | {told} {clear} of {len(tests['q'])} |")
    return [
        *lines, "",
        "p-values are of permutations, q-values (Benjamini and Hochberg) over all flows and layers. Where the interval includes zero, mass is not "
        "shown to say which examples depend on a flow; where a flow has little effect in any example, there is nothing to predict.", "",
    ]  # fmt: skip


def _controls(summary: Summary) -> list[str]:
    lines = ["Controls (random image columns, as many as there are where the image has so many; same rows and windows):", ""]
    for name, flow in summary["controls"].items():
        worst = min(zip(flow["mean"], flow["layers"], strict=True))
        against = "related->question" if name == "random->question" else "question->last"
        if against in summary["flows"]:
            other = min(summary["flows"][against]["mean"])
            lines.append(
                f"- {name}: at most {worst[0]:.1f} % (layer {worst[1]}) with {flow['columns']:.1f} columns, where {against} takes {other:.1f} % with "
                f"{summary['flows'][against]['columns']:.1f} columns."
            )
    return [*lines, ""]


def _never(high: int, n_layers: int) -> str:
    return f"; {n_layers} means that it matters to the end, which the interval includes" if high == n_layers else ""


def _depth(summary: Summary) -> list[str]:
    if summary["cutoff_layer"] is None:
        return []
    low, high = summary["cutoff_interval"]
    if summary["cutoff_layer"] == summary["n_layers"]:
        return [
            "## How deep the image is needed", "",
            f"To the end: hidden even from the last layer alone, the image changes the answer's probability by more than "
            f"{summary['cutoff_tolerance']:g} % on average (95 % interval of the cut-off: {low} to {high}, {summary['n_layers']} "
            f"meaning the end).", "",
        ]  # fmt: skip
    return [
        "## How deep the image is needed", "",
        f"Hidden from all text from layer {summary['cutoff_layer']} on, or from any later one, the image changes the answer's probability by at most "
        f"{summary['cutoff_tolerance']:g} % on average (95 % interval of the layer {low} to {high}{_never(high, summary['n_layers'])}).", "",
    ]  # fmt: skip
