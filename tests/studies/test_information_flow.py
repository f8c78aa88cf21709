"""The study: resumes to the same bytes, skips what is broken, says what it measured."""

import json
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from probe import Example, Knockout, Region, load, trace
from probe.analysis.flow import FLOWS
from probe.errors import DataError, EditError, RunError
from probe.plots.flow import _depth
from probe.tracing import last_logits
from studies.data import Data, load_data
from studies.information_flow import information_flow
from studies.study import STUDIES, Setting, find_study, units
from tests.studies import command

KEYS = [
    "run",
    "n",
    "baseline_accuracy",
    "no_image_accuracy",
    "hidden_image_accuracy",
    "empty_knockout_max_change",
    "cutoff_layer",
    "flows",
]


@pytest.fixture(scope="module")
def subject(stranger):
    return load(stranger, device="cpu")


@pytest.fixture(scope="module")
def done(subject, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "flow"
    summary = information_flow(Setting(subject, load_data("demo", 12), out, batch=5), only_correct=False)
    return out, summary


def test_the_summary_has_what_other_programs_read(done):
    out, summary = done
    assert set(KEYS) <= set(summary)
    assert summary["n"] == 12
    assert list(summary["flows"]) == list(FLOWS)
    for flow in summary["flows"].values():
        assert len(flow["layers"]) == len(flow["mean"]) == len(flow["low"]) == len(flow["high"]) == len(flow["mass"]) == 8
        assert all(low <= mean <= high for low, mean, high in zip(flow["low"], flow["mean"], flow["high"], strict=True))
        assert all(0 <= mass <= 1 for mass in flow["mass"])
        assert flow["mass_interval"]["mean"] == pytest.approx(flow["mass"])
        tests = flow["correlation_tests"]
        known = [i for i, value in enumerate(flow["correlation"]) if value is not None]
        assert len(known) >= 4
        for i in known:
            assert tests["low"][i] <= flow["correlation"][i] + 1e-9
            assert flow["correlation"][i] <= tests["high"][i] + 1e-9
            assert 0 < tests["p"][i] <= tests["q"][i] <= 1
    assert json.loads((out / "summary.json").read_text())["n"] == 12
    assert summary["empty_knockout_max_change"] <= 1e-5
    assert json.loads((out / "run.json").read_text())["status"] == "done"


def test_the_records_are_what_single_traces_give(done, subject):
    import pyarrow.parquet as pq

    out, _ = done
    table = pq.read_table(out / "records").to_pandas()
    example = load_data("demo", 12).examples[3]
    encoded = subject.encode(example)
    clean = last_logits(subject, encoded)[0]
    token = int(clean.argmax())
    for row in table[
        (table.example == example.id) & (table.what == "flow") & table.flow.isin(["image->question", "question->last"])
    ].itertuples():
        rows, columns = FLOWS[row.flow]
        edited = trace(subject, encoded, edit=[Knockout(rows, columns, range(int(row.start), int(row.stop)))]).logits[0]
        before, after = clean.double().softmax(-1)[token].item(), edited.double().softmax(-1)[token].item()
        assert row.p_before == pytest.approx(before, abs=1e-6)
        assert row.relative == pytest.approx(100 * (after - before) / before, abs=1e-2)
    hidden = table[(table.example == example.id) & (table.what == "hidden")].iloc[0]
    edited = trace(subject, encoded, edit=[Knockout("text", "image")]).logits[0]
    assert hidden.logit == pytest.approx((edited - clean)[token].item(), abs=1e-4)


def test_figures_and_report_are_there(done):
    out, _ = done
    report = (out / "report.md").read_text()
    for name in ("information-flow", "soft-and-causal", "answer-by-layer"):
        assert (out / "figures" / f"{name}.png").stat().st_size > 10_000
        page = (out / "figures" / f"{name}.html").read_text()
        assert "<script src=" not in page  # works without a network
        assert f"figures/{name}.png" in report


def test_the_cut_off_says_what_it_tolerates_and_whether_it_may_never_come(done):
    assert _depth(7, 7, 8, 8, 2.0) == "changes p by at most\n2 % on average\nfrom layer 7 on [7, never]"
    assert _depth(5, 4, 6, 8, 2.0).endswith("from layer 5 on [4, 6]")
    assert _depth(8, 7, 8, 8, 2.0).endswith("never [7, never]")
    report = (done[0] / "report.md").read_text()
    assert "| flow | layer | rank correlation | 95 % interval | q | layers with q < 0.05 |" in report
    assert "mislead" not in report


def test_five_kills_leave_the_same_bytes(stranger, tmp_path):
    def start(out):
        asked = ["study", "information-flow", "--model", str(stranger), "--data", "demo", "--limit", "12", "--batch", "2", "--flows", "image->last",
                 "--no-only-correct", "--out", str(out), "--quiet", "--json", "--device", "cpu"]  # fmt: skip
        return command.start(asked, tmp_path / "said.json")

    def finish(out):
        process = start(out)
        process.join()
        assert process.exitcode == 0
        return json.loads((tmp_path / "said.json").read_text())

    calm, killed = tmp_path / "calm", tmp_path / "killed"
    finish(calm)
    kills = 0
    for wanted in (0, 1, 2, 3, 4):
        process = start(killed)
        while process.is_alive() and len(list(killed.glob("records/*.parquet"))) < wanted:
            time.sleep(0.01)
        time.sleep(0.03 * wanted)
        process.kill()
        process.join()
        kills += process.exitcode == -signal.SIGKILL
    last = finish(killed)
    assert kills == 5
    parts = sorted(path.name for path in (calm / "records").iterdir())
    assert len(parts) == 6
    assert parts == sorted(path.name for path in (killed / "records").iterdir())
    for part in parts:
        assert (calm / "records" / part).read_bytes() == (killed / "records" / part).read_bytes()
    a, b = (json.loads((folder / "summary.json").read_text()) for folder in (calm, killed))
    assert {**a, "run": ""} == {**b, "run": ""}
    assert last["n"] == 12


def test_a_finished_run_is_not_done_again(done, subject, monkeypatch):
    out, before = done
    monkeypatch.setattr("studies.information_flow.unit", lambda *a: pytest.fail("a finished unit was done again"))
    again = information_flow(Setting(subject, load_data("demo", 12), out, batch=5), only_correct=False)
    assert again == before


def test_another_configuration_is_refused(done, subject):
    out, _ = done
    with pytest.raises(RunError, match=r"norm: .final. before, .none. now"):
        information_flow(Setting(subject, load_data("demo", 12), out, batch=5), only_correct=False, norm="none")


def test_one_bad_example_is_counted_and_skipped(subject, tmp_path):
    good = load_data("demo", 2).examples
    (tmp_path / "bad.png").write_text("no picture")
    bad = Example("bad", "color of circle", (tmp_path / "bad.png",), answer="red")
    nothing = Example("blind", "color of circle", answer="red")
    data = Data("mixed", (*good, bad, nothing), "1")
    summary = information_flow(Setting(subject, data, tmp_path / "r"), only_correct=False, flows="image->last")
    assert summary["n"] == 2
    assert summary["n_skipped"] == 2
    assert any("bad.png is not a picture" in line for line in summary["skipped"])
    assert list(summary["flows"]) == ["image->last"]
    assert "2 examples could not be used" in (tmp_path / "r/report.md").read_text()


def test_a_data_set_of_bad_examples_is_one_sentence(subject, tmp_path):
    data = Data("bad", (Example("blind", "color of circle", answer="red"),), "1")
    with pytest.raises(DataError, match=r"none of the 1 examples could be used; the first: example 'blind' has no picture"):
        information_flow(Setting(subject, data, tmp_path / "r"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"flows": "image->lst"}, "there is no flow 'image->lst'"),
        ({"window_width": 0}, "a window has 1 to 8 layers on this model, not 0"),
        ({"window_width": 9}, "a window has 1 to 8 layers on this model, not 9"),
    ],
)
def test_wrong_options_write_nothing(subject, tmp_path, options, message):
    with pytest.raises(EditError, match=message):
        information_flow(Setting(subject, load_data("demo", 2), tmp_path / "r"), **options)
    assert not (tmp_path / "r").exists()


