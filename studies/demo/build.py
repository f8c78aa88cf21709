"""The demo models before training: tokenizer, chat template, processors and the Hugging Face configurations."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import nn
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextImageProcessorPil,
    LlavaNextVideoConfig,
    LlavaNextVideoForConditionalGeneration,
    LlavaNextVideoProcessor,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    Qwen2AudioConfig,
    Qwen2AudioForConditionalGeneration,
    Qwen2AudioProcessor,
    WhisperFeatureExtractor,
)
from transformers.models.whisper.modeling_whisper import sinusoids

from probe.loading import picture_only
from studies.demo import sound
from studies.demo.world import ANSWERS, ASKERS, CELLS, COLOURS, NAMES

SYSTEM = "A chat about one scene."

WIDTH, LAYERS, TOWER_LAYERS, EAR_LAYERS = 128, 8, 5, 4
INPUT, PATCH = 64, 8  # the tower sees 64 x 64 pixels as 8 x 8 patches
MELS, HOP = 64, 200  # the audio tower sees 64 mel bands, 80 times a second
STRIDE = 4 * HOP  # samples of one position: the tower halves the time twice
INIT = WIDTH**-0.5  # 0.02 leaves so narrow a model on a plateau for thousands of steps

TEMPLATE = (
    "{{ bos_token }}"
    "{% if messages[0]['role'] != 'system' %}" + SYSTEM + "{% endif %}"
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %} USER:{% elif message['role'] == 'assistant' %} ASSISTANT:{% endif %}"
    "{% if message['content'] is string %}"
    "{{ ('' if message['role'] == 'system' else ' ') + message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] in ('image', 'video', 'audio') %}<{{ part['type'] }}>"
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


def tokenizer(media: Sequence[str] = ("image",)) -> PreTrainedTokenizerFast:
    """A byte-level BPE in which every word of the world is one token, and any other text still has tokens.

    Every tokenizer has the same ids; `media` says whose placeholders it knows by name.
    """
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
        extra_special_tokens={f"{medium}_token": f"<{medium}>" for medium in media}, model_max_length=512, chat_template=TEMPLATE,
    )  # fmt: skip


_PICTURES: dict[str, Any] = {
    "size": {"shortest_edge": INPUT}, "crop_size": {"height": INPUT, "width": INPUT}, "resample": 4,
    "image_mean": [0.25] * 3, "image_std": [0.25] * 3,
}  # fmt: skip


def processor() -> LlavaProcessor:
    """LLaVA's own processor; pictures are reduced to 64 x 64 by averaging."""
    return LlavaProcessor(
        CLIPImageProcessorPil(**_PICTURES), tokenizer(), patch_size=PATCH, vision_feature_select_strategy="default",
        num_additional_image_tokens=1, chat_template=TEMPLATE,
    )  # fmt: skip


def clip_processor() -> LlavaNextVideoProcessor:
    """LLaVA-NeXT-Video's own processor without its video part, which needs torchvision.

    Each frame goes through the picture part, whose first tile is the whole frame, reduced as for LLaVA.
    """
    return picture_only(LlavaNextVideoProcessor)(
        video_processor=None, image_processor=LlavaNextImageProcessorPil(**_PICTURES, image_grid_pinpoints=[[INPUT, INPUT]]),
        tokenizer=tokenizer(("image", "video")), patch_size=PATCH, vision_feature_select_strategy="default",
        num_additional_image_tokens=1, chat_template=TEMPLATE,
    )  # fmt: skip


def extractor() -> WhisperFeatureExtractor:
    """Whisper's feature extractor for two seconds; its window of 50 ms tells the lower pitches apart."""
    return WhisperFeatureExtractor(
        feature_size=MELS, sampling_rate=sound.RATE, hop_length=HOP, chunk_length=sound.SAMPLES // sound.RATE, n_fft=4 * HOP
    )


def sound_processor() -> Qwen2AudioProcessor:
    """Qwen2-Audio's own processor."""
    return Qwen2AudioProcessor(extractor(), tokenizer(("audio",)), chat_template=TEMPLATE, audio_token="<audio>")


def save(processor: Any, folder: Path) -> None:
    """`save_pretrained`, also for the clip processor, whose missing video part `save_pretrained` stumbles over."""
    if getattr(processor, "video_processor", folder) is not None:
        processor.save_pretrained(folder)
        return
    processor.tokenizer.save_pretrained(folder)
    (folder / "chat_template.jinja").write_text(processor.chat_template)
    # Where torchvision is installed, transformers finds the video part described and loads the whole processor.
    video = {"video_processor_type": "LlavaNextVideoVideoProcessor", "do_sample_frames": False, **_PICTURES}
    settings = {**processor.to_dict(), "video_processor": video}
    (folder / "processor_config.json").write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")


