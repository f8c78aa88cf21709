"""What one decoder layer costs: multiply-adds and cached numbers as closed forms of its sizes and of the tokens that it ran."""

from dataclasses import dataclass, replace
from typing import Any, Literal

from torch import nn

from probe.subject import Subject


@dataclass(frozen=True)
class Convention:
    """How multiply-adds (MAC) are counted; FLOPs are twice as many.

    `attention` counts every query with every key, as papers do and as kernels under a mask compute; `causal` counts only the pairs that
    a causal mask leaves. `ffn` counts the feed-forward matrices that are there; 2 is FastV's and DivPrune's formula, 3 that of
    PyramidDrop and SparseVLM, whatever the model has.
    """

    attention: Literal["full", "causal"] = "full"
    ffn: Literal["weights", 2, 3] = "weights"

    def __str__(self) -> str:
        ffn = "the feed-forward matrices that are there" if self.ffn == "weights" else f"{self.ffn} feed-forward matrices"
        return f"MAC and FLOPs = 2 x MAC; {self.attention} attention; {ffn}"


PLAIN = Convention()


@dataclass(frozen=True)
class Ran:
    """Tokens that one layer ran: rows of queries (Q, O), of keys (K, V) and of the feed-forward block.

    `pairs` are the query-key pairs that a causal mask leaves; None where the queries are all the keys.
    """

    queries: float
    keys: float
    ffn: float
    pairs: float | None = None

    @classmethod
    def all(cls, n: float) -> "Ran":
        return cls(n, n, n)

    @classmethod
    def text_rows(cls, text: float, visual: float, ffn: bool) -> "Ran":
        """Only words ask: visual tokens are keys, and go through the feed-forward block or (ShortV) do not."""
        return cls(text, text + visual, text + visual if ffn else text)


@dataclass(frozen=True)
class LayerSize:
    """Weights of one layer by what they act on, and the width of its attention.

    `asking` (Q, O) and `keeping` (K, V) are multiply-adds of one token, `ffn` those of its feed-forward block with the experts that a token
    visits, in `matrices` maps; `mixing` those of one query with one key (QK and AV); `cached` the numbers kept for a token.
    """

    asking: float
    keeping: float
    ffn: float
    mixing: float
    cached: float
    matrices: int = 3
    window: int | None = None

    @classmethod
    def of(cls, width: int, inner: int, keys: int | None = None, matrices: int = 3) -> "LayerSize":
        """A layer as a configuration describes it; `keys` is the width of all its keys together (grouped heads)."""
        keys = width if keys is None else keys
        return cls(2.0 * width * width, 2.0 * width * keys, float(matrices) * width * inner, 2.0 * width, 2.0 * keys, matrices)

    def macs(self, ran: Ran, how: Convention = PLAIN) -> float:
        """Multiply-adds of the layer for the tokens that it ran."""
        ffn = self.ffn if how.ffn == "weights" else self.ffn / self.matrices * how.ffn
        return ran.queries * self.asking + ran.keys * self.keeping + ran.ffn * ffn + self._pairs(ran, how) * self.mixing

    def _pairs(self, ran: Ran, how: Convention) -> float:
        if how.attention == "full":
            return ran.queries * ran.keys
        if ran.pairs is not None:
            return ran.pairs
        n, window = ran.keys, self.window
        if window is None or n <= window:
            return n * (n + 1) / 2
        return window * (window + 1) / 2 + (n - window) * window

    def next_token(self, ran: Ran, how: Convention = PLAIN, own: Ran | None = None) -> float:
        """Multiply-adds of the first token after the prompt; `own` is what it runs itself, where that is not everything."""
        one = Ran(1, 1, 1, 1) if own is None else own
        keys = ran.keys + 1 if self.window is None else min(ran.keys + 1, self.window)
        return self.macs(replace(one, pairs=one.queries), how) + one.queries * (keys - 1) * self.mixing

    def kv_bytes(self, ran: Ran, bytes_each: int) -> int:
        """Bytes of the keys and values that the prompt leaves; a sliding window keeps one position less than it sees."""
        kept = ran.keys if self.window is None else min(ran.keys, self.window - 1)
        return int(kept * self.cached * bytes_each)


