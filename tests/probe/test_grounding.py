"""Attention over the picture: scores against slow oracles, maps against eager attention, and the mask head."""

import math

import numpy as np
import pytest
import torch

from probe import Example, Region
from probe.analysis.grounding import (
    auc,
    box_iou,
    box_mask,
    centred_box,
    elbow,
    foreground,
    largest_box,
    localisation_heads,
    mask_iou,
    otsu,
    pointing,
    score_map,
    spatial_entropy,
)
from probe.errors import DataError, StudyError, TokenError
from probe.grounding import PictureMaps, Target, find_targets, read_maps
from probe.mask_head import MaskHead, mask_loss
from probe.words import phrase_in, positions_of
from tests import toys
from tests.oracles import grounding as oracle
from tests.oracles.attention import eager_patterns

PLACED = ("llava", "llava_next", "qwen2_vl")


def _tables(count=12, shape=(7, 6)):
    """Maps with ties, with a plateau, and smooth ones."""
    rng = np.random.default_rng(0)
    for number in range(count):
        table = rng.random(shape)
        yield (np.round(table * 4) if number % 3 == 0 else table**3), rng.random(shape) < 0.3


def test_scores_agree_with_obvious_versions():
    seen = 0
    for table, mask in _tables():
        assert auc(table[None], mask)[0, 0] == pytest.approx(oracle.auc(table, mask))
        marked = foreground(table)
        assert (marked == oracle.otsu_mask(table)).all()
        assert mask_iou(marked, mask) == pytest.approx(oracle.iou(marked, mask))
        assert spatial_entropy(table) == pytest.approx(oracle.entropy(table))
        largest = max(oracle.pieces(marked), key=len)
        sizes = sorted(len(piece) for piece in oracle.pieces(marked))
        if sizes[-1] > (sizes[-2] if len(sizes) > 1 else 0):
            assert largest_box(marked) == pytest.approx(oracle.box_of(largest, table.shape))
            seen += 1
    assert seen >= 6


def test_scores_small_enough_to_check_by_hand():
    mask = np.array([[True, True], [False, False]])
    assert auc(np.array([[[4.0, 3.0], [2.0, 1.0]]]), mask)[0, 0] == 1
    assert auc(np.array([[[4.0, 1.0], [2.0, 2.0]]]), mask)[0, 0] == 0.5
    assert auc(np.ones((1, 2, 2)), mask)[0, 0] == 0.5  # a uniform map
    assert np.isnan(auc(np.ones((1, 2, 2)), np.ones((2, 2), bool))).all()
    assert mask_iou(mask, np.array([[True, False], [True, False]])) == pytest.approx(1 / 3)
    assert mask_iou(np.zeros((2, 2), bool), np.zeros((2, 2), bool)) == 0
    assert box_iou((0.0, 0.0, 2.0, 2.0), (1.0, 1.0, 3.0, 3.0)) == pytest.approx(1 / 7)
    assert box_iou((0.0, 0.0, 1.0, 1.0), (1.0, 0.0, 2.0, 1.0)) == 0
    assert otsu(np.array([[0.0, 0.0], [1.0, 3.0]])) == pytest.approx(2.0)
    assert otsu(np.array([5.0, 5.0])) == 5
    assert not foreground(np.ones((3, 3))).any()
    assert foreground(np.array([[0.0, 0.0, 0.0, 4.0]]), "std").tolist() == [[False, False, False, True]]
    assert pointing(np.array([[1.0, 2.0], [2.0, 0.0]]), mask) == 0.5  # two maxima, one of them inside
    assert largest_box(np.zeros((2, 2), bool)) is None
    assert largest_box(np.array([[1, 0, 0, 1], [0, 1, 0, 1], [0, 0, 0, 0]], bool)) == (0.0, 0.0, 0.5, 2 / 3)  # by a corner
    assert spatial_entropy(np.array([[1.0, 0.0, 1.0]])) == pytest.approx(math.log(2))
    assert spatial_entropy(np.array([[1.0, 1.0, 0.0]])) == 0
    assert spatial_entropy(np.ones((2, 3))) == pytest.approx(math.log(6))
    assert elbow(np.array([1.0, 0.0, 10.0, 9.0])) == 9  # two stand out
    assert elbow(np.array([0.0, 9.0, 8.0, 10.0])) == 8  # one falls off
    assert elbow(np.array([3.0, 2.0, 1.0, 0.0])) == 0  # no bend
    assert elbow(np.array([2.0, 2.0, 2.0])) == 2
    with pytest.raises(StudyError, match=r"no threshold 'otso' \(did you mean 'otsu'\?\)"):
        foreground(np.ones((2, 2)), "otso")


