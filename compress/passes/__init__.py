"""Compression methods. Each is a Pass; `PASSES`, `CHANGES` and `METHODS` are the tables that recipes and ledgers speak of."""

from compress.passes.base import Change, Pass
from compress.passes.layers import DropLayers, RemoveLayers
from compress.passes.learned import Distilled
from compress.passes.masks import MaskAttention, Masks
from compress.passes.methods import METHODS
from compress.passes.skips import Composite, ShortV, Skip, SkipRows
from compress.passes.tokens import Pyramid, ReduceTokens, Tokens, Withdraw, WithdrawTokens

PASSES: tuple[type[Pass], ...] = (
    RemoveLayers,
    Skip,
    ShortV,
    Composite,
    Masks,
    Tokens,
    Pyramid,
    Withdraw,
)
CHANGES: tuple[type[Change], ...] = (
    Distilled,
    DropLayers,
    SkipRows,
    MaskAttention,
    ReduceTokens,
    WithdrawTokens,
)

__all__ = ["CHANGES", "METHODS", "PASSES"]
