"""The study of compression's speed, at toy size: what it says, not how fast it is."""

import pytest
import torch

from compress.passes import METHODS
from studies.compressing import _alone, _held, worded
from studies.speed_model import example, llava_shaped
from tests.studies import command


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("compressing") / "r"
    sizes = "--layers 2 --width 32 --heads 2 --kv-heads 2 --ffn 64 --vocabulary 600 --image-side 4 --question 4 --rounds 2"
    asked = ["study", "compressing", *sizes.split(), "--out", str(folder), "--device", "cpu", "--json", "--quiet"]
    return folder, command.last_line(asked)


def test_every_promise_and_every_reducer_is_measured(found):
    folder, said = found
    assert said["n"] == 2
    assert list(said["promised"]) == ["fastv 0.25 at 1", "divprune 0.25", "without 1 layers", "width 0.5"]
    for name, row in said["promised"].items():
        assert row["kv_exact"]
        assert 0 < row["flops_ratio"] < 1
        assert row["value"] > 0
        assert row["goal"] == 1.15
        assert (row["as_many_positions"] is None) == (name not in ("fastv 0.25 at 1", "divprune 0.25"))
        assert row["as_many_positions"] is None or row["as_many_positions"]["value"] > 0
        assert all(row["intervals"][name] == {"low": None, "high": None} for name in ("time_ratio", "whole_prefill_ratio"))
    assert said["promised"]["without 1 layers"]["flops_ratio"] == pytest.approx(0.5, abs=0.05)
    assert set(said["choosing"]) == set(METHODS)
    assert all(row["value"] > 0 and row["goal"] == 0.05 for row in said["choosing"].values())
    report = (folder / "report.md").read_text()
    assert all(name in report for name in METHODS)
    assert "DIFFER" not in report
    assert "![ratios](figures/ratios.png)" in report
    assert (folder / "figures/ratios.png").is_file()


def test_a_prompt_of_words_is_as_long_as_asked():
    subject = llava_shaped(1, 16, 1, 1, 16, 600, 4, torch.device("cpu"), torch.float32, 0)
    encoded = subject.encode(example(4, 4))
    made = worded(subject, encoded, len(encoded.maps[0]) - 5)
    assert len(made.maps[0]) == len(encoded.maps[0]) - 5
    assert not len(made.maps[0].positions("image"))
    assert set(made.inputs) == {"input_ids", "attention_mask"}


def test_layers_that_read_everything_take_what_the_dense_ones_take():
    """Two layers of four read all: half of 10 and half of 6, over 5."""
    assert _alone([4, 4, 2, 2], 4, [10.0] * 3, [6.0] * 3, [5.0] * 3) == {"value": 1.6, "low": None, "high": None}


def test_a_goal_is_met_missed_or_within_noise():
    ones = [1.0] * 9
    assert _held(ones, ones, 1.15)["verdict"] == "met"
    assert _held([2.0] * 9, ones, 1.15)["verdict"] == "missed"
    assert _held([1.0, 2.0, 1.0, 2.0, 1.0, 2.0, 1.0, 2.0, 1.0], ones, 1.15)["verdict"] == "within noise"
    assert _held(ones[:3], ones[:3], 1.15)["verdict"] == "within noise"  # too few rounds to say
