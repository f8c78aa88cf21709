"""What resolving cannot know, as data: one row for each family.

A row is keyed by `config.model_type`, or by `model_type+vision_model_type` where a family changes with its tower. It
names the geometry of the family's media (functions of `probe.geometry`) and whatever differs from what `resolve` finds by
itself. To add a family, add a row here and a toy in `tests/toys`; the contract tests do the rest.
"""

from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class Row:
    """One family: its name, the geometry of its media, and its exceptions."""

    family: str
    geometry: str | None = None  # of pictures
    sounds: str | None = None  # geometry of sounds
    videos: str | None = None  # how frames reach the model (probe.frames)
    deepstack: bool = False  # visual features are added to the residual stream between layers
    mark: str | None = None  # the processor's attribute that holds what stands for a picture in a prompt
    places: Literal["marked", "first", "unmarked"] = "marked"
    # without a chat template: the prompt marks each picture's place; marks go first; the processor puts them in itself
    adds: tuple[tuple[str, str], ...] = ()  # (point, norm): what a block adds is the output of this norm of the layer
    connector: str | None = None  # its dotted path, where two modules could be it
    always_shown: bool = False  # without a picture its prompt has no form that it was trained on
    answer_type: int = 0  # the token_type_ids of what is written after the prompt
    needs: str = ""  # what the family's pictures and sounds need that is not installed, if anything


ROWS: dict[str, Row] = {
    "llava": Row("LLaVA", "plain"),
    "llava+pixtral": Row("LLaVA (Pixtral tower)", "ragged"),
    "llava_next": Row("LLaVA-NeXT", "anyres"),
    "llava_onevision": Row("LLaVA-OneVision", "anyres", videos="newline_last"),
    "video_llava": Row("Video-LLaVA", "plain", videos="class_tokens"),
    "llava_next_video": Row("LLaVA-NeXT-Video", "anyres", videos="pooled_frames"),
    "mistral3": Row("Mistral 3", "ragged"),
    "qwen2_vl": Row("Qwen2-VL", "merged", videos="paired_frames"),
    "qwen2_5_vl": Row("Qwen2.5-VL", "merged", videos="paired_frames"),
    "qwen3_vl": Row("Qwen3-VL", "merged", deepstack=True),
    "qwen3_vl_moe": Row("Qwen3-VL-MoE", "merged", deepstack=True),
    "qwen3_5": Row("Qwen3.5", "merged"),
    "qwen2_5_omni_thinker": Row("Qwen2.5-Omni (thinker)", "merged", "whisper"),
    "qwen2_audio": Row("Qwen2-Audio", sounds="whisper"),
    "voxtral": Row("Voxtral", needs="transformers' VoxtralProcessor with mistral-common"),
    "internvl": Row("InternVL", "thumbnail_last"),
    "paligemma": Row("PaliGemma", "plain", places="first", always_shown=True, answer_type=1),
    "gemma3": Row("Gemma 3", "pooled", mark="boi_token"),
    "gemma4": Row("Gemma 4", "listed"),
    "idefics3": Row("Idefics3", "named_tiles"),
    "smolvlm": Row("SmolVLM", "named_tiles"),
    "mllama": Row("Llama 3.2 Vision (Mllama)", "crossed", places="first"),
    "blip-2": Row("BLIP-2", "resampled", places="unmarked", always_shown=True),
    "instructblip": Row("InstructBLIP", "resampled", places="unmarked", always_shown=True),
    "phi4_multimodal": Row("Phi-4-multimodal", needs="transformers' Phi4MultimodalImageProcessor with torchvision"),
}
GENERIC = Row("generic")


def row_of(config: Any) -> Row:
    """The row of a model's configuration; a generic one for a family that nobody listed."""
    vision = getattr(getattr(config, "vision_config", None), "model_type", None)
    return ROWS.get(f"{config.model_type}+{vision}") or ROWS.get(config.model_type) or GENERIC
