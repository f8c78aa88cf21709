"""Figures of implicit alignment. Each takes the summary of the study and gives the figure twice: for paper, and for a page."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from probe.plots import panels
from probe.plots.panels import GREY, Line, Pair, reach
from probe.plots.style import COLOURS, LAYOUT, styled, ticks

Summary = Mapping[str, Any]
TINT = {"image": COLOURS[0], "video": COLOURS[1], "audio": COLOURS[2], "text": COLOURS[3]}
BANDS = "bands: 95 % bootstrap intervals over examples"


def _counted(summary: Summary, about: str = "") -> str:
    """How many examples of each modality a figure is over."""
    counts = ", ".join(f"{one['n']} {_title(name).lower()}" for name, one in summary["modalities"].items())
    return f"n = {counts}{about and f'; {about}'}"


def _states(count: int) -> list[int]:
    return list(range(count))


def similarity(summary: Summary) -> Pair:
    """Matched beside unmatched similarity at each state and the centroids of all examples, a panel for each modality."""
    drawn, x = [], []
    for name, one in summary["modalities"].items():
        found, lines = one["similar"]["avg"], []
        lines.append(("an example's own words", found["matched"], COLOURS[0], False))
        if found["unmatched"]["mean"] is not None:
            lines.append(("the words of other examples", found["unmatched"], GREY, True))
        if one["within"]["perceptual"] is not None:
            within = one["within_interval"]["perceptual"] or {"mean": one["within"]["perceptual"]}
            lines.append(("perceptual tokens of other examples", within, COLOURS[2], True))
        if one["similar"]["global"]["mean"] is not None:
            lines.append(("centroids of all tokens of all examples", one["similar"]["global"], COLOURS[1], False))
        drawn.append((f"{_title(name)} (n = {one['n']})", lines))
        x.append(_states(len(found["matched"]["mean"])))
    figure, page = panels.curves(drawn, x, "state (0 enters the model)", "cosine of mean tokens")
    if len(drawn) < 4:
        _stacked(figure, min(2, len(drawn)))
    return figure, page


def _stacked(figure: Any, columns: int) -> None:
    """Sets a figure's legend anew in fewer columns, where its names side by side are wider than the panels."""
    (wide,) = figure.legends
    handles, names = wide.legend_handles, [told.get_text() for told in wide.get_texts()]
    wide.remove()
    with styled():
        figure.legend(handles, names, loc="outside lower center", ncols=columns, handlelength=3.2)


def _title(name: str) -> str:
    return {"image": "Pictures", "video": "Clips", "audio": "Sounds", "text": "Text twins"}.get(name, name)


def sites(summary: Summary) -> Pair:
    """Similarity inside the block by site, matched and unmatched, layers averaged."""
    modalities = summary["modalities"]
    names = [
        site for site in next(iter(modalities.values()))["sites"] if any(one["sites"][site] for one in modalities.values())
    ]
    with styled() as figure_class:
        figure = figure_class(figsize=(max(4.2, 3.0 * len(modalities) + 0.6), 3.3))
        axes = figure.subplots(1, len(modalities), sharey=True, squeeze=False)[0]
        for axis, (name, one) in zip(axes, modalities.items(), strict=True):
            for pairing, colour, label in (
                ("matched", COLOURS[0], "an example's own words"),
                ("unmatched", GREY, "the words of other examples"),
            ):
                at = [i for i, site in enumerate(names) if one["sites"][site] and one["sites"][site][pairing]]
                found = [one["sites"][names[i]][pairing] for i in at]
                middle = np.array([f["value"] for f in found])
                ends = np.array([reach(f) for f in found]).reshape(-1, 2).T
                shift = -0.13 if pairing == "matched" else 0.13
                axis.errorbar(np.array(at) + shift, middle, yerr=ends, fmt="o", color=colour, label=label, capsize=2)
            axis.set(title=_title(name), xticks=range(len(names)), xlabel="site in the block")
            axis.set_xticklabels(names)
            axis.axhline(0, color="#888888", linewidth=0.8)
        axes[0].set_ylabel("cosine of mean tokens")
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    text = _counted(summary, "layers averaged; bars: 95 % bootstrap intervals over examples")
    return panels.noted((figure, _sites_page(modalities, names)), text)


