"""Plans from evidence: prices are what the passes really do, costs are what the models really cost, and budgets are met."""

from functools import cache

import numpy as np
import pytest
import torch

from compress import planning
from compress.budget import Budget
from compress.calibration import Calibration
from compress.cost import mean_cost
from compress.damage import layer_damage, step_damage
from compress.drafts import Counter, Draft, cheapest, damage, steps
from compress.layer_scores import divergence
from compress.passes.layers import RemoveLayers
from compress.passes.skips import ShortV, Skip
from compress.passes.tokens import Pyramid, Tokens, Withdraw
from compress.planning import plan
from compress.prices import Price, narrow, prices
from compress.recipe import compress, parse
from compress.rivals import rivals
from probe import load
from probe.errors import PassError
from probe.tracing import last_logits
from tests import toys
from tests.oracles import planning as oracle

FAMILIES = ("llava", "qwen2_vl", "internvl")
compared = []


@cache
def opened(family):
    return load(toys.build(family))


def asked(subject):
    return toys.pair(subject)


# --- prices ---


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["remove", "freeze", "ffn"])
def test_the_price_of_a_layer_is_what_its_pass_does(family, kind):
    """Patched states against the pass itself, layer by layer: removed, frozen (ShortV), or without its feed-forward block."""
    subject = opened(family)
    found = layer_damage(subject, asked(subject), (kind,))[kind]
    assert found.shape == (2, subject.n_layers)
    for layer in range(subject.n_layers):
        step = {
            "remove": RemoveLayers(layers=(layer,)), "freeze": ShortV(layers=(layer,)), "ffn": Skip(mode="ffn", layers=(layer,)),
        }[kind]  # fmt: skip
        each = step_damage(subject, [step], [subject.encode(example) for example in asked(subject)])
        np.testing.assert_allclose(found[:, layer], each, atol=1e-4, rtol=1e-3)
        compared.append((family, kind, layer))
    assert (found > 1e-7).any()


def test_how_many_were_compared():
    assert len(compared) == 3 * sum(opened(family).n_layers for family in FAMILIES)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_price_of_a_narrower_layer_is_what_its_pass_does(family):
    """Neurons silenced in the dense model against the pass that cuts them out."""
    subject = opened(family)
    examples = asked(subject)
    batches = [subject.encode(one) for one in examples]
    clean = [last_logits(subject, one) for one in batches]
    evidence = {"calibration": Calibration(tuple(examples))}
    found = prices(subject, examples, batches, clean, evidence, 0).of["narrow"]
    assert len(found) == 2 * subject.n_layers
    for one in found:
        shares = [one.share * (layer == one.layer) for layer in range(subject.n_layers)]
        each = step_damage(subject, [narrow(shares)], batches, clean, evidence=evidence)
        assert one.damage[0] == pytest.approx(each.mean(), abs=1e-7, rel=1e-3)
    assert max(one.damage[0] for one in found) > 1e-4
    for batch, was in zip(batches, clean, strict=True):
        assert torch.equal(last_logits(subject, batch), was)  # nothing stays silenced


def test_steps_are_measured_and_taken_off_again():
    subject = opened("llava")
    batches = [subject.encode(asked(subject))]
    plain = last_logits(subject, batches[0])
    smaller = compress(subject, [Tokens(method="uniform", budget=Budget(keep=0.5))])
    expected = divergence(plain, last_logits(smaller, batches[0]))
    smaller.detach()
    found = step_damage(subject, [Tokens(method="uniform", budget=Budget(keep=0.5))], batches)
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert torch.equal(last_logits(subject, batches[0]), plain)


def test_every_kind_of_step_has_prices_or_a_reason():
    subject = opened("llava")
    examples = asked(subject)
    batches = [subject.encode(examples)]
    clean = [last_logits(subject, one) for one in batches]
    found = prices(subject, examples, batches, clean, {}, 0)
    assert set(found.of) == {"remove", "freeze", "ffn", "withdraw", "tokens", "narrow"}
    assert [(one.layer, one.share) for one in found.of["narrow"]] == [
        (i, s) for i in range(subject.n_layers) for s in (0.25, 0.5)
    ]
    assert [one.layer for one in found.of["withdraw"]] == list(range(1, subject.n_layers))
    assert all(one.damage[1] <= one.damage[0] <= one.damage[2] for own in found.of.values() for one in own)
    given = prices(subject, examples, batches, clean, {"withdrawal_kl": [9.0] * subject.n_layers}, 0)
    assert {one.damage[0] for one in given.of["withdraw"]} == {9.0}  # a run's numbers are taken as they are
    crossed = opened_crossed()
    batches = [crossed.encode(asked(crossed))]
    found = prices(crossed, asked(crossed), batches, [last_logits(crossed, one) for one in batches], {}, 0)
    assert "tokens" not in found.of
    assert {note.split(":")[0] for note in found.notes} >= {"freeze", "withdraw", "tokens", "narrow"}


