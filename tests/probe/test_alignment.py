"""Implicit alignment: the closed forms against loops, the sites against each other, a reading against hidden states."""

import itertools

import numpy as np
import pytest
import torch

from probe import Example, Residual, load, trace
from probe.alignment import INTERVALS, WORDS, gather_anchors, read_alignment, sides_of
from probe.analysis import alignment as ima
from probe.analysis.overlap import chance_iou, iou, wanda_kept
from probe.analysis.stats import benjamini_hochberg, correlate, sign_flip
from probe.calibration import InputSquares, linear_maps
from probe.errors import EditError, ExampleError
from probe.sites import SITES, missing, watching
from probe.tracing import last_logits
from tests import toys
from tests.oracles import alignment as oracle


@pytest.fixture
def clouds():
    source = torch.Generator().manual_seed(0)
    p, t = torch.randn(9, 6, generator=source), torch.randn(4, 6, generator=source) + 0.5
    p[3] *= 20  # a token of massive norm
    return p, t


def test_every_mode_is_that_of_the_loops(clouds):
    p, t = clouds
    found, expected = ima.similarities(p, t), oracle.similarities(p.double().numpy(), t.double().numpy())
    assert set(found) == set(expected) == set(ima.MODES)
    for mode in ima.MODES:
        assert found[mode] == pytest.approx(expected[mode], abs=1e-6), mode
    assert found["avg"] != pytest.approx(found["avg_trimmed"], abs=1e-3)


def test_modes_keep_their_order_and_identical_sets_are_alike(clouds):
    found = ima.similarities(*clouds)
    assert found["min"] <= found["median"] <= found["max"]
    assert found["min"] <= found["mean"] <= found["max_mean"] <= found["max"]
    assert ima.similarities(clouds[0], clouds[0])["avg"] == pytest.approx(1)
    assert ima.diagonal(clouds[0], clouds[0]) == pytest.approx(dict.fromkeys(ima.DIAGONAL, 1.0))


def test_a_golden_similarity():
    p, t = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([[3.0, 0.0]])
    found = ima.similarities(p, t)
    assert found == pytest.approx(
        {"avg": 2**-0.5, "avg_trimmed": 2**-0.5, "max": 1, "min": 0, "mean": 0.5, "median": 0.5, "max_mean": 0.5}
    )
    assert ima.norms(torch.tensor([[3.0, 4.0], [0.0, 0.0]])) == pytest.approx(
        {"norm_of_mean": 2.5, "norm_min": 0, "norm_median": 2.5, "norm_max": 5}
    )


def test_the_mean_over_all_pairs_needs_no_loop():
    rng = np.random.default_rng(1)
    a, b = rng.normal(size=(7, 5)) + 1, rng.normal(size=(7, 5))
    u, v = ima.unit(torch.tensor(a)).double(), ima.unit(torch.tensor(b)).double()
    everything = float(ima.mean_over_pairs(u.sum(0), v.sum(0), 7, 7))
    assert everything == pytest.approx(oracle.mean_over_pairs(a, b), abs=1e-6)
    others = float(ima.mean_over_unmatched(u.sum(0), v.sum(0), (u * v).sum(), 7))
    assert others == pytest.approx(oracle.mean_over_pairs(a, b, unmatched=True), abs=1e-6)


@pytest.fixture
def crowds():
    """Perceptual and textual tokens of ten examples, of as many tokens as each happens to have."""
    rng = np.random.default_rng(4)
    return [[rng.normal(size=(rng.integers(2, 9), 5)) + shift for _ in range(10)] for shift in (1.0, np.arange(5.0))]


def _summed(crowd, cuts):
    """Sums over groups of examples (group state width) of one state."""
    return np.stack([np.concatenate(part).sum(0) for part in (crowd[a:b] for a, b in itertools.pairwise(cuts))])[:, None]


