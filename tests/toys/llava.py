"""LLaVA and its descendants."""

import transformers as hf

from probe.loading import picture_only, processor_class
from tests.toys.base import Made, clip, siglip, template, text, tokenizer

_CROP = {"size": {"shortest_edge": 28}, "crop_size": {"height": 28, "width": 28}}
_PINS = [[28, 56], [56, 28], [56, 56]]
_PIXTRAL = {"image_token": "[IMG]", "image_break_token": "[IMG_BREAK]", "image_end_token": "[IMG_END]"}


def llava() -> Made:
    tok = tokenizer(image_token="<image>")
    processor = hf.LlavaProcessor(
        hf.CLIPImageProcessorPil(**_CROP), tok, patch_size=7, vision_feature_select_strategy="default",
        num_additional_image_tokens=1, chat_template=template("<image>"),
    )  # fmt: skip
    config = hf.LlavaConfig(
        vision_config=clip(), text_config=hf.LlamaConfig(**text(len(tok))), image_token_index=tok.image_token_id
    )
    return hf.LlavaForConditionalGeneration(config), processor


def llava_next() -> Made:
    tok = tokenizer(image_token="<image>")
    processor = hf.LlavaNextProcessor(
        hf.LlavaNextImageProcessorPil(**_CROP, image_grid_pinpoints=_PINS), tok, patch_size=7,
        vision_feature_select_strategy="default", num_additional_image_tokens=1, chat_template=template("<image>"),
    )  # fmt: skip
    config = hf.LlavaNextConfig(
        vision_config=clip(), text_config=hf.LlamaConfig(**text(len(tok))), image_token_index=tok.image_token_id,
        image_grid_pinpoints=_PINS,
    )  # fmt: skip
    return hf.LlavaNextForConditionalGeneration(config), processor


def llava_onevision() -> Made:
    tok = tokenizer(image_token="<image>", video_token="<video>")
    pins = [[28, 28], *_PINS]
    images = hf.LlavaOnevisionImageProcessorPil(size={"height": 28, "width": 28}, image_grid_pinpoints=pins)
    processor = picture_only(hf.LlavaOnevisionProcessor)(
        images, tok, None, num_image_tokens=16, vision_feature_select_strategy="full", chat_template=template("<image>", video="<video>"),
    )  # fmt: skip
    config = hf.LlavaOnevisionConfig(
        vision_config=siglip(), text_config=hf.Qwen2Config(**text(len(tok))), image_token_index=tok.image_token_id,
        video_token_index=tok.video_token_id, image_grid_pinpoints=pins,
    )  # fmt: skip
    return hf.LlavaOnevisionForConditionalGeneration(config), processor


def _pixtral_tower(**more: object) -> hf.PixtralVisionConfig:
    return hf.PixtralVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, image_size=56, patch_size=7,
        rope_parameters={"rope_type": "axial", "rope_theta": 10000.0}, **more,
    )  # fmt: skip


def llava_pixtral() -> Made:
    tok = tokenizer(**_PIXTRAL)
    images = hf.PixtralImageProcessorPil(size={"longest_edge": 56}, patch_size={"height": 7, "width": 7})
    processor = processor_class("PixtralProcessor")(
        images, tok, patch_size=7, spatial_merge_size=1, chat_template=template("[IMG]")
    )
    config = hf.LlavaConfig(
        vision_config=_pixtral_tower(), text_config=hf.MistralConfig(**text(len(tok)), sliding_window=None),
        image_token_index=tok.image_token_id, vision_feature_layer=-1, vision_feature_select_strategy="full",
    )  # fmt: skip
    return hf.LlavaForConditionalGeneration(config), processor


def mistral3() -> Made:
    tok = tokenizer(**_PIXTRAL)
    images = hf.PixtralImageProcessorPil(size={"longest_edge": 56}, patch_size={"height": 14, "width": 14})
    processor = processor_class("PixtralProcessor")(
        images, tok, patch_size=7, spatial_merge_size=2, chat_template=template("[IMG]")
    )
    config = hf.Mistral3Config(
        vision_config=_pixtral_tower(), text_config=hf.MistralConfig(**text(len(tok)), sliding_window=None),
        image_token_index=tok.image_token_id, spatial_merge_size=2,
    )  # fmt: skip
    return hf.Mistral3ForConditionalGeneration(config), processor


def video_llava() -> Made:
    tok = tokenizer(image_token="<image>", video_token="<video>")
    processor = picture_only(hf.VideoLlavaProcessor)(
        hf.VideoLlavaImageProcessor(**_CROP), None, tok, patch_size=7, vision_feature_select_strategy="default",
        num_additional_image_tokens=1, chat_template=template("<image>", video="<video>"),
    )  # fmt: skip
    config = hf.VideoLlavaConfig(
        vision_config=clip(), text_config=hf.LlamaConfig(**text(len(tok))), image_token_index=tok.image_token_id,
        video_token_index=tok.video_token_id, image_seq_length=16, video_seq_length=8 * 17,
    )  # fmt: skip
    return hf.VideoLlavaForConditionalGeneration(config), processor


def llava_next_video() -> Made:
    tok = tokenizer(image_token="<image>", video_token="<video>")
    processor = picture_only(hf.LlavaNextVideoProcessor)(
        None, hf.LlavaNextImageProcessorPil(**_CROP, image_grid_pinpoints=_PINS), tok, patch_size=7,
        vision_feature_select_strategy="default", num_additional_image_tokens=1,
        chat_template=template("<image>", video="<video>"),
    )  # fmt: skip
    config = hf.LlavaNextVideoConfig(
        vision_config=clip(), text_config=hf.LlamaConfig(**text(len(tok))), image_token_index=tok.image_token_id,
        video_token_index=tok.video_token_id, image_grid_pinpoints=_PINS,
    )  # fmt: skip
    return hf.LlavaNextVideoForConditionalGeneration(config), processor
