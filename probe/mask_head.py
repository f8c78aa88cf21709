"""F-LMM's mask head (arXiv 2406.05821): a small U-Net that turns the attention maps of a frozen model into a mask.

The released configuration has four stages of base width 64 for 24 x 24 maps resized to 64 x 64; both are numbers here.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as f


class MaskHead(nn.Module):
    """Maps (batch channel row column) in, mask logits (batch row column) of the same size out.

    Each channel is divided by its sum, resolution is halved `stages` - 1 times, and what each level saw is joined on the way up.
    """

    def __init__(self, channels: int, width: int = 64, stages: int = 4) -> None:
        super().__init__()
        widths = [width * 2**stage for stage in range(stages)]
        self.down = nn.ModuleList(_block(a, b) for a, b in zip([channels, *widths[:-1]], widths, strict=True))
        self.up = nn.ModuleList(_block(a + b, b) for a, b in zip(widths[:0:-1], widths[-2::-1], strict=True))
        self.out = nn.Conv2d(width, 1, 1)

    @property
    def multiple(self) -> int:
        """Sides are padded to a multiple of this, and cropped again."""
        return 2 ** (len(self.down) - 1)

    def forward(self, maps: Float[Tensor, "batch channel row column"]) -> Float[Tensor, "batch row column"]:
        rows, columns = maps.shape[-2:]
        state = maps / maps.sum((-2, -1), keepdim=True).clamp(min=1e-12) * (rows * columns)  # around 1, whatever the size
        state = f.pad(state, (0, -columns % self.multiple, 0, -rows % self.multiple))
        seen: list[Tensor] = []
        for number, block in enumerate(self.down):
            state = block(f.max_pool2d(state, 2) if number else state)
            seen.append(state)
        for block, beside in zip(self.up, reversed(seen[:-1]), strict=True):
            wider = f.interpolate(state, size=beside.shape[-2:], mode="bilinear", align_corners=False)
            state = block(torch.cat([wider, beside], 1))
        return self.out(state)[:, 0, :rows, :columns]


def _block(before: int, after: int) -> nn.Sequential:
    """Two convolutions, each with a group norm."""
    groups = next(count for count in (8, 4, 2, 1) if after % count == 0)
    layers: list[nn.Module] = []
    for width in (before, after):
        layers += [nn.Conv2d(width, after, 3, padding=1, bias=False), nn.GroupNorm(groups, after), nn.ReLU()]
    return nn.Sequential(*layers)


def mask_loss(
    logits: Float[Tensor, "batch row column"], masks: Float[Tensor, "batch row column"]
) -> Float[Tensor, ""]:  # fmt: skip
    """Binary cross-entropy plus Dice loss, F-LMM's objective, mean over the batch."""
    crossing = f.binary_cross_entropy_with_logits(logits, masks)
    found = logits.sigmoid()
    shared, total = (found * masks).sum((1, 2)), found.sum((1, 2)) + masks.sum((1, 2))
    return crossing + (1 - (2 * shared + 1) / (total + 1)).mean()
