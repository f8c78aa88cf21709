"""The ledger of a compressed model: what was applied, with which settings, on which evidence; enough to apply it again."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from probe.errors import LedgerError

FILE, SCHEMA = "sightline.json", 1


@dataclass(frozen=True)
class Step:
    """One pass as it was applied: its settings, the changes that it planned, and the numbers that the plan rests on."""

    title: str
    settings: Mapping[str, Any]
    changes: tuple[Mapping[str, Any], ...]
    evidence: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0
    versions: Mapping[str, str] = field(default_factory=dict)


def write(folder: Path, steps: tuple[Step, ...], parents: tuple[str, ...], regular: bool) -> None:
    """Writes the ledger beside the weights."""
    text = {"schema": SCHEMA, "parents": list(parents), "regular": regular, "steps": [asdict(step) for step in steps]}
    partial = folder / f"{FILE}.tmp"
    partial.write_text(json.dumps(text, indent=1, allow_nan=False) + "\n")
    partial.replace(folder / FILE)


def read(folder: Path) -> tuple[tuple[Step, ...], tuple[str, ...], bool] | None:
    """Steps, parents, and whether the shape is regular; None where a folder has no ledger.

    Raises LedgerError for a file that is damaged, of another program, or of a newer version.
    """
    path = folder / FILE
    if not path.is_file():
        return None
    try:
        text = json.loads(path.read_text())
        if not isinstance(text, dict) or "schema" not in text or "steps" not in text:
            raise LedgerError(f"{path} is not a ledger of Sightline: it has no schema and no steps")
        if text["schema"] > SCHEMA:
            raise LedgerError(
                f"{path} was written by a newer Sightline (schema {text['schema']}, this one reads {SCHEMA}): update Sightline"
            )
        steps = tuple(Step(**{**step, "changes": tuple(step["changes"])}) for step in text["steps"])
        return steps, tuple(text["parents"]), bool(text["regular"])
    except (ValueError, KeyError, TypeError) as error:
        if isinstance(error, LedgerError):
            raise
        raise LedgerError(
            f"{path} is damaged ({type(error).__name__}: {error}): compress the model again from its recipe"
        ) from error
