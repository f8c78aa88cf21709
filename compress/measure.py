"""What a model can do, and what a smaller one does differently: accuracy, paired tests, agreement, divergence, regressions.

Everything is compared item by item with the dense model on the same questions.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float

from probe.analysis.stats import bootstrap_mean, mcnemar, paired_difference, wilson
from probe.errors import DataError
from probe.example import Example
from probe.subject import Encoded, Subject

Score = Callable[[Example, str], bool]


def exact(example: Example, said: str) -> bool:
    """Whether what was said is the answer, in whatever case, with or without a full stop."""
    return said.strip().rstrip(".").lower() == (example.answer or "").strip().rstrip(".").lower()


@dataclass(frozen=True)
class Answers:
    """What one model says to a list of examples: texts, which are right, and the first token's log-probabilities (item vocabulary)."""

    examples: tuple[Example, ...]
    said: tuple[str, ...]
    right: Bool[np.ndarray, " item"]
    first: Float[torch.Tensor, "item vocabulary"]

    @property
    def kinds(self) -> tuple[str, ...]:
        return tuple(example.tags.get("kind", "") for example in self.examples)


@torch.no_grad()
def answer(
    subject: Subject, batches: Sequence[Encoded], max_new_tokens: int = 4, score: Score = exact,
    advance: Callable[[int], None] = lambda n: None,
) -> Answers:  # fmt: skip
    """Greedy answers to encoded batches (padded on the left). Raises DataError for an example without a right answer."""
    said: list[str] = []
    first: list[torch.Tensor] = []
    for encoded in batches:
        if blank := next((one.id for one in encoded.examples if one.answer is None), None):
            raise DataError(f"example {blank!r} has no answer: accuracy needs the right answer of every example")
        with subject.lock:
            made = subject.model.generate(
                **encoded.inputs,
                max_new_tokens=max_new_tokens,
                do_sample=False,
                return_dict_in_generate=True,
                output_logits=True,
            )
        new = made.sequences[:, encoded.inputs["input_ids"].shape[1] :]
        said += [text.strip() for text in subject.tokenizer.batch_decode(new, skip_special_tokens=True)]
        first.append(made.logits[0].float().log_softmax(-1).cpu())
        advance(len(encoded))
    examples = tuple(example for encoded in batches for example in encoded.examples)
    right = np.array([score(example, text) for example, text in zip(examples, said, strict=True)], dtype=bool)
    return Answers(examples, tuple(said), right, torch.cat(first))


def encode_all(subject: Subject, examples: Sequence[Example], batch: int) -> list[Encoded]:
    """Batches in order; examples with and without media are never in one."""
    found: list[Encoded] = []
    start = 0
    while start < len(examples):
        kinds = tuple(map(bool, examples[start].media.values()))
        stop = start + 1
        while stop < min(len(examples), start + batch) and tuple(map(bool, examples[stop].media.values())) == kinds:
            stop += 1
        found.append(subject.encode(examples[start:stop]))
        start = stop
    return found


@dataclass(frozen=True)
class Share:
    """A proportion with its Wilson interval; all None where nothing is counted."""

    value: float | None
    low: float | None
    high: float | None
    n: int

    @classmethod
    def of(cls, hits: Sequence[bool] | np.ndarray) -> "Share":
        n, count = len(hits), int(np.sum(hits)) if len(hits) else 0
        return cls(count / n, *wilson(count, n), n) if n else cls(None, None, None, 0)


def accuracy(answers: Answers) -> dict[str, Share]:
    """Accuracy over all items (`all`) and of each kind of question."""
    kinds = np.array(answers.kinds)
    found = {kind: Share.of(answers.right[kinds == kind]) for kind in sorted(set(answers.kinds) - {""})}
    return {"all": Share.of(answers.right), **found}


def affirmed(answers: Answers) -> Share:
    """Hallucination: of the questions whether something is there that is not, the share answered with yes."""
    absent = [
        said for example, said in zip(answers.examples, answers.said, strict=True)
        if (example.answer or "").lower() == "no" and example.tags.get("kind", "").startswith("exist")
    ]  # fmt: skip
    return Share.of([said.lower().startswith("yes") for said in absent])


@dataclass(frozen=True)
class Broken:
    """Items of one kind that changed: right before and wrong now, and the other way round."""

    broke: tuple[str, ...]
    mended: tuple[str, ...]
    n: int


@dataclass(frozen=True)
class Comparison:
    """A model against the dense one on the same items.

    `difference` is accuracy less the dense one's with its paired bootstrap interval, `p` McNemar's exact one; `agreement` the share of items with the
    same answer, right or wrong; `divergence` KL(dense || this) of the first token, in nats.
    """

    difference: tuple[float, float, float]
    p: float
    agreement: Share
    divergence: tuple[float, float, float]
    by_kind: Mapping[str, Broken]

    def told(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "difference": _three(self.difference), "p": self.p, "agreement": vars(self.agreement), "divergence": _three(self.divergence),
            "by_kind": {kind: {"broke": list(b.broke), "mended": list(b.mended), "n": b.n} for kind, b in self.by_kind.items()},
        }  # fmt: skip


def _three(values: tuple[float, float, float]) -> dict[str, float]:
    return dict(zip(("value", "low", "high"), values, strict=True))


def compare(dense: Answers, these: Answers, seed: int = 0) -> Comparison:
    """Paired tests of two models' answers. Raises DataError where they were not asked the same."""
    if [one.id for one in dense.examples] != [one.id for one in these.examples]:
        raise DataError("two models are compared on the same examples in the same order")
    difference = paired_difference(these.right.astype(np.float64), dense.right.astype(np.float64), seed)
    divergence = bootstrap_mean(first_token_divergence(dense, these), seed)
    same = [a == b for a, b in zip(dense.said, these.said, strict=True)]
    return Comparison(
        _floats(difference), mcnemar(dense.right, these.right), Share.of(same), _floats(divergence), _broken(dense, these)
    )  # fmt: skip


def _floats(interval: Sequence[Any]) -> tuple[float, float, float]:
    value, low, high = (float(side) for side in interval)
    return value, low, high


def first_token_divergence(dense: Answers, these: Answers) -> Float[np.ndarray, " item"]:
    """KL(dense || this) of each item's first token, in nats. Raises DataError for two vocabularies."""
    if dense.first.shape != these.first.shape:
        raise DataError(f"two vocabularies ({dense.first.shape[1]} and {these.first.shape[1]} tokens) have no divergence")
    found: np.ndarray = torch.nn.functional.kl_div(these.first, dense.first, log_target=True, reduction="none").sum(-1).numpy()
    return np.maximum(found, 0.0)


def _broken(dense: Answers, these: Answers) -> dict[str, Broken]:
    found = {}
    for kind in sorted(set(dense.kinds)):
        mine = [i for i, one in enumerate(dense.kinds) if one == kind]
        ids = {i: dense.examples[i].id for i in mine}
        found[kind or "all"] = Broken(
            tuple(ids[i] for i in mine if dense.right[i] and not these.right[i]),
            tuple(ids[i] for i in mine if these.right[i] and not dense.right[i]), len(mine),
        )  # fmt: skip
    return found
