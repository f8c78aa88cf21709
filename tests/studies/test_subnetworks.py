"""The study of subnetworks on an untrained demo model, and its numbers on rows written by hand."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from compress.passes.prune import PruneWeights
from probe import load
from probe.calibration import linear_maps
from probe.errors import DataError, StudyError
from studies import subnetwork_groups as groups
from studies import subnetworks as study
from studies.data import Data, apart, load_data
from studies.demo.data import examples
from studies.study import Setting
from studies.subnetworks import configurations, subnetworks
from studies.subnetworks_report import _cross, _overlap

SETTINGS = {"sparsities": "0.5", "methods": "wanda", "allocations": "tamp", "at": 0.5, "calibrate": 16}


@pytest.fixture(scope="module")
def subject(stranger):
    return load(stranger, device="cpu")


@pytest.fixture(scope="module")
def data():
    """Eight questions of two kinds."""
    return Data("demo", tuple(examples(8, kinds=("exist", "count"))), "demo-world-2:picture:0")


@pytest.fixture(scope="module")
def run(subject, data, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(groups, "FEWEST", 2)
        folder = tmp_path_factory.mktemp("subnetworks") / "r"
        found = subnetworks(Setting(subject, data, folder), **SETTINGS)
        before = {path.name: path.read_bytes() for path in (folder / "records").glob("*.parquet")}
        lost = ["part-cross-modality-text.parquet", "part-wanda-0.5.parquet"]
        for name in lost:
            (folder / "records" / name).unlink()
        patch.setattr(study, "figures", lambda run, summary: None)  # they are drawn already
        again = subnetworks(Setting(subject, data, folder), **SETTINGS)
    return folder, found, before, again


def test_it_says_what_was_asked(run):
    folder, found, _, _ = run
    names = [point["name"] for point in found["points"]]
    assert names == [
        "full", "wanda 0.5", "wanda 2:4", "tamp 0.5", "wanda 0.5, perceptual tokens",
        "wanda 0.5, textual tokens", "wanda 0.5, half in words",
    ]  # fmt: skip
    assert found["skipped"] == {}
    assert set(found["lines"]["shown"]) == set(found["lines"]["words"]) == {"wanda", "tamp"}
    for by, expected in (("modality", ["image", "text"]), ("kind", ["exist", "count"])):
        overlap, cross = found["overlap"][by], found["cross"][by]
        assert overlap["groups"] == cross["groups"] == expected
        matrix = np.array(overlap["iou"])
        assert np.array_equal(matrix, matrix.T)
        assert overlap["chance"] == pytest.approx(1 / 3)
        assert overlap["chance"] < matrix[0, 1] < 1 == matrix[0, 0]
        assert cross["masks"] == ["dense", *expected, "intersection", "union", "magnitude", "random"]
        sizes = cross["sparsity"]
        assert sizes["dense"] == 0 < sizes["union"] < sizes[expected[0]] == sizes[expected[1]] <= 0.5 < sizes["intersection"]
        assert np.array(cross["accuracy"]).shape == (7, 2)
        assert len(cross["against_own"]) == 2 * 6
    report = (folder / "report.md").read_text()
    for name in [*names[1:], "Masks of modalities", "Masks of kinds of questions", "chance"]:
        assert name in report
    for name in ("sparsity", "budget", "overlap-modality", "overlap-kind", "cross-modality", "cross-kind", "overlap-layers"):
        assert (folder / f"figures/{name}.png").stat().st_size > 8_000
        assert f"figures/{name}.png" in report
    assert "nan" not in json.dumps(found).lower()


def test_what_was_lost_is_done_again_and_says_the_same(run):
    folder, found, before, again = run
    for name, was in before.items():
        if name.startswith(("part-cross", "part-overlap")):
            assert (folder / "records" / name).read_bytes() == was
    assert again["cross"] == found["cross"]
    assert [p["accuracy"] for p in again["points"]] == [p["accuracy"] for p in found["points"]]


def test_a_row_of_the_table_is_the_masked_model(subject, data):
    shown = apart(data, 8)[1]
    made = [groups.Group(name, subject, part, data.examples[:3]) for name, part in (("a", shown[:4]), ("b", shown[4:]))]
    family = groups.Family("kind", made, 0.5, 4)
    a, b = family.mask("a"), family.mask("b")
    row, *alone = (row for row in family.overlap() if not row["example"] and row["other"] != "magnitude")
    assert not alone
    inter, union = (sum(int(op(a[n], b[n]).sum()) for n in a) for op in (torch.logical_and, torch.logical_or))
    assert row["value"] == pytest.approx(inter / union)
    assert len(family.overlap()) == 2 + 1 + subject.n_layers
    before = {name: module.weight.clone() for name, module in linear_maps(subject)}
    smaller = family._with("union", subject)
    for name, module in linear_maps(smaller):
        assert torch.equal(module.weight, before[name] * (a[name] | b[name]))
    assert all(torch.equal(module.weight, before[name]) for name, module in linear_maps(subject))
    random = family.kept("random")
    assert {int((~mask).sum()) for mask in random.values()} == {int((~mask).sum()) for mask in a.values()}
    assert PruneWeights.of({"0.x": torch.tensor([[0.0, 1.0]])}).sparsity == 0.5


def test_numbers_of_rows_written_by_hand():
    family = SimpleNamespace(
        by="kind",
        names=["a", "b"],
        rows=["a", "b"],
        sparsity=0.5,
        groups=[SimpleNamespace(calibration=[1] * n) for n in (5, 6)],
    )
    right = {("a", "a"): [1, 1, 1, 0], ("b", "a"): [1, 0, 0, 0], ("a", "b"): [1, 0], ("b", "b"): [1, 1]}
    rows = [
        {"what": "cross", "text": "kind", "name": mask, "other": asked, "right": bool(r)}
        for (mask, asked), each in right.items() for r in each
    ]  # fmt: skip
    rows += [
        {"what": "overlap", "text": "kind", "name": "a", "other": "b", "example": e, "value": v}
        for e, v in (("", 0.6), ("0", 0.5), ("1", 0.7))
    ]
    rows += [
        {"what": "overlap", "text": "kind", "name": name, "other": "magnitude", "example": "", "value": value}
        for name, value in (("a", 0.8), ("b", 0.9))
    ]
    rows += [
        {"what": "sparsity", "text": "kind", "name": "a", "value": 0.5},
        {"what": "cross", "text": "modality", "name": "a", "other": "a", "right": True},
    ]
    cross = _cross(family, rows, 0)
    assert cross["accuracy"] == [[0.75, 0.5], [0.25, 1.0]]
    assert cross["n"] == [4, 2]
    assert cross["calibration"] == [5, 6]
    assert cross["own_advantage"]["value"] == pytest.approx((2 + 1) / 6)
    assert [(one["mask"], one["asked"], one["value"], one["p"]) for one in cross["against_own"]] == [
        ("b", "a", -0.5, 0.5),
        ("a", "b", -0.5, 1.0),
    ]
    assert _overlap(family, rows) == {
        "groups": ["a", "b"],
        "masks": ["a", "b", "magnitude"],
        "iou": [[1.0, 0.6, 0.8], [0.6, 1.0, 0.9], [0.8, 0.9, 1.0]],
        "chance": pytest.approx(1 / 3),
        "layers": {"a and b": [0.5, 0.7]},
    }


def test_every_name_is_there_once():
    found = configurations([0.3, 0.5], ["magnitude", "wanda", "sparsegpt"], ["owl"], 0.5, True)
    names = [one.name for one, _ in found]
    assert len(names) == len(set(names)) == 1 + 3 * 3 + 2 + 2 * 3
    assert {which for one, which in found if "half in words" in one.name} == {"mixed"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sparsities": "half"}, "numbers with commas"),
        ({"sparsities": "0.5,1"}, "between 0 and 1, not at 1"),
        ({"methods": "wnada"}, "there is no method 'wnada' .did you mean 'wanda'"),
        ({"allocations": "owls"}, "there is no allocation 'owls' .did you mean 'owl'"),
    ],
)
def test_what_does_not_exist_is_named(subject, data, settings, message):
    with pytest.raises(StudyError, match=message):
        subnetworks(Setting(subject, data), **settings)


def test_calibration_is_apart_from_what_is_asked(tmp_path):
    data = load_data("demo", 6)
    asked, calibration = apart(data, 4)
    assert asked is data
    assert len(calibration) == 4
    assert not {(e.prompt, str(e.images)) for e in data.examples} & {(e.prompt, str(e.images)) for e in calibration}
    other = Data("mine", data.examples, "x")
    asked, calibration = apart(other, 2)
    assert [e.id for e in calibration] == [data.examples[1].id, data.examples[3].id]
    assert [e.id for e in asked.examples] == [data.examples[i].id for i in (0, 2, 4, 5)]
    with pytest.raises(DataError, match="some to calibrate on and others to ask"):
        apart(Data("mine", data.examples[:1], "x"), 2)
