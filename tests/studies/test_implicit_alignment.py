"""The study of implicit alignment on the demo models and on toys."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from typer.testing import CliRunner

from probe import Example, load
from probe.alignment import gather_anchors, read_alignment, sides_of
from probe.analysis.overlap import iou, magnitude_kept, wanda_kept
from probe.analysis.stats import wilson
from probe.calibration import linear_maps
from probe.errors import DataError, StudyError
from probe.plots import alignment as plots
from probe.plots import family
from studies.cli import app
from studies.data import Data, load_data
from studies.demo.family import load_member, members
from studies.implicit_alignment import ANCHORS, _work, implicit_alignment
from studies.implicit_alignment_report import _global, _growth, _members
from studies.implicit_alignment_words import _aligned, _predicts
from studies.modalities import Part
from studies.study import Setting
from tests import toys
from tests.studies import command


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("alignment") / "r"
    asked = ["study", "implicit-alignment", "--model", "demo:frozen", "--data", "demo", "--limit", "12", "--family", "demo,demo:frozen,demo:frozen@0,demo:frozen@500",
             "--family-limit", "8", "--modalities", "image,text", "--out", str(folder), "--json", "--quiet"]  # fmt: skip
    return folder, command.last_line(asked), asked


def test_it_says_what_was_asked(run):
    folder, found, _ = run
    assert found["run"] == str(folder)
    assert found["n"] == 24
    assert {m: set(readings) for m, readings in found["score"].items()} == {m: {"input", "same"} for m in ("image", "text")}
    for readings in found["score"].values():
        for one in readings.values():
            assert -1 <= one["low"] <= one["value"] <= one["high"] <= 1
    assert len(found["matched"]) == len(found["unmatched"]) == len(found["p_value"]) == 9
    assert all(0 < p <= 1 for p in found["p_value"])
    assert found["chance_iou"] == pytest.approx(1 / 3)
    assert found["chance_iou"] < found["iou"] < 1
    assert found["weights"]["n_matrices"] == 8 * 7
    assert set(found["correlation"]) == {
        f"{r} and {s}" for r in ("input", "same") for s in ("accuracy", "existence", "hallucination")
    }
    assert found["correlation"]["same and accuracy"]["n"] == 4
    drift = found["modalities"]["image"]["drift"]["perceptual"]["1"]
    modes = {mode: drift["modes"][mode]["mean"] for mode in ("diag_mean", "diag_median", "diag_max", "avg")}
    assert modes["diag_mean"] == drift["mean"]
    assert all(len(values) == 8 for values in modes.values())
    assert all(most >= mean - 1e-6 for most, mean in zip(modes["diag_max"], modes["diag_mean"], strict=True))
    grown = found["growth"]["demo:frozen"]
    assert grown["steps"] == ["0", "500", "end"]
    scores = {one["name"]: one["same"]["value"] for one in found["members"]}
    assert grown["same"]["mean"] == [scores[name] for name in ("demo:frozen@0", "demo:frozen@500", "demo:frozen")]
    assert len(found["plane"]["states"]) == 4
    assert {
        len(points) for ways in found["plane"]["states"].values() for each in ways.values() for points in each.values()
    } == {12}
    report = (folder / "report.md").read_text()
    assert "| 500 | " in report
    assert all(f"| {i}. " in report for i in range(1, 5))
    assert "nan" not in (folder / "summary.json").read_text().lower().replace("nance", "")
    assert {path.name for path in (folder / "figures").glob("*.png")} == {
        f"{name}.png" for name in ("alignment", "growth", "inside-the-block", "norms-and-drift", "plane", "score-and-skill", "spaces", "vocabulary", "weights")
    }  # fmt: skip


@pytest.mark.parametrize(
    "name", [pytest.param("demo:frozen", marks=pytest.mark.slow), "llava", pytest.param("qwen2_vl", marks=pytest.mark.slow)]
)
def test_global_similarity_is_that_of_centroids_over_all_tokens(toy, tmp_path, name):
    """The slow way: every token of every example added up, in float64; and whatever the size of the units."""
    subject = load(name) if name.startswith("demo") else toy(name)
    data = load_data("demo", 5) if name.startswith("demo") else Data("toys", tuple(toys.pair(subject)), "t")
    sums = {side: np.zeros((subject.n_layers + 1, 1)) for side in ("perceptual", "textual")}
    for example in data.examples:
        encoded = subject.encode(example)
        with torch.no_grad():
            states = subject.model(**encoded.inputs, output_hidden_states=True).hidden_states
        sides = sides_of(encoded.maps[0], example, "image")
        for side in sums:
            sums[side] = sums[side] + np.stack([state[0, getattr(sides, side)].double().sum(0).numpy() for state in states])
    p, t = sums.values()
    expected = (p * t).sum(1) / np.linalg.norm(p, axis=1) / np.linalg.norm(t, axis=1)
    for size in (1, len(data)):
        made = implicit_alignment(
            Setting(subject, data, tmp_path / str(size), batch=size), modalities="image", family="none", words_limit=1
        )["modalities"]["image"]["similar"]["global"]
        np.testing.assert_allclose(made["mean"][:-1], expected[:-1], atol=1e-5)  # the last that transformers gives is normed
        assert made["n"] == len(data)
        assert (made["low"] is None) == (made["groups"] < 4)


def test_examples_without_their_sums_have_no_global_similarity():
    """Of a run that was begun before sums of all tokens were kept, half of the examples would be half of an answer."""
    rows = pa.Table.from_pylist(
        [{"what": "centroid", "key": side, "vector": [1.0, 2.0, 3.0, 4.0], "n": 2} for side in ("perceptual", "textual")]
    )
    assert _global(rows, 2, 2)["mean"] == pytest.approx([1, 1])
    assert _global(rows, 4, 2)["mean"] is None
    assert _global(rows.slice(0, 0), 2, 2)["mean"] is None


def _member_at(name, value):
    one = {"value": value, "low": value - 0.1, "high": value + 0.1, "n": 5}
    return {"name": name, "input": one, "same": {**one, "low": None, "high": None}, "accuracy": one, "hallucination": None}


@pytest.mark.parametrize(("panels", "columns"), [(1, 1), (2, 2), (3, 2), (4, 4)])
def test_names_of_lines_are_no_wider_than_the_panels(panels, columns):
    curve = {"mean": [0.1, 0.2], "low": [0.0, 0.1], "high": [0.2, 0.3]}
    one = {
        "n": 3, "similar": {"avg": {"matched": curve, "unmatched": curve}, "global": {**curve, "low": None, "high": None}},
        "within": {"perceptual": curve["mean"]}, "within_interval": {"perceptual": None},
    }  # fmt: skip
    figure, _ = plots.similarity({"modalities": dict.fromkeys(["image", "video", "audio", "text"][:panels], one)})
    FigureCanvasAgg(figure).draw()
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()][-1] == "centroids of all tokens of all examples"
    assert len({round(text.get_window_extent().x0) for text in legend.get_texts()}) == columns
    assert legend.get_window_extent().width <= figure.bbox.width


def test_growth_goes_by_steps_and_draws_every_training():
    names = ["a@100", "a@20", "other", "a", "b@1", "b@2", "b@3", "c@7", "c@main"]
    grown = _growth([_member_at(name, i / 10) for i, name in enumerate(names)])
    assert {name: one["steps"] for name, one in grown.items()} == {"a": ["20", "100", "end"], "b": ["1", "2", "3"]}
    assert grown["a"]["input"]["mean"] == [0.1, 0.0, 0.3]
    assert grown["b"]["same"]["low"] == grown["b"]["same"]["mean"]
    assert grown["a"]["hallucination"] is None
    figure, page = family.growth({"growth": grown})
    assert all(
        trace.mode == "lines" for trace in page.data if trace.fill
    )  # plotly marks the edges of short bands unless it is told
    assert [axis.get_title(loc="left") for axis in figure.axes] == [
        "IMA score of a", "What a can do", "IMA score of b", "What b can do",
    ]  # fmt: skip
    assert [[tick.get_text() for tick in axis.get_xticklabels()] for axis in figure.axes[1:3]] == [
        ["20", "100", "end"], ["1", "2", "3"],
    ]  # fmt: skip
    assert [len(axis.lines) for axis in figure.axes] == [2, 1, 2, 1]
    assert len({trace.name for trace in page.data if trace.name}) == 3


@pytest.mark.slow
def test_asking_again_gives_the_same_bytes(run):
    folder, _, asked = run
    parts = {path: path.read_bytes() for path in (folder / "records").glob("*.parquet")}
    lost = sorted(parts)[1]
    lost.unlink()
    assert CliRunner().invoke(app, asked).exit_code == 0
    assert {path: path.read_bytes() for path in (folder / "records").glob("*.parquet")} == parts
    assert len(parts) == 2 * 2 + 4


def few(subject):
    """Six examples of three lengths, all of them anchors."""
    return Data("toys", tuple(
        Example(f"{i}{e.id}", f"{e.prompt} {'dog ' * i}".strip(), e.images, suffix=e.suffix) for i in range(3) for e in toys.pair(subject)
    ), "t")  # fmt: skip


@pytest.mark.parametrize("name", ["llava", "qwen2_vl", pytest.param("demo:frozen", marks=pytest.mark.slow)])
def test_batches_and_padding_change_nothing(toy, tmp_path, monkeypatch, name):
    monkeypatch.setattr("studies.implicit_alignment_report.figures", lambda *_: None)
    subject = load(name) if name.startswith("demo") else toy(name)
    data = load_data("demo", 9) if name.startswith("demo") else few(subject)
    found = [
        implicit_alignment(
            Setting(subject, data, tmp_path / f"{size}{side}", batch=size, padding=side), modalities="image", family="none"
        )
        for size, side in ((1, "left"), (8, "left"), (4, "right"))
    ]
    for other in found[1:]:
        assert other["iou"] == pytest.approx(found[0]["iou"], abs=1e-3)
        ours, theirs = (one["modalities"]["image"] for one in (found[0], other))
        for mode, one in ours["similar"].items():
            for pairing in set(one) & {"matched", "unmatched"}:
                np.testing.assert_allclose(one[pairing]["mean"], theirs["similar"][mode][pairing]["mean"], atol=1e-5)
        for side in ("textual", "perceptual"):
            np.testing.assert_allclose(ours["within"][side], theirs["within"][side], atol=1e-5)
        assert other["correlation"] is None
    assert len(found[0]["modalities"]["image"]["similar"]["avg"]["unmatched"]["mean"]) == subject.n_layers + 1


def test_anchors_as_they_are_read_are_those_that_are_gathered(toy, tmp_path, monkeypatch):
    """Every row of the unmatched side, and every site, beside anchors that were read one by one; one of the leading examples cannot be read."""
    monkeypatch.setattr("studies.implicit_alignment_report.figures", lambda *_: None)
    monkeypatch.setattr("studies.implicit_alignment.ANCHORS", 4)
    subject = toy("llava")
    (tmp_path / "broken.png").write_bytes(b"no picture")
    usable = list(few(subject).examples)
    broken = Example("broken", "what is it ?", (str(tmp_path / "broken.png"),))
    data = Data("toys", (usable[0], broken, *usable[1:]), "t")
    implicit_alignment(Setting(subject, data, tmp_path / "r", batch=2), modalities="image", family="none", words_limit=1)
    rows = pa.concat_tables(map(pq.read_table, sorted((tmp_path / "r/records").glob("*.parquet")))).to_pylist()
    assert [row["example"] for row in rows if row["what"] == "skipped"] == ["broken"]
    anchors = gather_anchors(subject, usable[:4], "image")
    checked = set()
    for example in usable:
        encoded = subject.encode(example)
        (alone,) = read_alignment(subject, encoded, [sides_of(encoded.maps[0], example, "image")], anchors)
        for row in rows:
            if row["example"] == example.id and row["what"] in ("similar", "site", "from_input"):
                pairing, _, name = row["key"].partition("/")
                found = getattr(alone, {"site": "sites"}.get(row["what"], row["what"]))[pairing]
                want = found[name] if name else found
                want = [want[layer] for layer in range(subject.n_layers)] if isinstance(want, dict) else want
                np.testing.assert_allclose(row["values"], want, atol=1e-5, err_msg=row["key"])
                checked.add((row["what"], row["key"]))
    assert len(checked) == 2 * (7 + 8 + 1)  # matched and unmatched: seven modes, eight sites, and from the input


def test_all_pairs_are_the_double_loop(toy, tmp_path, monkeypatch):
    """The published reading in the summary, from sums of units: every example's picture with every example's words, one by one."""
    monkeypatch.setattr("studies.implicit_alignment_report.figures", lambda *_: None)
    subject = toy("llava")
    data = few(subject)
    found = implicit_alignment(Setting(subject, data, tmp_path / "r", batch=4), modalities="image", family="none")
    means = []
    for example in data.examples:
        encoded = subject.encode(example)
        with torch.no_grad():
            states = subject.model(**encoded.inputs, output_hidden_states=True).hidden_states
        sides = sides_of(encoded.maps[0], example, "image")
        means.append([
            [state[0, at].double().mean(0).numpy() for at in (sides.perceptual, sides.textual)] for state in states[:-1]
        ])  # fmt: skip
    pairs = found["modalities"]["image"]["pairs"]
    for k in range(len(means[0])):
        cosines = np.array([
            [a[k][0] @ b[k][1] / np.linalg.norm(a[k][0]) / np.linalg.norm(b[k][1]) for b in means] for a in means
        ])  # fmt: skip
        assert pairs["all"][k] == pytest.approx(cosines.mean(), abs=1e-6)
        assert pairs["unmatched"][k] == pytest.approx(cosines[~np.eye(len(cosines), dtype=bool)].mean(), abs=1e-6)


def test_any_unit_that_is_lost_is_read_again_to_the_same_bytes(toy, tmp_path, monkeypatch):
    """Anchors are taken from the units that they come in: those are read again where another one is missing, and whichever it is."""
    monkeypatch.setattr("studies.implicit_alignment_report.figures", lambda *_: None)
    monkeypatch.setattr("studies.implicit_alignment.ANCHORS", 4)
    subject = toy("llava")
    setting = Setting(subject, few(subject), tmp_path / "r", batch=2)
    whole = implicit_alignment(setting, modalities="image", family="none", words_limit=3)
    parts = {path: path.read_bytes() for path in (tmp_path / "r" / "records").glob("*.parquet")}
    assert len(parts) == 3
    for lost in parts:
        lost.unlink()
        assert implicit_alignment(setting, modalities="image", family="none", words_limit=3) == whole
        assert {path: path.read_bytes() for path in parts} == parts


def test_four_modalities_are_answered_one_by_one(tmp_path, monkeypatch):
    """Picture, clip, sound and text on the one frozen language model, in one run."""
    names = ("image", "video", "audio", "text")
    setting = Setting(load("demo:frozen"), load_data("demo", 3), tmp_path / "r")
    found = implicit_alignment(setting, modalities=",".join(names), family="none", words_limit=1, weights_limit=2)
    assert found["n"] == 12
    assert tuple(found["modalities"]) == tuple(found["score"]) == names
    assert [one["n"] for one in found["modalities"].values()] == [3] * 4
    assert len({one["same"]["value"] for one in found["score"].values()}) == 4
    report = (tmp_path / "r" / "report.md").read_text()
    assert [line[:5] for line in report.splitlines() if line.startswith("| ") and line[2:4] in ("1.", "2.", "3.", "4.")] == [
        f"| {i}. " for i in range(1, 5)
    ]


@pytest.mark.parametrize(
    "family",
    [
        "qwen2_audio",
        "mllama",
        "qwen3_5",
        pytest.param("blip2", marks=pytest.mark.slow),
        pytest.param("gemma4", marks=pytest.mark.slow),
    ],
)
def test_it_runs_on_other_architectures(toy, tmp_path, family):
    subject = toy(family)
    examples = toys.pair(subject)
    data = Data("toys", tuple(examples), "t")
    if family == "mllama":  # its picture is not in the sequence: there are no perceptual tokens there
        with pytest.raises(
            DataError, match=r"none of the 2 image examples could be used; the first: .* no tokens of the image"
        ):
            implicit_alignment(Setting(subject, data, tmp_path / "r"), family="none")
        return
    found = implicit_alignment(Setting(subject, data, tmp_path / "r"), family="none")
    assert found["n"] == 2
    assert len(found["matched"]) == subject.n_layers + 1


def test_what_cannot_be_compared_is_refused(toy, tmp_path):
    subject = toy("llava")
    data = Data("toys", (Example("a", "what is it ?"),), "t")
    with pytest.raises(StudyError, match="there is no modality 'smell'"):
        implicit_alignment(Setting(subject, data, tmp_path / "r"), modalities="smell")
    with pytest.raises(DataError, match="toys has no example that shows audio"):
        implicit_alignment(Setting(subject, data, tmp_path / "r"), modalities="audio")
    with pytest.raises(DataError, match="toys shows nothing and has no context"):
        implicit_alignment(Setting(subject, data, tmp_path / "r"))
    with pytest.raises(StudyError, match="a sparsity lies between 0 and 1, not at 2"):
        implicit_alignment(Setting(subject, data, tmp_path / "r"), sparsity=2.0)
    with pytest.raises(StudyError, match="needs at least three"):
        implicit_alignment(Setting(load("demo"), load_data("demo", 2), tmp_path / "r"), family="demo,demo:frozen")
    assert not (tmp_path / "r").exists()


def test_the_family_is_the_training_of_the_frozen_model():
    found = members()
    assert found[-2:] == ["demo:frozen", "demo"]
    assert len(found) >= 6
    first, last = load_member(found[0]), load_member("demo:frozen")
    before, after = first.model.state_dict(), last.model.state_dict()
    changed = {name.split(".")[1] for name in before if not before[name].equal(after[name])}
    assert changed == {"vision_tower", "multi_modal_projector"}


def test_a_member_that_is_always_right_or_wrong_has_an_interval():
    """24 of 24 is no certainty: skills are proportions, with Wilson's interval; scores are means."""
    skills = {
        "accuracy": [1.0] * 24,
        "existence": [1.0, 0.0] * 12,
        "hallucination": [0.0] * 24,
        "input": [0.1, 0.3],
        "same": [0.2, 0.2],
    }
    rows = pa.Table.from_pylist(
        [{"what": "member", "example": "one", "key": key, "values": values} for key, values in skills.items()]
    )
    (one,) = _members(rows, 0)["members"]
    for key, hits in (("accuracy", 24), ("existence", 12), ("hallucination", 0)):
        assert (one[key]["low"], one[key]["high"]) == wilson(hits, 24)
    assert (one["input"]["low"], one["input"]["high"]) == (0.1, 0.3)
    assert (one["same"]["value"], one["same"]["low"]) == (0.2, None)


