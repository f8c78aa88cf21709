"""The report of the modality-importance study."""

from collections.abc import Mapping
from typing import Any

from studies.study import Setting, Summary
from studies.telling import above, ranged

NOUN = {"image": "picture", "video": "clip", "audio": "sound", "text": "context"}
SPOILT = {
    "blank": "grey or silent", "noise": "noise", "shuffled": "its parts shuffled", "frozen": "one frame, frozen", "other": "another example's",
    "without": "no medium at all",
}  # fmt: skip
LEVEL = 0.05


def share(one: Mapping[str, Any]) -> str:
    """A share with its interval."""
    return f"{one['value']:.1%} ({one['low']:.1%} to {one['high']:.1%}, n = {one['n']})"


def signed(one: Mapping[str, Any]) -> str:
    """A difference with its interval."""
    return ranged(one, "+.2f")


def report(summary: Summary, setting: Setting) -> str:
    """The question, the answer in a sentence, and each figure with what it shows."""
    lines = ["# Modality importance", "", f"*Which modality does each answer need?* {_answer(summary)}", "",
             f"`{setting.subject.name}` on {summary['n']} questions of `{setting.data.name}`, of which {summary['n_compared']} come with two or "
             "more modalities. Intervals are 95 % over questions; comparisons are paired.", ""]  # fmt: skip
    if setting.data.name.startswith("demo") and summary["n_compared"]:
        lines += [
            "The context is the text twin of the scene: it says what the medium shows, so that either is enough for a model that takes both.",
            "",
        ]
    lines += _left_out(summary)
    lines += ["## Answers from every subset", "", "![answers](figures/answers-by-subset.png)", "", _subsets(summary), ""]
    if summary["n_compared"]:
        lines += [*_importance(summary), *_categories(summary), *_exchanged(summary), *_reading(summary)]
    lines += _controls(summary)
    if summary["shares"]["n"]:
        lines += _shares(summary)
    return "\n".join(lines) + "\n"


def _answer(summary: Summary) -> str:
    if not summary["n_compared"]:
        found = summary["controls"].get("without")
        gain = "" if found is None else f" The medium is worth {signed(found['fall'])} of accuracy over the question alone."
        return f"The questions come with one modality each, so that importance beside others is not defined.{gain}"
    need = {m: summary["importance"][m]["right"] for m in summary["modalities"]}
    told = "; ".join(f"{NOUN[m]} {signed(one)}" for m, one in need.items())
    clear = [NOUN[m] for m, one in need.items() if above(one)]
    verdict = (
        f"On average the answers need the {' and the '.join(clear)}"
        if clear
        else "On average no modality is needed beside the other"
    )
    together = summary["categories"]["complementary"]
    return f"{verdict}: importance in accuracy {told}; {share(together)} of the questions need them together."


def _left_out(summary: Summary) -> list[str]:
    lines = []
    if summary["n_skipped"]:
        lines.append(f"- {summary['n_skipped']} examples could not be used; the first: {summary['skipped'][0]}")
    lines += [f"- {one['n']} examples could not be asked as `{name}`: {one['why']}" for name, one in summary["refused"].items()]
    if summary["shares"]["n_refused"]:
        lines.append(f"- {summary['shares']['n_refused']} examples have no MM-SHAP shares: {summary['shares']['refused'][0]}")
    return [*lines, ""] if lines else []


def _subsets(summary: Summary) -> str:
    return (
        "Right answers: " + "; ".join(f"from {name} {share(one['accuracy'])}" for name, one in summary["subsets"].items()) + "."
    )


def _importance(summary: Summary) -> list[str]:
    lines = [
        "## Importance", "", "![importance](figures/importance.png)", "",
        "The Modality Importance Score: how much better the question is answered from subsets that hold the modality, beside at least one other, "
        "than from those without it. 0 says that it adds nothing to what the others say, below 0 that it hurts.", "",
    ]  # fmt: skip
    for m in summary["modalities"]:
        one = summary["importance"][m]
        lines.append(
            f"- {NOUN[m]}: {signed(one['right'])} in accuracy, {signed(one['prob'])} in the probability of the right answer"
        )
    return [*lines, ""]


def _categories(summary: Summary) -> list[str]:
    told = "; ".join(f"{kind} {share(one)}" for kind, one in summary["categories"].items())
    return ["## Kinds of questions", "", "![categories](figures/categories.png)", "", f"{told}.", ""]


def _exchanged(summary: Summary) -> list[str]:
    """Validation: a modality that mattered must matter less once it is another example's."""
    lines = [
        "If the score means what it says, the importance of a modality that is needed falls once it tells of another example; one that only "
        "repeats what the others say has little to lose:", "",
    ]  # fmt: skip
    for m, one in summary["exchanged"].items():
        if not one["n"]:
            lines.append(f"- no {NOUN[m]} could be exchanged")
            continue
        fell = above(one["fall"])
        lines.append(
            f"- {NOUN[m]} of another example: its importance {'falls' if fell else 'does not clearly fall'}, by {signed(one['fall'])} to "
            f"{signed(one['importance'])}; accuracy from everything falls by {signed(one['accuracy_fall'])} "
            f"(McNemar p = {one['p']:.2g}, n = {one['n']})"
        )
    return [*lines, ""]


def _reading(summary: Summary) -> list[str]:
    return [
        f"The language part alone, from the context: {share(one['text'])}; from the {NOUN[m]}: {share(one['medium'])}; difference "
        f"{signed(one['difference'])}, McNemar p = {one['p']:.2g}.\n"
        for m, one in summary["reading"].items()
    ]


def _controls(summary: Summary) -> list[str]:
    lines = ["## Negative controls", "", "![controls](figures/controls.png)", "",
             f"The examples as they came: {share(summary['accuracy'])} right. With the medium spoilt or gone:", "",
             "| medium | right | fall | McNemar p (q over controls) | same answer |", "|---|---|---|---|---|"]  # fmt: skip
    for name, one in summary["controls"].items():
        lines.append(
            f"| {SPOILT[name]} | {share(one['accuracy'])} | {signed(one['fall'])} | {one['p']:.2g} ({one['q']:.2g}) | {share(one['agreement'])} |"
        )
    harmless = [
        SPOILT[name] for name, one in summary["controls"].items() if not (one["q"] < LEVEL and one["fall"]["value"] > 0)
    ]
    said = (
        f"Without a clear fall: {', '.join(harmless)}. There, the answers do not show that what was taken away is used."
        if harmless
        else "Each of them costs accuracy: the answers use the medium."
    )
    return [*lines, "", said, ""]


def _shares(summary: Summary) -> list[str]:
    found = summary["shares"]
    told = "; ".join(
        f"{'words' if m == 'text' else NOUN[m]} {ranged(one, '.1%')} with {found['even'][m]['value']:.1%} of the groups"
        for m, one in found["share"].items()
    )
    return [
        "## Where the answer comes from", "", "![shares](figures/shares.png)", "",
        f"MM-SHAP over {found['n']} examples as they came: {told}. Shares add absolute values, so that noise counts as contribution: hold them "
        "against the share of the token groups, which is what contributions of one size would give.", "",
    ]  # fmt: skip
