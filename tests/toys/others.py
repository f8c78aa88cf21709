"""Google's, Hugging Face's, Meta's, Salesforce's, Mistral's and Microsoft's families, InternVL, and a text-only model."""

from typing import Any

import transformers as hf

from probe.loading import picture_only
from tests.toys.base import Made, siglip, template, text, tokenizer, tower


def paligemma() -> Made:
    tok = tokenizer(image_token="<image>")
    images = hf.SiglipImageProcessorPil(size={"height": 28, "width": 28})
    images.image_seq_length = 16
    processor = hf.PaliGemmaProcessor(images, tok)
    words = hf.GemmaConfig(**{**text(len(tok)), "num_key_value_heads": 1}, head_dim=8)
    config = hf.PaliGemmaConfig(
        vision_config=siglip(projection_dim=32), text_config=words, image_token_index=tok.image_token_id, projection_dim=32,
        hidden_size=32, vocab_size=len(tok),
    )  # fmt: skip
    return hf.PaliGemmaForConditionalGeneration(config), processor


def gemma3() -> Made:
    tok = tokenizer(image_token="<image_soft_token>", boi_token="<start_of_image>", eoi_token="<end_of_image>")
    processor = hf.Gemma3Processor(
        hf.Gemma3ImageProcessorPil(size={"height": 28, "width": 28}), tok, image_seq_length=4,
        chat_template=template("<start_of_image>"),
    )  # fmt: skip
    words = hf.Gemma3TextConfig(
        **text(len(tok)), head_dim=8, sliding_window=8, query_pre_attn_scalar=8,
        layer_types=["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"],
    )  # fmt: skip
    config = hf.Gemma3Config(
        vision_config=siglip(), text_config=words, mm_tokens_per_image=4, boi_token_index=tok.boi_token_id,
        eoi_token_index=tok.eoi_token_id, image_token_index=tok.image_token_id,
    )  # fmt: skip
    return hf.Gemma3ForConditionalGeneration(config), processor


def gemma4() -> Made:
    tok = tokenizer(
        image_token="<|image|>", boi_token="<|image>", eoi_token="<image|>", audio_token="<|audio|>", boa_token="<|audio>",
        eoa_token="<audio|>",
    )  # fmt: skip
    images = hf.Gemma4ImageProcessorPil(patch_size=4, max_soft_tokens=70, pooling_kernel_size=3)
    processor = picture_only(hf.Gemma4Processor)(
        hf.Gemma4AudioFeatureExtractor(), images, tok, None, chat_template=template("<|image|>")
    )
    size, named = len(tok), tok.convert_tokens_to_ids
    words = {
        **text(size), "head_dim": 8, "global_head_dim": 8, "max_position_embeddings": 1024, "sliding_window": 16,
        "layer_types": ["sliding_attention"] * 3 + ["full_attention"], "vocab_size_per_layer_input": size,
        "hidden_size_per_layer_input": 0, "final_logit_softcapping": 3.0,
    }  # fmt: skip
    vision = {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4,
        "head_dim": 8, "patch_size": 4, "position_embedding_size": 64,
    }  # fmt: skip
    config = hf.Gemma4Config(
        text_config=words, vision_config=vision, audio_config=None, boi_token_id=tok.boi_token_id,
        eoi_token_id=tok.eoi_token_id, image_token_id=tok.image_token_id, video_token_id=named("<|video|>"),
        boa_token_id=named("<|audio>"), eoa_token_index=named("<audio|>"), audio_token_id=tok.audio_token_id,
    )  # fmt: skip
    return hf.Gemma4ForConditionalGeneration(config), processor


def internvl() -> Made:
    tok = tokenizer(
        start_image_token="<img>", end_image_token="</img>", context_image_token="<IMG_CONTEXT>", video_token="<video>"
    )
    images = hf.GotOcr2ImageProcessorPil(size={"height": 28, "width": 28}, min_patches=1, max_patches=4)
    processor = picture_only(hf.InternVLProcessor)(
        images, tok, None, image_seq_length=4, chat_template=template("<IMG_CONTEXT>")
    )
    vision = {**tower(), "image_size": [28, 28], "patch_size": [7, 7]}
    config = hf.InternVLConfig(
        vision_config=vision, text_config=hf.Qwen2Config(**text(len(tok))), image_token_id=tok.context_image_token_id,
        image_seq_length=4, downsample_ratio=0.5,
    )  # fmt: skip
    return hf.InternVLForConditionalGeneration(config), processor


_IDEFICS = (
    "<fake_token_around_image>", "<image>", "<end_of_utterance>", "<global-img>",
    *(f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)),
)  # fmt: skip


def idefics3() -> Made:
    tok = tokenizer(_IDEFICS)
    images = hf.Idefics3ImageProcessorPil(size={"longest_edge": 56}, max_image_size={"longest_edge": 28})
    processor = hf.Idefics3Processor(images, tok, image_seq_len=4, chat_template=template("<image>"))
    config = hf.Idefics3Config(
        vision_config=tower(), text_config=hf.LlamaConfig(**text(len(tok))), image_token_id=processor.image_token_id,
        scale_factor=2, pad_token_id=0,
    )  # fmt: skip
    return hf.Idefics3ForConditionalGeneration(config), processor


