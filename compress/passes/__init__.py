"""Compression methods. Each is a Pass; `PASSES`, `CHANGES` and `METHODS` are the tables that recipes and ledgers speak of."""

from compress.passes.base import Change, Pass
from compress.passes.experts import Experts
from compress.passes.layers import DropLayers, RemoveLayers
from compress.passes.learned import Distilled
from compress.passes.masks import MaskAttention, Masks
from compress.passes.methods import METHODS
from compress.passes.prune import Prune, PruneWeights, Subnet
from compress.passes.removal import (
    HideUnits,
    RemoveExperts,
    RemoveExpertsEvenly,
    RemoveHeads,
    RemoveHeadsEvenly,
    RemoveNeurons,
    RemoveNeuronsEvenly,
)
from compress.passes.skips import Composite, ShortV, Skip, SkipRows
from compress.passes.tokens import Pyramid, ReduceTokens, Tokens, Withdraw, WithdrawTokens
from compress.passes.width import Width

PASSES: tuple[type[Pass], ...] = (
    RemoveLayers,
    Skip,
    ShortV,
    Composite,
    Masks,
    Prune,
    Subnet,
    Width,
    Experts,
    Tokens,
    Pyramid,
    Withdraw,
)
CHANGES: tuple[type[Change], ...] = (
    Distilled,
    DropLayers,
    PruneWeights,
    RemoveHeads,
    RemoveHeadsEvenly,
    RemoveNeurons,
    RemoveNeuronsEvenly,
    RemoveExperts,
    RemoveExpertsEvenly,
    HideUnits,
    MaskAttention,
    SkipRows,
    ReduceTokens,
    WithdrawTokens,
)

__all__ = ["CHANGES", "METHODS", "PASSES"]