def test_boxes_as_cells():
    assert np.argwhere(box_mask([(0.25, 0.5, 0.75, 0.75)], 4)).tolist() == [[2, 1], [2, 2]]
    assert box_mask([(0.51, 0.51, 0.52, 0.52)], 4).sum() == 1  # too thin for any centre: the cell it lies in
    assert box_mask([(0.0, 0.0, 0.25, 0.25), (0.75, 0.75, 1.0, 1.0)], 4).sum() == 2
    assert not box_mask([(1.2, 0.0, 1.5, 1.0)], 4).any()
    assert not box_mask([], 4).any()


@pytest.mark.parametrize("rule", ["otsu", "std"])
def test_a_map_that_is_the_box_scores_one(rule):
    box = (0.25, 0.5, 0.5, 0.75)
    table = box_mask([box], 16).astype(float)
    assert score_map(table, [box], rule=rule) == (1, 1, 1, 1, 1)
    assert score_map(1 - table, [box], rule=rule)[3:] == (0, 0)
    assert score_map(np.ones((16, 16)), [box], rule=rule) == pytest.approx((0, 0, 0, 1 / 16, 0.5))


def test_the_centred_box_is_where_it_says():
    table, marked = centred_box((0.5, 0.25), 16)
    assert mask_iou(marked, box_mask([(0.25, 0.375, 0.75, 0.625)], 16)) == 1
    assert (table > -1).sum() == marked.sum()
    assert score_map(table, [(0.25, 0.375, 0.75, 0.625)], marked) == pytest.approx((1, 1, 1, 1, 1))


def test_localisation_heads_look_at_one_place_of_the_picture():
    mass = np.tile([0.9, 0.8, 0.85, 0.01, 0.02, 0.0], (4, 1))
    entropy = np.tile([2.0, 0.1, 0.5, 0.0, 0.0, 0.0], (4, 1))
    assert localisation_heads(mass, entropy, count=2, best=2) == [1, 2]  # the least scattered heads do not look at the picture
    assert localisation_heads(mass, entropy, count=9) == [1, 2, 0]
    entropy[:3, 2] = 0.05  # three of four examples name head 2 before head 1, whose mean is the lower
    entropy[3, 2] = 1.9
    assert localisation_heads(mass, entropy, count=1, best=1) == [2]


# --- words -----------------------------------------------------------------------------------------------------------


def test_which_words_speak_of_a_label():
    assert phrase_in("red circle", "what color is the circle ?") == ("circle", [(18, 24)])
    assert phrase_in("red circle", "Is the RED circle here ?") == ("red circle", [(7, 17)])
    assert phrase_in("red circle", "is the circle red ?")[0] == "circle"  # of runs of one length, the noun
    assert phrase_in("the ball", "what is the cat doing ?") == ("", [])  # an article names nothing
    assert phrase_in("cat", "concatenate , then cat a cat") == ("cat", [(19, 22), (25, 28)])
    assert phrase_in("", "what ?") == ("", [])


@pytest.mark.parametrize("family", PLACED)
@pytest.mark.parametrize("padding", ["left", "right"])
def test_the_tokens_of_a_phrase_spell_it(toy, pair, family, padding):
    subject = toy(family)
    encoded = subject.encode(pair, padding)
    for example, token_map, label in zip(pair, encoded.maps, ("red ball", "dog in the park"), strict=True):
        phrase, places = positions_of(subject, example, token_map, label)
        assert phrase == {"red ball": "ball"}.get(label, label)
        spelt = subject.tokenizer.decode([token_map.tokens[place] for place in places])
        assert spelt.strip() == phrase
        assert {token_map.segments[place] for place in places} == {"question"}
        assert positions_of(subject, example, token_map, "unicorn") == ("", ())


