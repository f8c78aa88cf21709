"""Find the parts of a loaded model: ask transformers' own accessors, then structure, then the family's row."""

from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from probe.anatomy.rows import Row, row_of
from probe.errors import AnatomyError

_NORMS = ("norm", "final_layer_norm", "final_layernorm", "ln_f", "layer_norm")
_ATTENTIONS = ("self_attn", "attention", "attn", "cross_attn")
_MLPS = ("mlp", "feed_forward", "ffn", "block_sparse_moe", "mixer")
_CONNECTORS = ("multi_modal_projector", "merger", "connector", "aligner", "projector", "embed_vision", "language_projection")


@dataclass(frozen=True)
class Anatomy:
    """Where one model keeps its parts; every path is dotted and starts at the model."""

    model_type: str
    row: Row
    decoder: str
    layers: str
    final_norm: str
    embedding: str
    unembedding: str
    attention: tuple[str | None, ...]  # for each layer, the name of its attention inside the layer; None where it has none
    mlp: tuple[str | None, ...]
    cross: tuple[bool, ...] = ()  # for each layer, whether its attention reads the picture and not the sequence
    experts: tuple[str | None, ...] = ()  # for each layer, the dotted name of its experts inside the layer
    vision: str | None = None
    audio: str | None = None
    connector: str | None = None
    image_token_id: int | None = None
    video_token_id: int | None = None
    audio_token_id: int | None = None

    @property
    def family(self) -> str:
        return self.row.family

    @property
    def n_layers(self) -> int:
        return len(self.attention)


def resolve(model: PreTrainedModel, row: Row | None = None) -> Anatomy:
    """The anatomy of a model.

    Raises AnatomyError naming the part that was not found and the row to add.
    """
    config = model.config
    row = row or row_of(config)
    names = {id(module): name for name, module in model.named_modules()}
    decoder = _decoder(model)
    layers = _modules(decoder.layers)
    norm = next((getattr(decoder, name) for name in _NORMS if isinstance(getattr(decoder, name, None), nn.Module)), None)
    unembedding = model.get_output_embeddings()
    for part, found in (("final norm", norm), ("unembedding", unembedding)):
        if found is None:
            raise _missing(part, config.model_type)
    vision, audio = _tower(model, "image"), _tower(model, "audio")
    attention = tuple(_child(layer, _ATTENTIONS) for layer in layers)
    return Anatomy(
        model_type=config.model_type,
        row=row,
        decoder=names[id(decoder)],
        layers=names[id(decoder.layers)],
        final_norm=names[id(norm)],
        embedding=names[id(model.get_input_embeddings())],
        unembedding=names[id(unembedding)],
        attention=attention,
        mlp=tuple(_child(layer, _MLPS) for layer in layers),
        cross=tuple(name == "cross_attn" for name in attention),
        experts=tuple(_experts(layer) for layer in layers),
        vision=names[id(vision)] if vision is not None else None,
        audio=names[id(audio)] if audio is not None else None,
        connector=(row.connector or _connector(model, names)) if vision or audio else None,
        image_token_id=_token(config, "image") if vision is not None else None,
        video_token_id=_token(config, "video") if vision is not None else None,
        audio_token_id=_token(config, "audio") if audio is not None else None,
    )


def _modules(layers: Any) -> list[nn.Module]:
    return list(layers)


def _decoder(model: PreTrainedModel) -> nn.Module:
    decoder = model.get_decoder()
    for name in ("model", "decoder"):
        decoder = getattr(decoder, name, decoder)
    if not isinstance(getattr(decoder, "layers", None), nn.ModuleList):
        raise _missing("decoder layers", model.config.model_type)
    return decoder


def _tower(model: PreTrainedModel, modality: str) -> nn.Module | None:
    """The encoder of a modality; transformers answers with the model or its decoder where there is none."""
    encoder = model.get_encoder(modality=modality)
    inside = {id(module) for module in model.get_decoder().modules()} if isinstance(encoder, nn.Module) else set()
    base = getattr(model, "base_model", model)
    return None if encoder is model or encoder is base or id(encoder) in inside else encoder


def _connector(model: PreTrainedModel, names: dict[int, str]) -> str | None:
    """The module between tower and decoder. Raises AnatomyError where two could be it."""
    for wanted in _CONNECTORS:
        found = [name for name in names.values() if name.split(".")[-1] == wanted]
        if len(found) > 1:
            raise AnatomyError(
                f"two modules of the architecture {model.config.model_type!r} could be its connector ({', '.join(found)}): name "
                f"one in its row in probe/anatomy/rows.py"
            )
        if found:
            return found[0]
    return None


def _token(config: object, kind: str) -> int | None:
    for name in (f"{kind}_token_id", f"{kind}_token_index"):
        value = getattr(config, name, None)
        if isinstance(value, int):
            return value
    return None


def _experts(layer: nn.Module) -> str | None:
    """The dotted name of the module that holds a layer's experts, None in a dense layer."""
    return next((name for name, _ in layer.named_modules() if name.split(".")[-1] == "experts"), None)


def _child(layer: nn.Module, names: tuple[str, ...]) -> str | None:
    return next((name for name in names if isinstance(getattr(layer, name, None), nn.Module)), None)


def _missing(part: str, model_type: str) -> AnatomyError:
    return AnatomyError(
        f"no {part} was found in the architecture {model_type!r}: add a row for it to probe/anatomy/rows.py (docs/architecture.md)"
    )
