"""The study of masks on an untrained demo model, and on toys."""

import math
from dataclasses import replace

import pytest
from typer.testing import CliRunner

from compress.passes.base import titles
from compress.tokens.pairs import MASKS
from probe import load
from probe.errors import StudyError
from studies import masks_report
from studies.cli import app
from studies.data import Data, load_data
from studies.masks import known, masks, spans
from studies.study import Setting
from tests import toys
from tests.studies import command


@pytest.fixture(scope="module")
def run(stranger, tmp_path_factory):
    folder = tmp_path_factory.mktemp("masks") / "r"
    asked = ["study", "masks", "--model", str(stranger), "--limit", "4", "--methods", "naavit,unimodal,aki", "--parts", "1", "--device", "cpu",
             "--out", str(folder), "--json", "--quiet"]  # fmt: skip
    return folder, command.last_line(asked), asked


def test_it_says_what_was_asked(run, stranger):
    _, found, _ = run
    last = load(stranger).n_layers - 1
    whole = {name: f"{name} 0-{last}" for name in ("naavit", "unimodal", "aki")}
    points = {point["name"]: point for point in found["points"]}
    assert len(points) == 1 + 3
    assert set(whole.values()) < set(points)
    assert found["n"] == found["n_existence"] == found["n_looked"] == 4
    for point in points.values():
        assert point["flops_ratio"] == 1.0
        assert point["kv_ratio"] == 1.0
        assert point["text_only"]["agreement"]["value"] == 1.0  # no visual tokens, nothing changes
        assert point["yes"]["said"]["n"] == 4
    dense = points["full"]
    assert dense["pairs"] == 1.0
    assert points[whole["naavit"]]["pairs"] < 1.0 < points[whole["aki"]]["pairs"]
    assert points[whole["unimodal"]]["divergence"]["value"] > 1e-4


def test_attention_goes_where_the_mask_lets_it(run):
    _, found, _ = run
    flows = {name.partition(" ")[0]: one for name, one in found["masses"].items() if name == "full" or name.endswith(" 0-7")}
    assert set(flows["full"]) == set(masks_report.FLOWS)
    for flow in ("image->question", "image->last"):
        assert max(flows["unimodal"][flow]["mean"]) == 0.0
        assert min(flows["full"][flow]["mean"]) > 0.0
    assert max(flows["full"]["question->image"]["mean"]) == 0.0
    assert min(flows["aki"]["question->image"]["mean"]) > 0.0
    assert min(flows["unimodal"]["image->image"]["mean"]) == pytest.approx(1.0)
    for before, after in zip(flows["full"]["image->image"]["mean"], flows["naavit"]["image->image"]["mean"], strict=True):
        assert after < before


def test_the_report_answers_the_question(run):
    folder, found, _ = run
    report = (folder / "report.md").read_text()
    assert "*What does each attention mask do to a model that was trained without it?*" in report
    assert report.count("\n| ") == 1 + len(found["points"])
    for name in ("accuracy", "attention"):
        assert (folder / f"figures/{name}.png").stat().st_size > 10_000
        assert (folder / f"figures/{name}.html").is_file()
    assert "nan" not in report.lower()
    assert "nan" not in (folder / "summary.json").read_text().lower()


def test_asking_again_measures_only_what_is_missing(run):
    folder, _, asked = run
    parts = {path: path.read_bytes() for path in (folder / "records").glob("*.parquet")}
    sorted(parts)[2].unlink()
    assert CliRunner().invoke(app, asked).exit_code == 0
    now = {path: path.read_bytes() for path in (folder / "records").glob("*.parquet")}
    assert now == parts


def test_every_mask_is_known():
    assert set(MASKS) <= set(known()) <= set(MASKS) | set(titles())
    assert [(a.start, a.stop) for a in spans(8, (1, 3))] == [(0, 8), (0, 3), (3, 5), (5, 8)]


def test_other_families_and_refusals(toy, tmp_path):
    subject = toy("gemma3")
    examples = tuple(replace(e, answer="red") for e in toys.pair(subject))
    found = masks(Setting(subject, Data("toys", examples, "t"), tmp_path / "r"), methods="croc,naavit", parts="1")
    assert list(found["skipped"]) == ["croc 0-3"]
    assert "see all of themselves already" in found["skipped"]["croc 0-3"]
    assert found["n_existence"] == 0
    assert [point["name"] for point in found["points"]] == ["full", "naavit 0-3"]
    assert math.isfinite(found["points"][1]["divergence"]["value"])


def test_wrong_options_are_named(stranger, tmp_path):
    setting = Setting(load(stranger), load_data("demo", 2), tmp_path / "r")
    with pytest.raises(StudyError, match=r"there is no attention mask 'naavitt' .did you mean 'naavit'"):
        masks(setting, methods="naavitt")
    with pytest.raises(StudyError, match="whole numbers with commas"):
        masks(setting, parts="half")
    with pytest.raises(StudyError, match="can be cut into 1 to 8 parts, not into 9"):
        masks(setting, parts="9")
    with pytest.raises(StudyError, match="shows the model nothing"):
        masks(Setting(load(stranger), load_data("demo:text", 2), tmp_path / "r"))
    assert not (tmp_path / "r").exists()
