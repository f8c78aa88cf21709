"""The study of hallucinated things: its numbers, whatever the batch and the padding, and what it refuses."""

import json

import pytest

from probe import Example, load
from probe.errors import DataError, StudyError
from probe.tracing import last_logits
from studies.data import Data, load_data
from studies.pope import pope
from studies.study import Setting
from tests import toys


@pytest.fixture(scope="module")
def subject(stranger):
    return load(stranger, device="cpu")


@pytest.fixture(scope="module")
def done(subject, tmp_path_factory):
    out = tmp_path_factory.mktemp("pope") / "r"
    return out, pope(Setting(subject, load_data("demo", 12), out, batch=8), models="none", max_new_tokens=3)


def numbers(found):
    """Every number of a summary, by where it stands."""
    if isinstance(found, dict):
        return {f"{k}/{n}": v for k, one in found.items() for n, v in numbers(one).items()}
    if isinstance(found, list):
        return {f"{k}/{n}": v for k, one in enumerate(found) for n, v in numbers(one).items()}
    return {"": found} if isinstance(found, int | float) and not isinstance(found, bool) else {}


def test_the_summary(done, subject):
    out, found = done
    assert found["n"] == 12
    own = found["models"][subject.name]
    assert {"all", "random", "popular", "adversarial"} >= set(own["splits"]) >= {"all"}
    assert sum(own["splits"][s]["accuracy"]["n"] for s in own["splits"] if s != "all") == 12
    assert own["blind"]["accuracy"]["n"] == own["gain"]["n"] == 12
    assert sum(one["n"] for one in own["objects"].values()) == 12
    assert own["official"]["unknown_rate"]["value"] == 0
    assert found["score"]["same"]["n"] == 12
    for key in ("accuracy", "hallucination", "auroc"):
        assert found[key]["low"] <= found[key]["value"] <= found[key]["high"]
    text = (out / "summary.json").read_text()
    assert "NaN" not in text
    assert json.loads(text)["n"] == 12
    report = (out / "report.md").read_text()
    for name in ("splits", "answers", "objects", "alignment"):
        assert (out / f"figures/{name}.png").stat().st_size > 5000
        assert f"figures/{name}.png" in report
    assert " nan" not in report


@pytest.mark.slow
def test_the_demo_models_are_polled_beside_their_scores(tmp_path):
    """Accuracy, F1, yes-ratio and unknown rate of both, and the IMA score of each in both readings."""
    found = pope(Setting(load("demo"), load_data("demo", 160), tmp_path / "r", batch=8), models="demo:frozen")
    assert set(found["models"]) == {"demo", "demo:frozen"}
    for one in found["models"].values():
        official = one["official"]
        assert official["accuracy"]["value"] > 0.88
        assert official["f1"]["value"] > 0.88
        assert 0.4 < official["yes_ratio"]["value"] < 0.6
        assert official["unknown_rate"]["value"] == 0
        assert {0 < one["score"][reading]["value"] < 1 for reading in ("input", "same")} == {True}
    assert found["models"]["demo"]["score"]["same"]["value"] != found["models"]["demo:frozen"]["score"]["same"]["value"]


def test_p_yes_is_that_of_the_first_tokens(done, subject):
    """In the demo's vocabulary each spelling of yes and no is one token, but for those that are several."""
    import pyarrow.parquet as pq

    out, _ = done
    rows = pq.read_table(out / "records").to_pandas()
    row = rows[rows.what == "answer"].iloc[0]
    from studies.pope import SPELLINGS
    from studies.pope import questions as asked

    example = asked(Setting(subject, load_data("demo", 12))).examples[0]
    assert example.id == row.example
    tokens = [subject.tokenizer.tokenize(f"x {word}")[1:] for word in SPELLINGS]
    assert all(len(one) == 1 for one in tokens)
    said = last_logits(subject, subject.encode(example))[0].double().softmax(-1)[subject.first_tokens(SPELLINGS, example)]
    assert row.p_yes == pytest.approx(float(said[:2].sum() / said.sum()), abs=1e-5)


@pytest.mark.parametrize(("batch", "padding"), [(1, "left"), (8, "right")])
def test_batch_and_padding_change_nothing(done, subject, tmp_path, batch, padding):
    setting = Setting(subject, load_data("demo", 12), tmp_path / "r", batch=batch, padding=padding)
    again = pope(setting, models="none", max_new_tokens=3)
    first, second = numbers(done[1]), numbers(again)
    assert first.keys() == second.keys()
    assert len(first) > 100
    for name, value in first.items():
        assert second[name] == pytest.approx(value, abs=1e-4), name


def test_models_side_by_side(subject, tmp_path):
    found = pope(Setting(subject, load_data("demo", 4), tmp_path / "r"), models="demo", blind=False, max_new_tokens=2)
    assert list(found["models"]) == [subject.name, "demo"]
    assert [one["n"] for one in found["comparison"]] == [4]
    assert found["models"]["demo"]["blind"] is None
    assert "Model against model" in (tmp_path / "r/report.md").read_text()


def test_one_bad_example_is_named(subject, tmp_path):
    (tmp_path / "bad.png").write_text("no picture")
    good = [Example(f"g{i}", "is there a star ?", (toys.picture(128, 128, i),), answer=a) for i, a in enumerate(("yes", "no"))]
    bad = Example("bad", "is there a star ?", (tmp_path / "bad.png",), answer="yes")
    open_question = Example("open", "color of star", (toys.picture(),), answer="red")
    found = pope(
        Setting(subject, Data("mine", (*good, bad, open_question), "1", ("line 9 is broken",)), tmp_path / "r"),
        max_new_tokens=2,
    )
    assert (found["n"], found["n_skipped"]) == (2, 1)
    report = (tmp_path / "r/report.md").read_text()
    assert "2 examples could not be used" in report
    assert "line 9 is broken" in report
    with pytest.raises(DataError, match=r"none of the 1 examples could be used; the first: .*bad.png"):
        pope(Setting(subject, Data("mine", (bad,), "1"), tmp_path / "q"))
    with pytest.raises(StudyError, match="mine has no question that is answered yes or no"):
        pope(Setting(subject, Data("mine", (open_question,), "1"), tmp_path / "p"))
    with pytest.raises(StudyError, match="at least one token, not 0"):
        pope(Setting(subject, Data("mine", (bad,), "1"), tmp_path / "p"), max_new_tokens=0)
    assert not (tmp_path / "p").exists()


@pytest.mark.parametrize("family", ["qwen3_5", "mllama", "gemma3"])
def test_other_architectures(toy, tmp_path, family):
    subject = toy(family)
    asked = tuple(
        Example(e.id, e.prompt, e.images, answer=a) for e, a in zip(toys.questions(subject), ("yes", "no"), strict=True)
    )
    found = pope(Setting(subject, Data("toys", asked, "1"), tmp_path / "r"), max_new_tokens=2)
    assert found["n"] == 2
    assert (found["score"]["same"]["value"] is None) == (family == "mllama")
