"""The study of a model before and after compression: records, summary, report, and what it refuses."""

import numpy as np
import pyarrow as pa
import pytest
from typer.testing import CliRunner

from compress.passes.layers import RemoveLayers
from compress.passes.tokens import Tokens, Withdraw
from compress.recipe import compress
from compress.saving import save
from probe import load
from probe.recorders import Mass
from probe.tracing import trace
from studies.before_after import SCHEMA, layers_left, unit
from studies.before_after_report import summarise
from studies.cli import app
from studies.data import load_data
from tests.studies import command

RECIPE = "passes:\n- remove-layers: {layers: [4, 6]}\n- tokens: {method: fastv, budget: {keep: 0.5}}\n"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("before-after")
    recipe = folder / "recipe.yaml"
    recipe.write_text(RECIPE)
    asked = ["study", "before-after", "--model", "demo", "--data", "demo", "--limit", "8", "--recipe", str(recipe), "--device", "cpu",
             "--out", str(folder / "r"), "--json", "--quiet"]  # fmt: skip
    return folder / "r", command.last_line(asked), asked


def test_it_says_what_was_asked(run):
    folder, found, _ = run
    assert found["n"] == 8
    assert found["layers"] == {"before": list(range(8)), "after": [0, 1, 2, 3, 5, 7]}
    for curves in (*found["flows"].values(), *found["masses"].values()):
        assert curves["difference"]["layers"] == [0, 1, 2, 3, 5, 7]
        assert len(curves["before"]["mean"]) == 8
    assert found["alike"]["difference"]["layers"] == [0, 1, 2, 3, 4, 6, 8]
    counts = [k["n"] for k in found["answers"]["by_kind"].values()]
    assert sum(counts) == 8
    hits = {name: sum(k[name] for k in found["answers"]["by_kind"].values()) for name in ("before", "after")}
    assert hits == {name: round(8 * found["answers"][name]["value"]) for name in hits}
    broke = sum(len(k["broke"]) - len(k["mended"]) for k in found["answers"]["by_kind"].values())
    assert broke == hits["before"] - hits["after"]
    assert {path.name for path in (folder / "figures").glob("*.png")} >= {"attention.png", "alignment.png"}
    assert "What does compression change inside a model?" in (folder / "report.md").read_text()


def test_asking_again_gives_the_same_bytes(run):
    folder, _, asked = run
    before = (folder / "summary.json").read_bytes()
    assert CliRunner().invoke(app, asked).exit_code == 0
    assert (folder / "summary.json").read_bytes() == before


def test_a_step_that_does_nothing_changes_nothing():
    """The null: a copy of the model beside the model."""
    subject = load("demo")
    examples = load_data("demo", 3, seed=0).examples
    copy = compress(subject, [])
    numbers = {name: list(range(8)) for name in ("before", "after")}
    rows = unit({"before": subject, "after": copy}, numbers, examples, 3, 4)
    table = {name: [r["value"] for r in rows if r["model"] == name and "value" in r] for name in numbers}
    assert len(table["before"]) == 3 * (4 * 8 + 3 * 8 + 9)
    assert table["before"] == table["after"]


def test_masses_are_those_of_the_model_as_it_runs():
    """Without reducers that are hidden, the masses are a plain trace's; layers keep the dense model's numbers."""
    subject = load("demo")
    examples = load_data("demo", 2, seed=0).examples
    smaller = compress(subject, [RemoveLayers(layers=(2,))])
    assert layers_left(smaller) == [0, 1, 3, 4, 5, 6, 7]
    rows = unit(
        {"before": subject, "after": smaller}, {"before": list(range(8)), "after": layers_left(smaller)}, examples, 3, 4
    )
    mine = {
        (r["example"], r["layer"]): r["value"]
        for r in rows
        if r["model"] == "after" and r["what"] == "mass" and r["flow"] == "image->last"
    }
    mass = trace(smaller, smaller.encode(examples), [Mass(rows=("last",), columns=("media",))])["mass"]
    plain = mass.at(row_group="last", column_group="media").mean(-1).numpy()
    assert len(mine) == 14
    for (name, layer), value in mine.items():
        at = plain[layers_left(smaller).index(layer), [e.id for e in examples].index(name)]
        assert value == pytest.approx(float(at), abs=1e-6)
    assert np.isfinite(plain).all()


@pytest.mark.slow
def test_without_a_recipe_a_plan_from_evidence_is_compared(tmp_path, monkeypatch):
    monkeypatch.setattr("studies.planning.APART", 4)  # examples that the plan rests on
    asked = ["study", "before-after", "--model", "demo", "--limit", "2", "--budget", "0.7", "--quiet", "--json"]
    found = command.last_line([*asked, "--out", str(tmp_path / "r")])
    assert found["steps"]
    assert found["n"] == 2


@pytest.mark.parametrize(("more", "message"), [
    (["--window-width", "99"], "a window has 1 to 8 layers"),
    (["--budget", "0.01"], "reads a prompt with 1% of its FLOPs"),
])  # fmt: skip
def test_what_cannot_be_compared_is_refused(more, message, monkeypatch):
    monkeypatch.setattr("studies.planning.APART", 2)
    result = CliRunner().invoke(app, ["study", "before-after", "--model", "demo", "--limit", "2", "--quiet", *more])
    assert result.exit_code == 1
    assert message in result.output


def test_a_compressed_model_with_a_recipe_is_refused(tmp_path):
    smaller = compress(load("demo"), [RemoveLayers(layers=(4,))])
    save(smaller, tmp_path / "m")
    smaller.detach()
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE)
    asked = ["study", "before-after", "--model", str(tmp_path / "m"), "--recipe", str(recipe), "--limit", "2", "--quiet"]
    result = CliRunner().invoke(app, asked)
    assert result.exit_code == 1
    assert "is compressed already" in result.output


def test_a_saved_model_is_compared_with_what_it_was_made_from(tmp_path):
    smaller = compress(load("demo"), [Tokens(method="pooling", budget={"keep": 16})])
    save(smaller, tmp_path / "m")
    smaller.detach()
    asked = [
        "study",
        "before-after",
        "--model",
        str(tmp_path / "m"),
        "--limit",
        "2",
        "--out",
        str(tmp_path / "r"),
        "--quiet",
        "--json",
    ]
    assert command.last_line(asked)["kept_tokens"] == 16


def test_what_has_left_is_compared_up_to_there():
    """Withdrawn at layer 3, visual tokens have states up to what enters it, and nothing stays."""
    subject = load("demo")
    smaller = compress(subject, [Withdraw(layer=3)])
    numbers = {name: list(range(8)) for name in ("before", "after")}
    rows = unit({"before": subject, "after": smaller}, numbers, load_data("demo", 2, seed=0).examples, 3, 4)
    alike = [r for r in rows if r["model"] == "after" and r["what"] == "alike"]
    assert len(alike) == 2 * 9
    assert all(np.isnan(r["value"]) == (r["layer"] > 3) for r in alike)
    assert {r["n"] for r in rows if r["what"] == "answer"} == {0}
    found = summarise(pa.Table.from_pylist(rows, SCHEMA), numbers, 0)
    assert found["alike"]["difference"]["layers"] == [0, 1, 2, 3]