@pytest.mark.slow
def test_a_run_that_grows_is_a_run_that_was_asked_for_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr("studies.implicit_alignment_report.figures", lambda *_: None)
    subject, grown = load("demo:frozen"), tmp_path / "grown"
    asked = {"modalities": "image", "family": "none", "words_limit": 4, "weights_limit": 6}
    for limit in (4, 17):
        found = implicit_alignment(Setting(subject, load_data("demo", limit), grown, batch=4), **asked)
    fresh = implicit_alignment(Setting(subject, load_data("demo", 17), tmp_path / "fresh", batch=4), **asked)
    assert {**found, "run": ""} == {**fresh, "run": ""}
    parts = [
        {path.name: path.read_bytes() for path in (one / "records").glob("*.parquet")} for one in (grown, tmp_path / "fresh")
    ]
    assert parts[0] == parts[1]
    assert len(parts[0]) == 5


def test_units_name_what_they_were_read_beside():
    """Enough anchors are the same anchors, whatever the limit; a unit read beside fewer of them is another unit."""
    subject = load("demo:frozen")
    work = {(n, batch): _work(Part("image", subject, load_data("demo", n)), batch) for n in (4, 20, 30) for batch in (5, 8)}
    assert [e.id for e in work[20, 8].anchors] == [e.id for e in work[30, 5].anchors]
    assert len(work[20, 8].anchors) == ANCHORS > len(work[4, 8].anchors) == 4
    assert [work[20, batch].leading for batch in (5, 8)] == [4, 2]
    keys = {asked: [key for key, _ in one.units] for asked, one in work.items()}
    assert keys[20, 8][:2] == keys[30, 8][:2]
    assert keys[20, 5] == keys[30, 5][:4]
    assert {key.split("-")[-1] for key in keys[4, 8]} != {key.split("-")[-1] for key in keys[20, 8]}


