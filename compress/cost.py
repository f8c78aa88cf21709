"""What a model costs, in closed form: parameters, multiply-adds by part and phase, and bytes of keys and values. Nothing is run.

Sizes are read from the weights, so that removed layers, heads, neurons and experts count for what they are; tokens are those that each
layer really runs, so that reducers and skips do too. What is not counted is named, never guessed.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from compress.layer_cost import PLAIN, Convention, LayerSize, Ran, layer_sizes
from compress.selector_cost import ARITHMETIC, Choosing, tower_attention
from compress.smaller import Smaller
from compress.tokens.guards import Reducer, tokens_kept
from compress.tokens.media import find_media
from compress.tower_cost import extra_tokens, tower_macs
from probe.subject import Encoded, Subject

PARTS = ("vision", "connector", "decoder", "head", "embeddings", "audio")
PHASES = ("vision", "connector", "selector", "prefill", "head")


@runtime_checkable
class Skips(Protocol):
    """What hangs on a model and lets some tokens pass a layer by says so here: what `layer` runs of what would be run.

    `text` and `visual` are the tokens of the prompt that are left there.
    """

    def ran(self, layer: int, ran: Ran, text: int, visual: int) -> Ran: ...


@runtime_checkable
class Masked(Protocol):
    """What hangs on a model and changes who looks at whom says so here: the pairs that it leaves where `layer` runs everything."""

    def seen(self, layer: int, ran: Ran, encoded: Encoded) -> Ran: ...


@runtime_checkable
class SkipsNext(Protocol):
    """The same of what is written: what `layer` runs of one token after the prompt, None where that is all of it."""

    def ran_next(self, layer: int) -> Ran | None: ...


@dataclass(frozen=True)
class Cost:
    """The cost of one prompt and of the first token after it.

    `macs` by phase (None: not counted, see `notes`), `layers` the prefill of each decoder layer, `ran` its tokens,
    `kv_bytes` what each layer's cache holds after the prompt, `decode` the multiply-adds of the next token, head included.
    """

    convention: Convention
    parameters: Mapping[str, int]
    macs: Mapping[str, float | None]
    layers: tuple[float, ...]
    ran: tuple[Ran, ...]
    kv_bytes: tuple[int, ...]
    decode: float
    notes: tuple[str, ...] = ()

    @property
    def total_macs(self) -> float:
        """Everything that is counted of reading the prompt."""
        return sum(value for value in self.macs.values() if value is not None)

    @property
    def flops(self) -> float:
        return 2 * self.total_macs

    def told(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "convention": str(self.convention), "parameters": dict(self.parameters), "n_parameters": sum(self.parameters.values()),
            "macs": dict(self.macs), "flops": {k: None if v is None else 2 * v for k, v in self.macs.items()},
            "total_macs": self.total_macs, "total_flops": self.flops, "decode_macs": self.decode,
            "decode_flops": 2 * self.decode, "layers": [
                {"macs": macs, "queries": ran.queries, "keys": ran.keys, "ffn": ran.ffn, "kv_bytes": kv}
                for macs, ran, kv in zip(self.layers, self.ran, self.kv_bytes, strict=True)
            ], "kv_bytes": sum(self.kv_bytes), "not_counted": list(self.notes),
        }  # fmt: skip


def parameters(subject: Subject) -> dict[str, int]:
    """Parameters by part; a head that is tied to the embeddings counts there, once."""
    anatomy = subject.anatomy
    places = [
        ("connector", anatomy.connector), ("embeddings", anatomy.embedding), ("head", anatomy.unembedding), ("vision", anatomy.vision),
        ("audio", anatomy.audio), ("decoder", anatomy.decoder),
    ]  # fmt: skip
    counted = dict.fromkeys(PARTS, 0)
    other = 0
    for name, weight in subject.model.named_parameters():
        part = next((part for part, path in places if path and (name == path or name.startswith(f"{path}."))), None)
        if part is None:
            other += weight.numel()
        else:
            counted[part] += weight.numel()
    return {part: count for part, count in [*counted.items(), ("other", other)] if count}


def cost(subject: Subject, encoded: Encoded, how: Convention = PLAIN) -> Cost:
    """The cost of reading one encoded prompt (its padding left out) and of the next token.

    Raises ValueError for a batch: cost its rows one by one (`encoded` of each example), or use `mean_cost`.
    """
    if len(encoded) != 1:
        raise ValueError(
            f"a cost is that of one prompt, not of {len(encoded)}: encode examples one at a time, or use mean_cost"
        )
    sizes, ran = layer_sizes(subject), tokens_run(subject, encoded)
    vision, connector, missing = tower_macs(subject, encoded.inputs)
    selector, unknown = _selectors(subject, encoded, sizes)
    layers = tuple(size.macs(one, how) for size, one in zip(sizes, ran, strict=True))
    head = float(subject.unembedding.get_parameter("weight").numel())
    bytes_each = next(subject.decoder.parameters()).element_size()
    return Cost(
        how, parameters(subject),
        {"vision": vision, "connector": connector, "selector": selector, "prefill": sum(layers), "head": head},
        layers, tuple(ran), tuple(size.kv_bytes(one, bytes_each) for size, one in zip(sizes, ran, strict=True)),
        sum(size.next_token(one, how, _own(subject, i)) for i, (size, one) in enumerate(zip(sizes, ran, strict=True))) + head,
        tuple(note for note in (missing, *unknown) if note),
    )  # fmt: skip


@dataclass(frozen=True)
class MeanCost:
    """Costs averaged over prompts: multiply-adds and FLOPs of reading one, bytes of its keys and values, FLOPs of the next token."""

    macs: float
    kv_bytes: float
    decode_macs: float
    parameters: int
    by_phase: Mapping[str, float | None] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def flops(self) -> float:
        return 2 * self.macs


def mean_cost(subject: Subject, prompts: Sequence[Encoded], how: Convention = PLAIN) -> MeanCost:
    """The mean of `cost` over prompts, each encoded by itself."""
    found = [cost(subject, one, how) for one in prompts]
    n = len(found)
    phases = {
        phase: None if any(one.macs[phase] is None for one in found) else sum(one.macs[phase] or 0.0 for one in found) / n
        for phase in PHASES
    }
    return MeanCost(
        sum(one.total_macs for one in found) / n, sum(sum(one.kv_bytes) for one in found) / n, sum(one.decode for one in found) / n,
        sum(found[0].parameters.values()), phases, tuple(dict.fromkeys(note for one in found for note in one.notes)),
    )  # fmt: skip


# --- tokens that run -------------------------------------------------------------------------------------------------


def tokens_run(subject: Subject, encoded: Encoded) -> list[Ran]:
    """The tokens that every decoder layer runs for one prompt: what reducers leave, less what skips let pass."""
    text, media = _prompt(subject, encoded)
    ran = []
    for layer in range(subject.n_layers):
        visual = sum(_left(subject, n, layer) for n in media)
        one = Ran.all(text + visual)
        if subject.anatomy.cross[layer]:
            crossed = encoded.maps[0].crossed
            one = Ran(text + visual, len(crossed) if crossed is not None else 0, text + visual, None)
        for hung in _attached(subject):
            if isinstance(hung, Skips):
                one = hung.ran(layer, one, text, visual)
            if isinstance(hung, Masked):
                one = hung.seen(layer, one, encoded)
        ran.append(one)
    return ran


def _own(subject: Subject, layer: int) -> Ran | None:
    """What a layer runs of one token after the prompt, where something that hangs on the model leaves a part of it out."""
    told = (hung.ran_next(layer) for hung in _attached(subject) if isinstance(hung, SkipsNext))
    return next((own for own in told if own is not None), None)


def _prompt(subject: Subject, encoded: Encoded) -> tuple[int, list[int]]:
    """Real positions that are no medium's, and the length of every medium."""
    real = sum(segment != "pad" for segment in encoded.maps[0].segments)
    inputs = {key: value for key, value in encoded.inputs.items() if key != "input_ids"}
    media = [len(medium) for medium in find_media(subject, encoded.inputs["input_ids"], inputs)[0]]
    return real - sum(media), media


