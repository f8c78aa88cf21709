"""One question looked at closely, with a clip, a sound, and a picture that only cross-attention sees."""

import numpy as np
import pyarrow.parquet as pq
import pytest
import soundfile
from PIL import Image

from probe import Example, load
from probe.media import Video
from studies.look import _filled, look
from tests import toys


@pytest.fixture
def media(tmp_path):
    folder = tmp_path / "frames"
    folder.mkdir()
    for i in range(4):
        toys.picture(56, 56, i).save(folder / f"{i}.png")
    samples, rate = toys.sound(0.75)
    soundfile.write(tmp_path / "a.wav", samples, rate)
    return {
        "llava_next_video": {"videos": (Video(folder),)},
        "qwen2_audio": {"sounds": (tmp_path / "a.wav",)},
        "mllama": {"images": (folder / "0.png",)},
    }


@pytest.mark.parametrize(
    ("family", "figure", "kind"),
    [("llava_next_video", "attention-clip", "video"), ("qwen2_audio", "attention-sound", "audio"), ("mllama", "attention", "")],
)
def test_what_is_shown_gets_its_figure(toy, tmp_path, media, family, figure, kind):
    subject = toy(family)
    summary = look(subject, Example("a", "what color is the ball ?", **media[family]), tmp_path / "run", 3)
    figures = tmp_path / "run" / "figures"
    assert {path.stem for path in figures.iterdir()} == {"tokens", figure, "mass", "lens", "answer"}
    drawn = np.asarray(Image.open(figures / f"{figure}.png").convert("RGB"))
    assert drawn.std() > 20
    assert f"figures/{figure}.png" in (tmp_path / "run" / "report.md").read_text()
    assert ({s["segment"] for s in summary["segments"]} >= {kind}) or not kind
    rows = pq.read_table(tmp_path / "run" / "records").to_pandas()
    mass = rows[rows.what == "mass"].groupby(["layer", "head"]).value.sum()
    assert len(mass) == subject.n_layers * subject.n_heads
    np.testing.assert_allclose(mass, 1.0, atol=1e-4)
    written = rows[rows.what == "written"].groupby(["position", "layer"]).value.sum()
    assert 1 <= len(set(written.index.get_level_values("position"))) <= 3
    np.testing.assert_allclose(written, 1.0, atol=1e-4)


def test_a_large_crop_is_said_and_empty_groups_are_left_out(tmp_path):
    subject = load("demo")
    wide = Image.fromarray(np.asarray(toys.picture(256, 128)))
    for name, picture in (("wide", wide), ("square", wide.resize((128, 128)))):
        look(subject, Example("a", "what color is the ball ?", images=(picture,)), tmp_path / name, 2)
    report = (tmp_path / "wide/report.md").read_text()
    grid = subject.encode(Example("a", "what color is the ball ?", images=(wide,))).maps[0].grids[0]
    lost = 1 - (grid.area[2] - grid.area[0]) * (grid.area[3] - grid.area[1]) / (wide.width * wide.height)
    assert lost > 0.3
    assert f"The processor's crop cut away {lost:.0%} of picture 0" in report
    assert "crop cut away" not in (tmp_path / "square/report.md").read_text()
    assert "scaled apart" in report
    mass, groups = _filled(np.array([[0.5, 0.0, 0.5], [0.2, 0.0, 0.8]]), ["bos", "answer", "image"])
    assert (mass.shape, groups) == ((2, 2), ["bos", "image"])
