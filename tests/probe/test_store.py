"""Recorded tensors on disk: what comes back is what was recorded, read in part, after a cut, and never from a damaged shard."""

import dataclasses
import errno
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import safe_open

from probe import Example, Lens, Mass, Residual, Rows, trace
from probe import budget as budgets
from probe.budget import keep, plan
from probe.errors import StoreError
from probe.store import Store, StoreWriter
from tests import toys

RECORD = [Residual("resid_post"), Residual("mlp_out", [1], "image", reduce="mean"), Mass(), Rows("question"), Lens(top=2)]
WORDS = ("ball", "dog in the park", "cat", "big red house on the hill", "tree")


@pytest.fixture
def examples():
    return [
        Example(f"e{i}", f"what color is the {words} ?", (toys.picture(40 + 10 * i, 40, i),)) for i, words in enumerate(WORDS)
    ]


def test_what_is_read_is_what_a_trace_of_the_example_alone_records(toy, examples, tmp_path):
    subject = toy("llava_next")
    store = keep(subject, examples, RECORD, tmp_path / "s", batch=2)
    assert store.examples == tuple(e.id for e in examples)
    assert store.names == ("states", "states.1", "mass", "entropy", "sink", "rows", "lens_top_ids", "lens_top_probs")
    for example in examples:
        alone = trace(subject, example, RECORD)
        found = {name: store.read(example.id, name) for name in store.names}
        torch.testing.assert_close(found["states"].tensor, alone["states"].tensor[:, 0], atol=2e-5, rtol=0)
        torch.testing.assert_close(found["states.1"].tensor, alone["states.1"].tensor[:, 0], atol=2e-5, rtol=0)
        torch.testing.assert_close(found["entropy"].tensor, alone["entropy"].tensor[:, 0], atol=2e-5, rtol=0)
        length = len(alone.encoded.maps[0])  # in a batch it was padded on the left
        torch.testing.assert_close(found["rows"].tensor[..., -length:], alone["rows"].tensor[:, 0], atol=2e-5, rtol=0)
        assert torch.equal(found["lens_top_ids"].tensor[-1], alone["lens_top_ids"].tensor[-1, 0])
        assert found["states"].dims == ("layer", "position", "width")
        assert found["states"].labels["layer"] == tuple(range(subject.n_layers))


def test_a_part_of_a_record_is_that_part_of_the_whole(toy, examples, tmp_path, monkeypatch):
    store = keep(toy("llava"), examples, [Residual("resid_post"), Residual("z", positions="last")], tmp_path / "s", batch=5)
    whole = store.read("e3", "states")
    positions = whole.labels["position"]
    chosen = [positions[4], positions[1], positions[2]]
    assert torch.equal(store.read("e3", "states", layer=2).tensor, whole.tensor[2])
    part = store.read("e3", "states", layer=2, positions=chosen)
    assert torch.equal(part.tensor, whole.tensor[2][[4, 1, 2]])
    assert part.dims == ("position", "width")
    assert part.labels == {"position": tuple(chosen)}
    assert store.read("e3", "states.1").dims == ("layer", "position", "head", "dim")
    streamed = dict(store.each("states", layer=0))
    assert list(streamed) == list(store.examples)
    assert all(named.tensor.shape[1:] == (32,) for named in streamed.values())


def test_shards_are_cut_by_size_and_a_store_that_was_cut_off_goes_on(toy, examples, tmp_path):
    subject, record = toy("llava"), [Residual("resid_post")]
    with StoreWriter(tmp_path / "s", {"a": 1}, shard_bytes=1) as writer:
        for example in examples[:2]:
            writer.add(trace(subject, example, record))
    assert len(list((tmp_path / "s").glob("shard-*.safetensors"))) == 2
    shutil.copy(tmp_path / "s/shard-00000.safetensors", tmp_path / "s/shard-00002.safetensors")  # killed before its index
    (tmp_path / "s/shard-00003.tmp").write_bytes(b"half")
    with StoreWriter(tmp_path / "s", {"a": 1}, shard_bytes=1) as writer:
        assert writer.done == {"e0", "e1"}
        assert not list((tmp_path / "s").glob("*.tmp"))
        for example in examples:
            if example.id not in writer.done:
                writer.add(trace(subject, example, record))
    store = Store(tmp_path / "s")
    assert store.examples == tuple(e.id for e in examples)
    for example in examples:
        assert torch.equal(store.read(example.id, "states").tensor, trace(subject, example, record)["states"].tensor[:, 0])
    with pytest.raises(StoreError, match=r"holds another recording \(it differs in a\)"):
        StoreWriter(tmp_path / "s", {"a": 2})


def test_a_full_disk_is_one_sentence_and_leaves_no_half_shard(toy, examples, tmp_path, monkeypatch):
    def full(tensors, path):
        Path(path).write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("probe.store.save_file", full)
    writer = StoreWriter(tmp_path / "s", {"a": 1})
    writer.add(trace(toy("llava"), examples[0], [Residual("resid_post")]))
    with pytest.raises(StoreError, match=r"shard-00000\.safetensors cannot be written: .*No space left on device"):
        writer.close()
    assert [path.name for path in (tmp_path / "s").iterdir()] == ["store.json"]