def test_overlap_is_held_against_the_weights_alone(run):
    """The masks that the report compares, taken again the slow way from one matrix's sums of squares."""
    folder, found, _ = run
    weights = found["weights"]
    assert found["chance_iou"] < found["permuted_iou"] < found["magnitude_iou"] < 1
    for name in ("permuted", "magnitude"):
        gap = weights[f"above_{name}"]
        assert gap["low"] <= gap["value"] <= gap["high"]
        assert gap["value"] == pytest.approx(found["iou"] - found[f"{name}_iou"], abs=1e-9)
        assert gap["n"] == weights["n_matrices"]
    assert np.mean(weights["across_by_layer"]["own"]["mean"]) == pytest.approx(found["iou"])
    verdict = next(line for line in (folder / "report.md").read_text().splitlines() if line.startswith("| 2. "))
    beyond = all(weights[f"above_{name}"]["low"] > 0 for name in ("permuted", "magnitude"))
    assert ("**mostly" in verdict) != beyond
    name = "3.mlp.gate_proj"
    rows = pa.concat_tables(
        [pq.read_table(path) for path in sorted((folder / "records").glob("part-image-*.parquet"))]
    ).to_pylist()
    sums = {side: np.zeros(1) for side in ("perceptual", "textual")}
    for row in rows:
        for side in sums:
            if row["what"] == "squares" and row["key"] == f"{side}/{name}":
                sums[side] = sums[side] + np.array(row["vector"], dtype=np.float64)
    weight = dict(linear_maps(load("demo:frozen")))[name].weight.detach()
    for total in sums.values():
        kept, plain = (
            [set(sorted(range(len(s)), key=lambda j: float(s[j]), reverse=True)[: len(s) - len(s) // 2]) for s in score]
            for score in (weight.abs() * torch.tensor(total).float().sqrt(), weight.abs())
        )
        slow = sum(len(a & b) for a, b in zip(kept, plain, strict=True)) / sum(
            len(a | b) for a, b in zip(kept, plain, strict=True)
        )
        fast = iou(wanda_kept(weight, torch.tensor(total), 0.5), magnitude_kept(weight, 0.5))
        assert fast == pytest.approx(slow, abs=1e-6)


def _words(**more):
    line = {"pearson": 0.7, "low": 0.5, "high": 0.9, "p_value": 0.12, "q": 0.2, "n": 8}
    flipped = {**line, "pearson": -0.7, "low": -0.9, "high": -0.5}
    names = ["demo", *(f"demo:frozen@{i}" for i in range(6)), "demo:frozen"]
    correlation = {
        f"{r} and {s}": {**one, **more}
        for r in ("input", "same")
        for s, one in (("accuracy", line), ("hallucination", flipped))
    }
    return {"correlation": correlation, "members": [{"name": name} for name in names]}


def test_a_correlation_needs_its_q_and_says_whose_it_is():
    assert _predicts(_words())[0] == "does not hold here"
    verdict, why = _predicts(_words(q=0.01))
    assert verdict == "holds"
    assert "n = 8 models, 7 of them steps of one training and so not independent" in why


def _similar(clear, states, low):
    gap = {"value": low + 0.1, "low": low, "high": low + 0.2}
    q = [0.01] * clear + [0.5] * (states - clear)
    return {"modalities": {"image": {
        "similar": {"avg": {"q": q, "gap": {"mean": [0.1] * states}}}, "inside": {"inside": gap, "outside": gap, "difference": gap},
    }}}  # fmt: skip


@pytest.mark.parametrize(
    ("clear", "low", "verdict"),
    [(9, 0.1, "holds"), (1, 0.1, "holds in part"), (1, -0.2, "holds in part"), (9, -0.2, "holds in part"), (0, -0.2, "does not hold here")],
)  # fmt: skip
def test_alignment_needs_most_states_and_more_inside_the_blocks(clear, low, verdict):
    assert _aligned(_similar(clear, 9, low))[0] == verdict