def _sites_page(modalities: Mapping[str, Any], names: Sequence[str]) -> Any:
    from plotly.subplots import make_subplots

    page = make_subplots(rows=1, cols=len(modalities), subplot_titles=[_title(name) for name in modalities], shared_yaxes=True)
    for column, one in enumerate(modalities.values(), 1):
        for pairing, colour in (("matched", COLOURS[0]), ("unmatched", GREY)):
            kept = [site for site in names if one["sites"][site] and one["sites"][site][pairing]]
            found = [one["sites"][site][pairing] for site in kept]
            page.add_scatter(
                x=kept, y=[f["value"] for f in found], mode="markers", name=pairing, legendgroup=pairing, showlegend=column == 1,
                marker={"color": colour, "size": 9}, error_y={
                    "array": [reach(f)[1] for f in found], "arrayminus": [reach(f)[0] for f in found]
                }, row=1, col=column,
            )  # fmt: skip
    page.update_yaxes(title_text="cosine of mean tokens", col=1)
    return page.update_layout(**LAYOUT, height=420)


def spaces(summary: Summary) -> Pair:
    """Similarity of every kind of token with every other, over all pairs of examples, at the input, the middle and the end."""
    found = summary["spaces"]
    titles = [f"{name} (state {index})" for name, index in found["states"].items()]
    kinds = _short(found["kinds"])
    drawn = panels.tables(titles, list(found["tables"].values()), kinds, kinds, (-1.0, 1.0), "RdBu_r", "cosine")
    return panels.noted(drawn, _counted(summary, "means over all pairs of examples"))


def _short(kinds: Sequence[str]) -> list[str]:
    return [kind.replace("perceptual", "tokens").replace("textual", "words") for kind in kinds]


def plane(summary: Summary) -> Pair:
    """Mean tokens of every example in the plane, by PCA above and t-SNE below, at a few states: do the kinds lie apart?"""
    kinds = [(name, side) for name in summary["modalities"] for side in ("perceptual", "textual")]
    states = [int(state) for state in summary["plane"]["states"]]
    clouds = [_clouds(ways, kinds) for ways in summary["plane"]["states"].values()]
    with styled() as figure_class:
        figure = figure_class(figsize=(2.7 * len(states) + 0.4, 5.9))
        axes = figure.subplots(2, len(states), squeeze=False)
        for column, (state, cloud) in enumerate(zip(states, clouds, strict=True)):
            for row, (way, points) in enumerate(cloud.items()):
                axis = axes[row, column]
                for kind in kinds:
                    axis.scatter(*points[kind].T, s=7, **_mark(kind), label=_kind(kind), linewidths=0.6)
                axis.set(title=f"state {state}" if row == 0 else "", xticks=[], yticks=[], ylabel=way if column == 0 else "")
                axis.grid(False)
        figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=4, markerscale=2)
    about = f"one mark is the mean token of one of at most {summary['plane']['n']} examples"
    return panels.noted((figure, _plane_page(clouds, states, kinds)), _counted(summary, about))


def _clouds(ways: Mapping[str, Any], kinds: Sequence[tuple[str, str]]) -> dict[str, dict[tuple[str, str], np.ndarray]]:
    return {way: {kind: np.array(found[" ".join(kind)]).reshape(-1, 2) for kind in kinds} for way, found in ways.items()}


def _kind(kind: tuple[str, str]) -> str:
    return f"{kind[0]} {'tokens' if kind[1] == 'perceptual' else 'words'}"


def _mark(kind: tuple[str, str]) -> dict[str, Any]:
    colour = TINT.get(kind[0], GREY)
    return (
        {"color": colour, "marker": "o"}
        if kind[1] == "perceptual"
        else {"edgecolors": colour, "facecolors": "none", "marker": "s"}
    )


