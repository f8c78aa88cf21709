"""The study of what tracing costs, at toy size, and what the studies of cost share: what they say, not how fast anything is."""

import subprocess
import sys
from io import BytesIO

import pytest
import torch

from compress.latency import ratio
from probe.errors import StudyError
from studies import ratios
from studies.ratios import Goal, Measured, bounds
from studies.speed import RATIOS, streamed
from tests.studies import command


def test_every_ratio_is_measured_with_its_interval(tmp_path):
    sizes = "--layers 2 --width 32 --heads 2 --kv-heads 2 --ffn 64 --vocabulary 600 --image-side 3 --question 4 --rounds 6"
    asked = [
        "study",
        "speed",
        *sizes.split(),
        "--stream",
        "0",
        "--out",
        str(tmp_path / "r"),
        "--device",
        "cpu",
        "--json",
        "--quiet",
    ]
    found = command.last_line(asked)
    assert (found["n"], found["n_naive"]) == (6, 6)
    assert set(found["intervals"]) == set(RATIOS)
    for name, ends in found["intervals"].items():
        assert 0 < ends["low"] <= found[name] <= ends["high"]
    assert found["trace_logits_bitwise"]
    assert found["sweep_max_difference"] < 1e-5
    assert found["sweep_same_answers"] == 1
    assert all((tmp_path / "r/figures" / f"ratios.{kind}").stat().st_size > 10_000 for kind in ("png", "html"))
    report = (tmp_path / "r/report.md").read_text()
    assert "![ratios](figures/ratios.png)" in report
    assert "--model, --data and --limit change nothing" in report


def test_too_few_rounds_have_no_interval():
    assert bounds(ratio([1.0, 2.0, 3.0], [1.0] * 3)) == {"low": None, "high": None}
    assert bounds(ratio([3.0, 1.0, 2.0, 4.0, 6.0, 5.0], [1.0] * 6)) == {"low": 1.0, "high": 6.0}


def test_a_value_keeps_its_goal_or_misses_it_surely_or_not():
    most, least = Goal(1.3), Goal(2.5, most=False, where="in float32")
    assert (str(most), str(least)) == ("at most 1.3", "at least 2.5 in float32")
    cases = [
        (Measured("a", 1.2, 1.1, 1.25, most), ratios.KEPT, True), (Measured("a", 1.2, 1.1, 1.4, most), ratios.KEPT, False),
        (Measured("a", 1.5, 1.2, 1.6, most), ratios.MISSED, False), (Measured("a", 3, 2.6, 4, least), ratios.KEPT, True),
        (Measured("a", 2, goal=least), ratios.MISSED, True), (Measured("a", 2, 1, 3), ratios.OPEN, True),
    ]  # fmt: skip
    assert [(one.colour, one.sure) for one, _, _ in cases] == [(colour, sure) for _, colour, sure in cases]


def test_an_axis_is_logarithmic_where_values_span_a_decade():
    assert not ratios.logarithmic([Measured("a", 1.0), Measured("b", 9.0)])
    assert ratios.logarithmic([Measured("a", 1.0, goal=Goal(20)), Measured("b", 2.0)])
    assert not ratios.logarithmic([Measured("a", 0.0), Measured("b", 200.0)])  # nothing has no place on it


def test_labels_of_the_figure_lie_apart():
    rows = [
        Measured(f"a rather long name of row {i}", 10.0 ** (i - 3), 10.0 ** (i - 4), 10.0 ** (i - 2), Goal(1)) for i in range(8)
    ]
    paper, page = ratios.figure([("one", rows), ("two", rows[:2])], "a note")
    paper.savefig(BytesIO(), dpi=100)
    for axes in paper.axes:
        boxes = [label.get_window_extent() for label in [*axes.get_yticklabels(), *axes.texts]]
        assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
    assert [axis.get_xscale() for axis in paper.axes] == ["log", "log"]
    assert len(page.data) == 4


def test_a_study_that_fails_in_its_own_process_is_named():
    with pytest.raises(StudyError, match="the information-flow study failed with 0 examples"):
        streamed("information-flow", (0,), True)


def test_the_peak_of_a_process_is_its_own():
    """However much the process that starts it has had; and what it has let go of counts."""
    code = (
        "from studies.speed import resident_peak; import psutil; before = psutil.Process().memory_info().rss / 2**20; "
        "x = b'1' * 2**28; del x; print(before, resident_peak())"
    )
    held = torch.ones(2**27)  # half a GiB, which is more than the other process has and is no part of its peak
    done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, check=True)
    before, after = map(float, done.stdout.split())
    assert held.nbytes == 2**29
    assert 256 - 16 < after - before < 256 + 128  # importing may have taken, and given back, half as much again


@pytest.mark.slow
def test_memory_of_a_whole_study_is_that_of_its_own_process():
    assert 100 < streamed("information-flow", (1,), True)[1] < 10_000  # MiB