# --- maps ------------------------------------------------------------------------------------------------------------


def test_a_raster_is_bilinear_in_the_pictures_own_place():
    rng = np.random.default_rng(0)
    cases = [
        ((0.0, 0.0, 60.0, 40.0), (60, 40)), ((10.0, 0.0, 50.0, 40.0), (60, 40)), ((0.0, -10.0, 60.0, 50.0), (60, 40)),
    ]  # fmt: skip
    for area, size in cases:
        values = rng.random((3, 5))
        found = PictureMaps(((torch.from_numpy(values)[None], area),), size).raster(9)[0]
        np.testing.assert_allclose(found, oracle.raster(values, area, size, 9), atol=1e-5)


def test_a_raster_keeps_what_a_map_holds():
    part = torch.rand(2, 4, 4)
    maps = PictureMaps(((part, (0.0, 0.0, 8.0, 8.0)), (torch.ones(2, 2, 2), (0.0, 0.0, 8.0, 8.0))), (8, 8))
    torch.testing.assert_close(maps.mass, part.sum((1, 2)) + 4)
    torch.testing.assert_close(maps.shared().mass, torch.ones(2))
    torch.testing.assert_close(PictureMaps(maps.parts[1:], (8, 8)).raster(16).sum((1, 2)), torch.full((2,), 4.0))
    assert maps.finest.shape == (2, 4, 4)
    torch.testing.assert_close(maps.averaged(2).mass, maps.mass)
    torch.testing.assert_close(maps.averaged().mass, maps.mass.mean(0, keepdim=True))
    torch.testing.assert_close(maps.over(maps).finest, torch.ones(2, 4, 4))


@pytest.mark.parametrize("family", PLACED)
@pytest.mark.parametrize("padding", ["left", "right"])
def test_maps_are_eager_attention_reshaped(toy, pair, family, padding):
    subject = toy(family)
    encoded = subject.encode(pair, padding)
    patterns = torch.stack(eager_patterns(subject, encoded))  # layer batch head query key
    targets = []
    for example, token_map, label in zip(pair, encoded.maps, ("ball", "dog in the park"), strict=True):
        phrase, places = positions_of(subject, example, token_map, label)
        targets.append([Target(phrase, places, 0, ((0.1, 0.1, 0.4, 0.4),))])
    for merge in ("mean", "max"):
        found, layers = read_maps(subject, encoded, targets, merge)
        assert layers == list(range(subject.n_layers))
        checked = 0
        for i, token_map in enumerate(encoded.maps):
            rows = patterns[:, i][:, :, list(targets[i][0].positions)]
            wanted = {"word": rows.mean(2) if merge == "mean" else rows.amax(2), "last": patterns[:, i, :, token_map.last]}
            for source, row in wanted.items():
                maps = found[i][0][source]
                assert len(maps.parts) == len(token_map.grids)
                for (part, area), grid in zip(maps.parts, token_map.grids, strict=True):
                    assert area == grid.area
                    by_hand = [[row[..., grid.positions[0, r, c]] for c in range(grid.shape[2])] for r in range(grid.shape[1])]
                    by_hand = torch.stack([torch.stack(line, -1) for line in by_hand], -2).flatten(0, 1)
                    torch.testing.assert_close(part, by_hand, atol=2e-5, rtol=1e-4)
                    checked += 1
        assert checked >= 4


def test_maps_of_cross_attention_are_those_of_the_layers_that_read_the_picture(toy):
    subject = toy("mllama")
    examples = [
        Example(e.id, e.prompt, e.images, suffix=e.suffix, regions=(Region((2.0, 2.0, 9.0, 9.0), e.prompt.split()[-2]),))
        for e in toys.pair(subject)
    ]
    encoded = subject.encode(examples)
    targets = [find_targets(subject, e, m)[0] for e, m in zip(examples, encoded.maps, strict=True)]
    found, layers = read_maps(subject, encoded, targets)
    assert layers == [i for i, cross in enumerate(subject.anatomy.cross) if cross]
    assert all(each["word"].mass.min() > 0 and each["word"].mass.max() <= 1 + 1e-5 for own in found for each in own)