def _plane_page(clouds: Sequence[Mapping[str, Any]], states: Sequence[int], kinds: Sequence[tuple[str, str]]) -> Any:
    from plotly.subplots import make_subplots

    ways = list(clouds[0])
    titles = [f"{way}, state {state}" for way in ways for state in states]
    page = make_subplots(rows=len(ways), cols=len(states), subplot_titles=titles)
    for column, cloud in enumerate(clouds, 1):
        for row, way in enumerate(ways, 1):
            for kind in kinds:
                points = cloud[way][kind]
                symbol = "circle" if kind[1] == "perceptual" else "square-open"
                page.add_scatter(
                    x=points[:, 0], y=points[:, 1], mode="markers", name=_kind(kind), legendgroup=_kind(kind), showlegend=row == column == 1,
                    marker={"color": TINT.get(kind[0], GREY), "symbol": symbol, "size": 5}, row=row, col=column,
                )  # fmt: skip
    page.update_xaxes(visible=False).update_yaxes(visible=False)
    return page.update_layout(**{**LAYOUT, "hovermode": "closest"}, height=340 * len(ways))


def norms(summary: Summary) -> Pair:
    """Left, the median norm of a token at each state; right, how like itself a token is one layer on."""
    norm, drift = [], []
    for name, one in summary["modalities"].items():
        for side, dashed in (("perceptual", False), ("textual", True)):
            label = f"{name} {'tokens' if side == 'perceptual' else 'words'}"
            norm.append((label, one["norm"][side]["norm_median"], TINT.get(name, GREY), dashed))
            if one["drift"][side]["1"]["mean"] is not None:
                drift.append((label, one["drift"][side]["1"], TINT.get(name, GREY), dashed))
    drawn = [("Norms", norm), ("The same token, one layer on", drift)]
    x = [_states(len(norm[0][1]["mean"])), _states(len(drift[0][1]["mean"]))]
    figure, page = panels.curves(drawn, x, "state (0 enters the model)", "median norm", share=False)
    figure.axes[1].set_ylabel("cosine with itself")
    page.update_yaxes(title_text="cosine with itself", col=2)
    figure.set_size_inches(8.6, 4.1)
    return panels.noted((figure, page), _counted(summary, BANDS))


def vocabulary(summary: Summary) -> Pair:
    """What the unembedding makes of the two kinds of tokens: how far apart their words are, and how spread."""
    apart, spread = [], []
    for name, one in summary["modalities"].items():
        colour, found = TINT.get(name, GREY), one["words"]
        apart.append((f"{name}", found["same"]["js_of_means"], colour, False))
        spread.append((f"{name}", found["same"]["entropy_p"], colour, False))
        spread.append((f"{name}, its words", found["same"]["entropy_t"], colour, True))
    states = next(iter(summary["modalities"].values()))["words"]["states"]
    figure, page = panels.curves(
        [("How unlike the words read off both sides are", apart), ("Entropy of a token's distribution", spread)],
        [states, states], "state (0 enters the model)", "Jensen-Shannon divergence, nats", share=False,
    )  # fmt: skip
    figure.axes[1].set_ylabel("nats")
    page.update_yaxes(title_text="nats", col=2)
    figure.set_size_inches(8.6, 4.1)
    counts = ", ".join(
        f"{one['words']['same']['js_of_means']['n']} {_title(name).lower()}" for name, one in summary["modalities"].items()
    )
    return panels.noted((figure, page), f"n = {counts}; {BANDS}")


