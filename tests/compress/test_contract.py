"""Every pass on eleven families against every invariant: the table in docs/compress/families.md is written from what happens here."""

import json
import os
import subprocess
import sys
from collections import Counter
from functools import cache
from hashlib import sha256
from pathlib import Path

import pytest
import torch

from compress import saving
from compress.passes import CHANGES, METHODS, PASSES
from compress.recipe import compress
from compress.support import PATH, markdown, support
from probe import load
from probe.anatomy import ROWS
from probe.errors import ExampleError, PassError
from probe.tracing import last_logits
from tests import toys
from tests.compress.cases import CASES, FAMILIES, Made, last_state, shown
from tests.compress.reload import STEPS

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "compress" / "families.md"
WHOLE = bool(os.environ.get("SIGHTLINE_WRITE_SUPPORT"))
INVARIANTS = ("nothing is nothing", "removed is hidden", "counts are exact", "nothing else is touched", "saved and loaded")

seen: dict[tuple[str, str], str] = {}
covered: list[tuple[str, str, str]] = []
saved: dict[Path, tuple[str, str]] = {}


@cache
def opened(family):
    return load(toys.wide(family), check=False)


def digests(subject):
    """A fingerprint of every weight and buffer that is saved, by name."""
    return {name: sha256(w.numpy().tobytes()).hexdigest() for name, w in subject.model.state_dict().items()}


@cache
def dense(family, clips):
    """What a case is measured against: the prompt, the plain logits, and the weights' fingerprints."""
    subject = opened(family)
    encoded = subject.encode(shown(subject, clips))
    return encoded, last_state(subject, encoded)[0], digests(subject)


def one_sentence(error):
    """A refusal is a PassError that says in one sentence what is wrong."""
    text = str(error)
    assert type(error) is PassError
    assert len(text) > 30
    assert "\n" not in text
    assert not text.endswith(".")
    assert ". " not in text
    return text


def reloaded_by_default(family, name):
    """Without the whole table, each pass is loaded again on two families, and each family loads about as many."""
    return WHOLE or (FAMILIES.index(family) - 2 * list(CASES).index(name)) % len(FAMILIES) < 2


def check(family, case, folder):
    """Every invariant of a case on a family; names of those that were covered."""
    subject = opened(family)
    encoded, plain, before = dense(family, case.clips)
    evidence = case.evidence(subject)
    hangs = case.real.stage in ("skips", "masks", "tokens")  # what leaves the weights alone is done to the model itself
    smaller = compress(subject, [case.real], evidence, in_place=hangs)
    done = []
    try:
        logits, left = last_state(smaller, encoded)
        assert (logits - plain).abs().max() > 1e-4
        case.claim(Made(subject, smaller, encoded, left))
        done.append("counts are exact")
        origins = {name: case.origin(name, subject) for name in smaller.model.state_dict()}
        now = digests(smaller)
        assert [name for name, origin in origins.items() if origin is not None and now[name] != before[origin]] == []
        if reloaded_by_default(family, case.name):
            saving.save(smaller, folder)
            words = smaller.generate(encoded, STEPS)
            want = {"logits": last_logits(smaller, encoded).tolist(), "said": words, "clips": case.clips}
            (folder / "want.json").write_text(json.dumps(want))
            saved[folder] = (family, case.name)
    finally:
        smaller.detach()
    if case.twin is not None:
        with case.twin(subject, encoded) as twin:
            torch.testing.assert_close(logits, last_state(twin, encoded)[0], atol=1e-4, rtol=1e-4)
        done.append("removed is hidden")
    untouched = compress(subject, [case.nothing], evidence, in_place=True)
    assert untouched.ledger == ()
    assert torch.equal(last_state(subject, encoded)[0], plain)  # detached, and nothing done at strength zero: bit for bit
    assert digests(subject) == before
    return [*done, "nothing is nothing", "nothing else is touched"]


