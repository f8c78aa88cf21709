"""The same points through nnsight and TransformerLens: the same numbers, refusals that read, and nothing left behind."""

import subprocess
import sys
from functools import cache

import pytest
import torch
import transformers
from nnsight import NNsight, TransformersModel
from transformer_lens.factories.architecture_adapter_factory import SUPPORTED_ARCHITECTURES
from transformer_lens.model_bridge.sources import build_bridge_from_module
from transformer_lens.model_bridge.sources.transformers import helpers

from probe import Ablate, Example, Knockout, Lens, Mass, Patch, Patterns, Residual, Rows, load, trace
from probe.backends import BACKENDS
from probe.backends import nnsight as through_nnsight
from probe.backends import transformer_lens as through_lens
from probe.backends.twin import twin
from probe.errors import BackendError, EditError
from probe.points import POINTS
from probe.tracing import last_logits
from tests import toys
from tests.toys.base import text, tokenizer

# The families that TransformerLens 4.3 does not take, and what is said of them where torchvision is not installed.
ASKS_FOR_TORCHVISION = ("qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_5")
REFUSED = {
    "llava_pixtral": "cannot take this LLaVA (Pixtral tower) model apart: 'PixtralVisionModel' object has no attribute",
    **dict.fromkeys(ASKS_FOR_TORCHVISION, "only where torchvision is installed: pip install torchvision"),
    **dict.fromkeys(
        ("video_llava", "llava_next_video", "qwen2_vl", "qwen2_5_omni", "voxtral", "internvl", "paligemma", "smolvlm", "mllama",
         "blip2", "instructblip", "phi4_multimodal"), "of the models that read pictures it takes",
    ),
}  # fmt: skip
CASES = [(family, backend) for family in toys.FAMILIES for backend in BACKENDS]


def questions(subject):
    """Two questions of different length, padded on the left: with pictures, with sounds, or with neither."""
    sees = "image" in subject.marks
    hears = not sees and "audio" in subject.marks
    words = ("what color is the ball ?", "is there a dog in the park right there ?")
    return subject.encode([
        Example(str(i), prompt, (toys.picture(40 - 10 * i, 60 - 10 * i, i),) if sees else (),
                sounds=(toys.sound(0.75 - 0.2 * i, seed=i),) if hears else ())
        for i, prompt in enumerate(words)
    ], "left")  # fmt: skip


def everything(subject):
    """Every recorder, each point in the layers that have it."""
    parts = {"z": subject.anatomy.attention, "attn_out": subject.anatomy.attention, "mlp_out": subject.anatomy.mlp}
    found = {
        point: [i for i, part in enumerate(parts.get(point, range(subject.n_layers))) if part is not None] for point in POINTS
    }
    states = [Residual(point, layers) for point, layers in found.items() if layers]
    return [*states, Mass(), Rows("question"), Patterns(layers=None), Lens(top=2)]


@cache
def by_hooks(subject):
    encoded = questions(subject)
    return encoded, trace(subject, encoded, everything(subject))


def assert_same(found, expected, tolerance=1e-5):
    """To 1e-5 of one, or of the largest number where that is larger."""
    assert found.records.keys() == expected.records.keys()
    for name, record in [*expected.records.items(), ("logits", None)]:
        a, b = (found.logits, expected.logits) if record is None else (found[name].tensor, record.tensor)
        if a.is_floating_point():
            assert a.shape == b.shape, name
            scale = max(1.0, float(b.abs().max()))
            torch.testing.assert_close(a, b, atol=tolerance * scale, rtol=0, msg=lambda text, name=name: f"{name}: {text}")
        elif "ids" not in name:  # the most likely tokens may change places in a tie
            assert torch.equal(a, b), name


@pytest.mark.parametrize(("family", "backend"), CASES)
def test_every_point_and_weight_is_the_hooks(toy, family, backend):
    subject = toy(family)
    encoded, expected = by_hooks(subject)
    if backend == "transformer_lens" and family in REFUSED:
        with pytest.raises(BackendError) as error:
            trace(subject, encoded, [Residual()], backend=backend)
        assert REFUSED[family] in str(error.value)
        return
    assert_same(trace(subject, encoded, everything(subject), backend=backend), expected)


