"""What works on each family, as the contract tests found it: `support.json` beside this file is theirs to write."""

import json
from pathlib import Path
from typing import Any

PATH = Path(__file__).with_name("support.json")


def support() -> list[dict[str, Any]]:
    """One entry for each family: `family`, `model_type`, and `capabilities`, each pass, not applicable, or refused."""
    found: list[dict[str, Any]] = json.loads(PATH.read_text())
    return found