def verdict(family, case, folder):
    subject = opened(family)
    try:
        encoded, plain, before = dense(family, case.clips)
    except ExampleError:
        assert case.clips
        return "not applicable: it takes no clips", []
    try:
        return "pass", check(family, case, folder)
    except PassError as error:
        assert torch.equal(last_state(subject, encoded)[0], plain)  # a refusal leaves nothing behind
        assert digests(subject) == before
        return f"refused: {one_sentence(error)}", []


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return tmp_path_factory.mktemp("contract")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", CASES)
def test_a_pass_keeps_its_contract(family, name, folders):
    found, done = verdict(family, CASES[name], folders / f"{family} {name}".replace(": ", "-"))
    seen[family, name] = found
    covered.extend((name, family, invariant) for invariant in done)
    if not WHOLE:
        assert found == published()[opened(family).anatomy.family][name]


def test_a_fresh_process_says_what_was_saved():
    """One process loads everything; it takes three seconds to start."""
    run = [sys.executable, "-m", "tests.compress.reload", *map(str, saved)]
    done = subprocess.run(run, capture_output=True, text=True, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.strip().splitlines()[-1])
    assert {saved[Path(folder)]: why for folder, why in found.items() if why} == {}
    assert len(found) == len(saved) > 0
    covered.extend((name, family, "saved and loaded") for family, name in saved.values())


def published():
    return {row["family"]: row["passes"] for row in support()}


@pytest.mark.skipif(not WHOLE, reason="the table is written by `make support`")
def test_the_table_is_written():
    rows = []
    for family in FAMILIES:
        anatomy = opened(family).anatomy
        passes = {name: seen[family, name] for name in CASES}
        rows.append({"family": anatomy.family, "model_type": anatomy.model_type, "passes": passes})
    PATH.write_text(json.dumps(rows, indent=1) + "\n")
    PAGE.write_text(markdown(rows))
    assert support() == rows


def test_how_much_was_covered(capsys):
    """Prints how many (pass, family, invariant) held, and how many cells were refused; nothing is anything else."""
    assert len(seen) == len(FAMILIES) * len(CASES)
    cells = Counter(found.split(":")[0] for found in seen.values())
    held = Counter(invariant for _, _, invariant in covered)
    with capsys.disabled():
        print(f"\n{len(CASES)} passes x {len(FAMILIES)} families: {dict(cells)}; {len(covered)} invariants held: {dict(held)}")
    assert len(set(covered)) == len(covered) == held.total()
    assert set(cells) <= {"pass", "not applicable", "refused"}
    for invariant in ("nothing is nothing", "counts are exact", "nothing else is touched"):
        assert held[invariant] == cells["pass"]
    twins = sum(found == "pass" and CASES[name].twin is not None for (_, name), found in seen.items())
    assert held["removed is hidden"] == twins
    assert held["saved and loaded"] == sum(
        found == "pass" and reloaded_by_default(family, name) for (family, name), found in seen.items()
    )
    assert cells["pass"] >= 140
    assert held["saved and loaded"] >= (cells["pass"] if WHOLE else 25)


def test_every_pass_every_change_and_every_method_has_a_case():
    assert {type(case.real) for case in CASES.values()} == set(PASSES)
    assert {case.real.method for case in CASES.values() if case.real.title == "tokens"} == set(METHODS)
    tables = {"experts": "qwen3_vl_moe", "mask: aki": "llava", "skip": "llava", "remove-layers": "llava", "withdraw": "llava",
              "tokens: uniform": "llava", "width": "llava", "prune: magnitude": "llava"}  # fmt: skip
    kinds = {
        change.kind
        for name, family in tables.items()
        for change in CASES[name].real.plan(opened(family), CASES[name].evidence(opened(family)))
    }
    twins = {change.kind for change in CASES["width"].real.model_copy(update={"simulated": True}).plan(opened("llava"), {})}
    uneven = {kind.removesuffix("-evenly") for kind in kinds}  # where a configuration cannot say it: Qwen2-VL's heads, for one
    assert kinds | twins | uneven | {"distilled"} == {change.kind for change in CHANGES}  # what is learned has tests of its own


def test_the_page_is_the_table():
    assert PAGE.read_text() == markdown(support())
    assert [row["family"] for row in support()] == [opened(family).anatomy.family for family in FAMILIES]
    assert {row["family"] for row in support()} <= {row.family for row in ROWS.values()}