def test_how_many_families_were_compared_and_how_many_refused():
    assert len(toys.FAMILIES) == 25
    assert set(REFUSED) <= set(toys.FAMILIES)
    taken = [family for family in toys.FAMILIES if family not in REFUSED]
    assert taken == ["llava", "llava_next", "llava_onevision", "mistral3", "qwen2_audio", "gemma3", "gemma4", "idefics3"]
    assert len(CASES) - len(REFUSED) == 25 + 8


def test_batches_were_padded_on_the_left(toy):
    padded = [family for family in toys.FAMILIES if any("pad" in m.segments for m in by_hooks(toy(family))[0].maps)]
    assert len(padded) >= 22
    assert {"llava", "gemma3", "gemma4", "idefics3", "mistral3"} <= set(padded)


@pytest.mark.parametrize("family", ASKS_FOR_TORCHVISION)
def test_what_only_lacks_torchvision_agrees_too(toy, family, monkeypatch):
    subject = toy(family)
    monkeypatch.setattr(SUPPORTED_ARCHITECTURES[type(subject.model).__name__], "required_libraries", [])
    encoded, expected = by_hooks(subject)
    record = everything(subject)
    if family == "qwen3_5":
        with pytest.raises(BackendError, match=r"^z of this Qwen3.5 model is scaled or gated on its way"):
            trace(subject, encoded, record, backend="transformer_lens")
        record.remove(Residual("z", [3]))
        expected = trace(subject, encoded, record)
    assert_same(trace(subject, encoded, record, backend="transformer_lens"), expected)


def test_what_a_layer_adds_is_what_its_blocks_add(toy):
    checked = []
    for family in toys.FAMILIES:
        subject = toy(family)
        if None in (*subject.anatomy.attention, *subject.anatomy.mlp) or "cross_attn" in subject.anatomy.attention:
            continue
        found = trace(
            subject, questions(subject), [Residual(point) for point in ("resid_pre", "attn_out", "mlp_out", "resid_post")]
        )
        pre, attention, mlp, post = (found[name].tensor for name in ("states", "states.1", "states.2", "states.3"))
        torch.testing.assert_close(pre + attention + mlp, post, atol=1e-5, rtol=0)
        checked.append(family)
    assert len(checked) == 22
    assert {"gemma3", "gemma4", "qwen3_vl_moe"} <= set(checked)


@pytest.mark.parametrize(
    ("name", "more"), [("Glm4", {"head_dim": 8}), ("Olmo2", {}), ("Granite", {"residual_multiplier": 0.5})]
)
def test_norms_and_factors_between_a_block_and_the_stream(name, more):
    words = tokenizer()
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForCausalLM")(getattr(transformers, f"{name}Config")(**text(len(words)), **more))
    for weight in model.parameters():
        torch.nn.init.normal_(weight, 0 if weight.dim() > 1 else 1, 0.2)
    subject = load((model, words))
    encoded = questions(subject)
    record = [Residual(point) for point in ("resid_pre", "attn_out", "mlp_out", "resid_post")]
    expected = trace(subject, encoded, record)
    pre, attention, mlp, post = (expected[name].tensor for name in ("states", "states.1", "states.2", "states.3"))
    torch.testing.assert_close(pre + attention + mlp, post, atol=1e-5, rtol=0)
    assert_same(trace(subject, encoded, record, backend="nnsight"), expected)
    edit = Ablate("attn_out", 1, how="noise")
    assert_same(trace(subject, encoded, [record[1]], [edit], backend="nnsight"), trace(subject, encoded, [record[1]], [edit]))
    if name == "Granite":
        with pytest.raises(BackendError, match=r"^(attn|mlp)_out of this generic model is scaled or gated on its way, and"):
            trace(subject, encoded, record, backend="transformer_lens")
    else:
        assert_same(trace(subject, encoded, record, backend="transformer_lens"), expected)


