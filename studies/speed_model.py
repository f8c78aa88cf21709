"""A LLaVA-shaped model of any size with random weights, for measuring time and memory. It has nothing to say."""

from dataclasses import replace

import numpy as np
import torch
from PIL import Image
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

from probe.errors import StudyError
from probe.example import Example
from probe.subject import Subject, load

PATCH = 14


def placed(device: str | None, dtype: str | None) -> tuple[torch.device, torch.dtype]:
    """Where and in which numbers to measure: the GPU in bfloat16 where there is one, else the CPU in float32.

    Raises StudyError for a dtype that is none of those.
    """
    target = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if dtype not in (None, "float32", "bfloat16", "float16"):
        raise StudyError(f"there is no dtype {dtype!r}: name float32, bfloat16 or float16")
    return target, getattr(torch, dtype) if dtype else (torch.bfloat16 if target.type == "cuda" else torch.float32)


def llava_shaped(
    layers: int, width: int, heads: int, kv_heads: int, ffn: int, vocabulary: int, image_side: int, device: torch.device,
    dtype: torch.dtype, seed: int,
) -> Subject:  # fmt: skip
    """The model on its device; its tower is a quarter as wide as its decoder, which keeps LLaVA's proportions."""
    from studies.demo.build import TEMPLATE, tokenizer

    words = tokenizer()
    pixels = image_side * PATCH
    tower = max(64, width // 4)
    vision = CLIPVisionConfig(
        hidden_size=tower, intermediate_size=4 * tower, num_hidden_layers=max(2, layers // 2), num_attention_heads=max(1, tower // 64),
        image_size=pixels, patch_size=PATCH, projection_dim=tower,
    )  # fmt: skip
    text = LlamaConfig(
        vocab_size=max(vocabulary, len(words)), hidden_size=width, intermediate_size=ffn, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=kv_heads, max_position_embeddings=8192, bos_token_id=1, eos_token_id=2,
        pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(seed)
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=words.image_token_id)
    with device:
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            model = LlavaForConditionalGeneration(config)
        finally:
            torch.set_default_dtype(before)
    images = CLIPImageProcessorPil(size={"shortest_edge": pixels}, crop_size={"height": pixels, "width": pixels})
    processor = LlavaProcessor(
        images,
        words,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    )
    return load((model.eval(), processor))


def example(image_side: int, question: int) -> Example:
    """A grey picture and a question of so many words, with a system text as long as LLaVA's."""
    words = _words()
    system = " ".join((f"A chat about one scene. {'there is a ' * 8}").split())
    return Example(
        "bench", " ".join(words[:question]), (Image.new("RGB", (image_side * PATCH, image_side * PATCH), "grey"),),
        system=system, suffix="Answer briefly.",
    )  # fmt: skip


def alike(image_side: int, question: int, count: int, name: str, seed: int) -> list[Example]:
    """Different examples as long as `example`: pictures of noise, and the same words from another one on."""
    rng, words, one = np.random.default_rng(seed), _words(), example(image_side, question)
    side, rounds = image_side * PATCH, len(words) - question
    return [
        replace(
            one, id=f"{name} {i}", prompt=" ".join(words[i % rounds :][:question]),
            images=(Image.fromarray(rng.integers(0, 256, (side, side, 3), dtype=np.uint8)),),
        )
        for i in range(count)
    ]  # fmt: skip


def _words() -> list[str]:
    return ("what color is the circle and how many things are red or blue in this scene right there ? " * 8).split()
