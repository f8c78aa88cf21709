"""The study of what the analyses cost, at toy size: what it says, not how fast it is."""

from studies.analyses import GOALS
from tests.studies import command


def test_every_analysis_is_measured(tmp_path):
    sizes = "--layers 2 --width 32 --heads 2 --kv-heads 2 --ffn 64 --vocabulary 600 --image-side 3 --question 4 --rounds 1"
    asked = ["study", "analyses", *sizes.split(), "--out", str(tmp_path / "r"), "--device", "cpu", "--json", "--quiet"]
    found = command.last_line(asked)
    assert set(GOALS) < set(found)
    assert found["alignment_over_forwards"] > 0
    assert found["pairs_speedup"] > 1
    assert found["pairs_difference"] < 1e-6
    assert all(text in (tmp_path / "r/report.md").read_text() for text, _ in GOALS.values())
