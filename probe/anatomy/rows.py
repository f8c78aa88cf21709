"""What resolving cannot know, as data: one row for each family, keyed by `config.model_type`.

A row names the geometry of the family's pictures (a function of `probe.geometry`) and whatever differs from what
`resolve` finds by itself. To add a family, add a row here and a toy in `tests/toys.py`; the contract tests do the rest.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """One family: its name, its picture geometry, and its exceptions."""

    family: str
    geometry: str | None = None
    deepstack: bool = False  # visual features are added to the residual stream between layers


ROWS: dict[str, Row] = {
    "llava": Row("LLaVA", "plain"),
    "llava_next": Row("LLaVA-NeXT", "anyres"),
    "llava_onevision": Row("LLaVA-OneVision", "anyres"),
    "qwen2_vl": Row("Qwen2-VL", "merged"),
    "qwen2_5_vl": Row("Qwen2.5-VL", "merged"),
    "qwen3_vl": Row("Qwen3-VL", "merged", deepstack=True),
}
GENERIC = Row("generic")
