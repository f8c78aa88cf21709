"""The passes that prune single weights: exact counts in real models, what the next layer sees, saved and loaded, refused by name."""

import copy

import pytest
import torch
import yaml
from transformers import AutoModelForImageTextToText

from compress import saving
from compress.allocation import loss, sensitivity
from compress.calibration import Calibration
from compress.passes.base import find_pass
from compress.passes.prune import PruneWeights, masks, overlaps, targeted
from compress.pruning import Pattern
from compress.recipe import compress, parse
from probe.calibration import linear_maps
from probe.errors import PassError, RecipeError
from probe.example import Example
from probe.tracing import last_logits
from tests import toys
from tests.oracles import pruning as oracle

METHODS = ("magnitude", "wanda", "sparsegpt")
FAMILIES = ("qwen3_vl", "gemma3")
RAN: list[tuple[str, str, str]] = []


def asked(subject, count=4):
    return [
        Example(
            f"{e.id}{i}",
            e.prompt,
            e.images,
            suffix=e.suffix,
            answer=("red", "two")[i % 2],
            tags={"kind": ("colour", "count")[i % 2]},
        )
        for i, e in enumerate([*toys.pair(subject)] * (count // 2))
    ]


def evidence(subject, side="both"):
    return {"calibration": Calibration(tuple(asked(subject)), side, batch=4)}


def prune(subject, found=None, **settings):
    return compress(subject, [find_pass("prune").model_validate(settings)], evidence(subject) if found is None else found)


def zeros(subject):
    return {name: int((module.weight == 0).sum()) for name, module in linear_maps(subject)}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("how", [{"sparsity": 0.3}, {"n_of_m": "2:4"}])
def test_every_map_loses_exactly_what_was_asked(toy, family, method, how):
    subject = toy(family)
    before = copy.deepcopy(subject.model.state_dict())
    smaller = prune(subject, method=method, **how)
    assert all(torch.equal(a, b) for a, b in zip(before.values(), subject.model.state_dict().values(), strict=True))
    for name, module in linear_maps(smaller):
        rows, columns = module.weight.shape
        wanted = (
            rows * columns // 2
            if "n_of_m" in how
            else int(rows * columns * 0.3)
            if method != "wanda"
            else rows * int(columns * 0.3)
        )
        assert zeros(smaller)[name] == wanted
        if "n_of_m" in how:
            assert set((module.weight.view(-1, 4) == 0).sum(1).tolist()) == {2}
    ours = dict(linear_maps(smaller))
    others = [n for n, p in smaller.model.named_parameters() if not any(p is m.weight for m in ours.values())]
    assert all(torch.equal(before[name], smaller.model.get_parameter(name)) for name in others)
    assert smaller.ledger[0].changes[0]["sparsity"] == pytest.approx(
        sum(zeros(smaller).values()) / sum(m.weight.numel() for m in ours.values())
    )
    RAN.append((family, method, next(iter(how))))


def test_every_method_ran_on_every_family():
    assert len(RAN) == len(set(RAN)) == len(FAMILIES) * len(METHODS) * 2


@pytest.mark.parametrize("rerun", [True, False])
def test_wanda_layer_by_layer_is_what_plain_passes_say(toy, rerun):
    """Slow and obvious: whole passes of a model that is pruned a layer at a time, or of the dense one."""
    subject = toy("qwen2_vl")
    found = evidence(subject)
    smaller = prune(subject, found, method="wanda", sparsity=0.5, rerun=rerun)
    (batch,) = found["calibration"].encoded(subject)
    real = torch.tensor([[s != "pad" for s in m.segments] for m in batch.maps])
    slow = copy.deepcopy(subject.model)
    looked_at = slow if rerun else subject.model
    for index, layer in enumerate(slow.get_submodule(subject.anatomy.layers)):
        for name, state in entering(looked_at, looked_at.get_submodule(subject.anatomy.layers)[index], batch).items():
            squares = state[real].double().square().sum(0)
            weight = layer.get_submodule(name).weight
            weight.data *= torch.from_numpy(oracle.wanda(weight.detach().numpy(), squares.numpy(), 0.5))
    for (name, got), want in zip(smaller.model.named_parameters(), slow.parameters(), strict=True):
        assert torch.equal(got, want), name


def entering(model, layer, batch):
    """What enters every linear map of a layer in a plain pass."""
    found = {}
    maps = [(name, module) for name, module in layer.named_modules() if isinstance(module, torch.nn.Linear)]
    hooks = [
        module.register_forward_pre_hook(lambda _, args, name=name: found.update({name: args[0]})) for name, module in maps
    ]
    with torch.no_grad():
        model(**batch.inputs, use_cache=False)
    for hook in hooks:
        hook.remove()
    return found


def test_sparsegpt_says_more_like_the_dense_model_than_magnitude(toy):
    subject = toy("llava")
    batch = subject.encode(asked(subject))
    dense = last_logits(subject, batch)
    gaps = {m: float((last_logits(prune(subject, method=m, sparsity=0.5), batch) - dense).square().mean()) for m in METHODS}
    assert gaps["sparsegpt"] < gaps["magnitude"]
    assert gaps["wanda"] < gaps["magnitude"]


@pytest.mark.parametrize(
    ("allocation", "method"),
    [("owl", "wanda"), ("ecoflap", "wanda"), ("tamp", "wanda"), ("owl", "sparsegpt"), ("tamp", "magnitude")],
)
def test_allocations_take_the_same_budget_unevenly(toy, allocation, method):
    subject = toy("llava")
    before = copy.deepcopy(subject.model.state_dict())
    targets = ("*.down_proj", "*.o_proj") if allocation == "ecoflap" else ("*",)
    smaller = prune(subject, method=method, sparsity=0.5, allocation=allocation, targets=targets)
    assert all(torch.equal(a, b) for a, b in zip(before.values(), subject.model.state_dict().values(), strict=True))
    lost = [sum(n for name, n in zeros(smaller).items() if name.startswith(f"{i}.")) for i in range(4)]
    size = sum(module.weight.numel() for module in targeted(smaller, targets).values())
    assert len(set(lost)) > 1
    assert sum(lost) / size == pytest.approx(0.5, abs=0.02)  # a row loses a whole number of its 32 or 64 weights


def test_sensitivity_is_the_slope_of_the_loss(toy):
    subject = toy("llava")
    batches = evidence(subject)["calibration"].encoded(subject)
    with torch.no_grad():
        assert loss(subject, batches) == pytest.approx(oracle.answers_loss(subject.model, batches[0]), abs=1e-4)
    name = "self_attn.o_proj"
    got = sensitivity(subject, batches, lambda layer, path: layer == 1 and path == name, seed=3, epsilon=1e-2)
    assert [value > 0 for value in got] == [False, True, False, False]
    weight = subject.layers[1].get_submodule(name).weight
    number = [path for path, _ in subject.layers[1].named_modules()].index(name)
    z = torch.randn(weight.shape, generator=torch.Generator().manual_seed((3 * 1009 + 1) * 1009 + number))
    model = copy.deepcopy(subject.model)
    moved = model.get_submodule(subject.anatomy.layers)[1].get_submodule(name).weight
    logits = model(**batches[0].inputs, use_cache=False).logits.double().log_softmax(-1)
    where = [(i, j) for i, m in enumerate(batches[0].maps) for j, s in enumerate(m.segments) if s == "answer"]
    (-sum(logits[i, j - 1, batches[0].inputs["input_ids"][i, j]] for i, j in where) / len(where)).backward()
    slope = float((moved.grad * z).sum())
    assert got[1] == pytest.approx(abs(slope) * float(weight.detach().abs().sum()), rel=0.05)


@pytest.mark.parametrize("settings", [{"method": "wanda", "sparsity": 0.5}, {"method": "sparsegpt", "n_of_m": "2:4"}])
def test_a_pruned_model_is_saved_as_it_is(toy, tmp_path, settings):
    smaller = prune(toy("qwen3_vl"), **settings)
    encoded = smaller.encode(toys.pair(smaller))
    want = last_logits(smaller, encoded)
    assert (want - last_logits(toy("qwen3_vl"), encoded)).abs().max() > 1e-3
    saving.save(smaller, tmp_path / "m")
    assert saving.loads_in_transformers(smaller) == "yes"
    again = saving.load(tmp_path / "m", device="cpu", check=False)
    assert torch.equal(last_logits(again, encoded), want)
    assert zeros(again) == zeros(smaller)
    assert again.ledger == smaller.ledger
    assert again.ledger[0].evidence["calibration"]["examples"] == 4
    plain = AutoModelForImageTextToText.from_pretrained(tmp_path / "m")
    with torch.no_grad():
        torch.testing.assert_close(plain(**encoded.inputs).logits[:, -1], want, atol=1e-5, rtol=1e-5)
    change = PruneWeights.model_validate({k: v for k, v in again.ledger[0].changes[0].items() if k != "kind"})
    change.carry_out(again)  # its zeros are there already
    with pytest.raises(PassError, match=r"the zeros of 0\..* are not those of the ledger"):
        change.carry_out(saving.Smaller.of(toy("qwen3_vl")))


def test_nothing_pruned_is_bitwise_nothing(toy):
    subject = toy("llava")
    for title, settings in (("prune", {"sparsity": 0.0}), ("prune", {"n_of_m": "0:4"}), ("subnet", {"sparsity": 0.0})):
        smaller = compress(subject, [find_pass(title).model_validate(settings)], {})
        assert smaller.ledger == ()
        assert all(torch.equal(a, b) for a, b in zip(smaller.model.parameters(), subject.model.parameters(), strict=True))


def test_targets_choose_maps(toy):
    smaller = prune(toy("llava"), method="wanda", sparsity=0.5, targets=("*.mlp.*", "2.self_attn.q_proj"))
    touched = {name for name, count in zeros(smaller).items() if count}
    assert touched == {f"{i}.mlp.{p}_proj" for i in range(4) for p in ("gate", "up", "down")} | {"2.self_attn.q_proj"}


def test_sides_find_other_masks(toy):
    subject = toy("llava")
    made = {s: prune(subject, method="wanda", sparsity=0.5, side=s) for s in ("both", "perceptual", "textual")}
    assert len({tuple(sorted((c["name"], c["zeros"]) for c in m.ledger[0].changes[0]["maps"])) for m in made.values()}) == 3


@pytest.mark.parametrize(
    ("family", "settings", "message"),
    [
        ("llava", {"sparsity": 0.5, "targets": ["*.mlp.gate_porj"]}, r"matches no linear map.*did you mean 'mlp.gate_proj'"),
        ("llava", {"n_of_m": "2:4", "allocation": "owl"}, "the same share of every layer"),
        ("llava", {"n_of_m": "3:7"}, r"0.self_attn.q_proj: 32 inputs cannot be cut into groups of 7"),
        ("llava", {"sparsity": 0.9, "allocation": "owl"}, r"owl would take .* choose one between"),
        ("qwen3_vl_moe", {"sparsity": 0.5}, "experts .* are no linear maps of their own"),
        ("mllama", {"sparsity": 0.5}, "reads the picture through cross-attention"),
    ],
)
def test_what_cannot_be_pruned_is_named(toy, family, settings, message):
    with pytest.raises(PassError, match=message):
        prune(toy(family), **settings)


@pytest.mark.parametrize("settings", ["{}", "{sparsity: 0.5, n_of_m: '2:4'}"])
def test_how_much_is_said_once(settings):
    with pytest.raises(RecipeError, match=r"passes.0.prune.*either a sparsity .* or a pattern"):
        parse(yaml.safe_load(f"passes: [{{prune: {settings}}}]"))


def test_evidence_that_is_missing_or_says_nothing(toy):
    subject = toy("llava")
    with pytest.raises(PassError, match="needs evidence 'calibration'"):
        prune(subject, {}, sparsity=0.5)
    assert zeros(prune(subject, {}, method="magnitude", sparsity=0.5))["0.mlp.up_proj"] == 1024
    silent = {"calibration": Calibration((Example("a", "why ?"),))}
    with pytest.raises(PassError, match="no calibration example has one: give answers"):
        prune(subject, silent, sparsity=0.5, allocation="ecoflap")
    with pytest.raises(PassError, match="tamp compares what is shown with words"):
        prune(subject, silent, sparsity=0.5, allocation="tamp")


def test_a_target_that_is_missed_is_named(toy):
    from compress.passes.prune import _checked

    maps = targeted(toy("llava"), ("1.mlp.up_proj",))
    with pytest.raises(
        PassError, match=r"1.mlp.up_proj was to lose 1024 of its 2048 weights and lost 0, since no calibration token"
    ):
        _checked({}, maps, dict.fromkeys(maps, Pattern(0.5)), whole=True)
    short = torch.ones(64, 32)
    short[0, :3] = 0
    with pytest.raises(PassError, match=r"1.mlp.up_proj was to lose 1024 of its 2048 weights and lost 3$"):
        _checked({"1.mlp.up_proj": short}, maps, dict.fromkeys(maps, Pattern(0.5)), whole=True)


# --- alpha-SubNet ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def several(toy):
    """Questions with pictures and without, of two kinds."""
    subject = toy("llava")
    told = [
        Example(f"t{i}", "what color is the ball ?", context="a red ball", answer="red", tags={"kind": "colour"})
        for i in range(2)
    ]
    return subject, Calibration((*asked(subject), *told), batch=4)


@pytest.mark.parametrize(
    ("by", "combine"), [("modality", "intersection"), ("kind", "union"), ("side", "complement"), ("side", "intersection")]
)
def test_masks_are_combined_as_sets(several, by, combine):
    from compress.passes.prune import grouped

    subject, calibration = several
    smaller = compress(subject, [find_pass("subnet")(sparsity=0.5, by=by, combine=combine)], {"calibration": calibration})
    change = smaller.ledger[0].changes[0]
    groups = grouped(calibration, by)
    assert list(change["groups"]) == list(groups)
    each = [masks(subject, one, Pattern(0.5), [name for name, _ in linear_maps(subject)]) for one in groups.values()]
    a, b = ({name: mask.numpy() for name, mask in one.items()} for one in each)
    both = {"intersection": lambda x, y: x & y, "union": lambda x, y: x | y, "complement": lambda x, y: x & ~y}[combine]
    for name, module in linear_maps(smaller):
        assert ((module.weight != 0).numpy() == both(a[name], b[name])).all()
    if combine == "intersection":
        assert change["sparsity"] >= 0.5
    if combine == "union":
        assert change["sparsity"] <= 0.5
    assert change["chance"] == pytest.approx(1 / 3)
    inter, union = (sum(int(op(a[n], b[n]).sum()) for n in a) for op in (lambda x, y: x & y, lambda x, y: x | y))
    assert change["iou"][0][1] == change["iou"][1][0] == pytest.approx(inter / union)
    assert change["iou"][0][0] == change["iou"][1][1] == 1.0
    assert change["iou"][0][1] < 1


def test_masks_that_are_one_overlap_wholly():
    mask = {"a": torch.tensor([[True, False]]), "b": torch.tensor([[False, True]])}
    assert overlaps([mask, mask]) == ((1.0, 1.0), (1.0, 1.0))
    assert overlaps([mask, {n: ~m for n, m in mask.items()}]) == ((1.0, 0.0), (0.0, 1.0))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"by": "kind", "groups": ["color"]}, r"belongs to 'color' by kind .did you mean 'colour'"),
        ({"groups": ["image"]}, "an? intersection is of at least two groups, and .* image by modality"),
        ({"combine": "complement", "groups": ["image"]}, "a complement is of exactly two groups"),
    ],
)
def test_groups_that_cannot_be_combined(several, settings, message):
    subject, calibration = several
    with pytest.raises(PassError, match=message):
        compress(subject, [find_pass("subnet").model_validate({"sparsity": 0.5, **settings})], {"calibration": calibration})
