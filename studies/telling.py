"""How reports write a number with its interval, and what they say where there is none."""

from collections.abc import Mapping
from typing import Any

ENOUGH = 6  # items that all differ to one side have an exact two-sided sign test below 0.05 from here on


def bracketed(one: Mapping[str, Any], form: str = ".3f") -> str:
    """`0.50 [0.40, 0.60]` of a number that is known."""
    return f"{one['value']:{form}} [{_ends(one, form, ', ')}]"


def ranged(one: Mapping[str, Any], form: str = ".3f") -> str:
    """`0.50 (0.40 to 0.60)` of a number that is known."""
    return f"{one['value']:{form}} ({_ends(one, form, ' to ')})"


def _ends(one: Mapping[str, Any], form: str, between: str) -> str:
    if one.get("n") == 1:
        return "no interval: one item"
    if one["low"] is None or one["low"] == one["high"]:
        return "no interval: all draws agree"
    return f"{one['low']:{form}}{between}{one['high']:{form}}"


def above(one: Mapping[str, Any], bound: float = 0.0) -> bool:
    """Whether a number is above a bound by its whole interval; where all draws agree, whether enough items do."""
    if one["value"] is None:
        return False
    return bool(one["low"] > bound if one["low"] is not None else one["value"] > bound and one.get("n", 0) >= ENOUGH)


def below(one: Mapping[str, Any], bound: float = 0.0) -> bool:
    """Whether a number is below a bound by its whole interval; where all draws agree, whether enough items do."""
    if one["value"] is None:
        return False
    return bool(one["high"] < bound if one["high"] is not None else one["value"] < bound and one.get("n", 0) >= ENOUGH)
