"""A Run survives being killed, and refuses to mix what does not belong together."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from probe.errors import RunError
from studies.run import Run

SCHEMA = pa.schema([("example", pa.string()), ("value", pa.float64())])
SUBJECT = {"name": "toy", "fingerprint": "1"}


def opened(folder, config=None, study="thing", subject=SUBJECT):
    return Run.open(folder, study, config or {"width": 3}, subject, SCHEMA)


def test_units_appear_whole_and_are_not_done_again(tmp_path):
    run = opened(tmp_path / "r")
    assert run.pending(["a", "b"]) == ["a", "b"]
    run.write("a", [{"example": "x", "value": 1.0}])
    again = opened(tmp_path / "r")
    assert again.pending(["a", "b"]) == ["b"]
    again.write("b", [{"example": "y", "value": None}])
    assert again.rows(["a", "b"]).to_pylist() == [{"example": "x", "value": 1.0}, {"example": "y", "value": None}]


def test_a_smaller_limit_throws_nothing_away(tmp_path):
    run = opened(tmp_path / "r", {"width": 3, "limit": 3})
    for key in "abc":
        run.write(key, [{"example": key, "value": 1.0}])
    smaller = opened(tmp_path / "r", {"width": 3, "limit": 1})
    assert smaller.rows(["a"]).num_rows == 1
    assert pq.read_table(tmp_path / "r/records").num_rows == 1  # what is read by folder is what was asked
    again = opened(tmp_path / "r", {"width": 3, "limit": 4})
    assert again.pending(["a", "b", "c", "d"]) == ["d"]
    assert again.rows(["a", "b", "c"])["example"].to_pylist() == ["a", "b", "c"]
    assert not list((tmp_path / "r/set-aside").iterdir())


def test_what_a_kill_leaves_behind_is_swept_away(tmp_path):
    run = opened(tmp_path / "r")
    (tmp_path / "r/records/part-a.tmp").write_bytes(b"half")
    again = opened(tmp_path / "r")
    assert again.pending(["a"]) == ["a"]
    assert not list((tmp_path / "r/records").iterdir())
    assert run.folder == again.folder


def test_the_same_rows_are_the_same_bytes(tmp_path):
    rows = [{"example": str(i), "value": i / 3} for i in range(50)]
    for name in ("r", "s"):
        opened(tmp_path / name).write("a", rows)
    assert (tmp_path / "r/records/part-a.parquet").read_bytes() == (tmp_path / "s/records/part-a.parquet").read_bytes()


def test_another_configuration_is_refused_with_the_fields(tmp_path):
    opened(tmp_path / "r", {"width": 3, "norm": "final", "limit": 5})
    with pytest.raises(RunError, match=r"another configuration .norm: \"final\" before, \"none\" now; width: 3 before, 5 now."):
        opened(tmp_path / "r", {"width": 5, "norm": "none", "limit": 5})
    with pytest.raises(RunError, match=r"another configuration .model: "):
        opened(tmp_path / "r", {"width": 3, "norm": "final", "limit": 5}, subject={"name": "toy", "fingerprint": "2"})
    opened(tmp_path / "r", {"width": 3, "norm": "final", "limit": 50})  # more examples are more units


def test_foreign_folders_are_refused(tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/cat.jpg").write_bytes(b"x")
    with pytest.raises(RunError, match=r"photos holds other things .cat.jpg. and no run.json: name a new or empty folder"):
        opened(tmp_path / "photos")
    assert [p.name for p in (tmp_path / "photos").iterdir()] == ["cat.jpg"]
    opened(tmp_path / "r")
    with pytest.raises(RunError, match="holds a run of the study 'thing', not 'other'"):
        opened(tmp_path / "r", study="other")


def test_unwritable_places_are_refused(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(RunError, match="cannot be made or read as a run directory: Not a directory"):
        opened(tmp_path / "file" / "r")
    with pytest.raises(RunError, match="cannot be made or read as a run directory"):
        opened(tmp_path / "file")


def test_a_damaged_run_is_refused(tmp_path):
    opened(tmp_path / "r")
    (tmp_path / "r/run.json").write_text("{")
    with pytest.raises(RunError, match=r"run.json is damaged"):
        opened(tmp_path / "r")


def test_a_full_disk_leaves_nothing_half_written(tmp_path, monkeypatch):
    run = opened(tmp_path / "r")

    def full(table, where, **options):
        where.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pq, "write_table", full)
    with pytest.raises(RunError, match=r"part-a.parquet cannot be written: No space left on device"):
        run.write("a", [{"example": "x", "value": 1.0}])
    assert not list((tmp_path / "r/records").iterdir())


def test_a_full_disk_leaves_no_half_figure_and_no_half_text(tmp_path, monkeypatch):
    run = opened(tmp_path / "r")

    class Paper:
        def savefig(self, where, **options):
            where.write_bytes(b"whole")

    class Page:
        def write_html(self, where, **options):
            where.write_bytes(b"half")
            raise OSError(28, "No space left on device")

    with pytest.raises(RunError, match=r"the figure flow cannot be written to .*: No space left on device"):
        run.figure("flow", Paper(), Page())
    assert not list((tmp_path / "r/figures").iterdir())
    before = sorted(path.name for path in (tmp_path / "r").iterdir())

    def full(path, text):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(RunError, match=r"report.md cannot be written: No space left on device"):
        run.write_text("report.md", "# report\n")
    assert sorted(path.name for path in (tmp_path / "r").iterdir()) == before


def test_run_json_says_what_was_asked_with_what_and_how_it_went(tmp_path):
    run = opened(tmp_path / "r")
    run.finish({"n": 1}, "# report\n")
    said = json.loads((tmp_path / "r/run.json").read_text())
    assert said["status"] == "done"
    assert said["config"] == {"width": 3}
    assert said["subject"] == SUBJECT
    assert said["environment"]["versions"]["torch"]
    assert json.loads((tmp_path / "r/summary.json").read_text()) == {"n": 1}
    failing = opened(tmp_path / "s")
    failing.fail(ValueError("no"))
    assert json.loads((tmp_path / "s/run.json").read_text())["error"] == "ValueError: no"