def smolvlm() -> Made:
    tok = tokenizer(_IDEFICS)
    images = hf.SmolVLMImageProcessorPil(size={"longest_edge": 56}, max_image_size={"longest_edge": 28})
    processor = picture_only(hf.SmolVLMProcessor)(images, tok, None, image_seq_len=4, chat_template=template("<image>"))
    config = hf.SmolVLMConfig(
        vision_config=tower(), text_config=hf.LlamaConfig(**text(len(tok))), image_token_id=processor.image_token_id,
        scale_factor=2, pad_token_id=0,
    )  # fmt: skip
    return hf.SmolVLMForConditionalGeneration(config), processor


def mllama() -> Made:
    tok = tokenizer(("<|image|>", "<|python_tag|>"))
    tok.image_token, tok.image_token_id = "<|image|>", tok.convert_tokens_to_ids("<|image|>")
    images = hf.MllamaImageProcessorPil(size={"height": 28, "width": 28}, max_image_tiles=4)
    processor = hf.MllamaProcessor(images, tok, chat_template=template("<|image|>"))
    vision = {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_global_layers": 2, "attention_heads": 4, "image_size": 28,
        "patch_size": 7, "vision_output_dim": 32 * 3, "intermediate_layers_indices": [0, 1], "max_num_tiles": 4,
    }  # fmt: skip
    words = text(len(tok), cross_attention_layers=[1, 3], rope_parameters={"rope_type": "default", "rope_theta": 10000.0})
    config = hf.MllamaConfig(vision_config=vision, text_config=words, image_token_index=tok.image_token_id)
    return hf.MllamaForConditionalGeneration(config), processor


def _blip(family: str, words: Any, tok: Any, processor: Any, **qformer: Any) -> Made:
    vision = {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 28, "patch_size": 7,
        "initializer_range": 0.02,
    }  # fmt: skip
    queries = dict(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, encoder_hidden_size=32, **qformer
    )
    config = getattr(hf, f"{family}Config")(
        vision_config=vision, qformer_config=queries, text_config=words, num_query_tokens=4,
        image_token_index=tok.convert_tokens_to_ids("<image>"),
    )  # fmt: skip
    return getattr(hf, f"{family}ForConditionalGeneration")(config), processor


def blip2() -> Made:
    tok = tokenizer()
    processor = hf.Blip2Processor(hf.BlipImageProcessorPil(size={"height": 28, "width": 28}), tok, num_query_tokens=4)
    words = hf.OPTConfig(
        vocab_size=len(tok), hidden_size=32, ffn_dim=64, num_hidden_layers=3, num_attention_heads=4, word_embed_proj_dim=32,
        max_position_embeddings=512, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    return _blip("Blip2", words, tok, processor)


def instructblip() -> Made:
    tok, queries = tokenizer(), tokenizer()
    images = hf.BlipImageProcessorPil(size={"height": 28, "width": 28})
    processor = hf.InstructBlipProcessor(images, tok, queries, num_query_tokens=4)
    return _blip("InstructBlip", hf.LlamaConfig(**text(len(tok))), tok, processor, vocab_size=len(queries))


def voxtral() -> Made:
    """Its processor needs mistral-common: the tokenizer alone."""
    tok = tokenizer(audio_token="[AUDIO]")
    ear = {
        "num_mel_bins": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128, "hidden_size": 32,
        "max_source_positions": 48,
    }  # fmt: skip
    config = hf.VoxtralConfig(
        audio_config=ear, text_config=hf.LlamaConfig(**text(len(tok))).to_dict(), audio_token_id=tok.audio_token_id
    )
    return hf.VoxtralForConditionalGeneration(config), tok


def phi4_multimodal() -> Made:
    """Its picture processor needs torchvision: the tokenizer alone."""
    tok = tokenizer(image_token="<|endoftext10|>", audio_token="<|endoftext11|>")
    rope = {
        "rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 4, "long_factor": [1.0] * 4,
        "partial_rotary_factor": 1.0, "original_max_position_embeddings": 256, "factor": 2.0,
    }  # fmt: skip
    ear = {
        "hidden_size": 32, "intermediate_size": 64, "num_blocks": 2, "num_attention_heads": 4, "input_size": 16, "nemo_conv_channels": 16,
        "ext_pw_out_channel": 32, "depthwise_separable_out_channel": 32, "audio_token_id": tok.audio_token_id,
    }  # fmt: skip
    config = hf.Phi4MultimodalConfig(
        **text(len(tok)), original_max_position_embeddings=256, rope_parameters=rope, audio_config=ear,
        vision_config={**tower(), "crop_size": 28, "image_token_id": tok.image_token_id},
    )  # fmt: skip
    return hf.Phi4MultimodalForCausalLM(config), tok


def llama() -> Made:
    """A text-only model."""
    tok = tokenizer()
    return hf.LlamaForCausalLM(hf.LlamaConfig(**text(len(tok)))), tok
