"""The study of token reduction on an untrained demo model, and its numbers by hand."""

import numpy as np
import pytest
from typer.testing import CliRunner

from compress.passes import METHODS
from probe.analysis.stats import mcnemar
from studies.cli import app
from studies.token_reduction import configurations
from studies.token_reduction_report import BASELINES, GROUPS, _iou, _own, ranking
from tests.studies import command


@pytest.fixture(scope="module")
def run(stranger, tmp_path_factory):
    folder = tmp_path_factory.mktemp("reduction") / "r"
    asked = ["study", "token-reduction", "--model", str(stranger), "--limit", "4", "--batch", "3", "--shares", "0.25", "--methods",
             "fastv,divprune,evs", "--device", "cpu", "--out", str(folder), "--json", "--quiet"]  # fmt: skip
    return folder, command.last_line(asked), asked


def test_it_says_what_was_asked(run):
    folder, said, _ = run
    assert said["n"] == 4
    assert said["n_visual"] == 64
    assert set(said["methods"]) == {*BASELINES, "fastv", "divprune"}
    assert set(said["refused"]) == {"evs 0.25"}
    assert "no grid of several frames" in said["refused"]["evs 0.25"]
    for method, by_share in said["methods"].items():
        assert by_share["0.25"]["kept"] == 16
        assert by_share["0.25"]["draws"] == (3 if method == "random" else 1)
        assert by_share["0.25"]["flops_ratio"] < 1
        assert (
            by_share["0.25"]["accuracy"]["low"] <= by_share["0.25"]["accuracy"]["value"] <= by_share["0.25"]["accuracy"]["high"]
        )
    for share, found in said["ranking"].items():
        values = [line["accuracy"]["value"] for line in found]
        assert values == sorted(values, reverse=True)
        assert len(found) == len(said["methods"])
        assert said["own"][share]["pooling"]["chance"] == float(share)
    overlap = said["overlap"]["0.25"]
    assert np.allclose(np.diag(overlap["iou"]), 1)
    assert np.allclose(overlap["iou"], np.array(overlap["iou"]).T)
    assert 0.05 < overlap["chance"] < 0.3  # two draws of 16 of 64: a seventh, on the mean
    assert "smaller picture" not in overlap["methods"]
    for name in ("accuracy", "kinds", "overlap", "own"):
        assert (folder / f"figures/{name}.png").stat().st_size > 10_000
        assert (folder / f"figures/{name}.html").is_file()
    report = (folder / "report.md").read_text()
    assert "*Which visual tokens can go, and which way of choosing them is best?*" in report
    assert all(name in report for name in said["methods"])


def test_asking_again_changes_nothing(run):
    folder, _, asked = run
    before = (folder / "summary.json").read_bytes()
    lost = folder / "records" / "part-divprune-0.25.parquet"
    rows = lost.read_bytes()
    lost.unlink()
    assert CliRunner().invoke(app, asked).exit_code == 0
    assert lost.read_bytes() == rows
    assert (folder / "summary.json").read_bytes() == before


def items(right, kept=None, total=8):
    return [
        {"right": bool(r), "kept": kept[i] if kept else [i], "total": total, "own": [0, 1], "kind": ""}
        for i, r in enumerate(right)
    ]


def test_the_ranking_by_hand():
    n = 40
    good, poor, lucky = np.ones(n, bool), np.arange(n) % 2 == 0, np.arange(n) % 2 == 1
    reduced = {"random": {0.5: [items(poor), items(lucky)]}, "good": {0.5: [items(good)]}, "poor": {0.5: [items(poor)]}}
    first, second, third = ranking(reduced, items(good), 0)["0.5"]
    assert (first["method"], first["accuracy"]["value"], first["over_random"]["value"]) == ("good", 1.0, 0.5)
    assert first["q_random"] < 0.01
    assert np.isnan(first["p_best"])
    assert {second["method"], third["method"]} == {"random", "poor"}
    other = next(line for line in (second, third) if line["method"] == "poor")
    assert other["over_random"]["value"] == 0  # of two draws each is right where the other is wrong
    assert other["p_random"] > 0.5
    assert other["p_best"] == mcnemar(good, poor)


def test_overlap_and_the_patches_of_what_is_asked_by_hand():
    assert _iou({1, 2, 3}, {2, 3, 4}) == 0.5
    assert _iou(set(), set()) == 1
    dense = items([True, True])
    reduced = {"a": {0.5: [items([True, True], [[0, 1, 2, 3], [1, 5, 6, 7]])]}}
    found = _own(reduced, dense, 0)["0.5"]["a"]
    assert found["value"] == 0.75  # both of the first one's patches, one of the second's two
    assert found["chance"] == 0.5


def test_every_method_has_a_panel_and_every_name_a_file_of_its_own():
    assert {name for names in GROUPS.values() for name in names} == {*METHODS, *BASELINES}
    found = configurations((0.5, 0.25), list(METHODS), 0)
    assert len({one.key for _, _, one in found}) == len(found) == 1 + 2 * (1 + len(METHODS) + 2)
