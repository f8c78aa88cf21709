"""The command: what it prints, how it fails, and that it starts without torch."""

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from typer.testing import CliRunner

from studies import doctor
from studies.cli import app
from studies.study import STUDIES
from tests import toys

run = CliRunner().invoke


def last_line(result):
    return json.loads(result.stdout.strip().splitlines()[-1])


def test_the_command_starts_without_torch():
    code = "import studies.cli, dashboards, sys; sys.exit(sum(m in sys.modules for m in ('torch', 'transformers', 'streamlit', 'nnsight')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    # and the check can fail
    assert subprocess.run([sys.executable, "-c", "import probe.subject; " + code], check=False).returncode >= 1


def test_a_model_is_checked(stranger):
    found = last_line(run(app, ["models", "--check", str(stranger), "--json"]))
    assert (found["family"], found["model_type"]) == ("LLaVA", "llava")
    assert [check["check"] for check in found["checks"]] == ["identity", "felt", "lens", "seen"]
    assert all(check["held"] for check in found["checks"])
    assert "at most" in next(check["means"] for check in found["checks"] if check["check"] == "lens")
    told = run(app, ["models", "--check", str(stranger)]).stdout
    (felt,) = (line for line in told.splitlines() if " felt " in line)
    assert felt.endswith("the largest change of a logit where a middle layer's output is zeros: must be more than rounding")
    assert "8 layers; takes image" in told
    assert "model.multi_modal_projector" in told


def test_studies_and_models_are_listed_as_json():
    found = last_line(run(app, ["studies", "--json"]))
    assert [row["name"] for row in found] == list(STUDIES)
    assert all(row["question"] for row in found)
    table = last_line(run(app, ["models", "--json"]))
    assert len(table) == 25
    assert set(table[0]) == {"family", "model_type", "capabilities", "passes"}
    for row in table:
        verdicts = [*row["capabilities"].values(), *row["passes"].values()]
        assert all(v == "pass" or v.startswith(("not applicable: ", "refused: ")) for v in verdicts)
    assert sum(bool(row["passes"]) for row in table) == 11
    text = run(app, ["models"]).stdout
    assert "Qwen2.5-VL" in text
    assert "tokens: divprune" in text


def test_trace_says_what_it_saw(stranger, tmp_path):
    toys.picture(70, 100).save(tmp_path / "p.png")
    result = run(app, ["trace", str(stranger), "--image", str(tmp_path / "p.png"), "--prompt", "what color is the circle?", "--out",
                       str(tmp_path / "r"), "--device", "cpu", "--json"])  # fmt: skip
    assert result.exit_code == 0, result.output
    found = last_line(result)
    assert set(found) == {"run", "answer", "n_positions", "segments"}
    assert sum(s["stop"] - s["start"] for s in found["segments"]) == found["n_positions"] == 78
    assert [s["segment"] for s in found["segments"]] == ["bos", "system", "image", "question", "header"]
    for name in ("tokens", "attention", "mass", "lens"):
        assert (tmp_path / "r/figures" / f"{name}.png").stat().st_size > 3000
    assert "what color is the circle?" in (tmp_path / "r/report.md").read_text()


def test_study_runs_from_the_shell(stranger, tmp_path):
    result = run(app, ["study", "information-flow", "--model", str(stranger), "--limit", "2", "--out", str(tmp_path / "r"), "--quiet", "--json",
                       "--device", "cpu", "--flows", "image->last", "--window-width", "2", "--no-only-correct"])  # fmt: skip
    assert result.exit_code == 0, result.output
    found = last_line(result)
    assert found["window"] == 2
    assert list(found["flows"]) == ["image->last"]