def test_centroids_and_their_interval_are_those_of_the_loops(crowds):
    cuts = range(0, 11, 2)
    found = ima.of_centroids(*(_summed(crowd, cuts) for crowd in crowds), [2] * 5)
    assert found.value[0] == pytest.approx(oracle.of_centroids(*crowds), abs=1e-12)
    without = [np.arctanh(oracle.of_centroids(*([*crowd[:a], *crowd[a + 2 :]] for crowd in crowds))) for a in range(0, 10, 2)]
    error = (4 / 5 * sum((one - np.mean(without)) ** 2 for one in without)) ** 0.5  # groups of one size: the plain jackknife
    middle, reach = np.arctanh(oracle.of_centroids(*crowds)), 2.776445 * error  # Student's t of four degrees of freedom
    assert np.arctanh([found.low[0], found.high[0]]) == pytest.approx([middle - reach, middle + reach], abs=1e-6)


def test_centroids_do_not_depend_on_how_examples_are_grouped(crowds):
    groupings = [(0, 10), (0, 3, 6, 10), (0, 1, 4, 5, 9, 10)]
    made = [ima.of_centroids(*(_summed(c, cuts) for c in crowds), np.diff(cuts).tolist()) for cuts in groupings]
    for one in made:
        assert one.value[0] == pytest.approx(made[0].value[0], abs=1e-12)
    assert np.isnan(made[1].low[0])  # three groups say too little
    assert -1 < made[2].low[0] < made[2].value[0] < made[2].high[0] < 1
    p, t = (_summed(crowd, groupings[2]) for crowd in crowds)
    counts = np.diff(groupings[2]).tolist()
    np.testing.assert_allclose(ima.of_centroids(7 * p, t, counts), made[2])  # lengths do not matter
    order = [3, 0, 4, 1, 2]
    np.testing.assert_allclose(ima.of_centroids(p[order], t[order], [counts[i] for i in order]), made[2])
    same = ima.of_centroids(p, p, counts)
    assert (same.value[0], same.low[0], same.high[0]) == pytest.approx((1, 1, 1))


def test_divergences_have_their_known_values():
    uniform = torch.full((3, 8), 1 / 8).log()
    same = ima.divergences(uniform, uniform)
    assert same == pytest.approx(
        {"kl_zipped": 0, "kl_of_means": 0, "js_of_means": 0, "entropy_p": np.log(8), "entropy_t": np.log(8)}, abs=1e-6
    )
    one, other = torch.tensor([[1.0, 0.0]]).log(), torch.tensor([[0.0, 1.0]]).log()
    far = ima.divergences(one, other)
    assert far["js_of_means"] == pytest.approx(np.log(2))
    assert far["entropy_p"] == 0
    half = ima.divergences(one, torch.tensor([[0.25, 0.75]]).log())
    assert half["kl_zipped"] == half["kl_of_means"] == pytest.approx(np.log(4))


def test_wanda_keeps_what_the_loops_keep_and_random_masks_overlap_by_chance():
    source = torch.Generator().manual_seed(0)
    weight, squares = torch.randn(5, 9, generator=source), torch.rand(9, generator=source)
    for sparsity in (0.3, 0.5, 0.7):
        kept = wanda_kept(weight, squares, sparsity)
        assert np.array_equal(kept.numpy(), oracle.wanda_kept(weight.numpy(), squares.numpy(), sparsity))
        assert kept.sum(1).tolist() == [9 - int(9 * sparsity)] * 5
        a, b = (wanda_kept(torch.rand(400, 400, generator=source), torch.ones(400), sparsity) for _ in range(2))
        assert iou(a, b) == pytest.approx(chance_iou(sparsity), abs=0.01)
    assert iou(kept, kept) == 1
    assert chance_iou(0.5) == pytest.approx(1 / 3)


def test_paired_tests_find_what_is_there_and_nothing_else():
    rng = np.random.default_rng(0)
    shifted = rng.normal(size=(40, 3)) + np.array([0.0, 1.0, -1.0])
    p = sign_flip(shifted)
    assert p[0] > 0.05
    assert p[1] < 0.001
    assert p[2] > 0.99
    assert np.isnan(sign_flip(shifted[:1])).all()
    assert sign_flip(np.array([1.0, 1.0, 1.0])) == pytest.approx(1 / 8, abs=0.03)  # one sign pattern of eight
    assert benjamini_hochberg(np.array([0.01, 0.04, np.nan, 0.03])) == pytest.approx([0.03, 0.04, np.nan, 0.04], nan_ok=True)


