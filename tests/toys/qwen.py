"""The Qwen vision-language models, their mixture of experts, and Qwen's audio models."""

from typing import Any

import transformers as hf

from probe.loading import picture_only
from tests.toys.base import Made, template, text, tokenizer

_TOKENS = {
    "image_token": "<|image_pad|>", "video_token": "<|video_pad|>", "vision_start_token": "<|vision_start|>",
    "vision_end_token": "<|vision_end|>",
}  # fmt: skip
_TOWER = {
    "depth": 2, "patch_size": 7, "spatial_merge_size": 2, "temporal_patch_size": 2, "num_heads": 4, "hidden_size": 32
}  # fmt: skip
_WINDOWED = {**_TOWER, "out_hidden_size": 32, "intermediate_size": 64, "window_size": 28, "fullatt_block_indexes": [1]}
_DEEPSTACK = {
    **_TOWER, "depth": 3, "out_hidden_size": 32, "intermediate_size": 64, "num_position_embeddings": 64,
    "deepstack_visual_indexes": [0, 1],
}  # fmt: skip
_INTERLEAVED = {"mrope_section": [2, 1, 1], "mrope_interleaved": True}


def _pictures() -> hf.Qwen2VLImageProcessorPil:
    return hf.Qwen2VLImageProcessorPil(
        patch_size=7, temporal_patch_size=2, merge_size=2, min_pixels=14 * 14, max_pixels=56 * 56
    )


def _rope(**more: Any) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": 10000.0, **more}


def _qwen(processor: str, config: str, vision: dict[str, Any], rope: dict[str, Any], **more: Any) -> Made:
    tok = tokenizer(**_TOKENS)
    marked = template("<|vision_start|><|image_pad|><|vision_end|>", video="<|vision_start|><|video_pad|><|vision_end|>")
    made = picture_only(getattr(hf, processor))(_pictures(), tok, None, chat_template=marked.replace("|>\n", "|>"))
    ids = {
        "image_token_id": tok.image_token_id, "video_token_id": tok.video_token_id,
        "vision_start_token_id": tok.vision_start_token_id, "vision_end_token_id": tok.vision_end_token_id,
    }  # fmt: skip
    settings = getattr(hf, config)(
        text_config=text(len(tok), rope_parameters=_rope(**rope), **more), vision_config=vision, **ids
    )
    return getattr(hf, config.replace("Config", "ForConditionalGeneration"))(settings), made


def qwen2_vl() -> Made:
    vision = {**_TOWER, "embed_dim": 32, "mlp_ratio": 2}
    return _qwen("Qwen2VLProcessor", "Qwen2VLConfig", vision, {"mrope_section": [1, 1, 2]})


def qwen2_5_vl() -> Made:
    return _qwen("Qwen2_5_VLProcessor", "Qwen2_5_VLConfig", _WINDOWED, {"mrope_section": [1, 1, 2]})


def qwen3_vl() -> Made:
    return _qwen("Qwen3VLProcessor", "Qwen3VLConfig", _DEEPSTACK, _INTERLEAVED, head_dim=8)


def qwen3_vl_moe() -> Made:
    return _qwen(
        "Qwen3VLProcessor", "Qwen3VLMoeConfig", _DEEPSTACK, _INTERLEAVED, head_dim=8, num_experts=4, num_experts_per_tok=2,
        moe_intermediate_size=16,
    )  # fmt: skip


def qwen3_5() -> Made:
    vision = {**_TOWER, "out_hidden_size": 32, "intermediate_size": 64, "num_position_embeddings": 64}
    return _qwen(
        "Qwen3VLProcessor", "Qwen3_5Config", vision, {**_INTERLEAVED, "partial_rotary_factor": 0.5}, head_dim=16,
        linear_key_head_dim=8, linear_value_head_dim=8, linear_num_key_heads=2, linear_num_value_heads=4,
    )  # fmt: skip


def _ear(**more: Any) -> dict[str, Any]:
    return dict(
        num_mel_bins=16, encoder_layers=2, encoder_attention_heads=4, encoder_ffn_dim=64, d_model=32, max_source_positions=50,
        **more,
    )  # fmt: skip


def qwen2_audio() -> Made:
    tok = tokenizer(audio_token="<|AUDIO|>", audio_bos_token="<|audio_bos|>", audio_eos_token="<|audio_eos|>")
    features = hf.WhisperFeatureExtractor(feature_size=16, chunk_length=1, n_fft=400, hop_length=160)
    marked = template(audio="<|audio_bos|><|AUDIO|><|audio_eos|>")
    processor = hf.Qwen2AudioProcessor(features, tok, chat_template=marked)
    config = hf.Qwen2AudioConfig(
        audio_config=_ear(), text_config=hf.Qwen2Config(**text(len(tok))), audio_token_index=tok.audio_token_id
    )
    return hf.Qwen2AudioForConditionalGeneration(config), processor


def qwen2_5_omni() -> Made:
    tok = tokenizer(
        image_token="<|IMAGE|>", video_token="<|VIDEO|>", audio_token="<|AUDIO|>", vision_bos_token="<|vision_bos|>",
        vision_eos_token="<|vision_eos|>", audio_bos_token="<|audio_bos|>", audio_eos_token="<|audio_eos|>",
    )  # fmt: skip
    features = hf.WhisperFeatureExtractor(feature_size=16, chunk_length=1)
    marked = template("<|vision_bos|><|IMAGE|><|vision_eos|>", "<|audio_bos|><|AUDIO|><|audio_eos|>")
    processor = picture_only(hf.Qwen2_5OmniProcessor)(_pictures(), None, features, tok, chat_template=marked)
    config = hf.Qwen2_5OmniThinkerConfig(
        audio_config=_ear(n_window=25, output_dim=32), vision_config=_WINDOWED,
        text_config=text(len(tok), rope_parameters=_rope(mrope_section=[1, 1, 2])), audio_token_index=tok.audio_token_id,
        image_token_index=tok.image_token_id, video_token_index=tok.video_token_id,
        audio_start_token_id=tok.audio_bos_token_id, audio_end_token_id=tok.audio_eos_token_id,
        vision_start_token_id=tok.vision_bos_token_id, vision_end_token_id=tok.vision_eos_token_id,
    )  # fmt: skip
    return hf.Qwen2_5OmniThinkerForConditionalGeneration(config), processor
