"""The token map: every position has its place, proved by paint."""

from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from probe import Example, Grid, Mass, Region, Residual, Subject, TokenMap, load, trace
from probe.anatomy import ROWS
from probe.errors import ExampleError, TokenError
from probe.mapping import NO_ROW
from probe.tracing import last_logits
from tests import toys

# Sizes that resize, crop, pad and tile differently: landscape, portrait, square, extreme.
SIZES = [(40, 60), (60, 40), (56, 56), (28, 90), (91, 30)]
PLACED = [
    name for name, row in zip(toys.FAMILIES, ROWS.values(), strict=True) if row.geometry not in (None, "resampled", "crossed")
]
CASES = [(family, size) for family in PLACED for size in (SIZES if family in toys.PLAIN else SIZES[::4])]


def test_all_families_and_sizes_are_painted():
    assert len(PLACED) == 19
    assert len(CASES) == 30 + 13 * 2


@cache
def _unmixed(family: str) -> Subject:
    """A toy whose vision layers add nothing: each position sees its own pixels only."""
    model, processor = toys.build(family)
    subject = load((model, processor))
    for tower in filter(None, (subject.anatomy.vision, subject.anatomy.audio)):
        for blocks in (m for m in model.get_submodule(tower).modules() if isinstance(m, torch.nn.ModuleList) and len(m) >= 2):
            for weight in blocks.parameters():
                torch.nn.init.zeros_(weight)
    return subject


def painted(family: str, image: Image.Image) -> tuple[torch.Tensor, TokenMap]:
    """What enters the first decoder layer (position width), and the map."""
    subject = _unmixed(family)
    encoded = subject.encode(Example("a", "is there a dog ?", (image,)))
    found = trace(subject, encoded, [Residual("resid_pre", layers=[0])])
    return found["states"].tensor[0, 0], encoded.maps[0]