def test_without_weights_nnsight_keeps_the_models_own_kernel(toy):
    subject = toy("llava")
    encoded = questions(subject)
    record = [Residual(point) for point in POINTS]
    found, expected = (trace(subject, encoded, record, backend=backend) for backend in ("nnsight", "hooks"))
    assert torch.equal(found.logits, last_logits(subject, encoded))
    assert all(torch.equal(found[name].tensor, expected[name].tensor) for name in expected.records)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("family", ["llava", "gemma3"])
def test_edits_at_every_point_are_the_hooks(toy, family, backend):
    subject = toy(family)
    encoded = questions(subject)
    plain = last_logits(subject, encoded)
    changed = []
    for point in POINTS:
        states = trace(subject, encoded, [Residual(point, [1])])["states"].tensor[0]
        edits = [Ablate(point, [1, 2], "question", how="noise"), Patch(point, 1, [12, 13], states[1, :2])]
        expected, found = (trace(subject, encoded, [Residual(point)], edits, backend=name) for name in ("hooks", backend))
        assert_same(found, expected)
        changed += [point] if (found.logits - plain).abs().max() > 1e-2 else []
    assert changed == list(POINTS)


def state(model):
    """What a trace could leave behind: modules and their attributes, hooks, weights, attention implementations."""
    return [
        (
            name, type(module), id(module), sorted(vars(module)), module.training, len(module._forward_hooks),
            len(module._forward_pre_hooks), getattr(getattr(module, "config", None), "_attn_implementation", None),
            [(key, id(weight), weight._version, weight.requires_grad) for key, weight in module._parameters.items() if weight is not None],
            [(key, id(buffer), buffer._version) for key, buffer in module._buffers.items() if buffer is not None],
        )
        for name, module in model.named_modules()
    ]  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_model_is_as_it_was(toy, backend):
    subject = toy("gemma3")
    encoded = questions(subject)
    before, installs = state(subject.model), helpers._ensure_torchvision
    trace(subject, encoded, everything(subject), [Ablate("mlp_out", 1)], backend=backend)
    assert state(subject.model) == before
    with pytest.raises(BackendError, match=r"^knock-outs run on the hooks backend: the others take Ablate and Patch$"):
        trace(subject, encoded, [Mass()], [Knockout("question", "image")], backend=backend)
    with pytest.raises(EditError, match="needs a tensor of shape"):
        trace(subject, encoded, [Mass()], [Patch("mlp_out", 1, "question", torch.zeros(3, 3))], backend=backend)
    assert state(subject.model) == before
    assert helpers._ensure_torchvision is installs
    assert torch.equal(trace(subject, encoded).logits, last_logits(subject, encoded))


def test_a_twin_shares_the_weights_and_nothing_else(toy):
    model = toy("llava").model
    copy = twin(model)
    assert all(a is b for a, b in zip(model.parameters(), copy.parameters(), strict=True))
    assert not {id(module) for module in model.modules()} & {id(module) for module in copy.modules()}
    assert not {id(buffer) for buffer in model.buffers()} & {id(buffer) for buffer in copy.buffers()}
    assert copy.config is not model.config
    assert copy.model.language_model.config is copy.config.get_text_config()


@pytest.mark.parametrize("backend", BACKENDS)
def test_weights_that_change_between_traces_are_seen(backend):
    subject = load(toys.build("llava"))
    encoded = questions(subject)
    first = trace(subject, encoded, [Residual()], backend=backend)
    with torch.no_grad():
        subject.layers[0].mlp.down_proj.weight.mul_(2)
    subject.layers[1].self_attn.o_proj.weight = torch.nn.Parameter(subject.layers[1].self_attn.o_proj.weight * 2)
    second = trace(subject, encoded, [Residual()], backend=backend)
    assert (first["states"].tensor - second["states"].tensor).abs().max() > 0.1
    assert_same(second, trace(subject, encoded, [Residual()]))


