"""Every reducer: against its oracle on random, tied and doubled tokens; by hand; and end to end."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from compress.budget import Budget
from compress.passes import METHODS
from compress.passes.tokens import Pyramid, Tokens, Withdraw, find_method
from compress.recipe import compress
from compress.reducers import diverse, frames, inside, plain, tower
from compress.reducers.windows import window_shape
from compress.tokens.choice import Seen
from compress.tokens.positions import moved, next_ids
from probe.attention import Call
from probe.errors import PassError
from probe.tracing import last_logits
from tests import toys
from tests.oracles import reducers as oracle


def tokens(kind, n=13, width=6, seed=0):
    x = torch.randn(n, width, generator=torch.Generator().manual_seed(seed))
    if kind == "equal":
        return x[:1].expand(n, -1).clone()
    if kind == "doubled":
        return torch.cat([x[: n // 2 + 1], x[: n - n // 2 - 1]])
    return x


def seen(x, **more):
    return Seen(x, more.pop("text", x[:3] + 0.5), more.pop("grid", None), 0, 4, **more)


KINDS = ("random", "doubled")
COUNTS = (1, 2, 5, 12, 13)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("count", COUNTS)
def test_divprune_is_the_naive_loop(kind, count):
    x = tokens(kind)
    for cen in (False, True):
        ours = diverse.divprune(seen(x), count, cen=cen).index.tolist()
        naive = oracle.divprune(x.double().numpy(), count, cen)
        # Which of two equal tokens is taken hangs on the last bit of their cosines: they count as one.
        same = {i: i % 7 for i in range(13)} if kind == "doubled" else {i: i for i in range(13)}
        assert sorted(same[i] for i in ours) == sorted(same[i] for i in naive)
        assert len(set(ours)) == count


def test_divprune_never_chooses_twice():
    x = tokens("equal")
    for cen in (False, True):
        kept = diverse.divprune(seen(x), 7, cen=cen).index
        assert len(set(kept.tolist())) == 7


@pytest.mark.parametrize("count", [1, 3, 6])
def test_the_greedy_dpp_is_the_one_by_determinants(count):
    x = tokens("random", 9)
    kernel = (x @ x.T + 0.1 * torch.eye(9)).double()
    assert diverse.greedy_dpp(kernel, count).tolist() == oracle.best_dpp(kernel.numpy(), count)


def test_cdpruner_prefers_what_the_words_speak_of():
    x = torch.eye(6)
    words = x[2:3].repeat(2, 1)
    assert diverse.cdpruner(seen(x, text=words), 1, relevance=0.9).index.tolist() == [2]
    assert 2 not in diverse.cdpruner(seen(x, text=words), 3, relevance=0.9, negative=True).index.tolist()
    with pytest.raises(PassError, match="lies in"):
        diverse.cdpruner(seen(x), 1, relevance=1.0)


def test_merging_rounds_are_the_loops():
    x = tokens("random", 13)
    states, place = diverse.merge_round(x, torch.arange(13), 5)
    expected = oracle.merge_round(x.double().numpy(), 5)
    assert place.tolist() == list(expected)
    np.testing.assert_allclose(states.numpy(), np.array(list(expected.values())), atol=1e-5)
    kept = diverse.aim_merge(seen(tokens("random", 16)), 8)
    assert kept.index.tolist() == list(range(1, 16, 2))  # a halving round leaves the destinations, in order


@pytest.mark.parametrize("count", [2, 4, 9])
def test_density_peaks_are_the_loops(count):
    x = tokens("random", 12)
    k = 5 if count >= 5 else min(3, max(count // 2, 1))
    centres, states = oracle.dpc_knn(x.double().numpy(), count, k)
    kept = diverse.dpc_knn(seen(x), count)
    assert kept.index.tolist() == centres
    np.testing.assert_allclose(kept.states.numpy(), states, atol=1e-5)


def test_pagerank_flows_along_the_rows_and_not_across():
    links = torch.rand(3, 7, 7, generator=torch.Generator().manual_seed(1)).tril()
    links = links / links.sum(-1, keepdim=True)
    np.testing.assert_allclose(inside.pagerank(links, 5).numpy(), oracle.pagerank(links.double().numpy(), 5), atol=1e-6)
    assert (inside.pagerank(links, 5) - inside.pagerank(links.transpose(1, 2), 5)).abs().max() > 1e-2


def test_significance_is_what_varies_more():
    a = torch.rand(2, 6, 6, generator=torch.Generator().manual_seed(2))
    np.testing.assert_allclose(tower.significance(a).numpy(), oracle.significance(a.double().numpy()), atol=1e-6)
    received = torch.full((1, 4, 4), 0.25)
    received[..., 0] = 0.7  # every patch gives as much, the first receives more
    received[..., 1:] = 0.1
    assert tower.fopru(seen(tokens("random", 4), tower={"tower_attention": received}), 1).index.tolist() == [0]


def test_whole_rows_are_kept_or_refused():
    attention = torch.zeros(1, 9, 9)
    attention[..., 3:6] = 1.0
    shown = seen(tokens("random", 9), tower={"tower_attention": attention})
    assert tower.fopru(shown, 3, strategy="row").index.tolist() == [3, 4, 5]
    with pytest.raises(PassError, match="keep 3"):
        tower.fopru(shown, 5, strategy="row")
    with pytest.raises(PassError, match="no square grid"):
        tower.fopru(seen(tokens("random", 8), tower={"tower_attention": torch.rand(1, 8, 8)}), 4, strategy="row")


@pytest.mark.parametrize("count", [1, 4, 9])
def test_vispruner_is_the_loop(count):
    x = tokens("random", 13)
    weight = torch.rand(2, 13, generator=torch.Generator().manual_seed(3))
    kept = tower.vispruner(seen(x, tower={"class_attention": weight, "tower_states": x}), count)
    assert kept.index.tolist() == oracle.vispruner(weight.mean(0).numpy(), x.double().numpy(), count, 0.5)


def test_visionzip_by_hand():
    states = torch.tensor([[1.0, 0.0], [2.0, 0.0], [0.0, 4.0], [0.0, 8.0], [5.0, 5.0]])
    keys = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0], [1.0, 1.0]])
    attention = torch.tensor([[0.1, 0.1, 0.1, 0.1, 0.6]])
    shown = seen(states, tower={"class_attention": attention, "tower_keys": keys})
    # Token 4 is dominant; of the others every second is a target (0 and 2), 1 joins 0 and 3 joins 2.
    kept = tower.visionzip(shown, 3, contextual=2 / 3)
    assert kept.index.tolist() == [0, 2, 4]
    assert kept.states.tolist() == [[1.5, 0.0], [0.0, 6.0], [5.0, 5.0]]
    published = tower.visionzip(shown, 3, contextual=2 / 3, compat="visionzip")
    assert published.states.tolist() == [[3.0, 0.0], [0.0, 12.0], [5.0, 5.0]]


def test_prumerge_takes_its_neighbours_in():
    states, keys = torch.tensor([[1.0], [3.0], [10.0]]), torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0]])
    shown = seen(states, tower={"class_attention": torch.tensor([[0.5, 0.25, 0.25]]), "tower_keys": keys})
    assert tower.prumerge(shown, 1, neighbours=1).states[0, 0] == pytest.approx((0.5 * 1 + 0.25 * 3) / 0.75)
    assert tower.prumerge(shown, 1, neighbours=1, compat="prumerge").states[0, 0] == pytest.approx(1 + 0.25 * 3)
    assert tower.prumerge(shown, 2, plus=True).index.tolist() == [0, 1]  # the evenly spaced half comes first


@pytest.mark.parametrize(("rows", "columns", "count"), [(4, 4, 4), (4, 4, 8), (3, 5, 6), (2, 8, 4), (4, 4, 16)])
def test_windows_are_as_square_as_can_be(rows, columns, count):
    assert window_shape(rows, columns, count) == oracle.windows(rows, columns, count)


def test_pooling_by_hand_and_what_cannot_be_pooled():
    x = torch.arange(16.0)[:, None].repeat(1, 2)
    kept = plain.pooling(seen(x, grid=(1, 4, 4)), 4)
    assert kept.states[:, 0].tolist() == [2.5, 4.5, 10.5, 12.5]
    assert kept.index.tolist() == [0, 2, 8, 10]
    with pytest.raises(PassError, match="no windows that make 7 tokens: keep 6"):
        plain.pooling(seen(x, grid=(1, 4, 4)), 7)
    with pytest.raises(PassError, match="lie in no grid of one frame"):
        plain.pooling(seen(x), 4)


def test_downsampling_a_flat_grid_leaves_it_flat():
    x = torch.ones(16, 3) * torch.tensor([1.0, -2.0, 0.5])
    kept = plain.downsampling(seen(x, grid=(1, 4, 4)), 4)
    torch.testing.assert_close(kept.states, x[:4])


def test_frames_that_do_not_change_are_dropped_first():
    still = torch.randn(4, 5, generator=torch.Generator().manual_seed(4))
    moving = still.clone()
    moving[2] = -moving[2]
    clip = torch.cat([still, still, moving])
    kept = frames.evs(seen(clip, grid=(3, 2, 2), kind="video"), 5)
    assert kept.index.tolist() == [0, 1, 2, 3, 10]


def test_progressive_pooling_keeps_the_first_of_each_group_finer():
    clip = torch.randn(4 * 16, 5, generator=torch.Generator().manual_seed(5))
    kept = frames.progressive(seen(clip, grid=(4, 4, 4), kind="video"), 16 + 3 * 4, group=4)
    assert [int((kept.index // 16 == frame).sum()) for frame in range(4)] == [16, 4, 4, 4]
    assert torch.equal(kept.states[:16], clip[:16])
    with pytest.raises(PassError, match="keep 28"):
        frames.progressive(seen(clip, grid=(4, 4, 4), kind="video"), 29, group=4)


def test_thumbnails_and_samples_make_the_count():
    clip = torch.randn(4 * 16, 5, generator=torch.Generator().manual_seed(6))
    for count in (12, 20, 33):
        kept = frames.thumbnail_and_sampling(seen(clip, grid=(4, 4, 4), kind="video"), count)
        assert len(kept.index) == len(set(kept.index.tolist())) == count
    with pytest.raises(PassError, match="hold no thumbnails"):
        frames.thumbnail_and_sampling(seen(clip, grid=(4, 4, 4), kind="video"), 3)


# --- budgets and positions -------------------------------------------------------------------------------------------


def test_budgets_are_the_papers():
    assert Budget(keep=0.25).count(576) == 144
    assert [round((avg * 32 - 2 * 576) / 30, 1) for avg in (64, 128, 192)] == [29.9, 98.1, 166.4]
    assert Budget(keep=64, unit="avg_per_layer").count(576, 2, 32) == 30
    assert Budget(keep=128, unit="avg_per_layer").count(576, 2, 32) == 98
    assert Budget(keep=0.5, rounding="floor").count(5) == 2
    assert Budget(keep=0.5, rounding="ceil").count(5) == 3
    assert Budget(keep=1).count(9) == 1
    assert Budget(keep=1.0).count(9) == 9
    kept = Budget(keep=0.5, unit="flops_ratio").count(576, 2, 32, (3.0, 0.01))
    share = (2 * 576 * (3 + 5.76) + 30 * kept * (3 + 0.01 * kept)) / (32 * 576 * (3 + 5.76))
    assert share <= 0.5 < share + 0.01


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        ({"keep": 10}, "10 tokens cannot be kept of 9"),
        ({"keep": 2, "unit": "avg_per_layer"}, "cannot be met: the 4 layers before the drop take 4.5"),
        ({"keep": 0.3, "unit": "flops_ratio"}, "cannot be met by dropping at layer 4 of 8"),
        ({"keep": 2, "unit": "flops_ratio"}, r"lies in \(0, 1\]"),
    ],
)
def test_budgets_that_cannot_be_met(budget, message):
    with pytest.raises(PassError, match=message):
        Budget(**budget).count(9, 4, 8)
    with pytest.raises(ValueError, match="greater than 0"):
        Budget(keep=0)


def test_position_policies_by_hand():
    ids = torch.tensor([[0, 1, 2, 4, 6, 7]])  # two words, three kept of a medium at 2 to 5, words from 6
    media = torch.tensor([-1, -1, 0, 0, -1, -1])
    assert moved("preserve", ids, media).tolist() == [[0, 1, 2, 4, 6, 7]]
    assert moved("reindex", ids, media).tolist() == [[0, 1, 2, 3, 4, 5]]
    assert moved("rebase", ids, media).tolist() == [[0, 1, 2, 4, 5, 6]]
    # A picture of 2 x 2 at (t, h, w) = (1, 1.., 1..), words from 3; kept: its first and third cell.
    grid = torch.tensor([[0, 1, 1, 3], [0, 1, 2, 3], [0, 1, 1, 3]])
    kind = torch.tensor([-1, 0, 0, -1])
    assert moved("rebase", grid, kind)[:, -1].tolist() == [3, 3, 3]
    assert moved("reindex", grid, kind).tolist() == [[0, 1, 2, 3]] * 3
    four = torch.cat([torch.tensor([[0, 1, 3, 5]]), grid])
    assert moved("rebase", four, kind)[0].tolist() == [0, 1, 3, 4]
    assert next_ids(four, four, "preserve").tolist() == [6, 4, 4, 4]
    assert next_ids(moved("reindex", ids, media), ids, "reindex").tolist() == [6]
    assert next_ids(ids, ids, "preserve").tolist() == [8]


# --- end to end ------------------------------------------------------------------------------------------------------

ran, refused = [], []
CLIPS = ("evs", "progressive-pooling", "thumbnail-and-sampling")


@pytest.mark.parametrize("name", METHODS)
def test_every_method_removes_what_its_twin_hides(toy, name):
    for family in ("llava", "qwen2_vl"):
        subject = toy(family)
        encoded = subject.encode(toys.pair(subject))
        plain_logits = last_logits(subject, encoded)
        found = []
        try:
            for simulated in (False, True):
                smaller = compress(subject, [Tokens(method=name, budget=Budget(keep=4), simulated=simulated)])
                found.append(last_logits(smaller, encoded))
                said = smaller.generate(encoded, 3)
                assert len(said) == 2
        except PassError as error:
            refused.append((family, name, str(error)))
            continue
        torch.testing.assert_close(found[0], found[1], atol=1e-4, rtol=1e-4)
        assert (found[0] - plain_logits).abs().max() > 1e-3
        ran.append((family, name))


def test_how_many_ran_and_how_many_were_refused():
    assert len(ran) + len(refused) == 2 * len(METHODS)
    assert sorted({name for family, name, _ in refused if family == "llava"}) == sorted(CLIPS)
    looking = {"fopru", "fastervlm", "visionzip", "prumerge", "vispruner", *CLIPS}
    assert {name for family, name, _ in refused if family == "qwen2_vl"} == looking


@pytest.mark.parametrize(("family", "message"), [
    ("qwen2_vl", "the layers of the tower of this Qwen2-VL model are not known"),
    ("llava_next", "patches for 2 media and 70 positions of this one: .* needs one patch for each position"),
    ("gemma3", "has no class token: use a reducer that does not ask for one"),
])  # fmt: skip
def test_a_tower_whose_patches_are_not_the_positions_is_refused(toy, family, message):
    """Merged, tiled or pooled patches, and towers without a class token."""
    subject = toy(family)
    encoded = subject.encode(toys.pair(subject))
    with pytest.raises(PassError, match=message):
        last_logits(compress(subject, [Tokens(method="fastervlm", budget=Budget(keep=4))]), encoded)


@pytest.mark.parametrize("one", [
    Pyramid(keep=(0.5, 0.25, 0.2)), Withdraw(layer=2), Withdraw(layer=2, positions="reindex"), Pyramid(at=(0.25, 0.75), keep=(0.5, 0)),
    Pyramid(method="aim", at=(0.25, 0.5, 0.75), keep=(0.75, 0.5, 0.25)),
])  # fmt: skip
def test_schedules_remove_what_their_twins_hide(toy, one):
    subject = toy("llava")
    encoded = subject.encode(toys.pair(subject))
    both = [compress(subject, [one.model_copy(update={"simulated": twin})]) for twin in (False, True)]
    torch.testing.assert_close(last_logits(both[0], encoded), last_logits(both[1], encoded), atol=1e-4, rtol=1e-4)
    assert both[0].generate(encoded, 4) == both[1].generate(encoded, 4)


def test_neither_padding_nor_what_is_hidden_votes():
    """AIM's importance among the columns that are left, whatever stands beside them: PageRank of those alone."""
    query, key = torch.randn(1, 2, 9, 3), torch.randn(1, 2, 9, 3)
    alive = torch.tensor([True, True, False, True, True, True, False, True, False])  # two hidden, one of padding
    left = torch.nonzero(alive)[:, 0]
    mask = torch.ones(9, 9, dtype=torch.bool).tril() & (alive | torch.eye(9, dtype=torch.bool))
    call = Call(torch.nn.Identity(), query, key, key, mask[None, None], {}, lambda *a, **k: None)
    small = Call(torch.nn.Identity(), query[:, :, left], key[:, :, left], key[:, :, left], None, {}, lambda *a, **k: None)
    whole = Seen(torch.zeros(4, 3), torch.zeros(1, 3), None, 1, 4, call=call, places=left[1:5], alive=alive)
    alone = Seen(torch.zeros(4, 3), torch.zeros(1, 3), None, 1, 4, call=small, places=torch.arange(1, 5))
    torch.testing.assert_close(torch.cat(list(whole.sharpened(0.1))), torch.cat(list(alone.sharpened(0.1))))
    for count in (1, 2, 3):
        assert inside.aim(whole, count).index.tolist() == inside.aim(alone, count).index.tolist()
    everyone = replace(whole, alive=None)
    assert torch.cat(list(everyone.sharpened(0.1))).shape == (2, 9, 9)


