"""Compression methods. Each is a Pass; `PASSES`, `CHANGES` and `METHODS` are the tables that recipes and ledgers speak of."""

from compress.passes.base import Change, Pass
from compress.passes.layers import DropLayers, RemoveLayers
from compress.passes.tokens import BASELINES, Method, ReduceTokens, Tokens

METHODS: dict[str, Method] = {**BASELINES}
PASSES: tuple[type[Pass], ...] = (RemoveLayers, Tokens)
CHANGES: tuple[type[Change], ...] = (DropLayers, ReduceTokens)

__all__ = ["CHANGES", "METHODS", "PASSES"]
