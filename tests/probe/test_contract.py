"""Every family against every check: the table that `sightline models` shows is written from what happens here."""

import json
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from probe import Knockout, Lens, Mass, Region, Rows, Subject, load, sweep, trace
from probe.anatomy import ROWS
from probe.anatomy.rows import row_of
from probe.anatomy.support import PATH, markdown, support
from probe.errors import SightlineError
from probe.generation import trace_generation
from probe.tracing import last_logits
from tests import toys
from tests.oracles.generation import in_one_pass

PAGE = Path(__file__).parents[2] / "docs" / "families.md"
Check = Callable[[Subject], None]


class NotApplicableError(Exception):
    """The family has nothing that the check could be about."""


def medium(subject: Subject) -> str:
    return "image" if "image" in subject.marks else "audio"


def opens(subject: Subject) -> None:
    assert all(check.held for check in subject.checks)
    assert len(subject.checks) == (4 if subject.marks else 3)


def token_map(subject: Subject) -> None:
    for found in subject.encode(toys.pair(subject)).maps:
        space = found.crossed or found
        assert len(space.positions(medium(subject))) > 0
        assert len(found.positions("media")) > 0
        said = "".join(found.spellings[p] for p in found.positions("question"))
        assert said.strip() in {prompt for prompt, _ in toys.WORDS}


def boxes(subject: Subject) -> None:
    if "image" not in subject.marks and subject.anatomy.audio:
        raise NotApplicableError("it takes no pictures")
    found = subject.encode(toys.pair(subject)[0]).maps[0]
    space = found.crossed or found
    everything = space.in_boxes([Region((0.0, 0.0, 60.0, 40.0))])
    covered = set(everything.tolist())
    assert covered <= set(space.positions("image").tolist())
    if found.crossed is None:  # a crossed picture's canvas reaches beyond it
        assert covered == set(space.positions("image").tolist())
    assert 0 < len(space.in_boxes([Region((25.0, 15.0, 30.0, 20.0))])) < len(everything)


def traces(subject: Subject) -> None:
    encoded = subject.encode(toys.questions(subject))
    found = trace(subject, encoded, [Mass()])
    assert torch.equal(found.logits, last_logits(subject, encoded))
    assert (found["mass"].tensor.sum(-1) - 1).abs().max() < 1e-4


def flow(subject: Subject) -> None:
    examples = toys.pair(subject)
    encoded = subject.encode(examples)
    if encoded.maps[0].crossed:
        raise NotApplicableError("its picture is not in the sequence")
    found = trace(subject, encoded, [Mass(("question",), (medium(subject), "bos", "question"))])["mass"]
    assert (found.at(row_group="question", column_group=medium(subject)) > 0).all()


def cross_flow(subject: Subject) -> None:
    if not any(subject.anatomy.cross):
        raise NotApplicableError("its decoder has no cross-attention")
    encoded = subject.encode(toys.pair(subject))
    crossing = [layer for layer, crosses in enumerate(subject.anatomy.cross) if crosses]
    found = trace(subject, encoded, [Mass(("question", "last"), layers=crossing), Rows("last", cross=True)])
    image = found["mass"].at(column_group="image") + found["mass"].at(column_group="separator")
    torch.testing.assert_close(image, torch.ones_like(image), atol=1e-5, rtol=0)
    token_map = encoded.maps[0].crossed
    assert token_map is not None
    assert found["rows"].tensor.shape == (len(crossing), 2, subject.n_heads, 1, len(token_map))
    clean = last_logits(subject, encoded)
    cut = trace(subject, encoded, edit=[Knockout("real", "image", crossing)]).logits
    assert (cut - clean).abs().max() > 1e-4


def knockout(subject: Subject) -> None:
    encoded = subject.encode(toys.pair(subject))
    changed = trace(subject, encoded, edit=[Knockout("last", medium(subject))]).logits
    assert (changed - last_logits(subject, encoded)).abs().max() > 1e-4


