"""Figures of attention sinks: scores and thresholds, heads, and what hiding sinks does."""

from collections.abc import Mapping
from typing import Any

from probe.analysis.sinks import THRESHOLDS
from probe.plots import panels
from probe.plots.panels import GREY, Line, Pair
from probe.plots.style import COLOURS

Summary = Mapping[str, Any]
LINES = {
    "shown": ("what is shown", COLOURS[2], False),
    "text": ("words", COLOURS[0], False),
    "control": ("control", GREY, True),
}


def scores(summary: Summary) -> Pair:
    """Left, the share of positions above each threshold; right, the largest score by layer."""
    drawn: list[tuple[str, list[Line]]] = [
        (title, [(name, summary[key][kind], colour, dashed) for kind, (name, colour, dashed) in LINES.items()])
        for key, title in (("by_threshold", "Positions above a threshold"), ("largest", "The largest score"))
    ]
    x = [list(range(len(THRESHOLDS))), summary["layers"]]
    figure, page = panels.curves(drawn, x, "layer", "positions, percent", share=False)
    left, right = figure.axes[:2]
    left.set(xlabel="threshold", xticks=x[0], xticklabels=[f"{tau:g}" for tau in THRESHOLDS])
    left.set_ylim(bottom=-2)
    right.set_ylabel("score")
    if max(summary["largest"]["text"]["mean"]) > summary["tau"] / 2:
        right.axhline(summary["tau"], color=GREY, linestyle=":", linewidth=0.9)
        page.add_hline(y=summary["tau"], line_dash="dot", line_color=GREY, row=1, col=2)
    page.update_xaxes(title_text="threshold", tickvals=x[0], ticktext=[f"{tau:g}" for tau in THRESHOLDS], col=1)
    page.update_yaxes(title_text="score", col=2)
    figure.set_size_inches(8.6, 3.6)
    return figure, page


def heads(summary: Summary) -> Pair:
    """The last row's attention to what is shown, how often each head is image-centric, and the share that falls on sinks."""
    found = summary["heads"]
    named = [("Attention to what is shown", found["mass"]), ("Image-centric", found["centric"])]
    if found["sink_share"] is not None:
        named.append(("Of that, on sinks", found["sink_share"]))
    layers, count = summary["layers"], len(found["mass"][0])
    return panels.tables(
        [title for title, _ in named], [table for _, table in named], [str(layer) for layer in layers], [str(i) for i in range(count)],
        (0.0, 1.0), "Blues", "share", down="layer", across="head",
    )  # fmt: skip


def hiding(summary: Summary) -> Pair:
    """What hiding each group does to the answer, beside as many random positions."""
    names = {"sinks": "sinks", "highest": f"{summary['count']} highest"}
    known = {label: summary["paired"][group]["log_prob"] for group, label in names.items() if summary["paired"][group]}
    whole = {"all that is shown": summary["cause"]["everything"]["log_prob"]}
    own = {label: one["own"] for label, one in known.items()}
    effect = [
        ("hidden", {**own, **whole}, COLOURS[1]),
        ("as many random positions", {k: v["random"] for k, v in known.items()}, GREY),
    ]
    gap = [("difference", {label: one["difference"] for label, one in known.items()}, COLOURS[0])]
    drawn = [("Hidden from the words", effect), ("Hidden less random", gap)] if known else [("Hidden from the words", effect)]
    return panels.values(drawn, "change of log-probability, nats", share=False, line=0.0)
