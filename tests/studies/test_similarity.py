"""The study of similarity on the demo models and on toys."""

import numpy as np
import pytest
from typer.testing import CliRunner

from probe import Example, load
from probe.errors import DataError, StudyError
from studies.cli import app
from studies.data import Data, load_data
from studies.similarity import similarity
from studies.study import Setting
from tests import toys
from tests.studies import command

WORDS = ("ball", "dog", "cat", "mat", "park", "picture")


def asked(subject, count=6):
    """Different questions with different pictures or sounds."""
    sounds = subject.anatomy.vision is None
    first = "<image> " if not getattr(subject.processor, "chat_template", None) else ""
    return [
        Example(
            str(i), f"{first}what color is the {WORDS[i % 6]} ?", () if sounds else (toys.picture(seed=i),),
            sounds=(toys.sound(seed=i),) if sounds else (),
        )
        for i in range(count)
    ]  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("similarity") / "r"
    words = ["study", "similarity", "--model", "demo", "--limit", "12", "--permutations", "30", "--out", str(folder), "--json", "--quiet"]  # fmt: skip
    return folder, command.last_line(words), words


def test_it_says_what_was_asked(run):
    folder, found, _ = run
    assert (found["n"], found["k"], found["k_asked"]) == (12, 4, 10)
    assert found["chance_knn"] == pytest.approx(4 / 11)
    assert {title.split(":")[0] for title in found["pairs"]} == {"layers", "groups", "models", "tellings"}
    assert len(found["pairs"]) == 12
    for one in found["pairs"].values():
        for metric in ("cka", "cknna", "knn"):
            assert np.shape(one[metric]["grid"]["value"]) == (9, 9)
            along = one[metric]["along"]
            assert along["low"] <= along["value"] <= along["high"]
            assert along["null_low"] <= along["null"] <= along["null_high"]
            assert 1 / 31 - 1e-9 <= along["p"] <= 1
    own = found["pairs"]["layers: shown"]["cka"]["grid"]["value"]
    assert np.diag(own) == pytest.approx(1)
    assert np.allclose(own, np.transpose(own))
    assert found["pairs"]["models: question"]["cka"]["along"]["p"] < 0.05
    assert found["pairs"]["layers: last"]["cka"]["grid"]["value"][0] == [None] * 9  # the last token is the same everywhere
    assert "NaN" not in (folder / "summary.json").read_text()
    assert len(list((folder / "figures").glob("*.png"))) == 4 + 3 + 1
    assert "permuted" in (folder / "report.md").read_text()


@pytest.mark.slow
def test_asking_again_gives_the_same_bytes(run):
    folder, _, words = run
    parts = {path: path.read_bytes() for path in (folder / "records").glob("*.parquet")}
    sorted(parts)[1].unlink()
    assert CliRunner().invoke(app, words).exit_code == 0
    assert {path: path.read_bytes() for path in (folder / "records").glob("*.parquet")} == parts
    assert len(parts) == 3 * 2


@pytest.mark.slow
def test_batches_and_padding_change_nothing(stranger, tmp_path):
    subject, data = load(str(stranger)), load_data("demo", 9)
    ways = ((1, "left"), (8, "left"), (8, "right"))
    found = [
        similarity(
            Setting(subject, data, tmp_path / f"{size}{side}", batch=size, padding=side), other="none", permutations=5, k=3
        )
        for size, side in ways
    ]
    for other in found[1:]:
        for title, one in found[0]["pairs"].items():
            mine, theirs = (np.array(f["cka"]["grid"]["value"], dtype=float) for f in (one, other["pairs"][title]))
            np.testing.assert_allclose(mine, theirs, atol=1e-4)
    assert len(found) == 3


@pytest.mark.parametrize(
    "family",
    [
        pytest.param("llava", marks=pytest.mark.slow),
        "qwen2_vl",
        "paligemma",
        pytest.param("qwen2_audio", marks=pytest.mark.slow),
    ],
)
def test_it_runs_on_other_architectures(toy, tmp_path, family):
    subject = toy(family)
    data = Data("toys", tuple(asked(subject)), "t")
    found = similarity(Setting(subject, data, tmp_path / "r", batch=3), permutations=5, k=2, clip=1.0)
    assert found["n"] == 6
    assert set(found["sources"]) == {"model"}
    assert len(found["pairs"]) == 6
    assert np.shape(found["pairs"]["layers: shown"]["cka"]["grid"]["value"]) == (subject.n_layers + 1,) * 2


def test_what_cannot_be_compared_is_refused(toy, tmp_path):
    subject = toy("llava")

    def ask(count, **options):
        return similarity(Setting(subject, Data("toys", tuple(asked(subject, count)), "t"), tmp_path / "r"), **options)

    with pytest.raises(DataError, match="takes at least 4 examples, and there are 3"):
        ask(3)
    with pytest.raises(StudyError, match="lies between 0 and 1, not at 2"):
        ask(5, clip=2.0)
    with pytest.raises(StudyError, match="at least 2 neighbours, not 1"):
        ask(5, k=1)
    with pytest.raises(DataError, match="does not ask the questions of toys in the same order"):
        ask(5, twin="demo:text")
    words = Data("toys", tuple(Example(str(i), f"what {i} ?") for i in range(5)), "t")
    with pytest.raises(DataError, match=r"and 0 can be used; the first .* no tokens of the group 'shown'"):
        similarity(Setting(subject, words, tmp_path / "w"))
    keys = Data("toys", tuple(asked(toy("mllama"), 4)), "t")
    with pytest.raises(DataError, match="nothing is shown in the sequence"):
        similarity(Setting(toy("mllama"), keys, tmp_path / "m"))