def test_half_precision_halves_the_floats(toy, examples, tmp_path):
    whole = keep(toy("llava"), examples, [Residual()], tmp_path / "a")
    half = keep(toy("llava"), examples, [Residual()], tmp_path / "b", dtype=torch.float16)
    assert half.read("e0", "states").tensor.dtype == torch.float16
    torch.testing.assert_close(
        half.read("e0", "states").tensor.float(), whole.read("e0", "states").tensor, atol=1e-2, rtol=1e-3
    )
    assert 0.45 < half.n_bytes / whole.n_bytes < 0.55


def test_only_what_is_asked_for_is_read(toy, examples, tmp_path, monkeypatch):
    """One layer comes through a slice of the file, never through the whole tensor."""
    store = keep(toy("llava"), examples, [Residual()], tmp_path / "s")
    asked = []

    class Spy:
        def __init__(self, path, framework):
            self.file = safe_open(path, framework)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            return None

        def get_slice(self, key):
            outer = self.file.get_slice(key)

            class Slice:
                def __getitem__(self, index):
                    asked.append(index)
                    return outer[index]

            return Slice()

    monkeypatch.setattr("probe.store.safe_open", Spy)
    first = store.read("e0", "states").labels["position"][0]
    store.read("e0", "states", layer=3, positions=[first])
    assert asked[-1] == (3, slice(0, 1), slice(None))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda f: (f / "shard-00000.safetensors").unlink(),
            r"shard-00000\.safetensors is missing: delete index-00000\.parquet",
        ),
        (lambda f: (f / "shard-00000.safetensors").write_bytes(b"12345"), "has 5 of [0-9]+ bytes: delete index-00000"),
        (lambda f: (f / "store.json").unlink(), "is no store: there is no store.json in it"),
    ],
)
def test_a_damaged_store_is_named(toy, examples, tmp_path, spoil, message):
    keep(toy("llava"), examples, [Residual()], tmp_path / "s")
    spoil(tmp_path / "s")
    with pytest.raises(StoreError, match=message):
        Store(tmp_path / "s")


def test_a_lost_shard_is_recorded_again(toy, examples, tmp_path):
    subject, record = toy("llava"), [Residual()]
    with StoreWriter(tmp_path / "s", {}, shard_bytes=1) as writer:
        for example in examples[:3]:
            writer.add(trace(subject, example, record))
    (tmp_path / "s/shard-00001.safetensors").unlink()
    (tmp_path / "s/index-00001.parquet").unlink()
    with StoreWriter(tmp_path / "s", {}) as writer:
        assert writer.done == {"e0", "e2"}


def test_what_was_never_recorded_is_refused(toy, examples, tmp_path):
    store = keep(toy("llava"), examples, [Residual(layers=[0, 2]), Mass()], tmp_path / "s")
    asks = [
        ({"example": "e9", "name": "states"}, "no example 'e9'"),
        ({"example": "e0", "name": "state"}, r"no record 'state' \(did you mean"),
        ({"example": "e0", "name": "states", "layer": 1}, "layer 1 of states is not in this store"),
        ({"example": "e0", "name": "states", "positions": [10_000]}, "position 10000 of states of example 'e0' is not"),
        ({"example": "e0", "name": "mass", "positions": [0]}, "mass has no positions to choose among"),
    ]
    for ask, message in asks:
        with pytest.raises(StoreError, match=message):
            store.read(**ask)
    with StoreWriter(tmp_path / "twice", {}) as writer:
        writer.add(trace(toy("llava"), examples[0], [Mass()]))
        with pytest.raises(StoreError, match="example 'e0' is in the store"):
            writer.add(trace(toy("llava"), examples[0], [Mass()]))
    (tmp_path / "other").mkdir()
    (tmp_path / "other/letter.txt").write_text("x")
    with pytest.raises(StoreError, match=r"holds other things \(letter.txt\)"):
        StoreWriter(tmp_path / "other", {})
    with pytest.raises(StoreError, match="the list of examples is empty"):
        plan(toy("llava"), [], [Residual()], tmp_path / "s")


def test_the_budget_is_what_is_written(toy, examples, tmp_path):
    subject = toy("llava")
    found = plan(subject, examples, RECORD, tmp_path / "not" / "yet")
    assert not (tmp_path / "not").exists()
    store = keep(subject, examples, RECORD, tmp_path / "s", batch=1)
    assert found.disk == pytest.approx(store.n_bytes, rel=0.1)
    assert found.seconds > 0
    assert found.fits
    assert str(found).endswith("for 5 examples")


def test_what_does_not_fit_is_refused_with_what_would(toy, examples, tmp_path, monkeypatch):
    subject = toy("llava")
    found = plan(subject, examples, [Residual()], tmp_path)
    tight = dataclasses.replace(found, free_disk=int(found.per_example * 2.5))
    with pytest.raises(
        StoreError, match=r"record at most 2 examples, or dtype float16 \(.*\), or reduce=\"mean\" or positions"
    ):
        tight.check("here")
    with pytest.raises(StoreError, match=r"of memory and 0\.0 MiB is free: record batches of 1"):
        dataclasses.replace(found, free_memory=10).check("here")
    monkeypatch.setattr(budgets, "plan", lambda *a, **k: tight)
    with pytest.raises(StoreError, match="would take"):
        keep(subject, examples, [Residual()], tmp_path / "s")
    assert not (tmp_path / "s").exists()
