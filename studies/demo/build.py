"""The demo models before training: tokenizer, chat template, processor and the Hugging Face configurations."""

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from studies.demo.world import ANSWERS, ASKERS, CELLS, COLOURS, NAMES

SYSTEM = "A chat about one scene."

WIDTH, LAYERS, TOWER_LAYERS = 128, 8, 5
INPUT, PATCH = 64, 8  # the tower sees 64 x 64 pixels as 8 x 8 patches
INIT = WIDTH**-0.5  # 0.02 leaves so narrow a model on a plateau for thousands of steps

TEMPLATE = (
    "{{ bos_token }}"
    "{% if messages[0]['role'] != 'system' %}" + SYSTEM + "{% endif %}"
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %} USER:{% elif message['role'] == 'assistant' %} ASSISTANT:{% endif %}"
    "{% if message['content'] is string %}"
    "{{ ('' if message['role'] == 'system' else ' ') + message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>"
    "{% else %}{{ ('' if message['role'] == 'system' else ' ') + part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %} ASSISTANT:{% endif %}"
)

_GRAMMAR = [
    "color",
    "of",
    "what",
    "is",
    "the",
    "thing",
    "in",
    "count",
    "how",
    "many",
    "things",
    "are",
    "any",
    "there",
    "a",
    "place",
    "where",
    "or",
    "left",
    "right",
    "above",
    "below",
    "same",
    "and",
    "direction",
    "which",
    "way",
    "does",
    "go",
    "going",
    "at",
    "up",
    "down",
    "USER:",
    "ASSISTANT:",
    "Answer",
    "briefly.",
    "A",
    "chat",
    "about",
    "one",
    "scene.",
]


_OPENING = ("what", "where", "how", "is", "are", "which", "count", "thing", "color", "place", "any", "same", "direction")


def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE in which every word of the world is one token, and any other text still has tokens."""
    words = [*_GRAMMAR, *COLOURS, *NAMES, *CELLS, *ANSWERS, *(answer.capitalize() for answer in ANSWERS), *ASKERS]
    backend = Tokenizer(models.BPE(unk_token=None))
    split = pre_tokenizers.Split(Regex(r" ?[\p{L}\p{N}]+[:.]?| ?[^\s\p{L}\p{N}]+|\s+"), "isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    # People write line breaks, "circle?" and "What"; the world writes one space, "circle ?" and "what".
    opening = [normalizers.Replace(Regex(rf"\b{word.capitalize()}\b"), word) for word in _OPENING]
    spaces = [normalizers.Replace(Regex(r"\s+"), " "), normalizers.Replace(Regex(r"(?<! )\?"), " ?")]
    backend.normalizer = normalizers.Sequence([*spaces, *opening])
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=4000,
        special_tokens=["<pad>", "<s>", "</s>", "<image>", "<video>", "<audio>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([f" {word}" for word in dict.fromkeys(words)] + [" ?", " ;", "A"], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>", padding_side="left",
        extra_special_tokens={"image_token": "<image>"}, model_max_length=512, chat_template=TEMPLATE,
    )  # fmt: skip


def processor() -> LlavaProcessor:
    """LLaVA's own processor; pictures are reduced to 64 x 64 by averaging."""
    images = CLIPImageProcessorPil(
        size={"shortest_edge": INPUT}, crop_size={"height": INPUT, "width": INPUT}, resample=4,
        image_mean=[0.25] * 3, image_std=[0.25] * 3,
    )  # fmt: skip
    return LlavaProcessor(
        images, tokenizer(), patch_size=PATCH, vision_feature_select_strategy="default", num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    )  # fmt: skip


def text_config(vocabulary: int) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=vocabulary, hidden_size=WIDTH, intermediate_size=256, num_hidden_layers=LAYERS,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512, initializer_range=INIT,
        bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip


def language_model(vocabulary: int) -> LlamaForCausalLM:
    return LlamaForCausalLM(text_config(vocabulary))


def llava(vocabulary: int, image_token_id: int) -> LlavaForConditionalGeneration:
    """LLaVA with a CLIP tower; the projector reads the last layer's patches, the CLS token stays in the tower."""
    vision = CLIPVisionConfig(
        hidden_size=WIDTH, intermediate_size=256, num_hidden_layers=TOWER_LAYERS, num_attention_heads=4,
        image_size=INPUT, patch_size=PATCH, projection_dim=WIDTH,
    )  # fmt: skip
    model = LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=vision,
            text_config=text_config(vocabulary),
            image_token_index=image_token_id,
            vision_feature_layer=-1,
        )
    )
    tower = model.model.vision_tower
    for part in (tower, model.model.multi_modal_projector):
        for name, weight in part.named_parameters():
            if weight.dim() >= 2 and "embedding" not in name:
                weight.data.normal_(0, INIT)
    tower.embeddings.patch_embedding.weight.data.normal_(0, (3 * PATCH * PATCH) ** -0.5)
    tower.embeddings.position_embedding.weight.data.normal_(0, 0.3)
    for layer in tower.encoder.layers:
        for out in (layer.self_attn.out_proj, layer.mlp.fc2):
            out.weight.data.mul_((2 * TOWER_LAYERS) ** -0.5)
    return model
