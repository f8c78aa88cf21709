"""The study of tradeoffs on an untrained demo model, and on toys."""

from dataclasses import replace

import pytest
from typer.testing import CliRunner

from compress.passes import METHODS
from probe import load
from probe.errors import PassError, StudyError
from studies import planning
from studies import tradeoffs as module
from studies.bench import KEYS
from studies.cli import app
from studies.configurations import configurations
from studies.data import Data, load_data
from studies.study import Setting
from studies.tradeoffs import tradeoffs
from studies.tradeoffs_report import surely_worse
from tests import toys
from tests.studies import command


@pytest.fixture(scope="module", autouse=True)
def little_evidence():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(planning, "APART", 4)
        yield


@pytest.fixture(scope="module")
def run(stranger, little_evidence, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tradeoffs") / "r"
    asked = ["study", "tradeoffs", "--model", str(stranger), "--limit", "4", "--shares", "0.25", "--methods", "uniform", "--rounds", "2",
             "--tokens", "2", "--budget", "0", "--time-budget", "0", "--device", "cpu", "--out", str(folder), "--json", "--quiet"]  # fmt: skip
    return folder, command.last_line(asked), asked


def test_it_says_what_was_asked(run):
    folder, found, _ = run
    assert {"run", "points", "evidence_plan"} <= set(found)
    names = [point["name"] for point in found["points"]]
    assert len(names) == len(set(names)) >= 5 + 8 + 2 + 1
    assert {point["baseline"] for point in found["points"]} == {"full", "random", "pooling", "down-sampling", ""}
    for point in found["points"]:
        assert set(KEYS) <= set(point)
        assert point["accuracy_low"] <= point["accuracy"] <= point["accuracy_high"]
        assert point["prefill_ms"] > 0
        assert point["verdict"] in ("faster", "slower", "no evidence")
    by_name = {point["name"]: point for point in found["points"]}
    assert by_name["full"]["flops_ratio"] == by_name["full"]["kv_ratio"] == 1
    assert (
        by_name["pooling 0.25"]["kv_bytes"] == by_name["uniform 0.25"]["kv_bytes"] == by_name["down-sampling 0.25"]["kv_bytes"]
    )
    assert by_name["down-sampling 0.25"]["flops"] < by_name["uniform 0.25"]["flops"]  # the tower sees less, too
    assert by_name["without layer 4, pooling 0.25"]["flops"] < by_name["pooling 0.25"]["flops"]
    assert by_name["full"]["difference"] == {"value": 0, "low": 0, "high": 0}
    assert {name for name, point in by_name.items() if point["on_frontier"]} == set(found["frontier"])
    assert "nan" not in (folder / "summary.json").read_text().lower()


def test_the_report_answers_the_question(run):
    folder, found, _ = run
    report = (folder / "report.md").read_text()
    assert "*What does each step of compression cost in accuracy, and what does it save?*" in report
    assert "The null beside the times" in report
    assert all(f"{point['name']}" in report for point in found["points"])
    assert (folder / "figures/frontier.png").stat().st_size > 10_000


def test_asking_again_measures_only_what_is_missing(run):
    folder, _, asked = run
    parts = {path: path.read_bytes() for path in (folder / "records").glob("*.parquet")}
    lost = sorted(parts)[2]
    lost.unlink()
    assert CliRunner().invoke(app, asked).exit_code == 0
    now = {path: path.read_bytes() for path in (folder / "records").glob("*.parquet")}
    assert set(now) == set(parts)
    assert [path for path in parts if now[path] != parts[path]] in ([lost], [])


@pytest.fixture
def few(monkeypatch):
    """The first configurations and the last of the layers alone, where it does not matter how many there are."""
    every = configurations

    def some(*asked):
        found = every(*asked)
        return [*found[:4], *(one for one in found if one.name == "without layer 7")]

    monkeypatch.setattr(module, "configurations", some)


@pytest.mark.slow
def test_batches_change_nothing(stranger, tmp_path, few):
    subject, data = load(stranger), load_data("demo", 5)
    found = [
        tradeoffs(Setting(subject, data, tmp_path / str(size), batch=size), shares="0.5", methods="random", rounds=0, budget=0)
        for size in (1, 4)
    ]
    for one, many in zip(*(summary["points"] for summary in found), strict=True):
        assert one["name"] == many["name"]
        for key in ("accuracy", "flops", "kv_bytes", "prefill_ms", "verdict"):
            assert one[key] == many[key]
        assert one["divergence"]["value"] == pytest.approx(many["divergence"]["value"], abs=1e-4)


def test_what_surely_costs_is_said_over_all_steps():
    def step(name, value, p):
        return {"name": name, "difference": {"value": value, "low": 0, "high": 0}, "p": p}

    steps = [
        step("bad", -0.4, 0.001),
        step("worse", -0.5, 0.002),
        step("lucky", -0.1, 0.04),
        step("better", 0.3, 0.0005),
        {"name": "other"},
    ]
    found = surely_worse([*steps, *(step(f"none {i}", 0.0, 1.0) for i in range(6))])
    assert [point["name"] for point, _ in found] == ["worse", "bad"]
    assert found[0][1] == pytest.approx(0.002 * 10 / 3)
    assert surely_worse([]) == []


def test_there_are_enough_configurations(stranger):
    found = configurations(load(stranger), (0.5, 0.25, 0.125), list(METHODS))
    assert len(found) >= 25
    assert len({one.key for one in found}) == len(found)
    tried = {one.recipe.passes[0].method for one in found if one.recipe and one.recipe.passes[0].title == "tokens"}
    assert tried == set(METHODS)
    drawn = [one.recipe.passes[0].seed for one in found if one.name.startswith("random 0.25")]
    assert sorted(drawn) == [0, 1, 2]
    assert {one.baseline for one in found} == {"full", "random", "pooling", "down-sampling", ""}


@pytest.mark.slow
def test_other_families_skip_what_they_refuse(toy, tmp_path):
    subject = toy("qwen2_vl")
    examples = tuple(
        replace(e, answer="red", id=f"{e.id}{i}") for i in range(2) for e in toys.pair(subject)
    )  # half of them calibrate
    found = tradeoffs(
        Setting(subject, Data("toys", examples, "t"), tmp_path / "r"), shares="0.5", methods="uniform", rounds=0, budget=0
    )
    assert found["n"] == 2
    assert found["evidence_plan"] is None
    assert found["plans"] == {}
    assert {point["baseline"] for point in found["points"]} >= {"full", "random", "down-sampling"}
    names = {point["name"] for point in found["points"]}
    assert names.isdisjoint(found["skipped"])
    assert all(found["skipped"].values())


def test_a_plan_from_evidence_stands_beside_what_it_must_beat(stranger, tmp_path, few):
    setting = Setting(load(stranger), load_data("demo", 3), tmp_path / "r")
    found = tradeoffs(setting, shares="0.5", methods="uniform", rounds=0, budget=0.6)
    assert found["evidence_plan"]["name"] == "evidence plan"
    assert found["evidence_plan"]["flops_ratio"] <= 0.6 * 1.02
    rivals = [point for point in found["points"] if point["name"].startswith("no evidence: ")]
    assert {point["name"] for point in rivals} == set(found["plans"]["evidence plan"]["rivals"])
    assert len(rivals) >= 3
    right = {point["name"]: point["accuracy"] for point in found["points"]}
    against = found["plans"]["evidence plan"]["against"]["no evidence: random layers"]
    drawn = [right[name] for name in found["plans"]["evidence plan"]["rivals"] if "no evidence: random layers" in name]
    assert against["draws"] == len(drawn) == 3
    assert against["value"] == pytest.approx(right["evidence plan"] - sum(drawn) / 3)
    report = (tmp_path / "r/report.md").read_text()
    assert "## Evidence plan" in report
    assert "64 questions about other scenes" not in report  # here they are fewer, and the report says how many
    kept = (tmp_path / "r/plan-flops.json").read_bytes()
    assert tradeoffs(setting, shares="0.5", methods="uniform", rounds=0, budget=0.6)["evidence_plan"] == found["evidence_plan"]
    assert (tmp_path / "r/plan-flops.json").read_bytes() == kept


def test_a_budget_that_cannot_be_met_is_said(stranger, tmp_path, few, monkeypatch):
    def refused(*_):
        raise PassError("no set of the steps that this model allows reads a prompt with 1% of its FLOPs: take a larger budget")

    monkeypatch.setattr(module, "planned", refused)  # what a planner says of such a budget is a test of the planner
    setting = Setting(load(stranger), load_data("demo", 2), tmp_path / "r")
    found = tradeoffs(setting, shares="0.5", methods="uniform", rounds=0, budget=0.01)
    assert found["evidence_plan"] is None
    assert "take a larger budget" in (tmp_path / "r/report.md").read_text()


def test_wrong_options_are_named(stranger, tmp_path):
    setting = Setting(load(stranger), load_data("demo", 2), tmp_path / "r")
    with pytest.raises(StudyError, match="numbers with commas"):
        tradeoffs(setting, shares="half")
    with pytest.raises(StudyError, match="between 0 and 1, not at 2"):
        tradeoffs(setting, shares="0.5,2")
    with pytest.raises(StudyError, match=r"there is no token reducer 'pulling' .did you mean 'pooling'"):
        tradeoffs(setting, methods="pulling")
    assert not (tmp_path / "r").exists()
