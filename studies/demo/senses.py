"""How a model takes in what it is shown: its tower, and which of the tower's positions belong to which cell of a scene."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn

from studies.demo import sound
from studies.demo.batches import Telling
from studies.demo.build import INPUT, PATCH, STRIDE
from studies.demo.world import CELLS, GRID


class Sense(Protocol):
    """A tower as the training loop sees it; `facts` of each thing it must tell: colour and name, and perhaps the move."""

    @property
    def telling(self) -> Telling: ...

    @property
    def facts(self) -> int: ...

    @property
    def tower(self) -> nn.Module: ...

    @property
    def layers(self) -> nn.ModuleList: ...

    @property
    def mark(self) -> int:
        """Id of the token in whose place the positions stand."""
        ...

    def look(self, shown: Tensor) -> tuple[Tensor, Tensor | None]:
        """The positions that the connector reads (batch position width), and one summary of each picture or frame."""
        ...

    def by_cell(self, positions: Tensor) -> Tensor:
        """The same positions (batch position width) sorted by cell: batch cell n width."""
        ...

    def views(self, positions: Tensor) -> Tensor:
        """What must know by itself what stands in a cell (batch cell view width): the mean of what was taken in at once."""
        ...


@dataclass(frozen=True)
class Sight:
    """LLaVA's: a picture, as two by two patches for each cell."""

    model: Any
    telling: Telling = "picture"
    facts: int = 2

    @property
    def tower(self) -> nn.Module:
        return self.model.model.vision_tower

    @property
    def layers(self) -> nn.ModuleList:
        return self.model.model.vision_tower.encoder.layers

    @property
    def mark(self) -> int:
        return self.model.config.image_token_id

    def look(self, shown: Tensor) -> tuple[Tensor, Tensor | None]:
        seen = self.tower(shown)
        return seen.last_hidden_state[:, 1:], seen.pooler_output

    def by_cell(self, positions: Tensor) -> Tensor:
        side = INPUT // PATCH // GRID
        grid = positions.unflatten(1, (GRID, side, GRID, side)).transpose(2, 3)
        return grid.flatten(3, 4).flatten(1, 2)

    def views(self, positions: Tensor) -> Tensor:
        return self.by_cell(positions).mean(2, keepdim=True)


@dataclass(frozen=True)
class Film:
    """LLaVA-NeXT-Video's: the frames of a clip, each as one position for each cell (two by two patches, averaged)."""

    model: Any
    telling: Telling = "clip"
    facts: int = 3

    @property
    def tower(self) -> nn.Module:
        return self.model.model.vision_tower

    @property
    def layers(self) -> nn.ModuleList:
        return self.model.model.vision_tower.encoder.layers

    @property
    def mark(self) -> int:
        return self.model.config.video_token_id

    def look(self, shown: Tensor) -> tuple[Tensor, Tensor | None]:
        seen = self.tower(shown.flatten(0, 1))
        pooled = self.model.model.vision_resampler(seen.last_hidden_state[:, 1:])
        return pooled.unflatten(0, shown.shape[:2]).flatten(1, 2), seen.pooler_output

    def by_cell(self, positions: Tensor) -> Tensor:
        return positions.unflatten(1, (-1, len(CELLS))).transpose(1, 2)

    def views(self, positions: Tensor) -> Tensor:
        return self.by_cell(positions)


@dataclass(frozen=True)
class Hearing:
    """Qwen2-Audio's: a sound, as two positions for each beat between those of the two rests."""

    model: Any
    telling: Telling = "sound"
    facts: int = 2

    @property
    def tower(self) -> nn.Module:
        return self.model.model.audio_tower

    @property
    def layers(self) -> nn.ModuleList:
        return self.model.model.audio_tower.layers

    @property
    def mark(self) -> int:
        return self.model.config.audio_token_id

    def look(self, shown: Tensor) -> tuple[Tensor, Tensor | None]:
        return self.tower(shown).last_hidden_state, None

    def by_cell(self, positions: Tensor) -> Tensor:
        rest = sound.REST // STRIDE
        return positions[:, rest:-rest].unflatten(1, (len(CELLS), -1))

    def views(self, positions: Tensor) -> Tensor:
        return self.by_cell(positions).mean(2, keepdim=True)


_SENSES: dict[str, Callable[[Any], Sense]] = {"llava": Sight, "llava_next_video": Film, "qwen2_audio": Hearing}


def sense_of(model: Any) -> Sense | None:
    """What a model can take in besides text."""
    kind = _SENSES.get(model.config.model_type)
    return kind(model) if kind else None


def stacks(model: Any) -> list[nn.ModuleList]:
    """The layers of the language model and of the tower."""
    sense = sense_of(model)
    return [model.get_decoder().layers, *([sense.layers] if sense else [])]
