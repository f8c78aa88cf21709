"""Towers found in real architectures, and their patches laid over the picture: proved by painting cells."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from probe import Example
from probe.errors import AnatomyError, TokenError
from probe.towers import Tower, find_tower, patches_of, tower_means
from tests import toys

LISTS = {
    "llava": "model.vision_tower.encoder.layers", "llava_pixtral": "model.vision_tower.transformer.layers",
    "qwen2_vl": "model.visual.blocks", "qwen3_vl": "model.visual.blocks", "paligemma": "model.vision_tower.encoder.layers",
    "gemma3": "model.vision_tower.encoder.layers", "internvl": "model.vision_tower.encoder.layer",
    "mllama": "model.vision_model.transformer.layers", "blip2": "vision_model.encoder.layers",
}  # fmt: skip
MAPPED = ("llava", "paligemma", "gemma3", "qwen2_vl", "qwen3_vl")


def read(subject, example, choose):
    return tower_means(subject, subject.encode(example), find_tower(subject), choose)


def hooks(subject):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in subject.model.modules())


def each_patch(count):
    return {str(i): np.array([i]) for i in range(count)}


def test_towers_are_found_in_real_architectures(toy):
    for family, path in LISTS.items():
        found = find_tower(toy(family))
        assert (found.kind, found.path) == ("vision", path)
        assert found.n_layers == len(toy(family).model.get_submodule(path))
    assert len(LISTS) == 9
    assert find_tower(toy("qwen2_audio"), "audio").path == "model.audio_tower.layers"


def test_the_states_that_the_connector_reads(toy):
    assert find_tower(toy("llava")) == Tower("vision", LISTS["llava"], 3, (2,))  # vision_feature_layer is -2
    assert find_tower(toy("qwen2_vl")).read == (2,)
    assert find_tower(toy("qwen3_vl")).read == (1, 2, 3)  # DeepStack reads the first two as well
    assert find_tower(toy("mllama")).read == (1, 2, 3)
    assert find_tower(toy("qwen2_audio"), "audio").read == (2,)


def test_a_model_without_a_tower_is_refused_by_name(toy):
    with pytest.raises(AnatomyError, match="this LLaVA model has no audio tower whose layers could be read"):
        find_tower(toy("llava"), "audio")
    broken = toy("llava")
    anatomy = replace(broken.anatomy, vision="model.vision_tower.embeddings")
    with pytest.raises(AnatomyError, match=r"the vision tower of this LLaVA model .* has no list of attention layers"):
        find_tower(replace(broken, anatomy=anatomy))


def test_states_are_those_that_transformers_gives(toy):
    """LLaVA's tower by itself, asked for its hidden states."""
    subject = toy("llava")
    example = Example("a", "what color is the ball ?", (toys.picture(),))
    groups = {"all": np.arange(17), "some": np.array([2, 5])}
    found = read(subject, example, lambda count: groups)
    with torch.no_grad():
        pixels = subject.encode(example).inputs["pixel_values"]
        states = subject.model.model.vision_tower(pixels, output_hidden_states=True).hidden_states
    assert len(states) == 4
    for name, patches in groups.items():
        slow = torch.stack([state[0, torch.from_numpy(patches)].mean(0) for state in states])
        np.testing.assert_allclose(found[name], slow, atol=1e-6)


@pytest.mark.parametrize("family", MAPPED)
def test_paint_on_a_cell_changes_the_patches_that_the_map_names(toy, family):
    """Before the tower's first layer nothing has mixed: what a painted cell changes is what shows it."""
    subject = toy(family)
    grey = np.full((56, 56, 3), 120, dtype=np.uint8)
    first = "<image>" if family == "paligemma" else ""

    def states(picture):
        example = Example(
            "a", f"{first}what ?" if not subject.processor.chat_template else "what ?", (Image.fromarray(picture),)
        )
        encoded, kept = subject.encode(example), {}

        def choose(count):
            kept["map"] = patches_of(subject, encoded.maps[0], count)
            return each_patch(count)

        found = tower_means(subject, encoded, find_tower(subject), choose)
        return np.stack([found[str(i)][0] for i in range(len(found))]), kept["map"]

    plain, patches = states(grey)
    _, rows, columns = patches.grid.shape
    checked = 0
    for row in range(rows):
        for column in range(columns):
            box = patches.grid.cell(row, column)
            left, top, right, bottom = (round(side) for side in box)
            painted = grey.copy()
            painted[top:bottom, left:right] = (255, 0, 0)
            changed = np.abs(states(painted)[0] - plain).max(1)
            named = patches.covering(box)
            inside = changed[named].min()
            assert inside > 0.1
            assert np.delete(changed, named).max(initial=0) < 0.5 * inside  # resampling bleeds over an edge
            checked += 1
    assert checked == rows * columns >= 4
    assert len(patches.everything) == patches.members.size


def test_towers_whose_patches_have_no_known_place_say_so(toy):
    for family, why in (("qwen2_5_vl", "its windows reorder"), ("llava_pixtral", "its geometry is ragged")):
        subject = toy(family)
        encoded = subject.encode(Example("a", "what ?", (toys.picture(),)))
        with pytest.raises(TokenError, match=why):
            patches_of(subject, encoded.maps[0], 4)
    two = toy("llava").encode(Example("a", "what ?", (toys.picture(), toys.picture(seed=1))))
    with pytest.raises(TokenError, match="known for one picture that is one grid"):
        patches_of(toy("llava"), two.maps[0], 34)


def test_no_hook_stays_and_the_model_answers_as_before(toy):
    subject = toy("llava")
    example = Example("a", "what color is the ball ?", (toys.picture(),))
    before = subject.generate(example), hooks(subject)
    with pytest.raises(ZeroDivisionError):
        read(subject, example, lambda count: 1 / 0)
    read(subject, example, each_patch)
    assert (subject.generate(example), hooks(subject)) == before


def test_one_example_at_a_time(toy, pair):
    subject = toy("llava")
    with pytest.raises(TokenError, match="one example at a time, not for 2"):
        tower_means(subject, subject.encode(pair), find_tower(subject), each_patch)
    words = subject.encode(Example("a", "what ?"))
    with pytest.raises(TokenError, match="the vision tower did not run once"):
        tower_means(subject, words, find_tower(subject), each_patch)


def test_an_ear_is_read_as_well(toy):
    subject = toy("qwen2_audio")
    encoded = subject.encode(Example("a", "what ?", sounds=(toys.sound(),)))
    found = tower_means(subject, encoded, find_tower(subject, "audio"), lambda count: {"shown": np.arange(count)})
    assert found["shown"].shape == (3, 32)
    assert np.isfinite(found["shown"]).all()