def layer_sizes(subject: Subject) -> list[LayerSize]:
    """The sizes of every decoder layer, read from its weights, whatever the configuration says."""
    return [_size(subject, index) for index in range(subject.n_layers)]


def _size(subject: Subject, index: int) -> LayerSize:
    layer, config = subject.layers[index], subject.config.get_text_config()
    name = subject.anatomy.attention[index]
    maps = linear_maps(layer)
    if name is None:  # mixes positions without keys: its maps act on each token by itself, and what it keeps does not grow
        return LayerSize(0.0, 0.0, sum(maps.values()) + _experts(subject, index), 0.0, 0.0)
    attention = layer.get_submodule(name)
    inside = {path: size for path, size in maps.items() if path.startswith(f"{name}.")}
    heads = _head_width(attention, config)
    keys, values = (_width(attention, part, config) for part in ("k_proj", "v_proj"))
    entering = sum(size for path, size in inside.items() if path.split(".")[-1] in ("k_proj", "v_proj"))
    if not entering and (fused := _fused(attention)):
        entering = (keys + values) * fused
    ffn = sum(size for path, size in maps.items() if path not in inside)
    return LayerSize(
        float(sum(inside.values()) - entering), float(entering), float(ffn + _experts(subject, index)), 2.0 * heads,
        float(keys + values), max(1, len([path for path in maps if path not in inside])), _window(attention),
    )  # fmt: skip


def linear_maps(module: nn.Module) -> dict[str, int]:
    """Multiply-adds of one row through each linear map of a module, quantised ones too."""
    found = {}
    for path, part in module.named_modules():
        sizes = getattr(part, "in_features", None), getattr(part, "out_features", None)
        if all(isinstance(size, int) for size in sizes):
            found[path] = sizes[0] * sizes[1]  # type: ignore[operator]
    return found


def _experts(subject: Subject, index: int) -> float:
    """Multiply-adds of a token in the experts that it visits, and in the router that sends it there."""
    where = subject.anatomy.experts[index] if subject.anatomy.experts else None
    if where is None:
        return 0.0
    layer = subject.layers[index]
    experts = layer.get_submodule(where)
    stacked = [weight for weight in experts.parameters(recurse=False) if weight.dim() == 3]
    visited = next(
        int(value) for config in (subject.config.get_text_config(), subject.config)
        for value in [getattr(config, key, None) for key in ("num_experts_per_tok", "top_k_experts", "moe_topk")] if value
    )  # fmt: skip
    count = len(stacked[0]) if stacked else len(list(experts.children()))
    visited = min(visited, count)
    owner = layer.get_submodule(where.rpartition(".")[0])
    router = getattr(owner, "gate", None) or getattr(owner, "router", None)
    weight = getattr(router, "weight", None)
    routing = float(weight.numel()) if weight is not None and not hasattr(router, "in_features") else 0.0
    each = sum(weight.numel() for weight in stacked) / count
    unstacked = sum(linear_maps(experts).values())  # counted with the layer's other maps, all of them
    return routing + visited * each - unstacked * (1 - visited / count)


def _head_width(attention: Any, config: Any) -> int:
    """The width of all heads together: what the output projection reads."""
    for name in ("o_proj", "out_proj", "dense", "wo", "c_proj"):
        if isinstance(getattr(getattr(attention, name, None), "in_features", None), int):
            return int(getattr(attention, name).in_features)
    return int(
        config.num_attention_heads * (getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
    )


def _width(attention: Any, part: str, config: Any) -> int:
    found = getattr(getattr(attention, part, None), "out_features", None)
    if isinstance(found, int):
        return found
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int((getattr(config, "num_key_value_heads", None) or config.num_attention_heads) * dim)


def _fused(attention: Any) -> int | None:
    """The width that a fused map of queries, keys and values reads."""
    parts = (getattr(attention, name, None) for name in ("qkv_proj", "query_key_value", "qkv", "Wqkv"))
    return next((int(part.in_features) for part in parts if part is not None), None)


def _window(attention: Any) -> int | None:
    found = getattr(attention, "sliding_window", None)
    return int(found) if isinstance(found, int) and found > 0 else None