def test_what_is_not_known_is_left_out_of_its_own_column():
    rng = np.random.default_rng(1)
    whole = rng.normal(size=(30, 4))
    gaps = whole.copy()
    gaps[3, 0], gaps[:28, 1], gaps[1:, 2] = np.nan, np.nan, np.nan  # 29, 2 and 1 of a column are known
    p = sign_flip(gaps)
    assert p[0] == pytest.approx(sign_flip(np.delete(whole[:, 0], 3)), abs=0.04)
    assert p[1] == pytest.approx(sign_flip(whole[28:, 1]), abs=0.04)
    assert np.isnan(p[2])
    assert p[3] == sign_flip(whole)[3]  # a column without gaps is what it was


def test_a_correlation_has_an_interval_that_can_hold_zero():
    x = np.arange(8.0)
    line = correlate(x, 2 * x + 1)
    assert (line.value, line.low, line.high, line.n) == pytest.approx((1, 1, 1, 8))
    assert line.p < 0.01
    noise = correlate(x, np.random.default_rng(3).normal(size=8))
    assert noise.low < 0 < noise.high
    assert correlate(x, x**5, rank=True).value == pytest.approx(1)
    assert np.isnan(correlate(x, np.ones(8)).value)
    assert np.isnan(correlate(x[:3], x[:3]).value)


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "gemma3", "internvl"])
def test_the_sites_of_a_block_add_up(toy, family):
    subject, seen = toy(family), {}
    encoded = subject.encode(toys.pair(subject))
    with watching(subject, lambda site, layer, state: seen.__setitem__((site, layer), state.clone())):
        logits = last_logits(subject, encoded)
    assert missing(subject) == {}
    assert set(seen) == {(site, layer) for site in SITES for layer in range(subject.n_layers)}
    for layer in range(subject.n_layers):
        torch.testing.assert_close(seen["mid", layer], seen["in", layer] + seen["attn", layer])
        torch.testing.assert_close(seen["out", layer], seen["mid", layer] + seen["mlp", layer], atol=1e-5, rtol=1e-5)
        block = subject.layers[layer]
        torch.testing.assert_close(seen["ln1", layer], block.input_layernorm(seen["in", layer]))
    assert torch.equal(logits, last_logits(subject, encoded))
    assert not any("sites" in str(h) for m in subject.model.modules() for h in m._forward_hooks.values())


def test_sites_that_a_model_lacks_are_named(toy):
    assert missing(toy("qwen3_5"))["attn", 0] == "no softmax attention"
    assert {site for site, _ in missing(toy("blip2"))} == {"ln2", "fc1", "mlp"}
    assert {layer for site, layer in missing(toy("mllama")) if site == "mid"} == {
        i for i, crosses in enumerate(toy("mllama").anatomy.cross) if crosses
    }
    with pytest.raises(EditError, match="there is no site 'ln3'"), watching(toy("llava"), print, ["ln3"]):
        pass


@pytest.mark.parametrize(
    "family", ["llava", "qwen3_vl", "gemma3"]
)  # plain, with DeepStack between layers, with norms after attention
def test_the_middle_of_a_block_is_what_is_watched_there(toy, family):
    """What enters and what attention adds are read, and their sum is not: its mean follows."""
    subject, examples, seen = toy(family), toys.pair(toy(family)), {}
    encoded = subject.encode(examples)
    sides = [sides_of(m, e, "image") for m, e in zip(encoded.maps, examples, strict=True)]
    anchors = gather_anchors(subject, examples, "image")
    found = read_alignment(subject, encoded, sides, anchors)
    with watching(subject, lambda site, layer, state: seen.__setitem__(layer, state.clone()), ["mid"]):
        last_logits(subject, encoded)
    means = [
        [[seen[layer][i, torch.from_numpy(at)].double().numpy().mean(0) for at in (side.perceptual, side.textual)] for i, side in enumerate(sides)]
        for layer in range(subject.n_layers)
    ]  # fmt: skip
    for i, reading in enumerate(found):
        for layer in range(subject.n_layers):
            (p, t), (_, other) = means[layer][i], means[layer][1 - i]
            assert reading.sites["matched"]["mid"][layer] == pytest.approx(oracle.cos(p, t), abs=2e-5)
            assert reading.sites["unmatched"]["mid"][layer] == pytest.approx(oracle.cos(p, other), abs=2e-5)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", ["llava", "qwen2_vl", "llava_onevision"])
