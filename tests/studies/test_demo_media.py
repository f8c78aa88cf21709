"""Clips and sounds of the bundled world say what the scene says, and reach their models as the real processors give them."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

from probe.loading import load_processor
from studies.demo import build, clip, data, lessons, picture, sound, world
from studies.demo.batches import SHOWS, Batcher, Diet, features_of, frames_of
from studies.demo.pupil import Pupil
from studies.demo.stages import ALL_KINDS, STAGES
from studies.demo.train import CHECKPOINTS, freeze

PARTS = {"video": build.clip_processor, "audio": build.sound_processor}


@pytest.fixture
def rng():
    return np.random.default_rng(6)


@pytest.fixture(scope="module", params=["video", "audio"])
def made(request):
    """A name, its processor, and its model before training, on the language model of `demo:text`."""
    torch.manual_seed(0)
    processor = PARTS[request.param]()
    tokenizer = processor.tokenizer
    if request.param == "video":
        model = build.llava_next_video(build.llava(len(tokenizer), tokenizer.image_token_id), tokenizer.video_token_id)
    else:
        model = build.qwen2_audio(len(tokenizer), tokenizer.audio_token_id)
    return request.param, processor, freeze(model, _teacher()).eval()


def _teacher():
    return LlamaForCausalLM.from_pretrained(CHECKPOINTS / "text", dtype=torch.float32)


def _middle(box):
    return np.array([box[0] + box[2], box[1] + box[3]]) / 2


# --- clips -----------------------------------------------------------------------------------------------------------


def test_clips_are_the_same_each_time_and_a_frame_alone_is_the_frame_of_the_clip(rng):
    for _ in range(5):
        scene = world.sample_scene(rng, moving=True)
        filmed, again = clip.film(scene), clip.film(scene)
        assert filmed.boxes == again.boxes
        assert filmed.times == (0.0, 0.25, 0.5, 0.75)
        for number, frame in enumerate(filmed.frames):
            assert np.array_equal(frame, again.frames[number])
            assert np.array_equal(frame, clip.film(scene, numbers=(number,)).frames[0])
        assert len({frame.tobytes() for frame in filmed.frames}) == clip.FRAMES


def test_boxes_hold_the_colour_in_each_frame(rng):
    checked = 0
    for _ in range(30):
        scene = world.sample_scene(rng, moving=True)
        filmed = clip.film(scene)
        for frame, boxes in zip(filmed.frames, filmed.boxes, strict=True):
            assert set(boxes) == set(scene.things)
            pixels = np.asarray(frame, np.float64)[: -clip.BAR]
            for thing, box in boxes.items():
                assert 0 <= box[0] < box[2] <= picture.SIZE
                assert 0 <= box[1] < box[3] <= picture.SIZE
                if any(_meet(box, other) for one, other in boxes.items() if one is not thing):
                    continue  # one may hide the other
                left, top, right, bottom = map(int, box)
                inside = pixels[top:bottom, left:right].reshape(-1, 3)
                assert (np.abs(inside - np.array(picture.RGB[thing.colour])).max(1) < 70).mean() > 0.08
                checked += 1
    assert checked > 300


def _meet(a, b):
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def test_a_thing_goes_the_way_the_scene_says_and_never_leaves_its_place(rng):
    for _ in range(50):
        scene = world.sample_scene(rng, moving=True)
        boxes = clip.film(scene).boxes
        for thing in scene.things:
            ways = [_middle(later[thing]) - _middle(sooner[thing]) for sooner, later in pairwise(boxes)]
            along = [way @ np.array(clip.STEPS[thing.move]) for way in ways]
            assert min(along) >= 2  # half of it where the edge of the picture cuts the thing
            across = sum(ways) - sum(along) * np.array(clip.STEPS[thing.move])
            assert np.abs(across).max() < 0.4 * sum(along)  # not nothing where the edge cuts a slanting thing
            for frame in boxes:
                assert ((_middle(frame[thing]) // picture.CELL) == (thing.column, thing.row)).all()


def test_one_frame_without_its_bar_does_not_tell_the_direction():
    """What goes right stands, in each frame, where what goes left stands in the frame as far from the end."""
    there, back = (world.Scene((world.Thing("star", "red", 5, move),), 3) for move in ("right", "left"))
    filmed, reversed_ = clip.film(there), clip.film(back)
    for frame, other in zip(filmed.boxes, reversed(reversed_.boxes), strict=True):
        assert frame[there.things[0]] == other[back.things[0]]
    lit = [(np.asarray(frame)[-1].mean(1) > 128).mean() for frame in filmed.frames]
    assert lit == [0.25, 0.5, 0.75, 1.0]


def test_things_without_a_move_stand_still():
    scene = world.Scene((world.Thing("star", "red", 5),), 3)
    assert len({box for frame in clip.film(scene).boxes for box in frame.values()}) == 1


# --- sounds ----------------------------------------------------------------------------------------------------------


def test_sounds_are_the_same_each_time(rng):
    for _ in range(5):
        scene = world.sample_scene(rng)
        samples, spans = sound.play(scene)
        again, same = sound.play(scene)
        assert np.array_equal(samples, again)
        assert spans == same
        assert samples.dtype == np.float32
        assert len(samples) == sound.SAMPLES == 2 * sound.RATE
        assert 0.05 < np.abs(samples).max() <= 1


def _part(samples, span):
    return samples[round(span[0] * sound.RATE) : round(span[1] * sound.RATE)]


def _spectrum(part):
    """Power of each Hz."""
    return np.abs(np.fft.rfft(part * np.hanning(len(part)), sound.RATE)) ** 2


@pytest.mark.parametrize("held_out", [False, True])
def test_each_thing_sounds_in_its_beat_at_the_pitch_of_its_name_and_with_the_breath_of_its_colour(rng, held_out):
    off = []
    for _ in range(40):
        scene = world.sample_scene(rng, held_out)
        samples, spans = sound.play(scene, held_out)
        for thing in scene.things:
            start = (sound.REST + thing.cell * sound.BEAT) / sound.RATE
            assert start <= spans[thing][0] < spans[thing][1] <= start + sound.BEAT / sound.RATE
            power = _spectrum(_part(samples, spans[thing]))
            cents = {
                name: 1200 * np.log2(power[200:].argmax() + 200) - 1200 * np.log2(hz) for name, hz in sound.PITCHES.items()
            }
            heard = min(cents, key=lambda name: abs(cents[name]))
            assert heard == thing.name
            off.append(abs(cents[heard]))
            breath = {colour: power[round(0.95 * hz) : round(1.05 * hz)].sum() for colour, hz in sound.BANDS.items()}
            assert max(breath, key=lambda colour: breath[colour]) == thing.colour
    low, high = sound.CENTS[held_out]
    assert low - 5 < min(off) < max(off) < high + 5  # a Hz is 5 cents of the lowest pitch


def test_beats_of_empty_cells_are_quiet(rng):
    for _ in range(20):
        scene = world.sample_scene(rng)
        samples, spans = sound.play(scene)
        strength = [np.square(_part(samples, spans[thing])).sum() for thing in scene.things]
        beats = samples[sound.REST : -sound.REST].reshape(len(world.CELLS), sound.BEAT)
        empty = [beat for cell, beat in enumerate(beats) if cell not in {thing.cell for thing in scene.things}]
        assert np.median([np.square(beat).sum() for beat in empty]) < 0.2 * min(strength)


# --- the data set ----------------------------------------------------------------------------------------------------


def test_clips_and_sounds_are_examples_with_every_kind_of_question_they_answer():
    clips, sounds = data.examples(16, "clip"), data.examples(14, "sound")
    assert {item.tags["kind"] for item in clips} == set(ALL_KINDS)
    assert {item.tags["kind"] for item in sounds} == set(world.PICTURE_KINDS)
    frames, times = clips[0].videos[0]()
    assert len(frames) == len(times) == clip.FRAMES
    samples, rate = sounds[0].sounds[0]()
    assert samples.shape == (sound.SAMPLES,)
    assert rate == sound.RATE
    assert not clips[0].images + clips[0].sounds + sounds[0].images + sounds[0].videos


# --- the models ------------------------------------------------------------------------------------------------------


def test_training_sees_what_the_processors_give_and_asks_as_the_models_are_asked(made):
    """A row of many questions trains each exactly as it will be asked: alone, through the real processor and model."""
    name, processor, model = made
    telling = STAGES[name][0].tellings[0][0]
    diet = Diet(rows=2, questions=3, kinds=STAGES[name][0].kinds, moving=1.0, unsuffixed=0.0)
    batch = Batcher(processor.tokenizer, 0).draw(diet, telling)
    with torch.no_grad():
        answers = Pupil(model)(batch)[0][::2].view(2, 3, -1)
    batcher = Batcher(processor.tokenizer, 0)
    for row, (scene, questions) in enumerate([batcher._asked(diet, 0.0) for _ in range(diet.rows)]):
        for column, question in enumerate(questions):
            inputs = _processed(name, processor, scene, question.text)
            assert (inputs["input_ids"] == Pupil(model).sense.mark).sum() == SHOWS[telling].positions
            with torch.no_grad():
                alone = model(**inputs).logits[0, -1]
            torch.testing.assert_close(answers[row, column], alone, atol=1e-4, rtol=0)


def _processed(name, processor, scene, question):
    content = [{"type": name}, {"type": "text", "text": f"{question}\n{data.SUFFIX}"}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    if name == "audio":
        samples, _ = sound.play(scene)
        inputs = processor(
            text=text, audio=[samples], sampling_rate=sound.RATE, return_tensors="pt", add_special_tokens=False
        )  # fmt: skip
        assert torch.equal(inputs["input_features"][0], features_of(scene, False))
        return inputs
    tiles = processor.image_processor(list(clip.film(scene).frames), return_tensors="pt")["pixel_values"]
    frames = tiles[:, 0][None]
    torch.testing.assert_close(frames[0], frames_of(scene, False), atol=1e-6, rtol=0)
    marks = processor.replace_video_token({"pixel_values_videos": frames}, 0)
    inputs = processor.tokenizer(text.replace("<video>", marks), return_tensors="pt", add_special_tokens=False)
    return {**inputs, "pixel_values_videos": frames}


def test_a_training_step_reaches_tower_and_connector_and_leaves_the_language_model_as_it_was(made, tmp_path):
    name, processor, model = made
    stage = STAGES[name][0]
    pupil = Pupil(model)
    diet = Diet(rows=2, questions=3, kinds=stage.kinds, moving=1.0)
    batch = Batcher(processor.tokenizer, 0).draw(diet, stage.tellings[0][0])
    loss, total = lessons.losses(stage, pupil, batch)
    assert total > loss > 0
    learning = [weight for weight in pupil.parameters() if weight.requires_grad]
    optimiser = torch.optim.AdamW(learning, lr=1e-3)
    total.backward()
    still = {key for key, weight in model.named_parameters() if weight.requires_grad and weight.grad is None}
    assert still <= {"model.image_newline"}  # of pictures, which this model is not shown
    optimiser.step()
    model.half().save_pretrained(tmp_path)
    saved = type(model).from_pretrained(tmp_path, dtype=torch.float16)
    model.float()
    teacher = LlamaForCausalLM.from_pretrained(CHECKPOINTS / "text", dtype=torch.float16)
    for key, weight in teacher.model.state_dict().items():
        assert torch.equal(weight, saved.model.language_model.state_dict()[key]), key
    assert torch.equal(teacher.lm_head.weight, saved.lm_head.weight)


def test_the_tower_alone_learns_what_stands_where(made):
    """The first lesson's losses fall within a few steps on one batch."""
    _, processor, model = made
    pupil = Pupil(model)
    batch = Batcher(processor.tokenizer, 1).glimpses(4, pupil.sense.telling)
    optimiser = torch.optim.AdamW([*pupil.sense.tower.parameters(), *pupil.cells.parameters()], lr=2e-3)
    course = []
    for _ in range(8):
        pupil.look(batch)
        loss = pupil.cell_loss(batch)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        course.append(loss.item())
    assert course[-1] < 0.7 * course[0]


def test_processors_come_back_from_their_folders(made, tmp_path):
    name, processor, model = made
    build.save(processor, tmp_path)
    model.config.save_pretrained(tmp_path)
    again = load_processor(str(tmp_path), False, None)
    assert type(again).__name__ == type(processor).__name__
    assert again.chat_template == build.TEMPLATE
    scene = world.sample_scene(np.random.default_rng(3))
    for key, value in _processed(name, processor, scene, "any star").items():
        assert torch.equal(value, _processed(name, again, scene, "any star")[key]), key
