"""Recipes, ledgers and saved models: what is written is what is read, and what is wrong is named."""

import json
import subprocess
import sys

import pytest
import torch
import yaml
from safetensors import SafetensorError
from transformers import AutoModelForImageTextToText

from compress import recipe as recipes
from compress import saving
from compress.ledger import FILE
from compress.passes import PASSES
from compress.recipe import compress, parse
from probe.errors import LedgerError, PassError, RecipeError
from probe.tracing import last_logits
from tests import toys

TEXT = """
name: half
about: one layer and half of the tokens less
passes:
  - remove-layers: {layers: [2]}
  - tokens: {method: uniform, budget: {keep: 0.5}, layer: 0}
"""


def made(subject):
    return compress(subject, parse(yaml.safe_load(TEXT)))


def test_a_recipe_is_what_its_yaml_says():
    recipe = parse(yaml.safe_load(TEXT))
    assert [one.title for one in recipe.passes] == ["remove-layers", "tokens"]
    assert parse(yaml.safe_load(recipe.dumped())) == recipe


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "a recipe is a mapping"),
        ("passes: half", "passes is a list"),
        ("pases: []", "there is no field 'pases' .did you mean 'passes'"),
        ("passes: [{tokns: {method: random}}]", "passes.0: there is no pass 'tokns' .did you mean 'tokens'"),
        ("passes: [{tokens: {methd: random}}]", "tokens.*: there is no setting 'methd' .did you mean 'method'"),
        ("passes: [{tokens: {method: random, budget: {keep: -1}}}]", "budget.keep.*greater than 0"),
        ("passes: [{tokens: {method: random}}, {remove-layers: {layers: [1]}}]", r"passes.1: .* cannot follow tokens"),
        ("passes: [{remove-layers: {layers: [1]}}, {remove-layers: {layers: [1]}}]", "passes.1: .* was applied already"),
    ],
)
def test_what_is_wrong_with_a_recipe_is_named(text, message):
    with pytest.raises(RecipeError, match=message):
        parse(yaml.safe_load(text))


def test_a_file_that_is_not_there_or_not_yaml(tmp_path):
    with pytest.raises(RecipeError, match="cannot be read"):
        recipes.read(tmp_path / "none.yaml")
    (tmp_path / "bad.yaml").write_text("a: [")
    with pytest.raises(RecipeError, match="is not YAML"):
        recipes.read(tmp_path / "bad.yaml")


def test_the_schema_names_every_pass():
    choices = recipes.schema()["properties"]["passes"]["items"]["oneOf"]
    assert sorted(title for choice in choices for title in choice["properties"]) == sorted(one.title for one in PASSES)
    json.dumps(recipes.schema())


def test_the_dense_model_is_as_it_was(toy):
    subject = toy("llava")
    encoded = subject.encode(toys.pair(subject))
    before = last_logits(subject, encoded)
    smaller = made(subject)
    assert smaller.n_layers == subject.n_layers - 1
    assert (last_logits(smaller, encoded) - before).abs().max() > 1e-3
    assert torch.equal(last_logits(subject, encoded), before)


def test_a_saved_model_says_the_same_in_a_fresh_process(toy, tmp_path):
    smaller = made(toy("llava"))
    encoded = smaller.encode(toys.pair(smaller))
    saving.save(smaller, tmp_path / "m")
    torch.save({"logits": last_logits(smaller, encoded), "said": smaller.generate(encoded, 6)}, tmp_path / "want.pt")
    code = (
        "import sys, torch\nfrom compress.saving import load\nfrom probe.tracing import last_logits\nfrom tests import toys\n"
        "m = load(sys.argv[1], device='cpu')\ne = m.encode(toys.pair(m))\nw = torch.load(sys.argv[2], weights_only=True)\n"
        "torch.testing.assert_close(last_logits(m, e), w['logits'], atol=1e-5, rtol=1e-5)\n"
        "assert m.generate(e, 6) == w['said']\nprint(len(m.ledger), m.n_layers)"
    )
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "m", tmp_path / "want.pt"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["2", str(smaller.n_layers)]
    assert saving.loads_in_transformers(smaller) == "yes, without tokens"
    plain = AutoModelForImageTextToText.from_pretrained(tmp_path / "m")
    smaller.detach()
    with torch.no_grad():
        torch.testing.assert_close(plain(**encoded.inputs).logits[:, -1], last_logits(smaller, encoded), atol=1e-4, rtol=1e-4)
    card = (tmp_path / "m" / "README.md").read_text()
    assert "remove-layers" in card
    assert "yes, without tokens" in card


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda text: text[: len(text) // 2], "is damaged"),
        (lambda text: '{"other": 1}', "is not a ledger of Sightline"),
        (lambda text: text.replace('"schema": 1', '"schema": 9'), "a newer Sightline"),
        (lambda text: text.replace('"drop-layers"', '"drop-lawyers"'), "names a change that cannot be made again"),
    ],
)
def test_a_spoilt_ledger_is_named(toy, tmp_path, spoil, message):
    saving.save(made(toy("llava")), tmp_path / "m")
    path = tmp_path / "m" / FILE
    path.write_text(spoil(path.read_text()))
    with pytest.raises(LedgerError, match=message):
        saving.load(tmp_path / "m", device="cpu")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layers": (9,)}, "layer 9 does not exist"),
        ({"layers": (0, 1, 2, 3)}, "at least one layer"),
        ({}, "either layers or a count"),
        ({"count": 2}, "needs evidence 'layer_scores'"),
        ({"count": 7}, "7 of 4 layers cannot be removed"),
    ],
)
def test_layers_that_cannot_go(toy, settings, message):
    with pytest.raises(PassError, match=message):
        compress(toy("llava"), [recipes.find_pass("remove-layers")(**settings)])


