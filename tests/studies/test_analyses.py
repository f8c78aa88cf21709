"""The study of what the analyses cost, at toy size: what it says, not how fast it is."""

import torch

from probe.tracing import last_logits
from studies.analyses import GOALS, STREAMED, by_matrices
from studies.speed_model import alike, example, llava_shaped
from tests.oracles.relevance import by_the_rules
from tests.studies import command


def test_every_analysis_is_measured(tmp_path):
    sizes = "--layers 2 --width 32 --heads 2 --kv-heads 2 --ffn 64 --vocabulary 600 --image-side 3 --question 4 --rounds 6 --stream 0"
    asked = ["study", "analyses", *sizes.split(), "--out", str(tmp_path / "r"), "--device", "cpu", "--json", "--quiet"]
    found = command.last_line(asked)
    assert found["n"] == 6
    assert set(GOALS) - {STREAMED} < set(found)
    timed = {
        "alignment_over_forwards",
        "pairs_speedup",
        "likelihood_over_one_by_one",
        "wanda_over_forwards",
        "wanda_rerun_over_forwards",
    }
    assert set(found["intervals"]) == timed
    assert all(0 < ends["low"] <= found[name] <= ends["high"] for name, ends in found["intervals"].items())
    assert list(found["alignment_parts"]) == ["anchors", "alignment", "alignment with words"]
    assert found["alignment_over_forwards"] > 0
    assert found["pairs_speedup"] > 1
    assert found["pairs_difference"] < 1e-6
    assert found["gradient_difference"] < 1e-5
    assert 0 < found["gradient_memory_over_matrices"] < 1
    assert all(text in (tmp_path / "r/report.md").read_text() for key, (text, _) in GOALS.items() if key != STREAMED)
    assert (tmp_path / "r/figures/ratios.png").is_file()


def test_examples_that_are_read_differ_and_are_as_long():
    made = alike(image_side=3, question=4, count=5, name="read", seed=0)
    assert len({e.id for e in made}) == len({e.prompt for e in made}) == len({e.images[0].tobytes() for e in made}) == 5
    subject = llava_shaped(2, 32, 2, 2, 64, 600, 3, torch.device("cpu"), torch.float32, 0)
    assert {len(subject.encode(one).maps[0]) for one in [*made, example(3, 4)]} == {len(subject.encode(made).maps[0])}


def test_the_published_way_leaves_the_model_as_it_was():
    subject = llava_shaped(2, 32, 2, 2, 64, 600, 3, torch.device("cpu"), torch.float32, 0)
    encoded = subject.encode(example(3, 4))
    before = [w.requires_grad for w in subject.model.parameters()], subject.decoder.config._attn_implementation
    row = by_matrices(subject, encoded)
    assert ([w.requires_grad for w in subject.model.parameters()], subject.decoder.config._attn_implementation) == before
    targets = last_logits(subject, encoded).argmax(-1)
    torch.testing.assert_close(row, by_the_rules(subject, encoded, targets)["gradient-attention"], rtol=1e-4, atol=1e-6)
