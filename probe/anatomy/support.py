"""What works on each family, as the contract tests found it: `support.json` beside this file is theirs to write."""

import json
from pathlib import Path
from typing import Any

PATH = Path(__file__).with_name("support.json")
_SIGN = {"pass": "yes", "not applicable": "–", "refused": "no"}


def support() -> list[dict[str, Any]]:
    """One entry for each family: `family`, `model_type`, and `capabilities`, each pass, not applicable, or refused."""
    found: list[dict[str, Any]] = json.loads(PATH.read_text())
    return found


def reasons(table: list[dict[str, Any]]) -> list[tuple[str, list[str]]]:
    """Each reason why something is not applicable or refused, and where it holds (`family, capability`)."""
    found: dict[str, list[str]] = {}
    for row in table:
        for name, verdict in row["capabilities"].items():
            if ":" in verdict:
                found.setdefault(verdict, []).append(f"{row['family']}, {name}")
    return list(found.items())


def markdown(table: list[dict[str, Any]]) -> str:
    """docs/families.md: the table, and below it each reason once."""
    names = list(table[0]["capabilities"])
    lines = [
        "# Families",
        "",
        "What the contract tests found on each family, at toy size, with random weights and the family's real processor.",
        "`make support` writes this page and the table that `sightline models` prints; a test fails when they differ from what",
        "happens. *yes*: the check passed; –: there is nothing it could be about; *no*: refused, with the reason below.",
        "",
        "| family | model type | " + " | ".join(names) + " |",
        "|---" * (len(names) + 2) + "|",
        *(
            f"| {row['family']} | `{row['model_type']}` | "
            + " | ".join(_SIGN[verdict.split(":")[0]] for verdict in row["capabilities"].values())
            + " |"
            for row in table
        ),
        "",
        "Any other family goes through the resolver, and works as far as its parts are found and verified, or is refused by name",
        "with the row to add (`sightline models --check PATH` prints what was verified on a model of yours).",
        "",
        "## Reasons",
        "",
    ]
    for verdict, places in reasons(table):
        shown = f"all {len(places)} families without one" if len(places) > 6 else "; ".join(places)
        lines.append(f"- **{verdict.split(':')[0]}** ({shown}):{verdict.split(':', 1)[1]}")
    return "\n".join(lines) + "\n"
