"""Recipes with free numbers, and the search over them: what is proposed, refused, interrupted and gone on with."""

import pytest
import yaml

from compress.passes.layers import RemoveLayers
from compress.search import parse_space, read_space, search
from probe.errors import PassError, RecipeError

TEXT = """
name: tried
passes:
  - remove-layers: {layers: {choices: [[1], [2, 3]]}}
  - tokens: {method: {choices: [random, pooling]}, budget: {keep: {low: 2, high: 16}}}
"""


def space(text=TEXT):
    return parse_space(yaml.safe_load(text))


@pytest.mark.parametrize(
    ("score", "asked"), [("flap", ("calibration",)), ("{choices: [magnitude, flap]}", ("calibration",)), ("magnitude", ())]
)
def test_what_a_space_asks_for_is_known_before_it_is_searched(score, asked):
    found = space(f"passes: [{{width: {{score: {score}, neurons: {{low: 0.25, high: 0.5}}}}}}]")
    assert found.asks() == asked
    assert space().asks() == ()


def test_free_values_are_found_where_they_stand():
    found = space()
    assert [one.name for one in found.free] == [
        "passes.0.remove-layers.layers", "passes.1.tokens.method", "passes.1.tokens.budget.keep",
    ]  # fmt: skip
    recipe = found.recipe(dict(zip([one.name for one in found.free], ([2, 3], "pooling", 4), strict=True)))
    assert recipe.passes[0] == RemoveLayers(layers=(2, 3))
    assert (recipe.passes[1].method, recipe.passes[1].budget.keep) == ("pooling", 4)
    assert found.text == yaml.safe_load(TEXT)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "a space is a recipe"),
        ("passes: [{tokens: {method: random}}]", "no value is free"),
        (
            "passes: [{tokens: {method: random, budget: {keep: {low: 9, high: 3}}}}]",
            r"passes.0.tokens.budget.keep: .* low below high, not 9 and 3",
        ),
        ("passes: [{tokens: {method: random, budget: {keep: {low: 0, high: 3, log: true}}}}]", "begins above 0"),
        ("passes: [{tokens: {method: {choices: []}}}]", "choices is a list of at least one"),
        ("passes: [{tokns: {method: {choices: [random]}}}]", "did you mean 'tokens'"),
    ],
)
def test_what_is_wrong_with_a_space_is_named(text, message):
    with pytest.raises(RecipeError, match=message):
        space(text)


def test_a_file_that_is_not_there_or_not_yaml(tmp_path):
    with pytest.raises(RecipeError, match="cannot be read"):
        read_space(tmp_path / "none.yaml")
    (tmp_path / "bad.yaml").write_text("a: [")
    with pytest.raises(RecipeError, match="is not YAML"):
        read_space(tmp_path / "bad.yaml")


def scored(recipe):
    """A trade made up: tokens help and cost, pooling helps for nothing."""
    layers, tokens = recipe.passes
    kept = tokens.budget.keep
    return (kept + 3 * (tokens.method == "pooling") - len(layers.layers), float(kept))


DIRECTIONS = ("maximize", "minimize")


def test_a_search_that_was_interrupted_is_the_search_that_was_not(tmp_path):
    whole = search(space(), scored, DIRECTIONS, tmp_path / "whole.db", 14)
    assert len(whole) == 14
    calls = []

    def dies(recipe):
        calls.append(recipe)
        if len(calls) in (5, 13):
            raise KeyboardInterrupt
        return scored(recipe)

    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            search(space(), dies, DIRECTIONS, tmp_path / "cut.db", 14)
    again = search(space(), dies, DIRECTIONS, tmp_path / "cut.db", 14)
    assert [(t.values, t.objectives) for t in again] == [(t.values, t.objectives) for t in whole]
    assert len(calls) == 16
    assert search(space(), dies, DIRECTIONS, tmp_path / "cut.db", 14) == again  # nothing is left to do
    assert len(calls) == 16


def test_values_lie_in_their_ranges(tmp_path):
    text = "passes: [{tokens: {method: random, budget: {keep: {low: 0.25, high: 0.5, log: true}}}}]"
    found = search(space(text), lambda recipe: (1.0, recipe.passes[0].budget.keep), DIRECTIONS, tmp_path / "s.db", 6)
    assert all(0.25 <= trial.values["passes.0.tokens.budget.keep"] <= 0.5 for trial in found)
    assert len({trial.objectives for trial in found}) == 6


def test_refused_points_are_counted_with_their_reason(tmp_path):
    def refuses(recipe):
        if recipe.passes[1].method == "random":
            raise PassError("not this one")
        return scored(recipe)

    found = search(space(), refuses, DIRECTIONS, tmp_path / "s.db", 10)
    assert len(found) == 10
    assert {trial.refused for trial in found} == {"", "not this one"}
    assert all((trial.objectives is None) == bool(trial.refused) for trial in found)


def test_it_leans_towards_what_is_better(tmp_path):
    found = search(space(), scored, DIRECTIONS, tmp_path / "s.db", 40)
    late = [trial.values["passes.1.tokens.method"] for trial in found[15:]]
    assert late.count("pooling") > len(late) / 2
