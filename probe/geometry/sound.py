"""Sounds: which position of a sound's run hears which second."""

from collections.abc import Mapping
from typing import Any

from probe.errors import TokenError
from probe.geometry.layout import Layout, PatchGrid, row_major


def whisper(seconds: float, index: int, inputs: Mapping[str, Any], processor: Any, config: Any) -> Layout:
    """Qwen2-Audio and Qwen2.5-Omni: Whisper's mel frames, halved by a convolution and again by pooling.

    A position's span is where its frames begin; the convolutions and the encoder's attention reach further.
    """
    frames = int(inputs["feature_attention_mask"][index].sum())
    length = ((frames - 1) // 2 + 1 - 2) // 2 + 1
    features = processor.feature_extractor
    heard = frames * features.hop_length / features.sampling_rate
    if seconds > heard + 0.1:
        raise TokenError(
            f"a sound of {seconds:.1f} s is longer than the {heard:.1f} s that the model hears: cut it into pieces"
        )
    step = 4 * features.hop_length / features.sampling_rate
    times = tuple((i * step, min((i + 1) * step, seconds)) for i in range(length))
    return Layout(length, (PatchGrid(row_major(1, 1, frames=length), (0.0, 0.0, 1.0, 1.0), "sound", times),))
