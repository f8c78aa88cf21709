"""Every family against every check: the table that `sightline models` shows is written from what happens here."""

import json
import os
from collections.abc import Callable

import pytest
import torch

from probe import Example, Knockout, Lens, Mass, Region, Subject, load, sweep, trace
from probe.anatomy import ROWS
from probe.anatomy.support import PATH, support
from probe.errors import SightlineError
from probe.tracing import last_logits
from tests import toys

Check = Callable[[Subject], None]
PAIR = [
    Example("a", "what color is the ball ?", (toys.picture(),), suffix="yes no"),
    Example("b", "is there a dog in the park ?", (toys.picture(30, 50, 1),), suffix="one"),
]


def opens(subject: Subject) -> None:
    assert all(check.held for check in subject.checks)
    assert len(subject.checks) == 3


def token_map(subject: Subject) -> None:
    for found in subject.encode(PAIR).maps:
        assert len(found.positions("image")) > 0
        assert len(found.positions("question")) > 0


def boxes(subject: Subject) -> None:
    found = subject.encode(PAIR[0]).maps[0]
    everything = found.in_boxes([Region((0.0, 0.0, 60.0, 40.0))])
    assert everything.tolist() == found.positions("image").tolist()
    assert 0 < len(found.in_boxes([Region((25.0, 15.0, 30.0, 20.0))])) < len(everything)


def traces(subject: Subject) -> None:
    encoded = subject.encode(PAIR)
    found = trace(subject, encoded, [Mass()])
    assert torch.equal(found.logits, last_logits(subject, encoded))
    assert (found["mass"].tensor.sum(-1) - 1).abs().max() < 1e-4


def knockout(subject: Subject) -> None:
    encoded = subject.encode(PAIR)
    assert (trace(subject, encoded, edit=[Knockout("last", "image")]).logits - last_logits(subject, encoded)).abs().max() > 1e-4


def replay(subject: Subject) -> None:
    entries = [Knockout("question", "image", [layer]) for layer in range(subject.n_layers)]
    fast, slow = (sweep(subject, PAIR, entries, method=method) for method in ("replay", "naive"))
    for a, b in zip(fast.edited, slow.edited, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=0)


def lens(subject: Subject) -> None:
    found = trace(subject, PAIR, [Lens(top=1)])
    assert found["lens_top_ids"].tensor[-1, :, 0, 0].tolist() == found.logits.argmax(-1).tolist()


def generates(subject: Subject) -> None:
    assert len(subject.generate(PAIR, 3)) == 2


def batches(subject: Subject) -> None:
    for side in ("left", "right"):
        together = last_logits(subject, subject.encode(PAIR, side))
        alone = torch.cat([last_logits(subject, subject.encode(example)) for example in PAIR])
        torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)


def bf16(subject: Subject) -> None:
    half = load((subject.model.to(torch.bfloat16), subject.processor))
    try:
        traces(half)
    finally:
        subject.model.to(torch.float32)


CHECKS: dict[str, Check] = {
    "open": opens, "token map": token_map, "boxes": boxes, "trace": traces, "knock-out": knockout, "replay": replay, "lens": lens,
    "generate": generates, "padded batch": batches, "bf16": bf16,
}  # fmt: skip


def verdict(check: Check, subject: Subject) -> str:
    try:
        check(subject)
    except SightlineError as error:
        return f"refused: {error}"
    return "pass"


def row(family: str) -> dict[str, object]:
    subject = load(toys.build(family))  # its own copy: bf16 rounds the weights
    return {
        "family": subject.anatomy.family, "model_type": subject.anatomy.model_type,
        "capabilities": {name: verdict(check, subject) for name, check in CHECKS.items()},
    }  # fmt: skip


@pytest.mark.parametrize("family", toys.FAMILIES)
def test_the_published_row_is_what_happens(family):
    found = row(family)
    assert len(found["capabilities"]) == len(CHECKS) == 10
    if os.environ.get("SIGHTLINE_WRITE_SUPPORT"):
        table = json.loads(PATH.read_text()) if PATH.is_file() else []
        table = sorted(
            [r for r in table if r["model_type"] != found["model_type"]] + [found],
            key=lambda r: list(ROWS).index(r["model_type"]),
        )
        PATH.write_text(json.dumps(table, indent=1) + "\n")
    assert found in support()


def test_every_row_has_a_toy_and_every_toy_a_row():
    assert sorted(ROWS) == sorted(toys.FAMILIES)
    assert [r["model_type"] for r in support()] == list(ROWS)
    assert len(ROWS) == 6