def test_nothing_removed_is_bitwise_nothing(toy):
    subject = toy("llava")
    encoded = subject.encode(toys.pair(subject))
    kinds = [("remove-layers", {"layers": ()}), ("tokens", {"method": "random", "budget": {"keep": 1.0}})]
    for title, settings in kinds:
        smaller = compress(subject, [recipes.find_pass(title).model_validate(settings)])
        assert smaller.ledger == ()
        assert torch.equal(last_logits(smaller, encoded), last_logits(subject, encoded))


def test_saving_leaves_what_stands_beside_alone_and_writes_where_one_is(toy, tmp_path, monkeypatch):
    (tmp_path / "m.partial").mkdir()
    (tmp_path / "m.partial" / "mine").write_text("kept")
    smaller = made(toy("llava"))
    saving.save(smaller, tmp_path / "m")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    saving.save(smaller, ".")
    assert (tmp_path / "m.partial" / "mine").read_text() == "kept"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["here", "m", "m.partial"]
    assert (
        {path.name for path in (tmp_path / "here").iterdir()}
        == {path.name for path in (tmp_path / "m").iterdir()}
        >= {FILE, "README.md"}
    )


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), SafetensorError("No space left on device")])
def test_a_full_disk_leaves_no_half_model(toy, tmp_path, monkeypatch, error):
    smaller = made(toy("llava"))

    def full(folder, **options):
        (folder / "model.safetensors").write_bytes(b"half")
        raise error

    monkeypatch.setattr(smaller.model, "save_pretrained", full)
    with pytest.raises(LedgerError, match="cannot be written: No space left on device"):
        saving.save(smaller, tmp_path / "m")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("one", "message"), [
    ({"prune": {"sparsity": 1.5}}, "passes.0.prune.sparsity: Input should be less than 1"),
    ({"prune": {"sparsity": 1}}, "passes.0.prune.sparsity: Input should be less than 1"),
    ({"subnet": {"sparsity": -0.1}}, "passes.0.subnet.sparsity: Input should be greater than or equal to 0"),
    ({"pyramid": {"keep": [1.5, 0.5, 0.2]}}, "a pyramid keeps shares from 0 to 1 of all tokens, not 1.5"),
    ({"pyramid": {"keep": [-0.5, 0.5, 0.2]}}, "a pyramid keeps shares from 0 to 1 of all tokens, not -0.5"),
    ({"tokens": {"method": "random", "budget": {"keep": -1}}}, "passes.0.tokens.budget.keep: Input should be greater than 0"),
    ({"tokens": {"method": "random", "budget": {"keep": 1.5}}}, "keep is a share up to 1.0 or a whole number of tokens, and 1.5 is neither"),
])  # fmt: skip
def test_shares_beyond_nothing_and_all_are_refused(one, message):
    with pytest.raises(RecipeError, match=message):
        parse({"passes": [one]})


def test_the_seed_of_a_recipe_is_that_of_every_pass_that_draws(toy):
    subject = toy("llava")
    encoded = subject.encode(toys.pair(subject))

    def said(recipe):
        smaller = compress(subject, recipe)
        found = last_logits(smaller, encoded)
        return found, smaller.ledger[0].settings["seed"]

    drawn = {"tokens": {"method": "random", "budget": {"keep": 4}}}
    own = {"tokens": {"method": "random", "budget": {"keep": 4}, "seed": 0}}
    zero, seven = parse({"passes": [drawn]}), parse({"passes": [drawn], "seed": 7})
    fixed = parse({"passes": [own], "seed": 7})
    assert [said(one)[1] for one in (zero, seven, fixed)] == [0, 7, 0]
    assert not torch.equal(said(zero)[0], said(seven)[0])
    assert torch.equal(said(zero)[0], said(fixed)[0])
    for one in (zero, seven, fixed):
        assert torch.equal(said(parse(yaml.safe_load(one.dumped())))[0], said(one)[0])