FAILING = {
    "unknown study": (
        ["study", "information-flw"],
        1,
        "there is no study 'information-flw' (did you mean 'information-flow'?)",
    ),
    "unknown option": (
        ["study", "information-flow", "--windw-width", "3"],
        2,
        "there is no option '--windw-width' (did you mean '--window-width'?)",
    ),
    "unknown data": (["study", "information-flow", "--data", "dmo"], 1, "there is no data set 'dmo'"),
    "no limit": (["study", "information-flow", "--limit", "0"], 1, "a limit of 0 leaves no examples"),
    "unknown model": (["study", "information-flow", "--model", "/nowhere"], 1, "there is no model folder at /nowhere"),
    "unknown dtype": (["trace", "demo", "--prompt", "x", "--dtype", "int3"], 1, "there is no dtype 'int3': name float32"),
    "a slip in demo": (["trace", "dmeo", "--prompt", "x"], 1, "there is no model 'dmeo' (did you mean 'demo'?)"),
    "a slip in demo:NAME": (
        ["trace", "demmo:frozen", "--prompt", "x"],
        1,
        "there is no model 'demmo:frozen' (did you mean 'demo:frozen'?)",
    ),
    "unknown command": (["studdy"], 2, "No such command 'studdy'"),
}


@pytest.mark.parametrize("case", FAILING)
def test_errors_are_one_sentence_and_an_exit_code(case):
    arguments, code, message = FAILING[case]
    result = run(app, arguments)
    assert result.exit_code == code, result.output
    assert message in " ".join(result.output.split())
    assert "Traceback" not in result.output


def test_there_were_nine_failures():
    assert len(FAILING) == 9


PICTURES = {
    "empty": (b"", "p.png is empty: a picture was expected"),
    "no picture": (b"these are words", "p.png is not a picture that Pillow can read"),
    "cut off": (None, "p.png is damaged or truncated: image file is truncated"),
}


@pytest.mark.parametrize("case", PICTURES)
def test_a_broken_picture_is_one_sentence(stranger, tmp_path, case):
    content, message = PICTURES[case]
    path = tmp_path / "p.png"
    toys.picture(60, 60).save(path)
    path.write_bytes(path.read_bytes()[:-400] if content is None else content)
    asked = [
        "trace",
        str(stranger),
        "--image",
        str(path),
        "--prompt",
        "what ?",
        "--out",
        str(tmp_path / "r"),
        "--device",
        "cpu",
    ]
    result = run(app, asked)
    assert result.exit_code == 1
    assert message in " ".join(result.output.split())
    assert "Traceback" not in result.output
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("", "has an empty prompt: it needs a question"),
        ("<image> and <image>", "has 2 places for pictures (<image>) but 1 picture(s) came with it"),
    ],
)
def test_a_bad_prompt_writes_nothing(stranger, tmp_path, prompt, message):
    toys.picture().save(tmp_path / "p.png")
    result = run(
        app,
        [
            "trace",
            str(stranger),
            "--image",
            str(tmp_path / "p.png"),
            "--prompt",
            prompt,
            "--out",
            str(tmp_path / "r"),
            "--device",
            "cpu",
        ],
    )
    assert result.exit_code == 1
    assert message in result.output
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize(
    ("name", "own", "other"), [("lens", "--text-layer", "--ig-steps"), ("patching", "--ig-steps", "--text-layer")]
)
def test_a_study_helps_with_its_own_options(name, own, other):
    result = run(app, ["study", name, "--help"])
    assert result.exit_code == 0, result.output
    assert STUDIES[name][1] in result.stdout
    assert own in result.stdout
    assert other not in result.stdout
    assert "default: " in result.stdout
    assert "sightline study --help" in " ".join(result.stdout.split())


def test_the_options_of_every_study_are_shown_without_a_name():
    result = run(app, ["study", "--help"])
    assert result.exit_code == 0, result.output
    assert "--padding" in result.stdout


def test_debug_shows_the_traceback(tmp_path):
    result = run(app, ["trace", "/nowhere", "--prompt", "x", "--debug"])
    assert result.exit_code == 1
    assert "Traceback" in result.output


def test_doctor_answers():
    found = last_line(run(app, ["doctor", "--json"]))
    assert found["torch"]
    assert found["tracing"].startswith(
        ("a traced forward pass gives the plain one's logits, bit for bit", "failed: there is no demo model")
    )


def test_doctor_names_extras_that_there_are():
    extras = set(tomllib.loads(Path("pyproject.toml").read_text())["project"]["optional-dependencies"])
    named = {name for text in doctor._EXTRAS.values() for name in re.findall(r"sightline\[(\w+)\]", text)}
    assert named
    assert named <= extras
