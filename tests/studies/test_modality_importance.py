"""The study of modality importance: what each condition shows, the numbers from the records, batches and paddings, families."""

import json
import math
from dataclasses import replace

import pyarrow.parquet as pq
import pytest

from probe import Example, load
from probe.controls import modalities
from probe.errors import DataError, StudyError
from studies.asking import says
from studies.data import Data, load_data
from studies.demo.data import twin
from studies.demo.world import twin as sentence
from studies.modality_conditions import conditions, partner
from studies.modality_importance import modality_importance
from studies.study import Setting
from tests import toys


@pytest.fixture(scope="module")
def subject(stranger):
    return load(stranger, device="cpu")


@pytest.fixture(scope="module")
def data():
    return load_data("demo", 6)


@pytest.fixture(scope="module")
def done(subject, data, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "importance"
    return out, modality_importance(Setting(subject, data, out, batch=4), shap_limit=2, shap_groups=2, shap_orders=2)


@pytest.fixture
def undrawn(monkeypatch):
    """Studies whose figures are not what a test is about."""
    monkeypatch.setattr("studies.modality_importance_report.figures", lambda run, summary: None)


def numbers(value, path=""):
    if isinstance(value, dict):
        return {k: v for name, one in value.items() for k, v in numbers(one, f"{path}/{name}").items()}
    return {path: value} if isinstance(value, int | float) else {}


def test_the_demo_tells_its_scenes_in_words(data):
    for telling in ("demo", "demo:video", "demo:audio"):
        for example in load_data(telling, 2).examples:
            shown = next(medium for media in example.media.values() for medium in media)
            assert twin(example) == sentence(shown.args[0]) != ""
    assert twin(Example("a", "what ?", (toys.picture(),))) == ""
    assert twin(load_data("demo:text", 1).examples[0]) == ""
    assert twin(data.examples[0]) == load_data("demo:text", 1).examples[0].context


def test_each_condition_shows_what_it_says(subject, data):
    told = [replace(e, context=twin(e)) for e in data.examples]
    made = {k: v() for k, v in conditions(subject, told[3], data.examples[3], told, 3, 0, 8, 16).items()}
    own = {k: modalities(e) for k, e in made.items()}
    assert own == {
        "nothing": (), "image": ("image",), "text": ("text",), "image+text": ("image", "text"),
        "image, other image": ("image",), "image+text, other image": ("image", "text"), "text, other text": ("text",),
        "image+text, other text": ("image", "text"), "intact": ("image",), "blank": ("image",), "noise": ("image",),
        "shuffled": ("image",), "other": ("image",), "without": (),
    }  # fmt: skip
    assert {e.prompt for e in made.values()} == {told[3].prompt}
    assert made["image+text"].context == made["image+text, other image"].context == told[3].context
    other = partner(told, 3, "text", 0)
    assert made["text, other text"].context == other.context
    assert other.id in {e.id for e in told[:3]}
    assert made["intact"] is data.examples[3]


def test_a_partner_does_not_depend_on_how_many_follow(data):
    told = list(data.examples)
    for place in range(1, 6):
        assert partner(told, place, "image", 0) == partner(told[: place + 1], place, "image", 0)
        assert partner(told, place, "image", 0) != told[place]
    assert partner(told, 0, "image", 0) == told[1]
    assert partner(told[:1], 0, "image", 0) is None
    assert partner([replace(e, context="") for e in told], 2, "text", 0) is None


def test_the_summary_follows_from_the_records(done, subject, data):
    out, summary = done
    table = pq.read_table(out / "records").to_pandas()
    answers = table[table.what == "answer"]
    assert (summary["n"], summary["n_compared"], summary["modalities"]) == (6, 6, ["image", "text"])
    assert len(answers) == 6 * 14
    right = answers.pivot(index="example", columns="condition", values="right").astype(float)
    assert summary["importance"]["image"]["right"]["value"] == pytest.approx((right["image+text"] - right["text"]).mean())
    fall = summary["exchanged"]["text"]["accuracy_fall"]["value"]
    assert fall == pytest.approx((right["image+text"] - right["image+text, other text"]).mean())
    assert summary["controls"]["noise"]["fall"]["value"] == pytest.approx((right["intact"] - right["noise"]).mean())
    for example in data.examples[:2]:
        row = answers[(answers.example == example.id) & (answers.condition == "intact")].iloc[0]
        assert row.answer == subject.generate(example)[0]
        assert row.right == says(row.answer, example.answer)
    assert sum(one["value"] for one in summary["categories"].values()) == pytest.approx(1)
    assert sum(one["value"] for one in summary["shares"]["share"].values()) == pytest.approx(1)
    assert summary["shares"]["n"] == 2


def test_no_number_is_missing_and_figures_and_report_are_there(done):
    out, summary = done
    assert json.loads((out / "summary.json").read_text())["n"] == 6
    assert all(math.isfinite(value) for value in numbers(summary).values())
    assert "NaN" not in (out / "summary.json").read_text()
    report = (out / "report.md").read_text()
    for name in ("answers-by-subset", "controls", "importance", "categories", "shares"):
        assert (out / "figures" / f"{name}.png").stat().st_size > 5_000
        assert f"figures/{name}.png" in report
    assert "Which modality does each answer need?" in report


@pytest.mark.slow
def test_batches_and_paddings_change_no_number(undrawn, done, subject, data, tmp_path):
    _, before = done
    for batch, padding in ((1, "left"), (6, "right")):
        again = modality_importance(
            Setting(subject, data, tmp_path / padding, batch=batch, padding=padding), shap_limit=2, shap_groups=2, shap_orders=2
        )
        a, b = numbers(before), numbers(again)
        assert set(a) == set(b)
        assert {k: v for k, v in b.items() if abs(v - a[k]) > 1e-4} == {}


@pytest.mark.parametrize(("family", "medium"), [("qwen2_audio", "audio"), ("llava_onevision", "video")])
def test_clips_and_sounds_have_their_controls(undrawn, toy, tmp_path, family, medium):
    subject, items = toy(family), []
    for number, example in enumerate(toys.pair(subject)):
        bare = replace(example, images=(), sounds=(), regions=(), answer="yes", context="a dog ran")
        clip = tuple(toys.picture(28, 28, 3 * number + i) for i in range(3)), (0.0, 0.5, 1.0)
        items.append(
            replace(bare, sounds=example.sounds) if medium == "audio" else replace(bare, videos=(lambda clip=clip: clip,))
        )
    summary = modality_importance(
        Setting(subject, Data("pair", tuple(items), "1"), tmp_path / "r", batch=2),
        max_new_tokens=3,
        shap_limit=1,
        shap_groups=2,
    )
    assert summary["modalities"] == [medium, "text"]
    assert set(summary["controls"]) == {"blank", "noise", "shuffled", "other", "without"} | (
        {"frozen"} if medium == "video" else set()
    )
    assert summary["refused"] == {}
    assert summary["shares"]["n"] == 1
    rows = pq.read_table(tmp_path / "r" / "records").to_pandas()
    prob = rows[rows.what == "answer"].pivot(index="example", columns="condition", values="prob")
    for name in summary["controls"]:
        assert (prob[name] - prob["intact"]).abs().max() > 1e-9, name  # each reaches the model


def test_one_modality_alone_has_controls_and_a_baseline_only(subject, data, tmp_path):
    summary = modality_importance(Setting(subject, data, tmp_path / "r", batch=6), twins=False, shap_limit=0)
    assert (summary["n"], summary["n_compared"], summary["importance"]) == (6, 0, {})
    assert set(summary["subsets"]) == {"nothing", "image"}
    assert summary["controls"]["without"]["accuracy"] == summary["subsets"]["nothing"]["accuracy"]
    assert "importance beside others is not defined" in (tmp_path / "r" / "report.md").read_text()


def test_what_a_family_does_not_permit_is_counted(undrawn, toy, tmp_path):
    subject = toy("blip2")
    items = tuple(replace(e, answer="yes") for e in toys.pair(subject))
    summary = modality_importance(Setting(subject, Data("pair", items, "1"), tmp_path / "r"), max_new_tokens=2, shap_limit=0)
    assert set(summary["refused"]) == {"nothing", "without"}
    assert summary["refused"]["without"]["n"] == 2
    assert "cannot be asked anything without a picture" in (tmp_path / "r" / "report.md").read_text()


def test_examples_that_cannot_be_used_are_named(undrawn, subject, data, tmp_path):
    good = data.examples[:2]
    others = (Example("blind", "color of circle", answer="red"), replace(good[0], id="open", answer=None))
    summary = modality_importance(Setting(subject, Data("mixed", (*good, *others), "1"), tmp_path / "r"), shap_limit=0)
    assert (summary["n"], summary["n_skipped"]) == (2, 2)
    assert "no picture, clip or sound to be without" in "".join(summary["skipped"])
    assert "has no right answer" in "".join(summary["skipped"])
    with pytest.raises(DataError, match="none of the 2 examples could be used"):
        modality_importance(Setting(subject, Data("bad", others, "1"), tmp_path / "s"), shap_limit=0)
    with pytest.raises(StudyError, match="cells must be 2 or more, not 1"):
        modality_importance(Setting(subject, data, tmp_path / "t"), cells=1)
