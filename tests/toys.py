"""Tiny random-weight models of real architectures, with real processors, built offline."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers as hf
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from probe.loading import picture_only

hf.logging.set_verbosity_error()
_CORPUS = [
    "the cat sat on the mat . a dog ran in the park . what color is the ball ? red green blue left right above below",
    "describe the image in detail . USER : ASSISTANT : yes no one two three is there a person in the picture ?",
] * 4
Made = tuple[torch.nn.Module, Any]


def tokenizer(**named: str) -> hf.PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE(unk_token=None))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<pad>", "<s>", "</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    backend.train_from_iterator(_CORPUS, trainer)
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>", padding_side="left",
        extra_special_tokens=named, model_max_length=4096,
    )  # fmt: skip


def picture(height: int = 40, width: int = 60, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8))


def _text(vocabulary: int, layers: int = 4, **more: Any) -> dict[str, Any]:
    return dict(
        vocab_size=vocabulary, hidden_size=32, intermediate_size=64, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, bos_token_id=1, eos_token_id=2, pad_token_id=0, **more,
    )  # fmt: skip


def _clip() -> hf.CLIPVisionConfig:
    return hf.CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, image_size=28, patch_size=7,
        projection_dim=32,
    )  # fmt: skip


_USER = (
    "{{ bos_token }}a chat .{% for m in messages %} USER: {% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}IMAGE\n{% else %}{{ c['text'] }}{% endif %}{% endfor %}{% endfor %} ASSISTANT:"
)


def llava() -> Made:
    tok = tokenizer(image_token="<image>")
    images = hf.CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    processor = hf.LlavaProcessor(
        images, tok, patch_size=7, vision_feature_select_strategy="default", num_additional_image_tokens=1,
        chat_template=_USER.replace("IMAGE", "<image>"),
    )  # fmt: skip
    config = hf.LlavaConfig(
        vision_config=_clip(), text_config=hf.LlamaConfig(**_text(len(tok))), image_token_index=tok.image_token_id
    )
    return hf.LlavaForConditionalGeneration(config), processor


def llava_next() -> Made:
    tok = tokenizer(image_token="<image>")
    pins = [[28, 56], [56, 28], [56, 56]]
    images = hf.LlavaNextImageProcessorPil(
        size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}, image_grid_pinpoints=pins
    )
    processor = hf.LlavaNextProcessor(
        images, tok, patch_size=7, vision_feature_select_strategy="default", num_additional_image_tokens=1,
        chat_template=_USER.replace("IMAGE", "<image>"),
    )  # fmt: skip
    config = hf.LlavaNextConfig(
        vision_config=_clip(), text_config=hf.LlamaConfig(**_text(len(tok))), image_token_index=tok.image_token_id,
        image_grid_pinpoints=pins,
    )  # fmt: skip
    return hf.LlavaNextForConditionalGeneration(config), processor


def llava_onevision() -> Made:
    tok = tokenizer(image_token="<image>", video_token="<video>")
    pins = [[28, 28], [28, 56], [56, 28], [56, 56]]
    images = hf.LlavaOnevisionImageProcessorPil(size={"height": 28, "width": 28}, image_grid_pinpoints=pins)
    processor = picture_only(hf.LlavaOnevisionProcessor)(
        images, tok, None, num_image_tokens=16, vision_feature_select_strategy="full",
        chat_template=_USER.replace("IMAGE", "<image>"),
    )  # fmt: skip
    vision = hf.SiglipVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, image_size=28, patch_size=7,
        vision_use_head=False,
    )  # fmt: skip
    config = hf.LlavaOnevisionConfig(
        vision_config=vision, text_config=hf.Qwen2Config(**_text(len(tok))), image_token_index=tok.image_token_id,
        video_token_index=tok.video_token_id, image_grid_pinpoints=pins,
    )  # fmt: skip
    return hf.LlavaOnevisionForConditionalGeneration(config), processor


_QWEN = {
    "image_token": "<|image_pad|>", "video_token": "<|video_pad|>", "vision_start_token": "<|vision_start|>",
    "vision_end_token": "<|vision_end|>",
}  # fmt: skip


def _qwen(processor_class: str, model_class: str, config_class: str, vision: dict[str, Any], rope: dict[str, Any]) -> Made:
    tok = tokenizer(**_QWEN)
    images = hf.Qwen2VLImageProcessorPil(
        patch_size=7, temporal_patch_size=2, merge_size=2, min_pixels=14 * 14, max_pixels=56 * 56
    )
    template = _USER.replace("IMAGE\n", "<|vision_start|><|image_pad|><|vision_end|>")
    processor = picture_only(getattr(hf, processor_class))(images, tok, None, chat_template=template)
    ids = {
        "image_token_id": tok.image_token_id, "video_token_id": tok.video_token_id,
        "vision_start_token_id": tok.vision_start_token_id, "vision_end_token_id": tok.vision_end_token_id,
    }  # fmt: skip
    common = {"patch_size": 7, "spatial_merge_size": 2, "temporal_patch_size": 2, "num_heads": 4, "hidden_size": 32}
    rope = {"rope_type": "default", "rope_theta": 10000.0, **rope}
    config = getattr(hf, config_class)(
        text_config=_text(len(tok), rope_parameters=rope, **({"head_dim": 8} if "3" in config_class else {})),
        vision_config={**common, **vision}, **ids,
    )  # fmt: skip
    return getattr(hf, model_class)(config), processor


def qwen2_vl() -> Made:
    return _qwen(
        "Qwen2VLProcessor", "Qwen2VLForConditionalGeneration", "Qwen2VLConfig",
        {"depth": 2, "embed_dim": 32, "mlp_ratio": 2}, {"mrope_section": [1, 1, 2]},
    )  # fmt: skip


def qwen2_5_vl() -> Made:
    return _qwen(
        "Qwen2_5_VLProcessor", "Qwen2_5_VLForConditionalGeneration", "Qwen2_5_VLConfig",
        {"depth": 2, "out_hidden_size": 32, "intermediate_size": 64, "window_size": 28, "fullatt_block_indexes": [1]},
        {"mrope_section": [1, 1, 2]},
    )  # fmt: skip


def qwen3_vl() -> Made:
    return _qwen(
        "Qwen3VLProcessor", "Qwen3VLForConditionalGeneration", "Qwen3VLConfig",
        {"depth": 3, "out_hidden_size": 32, "intermediate_size": 64, "num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1]},
        {"mrope_section": [2, 1, 1], "mrope_interleaved": True},
    )  # fmt: skip


FAMILIES: dict[str, Callable[[], Made]] = {
    f.__name__: f for f in (llava, llava_next, llava_onevision, qwen2_vl, qwen2_5_vl, qwen3_vl)
}


def paligemma() -> Made:
    tok = tokenizer(image_token="<image>")
    images = hf.SiglipImageProcessorPil(size={"height": 28, "width": 28})
    images.image_seq_length = 16
    text = hf.GemmaConfig(**{**_text(len(tok)), "num_key_value_heads": 1}, head_dim=8)
    vision = hf.SiglipVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, image_size=28, patch_size=7,
        vision_use_head=False, projection_dim=32,
    )  # fmt: skip
    processor = hf.PaliGemmaProcessor(images, tok)
    config = hf.PaliGemmaConfig(
        vision_config=vision, text_config=text, image_token_index=tok.image_token_id, projection_dim=32, hidden_size=32,
        vocab_size=len(tok),
    )  # fmt: skip
    return hf.PaliGemmaForConditionalGeneration(config), processor


def qwen3_5() -> Made:
    tok = tokenizer(**_QWEN)
    images = hf.Qwen2VLImageProcessorPil(
        patch_size=7, temporal_patch_size=2, merge_size=2, min_pixels=14 * 14, max_pixels=56 * 56
    )
    template = _USER.replace("IMAGE\n", "<|vision_start|><|image_pad|><|vision_end|>")
    processor = picture_only(hf.Qwen3VLProcessor)(images, tok, None, chat_template=template)
    rope = {
        "rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5, "mrope_section": [2, 1, 1],
        "mrope_interleaved": True,
    }  # fmt: skip
    text = _text(
        len(tok), head_dim=16, linear_key_head_dim=8, linear_value_head_dim=8, linear_num_key_heads=2, linear_num_value_heads=4,
        rope_parameters=rope,
    )  # fmt: skip
    vision = {
        "depth": 2, "hidden_size": 32, "out_hidden_size": 32, "intermediate_size": 64, "num_heads": 4, "patch_size": 7,
        "spatial_merge_size": 2, "temporal_patch_size": 2, "num_position_embeddings": 64,
    }  # fmt: skip
    ids = {
        "image_token_id": tok.image_token_id, "video_token_id": tok.video_token_id,
        "vision_start_token_id": tok.vision_start_token_id, "vision_end_token_id": tok.vision_end_token_id,
    }  # fmt: skip
    return hf.Qwen3_5ForConditionalGeneration(hf.Qwen3_5Config(text_config=text, vision_config=vision, **ids)), processor


# Families without a row, to see that what cannot be exact is refused by name.
OTHERS: dict[str, Callable[[], Made]] = {f.__name__: f for f in (paligemma, qwen3_5)}


def llama() -> Made:
    """A text-only model."""
    tok = tokenizer()
    return hf.LlamaForCausalLM(hf.LlamaConfig(**_text(len(tok)))), tok


def build(family: str, seed: int = 0) -> Made:
    """A toy whose weights are wide enough for attention to differ from position to position."""
    torch.manual_seed(seed)
    model, processor = {**FAMILIES, **OTHERS, "llama": llama}[family]()
    for weight in model.parameters():
        if weight.dim() >= 2:
            torch.nn.init.normal_(weight, 0, 0.18)
    return model.eval(), processor


def save(model: torch.nn.Module, processor: Any, folder: Path) -> None:
    """A folder as the hub has it: weights, tokenizer, picture processor, chat template, and the processor's class name."""
    model.save_pretrained(folder)
    if "video_processor" not in processor.get_attributes():
        processor.save_pretrained(folder)
        return
    processor.tokenizer.save_pretrained(folder)
    processor.image_processor.save_pretrained(folder)
    names = ("num_image_tokens", "vision_feature_select_strategy")
    settings = {name: getattr(processor, name) for name in names if hasattr(processor, name)}
    (folder / "processor_config.json").write_text(json.dumps({"processor_class": type(processor).__name__, **settings}))
    (folder / "chat_template.jinja").write_text(processor.chat_template)
