"""Readers of published benchmark formats: each turns files that somebody has downloaded into Examples."""

from collections.abc import Callable
from pathlib import Path

from studies.tasks.readers.answers import clotho_aqa, gqa, human_answers, pope, vqav2
from studies.tasks.readers.base import Found
from studies.tasks.readers.choices import mmbench, mmevalpro, scienceqa, seed_bench, video_mme

READERS: dict[str, Callable[[Path, int | None], Found]] = {
    "pope": pope, "gqa": gqa, "vqav2": vqav2, "seed-bench": seed_bench, "mmbench": mmbench, "mmevalpro": mmevalpro,
    "scienceqa": scienceqa, "video-mme": video_mme, "clotho-aqa": clotho_aqa,
}  # fmt: skip

__all__ = ["READERS", "Found", "human_answers"]