def _reducers(subject: Subject) -> list[Reducer]:
    return sorted(subject.reducers, key=lambda one: one.layer) if isinstance(subject, Smaller) else []


def _attached(subject: Subject) -> list[Any]:
    return subject.attached if isinstance(subject, Smaller) else []


def _left(subject: Subject, n: int, layer: int) -> int:
    """Tokens of a medium of n that enter a layer."""
    return min([n, *(_kept(subject, n, one) for one in _reducers(subject) if one.layer <= layer and not one.simulated)])


def _kept(subject: Subject, n: int, reducer: Reducer) -> int:
    """Tokens that a reducer would leave of a medium of n."""
    return 0 if reducer.select is None else tokens_kept(subject, reducer, n)


# --- what choosing costs ---------------------------------------------------------------------------------------------


def _selectors(subject: Subject, encoded: Encoded, sizes: Sequence[LayerSize]) -> tuple[float, list[str]]:
    """Multiply-adds of every reducer: what it reads and what it computes; and the methods whose arithmetic has no closed form here."""
    text, media = _prompt(subject, encoded)
    looks = {need for reducer in _reducers(subject) for need in reducer.needs} - {"before", "here", "tower_states"}
    total, unknown = 0.0, []
    for reducer in _reducers(subject):
        before = [_left_before(subject, n, reducer) for n in media]
        size = sizes[reducer.layer]
        if "here" in reducer.needs:  # the layer's own maps, once more
            total += (text + sum(before)) * (size.asking + size.keeping)
        for number, (n, whole) in enumerate(zip(before, media, strict=True)):
            kept = _kept(subject, whole, reducer)
            if reducer.select is None or kept >= n:
                continue
            choice = _choosing(subject, encoded, number, (n, kept, text + sum(before), whole), size)
            total += tower_attention(choice) if looks else 0.0
            arithmetic, name = _arithmetic(reducer)
            if arithmetic is None:
                unknown.append(f"the arithmetic of choosing by {name}")
            else:
                total += arithmetic(choice)
    return total, list(dict.fromkeys(unknown))


