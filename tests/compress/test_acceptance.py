"""What `docs/compress/README.md` promises of the reducers and is tested nowhere else: every choice against a loop, on ties and at the ends."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from compress.budget import Budget
from compress.passes import METHODS
from compress.passes.tokens import Tokens
from compress.recipe import compress
from compress.reducers import diverse, frames, inside, tower
from compress.tokens.choice import Seen, best
from compress.tokens.positions import moved, next_ids
from probe.attention import Call
from probe.tracing import last_logits
from tests import toys
from tests.oracles import choices as oracle
from tests.oracles import reducers as published

N, WIDTH, HEADS = 13, 6, 2
KINDS = ("random", "equal", "doubled")
COUNTS = (1, 2, 5, 12, 13)
compared = []


def drawn(kind, *shape, seed=0):
    """Small whole numbers, whose sums are exact: ties are ties in every precision."""
    x = torch.randint(-3, 4, shape, generator=torch.Generator().manual_seed(seed)).float()
    if kind == "equal":
        return x[..., :1, :].expand(shape).clone() if len(shape) > 1 else x[:1].expand(shape).clone()
    if kind == "doubled":
        half = shape[-2] // 2 if len(shape) > 1 else shape[0] // 2
        x[..., half : 2 * half, :] = x[..., :half, :] if len(shape) > 1 else x[:half]
    return x


def attention(kind, *shape, seed=1):
    return drawn(kind, *shape, 1, seed=seed)[..., 0].abs() + 1


def shown(kind, **more):
    states = drawn(kind, N, WIDTH)
    return Seen(states, more.pop("text", drawn("random", 4, WIDTH, seed=5)), more.pop("grid", None), 0, 4, **more)


def test_the_highest_scores_are_those_of_the_loop():
    for kind in KINDS:
        score = attention(kind, N)
        for count in COUNTS:
            assert best(score, count).tolist() == oracle.top(score.numpy(), count)
    assert best(torch.ones(5), 3).tolist() == [0, 1, 2]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("count", COUNTS)
def test_choices_by_the_tower_are_the_loops(kind, count):
    weight, keys = attention(kind, HEADS, N), drawn(kind, N, 4, seed=2)
    seen = shown(
        kind, tower={"class_attention": weight, "tower_keys": keys, "tower_attention": weight[:, None].expand(HEADS, N, N)}
    )
    numbers = (weight.double().numpy(), keys.double().numpy(), seen.states.double().numpy())
    assert tower.fastervlm(seen, count).index.tolist() == oracle.top(numbers[0].mean(0), count)
    assert tower.fopru(seen, count).index.tolist() == oracle.top(
        published.significance(numbers[0][:, None].repeat(N, 1)), count
    )
    if count > 1:
        made, expected = (
            tower.visionzip(seen, count, contextual=0.4),
            oracle.visionzip(*numbers, count, min(count - 1, round(0.4 * count))),
        )
        assert made.index.tolist() == sorted(expected)
        if kind == "random":  # of equal cosines the last bit decides who joins whom
            np.testing.assert_allclose(made.states.numpy(), [expected[i] for i in sorted(expected)], atol=1e-5)
    made, expected = tower.prumerge(seen, count, neighbours=N), oracle.prumerge(*numbers, count, N)
    assert made.index.tolist() == sorted(expected)
    np.testing.assert_allclose(made.states.numpy(), [expected[i] for i in sorted(expected)], atol=1e-4)
    compared.extend(["fastervlm", "fopru", "visionzip", "prumerge"])


class Attended(SimpleNamespace):
    """As much of a `Seen` as choices inside the decoder look at, with attention that is given."""

    def __len__(self):
        return len(self.states)

    def rows(self, rows):
        return self.given[:, rows - N]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("count", COUNTS)
def test_choices_inside_the_decoder_are_the_loops(kind, count):
    states, words = drawn(kind, N, WIDTH), drawn("random", 4, WIDTH, seed=5)
    given, keys = attention(kind, HEADS, 4, N), drawn(kind, HEADS, N + 4, 3, seed=3)
    seen = Attended(
        states=states, text=words, entered=states, entered_text=words, words=torch.arange(N, N + 4), columns=torch.arange(N), given=given,
        attention=given[:, -1], keys=keys,
    )  # fmt: skip
    assert inside.fastv(seen, count).index.tolist() == oracle.top(given[:, -1].double().numpy().mean(0), count)
    found = inside.sparsevlm(seen, count).index.tolist()
    assert found == oracle.sparsevlm(given.double().numpy(), words.double().numpy(), states.double().numpy(), count)
    size = keys.abs().sum((0, 2)).numpy()
    found = inside.dart(seen, count).index.tolist()
    assert len(set(found)) == count
    if kind == "random":  # of equal cosines the last bit decides
        assert found == oracle.dart(size[:N], size[N:], states.double().numpy(), words.double().numpy(), count, 4)
    compared.extend(["fastv", "pdrop", "sparsevlm", "dart"])


@pytest.mark.parametrize("kind", KINDS)
def test_attention_made_sharper_is_the_loop(kind):
    """Grouped heads, causal, one column hidden by a mask, a row that sees nothing; and the importance that flows along it."""
    query, key = drawn(kind, 1, 4, 7, 3, seed=8) / 4, drawn(kind, 1, 2, 7, 3, seed=9) / 4
    hidden = ~torch.ones(7, 7, dtype=torch.bool).tril()
    hidden[:, 2] = True
    hidden[2, 2] = False
    call = Call(torch.nn.Identity(), query, key, key, ~hidden[None, None], {"scaling": 0.7}, lambda *a, **k: None)
    seen = Seen(torch.zeros(7, 3), torch.zeros(1, 3), None, 1, 4, call=call, places=torch.arange(1, 6))
    found = torch.cat(list(seen.sharpened(0.1)))
    for head in range(4):
        expected = oracle.sharpened(
            query[0, head].double().numpy(), key[0, head // 2].double().numpy(), hidden.numpy(), 0.7, 0.1
        )
        np.testing.assert_allclose(found[head].numpy(), expected, atol=1e-5)
    rank = published.pagerank(found.double().numpy(), 5)
    for count in (1, 2, 3, 5):
        kept = inside.aim(seen, count).index.tolist()
        assert kept == oracle.top(rank[1:6].round(9), count)  # words are never chosen, and never go
    blind = Call(torch.nn.Identity(), query, key, key, torch.zeros(1, 1, 7, 7, dtype=torch.bool), {}, lambda *a, **k: None)
    assert not torch.cat(list(Seen(torch.zeros(7, 3), torch.zeros(1, 3), None, 1, 4, call=blind).sharpened(0.1))).any()
    compared.append("aim")


def unlike(kind):
    """Tokens in general position, all equal, or each there twice but one."""
    x = torch.randn(N, WIDTH, generator=torch.Generator().manual_seed(11))
    return {"random": x, "equal": x[:1].expand(N, -1).clone(), "doubled": torch.cat([x[:7], x[:6]])}[kind]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("count", COUNTS)
def test_choices_among_likenesses_are_the_loops(kind, count):
    """Density peaks and rounds of merging and of pruning; where equal likenesses leave it to the last bit who goes, as many as asked for stay."""
    x, weight = unlike(kind), attention(kind, N)
    seen = Seen(x, x[:3] + 0.5, None, 0, 4, tower={"class_attention": weight[None], "tower_states": x})
    made = diverse.dpc_knn(seen, count)
    centres, states = published.dpc_knn(x.double().numpy(), count, 5 if count >= 5 else min(3, max(count // 2, 1)))
    assert made.index.tolist() == centres
    np.testing.assert_allclose(made.states.numpy(), states, atol=1e-5)
    pruned, merged = tower.vispruner(seen, count), diverse.aim_merge(seen, count)
    for kept in (pruned.index.tolist(), merged.index.tolist(), diverse.cdpruner(seen, count).index.tolist()):
        assert len(set(kept)) == count
        assert kept == sorted(kept)
        assert kept[0] >= 0
        assert kept[-1] < N
    if kind == "random":
        assert pruned.index.tolist() == published.vispruner(weight.numpy(), x.double().numpy(), count, 0.5)
        expected = published.merge_rounds(x.double().numpy(), count)
        assert merged.index.tolist() == list(expected)
        np.testing.assert_allclose(merged.states.numpy(), list(expected.values()), atol=1e-5)
    if kind == "equal":
        np.testing.assert_allclose(merged.states.numpy(), x[:count].numpy(), atol=1e-6)
    if kind == "doubled" and count <= 5:  # their span has six dimensions: a twin of what is chosen adds nothing
        kept = diverse.cdpruner(seen, count).index.tolist()
        assert len({i % 7 for i in kept}) == count
    compared.extend(["dpc-knn", "vispruner", "aim-merge"])


@pytest.mark.parametrize("count", [1, 4, 12])
def test_changed_cells_are_the_loops(count):
    clip = drawn("doubled", 12, WIDTH, seed=7)
    found = frames.evs(shown("random", grid=(3, 2, 2)).__class__(clip, clip[:1], (3, 2, 2), 0, 4, "video"), count)
    assert found.index.tolist() == oracle.evs(clip.double().numpy().reshape(3, 4, WIDTH), count)
    compared.append("evs")


@pytest.mark.parametrize("count", [1, 3, 5])
def test_cdpruner_is_the_greedy_set_by_determinants(count):
    x = torch.randn(8, 12, generator=torch.Generator().manual_seed(3))
    words = torch.randn(3, 12, generator=torch.Generator().manual_seed(4))
    likeness = torch.nn.functional.cosine_similarity(x, words.mean(0, keepdim=True))
    quality = (0.5 * (likeness - likeness.min()) / (likeness.max() - likeness.min())).exp()
    kernel = quality[:, None] * torch.nn.functional.cosine_similarity(x[:, None], x[None], dim=-1) * quality[None]
    found = diverse.cdpruner(Seen(x, words, None, 0, 4), count).index.tolist()
    assert found == published.best_dpp(kernel.double().numpy(), count)
    compared.append("cdpruner")


def test_equal_relevance_divides_by_nothing():
    x = torch.eye(6)
    found = diverse.cdpruner(Seen(x, torch.ones(2, 6), None, 0, 4), 3)
    assert found.index.tolist() == [0, 1, 2]


def test_how_many_methods_have_a_loop():
    """The others: chosen without looking (random, uniform, windows), or held against loops in `test_reducers`."""
    elsewhere = {"random", "uniform", "pooling", "downsampling", "vispruner", "divprune", "aim-merge", "dpc-knn"}
    clips = {"progressive-pooling", "thumbnail-and-sampling"}  # made of windows and even steps
    assert set(compared) | elsewhere | clips == set(METHODS)


# --- merging ---------------------------------------------------------------------------------------------------------


def test_a_round_merges_at_most_half_and_the_next_one_weighs_nothing():
    x = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0], [1.0, 0.1], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    _, place = diverse.merge_round(x, torch.arange(8), 4)
    assert place.tolist() == [1, 3, 5, 7]
    kept = diverse.aim_merge(Seen(x, x, None, 0, 4), 3)
    assert len(kept.index) == 3
    # Token 1 stands for two or three: one more is averaged in as if it stood for one.
    ones = torch.tensor([[1.0], [2.0], [6.0]])
    first, _ = diverse.merge_round(ones, torch.arange(3), 1)
    assert first[:, 0].tolist() == [1.5, 6.0]  # of two sources as alike the earlier goes
    second, _ = diverse.merge_round(torch.tensor([[4.0], [1.0]]), torch.arange(2), 1)
    assert second.tolist() == [[2.5]]


def test_a_target_that_nobody_joins_is_itself():
    states = torch.tensor([[1.0, 0.0], [2.0, 0.0], [7.0, 7.0], [9.0, 9.0]])
    keys = torch.tensor([[1.0, 0.0], [1.0, 0.0], [-1.0, 0.0], [0.0, 1.0]])
    weight = torch.tensor([[0.1, 0.1, 0.1, 0.7]])
    seen = Seen(states, states, None, 0, 4, tower={"class_attention": weight, "tower_keys": keys})
    kept = tower.visionzip(seen, 2, contextual=0.5)  # of tokens 0, 1, 2 the first is the target
    assert kept.index.tolist() == [0, 3]
    alone = tower.visionzip(
        Seen(states, states, None, 0, 4, tower={"class_attention": weight, "tower_keys": keys}), 4, contextual=0.75
    )
    assert torch.equal(alone.states, states)
    assert torch.equal(tower.visionzip(seen, 4, contextual=0.75, compat="visionzip").states, states)


# --- positions -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["fastv", "pdrop", "aim"])
def test_positions_matter_for_the_same_choice(toy, method):
    """Counted on without gaps, what is kept says something else: the policies are not the same thing by two names."""
    subject = toy("llava")
    encoded = subject.encode(toys.pair(subject))
    found = {}
    for policy in ("preserve", "reindex"):
        smaller = compress(subject, [Tokens(method=method, budget=Budget(keep=5), layer=2, positions=policy)])
        found[policy] = last_logits(smaller, encoded)
        smaller.detach()
    assert (found["preserve"] - found["reindex"]).abs().max() > 1e-4


def test_pictures_and_clips_together_by_hand():
    """Two words, a picture of four at (1, 1..2, 1..2) of which two stay, a word, a clip of two frames of which one stays, two words."""
    ids = torch.tensor([[0, 1, 2, 2, 4, 5, 6, 7], [0, 1, 2, 3, 4, 5, 6, 7], [0, 1, 2, 2, 4, 5, 6, 7]])
    media = torch.tensor([-1, -1, 0, 0, -1, 1, -1, -1])
    assert moved("preserve", ids, media).equal(ids)
    assert moved("reindex", ids, media).tolist() == [list(range(8))] * 3
    assert moved("rebase", ids, media)[0].tolist() == [0, 1, 2, 2, 4, 5, 6, 7]  # the grid reaches to 3, the word follows at 4
    gone = ids[:, [0, 1, 2, 4, 5, 6, 7]]  # the picture's second token gone: what follows moves up by one
    assert moved("rebase", gone, media[[0, 1, 2, 4, 5, 6, 7]]).tolist() == [[0, 1, 2, 3, 4, 5, 6]] * 3
    assert next_ids(gone, ids, "preserve").tolist() == [8, 8, 8]
    assert next_ids(moved("rebase", gone, media[[0, 1, 2, 4, 5, 6, 7]]), ids, "rebase").tolist() == [7, 7, 7]
