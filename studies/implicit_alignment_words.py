"""The report of the implicit-alignment study: the paper's findings one by one, each held against the numbers."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from probe.sites import SITES
from studies.study import Setting, Summary
from studies.telling import above, bracketed, ranged

FINDINGS = (
    "Perceptual and textual tokens live in different spaces",
    "They use the same weights all the same",
    "They are implicitly aligned, most inside the blocks",
    "The score goes with task performance, and against hallucination",
)
LEVEL = 0.05


def report(summary: Summary, setting: Setting) -> str:
    """The report: a verdict on each finding, then the figures with what they show."""
    shown = ", ".join(
        f"{name} ({one['n']} examples of `{one['data']}` to `{one['model']}`)" for name, one in summary["modalities"].items()
    )
    lines = [
        "# Implicit alignment", "",
        "*Are perceptual and textual tokens implicitly aligned inside the language model, and does that predict what it can do?* "
        f"Shown: {shown}.", "",
        *_skipped(summary),
        "## The paper's findings (arXiv 2405.16700), here", "", "| finding | verdict | numbers |", "|---|---|---|",
    ]  # fmt: skip
    verdicts = [_spaces(summary), _weights(summary), _aligned(summary), _predicts(summary)]
    lines += [
        f"| {i}. {text} | **{verdict}** | {why} |"
        for i, (text, (verdict, why)) in enumerate(zip(FINDINGS, verdicts, strict=True), 1)
    ]
    lines += ["", *_caveat(setting), *_figures(summary)]
    return "\n".join(lines) + "\n"


def _skipped(summary: Summary) -> list[str]:
    lines = [
        f"- {one['n_skipped']} {name} examples could not be used; the first: {one['skipped'][0]}"
        for name, one in summary["modalities"].items() if one["n_skipped"]
    ]  # fmt: skip
    return [*lines, ""] if lines else []


def _caveat(setting: Setting) -> list[str]:
    if not setting.subject.name.startswith("demo"):
        return []
    return [
        "The demo models were not left to align by themselves: while their towers learned, an auxiliary loss asked that a position be readable "
        "like the end of a phrase after three layers of the frozen language model. Alignment from there on is a matter of training, "
        "and only its course and what it goes with are findings.", "",
    ]  # fmt: skip


def _spaces(summary: Summary) -> tuple[str, str]:
    """Is a token liker to its own kind (of other examples) than to an example's own words, at every state?"""
    parts, all_hold, any_known = [], True, False
    for name, one in summary["modalities"].items():
        within, matched = one["within"], one["similar"]["avg"]["matched"]
        if within["perceptual"] is None or within["textual"] is None or name == "text":
            continue
        any_known = True
        apart = [high < min(p, t) for high, p, t in zip(matched["high"], within["perceptual"], within["textual"], strict=True)]
        all_hold &= all(apart)
        middle = len(apart) // 2
        parts.append(
            f"{name}: at {sum(apart)} of {len(apart)} states (state {middle}: cross {matched['mean'][middle]:.2f}, within "
            f"{within['perceptual'][middle]:.2f} and {within['textual'][middle]:.2f})"
        )
    if not any_known:
        return "not tested", "fewer than two examples of each modality"
    return ("holds" if all_hold else "holds in part"), "nearer to their own kind than to the words: " + "; ".join(parts)


def _weights(summary: Summary) -> tuple[str, str]:
    found = summary["weights"]
    if found["across"] is None:
        return "not tested", "no linear map of the decoder was read"
    beyond = {"permuted": found["above_permuted"], "magnitude": found["above_magnitude"]}
    if found["across"] <= found["chance"]:
        verdict = "does not hold here"
    else:
        verdict = "holds, beyond what \\|W\\| gives" if all(above(one) for one in beyond.values()) else "mostly \\|W\\|"
    return verdict, (
        f"IoU of the weights kept at {found['sparsity']:.0%} sparsity, perceptual against textual: {found['across']:.3f}. With one side's inputs "
        f"permuted over the columns {found['permuted']:.3f} (paired difference {_signed(beyond['permuted'])}); either side against \\|W\\| alone "
        f"{found['magnitude']:.3f} ({_signed(beyond['magnitude'])}); two random masks {found['chance']:.3f} ({found['n_matrices']} matrices, "
        "95 % bootstrap intervals over them)"
    )


def _signed(one: Mapping[str, Any]) -> str:
    return bracketed(one, "+.3f")


