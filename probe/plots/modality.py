"""Figures of modality importance and of negative controls. Each takes the summary of the study."""

from collections.abc import Mapping
from typing import Any

from probe.plots.panels import GREY, Pair, Series, colour, values
from probe.plots.style import COLOURS

Summary = Mapping[str, Any]
COLOUR = {"image": COLOURS[0], "video": COLOURS[2], "audio": COLOURS[3], "text": COLOURS[1]}
LABELS = {
    "intact": "as it came", "blank": "grey, or silent", "noise": "noise", "shuffled": "parts shuffled", "frozen": "one frame",
    "other": "another example's", "without": "no medium",
}  # fmt: skip


def _known(found: Mapping[str, Any]) -> dict[str, Mapping[str, float]]:
    """What has a value: `value low high` by label."""
    return {label: one for label, one in found.items() if one and one["value"] is not None}


def subsets_figure(summary: Summary) -> Pair:
    """How often each subset of modalities is answered rightly, and how likely it makes the right answer."""
    panels: list[tuple[str, list[Series]]] = [
        (title, [("value", _known({name: one[key] for name, one in summary["subsets"].items()}), colour(k))])
        for k, (title, key) in enumerate((("Accuracy", "accuracy"), ("Probability of the right answer", "prob")))
    ]
    return values(panels, "share", share=True)


def importance_figure(summary: Summary) -> Pair:
    """The importance of each modality: over all questions in both measures, and kind by kind."""
    names, kinds = summary["modalities"], summary["kinds"]
    overall = {"all, accuracy": "right", "all, probability": "prob"}
    series: list[Series] = [
        (
            m,
            _known(
                {
                    **{label: summary["importance"][m][key] for label, key in overall.items()},
                    **{kind: table[m] for kind, table in kinds.items()},
                }
            ),
            COLOUR[m],
        )
        for m in names
    ]
    return values([("Modality importance", series)], "with it, less without it", line=0.0)


def categories_figure(summary: Summary) -> Pair:
    """The share of each kind of question, as they are and with one modality exchanged for another example's."""
    series: list[Series] = [("as they are", _known(summary["categories"]), COLOURS[6])]
    series += [
        (f"{m} of another example", _known(one["categories"]), COLOUR[m]) for m, one in summary["exchanged"].items() if one["n"]
    ]
    return values([("Kinds of questions", series)], "share of questions")


def controls_figure(summary: Summary) -> Pair:
    """Accuracy and unchanged answers when the medium is spoilt or gone."""
    found = summary["controls"]
    accuracy = {LABELS["intact"]: summary["accuracy"], **{LABELS[name]: one["accuracy"] for name, one in found.items()}}
    agreement = {LABELS[name]: one["agreement"] for name, one in found.items()}
    panels: list[tuple[str, list[Series]]] = [
        ("Accuracy", [("value", _known(accuracy), COLOURS[0])]),
        ("The same answer as intact", [("value", _known(agreement), COLOURS[1])]),
    ]
    return values(panels, "share")


def shares_figure(summary: Summary) -> Pair:
    """MM-SHAP: each modality's share of the answer, beside its share of the token groups."""
    found = summary["shares"]
    series: list[Series] = [
        ("share of the answer", _known(found["share"]), COLOURS[0]), ("share of the token groups", _known(found["even"]), GREY),
    ]  # fmt: skip
    return values([("Where the answer comes from", series)], "share")