def weights(summary: Summary) -> Pair:
    """Left, how far the subnetworks of two kinds of tokens overlap, and how far with one's inputs permuted or none; right, by layer."""
    found = summary["weights"]
    layers, kinds = found["layers"], found["kinds"]
    table = _halves(found)
    rows, columns = _short(kinds), [*_short(kinds), "|W| alone"]
    with styled() as figure_class:
        figure = figure_class(figsize=(10.0, max(3.6, 0.42 * len(kinds) + 2.0)))
        left, right = figure.subplots(1, 2)
        drawn = left.imshow(table, vmin=found["chance"], vmax=1, cmap="Blues", aspect="auto")
        for i, j in np.argwhere(np.isfinite(table)):
            dark = table[i, j] > 0.4 * found["chance"] + 0.6
            left.text(j, i, f"{table[i, j]:.3f}", ha="center", va="center", fontsize=7, color="white" if dark else "#222222")
        left.set(title=HALVES, xticks=range(len(columns)), yticks=range(len(rows)))
        left.set_xticklabels(columns, rotation=90 if len(columns) > 4 else 0)
        left.set_yticklabels(rows)
        left.grid(False)
        figure.colorbar(drawn, ax=left, shrink=0.8, label=f"IoU (from two random masks, {found['chance']:.2f})")
        for name, curve, colour, dashed in _overlap_lines(found):
            right.plot(layers, curve["mean"], marker="o", color=colour, linestyle="--" if dashed else "-", label=name)
            if "low" in curve:
                right.fill_between(layers, curve["low"], curve["high"], color=colour, alpha=0.15, linewidth=0)
        right.axhline(found["chance"], color="#555555", linewidth=1.0, linestyle=":", label="two random masks")
        right.set(title="Perceptual against textual, by layer", xlabel="layer", ylabel="IoU", xticks=ticks(layers))
        right.set_ylim(found["chance"] - 0.05, 1.02)
        right.legend(loc="upper center", bbox_to_anchor=(0.5, -0.17), ncols=2)
    note = f"n = {found['n_matrices']} matrices; bands: 95 % bootstrap intervals over a layer's matrices"
    return panels.noted((figure, _weights_page(found, table, rows, columns)), note)


HALVES = "Overlap of kept weights\n(below the diagonal: inputs permuted)"


def _halves(found: Mapping[str, Any]) -> np.ndarray:
    """Pairs of kinds above the diagonal, with permuted inputs below it, and beside them each kind against the magnitudes alone."""
    own, permuted = (np.array(found[name], dtype=float) for name in ("table", "permuted_table"))
    both = np.where(np.tri(len(own), dtype=bool), permuted, own)
    return np.column_stack([both, found["magnitude_by_kind"]])


def _overlap_lines(found: Mapping[str, Any]) -> list[Line]:
    """Lines by layer; the least pair only where there are several."""
    lines: list[Line] = [
        (name, found["across_by_layer"][key], colour, dashed)
        for name, key, colour, dashed in (
            ("both kinds' own inputs", "own", COLOURS[0], False), ("one's inputs permuted", "permuted", GREY, True),
            ("either against |W| alone", "magnitude", COLOURS[4], True),
        )
        if found["across_by_layer"][key] is not None
    ]  # fmt: skip
    if len(found["by_layer"]) > 1:
        lines.append(("least of any two kinds", {"mean": found["least_by_layer"]}, COLOURS[1], True))
    return lines


def _weights_page(found: Mapping[str, Any], table: np.ndarray, rows: Sequence[str], columns: Sequence[str]) -> Any:
    from plotly.subplots import make_subplots

    page = make_subplots(rows=1, cols=2, subplot_titles=[HALVES.replace("\n", " "), "Perceptual against textual, by layer"])
    page.add_heatmap(
        z=table, x=list(columns), y=list(rows), colorscale="Blues", zmin=found["chance"], zmax=1, texttemplate="%{z:.3f}", showscale=False,
        row=1, col=1,
    )  # fmt: skip
    for name, curve, colour, dashed in _overlap_lines(found):
        page.add_scatter(
            x=found["layers"], y=curve["mean"], name=name, line={"color": colour, "dash": "dash" if dashed else "solid"}, row=1, col=2,
        )  # fmt: skip
    page.add_hline(y=found["chance"], line_dash="dot", annotation_text="two random masks", row=1, col=2)
    page.update_yaxes(autorange="reversed", row=1, col=1)
    return page.update_layout(**{**LAYOUT, "hovermode": "closest"}, height=460)
