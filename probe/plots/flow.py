"""Figures of cross-modal information flow. Each takes the summary of the study: curves with `layers mean low high`."""

from collections.abc import Mapping, Sequence
from typing import Any

from probe.plots.style import COLOURS, LAYOUT, band, styled, ticks

Curve = Mapping[str, Any]
Summary = Mapping[str, Any]
LABELS = {
    "image->question": "image → question", "image->last": "image → last", "question->last": "question → last",
    "last->last": "last → last", "related->question": "related patches → question",
    "other->question": "other patches → question", "random->question": "random patches → question (control)",
    "random->last": "random patches → last (control)",
}  # fmt: skip
TINT = {
    "image->question": COLOURS[0], "image->last": COLOURS[1], "question->last": COLOURS[2], "last->last": COLOURS[6],
    "related->question": COLOURS[3], "other->question": COLOURS[4], "random->question": "#999999", "random->last": "#999999",
}  # fmt: skip
CHANGE = "change in answer probability (%)"


def _panels(summary: Summary) -> list[tuple[str, dict[str, Curve], str]]:
    """(title, curves, axis) of the main figure."""
    flows, controls = summary["flows"], summary["controls"]
    main = {name: flows[name] for name in ("image->question", "image->last", "question->last", "last->last") if name in flows}
    patches = {name: flows[name] for name in ("related->question", "other->question") if name in flows}
    if patches and "random->question" in controls:
        patches["random->question"] = controls["random->question"]
    width = summary["window"]
    return [
        (f"Edges cut in {width} layers around each layer", main, "layer at the window's centre"),
        ("Which patches the question reads", patches, "layer at the window's centre"),
        ("Image hidden from this layer on", {"cumulative": summary["cumulative"]} if summary["cumulative"] else {}, "first layer without the image"),
    ]  # fmt: skip


def flow_figure(summary: Summary) -> Any:
    """Three panels: the four flows, the patches, the cumulative cut-off with its interval (matplotlib)."""
    with styled() as figure_class:
        figure = figure_class(figsize=(11.5, 4.3))
        axes = figure.subplots(1, 3)
        for axis, (title, curves, label) in zip(axes, _panels(summary), strict=True):
            for name, curve in curves.items():
                _line(
                    axis,
                    curve,
                    LABELS.get(name, "image → all text"),
                    TINT.get(name, COLOURS[0]),
                    dashed=name.startswith("random"),
                )
            axis.axhline(0, color="#888888", linewidth=0.8)
            axis.set(title=title, xlabel=label)
            _layer_ticks(axis, summary["n_layers"])
            if len(curves) > 1:
                _legend(axis)
            elif curves:
                axis.set_xlabel(f"{label} (n = {next(iter(curves.values()))['n']})")
        axes[0].set_ylabel(CHANGE)
        if summary["cutoff_layer"] is not None:
            low, high = summary["cutoff_interval"]
            axes[2].axvspan(low, high, color=COLOURS[2], alpha=0.12, linewidth=0)
            axes[2].axvline(summary["cutoff_layer"], color=COLOURS[2], linestyle="--", linewidth=1.2)
            axes[2].annotate(
                _depth(summary["cutoff_layer"], low, high, summary["n_layers"], summary["cutoff_tolerance"]), (summary["cutoff_layer"], 0.5),
                xycoords=("data", "axes fraction"), xytext=(-6, 0), textcoords="offset points", ha="right", fontsize=8, color=COLOURS[2],
            )  # fmt: skip
    return figure


def _depth(layer: int, low: int, high: int, n_layers: int, tolerance: float) -> str:
    ends = [str(low), "never" if high == n_layers else str(high)]
    where = "never" if layer == n_layers else f"from layer {layer} on"
    return f"changes p by at most\n{tolerance:g} % on average\n{where} [{', '.join(ends)}]"


def soft_figure(summary: Summary) -> Any:
    """Attention mass beside causal effect for each flow, and their rank correlation over examples (matplotlib)."""
    flows = {name: flow for name, flow in summary["flows"].items() if "mass" in flow}
    with styled() as figure_class:
        figure = figure_class(figsize=(9.6, 4.6))
        left, right = figure.subplots(1, 2)
        for name, flow in flows.items():
            _line(left, flow["mass_interval"], LABELS[name], TINT[name])
            _line(right, _agreeing(flow), LABELS[name], TINT[name])
        left.set(title="Soft flow: attention mass", xlabel="layer", ylabel="share of a row's attention")
        right.set(
            title="Does it predict the causal flow?",
            xlabel="layer",
            ylabel="Spearman correlation over examples",
            ylim=(-1.05, 1.05),
        )
        right.axhline(0, color="#888888", linewidth=0.8)
        for axis in (left, right):
            _layer_ticks(axis, summary["n_layers"])
        if flows:
            _legend(left)
            _legend(right)
    return figure