def text_config(vocabulary: int) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=vocabulary, hidden_size=WIDTH, intermediate_size=256, num_hidden_layers=LAYERS,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512, initializer_range=INIT,
        bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip


def language_model(vocabulary: int) -> LlamaForCausalLM:
    return LlamaForCausalLM(text_config(vocabulary))


def _eyes() -> CLIPVisionConfig:
    return CLIPVisionConfig(
        hidden_size=WIDTH, intermediate_size=256, num_hidden_layers=TOWER_LAYERS, num_attention_heads=4,
        image_size=INPUT, patch_size=PATCH, projection_dim=WIDTH,
    )  # fmt: skip


def llava(vocabulary: int, image_token_id: int) -> LlavaForConditionalGeneration:
    """LLaVA with a CLIP tower; the projector reads the last layer's patches, the CLS token stays in the tower."""
    model = LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=_eyes(),
            text_config=text_config(vocabulary),
            image_token_index=image_token_id,
            vision_feature_layer=-1,
            # A linear connector, as the first LLaVA's: combinations that training never shows stay sums of their parts.
            projector_hidden_act="linear",
        )
    )
    tower = model.model.vision_tower
    _spread(tower, model.model.multi_modal_projector)
    tower.embeddings.patch_embedding.weight.data.normal_(0, (3 * PATCH * PATCH) ** -0.5)
    tower.embeddings.position_embedding.weight.data.normal_(0, 0.3)
    _shrink_outputs([out for layer in tower.encoder.layers for out in (layer.self_attn.out_proj, layer.mlp.fc2)])
    return model


def llava_next_video(eyes: LlavaForConditionalGeneration, video_token_id: int) -> LlavaNextVideoForConditionalGeneration:
    """LLaVA-NeXT-Video with the tower and the connector of a LLaVA; two by two patches of a frame become one position."""
    words = eyes.config.text_config
    model = LlavaNextVideoForConditionalGeneration(
        LlavaNextVideoConfig(
            vision_config=_eyes(), text_config=text_config(words.vocab_size),
            image_token_index=eyes.config.image_token_id, video_token_index=video_token_id,
            vision_feature_layer=-1, image_grid_pinpoints=[[INPUT, INPUT]], projector_hidden_act=eyes.config.projector_hidden_act,
        )
    )  # fmt: skip
    for part in ("vision_tower", "multi_modal_projector"):
        model.get_submodule(f"model.{part}").load_state_dict(eyes.get_submodule(f"model.{part}").state_dict())
    return model


def qwen2_audio(vocabulary: int, audio_token_id: int) -> Qwen2AudioForConditionalGeneration:
    """Qwen2-Audio with a Llama and a small tower, which makes a position of every 50 ms."""
    ears = {
        "num_mel_bins": MELS, "encoder_layers": EAR_LAYERS, "encoder_attention_heads": 4, "encoder_ffn_dim": 256,
        "d_model": WIDTH, "max_source_positions": sound.SAMPLES // HOP // 2,
    }  # fmt: skip
    model = Qwen2AudioForConditionalGeneration(
        Qwen2AudioConfig(audio_config=ears, text_config=text_config(vocabulary), audio_token_index=audio_token_id)
    )
    tower = model.model.audio_tower
    _spread(tower, model.model.multi_modal_projector)
    for conv in (tower.conv1, tower.conv2):
        conv.weight.data.normal_(0, (conv.in_channels * 3) ** -0.5)
    # Whisper's own: transformers keeps them fixed and expects them in the checkpoint.
    tower.embed_positions.weight.data.copy_(sinusoids(*tower.embed_positions.weight.shape))
    _shrink_outputs([out for layer in tower.layers for out in (layer.self_attn.out_proj, layer.fc2)])
    return model


def _spread(*parts: nn.Module) -> None:
    for part in parts:
        for name, weight in part.named_parameters():
            if weight.dim() >= 2 and "embed" not in name:
                weight.data.normal_(0, INIT)


def _shrink_outputs(outputs: list[nn.Linear]) -> None:
    """What the layers add to the residual stream starts as large as one layer's alone would."""
    for out in outputs:
        out.weight.data.mul_(len(outputs) ** -0.5)
