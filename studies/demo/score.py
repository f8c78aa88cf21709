"""What share of the demo's questions a model answers, kind by kind."""

from collections.abc import Callable, Sequence

from probe.example import Example
from probe.subject import Subject


def accuracy(
    subject: Subject, examples: Sequence[Example], batch: int = 32, advance: Callable[[int], None] = lambda n: None
) -> dict[str, tuple[int, int]]:
    """Hits and questions of each kind, `all` last: the generated answer, stripped and in lower case, is the right one."""
    tally: dict[str, list[int]] = {}
    for start in range(0, len(examples), batch):
        asked = examples[start : start + batch]
        for example, said in zip(asked, subject.generate(asked, 4), strict=True):
            for key in (example.tags.get("kind", ""), "all"):
                entry = tally.setdefault(key, [0, 0])
                entry[0] += said.lower() == example.answer
                entry[1] += 1
        advance(len(asked))
    return {key: (tally[key][0], tally[key][1]) for key in sorted(tally, key=lambda k: k == "all")}