def test_a_reading_is_what_the_hidden_states_say(toy, family, side):
    subject, examples = toy(family), toys.pair(toy(family))
    more = [Example(f"m{i}", f"is the {w} red ?", examples[0].images) for i, w in enumerate(("cat", "dog", "sun"))]
    anchors = gather_anchors(subject, [*more, examples[0]], "image")
    encoded = subject.encode(examples, side)
    sides = [sides_of(m, e, "image") for m, e in zip(encoded.maps, examples, strict=True)]
    found = read_alignment(subject, encoded, sides, anchors, words=True)
    for example, reading in zip(examples, found, strict=True):
        p, t = hidden(subject, example)
        expected = [oracle.similarities(a, b) for a, b in zip(p, t, strict=True)]
        for mode in ima.MODES:
            np.testing.assert_allclose(reading.similar["matched"][mode], [e[mode] for e in expected], atol=2e-5)
        np.testing.assert_allclose(reading.from_input["matched"], [oracle.cos(p[0].mean(0), b.mean(0)) for b in t], atol=2e-5)
        others = [hidden(subject, e)[1] for e in [*more, examples[0]] if e.id != example.id]
        unmatched = [np.mean([oracle.cos(p[k].mean(0), o[k].mean(0)) for o in others]) for k in range(subject.n_layers + 1)]
        np.testing.assert_allclose(reading.similar["unmatched"]["avg"], unmatched, atol=2e-5)
        pairs = [np.mean([oracle.every_pair(p[k], o[k]).max() for o in others[:2]]) for k in range(subject.n_layers + 1)]
        np.testing.assert_allclose(reading.similar["unmatched"]["max"], pairs, atol=2e-5)
        one_on = [np.mean([oracle.cos(x, y) for x, y in zip(a, b, strict=True)]) for a, b in itertools.pairwise(p)]
        np.testing.assert_allclose(reading.drift["perceptual"][1]["diag_mean"], one_on, atol=2e-5)
        assert set(reading.drift["perceptual"]) == {n for n in INTERVALS if n <= subject.n_layers}
        assert len(reading.words["same"]["js_of_means"]) == len(ima.layers_for_vocabulary(subject.n_layers + 1))
        assert max(reading.words["same"]["js_of_means"]) <= np.log(2) + 1e-6


def test_layers_may_have_inner_widths_of_their_own():
    """What enters the last map of a narrower feed-forward block is compared within its layer."""
    model, processor = toys.build("llava")
    mlp = model.model.language_model.layers[1].mlp
    mlp.down_proj = torch.nn.Linear(24, mlp.down_proj.out_features, bias=False)
    for name in ("gate_proj", "up_proj"):
        setattr(mlp, name, torch.nn.Linear(mlp.down_proj.out_features, 24, bias=False))
    subject = load((model, processor))
    examples, seen = toys.pair(subject), {}
    encoded = subject.encode(examples)
    sides = [sides_of(m, e, "image") for m, e in zip(encoded.maps, examples, strict=True)]
    found = read_alignment(subject, encoded, sides, gather_anchors(subject, examples, "image"))
    with watching(subject, lambda site, layer, state: seen.__setitem__(layer, state.clone()), ["fc1"]):
        last_logits(subject, encoded)
    assert len({state.shape[-1] for state in seen.values()}) == 2
    t = [seen[1][i, torch.from_numpy(side.textual)].double().numpy().mean(0) for i, side in enumerate(sides)]
    p = seen[1][0, torch.from_numpy(sides[0].perceptual)].double().numpy().mean(0)
    assert found[0].sites["matched"]["fc1"][1] == pytest.approx(oracle.cos(p, t[0]), abs=2e-5)
    assert found[0].sites["unmatched"]["fc1"][1] == pytest.approx(oracle.cos(p, t[1]), abs=2e-5)


