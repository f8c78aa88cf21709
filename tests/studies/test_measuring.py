"""`sightline compress`, `measure` and `search` on an untrained demo model: what they write, say and refuse."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
import yaml
from typer.testing import CliRunner

from probe import load
from studies.bench import KEYS, Bench, Configuration
from studies.cli import app
from studies.data import Data, load_data
from tests.studies import command

run = CliRunner().invoke
RECIPE = "name: less\npasses:\n- remove-layers: {layers: [4]}\n- tokens: {method: pooling, budget: {keep: 16}}\n"
SPACE = "passes:\n- tokens: {method: {choices: [pooling, uniform]}, budget: {keep: {choices: [16, 3000]}}}\n"
FEW = ["--limit", "4", "--rounds", "0", "--tokens", "2", "--device", "cpu", "--quiet", "--json"]


@pytest.fixture(scope="module")
def made(stranger, tmp_path_factory):
    """A compressed model as the command writes it, and what the command said."""
    folder = tmp_path_factory.mktemp("made")
    (folder / "less.yaml").write_text(RECIPE)
    asked = ["compress", str(folder / "less.yaml"), "--model", str(stranger), "--out", str(folder / "m"), *FEW]
    return folder / "m", command.last_line(asked), asked


def test_compress_says_what_it_made(made):
    folder, found, _ = made
    assert (found["model"], found["ledger"]) == (str(folder), str(folder / "sightline.json"))
    assert found["loads_in_transformers"] == "yes, without tokens"
    assert found["measured"]["flops_ratio"] < 1
    assert found["measured"]["prefill_ms"] is None
    card = (folder / "README.md").read_text()
    assert "FLOPs of reading a prompt" in card
    assert "of 4 questions of demo" in card
    assert f"parameters: {found['measured']['parameters']:,}" in card


def test_half_of_the_demo_is_measured_in_a_fresh_process_and_loads_in_plain_transformers(tmp_path):
    few = ["--limit", "8", "--rounds", "0", "--tokens", "2", "--device", "cpu", "--quiet", "--json"]
    made = command.last_line(["compress", "examples/half.yaml", "--model", "demo", "--out", str(tmp_path / "m"), *few])
    asked = [
        sys.executable,
        "-m",
        "studies.cli",
        "measure",
        "--model",
        str(tmp_path / "m"),
        "--data",
        "demo",
        "--out",
        str(tmp_path / "r"),
        *few,
    ]
    told = subprocess.run(asked, capture_output=True, text=True, check=True).stdout
    found = json.loads(told.strip().splitlines()[-1])
    assert set(KEYS) <= set(found)
    for key in ("accuracy", "flops", "kv_bytes", "parameters"):
        assert found[key] == made["measured"][key]
    assert made["loads_in_transformers"] == "yes, without tokens"
    code = "import sys; from transformers import AutoModelForImageTextToText as M; m = M.from_pretrained(sys.argv[1]); print(len(m.model.language_model.layers), sum(p.numel() for p in m.parameters()))"
    plain = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "m")], capture_output=True, text=True, check=True
    ).stdout.split()
    assert plain == ["7", str(found["parameters"])]


def test_the_schema_of_recipes_is_printed():
    said = run(app, ["compress", "--schema"])
    assert said.exit_code == 0
    assert "passes" in json.loads(said.stdout)["properties"]


def test_a_compressed_folder_opens_with_its_ledger(made, stranger, tmp_path):
    folder = made[0]
    asked = ["measure", "--model", str(folder), "--dense", str(stranger), "--out", str(tmp_path / "r"), *FEW]
    found = command.last_line(asked)
    assert set(KEYS) <= set(found)
    assert found["flops"] == made[1]["measured"]["flops"]
    assert found["kv_bytes"] == made[1]["measured"]["kv_bytes"]
    assert [next(iter(step)) for step in json.loads(found["recipe"])] == ["remove-layers", "tokens"]
    assert found["kv_ratio"] < 7 / 8  # tokens are dropped in this process too, not layers alone
    assert found["agreement"]["n"] == 4
    assert found["text_only"]["what"] == "text twins"
    assert (tmp_path / "r/figures/frontier.png").stat().st_size > 3000
    assert command.last_line(asked) == found  # asked again, nothing is measured again
    assert "Which items changed" in (tmp_path / "r/report.md").read_text()


def test_a_model_by_itself_is_beside_nothing(stranger, tmp_path):
    found = command.last_line(["measure", "--model", str(stranger), "--out", str(tmp_path / "r"), *FEW])
    assert (found["verdict"], found["on_frontier"], found["baseline"]) == (None, None, "")
    assert 0 <= found["accuracy_low"] <= found["accuracy"] <= found["accuracy_high"] <= 1
    assert found["peak_memory"] > found["memory"]["weights"] > 0
    assert set(found["accuracy_by_kind"]) == {"color", "thing", "count", "exist"}


def test_times_come_with_verdicts(made, stranger, tmp_path):
    few = [part if part != "0" else "6" for part in FEW]
    found = command.last_line(
        ["measure", "--model", str(made[0]), "--dense", str(stranger), "--out", str(tmp_path / "r"), *few]
    )
    assert found["verdict"] in ("faster", "slower", "no evidence")
    assert {phase: spread["n"] for phase, spread in found["phases"].items()} == dict.fromkeys(
        ("vision", "selector", "prefill", "decode", "answer"), 6
    )
    assert found["prefill_ms"] == found["phases"]["prefill"]["median"] > 0
    assert 0 < found["amdahl"]["prefill_share"] < 1 < found["amdahl"]["bound"]
    low, high = (found["ratios"]["answer"][end] for end in ("low", "high"))
    assert low <= found["ratios"]["answer"]["value"] <= high


@pytest.fixture(scope="module")
def searched(stranger, tmp_path_factory):
    folder = tmp_path_factory.mktemp("searched")
    (folder / "space.yaml").write_text(SPACE)
    asked = ["search", str(folder / "space.yaml"), "--model", str(stranger), "--out", str(folder / "r"), "--trials", "5", *FEW]
    return folder, command.last_line(asked), asked


def test_search_finds_a_frontier_beside_the_baselines(searched):
    folder, found, _ = searched
    assert found["trials"] == 5
    points = found["points"]
    assert {point["baseline"] for point in points} == {"full", "random", "pooling", "down-sampling", ""}
    assert all(set(KEYS) <= set(point) for point in points)
    assert {point["name"] for point in points if point["on_frontier"]} == set(found["frontier"])
    assert any("3000 tokens cannot be kept" in why for why in found["refused"].values())
    assert (folder / "r/figures/frontier.html").is_file()
    assert (folder / "r/search.db").is_file()


def test_a_search_goes_on_where_it_stopped(searched, tmp_path):
    folder, found, asked = searched
    shutil.copytree(folder / "r", tmp_path / "r")
    parts = sorted(path.name for path in (tmp_path / "r/records").glob("*.parquet"))
    more = [{"5": "7", str(folder / "r"): str(tmp_path / "r")}.get(part, part) for part in asked]
    again = command.last_line(more)
    assert again["trials"] == 7
    assert [p for p in again["points"] if p["name"] in {q["name"] for q in found["points"]}] != []
    assert set(parts) <= {path.name for path in (tmp_path / "r/records").glob("*.parquet")}


def test_a_search_gathers_what_its_passes_ask_for(stranger, tmp_path):
    space = tmp_path / "space.yaml"
    space.write_text("passes:\n- width: {score: {choices: [magnitude, flap]}, neurons: 0.5}\n")
    found = command.last_line(
        ["search", str(space), "--model", str(stranger), "--out", str(tmp_path / "r"), "--trials", "4", *FEW]
    )
    assert found["refused"] == {}
    scores = {
        yaml.safe_load(point["recipe"])[0]["width"].get("score", "flap")
        for point in found["points"]
        if "width" in point["recipe"]
    }
    assert "flap" in scores
    assert json.loads((tmp_path / "r/run.json").read_text())["config"]["evidence"] == "64 other scenes of demo"


def test_what_is_refused(stranger, tmp_path):
    good, bad = tmp_path / "good.yaml", tmp_path / "bad.yaml"
    good.write_text(RECIPE)
    bad.write_text(RECIPE.replace("pooling", "pulling"))
    (tmp_path / "full").mkdir()
    (tmp_path / "full/mine.txt").write_text("mine")
    space = tmp_path / "space.yaml"
    space.write_text(SPACE)
    cases = [
        (["compress", tmp_path / "none.yaml", "--model", stranger], "cannot be read"),
        (["compress", bad, "--model", stranger, "--limit", "2"], "there is no token reducer 'pulling' (did you mean 'pooling'?)"),
        (["compress", good, "--model", stranger, "--limit", "2", "--out", tmp_path / "full"], "holds other things (mine.txt)"),
        (["search", good, "--model", stranger], "no value is free"),
        (["search", space, "--model", stranger, "--cost", "prefill", "--rounds", "0"], "--rounds must be at least 1"),
        (["measure", "--model", tmp_path / "nowhere"], "there is no model folder"),
    ]  # fmt: skip
    for arguments, message in cases:
        result = run(app, [*map(str, arguments), "--device", "cpu", "--quiet"])
        assert result.exit_code == 1, result.output
        assert message in " ".join(result.output.split())
        assert "Traceback" not in result.output
    assert len(cases) == 6
    assert run(app, ["search", str(space), "--cost", "beauty"]).exit_code == 2


def test_the_examples_of_the_documentation_are_recipes():
    from pathlib import Path

    from compress.recipe import read
    from compress.search import read_space

    folder = Path(__file__).parent.parent.parent
    recipe, space = folder / "examples/half.yaml", folder / "examples/space.yaml"
    assert [one.title for one in read(recipe).passes] == ["remove-layers", "tokens"]
    assert len(read_space(space).free) == 3
    for page, file in (("recipes.md", recipe), ("search.md", space)):
        assert file.read_text() in (folder / "docs/compress" / page).read_text()
    assert yaml.safe_load(recipe.read_text())["name"] == "half"


def test_people_answers_are_scored_as_vqa_does():
    """Three of ten agree with what is said: wholly right three times out of ten left-one-outs, by two thirds in the others."""
    subject = load("demo")
    one = load_data("demo", 1).examples[0]
    people = [one.answer] * 3 + ["nonsense"] * 7
    asked = replace(one, tags={**one.tags, "answers": json.dumps(people)})
    bench = Bench(subject, Data("people", (asked, replace(asked, id="again")), "f"), 2, 0, 2)
    assert bench.answers.right.all()  # so that what is said is the three people's answer
    with bench.opened(Configuration("dense")) as dense:
        point = json.loads(bench.measure_model(Configuration("dense"), dense)[-1]["text"])
    assert point["open"]["metric"] == "VQA accuracy"
    assert point["open"]["value"] == pytest.approx((3 * 2 / 3 + 7) / 10)
    assert point["open"]["difference"]["value"] == 0
    plain = Bench(subject, Data("nobody", (one,), "f"), 2, 0, 2)
    with plain.opened(Configuration("dense")) as dense:
        assert json.loads(plain.measure_model(Configuration("dense"), dense)[-1]["text"])["open"] is None
    broken = Bench(subject, Data("bad", (replace(one, id="bad", tags={"answers": "["}), one), "f"), 2, 0, 2)
    assert list(broken.sifted[1]) == ["bad"]
    assert "is no JSON list" in broken.sifted[1]["bad"]