def test_libraries_are_imported_when_asked_for_and_not_before(tmp_path):
    (tmp_path / "nnsight.yaml").write_text("APP:\n  PYMOUNT: false\n")
    code = (
        "import sys\n"
        "from probe import Residual, load, trace\n"
        "from tests import toys\n"
        "subject = load(toys.build('llama'))\n"
        "from probe import Example\n"
        "example = Example('a', 'what is this ?')\n"
        "trace(subject, example, [Residual()])\n"
        "assert not {'nnsight', 'transformer_lens'} & set(sys.modules)\n"
        "trace(subject, example, [Residual()], backend='nnsight')\n"
        "assert 'nnsight' in sys.modules and 'transformer_lens' not in sys.modules\n"
        "assert not hasattr(object, 'save')\n"
    )
    environment = {"NNSIGHT_CONFIG": str(tmp_path / "nnsight.yaml"), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    ran = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr


def test_refusals_read(toy, monkeypatch):
    subject = toy("llava")
    with pytest.raises(BackendError, match=r"^there is no backend 'nnsigt' \(did you mean 'nnsight'\?\)$"):
        trace(subject, questions(subject), backend="nnsigt")
    blind = toy("blip2")
    with pytest.raises(EditError, match=r"^layer 0 of this BLIP-2 model has no feed-forward block to hook$"):
        trace(blind, questions(blind), [Residual("mlp_out")], backend="nnsight")
    with pytest.raises(BackendError) as error:
        trace(blind, questions(blind), [Residual()], backend="transformer_lens")
    assert str(error.value).startswith(
        "TransformerLens does not take Blip2ForConditionalGeneration: of the models that read pictures"
    )
    assert "LlavaForConditionalGeneration" in str(error.value)
    monkeypatch.setattr("probe.backends.find_spec", lambda name: None)
    with pytest.raises(BackendError, match=r'^the backend \'nnsight\' is not installed: pip install "sightline\[backends\]"$'):
        trace(subject, questions(subject), backend="nnsight")


def test_an_nnsight_model_is_unwrapped():
    model, processor = toys.build("llava")
    wrapped = TransformersModel(model, task="image-text-to-text", processor=processor)
    found = through_nnsight.unwrap(wrapped)
    assert found[0] is model
    assert found[1] is processor
    subject = load(found)
    encoded, expected = by_hooks(load(toys.build("llava")))
    for backend in ("hooks", *BACKENDS):
        assert_same(trace(subject, encoded, everything(subject), backend=backend), expected)
    with wrapped.trace(**encoded.inputs):
        kept = wrapped.model.language_model.layers[3].output.save()
    assert torch.equal(kept[:, -1:], trace(subject, encoded, [Residual("resid_post", [3], "last")])["states"].tensor[0])
    with pytest.raises(BackendError, match=r"^an NNsight has no processor: load\(\(model, processor\)\) with the model"):
        through_nnsight.unwrap(NNsight(model))


def test_a_bridge_is_unwrapped_and_goes_on_working():
    model, processor = toys.build("gemma3")
    expected_names = [name for name, _ in model.named_parameters()]
    bridge = build_bridge_from_module(model, type(model).__name__, hf_config=model.config)
    with pytest.raises(BackendError, match=r"^this bridge has no processor: set bridge.processor, or call load"):
        through_lens.unwrap(bridge)
    bridge.processor = processor
    found, same = through_lens.unwrap(bridge)
    assert same is processor
    assert [name for name, _ in found.named_parameters()] == expected_names != [name for name, _ in model.named_parameters()]
    assert all(a is b for a, b in zip(found.parameters(), bridge.original_model.parameters(), strict=True))
    subject = load((found, processor))
    encoded, expected = by_hooks(load(toys.build("gemma3")))
    for backend in ("hooks", *BACKENDS):
        assert_same(trace(subject, encoded, everything(subject), backend=backend), expected)
    with torch.no_grad():
        again = bridge.original_model(**encoded.inputs).logits[:, -1]
    torch.testing.assert_close(again, expected.logits, atol=1e-4, rtol=0)
    bridge._weights_processed = True
    with pytest.raises(BackendError, match=r"^this bridge has rewritten its weights \(enable_compatibility_mode\)"):
        through_lens.unwrap(bridge)