def test_targets(toy):
    subject = toy("llava")
    box, other = Region((5.0, 5.0, 20.0, 20.0), "ball"), Region((30.0, 5.0, 50.0, 20.0), "a red ball")
    example = Example(
        "a", "what color is the ball ?", (toys.picture(),), regions=(box, other, Region((0.0, 0.0, 9.0, 9.0), "cat"))
    )
    targets, unnamed = find_targets(subject, example, subject.encode(example).maps[0])
    assert unnamed == ["cat"]
    assert [target.phrase for target in targets] == ["ball"]  # the same word speaks of both
    assert targets[0].boxes == (pytest.approx((5 / 60, 5 / 40, 20 / 60, 20 / 40)), pytest.approx((0.5, 0.125, 50 / 60, 0.5)))
    for regions, reason in (
        ((), "no region to find"),
        ((Region((0.0, 0.0, 60.0, 40.0), "ball"),), "outside its picture, or fills all of it"),
        ((Region((70.0, 0.0, 80.0, 40.0), "ball"),), "outside its picture, or fills all of it"),
    ):
        broken = Example("a", "what color is the ball ?", (toys.picture(),), regions=regions)
        with pytest.raises(DataError, match=reason):
            find_targets(subject, broken, subject.encode(broken).maps[0])
    blind = Example("a", "what color is the ball ?")
    with pytest.raises(DataError, match="shows no picture"):
        find_targets(subject, blind, subject.encode(blind).maps[0])
    blip = toy("blip2")
    shown = Example("a", "what color is the ball ?", (toys.picture(),), regions=(box,))
    with pytest.raises(TokenError, match="no known place in the picture"):
        find_targets(blip, shown, blip.encode(shown).maps[0])
    with pytest.raises(StudyError, match="are not merged by 'sum'"):
        read_maps(subject, subject.encode(example), [targets], "sum")


# --- the mask head ---------------------------------------------------------------------------------------------------


def test_the_mask_head_learns_two_planted_maps():
    """One channel holds the mask, three hold noise."""
    torch.manual_seed(0)
    masks = torch.zeros(2, 13, 11)
    masks[0, 2:6, 1:5] = masks[1, 7:12, 5:10] = 1
    maps = torch.rand(2, 4, 13, 11)
    maps[:, 2] = masks + 0.05
    head = MaskHead(4, width=8, stages=3)
    optimiser = torch.optim.AdamW(head.parameters(), 1e-2)
    first = mask_loss(head(maps), masks).item()
    for _ in range(60):
        optimiser.zero_grad()
        loss = mask_loss(head(maps), masks)
        loss.backward()
        optimiser.step()
    found = head.eval()(maps).detach() > 0
    assert loss.item() < first / 5
    assert [mask_iou(a.numpy(), b.numpy()) for a, b in zip(found, masks > 0, strict=True)] == pytest.approx([1, 1], abs=0.1)


def test_the_mask_head_takes_any_size_and_does_not_see_scale():
    head = MaskHead(3, width=4, stages=4).eval()
    for rows, columns in ((24, 24), (13, 17), (9, 8)):
        assert head(torch.rand(1, 3, rows, columns)).shape == (1, rows, columns)
    maps = torch.rand(1, 3, 16, 16)
    torch.testing.assert_close(
        head(maps), head(maps * torch.tensor([5.0, 0.1, 1e-4])[None, :, None, None]), atol=1e-4, rtol=1e-4
    )
    assert torch.isfinite(head(torch.zeros(1, 3, 16, 16))).all()


def test_the_loss_by_hand():
    masks = torch.tensor([[[1.0, 0.0]]])
    sure = mask_loss(torch.tensor([[[40.0, -40.0]]]), masks)
    assert sure.item() == pytest.approx(0, abs=1e-6)
    unsure = mask_loss(torch.zeros(1, 1, 2), masks)  # ln 2, and Dice 1 - (2 * 0.5 + 1) / (1 + 1 + 1)
    assert unsure.item() == pytest.approx(math.log(2) + 1 / 3)
