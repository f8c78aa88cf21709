"""The study of layers passed by, on an untrained demo model of eight layers, with few ways of skipping."""

import json
from dataclasses import replace

import numpy as np
import pytest

from compress.layer_scores import layer_scores
from compress.passes.layers import RemoveLayers
from compress.recipe import compress
from probe import load
from probe.errors import DataError
from studies import layer_skipping as module
from studies.data import Data, apart, load_data
from studies.layer_skipping import layer_skipping, rankings, sizes
from studies.study import Setting
from tests import toys


@pytest.fixture(scope="module")
def few():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "MODES", ("block",))
        patch.setattr(module, "RANDOM", 1)
        patch.setattr(module, "STEPS", 2)
        patch.setattr(module, "RANKED", ("contribution",))
        yield


@pytest.fixture(scope="module")
def subject(stranger):
    """The untrained demo model, its first three layers alone."""
    smaller = compress(load(stranger), [RemoveLayers(layers=(3, 4, 5, 6, 7))])
    return load((smaller.model, smaller.processor))


@pytest.fixture(scope="module")
def run(subject, few, tmp_path_factory):
    folder = tmp_path_factory.mktemp("skipping") / "r"

    def again():
        return layer_skipping(Setting(subject, load_data("demo", 4), folder), calibration=2, rounds=2)

    return folder, json.loads(json.dumps(again())), again


def test_it_says_what_was_asked(run):
    folder, found, _ = run
    assert found["n"] == 4
    assert set(found["alone"]) == {"perceptual", "text", "all"}
    for rows in found["alone"].values():
        assert len(rows["block"]["difference"]["mean"]) == found["n_layers"] == 3
        assert all(value >= 0 for value in rows["block"]["divergence"]["mean"])
    assert set(found["grown"]) == set(found["orders"]) == {"contribution", "interval", "random 1"}
    assert found["sizes"] == [2, 3]
    points = {point["name"]: point for point in found["points"]}
    dense = points["perceptual block none"]
    assert (dense["flops_ratio"], dense["kv_ratio"], dense["divergence"]["value"]) == (1, 1, 0)
    frozen = found["contrast"]["perceptual"]
    assert (
        1
        > frozen["prefill_flops_ratio"][0]
        > frozen["prefill_flops_ratio"][1]
        > found["contrast"]["all"]["prefill_flops_ratio"][1]
    )
    assert frozen["kv_ratio"] == [1, 1]
    assert all(value > 0 for value in frozen["prefill"]["mean"])
    assert "nan" not in (folder / "summary.json").read_text().lower()


def test_a_layer_alone_is_what_its_score_measured(run, subject):
    """Freezing visual tokens in one layer costs the KL that contribution says, the other way round and on other examples: alike in size."""
    _, found, _ = run
    own = layer_scores(subject, load_data("demo", 4).examples, ["contribution"])["contribution"].mean(0)
    measured = np.array(found["alone"]["perceptual"]["block"]["divergence"]["mean"])
    np.testing.assert_allclose(measured, own, atol=0.2 * own.max() + 1e-6)
    assert measured[-1] < 1e-6  # nobody reads visual tokens after the last layer


def test_the_report_answers_the_question(run):
    folder, _, _ = run
    report = (folder / "report.md").read_text()
    assert "*Which layers do visual tokens need, which do words, and does a score tell before one tries?*" in report
    for word in ("visual tokens, whole layer passed by", "Scores** against the KL", "random 1", "decoder FLOPs"):
        assert word in report
    for name in ("alone", "growing", "saving"):
        assert (folder / f"figures/{name}.png").stat().st_size > 10_000
        assert (folder / f"figures/{name}.html").is_file()


def test_asking_again_measures_only_what_is_missing(run):
    folder, _, again = run
    parts = {path: path.read_bytes() for path in (folder / "records").glob("*.parquet")}
    lost = folder / "records" / "part-text-block-2.parquet"
    lost.unlink()
    again()
    assert {path: path.read_bytes() for path in (folder / "records").glob("*.parquet")} == parts


def test_orders_of_layers(monkeypatch):
    monkeypatch.setattr(module, "STEPS", 8)
    orders = rankings({"contribution": [0.3, 0.1, 0.2, 0.1]}, 4, 0)
    assert orders["contribution"] == (1, 3, 2, 0)
    assert orders["interval"] == (1, 3, 0, 2)
    assert all(sorted(order) == [0, 1, 2, 3] for order in orders.values())
    assert sizes(3) == [1, 2, 3]
    assert sizes(32) == [4, 8, 12, 16, 20, 24, 28, 32]


def test_who_ranks_does_not_judge(toy):
    data = load_data("demo", 6)
    judge, rank = apart(data, 3)
    assert judge is data
    assert [e.images for e in rank] != [e.images for e in data.examples[:3]]
    own = Data("mine.jsonl", tuple(toys.pair(toy("llava"))), "x")
    judge, rank = apart(own, 2)
    assert ([e.id for e in judge.examples], [e.id for e in rank]) == (["a"], ["b"])
    with pytest.raises(DataError, match="some to calibrate on and others to ask are needed"):
        apart(replace(own, examples=own.examples[:1]), 2)


def test_a_family_without_visual_rows_is_asked_for_the_rest(toy, tmp_path, few):
    subject = toy("mllama")
    examples = tuple(replace(e, answer="yes") for e in toys.pair(subject))
    setting = Setting(subject, Data("mine.jsonl", examples, "x"), tmp_path / "r", batch=1)
    found = layer_skipping(setting, calibration=1, rounds=0)
    assert found["alone"]["perceptual"] == found["alone"]["text"] == {}
    assert found["agreement"] == {}
    assert any("are not in the sequence" in why for why in found["skipped"].values())
    assert "are not in the sequence" in (tmp_path / "r" / "report.md").read_text()