@pytest.mark.parametrize(("family", "size"), CASES)
def test_painting_a_cell_moves_exactly_its_positions(family, size):
    height, width = size
    rng = np.random.default_rng(height * width)
    pixels = rng.integers(90, 160, (height, width, 3), dtype=np.uint8)
    clean, token_map = painted(family, Image.fromarray(pixels))
    grid = token_map.grids[-1]
    _, rows, columns = grid.shape
    tried = 0
    for row, column in {(0, 0), (rows - 1, columns - 1), (rows // 2, columns // 3), (0, columns - 1)}:
        left, top, right, bottom = grid.cell(row, column)
        # The middle of the cell, away from its neighbours: a resize smears paint by up to two of its own pixels.
        margin_x, margin_y = (right - left) * 0.36, (bottom - top) * 0.36
        box = (
            int(np.floor(left + margin_x)),
            int(np.floor(top + margin_y)),
            int(np.ceil(right - margin_x)),
            int(np.ceil(bottom - margin_y)),
        )
        if box[0] < 0 or box[1] < 0 or box[2] > width or box[3] > height or box[0] >= box[2] or box[1] >= box[3]:
            continue
        tried += 1
        changed = pixels.copy()
        changed[box[1] : box[3], box[0] : box[2]] = 255 - changed[box[1] : box[3], box[0] : box[2]] // 3
        after, _ = painted(family, Image.fromarray(changed))
        moved = (after - clean).abs().amax(-1).numpy()
        at = int(grid.positions[0, row, column])
        assert moved[at] > 1e-4, (row, column)
        own = set(token_map.in_boxes([Region(tuple(float(v) for v in box))]).tolist())
        assert at in own
        strongest = set(np.nonzero(moved > 0.35 * moved[list(own)].max())[0].tolist())
        assert strongest <= own, (row, column, strongest - own)
        text = np.setdiff1d(np.arange(len(moved)), np.concatenate(token_map.pictures))
        assert moved[text].max() == 0
        newlines = [p for run in token_map.pictures for p in run if token_map.segments[p] == "separator"]
        assert moved[newlines].max(initial=0.0) == 0
    assert tried >= 2


@pytest.mark.parametrize("family", ["llava", "qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_a_patch_of_the_processors_own_pixels_moves_exactly_its_position(family):
    """Where the picture already has the processor's size nothing smears: exactly the cell's positions move, to the last bit."""
    side = 28 if family == "llava" else 56
    pixels = np.random.default_rng(3).integers(60, 200, (side, side, 3), dtype=np.uint8)
    clean, token_map = painted(family, Image.fromarray(pixels))
    grid = token_map.grids[0]
    _, rows, columns = grid.shape
    seen = 0
    for row in range(rows):
        for column in range(columns):
            left, top, right, bottom = (round(v) for v in grid.cell(row, column))
            changed = pixels.copy()
            changed[top:bottom, left:right] = 255 - changed[top:bottom, left:right]
            after, _ = painted(family, Image.fromarray(changed))
            moved = np.nonzero((after != clean).any(-1).numpy())[0].tolist()
            assert moved == [int(grid.positions[0, row, column])]
            box = (float(left), float(top), float(right), float(bottom))
            assert token_map.in_boxes([Region(box)]).tolist() == moved
            seen += 1
    assert seen == rows * columns == 16


def crossing(image: Image.Image) -> tuple[torch.Tensor, TokenMap]:
    """What Mllama's cross-attention layers read (key width), and the map of those keys."""
    subject = _unmixed("mllama")
    encoded = subject.encode(Example("a", "is there a dog ?", (image,)))
    seen: list[torch.Tensor] = []
    handle = subject.model.get_submodule(subject.anatomy.connector).register_forward_hook(lambda m, a, out: seen.append(out))
    try:
        last_logits(subject, encoded)
    finally:
        handle.remove()
    assert encoded.maps[0].crossed is not None
    return seen[0].flatten(0, -2), encoded.maps[0].crossed


@pytest.mark.parametrize("size", [(28, 56), (56, 56), (56, 28)])
def test_painting_a_patch_of_a_crossed_picture_moves_exactly_its_key(size):
    """Pictures of whole tiles, so that nothing smears; the tiles that no picture fills are padding."""
    pixels = np.random.default_rng(3).integers(60, 200, (*size, 3), dtype=np.uint8)
    clean, keys = crossing(Image.fromarray(pixels))
    grid = keys.grids[0]
    _, rows, columns = grid.shape
    assert (rows, columns) == (size[0] // 7, size[1] // 7)
    assert len(keys) == len(clean) == 4 * 17
    assert keys.segments.count("pad") == len(keys) - size[0] * size[1] // 28**2 * 17
    for row, column in ((0, 0), (rows - 1, columns - 1), (rows // 2, columns // 3)):
        changed = pixels.copy()
        changed[row * 7 : row * 7 + 7, column * 7 : column * 7 + 7] //= 2
        after, _ = crossing(Image.fromarray(changed))
        assert np.nonzero((after != clean).any(-1).numpy())[0].tolist() == [int(grid.positions[0, row, column])]


@pytest.mark.parametrize("family", ["qwen2_audio", "qwen2_5_omni"])
def test_painting_a_slice_of_sound_moves_its_positions_most(family):
    """The encoder's convolutions reach one frame further and its attention is switched off: what moves lies where it sounds."""
    subject = _unmixed(family)
    samples, rate = toys.sound(0.75)
    images = (toys.picture(),) if "image" in subject.marks else ()
    pieces = 0
    for start in (0.1, 0.3, 0.5):
        changed = samples.copy()
        changed[int(start * rate) : int((start + 0.12) * rate)] *= -0.2
        states = []
        for sound in (samples, changed):
            encoded = subject.encode(Example("a", "is there a dog ?", images, sounds=((sound, rate),)))
            states.append(trace(subject, encoded, [Residual("resid_pre", layers=[0])])["states"].tensor[0, 0])
        token_map = encoded.maps[0]
        grid = next(grid for grid in token_map.grids if grid.kind == "audio")
        moved = (states[1] - states[0]).abs().amax(-1).numpy()
        own = set(grid.during(start - 0.05, start + 0.17).tolist())
        assert set(np.nonzero(moved > 0.35 * moved.max())[0].tolist()) <= own
        assert moved[np.setdiff1d(np.arange(len(moved)), token_map.positions("audio"))].max() == 0
        assert grid.times[0][0] == 0.0
        assert abs(grid.times[-1][1] - 0.75) <= 0.04
        pieces += 1
    assert pieces == 3


@pytest.mark.parametrize("family", toys.PLAIN)
def test_segments_partition_the_prompt_and_say_what_they_say(toy, pair, family):
    subject = toy(family)
    example = Example(
        "a",
        "what color is the ball ?",
        (toys.picture(), toys.picture(30, 30, 2)),
        context="the cat sat",
        options="red or blue",
        suffix="one two",
    )
    token_map = subject.encode(example).maps[0]
    for segment, text in (
        ("question", "what color is the ball ?"),
        ("context", "the cat sat"),
        ("options", "red or blue"),
        ("suffix", "one two"),
    ):
        said = "".join(token_map.spellings[p] for p in token_map.positions(segment))
        assert said.strip() == text
    assert token_map.segments[token_map.positions("real")[0]] == "bos"
    assert "".join(token_map.spellings[p] for p in token_map.positions("header")).strip() == "ASSISTANT:"
    assert token_map.last == len(token_map) - 1
    assert len(token_map.pictures) == 2
    ids = np.array(token_map.tokens)
    runs = np.concatenate(token_map.pictures)
    assert sorted(runs.tolist()) == np.nonzero(ids == subject.anatomy.image_token_id)[0].tolist()
    covered = np.concatenate([g.positions.ravel() for g in token_map.grids])
    assert sorted(covered.tolist()) == token_map.positions("image").tolist()
    assert sum(stop - start for _, start, stop in token_map.spans()) == len(token_map)


def test_a_placeholder_in_the_prompt_says_where_the_picture_goes(toy):
    subject = toy("llava")
    token_map = subject.encode(Example("a", "the cat <image> is there a dog ?", (toys.picture(),))).maps[0]
    image = token_map.positions("image")
    said = "".join(token_map.spellings[p] for p in range(image[0]))
    assert said.endswith("the cat ")


def test_a_word_that_the_header_holds_too_is_found_in_the_question(toy):
    """`A` and `T` begin and end pieces of `ASSISTANT:`: what opens the answer is no place for a question."""
    for word in ("A", "ANT", "ASSISTANT"):
        token_map = toy("llava").encode(Example("a", word, (toys.picture(),))).maps[0]
        assert "".join(token_map.spellings[p] for p in token_map.positions("question")).strip() == word
        assert "".join(token_map.spellings[p] for p in token_map.positions("header")).strip() == "ASSISTANT:"


def test_an_example_with_fewer_pictures_has_padded_keys(toy):
    subject = toy("mllama")
    one, two = (Example(str(n), "what ?", tuple(toys.picture(seed=i) for i in range(n))) for n in (1, 2))
    keys = [token_map.crossed for token_map in subject.encode([one, two]).maps]
    assert [len(k) for k in keys] == [2 * 4 * 17] * 2
    assert keys[0].segments[4 * 17 :] == ("pad",) * (4 * 17)
    mass = trace(subject, [one, two], [Mass(("last",))])["mass"].tensor
    torch.testing.assert_close(mass.sum(-1), torch.ones_like(mass[..., 0]), atol=1e-5, rtol=0)


def test_padding_shifts_everything(toy, pair):
    subject = toy("llava")
    left, right = (min(subject.encode(pair, side).maps, key=lambda m: len(m.positions("real"))) for side in ("left", "right"))
    shift = left.segments.count("pad")
    assert shift > 0
    assert right.segments.count("pad") == shift
    assert (left.positions("image") - shift).tolist() == right.positions("image").tolist()
    assert (left.grids[0].positions - shift).tolist() == right.grids[0].positions.tolist()
    assert left.last == len(left) - 1
    assert right.last == len(right) - 1 - shift


boxes = st.tuples(st.floats(-20, 90), st.floats(-20, 90), st.floats(0.5, 60), st.floats(0.5, 60)).map(
    lambda b: (b[0], b[1], b[0] + b[2], b[1] + b[3])
)


@settings(max_examples=200, deadline=None)
@given(box=boxes, rows=st.integers(1, 9), columns=st.integers(1, 9))
def test_covering_is_the_obvious_overlap(box, rows, columns):
    grid = Grid(0, np.arange(rows * columns).reshape(1, rows, columns), (-5.0, 3.0, 75.0, 60.0))
    found = {tuple(cell) for cell in grid.covering(box).tolist()}
    for row in range(rows):
        for column in range(columns):
            left, top, right, bottom = grid.cell(row, column)
            across = min(box[2], right) - max(box[0], left)
            down = min(box[3], bottom) - max(box[1], top)
            share = min(across / (right - left), down / (bottom - top))
            if share > 2e-3:
                assert (row, column) in found
            if share < 0:
                assert (row, column) not in found


def test_unknown_geometry_is_refused_by_name(toy):
    token_map = TokenMap(("bos", "image", "question"), placeless=NO_ROW)
    with pytest.raises(TokenError, match=r"no known place in the picture: add its geometry to probe/anatomy/rows.py"):
        token_map.in_boxes([Region((0.0, 0.0, 1.0, 1.0))])
    with pytest.raises(TokenError, match=r"there is no token group 'imag' .did you mean 'image'"):
        token_map.positions("imag")
    with pytest.raises(TokenError, match="positions run from 0 to 2, not 5 to 5"):
        token_map.positions([5])


@pytest.mark.parametrize(
    ("prompt", "count", "message"),
    [
        ("<image> and <image> what ?", 1, r"has 2 places for pictures \(<image>\) but 1 picture\(s\) came with it"),
        ("<image> what ?", 2, r"has 1 places for pictures \(<image>\) but 2 picture\(s\) came with it"),
        ("<image> what ?", 0, r"has 1 places for pictures \(<image>\) but 0 picture\(s\) came with it"),
    ],
)
def test_places_and_pictures_must_match(toy, prompt, count, message):
    with pytest.raises(ExampleError, match=message):
        toy("llava").encode(Example("a", prompt, tuple(toys.picture(seed=i) for i in range(count))))


def test_without_a_chat_template_the_prompt_needs_a_place(toy):
    model, processor = toys.build("llava")
    processor.chat_template = None
    subject = load((model, processor))
    with pytest.raises(
        ExampleError, match="has no place for its picture, and the model no chat template to make one: write <image>"
    ):
        subject.encode(Example("a", "what ?", (toys.picture(),)))
    assert "image" in subject.encode(Example("a", "<image> what ?", (toys.picture(),))).maps[0].segments


@pytest.mark.parametrize("prompt", ["", "   ", "\n"])
def test_an_empty_prompt_is_refused(prompt):
    with pytest.raises(ExampleError, match="has an empty prompt: it needs a question"):
        Example("a", prompt)


def test_a_region_needs_its_picture_and_an_area():
    with pytest.raises(ExampleError, match="has a region in picture 0 but 0 pictures"):
        Example("a", "what ?", regions=(Region((0.0, 0.0, 1.0, 1.0)),))
    with pytest.raises(ExampleError, match="left < right and top < bottom"):
        Region((3.0, 0.0, 3.0, 1.0))