def _agreeing(flow: Curve) -> dict[str, Any]:
    """The correlation of mass with effect as a curve with its interval."""
    tests = flow["correlation_tests"]
    floats = {
        name: [float("nan") if value is None else value for value in side]
        for name, side in (("mean", flow["correlation"]), ("low", tests["low"]), ("high", tests["high"]))
    }
    return {"layers": flow["layers"], **floats, "n": max(tests["n"])}


def lens_figure(summary: Summary) -> Any:
    """The answer's probability at the last position, layer by layer (matplotlib)."""
    with styled() as figure_class:
        figure = figure_class(figsize=(4.6, 3.4))
        axis = figure.subplots()
        for (word, curve), colour in zip(summary["lens"].items(), COLOURS, strict=False):
            _line(axis, curve, word, colour)
        axis.set(
            title="The answer, read off every layer",
            xlabel="layer",
            ylabel="probability under the logit lens",
            ylim=(-0.03, 1.03),
        )
        _layer_ticks(axis, summary["n_layers"])
        if summary["lens"]:
            axis.legend(loc="upper left")
    return figure


def _line(axis: Any, curve: Curve, label: str, colour: str, dashed: bool = False) -> None:
    axis.fill_between(curve["layers"], curve["low"], curve["high"], color=colour, alpha=0.16, linewidth=0)
    axis.plot(
        curve["layers"],
        curve["mean"],
        marker="o",
        color=colour,
        linestyle="--" if dashed else "-",
        label=f"{label} (n={curve['n']})",
    )


def _legend(axis: Any) -> None:
    """Below the panel, where it hides no curve."""
    axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=2 if len(axis.get_legend_handles_labels()[0]) > 3 else 1)


def _layer_ticks(axis: Any, n_layers: int) -> None:
    axis.set_xticks(ticks(list(range(n_layers))))
    axis.set_xlim(-0.4, n_layers - 0.6)


def _page(panels: Sequence[tuple[str, Mapping[str, Curve], str]], ylabel: str, height: int = 430) -> Any:
    from plotly.subplots import make_subplots

    panels = [panel for panel in panels if panel[1]]
    figure = make_subplots(rows=1, cols=max(1, len(panels)), subplot_titles=[title for title, _, _ in panels])
    for column, (_, curves, xlabel) in enumerate(panels, 1):
        for name, curve in curves.items():
            colour = TINT.get(name, COLOURS[list(curves).index(name) % len(COLOURS)])
            label = f"{LABELS.get(name, name)} (n={curve['n']})"
            if "low" in curve:
                edge = {"mode": "lines", "line": {"width": 0}, "showlegend": False, "hoverinfo": "skip", "legendgroup": name}
                figure.add_scatter(x=curve["layers"], y=curve["high"], row=1, col=column, **edge)
                figure.add_scatter(
                    x=curve["layers"], y=curve["low"], row=1, col=column, fill="tonexty", fillcolor=band(colour, 0.15), **edge
                )
            figure.add_scatter(
                x=curve["layers"], y=curve["mean"], row=1, col=column, mode="lines+markers", name=label, legendgroup=name,
                line={"color": colour, "width": 2.4}, hovertemplate="%{y:.2f}", showlegend=True,
            )  # fmt: skip
        figure.update_xaxes(
            title_text=xlabel, row=1, col=column, dtick=max(1, len(next(iter(curves.values()))["layers"]) // 12)
        )
    figure.update_yaxes(title_text=ylabel, row=1, col=1)
    figure.update_layout(**LAYOUT, height=height, legend={"orientation": "h", "y": -0.25})
    return figure


def flow_page(summary: Summary) -> Any:
    """The main figure as a plotly page."""
    return _page(_panels(summary), CHANGE)


def soft_page(summary: Summary) -> Any:
    """Soft flow and its correlation with the causal flow, as a plotly page."""
    flows = {name: flow for name, flow in summary["flows"].items() if "mass" in flow}
    mass = {name: flow["mass_interval"] for name, flow in flows.items()}
    agree = {name: _agreeing(flow) for name, flow in flows.items()}
    return _page(
        [("attention mass", mass, "layer"), ("rank correlation with the causal flow", agree, "layer")], "share or correlation"
    )


def lens_page(summary: Summary) -> Any:
    """The answer's probability by layer, as a plotly page."""
    return _page([("the answer, read off every layer", dict(summary["lens"]), "layer")], "probability under the logit lens")
