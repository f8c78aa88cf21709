"""Clips and sounds: opened with one sentence where they cannot be, laid out frame by frame, proved by paint."""

import numpy as np
import pytest
import torch
from PIL import Image

from probe import Example, Residual, load, trace
from probe.anatomy import ROWS
from probe.errors import ExampleError, TokenError
from probe.frames import spans
from probe.media import Clip, Video, Wave, chosen_frames, open_sound, open_video
from probe.tracing import last_logits
from tests import toys

FILMED = [name for name, row in zip(toys.FAMILIES, ROWS.values(), strict=True) if row.videos]
TIMES = (0.0, 0.5, 1.0, 1.5)


def frames(seed: int = 0) -> list[Image.Image]:
    return [toys.picture(56, 56, seed + i) for i in range(4)]


def filmed(subject, pictures) -> tuple[torch.Tensor, object]:
    """What enters the first layer of the language model (position width), and the map."""
    example = Example("a", "is there a dog ?", videos=(lambda: Clip(tuple(pictures), TIMES),))
    encoded = subject.encode(example)
    return trace(subject, encoded, [Residual("resid_pre", layers=[0])])["states"].tensor[0, 0], encoded.maps[0]


def test_five_families_take_clips():
    assert FILMED == ["llava_onevision", "video_llava", "llava_next_video", "qwen2_vl", "qwen2_5_vl"]


@pytest.mark.parametrize("family", FILMED)
def test_painting_a_frame_moves_exactly_its_positions(family):
    model, processor = toys.build(family)
    subject = load((model, processor))
    pictures = frames()
    clean, token_map = filmed(subject, pictures)
    grid = next(grid for grid in token_map.grids if grid.kind == "video")
    together = 2 if "qwen" in family else 1
    assert grid.shape[0] == 4 // together
    assert grid.times[0] == (0.0, 0.5 * together)
    assert grid.times[-1][1] == 2.0
    assert sorted(grid.positions.ravel().tolist()) == token_map.positions("video").tolist()
    seen = 0
    for number in range(4):
        changed = list(pictures)
        changed[number] = toys.picture(56, 56, 50 + number)
        after, _ = filmed(subject, changed)
        moved = np.nonzero((after != clean).any(-1).numpy())[0]
        own = set(grid.positions[number // together].ravel().tolist())
        assert (
            own
            <= set(moved.tolist())
            <= own | set(token_map.positions("media").tolist()) - set(token_map.positions("video").tolist())
        )
        assert set(grid.during(TIMES[number] + 0.1, TIMES[number] + 0.2).tolist()) == own
        seen += 1
    assert seen == 4


@pytest.mark.parametrize("family", FILMED)
def test_a_batch_of_clips_is_its_clips_alone(toy, family):
    subject = toy(family)
    examples = [
        Example(name, prompt, videos=(lambda seed=seed: Clip(tuple(frames(seed)), TIMES),))
        for seed, (name, prompt) in enumerate((("a", "what color is the ball ?"), ("b", "is there a dog in the park ?")))
    ]
    alone = torch.cat([last_logits(subject, subject.encode(example)) for example in examples])
    for side in ("left", "right"):
        torch.testing.assert_close(last_logits(subject, subject.encode(examples, side)), alone, atol=1e-5, rtol=0)
    assert len(subject.generate(examples, 2)) == 2


def test_a_still_clip_of_qwen_is_its_picture(toy):
    """A picture is a pair of the same frame: a clip of one frame gives the same logits but for the marks around it."""
    subject = toy("qwen2_vl")
    picture = toys.picture(56, 56)
    still = subject.encode(Example("a", "is there a dog ?", videos=(lambda: Clip((picture,), (0.0,)),)))
    shown = subject.encode(Example("a", "is there a dog ?", (picture,)))
    assert torch.equal(still.inputs["pixel_values_videos"], shown.inputs["pixel_values"])


def test_clips_of_different_lengths_are_not_one_batch(toy):
    subject = toy("llava_next_video")
    examples = [Example(str(n), "what ?", videos=(lambda n=n: Clip(tuple(frames()[:n]), TIMES[:n]),)) for n in (2, 3)]
    with pytest.raises(ExampleError, match="the clips of a batch differ in their number of frames"):
        subject.encode(examples)


def test_a_model_that_takes_no_clips_says_what_it_takes(toy):
    with pytest.raises(ExampleError, match=r"takes pictures only .llava.: example 'a' shows it 1 video"):
        toy("llava").encode(Example("a", "what ?", videos=(lambda: Clip(tuple(frames()), TIMES),)))


@pytest.mark.parametrize(
    ("count", "wanted", "policy", "chosen"),
    [
        (10, 4, "uniform", [0, 3, 6, 9]), (10, 1, "uniform", [0]), (3, 8, "uniform", [0, 1, 2]), (1, 8, "middle", [0]),
        (10, 2, "middle", [2, 7]), (10, 3, "first", [0, 1, 2]),
    ],
)  # fmt: skip
def test_policies_choose_by_hand(count, wanted, policy, chosen):
    assert chosen_frames(count, wanted, policy) == chosen


def test_a_video_file_and_a_folder_of_frames_are_opened(tmp_path):
    av = pytest.importorskip("av")
    with av.open(str(tmp_path / "a.mp4"), "w") as container:
        stream = container.add_stream("mpeg4", rate=5)
        stream.width = stream.height = 32
        for i in range(10):
            frame = av.VideoFrame.from_image(Image.new("RGB", (32, 32), (25 * i, 0, 0)))
            for packet in stream.encode(frame):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    clip = open_video(Video(tmp_path / "a.mp4", frames=3))
    assert len(clip.frames) == 3
    np.testing.assert_allclose(clip.times, [0.0, 0.8, 1.8], atol=0.21)
    reds = [np.asarray(frame)[..., 0].mean() for frame in clip.frames]
    assert reds == sorted(reds)
    (tmp_path / "frames").mkdir()
    for i in range(4):
        toys.picture(seed=i).save(tmp_path / "frames" / f"{i}.png")
    folder = open_video(Video(tmp_path / "frames", frames=2, fps=2.0))
    assert folder.times == (0.0, 1.5)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: None, "there is no video at"),
        (lambda p: p.write_bytes(b""), "is empty: a video was expected"),
        (lambda p: p.write_bytes(b"nothing of the kind" * 99), "cannot be decoded as a video"),
        (lambda p: p.mkdir(), "holds no frames: pictures whose names sort in time order were expected"),
    ],
)
def test_a_broken_video_is_one_sentence(tmp_path, make, message):
    make(tmp_path / "v.mp4")
    with pytest.raises(ExampleError, match=message):
        open_video(tmp_path / "v.mp4")


