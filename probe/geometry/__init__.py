"""Which position of a medium's run shows which part of the original.

Each family's processor resizes, crops, pads and tiles in its own way. All of them come down to the same data: a patch
grid is a table of offsets into the run of placeholder positions, and the rectangle of the original picture that the table
covers (it may reach beyond the picture where the processor padded). Sizes are read from the processor's output, never
assumed.
"""

from probe.geometry.layout import Area, Crossed, Layout, PatchGrid, Span
from probe.geometry.single import listed, merged, plain, pooled, ragged, resampled
from probe.geometry.sound import whisper
from probe.geometry.tiled import anyres, crossed, named_tiles, thumbnail_last

GEOMETRIES = {
    function.__name__: function
    for function in (
        plain, anyres, merged, ragged, pooled, listed, resampled, thumbnail_last, named_tiles, crossed,
    )
}  # fmt: skip
SOUND_GEOMETRIES = {"whisper": whisper}

__all__ = ["GEOMETRIES", "SOUND_GEOMETRIES", "Area", "Crossed", "Layout", "PatchGrid", "Span"]