def _aligned(summary: Summary) -> tuple[str, str]:
    """Are an example's own words nearer than others' at most states, and does the gap grow inside the blocks?"""
    parts, hold = [], []
    for name, one in summary["modalities"].items():
        found, inside = one["similar"]["avg"], one["inside"]
        if found["q"] is None or name == "text":
            continue
        clear = [q is not None and q < LEVEL for q in found["q"]]
        some = 0 < sum(clear) <= len(clear) / 2  # fewer than most: in part, whatever else holds
        hold += [*([True, False] if some else [any(clear)]), inside is not None and above(inside["difference"])]
        gap = max((g for g in found["gap"]["mean"]), default=0.0)
        more = (
            ""
            if inside is None
            else f"; the gap is {_signed(inside['inside'])} inside the blocks and {_signed(inside['outside'])} on the residual stream, "
            f"a paired difference of {_signed(inside['difference'])}"
        )
        parts.append(
            f"{name}: matched above unmatched at {'only ' if some else ''}{sum(clear)} of {len(clear)} states (q < {LEVEL}), by at most {gap:.3f}{more}"
        )
    if not hold:
        return "not tested", "there are no unmatched pairs to compare with"
    return _verdict(hold), "; ".join(parts)


def _predicts(summary: Summary) -> tuple[str, str]:
    if not summary["correlation"]:
        return "not tested", "no family of models was compared (--family)"
    parts, hold = [], []
    for skill, sign in (("accuracy", 1), ("hallucination", -1)):
        for reading in ("input", "same"):
            line = summary["correlation"][f"{reading} and {skill}"]
            if line["pearson"] is None:
                continue
            bound = line["low"] if sign > 0 else -line["high"]
            hold.append(bound > 0 and line["q"] < LEVEL)
            parts.append(
                f"{skill} and the score ({reading}): r = {line['pearson']:.2f} [{line['low']:.2f}, {line['high']:.2f}], permutation p = "
                f"{line['p_value']:.3f}, q = {line['q']:.3f}"
            )
    if not hold:
        return "not tested", "fewer than four models, or all alike"
    return _verdict(hold), f"{_models(summary['members'])}: {'; '.join(parts)}"


def _models(members: Sequence[Mapping[str, Any]]) -> str:
    """How many models there are, and how many of them are steps of one training (`NAME@STEP`)."""
    trainings = Counter(member["name"].split("@")[0] for member in members)
    most = max(trainings.values())
    told = f"n = {len(members)} models"
    if most == 1:
        return told
    return (
        f"{told}, {most} of them steps of one training and so not independent, which makes intervals and p-values too confident"
    )


def _verdict(hold: Sequence[bool]) -> str:
    return "holds" if all(hold) else "holds in part" if any(hold) else "does not hold here"


def _figures(summary: Summary) -> list[str]:
    rows = [
        f"| {name} | " + " | ".join(_number(found) for r in ("input", "same") for found in (one["score"][r], one["score"][r]["unmatched"], one["score"][r]["gap"])) + " |"
        for name, one in summary["modalities"].items()
    ]  # fmt: skip
    lines = [
        "## The score", "", "| modality | input reading | its unmatched pairs | paired gap | same-layer reading | its unmatched pairs | paired gap |",
        "|---|---|---|---|---|---|---|", *rows, "",
        "The cosine of an example's mean perceptual token with the mean token of its words, averaged over states, with a 95 % bootstrap "
        "interval over examples: the perceptual side as it enters the model (as the paper scores models), or at the same state as the words. "
        "Raw cosines say little, since all states of a layer may point one way: read them beside the unmatched pairs.", "",
        "![alignment](figures/alignment.png)", "",
        "Bands are 95 % bootstrap intervals; unmatched pairs are an example's tokens with the words of a fixed few others. The centroids of all tokens "
        "of all examples are the published code's global similarity, one number at each state; its interval is a jackknife over groups of examples, and "
        "there is none with fewer than four units of work.", "",
        "Every mode in the middle of the model, for an example's own words and those of others (two of them, for `avg` all). `global` knows no pairs:", "", *_modes(summary), "",
        "## Inside the block", "", "![inside the block](figures/inside-the-block.png)", "",
        "Sites in the order of the computation: what enters the block, the normed input of attention, what attention adds, the stream between, the "
        "normed input of the feed-forward block, its inner activation, what it adds, what leaves. Layers averaged. The gap is matched less unmatched, "
        "example by example:", "", *_sites(summary), "",
        "## The spaces", "", "![spaces](figures/spaces.png)", "",
        "Mean cosine over every pair of examples (even against odd ones within a kind).", "", "![plane](figures/plane.png)", "",
        "Unit mean tokens of every example; t-SNE's distances between groups mean nothing, its groups do.", "",
        "## Norms and drift", "", "![norms and drift](figures/norms-and-drift.png)", "",
        *_drift(summary),
        "## Vocabulary distributions", "", "![vocabulary](figures/vocabulary.png)", "",
        "Through the final norm and the unembedding. The summary also holds the KL between the k-th perceptual and the k-th textual token, as published, "
        "with the perceptual side at the same layer and frozen at the input (what the published code computes).", "",
    ]  # fmt: skip
    if summary["weights"]["n_matrices"]:
        lines += [
            "## Weights", "", "![weights](figures/weights.png)", "",
            "Each kind of token asks Wanda for the weights that it needs, in every output row of every matrix; all from the dense model's inputs, "
            "without pruning layer after layer. Wanda's score is \\|W\\| times the size of the input, so that any two masks share \\|W\\|: what "
            "the kinds have in common is what lies above the masks of permuted inputs and of \\|W\\| alone, not above two random masks. Left: above "
            "the diagonal each pair, below it the same pair with the second's inputs permuted. By type of matrix, perceptual against textual: "
            + ", ".join(f"{kind} {value:.2f}" for kind, value in summary["weights"]["by_type"].items()) + ".", "",
        ]  # fmt: skip
    if len(summary["members"]) > 1:
        lines += [
            "## Over a family of models", "", "![score and skill](figures/score-and-skill.png)", "",
            "Each point is a model; its bars are intervals over examples, the interval of r is a bootstrap over models. Models that are steps of one "
            "training are not independent of one another: what rises along training correlates with whatever else does.", "",
        ]  # fmt: skip
    return lines + _growth(summary)