@cache
def opened_crossed():
    return load(toys.build("mllama"))


# --- what drafts cost ---

DRAFTS = {
    "nothing": lambda n: Draft(n),
    "withdrawn": lambda n: Draft(n - 1),
    "removed": lambda n: Draft(n, removed=frozenset({1})),
    "frozen": lambda n: Draft(n, frozen=frozenset({0, 2})),
    "ffn": lambda n: Draft(n, ffn=frozenset(range(n))),
    "tokens": lambda n: Draft(n, Price("tokens", 0, (0, 0, 0), Tokens(method="uniform", budget=Budget(keep=0.5)))),
    "pyramid": lambda n: Draft(n, Price("tokens", 0, (0, 0, 0), Pyramid(method="aim", at=(2.0, 3.0), keep=(0.5, 0.25)))),
    "narrow": lambda n: Draft(n, narrow=frozenset({(0, 0.5), (n - 1, 0.25)}), score="magnitude"),
    "narrow and out of the way": lambda n: Draft(n - 1, removed=frozenset({1}), ffn=frozenset({0}), narrow=frozenset({(0, 0.5), (1, 0.25)}), score="magnitude"),
    "together": lambda n: Draft(
        n - 1, Price("tokens", 0, (0, 0, 0), Tokens(method="uniform", budget=Budget(keep=0.5))), frozenset({1}), frozenset({0, 2}),
    ),
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_a_draft_costs_what_the_compressed_model_costs(family):
    """Closed forms of a draft against the cost of the model that its passes make, choosing left out."""
    subject = opened(family)
    prompts = [subject.encode(example) for example in asked(subject)]
    count, dense = Counter(subject, prompts), mean_cost(subject, prompts)
    for name, make in DRAFTS.items():
        draft = make(subject.n_layers)
        smaller = compress(subject, steps(draft, subject.n_layers))
        found = mean_cost(smaller, prompts)
        smaller.detach()
        each = (found.macs - (found.by_phase["selector"] or 0.0)) / (dense.macs - (dense.by_phase["selector"] or 0.0))
        if len(prompts) == 2:  # a mean of shares is not a share of means where prompts differ in length
            assert count(draft) == pytest.approx(each, rel=0.02), name
        compared.append((family, name))
    assert count(Draft(subject.n_layers)) == pytest.approx(1.0, abs=1e-9)


def test_a_narrower_layer_saves_its_neurons_and_nothing_else():
    """Where a layer has other maps beside its neurons: those of a mixer without attention stay as they are."""
    subject = opened("qwen3_5")
    prompts = [subject.encode(example) for example in asked(subject)]
    assert subject.anatomy.attention[0] is None
    draft = Draft(subject.n_layers, narrow=frozenset({(0, 0.5)}), score="magnitude")
    smaller = compress(subject, steps(draft, subject.n_layers))
    left, dense = ([mean_cost(one, [prompt]).macs for prompt in prompts] for one in (smaller, subject))
    expected = np.mean([a / b for a, b in zip(left, dense, strict=True)])
    assert expected < 0.999
    assert Counter(subject, prompts)(draft) == pytest.approx(expected, abs=1e-6)


def test_layers_are_numbered_anew_after_some_have_gone():
    n = 6
    draft = Draft(
        4,
        Price("tokens", 0, (0, 0, 0), Tokens(method="fastv", layer=3)),
        frozenset({1, 2}),
        frozenset({0, 3}),
        frozenset({5}),
    )
    found = steps(draft, n)
    assert [one.title for one in found] == ["remove-layers", "shortv", "tokens", "withdraw"]
    assert found[0].layers == (1, 2)
    assert found[1].layers == (0, 1)  # 0 and 3
    assert found[2].layer == 1  # 3
    assert found[3].layer == 2  # 4
    narrower = steps(Draft(n, removed=frozenset({1, 2}), narrow=frozenset({(1, 0.5), (3, 0.25)})), n)
    assert [one.title for one in narrower] == ["remove-layers", "width"]
    assert narrower[1].neurons == (0.0, 0.25, 0.0, 0.0)  # 3; what is gone is not narrowed
    parse({"passes": [{one.title: one.model_dump(mode="json", exclude_defaults=True)} for one in found]})


# --- the search ---


def flat(draft, n=6):
    """A cost that knows layers alone: each that goes saves a tenth."""
    return 1 - 0.1 * len(draft.removed)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("budget", [0.95, 0.8, 0.7])
def test_of_equal_savings_the_least_damage_is_taken(seed, budget):
    damages = np.random.default_rng(seed).uniform(0.1, 3, 6)
    table = {"remove": [Price("remove", layer, (float(d), 0.0, 9.0)) for layer, d in enumerate(damages)]}
    draft = cheapest(table, ("remove",), flat, 6, budget)
    best = oracle.least_damage(dict(enumerate(damages)), lambda gone: 1 - 0.1 * len(gone), budget)
    assert flat(draft) <= budget + 1e-9
    assert damage(draft, table) == pytest.approx(best)


def test_a_layer_is_narrowed_once_by_what_is_worth_most():
    """Half of layer 0 does less than a quarter of layer 1: of what meets the budget, the least damage, whichever came first."""
    harm = {(0, 0.25): 0.1, (0, 0.5): 0.3, (1, 0.25): 0.4, (1, 0.5): 2.0}
    table = {"narrow": [Price("narrow", layer, (d, d, d), share=share) for (layer, share), d in harm.items()]}

    def cost(draft):
        return 1 - sum(share for _, share in draft.narrow) / 4

    for budget, best in ((0.94, {(0, 0.25)}), (0.88, {(0, 0.5)}), (0.82, {(0, 0.5), (1, 0.25)})):
        draft = cheapest(table, ("narrow",), cost, 2, budget)
        assert draft.narrow == best
        assert damage(draft, table) == pytest.approx(sum(harm[one] for one in best))
    assert cheapest(table, ("narrow",), cost, 2, 0.7) is None


def test_what_cannot_be_met_is_none():
    table = {"remove": [Price("remove", layer, (0.1, 0.0, 1.0)) for layer in range(6)]}
    assert cheapest(table, ("remove",), flat, 6, 0.1) is None


# --- the whole ---


@cache
def made(budget):
    subject = opened("llava")
    return plan(subject, asked(subject), budget)


@pytest.mark.parametrize("budget", [0.9, 0.6])
def test_a_plan_meets_its_budget_and_says_why(budget):
    subject, found = opened("llava"), made(budget)
    prompts = [subject.encode(example) for example in asked(subject)]
    smaller = compress(subject, found.recipe, found.evidence)
    share = mean_cost(smaller, prompts)
    dense = mean_cost(subject, prompts)
    smaller.detach()
    assert share.macs / dense.macs <= budget * 1.01
    assert found.choices
    assert all("nats" in one.why and one.saves > -1e-9 for one in found.choices)
    assert found.tried[0].measured[0] == min(one.measured[0] for one in found.tried)
    each = step_damage(subject, found.recipe.passes, [subject.encode(asked(subject))], evidence=found.evidence)
    assert found.tried[0].measured[0] == pytest.approx(float(each.mean()), abs=1e-5)
    assert parse_text(found.recipe.dumped()).passes == found.recipe.passes


def parse_text(text):
    import yaml

    return parse(yaml.safe_load(text))


def test_a_budget_of_time_is_met_by_what_a_stopwatch_says(monkeypatch):
    """A stopwatch that knows layers alone: each that goes saves a fifth, and nothing else saves anything."""
    subject = opened("llava")

    def watch(subject, prompts, rounds, evidence):
        return lambda steps: 1 - 0.2 * sum(len(one.layers) for one in steps if isinstance(one, RemoveLayers))

    monkeypatch.setattr(planning, "stopwatch", watch)
    found = planning.plan(subject, asked(subject), 0.7, cost="time")
    gone = [one for step in found.recipe.passes if isinstance(step, RemoveLayers) for one in step.layers]
    assert len(gone) == 2  # 0.8 squared is below 0.7
    assert found.tried[0].time_ratio == pytest.approx(0.6)
    assert "% of the dense model's time" in found.recipe.about
    with pytest.raises(PassError, match="time: take a larger budget"):
        planning.plan(subject, asked(subject), 0.05, cost="time")


def test_rivals_meet_the_budget_too():
    subject, found = opened("llava"), made(0.6)
    prompts = [subject.encode(example) for example in asked(subject)]
    dense = mean_cost(subject, prompts).macs
    assert len(found.rivals) >= 3
    for rival in found.rivals:
        smaller = compress(subject, rival)
        assert mean_cost(smaller, prompts).macs / dense <= 0.6 * 1.02, rival.name
        smaller.detach()
    assert all(rival.passes != found.recipe.passes for rival in found.rivals)


def test_what_is_drawn_has_the_kinds_of_the_plan_and_meets_its_budget():
    table = {kind: [Price(kind, layer, (1.0, 1.0, 1.0)) for layer in range(8)] for kind in ("remove", "freeze", "ffn")}

    def cost(draft):
        return 1 - 0.1 * len(draft.removed) - 0.05 * len(draft.frozen - draft.removed)

    draft = Draft(8, removed=frozenset({1, 2}), frozen=frozenset({0, 3, 4}))
    found = [one for one in rivals(draft, table, cost, 8, cost(draft), 0) if "kinds of steps" in one.name]
    assert len(found) == 3
    for one in found:
        sets = {step.title: set(step.layers) for step in one.passes}
        assert set(sets) <= {"remove-layers", "shortv"}
        assert 1 - 0.1 * len(sets.get("remove-layers", ())) - 0.05 * len(sets.get("shortv", ())) <= cost(draft) + 1e-9
    table = {"narrow": [Price("narrow", layer, (1.0, 1.0, 1.0), share=share) for layer in range(8) for share in (0.25, 0.5)]}
    found = rivals(
        Draft(8, narrow=frozenset({(0, 0.5), (1, 0.5)})), table, lambda one: 1 - sum(s for _, s in one.narrow) / 8, 8, 0.875, 0
    )
    assert len(found) == 3
    for one in found:
        assert [(step.title, step.score) for step in one.passes] == [("width", "random")]
        assert sum(one.passes[0].neurons) >= 1


@pytest.mark.parametrize(
    ("budget", "message"), [(0.0, "between 0 and 1"), (1.5, "between 0 and 1"), (0.001, "take a larger budget")]
)
def test_budgets_that_mean_nothing_are_refused(budget, message):
    subject = opened("llava")
    with pytest.raises(PassError, match=message):
        plan(subject, asked(subject), budget)


def test_a_plan_without_examples_is_refused():
    with pytest.raises(PassError, match="at least one"):
        plan(opened("llava"), [])


def test_a_model_that_allows_no_step_says_why():
    subject = opened_crossed()
    with pytest.raises(PassError, match="allows none of the steps that plans are made of: freeze"):
        plan(subject, asked(subject), 0.6)


def test_layers_that_are_not_entered_have_no_price():
    """Mllama's cross-attention layers are passed by where there is no picture."""
    subject = opened_crossed()
    blind = toys.pair(subject, media=False)
    found = layer_damage(subject, blind, ("remove",))["remove"]
    crossed = np.array(subject.anatomy.cross)
    assert np.isnan(found[:, crossed]).all()
    assert np.isfinite(found[:, ~crossed]).all()


def test_a_model_of_text_alone_has_no_visual_tokens_to_spare():
    subject = load(toys.build("llama"))
    for step in (Tokens(method="uniform"), Withdraw(layer=1), ShortV(layers=(1,)), Skip(mode="ffn", layers=(1,))):
        with pytest.raises(PassError, match="shown nothing but text"):
            step.plan(subject, {})
    assert Skip(rows="all", layers=(1,)).plan(subject, {})


@pytest.mark.parametrize("keep", [1.5, True])
def test_what_is_neither_share_nor_count_is_refused(keep):
    with pytest.raises(ValueError, match="whole number of tokens"):
        Budget(keep=keep)
    assert Budget(keep=2.0).count(10) == 2
