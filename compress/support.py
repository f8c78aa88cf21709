"""Which pass works on which family, as the contract tests found it: `support.json` beside this file is theirs to write."""

import json
from pathlib import Path
from typing import Any

PATH = Path(__file__).with_name("support.json")
SIGN = {"pass": "yes", "not applicable": "–", "refused": "no"}


def support() -> list[dict[str, Any]]:
    """One entry for each family: `family`, `model_type`, and `passes`, each pass, not applicable, or refused with the reason."""
    found: list[dict[str, Any]] = json.loads(PATH.read_text())
    return found


def reasons(table: list[dict[str, Any]]) -> dict[str, dict[str, list[str]]]:
    """Each reason why something is not applicable or refused: the passes it holds for, by family."""
    found: dict[str, dict[str, list[str]]] = {}
    for row in table:
        for name, verdict in row["passes"].items():
            if ":" in verdict:
                found.setdefault(verdict, {}).setdefault(row["family"], []).append(name)
    return found


def markdown(table: list[dict[str, Any]]) -> str:
    """docs/compress/families.md: passes by family, and below it each reason once."""
    names = list(table[0]["passes"])
    lines = [
        "# Passes and families",
        "",
        "What the contract tests found for each pass on each of eleven families, at toy size, with random weights and the family's real",
        "processor. *yes*: nothing is done at strength zero, bit for bit; what is removed is what its masked twin hides; counts are exactly those that",
        "the settings say; a fresh process loads the saved model and gets the same logits and words; no other weight is touched, and what",
        "hangs on the model comes off without a trace. –: there is nothing it could be about; *no*: refused, with the reason below. `make support`",
        "writes this page and the second table that `sightline models` prints; a test fails when they differ from what happens.",
        "",
        "| pass | " + " | ".join(row["family"] for row in table) + " |",
        "|---" * (len(table) + 1) + "|",
        *(f"| `{name}` | " + " | ".join(SIGN[row["passes"][name].split(":")[0]] for row in table) + " |" for name in names),
        "",
        "Other families go the same way, by what their parts are; what cannot be is refused by name when a recipe is applied, or when the",
        "first prompt shows it.",
        "",
        "## Reasons",
        "",
    ]
    for verdict, places in reasons(table).items():
        kind, _, why = verdict.partition(":")
        lines.append(f"- **{kind}** ({_places(places, len(names))}):{why}")
    return "\n".join(lines) + "\n"


def _places(places: dict[str, list[str]], count: int) -> str:
    """Where a reason holds, families with the same passes together."""
    alike: dict[tuple[str, ...], list[str]] = {}
    for family, passes in places.items():
        alike.setdefault(tuple(passes), []).append(family)
    return "; ".join(
        f"{', '.join(families)}: {'everything' if len(passes) == count else ', '.join(passes)}"
        for passes, families in alike.items()
    )