def hidden(subject, example):
    """Perceptual and textual states of every layer, from one example alone."""
    found = trace(subject, example, [Residual("resid_pre", [0]), Residual("resid_post")])
    states = torch.cat([found["states"].tensor, found["states.1"].tensor])[:, 0].double().numpy()
    token_map = found.encoded.maps[0]
    words = sorted(int(p) for name in WORDS for p in token_map.positions(name))
    return states[:, token_map.positions("image")], states[:, words]


def test_the_published_perceptual_side_stays_at_the_input(toy):
    subject, examples = toy("llava"), toys.pair(toy("llava"))
    encoded = subject.encode(examples)
    sides = [sides_of(m, e, "image") for m, e in zip(encoded.maps, examples, strict=True)]
    words = read_alignment(subject, encoded, sides, words=True)[0].words
    assert words["same"]["kl_zipped"][0] == pytest.approx(words["input"]["kl_zipped"][0])
    assert words["same"]["kl_zipped"][-1] != pytest.approx(words["input"]["kl_zipped"][-1])
    assert len(set(words["input"]["entropy_p"])) == 1


def test_an_example_with_one_side_only_is_refused(toy):
    subject = toy("llava")
    blind = Example("a", "what color is the ball ?")
    with pytest.raises(ExampleError, match="example 'a' has no tokens of the image to compare"):
        sides_of(subject.encode(blind).maps[0], blind, "image")
    with pytest.raises(ExampleError, match="no tokens of the context"):
        sides_of(subject.encode(blind).maps[0], blind, "text")


def test_input_squares_are_those_of_the_inputs(toy):
    subject, examples = toy("llava"), toys.pair(toy("llava"))
    encoded = subject.encode(examples)
    sides = [sides_of(m, e, "image") for m, e in zip(encoded.maps, examples, strict=True)]
    inputs = {}
    handles = [
        m.register_forward_pre_hook(lambda _, args, n=n: inputs.__setitem__(n, args[0].clone()))
        for n, m in linear_maps(subject)
    ]
    with InputSquares(subject, [sides[0], None]) as squares:
        last_logits(subject, encoded)
    for handle in handles:
        handle.remove()
    assert {name for _, name in squares.totals} < {name for name, _ in linear_maps(subject)}  # q, k and v read one tensor
    for (side, name), total in squares.totals.items():
        picked = inputs[name][0, torch.from_numpy(getattr(sides[0], side))]
        np.testing.assert_allclose(total, picked.double().square().sum(0).numpy(), rtol=1e-5)


def test_kinds_that_lie_apart_lie_apart_in_the_plane():
    rng = np.random.default_rng(0)
    far = np.zeros(12)
    far[3] = 40.0
    clouds = [rng.normal(size=(20, 12)), far + rng.normal(size=(15, 12))]
    found = ima.in_the_plane(clouds, seed=1)
    assert set(found) == {"PCA", "t-SNE"}
    for points in found.values():
        assert [part.shape for part in points] == [(20, 2), (15, 2)]
        middle = [part.mean(0) for part in points]
        spread = max(np.linalg.norm(part - m, axis=1).max() for part, m in zip(points, middle, strict=True))
        assert np.linalg.norm(middle[0] - middle[1]) > spread
    again = ima.in_the_plane(clouds, seed=1)
    assert all(np.array_equal(a, b) for way in found for a, b in zip(found[way], again[way], strict=True))
    together = np.concatenate(clouds) - np.concatenate(clouds).mean(0)  # PCA by hand, up to the sign of each axis
    axes = np.linalg.svd(together, full_matrices=False)[2][:2]
    np.testing.assert_allclose(np.abs(np.concatenate(found["PCA"])), np.abs(together @ axes.T), atol=1e-8)
    assert ima.in_the_plane([np.zeros((1, 4)), np.ones((1, 4))]) == {}
    assert set(ima.in_the_plane([rng.normal(size=(3, 4)), rng.normal(size=(2, 4))])) == {"PCA"}