def test_examples_without_boxes_have_no_patch_flows(subject, tmp_path):
    from dataclasses import replace

    plain = tuple(replace(e, regions=()) for e in load_data("demo", 3).examples)
    summary = information_flow(Setting(subject, Data("plain", plain, "1"), tmp_path / "r"), only_correct=False)
    assert "related->question" not in summary["flows"]
    assert "image->question" in summary["flows"]


@pytest.mark.slow
def test_the_naive_method_gives_the_same_numbers(done, subject, tmp_path):
    _, fast = done
    slow = information_flow(
        Setting(subject, load_data("demo", 12), tmp_path / "r", batch=5), only_correct=False, method="naive"
    )
    for name in FLOWS:
        np.testing.assert_allclose(fast["flows"][name]["mean"], slow["flows"][name]["mean"], atol=1e-2)


def test_padding_on_the_right_gives_the_same_numbers(done, subject, tmp_path):
    right = information_flow(
        Setting(subject, load_data("demo", 12), tmp_path / "right", batch=5, padding="right"), only_correct=False
    )
    assert json.loads((tmp_path / "right/run.json").read_text())["config"]["padding"] == "right"
    for name, flow in done[1]["flows"].items():
        np.testing.assert_allclose(right["flows"][name]["mean"], flow["mean"], atol=2e-3)
        np.testing.assert_allclose(right["flows"][name]["mass"], flow["mass"], atol=1e-5)


@pytest.mark.slow
def test_on_the_demo_hiding_the_picture_is_having_none(tmp_path):
    """What the figure rests on: the model knows the answers, without its picture it guesses, and nothing cut is nothing changed."""
    data = load_data("demo", 128)
    found = information_flow(Setting(load("demo", device="cpu"), data, tmp_path / "r", batch=32), flows="image->last")
    assert found["baseline_accuracy"] >= 0.95
    assert abs(found["hidden_image_accuracy"] - found["no_image_accuracy"]) <= 0.05
    assert found["empty_knockout_max_change"] <= 1e-5
    assert 0 < found["cutoff_layer"] <= 8


def test_every_study_is_found_and_asks_its_question():
    assert {page.stem for page in (Path(__file__).parents[2] / "docs/studies").glob("*.md")} == set(STUDIES)
    for name, (_, question) in STUDIES.items():
        assert find_study(name).__doc__.startswith(question)
        assert question.endswith("?")


def test_units_cover_everything_once():
    made = units(10, 4)
    assert [key for key, _ in made] == ["000000-000004", "000004-000008", "000008-000010"]
    assert [i for _, items in made for i in items] == list(range(10))


def test_boxes_become_related_patches(subject):
    from studies.information_flow import _grouped

    example = load_data("demo", 1).examples[0]
    encoded = _grouped(subject.encode(example), 0)
    groups = encoded.maps[0].groups
    image = set(encoded.maps[0].positions("image").tolist())
    assert set(groups["related"]) | set(groups["other"]) == image
    assert not set(groups["related"]) & set(groups["other"])
    assert len(groups["random"]) == len(groups["related"])
    assert not set(groups["random"]) & set(groups["related"])
    assert isinstance(example.regions[0], Region)
    assert torch.is_tensor(encoded.last)
