"""Examples that show something, put together so that a batch holds one sort of media."""

from collections.abc import Iterator, Sequence

from probe.errors import DataError
from probe.example import Example


def alike(examples: Sequence[Example]) -> Iterator[list[Example]]:
    """The examples in groups that can be encoded together: those with the same kinds of media, in their order."""
    groups: dict[tuple[bool, ...], list[Example]] = {}
    for example in examples:
        groups.setdefault(tuple(map(bool, example.media.values())), []).append(example)
    yield from groups.values()


def check_shown(example: Example, answer: bool = False) -> None:
    """Raises DataError for an example that shows nothing or, where one is wanted, has no answer to compare with."""
    if not any(example.media.values()):
        raise DataError(f"example {example.id!r} has no picture, video or sound")
    if answer and example.answer is None:
        raise DataError(f"example {example.id!r} has no answer to compare with")
