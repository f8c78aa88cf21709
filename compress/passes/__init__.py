"""Compression methods. Each is a Pass; `PASSES`, `CHANGES` and `METHODS` are the tables that recipes and ledgers speak of."""

from compress.passes.base import Change, Pass
from compress.passes.layers import DropLayers, RemoveLayers
from compress.passes.learned import Distilled
from compress.passes.masks import MaskAttention, Masks
from compress.passes.methods import METHODS
from compress.passes.tokens import Pyramid, ReduceTokens, Tokens, Withdraw, WithdrawTokens

PASSES: tuple[type[Pass], ...] = (
    RemoveLayers,
    Masks,
    Tokens,
    Pyramid,
    Withdraw,
)
CHANGES: tuple[type[Change], ...] = (
    Distilled,
    DropLayers,
    MaskAttention,
    ReduceTokens,
    WithdrawTokens,
)

__all__ = ["CHANGES", "METHODS", "PASSES"]
