"""Controls: each changes what it says and nothing else, when the medium is opened and not before."""

from dataclasses import replace

import numpy as np
import pytest

from probe import Example, Region
from probe import controls as c
from probe.errors import ExampleError
from probe.media import Clip, Video, open_picture, open_sound, open_video
from tests import toys


def frames(count=5):
    return Clip(tuple(toys.picture(16, 24, i) for i in range(count)), tuple(0.5 * i for i in range(count)))


@pytest.fixture
def full():
    return Example(
        "a", "what is this ?", (toys.picture(40, 60, 1),), context="a ball", videos=(Video(frames, frames=3),),
        sounds=(toys.sound(0.5),), regions=(Region((1.0, 1.0, 9.0, 9.0)),), answer="ball",
    )  # fmt: skip


def pixels(example):
    return np.array(open_picture(example.images[0]))


def test_modalities_are_kept_and_exchanged(full):
    assert c.modalities(full) == ("image", "video", "audio", "text")
    kept = c.only(full, {"audio"})
    assert c.modalities(kept) == ("audio",)
    assert (kept.prompt, kept.answer, kept.regions) == (full.prompt, full.answer, ())
    assert c.only(full, c.modalities(full)) == full
    assert c.modalities(c.only(full, ())) == ()
    other = replace(full, id="b", context="a dog", images=(toys.picture(8, 8, 2),))
    assert c.swap(full, other, "text") == replace(full, context="a dog")
    assert pixels(c.swap(full, other, "image")).shape == (8, 8, 3)
    assert c.swap(full, other, "image").regions == ()


def test_what_an_example_lacks_is_said(full):
    with pytest.raises(ExampleError, match="example 'a' has no text to keep"):
        c.only(replace(full, context=""), {"text"})
    with pytest.raises(ExampleError, match="example 'b' has no image to exchange"):
        c.swap(full, replace(full, id="b", images=(), regions=()), "image")
    with pytest.raises(ExampleError, match="shows nothing that could be changed"):
        c.noise(Example("a", "what ?"))
    with pytest.raises(ExampleError, match="no clip to freeze"):
        c.frozen(replace(full, videos=()))
    with pytest.raises(ExampleError, match="1 cells a side"):
        c.shuffled(full, cells=1)
    with pytest.raises(ExampleError, match="8 x 8 pixels has no 9 x 9 cells"):
        open_picture(c.shuffled(replace(full, images=(toys.picture(8, 8),)), cells=9).images[0])


def test_nothing_is_opened_before_it_is_asked_for():
    def never():
        raise AssertionError("opened too early")

    lazy = Example("a", "what ?", (never,), videos=(never,), sounds=(never,))
    for made in (c.blank(lazy), c.noise(lazy), c.shuffled(lazy), c.frozen(lazy)):
        with pytest.raises(AssertionError, match="too early"):
            open_video(made.videos[0])


def test_a_blank_tells_nothing_but_its_size(full):
    made = c.blank(full)
    assert set(pixels(made).ravel()) == {c.GREY}
    assert pixels(made).shape == pixels(full).shape
    assert all(set(np.array(frame).ravel()) == {c.GREY} for frame in open_video(made.videos[0]).frames)
    wave = open_sound(made.sounds[0])
    assert len(wave.samples) == 8000
    assert not wave.samples.any()
    assert made.context == full.context
    assert made.regions == ()


def test_noise_differs_by_seed_and_example_and_is_as_loud(full):
    made = pixels(c.noise(full))
    assert np.array_equal(made, pixels(c.noise(full)))
    assert not np.array_equal(made, pixels(c.noise(full, seed=1)))
    assert not np.array_equal(made, pixels(c.noise(replace(full, id="b"))))
    rms = [np.sqrt((open_sound(e.sounds[0]).samples ** 2).mean()) for e in (full, c.noise(full))]
    assert rms[0] == pytest.approx(rms[1], rel=0.05)


def test_shuffled_parts_are_the_same_parts(full):
    before, after = pixels(full), pixels(c.shuffled(full, cells=4))
    assert not np.array_equal(before, after)
    # 40 x 60 has cells of 10 x 15; each is somewhere, whole
    cells = [
        [p[10 * i : 10 * i + 10, 15 * j : 15 * j + 15].tobytes() for i in range(4) for j in range(4)] for p in (before, after)
    ]
    assert sorted(cells[0]) == sorted(cells[1])
    a, b = (open_video(e.videos[0]) for e in (full, c.shuffled(full)))
    assert a.times == b.times
    assert sorted(f.tobytes() for f in a.frames) == sorted(f.tobytes() for f in b.frames)
    assert [f.tobytes() for f in a.frames] != [f.tobytes() for f in b.frames]
    x, y = (open_sound(e.sounds[0]).samples for e in (full, c.shuffled(full, slices=8)))
    assert not np.array_equal(x, y)
    assert sorted(part.tobytes() for part in np.split(x, 8)) == sorted(part.tobytes() for part in np.split(y, 8))


def test_a_rest_that_no_cell_fits_in_stays(full):
    odd = replace(full, images=(toys.picture(41, 61, 1),))
    before, after = pixels(odd), pixels(c.shuffled(odd, cells=4))
    assert np.array_equal(before[40:], after[40:])
    assert np.array_equal(before[:, 60:], after[:, 60:])


def test_a_frozen_clip_has_as_many_frames_and_one_picture(full):
    before, after = open_video(full.videos[0]), open_video(c.frozen(full).videos[0])
    assert len(before.frames) == len(after.frames) == 3  # chosen first, then frozen
    assert {f.tobytes() for f in after.frames} == {before.frames[1].tobytes()}
    assert after.times == before.times
    assert np.array_equal(pixels(c.frozen(full)), pixels(full))
