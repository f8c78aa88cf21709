"""The study on families of different make: cross-attention, DeepStack, a prefix that looks ahead, sound."""

from dataclasses import replace

import numpy as np
import pytest

from probe import Region, load
from probe.errors import ReplayError
from studies.data import Data, load_data
from studies.information_flow import information_flow
from studies.study import Setting
from tests import toys


def asked(subject):
    made = [replace(example, answer="yes", choices=("yes", "no")) for example in toys.pair(subject)]
    if "image" in subject.marks:
        made = [replace(example, regions=(Region((5.0, 5.0, 20.0, 20.0)),)) for example in made]
    return Data("pair", tuple(made), "1")


@pytest.mark.parametrize("family", ["mllama", "qwen3_vl", pytest.param("qwen2_audio", marks=pytest.mark.slow)])
def test_replay_gives_what_the_naive_loop_gives(toy, tmp_path, family):
    subject = toy(family)
    fast, slow = (
        information_flow(Setting(subject, asked(subject), tmp_path / method, batch=2), only_correct=False, method=method)
        for method in ("replay", "naive")
    )
    assert fast["n"] == 2
    assert fast["empty_knockout_max_change"] <= 1e-5
    sees = family != "qwen2_audio"
    wanted = {"image->question", "image->last", "question->last", "last->last"}
    assert set(fast["flows"]) == wanted | ({"related->question", "other->question"} if sees else set())
    for name, flow in fast["flows"].items():
        np.testing.assert_allclose(flow["mean"], slow["flows"][name]["mean"], atol=2e-2, err_msg=name)
        assert max(map(abs, flow["mean"])) > 1e-3, name
    assert fast["cutoff_layer"] == slow["cutoff_layer"]


def test_a_crossed_picture_is_counted_in_keys(toy, tmp_path):
    """Mllama: the mark in the sequence and the keys of the tiles that the picture fills; related and other share them."""
    subject = toy("mllama")
    data = asked(subject)
    summary = information_flow(Setting(subject, data, tmp_path / "r", batch=2), only_correct=False)
    keys = [token_map.crossed for token_map in subject.encode(list(data.examples)).maps]
    filled = [len(k) - k.segments.count("pad") for k in keys]
    assert summary["flows"]["image->question"]["columns"] == np.mean(filled) + 1
    parts = summary["flows"]["related->question"]["columns"] + summary["flows"]["other->question"]["columns"]
    assert parts == np.mean([len(k.positions("image")) for k in keys])


def test_a_prefix_that_looks_ahead_is_refused_by_replay_and_run_naively(toy, tmp_path):
    subject = toy("paligemma")
    with pytest.raises(ReplayError, match=r"lets positions look ahead .a bidirectional prefix.*method=\"naive\""):
        information_flow(Setting(subject, asked(subject), tmp_path / "a", batch=2), only_correct=False)
    summary = information_flow(Setting(subject, asked(subject), tmp_path / "b", batch=2), only_correct=False, method="naive")
    assert summary["empty_knockout_max_change"] <= 1e-5
    assert min(summary["flows"]["image->question"]["mean"] + summary["flows"]["image->last"]["mean"]) < 0


def test_sounds_are_read_from_a_jsonl(toy, tmp_path):
    import soundfile

    for i in range(2):
        samples, rate = toys.sound(0.5, 22_050, seed=i)
        soundfile.write(tmp_path / f"{i}.wav", samples, rate)
    lines = [f'{{"id": "{i}", "prompt": "is there a dog ?", "sounds": ["{i}.wav"], "answer": "yes"}}' for i in range(2)]
    (tmp_path / "data.jsonl").write_text("\n".join(lines))
    data = load_data(str(tmp_path / "data.jsonl"))
    encoded = load((toy("qwen2_audio").model, toy("qwen2_audio").processor)).encode(list(data.examples))
    assert encoded.notes == tuple(f"sound 0 of example '{i}' was resampled from 22050 to 16000 Hz" for i in range(2))
    assert all(len(token_map.positions("audio")) == 12 for token_map in encoded.maps)


def test_a_model_that_always_wants_a_picture_has_no_blind_baseline(toy, tmp_path):
    subject = toy("blip2")
    data = Data("pair", tuple(replace(e, regions=()) for e in asked(subject).examples), "1")
    summary = information_flow(Setting(subject, data, tmp_path / "r", batch=2), only_correct=False)
    assert summary["no_image_accuracy"] is None
    assert "without the picture" not in (tmp_path / "r" / "report.md").read_text()