def test_what_aim_keeps_does_not_depend_on_padding(toy):
    subject = toy("llava")
    smaller = compress(subject, [Tokens(method="aim", budget=Budget(keep=4))])
    first, second = toys.pair(subject)
    alone = torch.cat([last_logits(smaller, subject.encode(one)) for one in (first, second)])
    for side in ("left", "right"):
        together = last_logits(smaller, subject.encode([first, second], side))
        torch.testing.assert_close(together, alone, atol=1e-4, rtol=1e-4)


def test_what_cannot_be_asked(toy):
    subject = toy("llava")
    for one, message in (
        (Tokens(method="fastv", layer=0), "chooses inside the decoder"),
        (Tokens(method="divprune", layer=2), "chooses before the decoder"),
        (Tokens(method="fastv", layer=9), "layers 0 to 3"),
        (Pyramid(at=(0.5,), keep=(0.5, 0.25)), "as many shares as places"),
        (Pyramid(at=(0.5, 0.55), keep=(0.5, 0.25)), "places further apart"),
        (Withdraw(layer=4, eta=1.0), None),
        (Withdraw(), "needs evidence 'withdrawal_kl'"),
    ):
        if message is None:
            assert one.plan(subject, {}) == []
            continue
        with pytest.raises(PassError, match=message):
            one.plan(subject, {})
    with pytest.raises(PassError, match="did you mean 'fastv'"):
        find_method("fastvv")
    assert Withdraw(eta=0.1, first=1).plan(subject, {"withdrawal_kl": [9.0, 0.5, 0.05, 0.2]})[0].layer == 2
    mllama = toy("mllama")
    with pytest.raises(PassError, match="not in the sequence"):
        Tokens(method="random").plan(mllama, {})
