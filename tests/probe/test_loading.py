"""Opening models: real folders made with save_pretrained, and every way in which a folder can be wrong."""

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from probe import Example, load, trace
from probe.anatomy import resolve, verify
from probe.errors import AnatomyError, ExampleError, LoadError
from probe.media import MAX_PIXELS, open_picture
from probe.tracing import last_logits
from tests import toys


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    model, processor = toys.build("llava")
    path = tmp_path_factory.mktemp("models") / "llava"
    toys.save(model, processor, path)
    return path


@pytest.fixture
def copy(folder, tmp_path):
    import shutil

    return shutil.copytree(folder, tmp_path / "llava")


@pytest.mark.parametrize("family", toys.FAMILIES)
def test_a_saved_folder_opens_as_the_model_in_memory(family, tmp_path):
    model, processor = toys.build(family)
    toys.save(model, processor, tmp_path)
    here, there = load((model, processor)), load(tmp_path, device="cpu")
    assert there.anatomy == here.anatomy
    assert [check.name for check in there.checks] == ["identity", "felt", "lens", "seen"][: len(here.checks)]
    pair = toys.questions(here)
    a, b = here.encode(pair), there.encode(pair)
    assert [m.segments for m in a.maps] == [m.segments for m in b.maps]
    torch.testing.assert_close(last_logits(here, a), last_logits(there, b), atol=1e-5, rtol=0)
    assert here.generate(pair, 3) == there.generate(pair, 3)


def test_device_map_models_are_traced(folder, pair):
    plain, mapped = load(folder, device="cpu"), load(folder, device_map={"": "cpu"}, device="cpu")
    assert torch.equal(trace(plain, pair).logits, trace(mapped, pair).logits)


def test_generate_is_transformers_generate(toy, pair):
    subject = toy("qwen2_vl")
    encoded = subject.encode(pair)
    made = subject.model.generate(**encoded.inputs, max_new_tokens=4, do_sample=False)
    expected = subject.tokenizer.batch_decode(made[:, len(encoded.maps[0]) :], skip_special_tokens=True)
    assert subject.generate(pair, 4) == [text.strip() for text in expected]


def _drop(path, name):
    (path / name).unlink()


def _rewrite(path, **fields):
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, **fields}))


def _poison(path):
    weights = load_file(path / "model.safetensors")
    next(w for name, w in weights.items() if "lm_head" in name)[0, 0] = float("nan")
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})


def _pickled(path):
    (path / "model.safetensors").rename(path / "pytorch_model.bin")


