"""The routing study: experts of a mixture, neurons of a dense decoder; the same numbers whatever the batch and the padding."""

import json
import math
from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest

from probe import Example, load
from probe.errors import DataError, EditError, ExampleError, StudyError
from probe.routing import GROUPS
from studies.data import Data, load_data
from studies.routing import labels_of, routing
from studies.study import Setting
from tests import toys
from tests.oracles import routing as oracle


@pytest.fixture(scope="module")
def subject(stranger):
    return load(stranger, device="cpu")


@pytest.fixture(scope="module")
def done(subject, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "routing"
    return out, routing(Setting(subject, load_data("demo", 6), out, batch=4))


@pytest.fixture
def undrawn(monkeypatch):
    """Studies whose figures are not what a test is about."""
    monkeypatch.setattr("studies.routing_report.figures", lambda run, summary: None)


def pairs(subject, count=6):
    """More toy examples than two, so that tests over examples have something to test."""
    first, second = toys.pair(subject)
    return Data("pairs", tuple(
        replace(first if i % 2 else second, id=f"e{i}", images=(toys.picture(40 + 4 * i, 60, i),)) for i in range(count)
    ), "1")  # fmt: skip


def numbers(value, path=""):
    if isinstance(value, dict):
        return {k: v for name, one in value.items() for k, v in numbers(one, f"{path}/{name}").items()}
    if isinstance(value, list):
        return {k: v for i, one in enumerate(value) for k, v in numbers(one, f"{path}/{i}").items()}
    return {path: value} if isinstance(value, int | float) else {}


def test_positions_are_labelled_once_and_padding_never(subject):
    examples = load_data("demo", 3).examples
    for token_map, example in zip(subject.encode(examples).maps, examples, strict=True):
        at, labels = labels_of(token_map, example)
        names = [next(n for n, s in GROUPS.items() if token_map.segments[p] in s) for p in at]
        assert [list(GROUPS)[k] for k in labels] == names
        left = set(np.array(token_map.segments)[np.setdiff1d(np.arange(len(token_map)), at)])
        assert left <= {"pad", "bos", "separator"}


def test_a_dense_model_is_read_by_its_neurons_and_says_so(done):
    out, summary = done
    assert (summary["n"], summary["units"], summary["n_units"]) == (6, "neurons", [summary["n_units"][0]] * summary["n_layers"])
    report = (out / "report.md").read_text()
    assert report.startswith("# Neurons by modality (this model has no experts)")
    assert "has no mixture of experts: the neurons of its feed-forward blocks are read in place of experts" in report
    assert all(math.isfinite(value) for value in numbers(summary).values())
    assert json.loads((out / "summary.json").read_text())["js"]["low"] <= summary["js"]["value"] <= summary["js"]["high"]
    for name in ("divergence", "differences", "leanings", "balance"):
        assert (out / "figures" / f"{name}.png").stat().st_size > 5_000
        assert f"figures/{name}.png" in report


def test_experts_are_counted_as_a_slow_loop_counts_them(toy, tmp_path):
    subject = toy("qwen3_vl_moe")
    data = pairs(subject)
    summary = routing(Setting(subject, data, tmp_path / "r", batch=4))
    assert (summary["units"], summary["n_units"]) == ("experts", [4] * subject.n_layers)
    assert "Experts by modality" in (tmp_path / "r" / "report.md").read_text()
    routers = {layer: subject.layers[layer].mlp.gate for layer in range(subject.n_layers)}
    each = [oracle.routing_counts(subject, e, GROUPS, 2, routers) for e in data.examples]
    rows = pq.read_table(tmp_path / "r" / "records").to_pandas()
    sums = rows[(rows.what == "sum") & (rows.key == "uses")]
    compared = 0
    for (layer, modality), group in sums.groupby(["layer", "modality"], observed=True):
        expected = np.sum([one[layer, modality] for one in each], 0)
        assert np.sum(group.vector.tolist(), 0).tolist() == expected.tolist()
        assert expected.sum() == 2 * summary["tokens"][modality]
        compared += 1
    assert compared == 2 * subject.n_layers
    spread = rows[(rows.what == "spread") & (rows.key == "js")]
    for one, example in zip(each, data.examples, strict=True):
        found = spread[spread.example == example.id].iloc[0]["values"]
        wanted = [oracle.jensen_shannon([one[layer, "image"], one[layer, "text"]]) for layer in range(subject.n_layers)]
        assert found == pytest.approx(wanted, abs=1e-6)


@pytest.mark.parametrize("family", ["qwen3_vl_moe", "llava"])
def test_batches_and_paddings_change_no_number(undrawn, toy, tmp_path, family):
    subject = toy(family)
    data = pairs(subject)
    first, *others = (
        numbers(routing(Setting(subject, data, tmp_path / f"{batch}{padding}", batch=batch, padding=padding)))
        for batch, padding in ((6, "left"), (1, "left"), (4, "right"))
    )
    for other in others:
        assert set(first) == set(other)
        assert {k: (v, first[k]) for k, v in other.items() if abs(v - first[k]) > 1e-4} == {}


def test_sounds_are_compared_with_words(undrawn, toy, tmp_path):
    subject = toy("qwen2_audio")
    items = tuple(replace(e, id=f"{e.id}{i}") for i in range(2) for e in toys.pair(subject))
    summary = routing(Setting(subject, Data("sounds", items, "1"), tmp_path / "r"))
    assert set(summary["tokens"]) == {"audio", "text"}
    assert list(summary["media"]) == ["audio"]


def test_what_cannot_be_read_is_refused_by_name(undrawn, toy, subject, tmp_path):
    data = load_data("demo", 2)
    with pytest.raises(EditError, match="has no mixture of experts: read its neurons instead"):
        routing(Setting(subject, data, tmp_path / "a"), units="experts")
    with pytest.raises(StudyError, match=r"there are no units 'expert'.*did you mean 'experts'"):
        routing(Setting(subject, data, tmp_path / "a"), units="expert")
    with pytest.raises(StudyError, match="between 0 and 1, not at 2"):
        routing(Setting(subject, data, tmp_path / "a"), share=2.0)
    with pytest.raises(DataError, match=r"none of the 1 examples could be used.*no tokens of a medium beside its words"):
        routing(Setting(subject, Data("blind", (Example("a", "color of circle"),), "1"), tmp_path / "b"))
    mllama = toy("mllama")
    example = toys.pair(mllama)[0]
    with pytest.raises(ExampleError, match="read through cross-attention"):
        labels_of(mllama.encode(example).maps[0], example)


def test_one_blind_example_is_counted_and_skipped(undrawn, subject, tmp_path):
    data = Data("mixed", (*load_data("demo", 3).examples, Example("blind", "color of circle")), "1")
    summary = routing(Setting(subject, data, tmp_path / "r"))
    assert (summary["n"], summary["n_skipped"]) == (3, 1)
    assert "1 examples could not be used" in (tmp_path / "r" / "report.md").read_text()