def _left_before(subject: Subject, n: int, reducer: Reducer) -> int:
    earlier = [one for one in _reducers(subject) if one.layer < reducer.layer and not one.simulated]
    return min([n, *(_kept(subject, n, one) for one in earlier)])


def _choosing(subject: Subject, encoded: Encoded, number: int, counts: tuple[int, int, int, int], size: LayerSize) -> Choosing:
    n, kept, positions, whole = counts
    text, vision = subject.config.get_text_config(), getattr(subject.config, "vision_config", None)
    width, heads = (int(getattr(vision, name, 0) or 0) for name in ("hidden_size", "num_attention_heads"))
    extra = 0
    if subject.anatomy.vision is not None:
        extra = extra_tokens(subject.model.get_submodule(subject.anatomy.vision))
    return Choosing(
        n, kept, _words_after(subject, encoded, number), positions, int(text.hidden_size), subject.n_heads, size.mixing / 2, whole + extra,
        width, width // heads if heads else 0,
    )  # fmt: skip


def _words_after(subject: Subject, encoded: Encoded, number: int) -> int:
    """Words after a medium; all words where none follow."""
    inputs = {key: value for key, value in encoded.inputs.items() if key != "input_ids"}
    media = find_media(subject, encoded.inputs["input_ids"], inputs)[0]
    taken = {int(place) for medium in media for place in medium.positions}
    words = [i for i, segment in enumerate(encoded.maps[0].segments) if segment != "pad" and i not in taken]
    return len([i for i in words if i > int(media[number].positions[-1])]) or len(words)


def _arithmetic(reducer: Reducer) -> tuple[Callable[[Choosing], float] | None, str]:
    """The closed form of a selector, and its name; None where there is none, or a setting changes what is computed."""
    from compress.passes import METHODS

    choose = getattr(reducer.select, "func", reducer.select)
    name = next((name for name, method in METHODS.items() if method.choose is choose and name in ARITHMETIC), None)
    if name is None:
        others = (name for name, method in METHODS.items() if method.choose is choose)
        return None, next(others, getattr(choose, "__name__", "a function"))
    return (None if getattr(reducer.select, "keywords", None) else ARITHMETIC[name]), name