def _modes(summary: Summary) -> list[str]:
    """Every mode in the middle of the model, and the one that is of all examples together."""
    modalities = summary["modalities"]
    middle = {name: len(one["similar"]["avg"]["matched"]["mean"]) // 2 for name, one in modalities.items()}
    lines = [
        f"| mode | {' | '.join(f'{name}, state {middle[name]}' for name in modalities)} |",
        "|---" * (len(modalities) + 1) + "|",
    ]
    for mode in next(iter(modalities.values()))["similar"]:
        cells = []
        for name, one in modalities.items():
            found, at = one["similar"][mode], middle[name]
            others = None if mode == "global" else found["unmatched"]["mean"]
            told = _at(found if mode == "global" else found["matched"], at)
            cells.append(told if others is None else f"{told}; others {others[at]:.3f}")
        lines.append(f"| {mode} | {' | '.join(cells)} |")
    return lines


def _growth(summary: Summary) -> list[str]:
    """Score and skills step by step, of each training of which steps were saved."""
    if not summary["growth"]:
        return []
    alone = [one["name"] for one in summary["members"] if "@" not in one["name"] and one["name"] not in summary["growth"]]
    lines = ["## Along training", "", "![growth](figures/growth.png)", ""]
    for name, one in summary["growth"].items():
        lines += [
            f"| step of {name} | score, tokens as they enter | score, same layer | questions answered | absent things affirmed |",
            "|---|---|---|---|---|",
            *(
                f"| {step} | " + " | ".join(_at(one[key], i) for key in ("input", "same", "accuracy", "hallucination")) + " |"
                for i, step in enumerate(one["steps"])
            ), "",
        ]  # fmt: skip
    told = f" Of {', '.join(alone)} no step is among the models that were compared." if alone else ""
    return [
        *lines, "A row is the model that training had by that step, and `end` the model as it is; the figure sets steps at equal distances."
        f"{told}", "",
    ]  # fmt: skip


def _at(curve: Mapping[str, Any] | None, place: int) -> str:
    """One point of a curve with its interval; a dash where there is no curve."""
    if curve is None or curve["mean"] is None:
        return "-"
    if curve["low"] is None:
        return f"{curve['mean'][place]:.3f} (no interval)"
    return ranged({"value": curve["mean"][place], "low": curve["low"][place], "high": curve["high"][place]})


def _sites(summary: Summary) -> list[str]:
    """The paired gap at each site."""
    names = [s for s in SITES if any(one["sites"][s] for one in summary["modalities"].values())]
    lines = [f"| modality | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    for name, one in summary["modalities"].items():
        cells = [_number(one["sites"][s]["gap"] if one["sites"][s] else None) for s in names]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def _number(found: Mapping[str, Any] | None) -> str:
    return "-" if found is None else ranged(found)


def _drift(summary: Summary) -> list[str]:
    """How like itself a token is a layer on and eight, in every way, averaged over states."""
    lines = [f"| | layers on | {' | '.join(DRIFTS.values())} |", "|---" * (len(DRIFTS) + 2) + "|"]
    for name, one in summary["modalities"].items():
        for side, kind in (("perceptual", "tokens"), ("textual", "words")):
            for layers, found in one["drift"][side].items():
                if found["mean"] is not None:
                    cells = [_number(found["modes"][mode]["overall"]) for mode in DRIFTS]
                    lines.append(f"| {name} {kind} | {layers} | {' | '.join(cells)} |")
    if len(lines) == 2:
        return []
    return [
        "A token's cosine with itself some layers on, averaged over states, over an example's tokens in three ways, and that of its mean token:",
        "",
        *lines,
        "",
    ]


DRIFTS = {"diag_mean": "mean token by token", "diag_median": "median", "diag_max": "maximum", "avg": "of the mean token"}
