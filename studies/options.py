"""A study's own command-line options, made from its signature."""

import argparse
import inspect
from collections.abc import Callable, Sequence
from types import UnionType
from typing import Any, get_args

from probe.errors import did_you_mean

_DEFAULT = "default: %(default)s"
_COMMON = frozenset({"out", "seed", "device", "dtype", "quiet"})


def parse(name: str, function: Callable[..., Any], arguments: Sequence[str]) -> dict[str, Any]:
    """The keyword arguments that the remaining command-line arguments spell; `--help` among them prints the study's own options and exits.

    Wrong usage is a sentence on standard error, with the nearest option, and exit code 2.
    """
    parser = argparse.ArgumentParser(
        f"sightline study {name}", description=inspect.getdoc(function), formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False, epilog="The options of every study (--model, --data, --limit, --out, ...): sightline study --help",
    )  # fmt: skip
    own = [p for p in inspect.signature(function).parameters.values() if p.kind is p.KEYWORD_ONLY and p.name not in _COMMON]
    for parameter in own:
        flag = "--" + parameter.name.replace("_", "-")
        kind = _kind(parameter)
        if kind is bool:
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, default=parameter.default, help=_DEFAULT)
        else:
            parser.add_argument(flag, type=kind, default=parameter.default, help=_DEFAULT)
    found, unknown = parser.parse_known_args(list(arguments))
    if unknown:
        known = ["--" + parameter.name.replace("_", "-") for parameter in own]
        parser.error(f"there is no option {unknown[0]!r}{did_you_mean(unknown[0], known)}")
    return vars(found)


def _kind(parameter: inspect.Parameter) -> Any:
    kind = parameter.annotation
    if isinstance(kind, UnionType):
        kind = next(member for member in get_args(kind) if member is not type(None))
    return kind
