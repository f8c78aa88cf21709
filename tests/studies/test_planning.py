"""Plans at the command line: the runs that they read, the examples that they rest on, and a model made from one."""

import json
import shutil
from dataclasses import replace

import pytest
from typer.testing import CliRunner

from compress.layer_scores import withdrawal_kl
from compress.passes.layers import RemoveLayers
from compress.planning import Plan
from compress.recipe import Recipe, compress
from compress.saving import save
from probe import load
from probe.errors import StudyError
from studies import planning
from studies.cli import app
from studies.data import Data, load_data
from studies.planning import _content, evidence_of, set_apart, told
from tests.studies import command


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A run of information-flow and one of implicit-alignment on a few questions."""
    folder = tmp_path_factory.mktemp("runs")
    common = ["--model", "demo", "--data", "demo", "--limit", "6", "--device", "cpu", "--quiet"]
    for study, more in (("information-flow", []), ("implicit-alignment", ["--family", "none", "--words-limit", "1"])):
        result = CliRunner().invoke(app, ["study", study, *common, "--out", str(folder / study), *more])
        assert result.exit_code == 0, result.output
    return folder


def test_runs_are_read_as_evidence(runs):
    subject = load("demo")
    found = evidence_of(subject, [runs / "information-flow", runs / "implicit-alignment"])
    summary = json.loads((runs / "information-flow/summary.json").read_text())
    examples = load_data("demo", 6).examples
    assert summary["n_correct"] == 6  # so that the very same examples are in both
    own = withdrawal_kl(subject, examples).mean(0)
    assert len(found["withdrawal_kl"]) == len(found["drift"]) == len(found["overlap"]) == subject.n_layers
    # information-flow hides the picture from every word, which is what withdrawing it does to them
    assert found["withdrawal_kl"] == pytest.approx(own.tolist(), abs=1e-4)
    assert found["cutoff"]["layer"] == summary["cutoff_layer"]
    assert all(0.5 < value <= 1 for value in found["drift"])
    assert set(found["ima"]) == {"input", "same"}
    assert all(-1 <= one["low"] <= one["value"] <= one["high"] <= 1 for one in found["ima"].values())
    assert all(1 / 3 < value < 1 for value in found["overlap"])
    made = Plan(Recipe((), about="nothing"), (), 0.6, "flops", (), (), found)
    assert f"{found['ima']['same']['value']:.3f} [" in "\n".join(told(made))
    assert "IMA score" not in "\n".join(told(replace(made, evidence={})))


def test_runs_of_other_models_and_studies_are_refused(runs, tmp_path):
    with pytest.raises(StudyError, match="is a run of another model"):
        evidence_of(load("demo:frozen"), [runs / "information-flow"])
    with pytest.raises(StudyError, match="is no finished run"):
        evidence_of(load("demo"), [tmp_path])
    shutil.copytree(runs / "information-flow", tmp_path / "r")
    text = (tmp_path / "r/run.json").read_text().replace('"information-flow"', '"lens"')
    (tmp_path / "r/run.json").write_text(text)
    with pytest.raises(StudyError, match="a plan reads runs of information-flow and implicit-alignment"):
        evidence_of(load("demo"), [tmp_path / "r"])


def test_evidence_comes_from_other_scenes():
    measured = load_data("demo", 64)
    asked, examples, whence = set_apart(measured)
    assert asked is measured
    assert len(examples) == 64
    assert "other scenes" in whence
    seen = {(e.prompt, str(e.tags), str(e.regions)) for e in measured.examples}
    assert sum((e.prompt, str(e.tags), str(e.regions)) in seen for e in examples) == 0
    _, named, whence = set_apart(load_data("demo:text", 3), "demo")
    assert len(named) == 64
    assert whence == "64 examples of demo"


def test_no_question_that_is_measured_gives_evidence(tmp_path):
    demo = load_data("demo", 64)
    _, named, _ = set_apart(demo, "demo")
    assert list(map(_content, named)) == list(map(_content, set_apart(demo)[1]))  # other scenes, whether they are named or not
    path = tmp_path / "mine.jsonl"
    path.write_text("".join(json.dumps({"id": f"q{i}", "prompt": f"is {i} even ?", "answer": "yes"}) + "\n" for i in range(6)))
    mine = load_data(str(path))
    with pytest.raises(StudyError, match="nothing but the questions that are measured"):
        set_apart(mine, str(path))
    _, rest, whence = set_apart(replace(mine, examples=mine.examples[:4]), str(path))
    assert [e.id for e in rest] == ["q4", "q5"]
    assert whence == f"2 examples of {path}"
    shown = replace(
        demo, examples=tuple(replace(e, prompt="what is it ?", answer="x", regions=(), tags={}) for e in demo.examples[:9])
    )
    assert (
        len({_content(e) for e in shown.examples}) == len({repr(e.images[0]) for e in shown.examples}) > 1
    )  # pictures tell them apart
    own = Data("mine.jsonl", demo.examples[:5], "x")
    asked, examples, whence = set_apart(own)
    assert [e.id for e in asked.examples] == [demo.examples[i].id for i in (0, 2, 4)]
    assert [e.id for e in examples] == [demo.examples[i].id for i in (1, 3)]
    assert whence == "2 other examples of mine.jsonl"


def test_a_model_is_made_from_a_plan(runs, stranger, tmp_path, monkeypatch):
    monkeypatch.setattr(planning, "APART", 4)
    asked = ["compress", "--plan", "auto", "--budget", "0.7", "--model", str(stranger), "--limit", "4", "--rounds", "0", "--device", "cpu",
             "--out", str(tmp_path / "m"), "--json", "--quiet"]  # fmt: skip
    found = command.last_line(asked)
    assert {"model", "ledger", "loads_in_transformers", "plan"} <= set(found)
    assert found["measured"]["flops_ratio"] <= 0.7 * 1.02
    assert "nats" in (tmp_path / "m/plan.md").read_text()
    again = command.last_line(["compress", str(tmp_path / "m/recipe.yaml"), "--model", str(stranger), "--limit", "4", "--rounds", "0",
                               "--device", "cpu", "--out", str(tmp_path / "n"), "--json", "--quiet"])  # fmt: skip
    assert again["measured"]["flops"] == found["measured"]["flops"]


@pytest.mark.parametrize(("asked", "message"), [
    (["compress"], "takes a recipe, or --plan auto"),
    (["compress", "examples/half.yaml", "--plan", "auto"], "takes a recipe, or --plan auto"),
    (["compress", "examples/half.yaml", "--run", "x"], "add --plan auto"),
])  # fmt: skip
def test_what_to_do_is_said_once(asked, message):
    result = CliRunner().invoke(app, asked)
    assert result.exit_code == 1
    assert message in result.output


def test_a_compressed_model_is_not_compressed_again(tmp_path):
    smaller = compress(load("demo"), [RemoveLayers(layers=(5,))])
    save(smaller, tmp_path / "m")
    result = CliRunner().invoke(
        app, ["compress", "examples/half.yaml", "--model", str(tmp_path / "m"), "--out", str(tmp_path / "n"), "--limit", "2"]
    )
    assert result.exit_code == 1
    assert "compressed already: put all passes into one recipe for demo" in result.output
    asked = [
        "measure",
        "--model",
        str(tmp_path / "m"),
        "--limit",
        "2",
        "--rounds",
        "0",
        "--out",
        str(tmp_path / "r"),
        "--json",
        "--quiet",
    ]
    found = command.last_line(asked)
    assert found["note"] == "made from demo: name it with --dense to compare the two"
    assert not {"difference", "p", "flops_ratio", "agreement"} & set(found)
    assert "against the dense model" not in (tmp_path / "r/report.md").read_text()