def _truncated(path):
    whole = (path / "model.safetensors").read_bytes()
    (path / "model.safetensors").write_bytes(whole[: len(whole) // 2])


BROKEN = {
    "no config": (lambda p: _drop(p, "config.json"), "has no config.json: a folder written by save_pretrained was expected"),
    "broken config": (lambda p: (p / "config.json").write_text("{"), "is not valid JSON"),
    "pickle only": (_pickled, "has only pickled weights .pytorch_model.bin.: weights are read from safetensors only"),
    "no weights": (lambda p: _drop(p, "model.safetensors"), "has no weights: weights are read from safetensors only"),
    "truncated": (_truncated, "the weights in .* are damaged|cannot be opened"),
    "NaN": (_poison, "the weight lm_head.weight of .* holds values that are not numbers: the file is damaged"),
    "remote code": (lambda p: _rewrite(p, auto_map={"AutoModel": "x.Y"}), "needs code that it brings along"),
    "unknown": (lambda p: _rewrite(p, model_type="llavva"), "does not know the architecture 'llavva'"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_folder_is_one_clear_sentence(copy, case):
    harm, message = BROKEN[case]
    harm(copy)
    with pytest.raises(LoadError, match=message) as caught:
        load(copy, device="cpu")
    assert "\n" not in str(caught.value)


def test_there_were_eight_ways():
    assert len(BROKEN) == 8


def test_a_folder_that_is_not_there():
    with pytest.raises(LoadError, match="there is no model folder at /nowhere/at/all"):
        load("/nowhere/at/all")


def test_a_demo_model_that_is_not_there():
    with pytest.raises(LoadError, match=r"there is no demo model 'demo:nothing' .there is "):
        load("demo:nothing")


def test_a_text_only_model_is_not_shown_pictures(pair):
    subject = load(toys.build("llama"))
    with pytest.raises(ExampleError, match=r"is a text-only model .llama.: example 'a' shows it 1 picture"):
        subject.encode(pair[0])
    assert subject.generate(pair[0].without_media(), 2)


def test_anatomy_is_resolved_for_every_toy():
    found = {name: resolve(toys.build(name)[0]) for name in (*toys.FAMILIES, "llama")}
    assert len(found) == 26
    assert {a.layers for n, a in found.items() if n in toys.PLAIN} == {"model.language_model.layers"}
    assert found["qwen3_vl"].vision == "model.visual"
    assert found["qwen3_vl"].connector is None or "merger" in found["qwen3_vl"].connector
    assert found["llava"].connector == "model.multi_modal_projector"
    assert found["llama"].vision is None
    assert found["qwen3_5"].attention.count(None) == 3
    assert found["mllama"].cross == (False, True, False, True)
    assert found["qwen3_vl_moe"].experts == ("mlp.experts",) * 4
    assert (found["qwen2_audio"].vision, found["qwen2_audio"].audio) == (None, "model.audio_tower")
    assert [name for name, a in found.items() if a.family == "generic"] == ["llama"]
    assert len({a.family for a in found.values()}) == 26


def test_two_modules_for_one_role_are_refused():
    model, _ = toys.build("llava")
    model.model.vision_tower.multi_modal_projector = torch.nn.Identity()
    with pytest.raises(
        AnatomyError, match=r"two modules of the architecture 'llava' could be its connector .*: name one in its row"
    ):
        resolve(model)


def test_a_wrong_anatomy_is_caught_by_experiment():
    from dataclasses import replace

    model, _ = toys.build("llava")
    anatomy = resolve(model)
    wrong = replace(anatomy, final_norm=f"{anatomy.layers}.0.input_layernorm")
    torch.nn.init.uniform_(model.get_submodule(wrong.final_norm).weight, 2, 3)
    with pytest.raises(AnatomyError, match="'llava' fails the check 'lens'"):
        verify(model, wrong, {"input_ids": torch.tensor([[1, 5, 6, 7]])})


def test_a_setting_that_changes_the_readout_is_caught_by_experiment():
    """Granite divides its logits: a key of its configuration that the lens knows nothing of."""
    made = {}
    for scaling in (1.0, 8.0):
        torch.manual_seed(0)
        config = transformers.GraniteConfig(
            vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            logits_scaling=scaling,
        )  # fmt: skip
        model = transformers.GraniteForCausalLM(config).eval()
        torch.nn.init.normal_(model.lm_head.weight)
        made[scaling] = (model, {"input_ids": torch.tensor([[1, 5, 6, 7]])})
    assert all(check.held for check in verify(made[1.0][0], resolve(made[1.0][0]), made[1.0][1]))
    with pytest.raises(AnatomyError, match="'granite' fails the check 'lens'"):
        verify(made[8.0][0], resolve(made[8.0][0]), made[8.0][1])


def test_a_model_without_layers_is_refused_with_the_row_to_add():
    model, _ = toys.build("llama")
    model.model.layers = torch.nn.Sequential(*model.model.layers)
    with pytest.raises(
        AnatomyError,
        match=r"no decoder layers was found in the architecture 'llama': add a row for it to probe/anatomy/rows.py",
    ):
        resolve(model)


PICTURES = {
    "missing": (lambda p: None, "there is no picture at"),
    "empty": (lambda p: p.write_bytes(b""), "is empty: a picture was expected"),
    "not a picture": (lambda p: p.write_text("hello"), "is not a picture that Pillow can read"),
    "truncated": (lambda p: _half(p), "is damaged or truncated"),
    "bomb": (lambda p: _bomb(p), f"at most {MAX_PIXELS:,} are opened"),
}


def _half(path):
    toys.picture(64, 64).save(path, format="PNG")
    path.write_bytes(path.read_bytes()[:400])


def _bomb(path):
    from PIL import Image

    Image.new("1", (12000, 9000)).save(path, format="PNG")


@pytest.mark.parametrize("case", PICTURES)
def test_a_broken_picture_is_one_clear_sentence(toy, tmp_path, case):
    make, message = PICTURES[case]
    path = tmp_path / "p.png"
    make(path)
    with pytest.raises(ExampleError, match=message) as caught:
        open_picture(path)
    assert "\n" not in str(caught.value)
    with pytest.raises(ExampleError, match=message):
        toy("llava").encode(Example("a", "what ?", (path,)))


def test_there_were_five_broken_pictures():
    assert len(PICTURES) == 5


def test_a_good_picture_is_read_in_colour(tmp_path):
    toys.picture(9, 7).convert("L").save(tmp_path / "p.png")
    assert open_picture(tmp_path / "p.png").mode == "RGB"
    assert open_picture(tmp_path / "p.png").size == (7, 9)