def replay(subject: Subject) -> None:
    entries = [Knockout("question", medium(subject), [layer]) for layer in range(subject.n_layers)]
    examples = toys.pair(subject)
    fast, slow = (sweep(subject, examples, entries, method=method) for method in ("replay", "naive"))
    for a, b in zip(fast.edited, slow.edited, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=0)


def lens(subject: Subject) -> None:
    found = trace(subject, toys.questions(subject), [Lens(top=1)])
    assert found["lens_top_ids"].tensor[-1, :, 0, 0].tolist() == found.logits.argmax(-1).tolist()


def generates(subject: Subject) -> None:
    """Token by token with a cache, the picture hidden from what writes: the numbers of one full pass."""
    config = subject.model.generation_config
    config.eos_token_id = None
    config.suppress_tokens = [subject.tokenizer.convert_tokens_to_ids(mark) for mark in subject.marks.values()]
    examples = toys.questions(subject)
    told = subject.generate(examples, 3)
    record = [Mass(("last",)), Rows("last"), Lens(top=1)]
    edits = [Knockout("last", "media")] if any(subject.encode(e).maps[0].reach("media") for e in examples) else []
    assert list(trace_generation(subject, examples, record, max_new_tokens=3).texts) == told
    made = trace_generation(subject, examples, record, edits, 3)
    for name, expected in in_one_pass(subject, made, record, edits).items():
        torch.testing.assert_close(made[name].tensor, expected, atol=2e-5, rtol=0)


def batches(subject: Subject) -> None:
    examples = toys.questions(subject)
    for side in ("left", "right"):
        together = last_logits(subject, subject.encode(examples, side))
        alone = torch.cat([last_logits(subject, subject.encode(example)) for example in examples])
        torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)


def bf16(subject: Subject) -> None:
    half = load((subject.model.to(torch.bfloat16), subject.processor))
    try:
        traces(half)
    finally:
        subject.model.to(torch.float32)


CHECKS: dict[str, Check] = {
    "open": opens, "token map": token_map, "boxes": boxes, "trace": traces, "flow": flow, "cross-attention flow": cross_flow,
    "knock-out": knockout, "exact replay": replay, "lens": lens, "generate": generates, "padded batch": batches, "bf16": bf16,
}  # fmt: skip


def verdict(check: Check, subject: Subject) -> str:
    try:
        check(subject)
    except NotApplicableError as error:
        return f"not applicable: {error}"
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
    assert len(found["capabilities"]) == len(CHECKS) == 12
    if os.environ.get("SIGHTLINE_WRITE_SUPPORT"):
        table = json.loads(PATH.read_text()) if PATH.is_file() else []
        order = [entry.family for entry in ROWS.values()]
        table = sorted(
            [r for r in table if r["family"] in order and r["family"] != found["family"]] + [found],
            key=lambda r: order.index(r["family"]),
        )
        PATH.write_text(json.dumps(table, indent=1) + "\n")
        PAGE.write_text(markdown(table))
    assert found in support()


def test_every_row_has_a_toy_and_every_toy_a_row():
    assert [row_of(toys.FAMILIES[name]()[0].config).family for name in toys.FAMILIES] == [r.family for r in ROWS.values()]
    assert [r["family"] for r in support()] == [r.family for r in ROWS.values()]
    assert len(ROWS) == 25


def test_the_page_is_the_table():
    assert PAGE.read_text() == markdown(support())


def test_the_table_counts_its_cells(capsys):
    """Prints how many cells passed, were not applicable, or were refused; none is anything else."""
    cells = Counter(cell.split(":")[0] for entry in support() for cell in entry["capabilities"].values())
    with capsys.disabled():
        print(f"\n{len(support())} families x {len(CHECKS)} capabilities: {dict(cells)}")
    assert set(cells) == {"pass", "not applicable", "refused"}
    assert cells.total() == 25 * 12
    assert cells["pass"] > 200
