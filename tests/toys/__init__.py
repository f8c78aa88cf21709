"""Tiny random-weight models of real architectures, with real processors, built offline."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers as hf

from tests.toys import llava, others, qwen
from tests.toys.asked import WORDS, extended, pair, questions
from tests.toys.base import Made, picture, sound

hf.logging.set_verbosity_error()

# Every row of probe/anatomy/rows.py, in its order.
FAMILIES: dict[str, Callable[[], Made]] = {
    f.__name__: f
    for f in (
        llava.llava, llava.llava_pixtral, llava.llava_next, llava.llava_onevision, llava.video_llava, llava.llava_next_video,
        llava.mistral3, qwen.qwen2_vl, qwen.qwen2_5_vl, qwen.qwen3_vl, qwen.qwen3_vl_moe, qwen.qwen3_5, qwen.qwen2_5_omni,
        qwen.qwen2_audio, others.voxtral, others.internvl, others.paligemma, others.gemma3, others.gemma4, others.idefics3,
        others.smolvlm, others.mllama, others.blip2, others.instructblip, others.phi4_multimodal,
    )
}  # fmt: skip
# Those of the first house: pictures in the sequence, causal, softmax attention in every layer.
PLAIN = ("llava", "llava_next", "llava_onevision", "qwen2_vl", "qwen2_5_vl", "qwen3_vl")


def build(family: str, seed: int = 0) -> Made:
    """A toy whose weights are wide enough for attention to differ from position to position, and whose gates are open."""
    torch.manual_seed(seed)
    model, processor = {**FAMILIES, "llama": others.llama}[family]()
    for weight in model.parameters():
        if weight.dim() >= 2:
            torch.nn.init.normal_(weight, 0, 0.18)
        elif not weight.any():
            torch.nn.init.normal_(weight, 0, 0.3)
    return model.eval(), processor


def wide(family: str) -> Made:
    """A toy whose sliding windows hold the whole prompt: tokens can be dropped from it."""
    model, processor = build(family)
    config = model.config.get_text_config()
    if getattr(config, "sliding_window", None):
        config.sliding_window = 256
        for module in model.modules():
            if getattr(module, "sliding_window", None):
                module.sliding_window = 256
    return model, processor


def save(model: torch.nn.Module, processor: Any, folder: Path) -> None:
    """A folder as the hub has it: weights, tokenizer, picture processor, chat template, and the processor's class name."""
    model.save_pretrained(folder)
    if "video_processor" not in getattr(processor, "get_attributes", list)():
        processor.save_pretrained(folder)
        return
    processor.tokenizer.save_pretrained(folder)
    nested = {
        part: json.loads(getattr(processor, part).to_json_string()) for part in ("image_processor", "feature_extractor")
        if part in processor.get_attributes()
    }  # fmt: skip
    names = (
        "num_image_tokens", "vision_feature_select_strategy", "patch_size", "num_additional_image_tokens", "image_seq_length",
        "image_seq_len",
    )  # fmt: skip
    settings = {name: getattr(processor, name) for name in names if hasattr(processor, name)}
    (folder / "processor_config.json").write_text(
        json.dumps({"processor_class": type(processor).__name__, **settings, **nested})
    )
    (folder / "chat_template.jinja").write_text(processor.chat_template)


__all__ = ["FAMILIES", "PLAIN", "WORDS", "build", "extended", "pair", "picture", "questions", "save", "sound", "wide"]