def test_a_clip_of_no_frames_and_of_wrong_times():
    with pytest.raises(ExampleError, match="a clip without frames shows nothing"):
        Clip((), ())
    with pytest.raises(ExampleError, match="a clip of 1 frames needs as many times, not 2"):
        Clip((toys.picture(),), (0.0, 1.0))
    with pytest.raises(ExampleError, match="frames are chosen by uniform, middle or first, not 'last'"):
        Video("v.mp4", policy="last")


def test_spans_of_short_and_odd_clips_cover_their_time():
    pictures = tuple(frames())
    assert spans(Clip(pictures[:1], (2.0,))) == ((2.0, 3.0),)
    assert spans(Clip(pictures[:2], (0.0, 1.0)), 2) == ((0.0, 2.0),)
    assert spans(Clip(pictures[:3], (0.0, 0.5, 1.0)), 2) == ((0.0, 1.0), (1.0, 1.5))


def test_qwens_clock_is_told_how_long_a_step_is(toy):
    """Qwen2.5-VL counts time in seconds: two frames 4 s apart make steps of 8 s, and its positions say so."""
    subject = toy("qwen2_5_vl")
    slow, fast = (
        subject.encode(
            Example("a", "what ?", videos=(lambda step=step: Clip(tuple(frames()), (0.0, step, 2 * step, 3 * step)),))
        )
        for step in (4.0, 0.5)
    )
    assert [float(e.inputs["second_per_grid_ts"][0]) for e in (slow, fast)] == [8.0, 1.0]
    assert not torch.equal(last_logits(subject, slow), last_logits(subject, fast))
    assert (
        "second_per_grid_ts"
        not in toy("qwen2_vl").encode(Example("a", "what ?", videos=(lambda: Clip(tuple(frames()), TIMES),))).inputs
    )


def test_a_sound_longer_than_the_model_hears_is_refused(toy):
    with pytest.raises(TokenError, match=r"a sound of 3.0 s is longer than the 1.0 s that the model hears: cut it into pieces"):
        toy("qwen2_audio").encode(Example("a", "what ?", sounds=(toys.sound(3.0),)))


def test_sounds_are_mixed_down_and_resampled(tmp_path):
    import soundfile

    t = np.arange(22_050) / 22_050
    tone = np.sin(2 * np.pi * 440 * t).astype(np.float32)
    soundfile.write(tmp_path / "a.flac", np.stack([tone, tone], 1) / 2, 22_050)
    wave = open_sound(tmp_path / "a.flac")
    assert (wave.samples.shape, wave.rate) == ((22_050,), 22_050)
    resampled = wave.at(16_000)
    assert len(resampled.samples) == 16_000
    assert np.abs(np.fft.rfft(resampled.samples)).argmax() == 440
    assert wave.at(22_050) is wave


@pytest.mark.parametrize(
    ("sound", "message"),
    [
        ((np.array([0.1, np.nan], np.float32), 16_000), "holds values that are not numbers"),
        ((np.array([], np.float32), 16_000), "has no samples"),
        ((np.zeros(4, np.float32), 0), "has a sampling rate of 0: a positive number"),
        ("/nowhere/a.wav", "there is no sound at /nowhere/a.wav"),
    ],
)
def test_a_broken_sound_is_one_sentence(sound, message):
    with pytest.raises(ExampleError, match=message):
        open_sound(sound)


def test_a_file_that_is_no_sound(tmp_path):
    (tmp_path / "a.wav").write_bytes(b"no sound")
    with pytest.raises(ExampleError, match="cannot be read as a sound"):
        open_sound(tmp_path / "a.wav")
    assert Wave(np.zeros(8_000, np.float32), 16_000).seconds == 0.5
