"""What toys share: a tokenizer trained on the spot, pictures, sounds, and small configurations."""

from typing import Any

import numpy as np
import torch
import transformers as hf
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

_CORPUS = [
    "the cat sat on the mat . a dog ran in the park . what color is the ball ? red green blue left right above below",
    "describe the image in detail . USER : ASSISTANT : yes no one two three is there a person in the picture ?",
] * 4
Made = tuple[torch.nn.Module, Any]

USER = (
    "{{ bos_token }}a chat .{% for m in messages %} USER: {% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}IMAGE\n{% elif c['type'] == 'audio' %}AUDIO\n{% elif c['type'] == 'video' %}VIDEO\n"
    "{% else %}{{ c['text'] }}{% endif %}{% endfor %}{% endfor %}{% if add_generation_prompt %} ASSISTANT:{% endif %}"
)


def template(image: str = "", audio: str = "", video: str = "") -> str:
    """The toys' chat template with a family's own marks."""
    return USER.replace("IMAGE", image).replace("AUDIO", audio).replace("VIDEO", video)


def tokenizer(special: tuple[str, ...] = (), **named: str) -> hf.PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE(unk_token=None))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<pad>", "<s>", "</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    backend.train_from_iterator(_CORPUS, trainer)
    made = hf.PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>", padding_side="left",
        extra_special_tokens=named, model_max_length=4096,
    )  # fmt: skip
    if special:
        made.add_tokens(list(special), special_tokens=True)
    return made


def picture(height: int = 40, width: int = 60, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8))


def sound(seconds: float = 0.75, rate: int = 16_000, seed: int = 0) -> tuple[np.ndarray, int]:
    """Noise: samples (float32, mono) and their rate."""
    return np.random.default_rng(seed).standard_normal(int(seconds * rate)).astype(np.float32) * 0.1, rate


def text(vocabulary: int, layers: int = 4, **more: Any) -> dict[str, Any]:
    return dict(
        vocab_size=vocabulary, hidden_size=32, intermediate_size=64, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, bos_token_id=1, eos_token_id=2, pad_token_id=0, **more,
    )  # fmt: skip


def tower(**more: Any) -> dict[str, Any]:
    return dict(
        hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, image_size=28, patch_size=7, **more
    )


def clip() -> hf.CLIPVisionConfig:
    return hf.CLIPVisionConfig(**tower(projection_dim=32))


def siglip(**more: Any) -> hf.SiglipVisionConfig:
    return hf.SiglipVisionConfig(**tower(vision_use_head=False, **more))
