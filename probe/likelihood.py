"""How likely a model finds given answers: the prompt's keys and values once, all options of all prompts as one batch after them."""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from inspect import signature
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from probe.anatomy.readout import capped
from probe.errors import ExampleError, ReplayError
from probe.example import Example
from probe.generation import extended
from probe.subject import Encoded, Subject
from probe.tokens import TokenMap

Reduce = Literal["mean", "sum", "per-byte"]
Method = Literal["prefix", "whole"]
# What of a prompt's inputs has a column for every position.
_COLUMNS = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids", "cross_attention_mask")


@dataclass(frozen=True)
class Likelihood:
    """What one prompt's options are worth: the log-probability (natural) of each token of each, given the prompt and what stands before it.

    `greedy` says of each option whether every one of its tokens is the likeliest one there.
    """

    options: tuple[str, ...]
    log_probs: tuple[tuple[float, ...], ...]
    greedy: tuple[bool, ...]

    def by(self, reduce: Reduce = "mean") -> Float[np.ndarray, " option"]:
        """One number for each option: the mean over its tokens (as SEED-Bench has it), their sum, or the sum over its bytes in UTF-8."""
        sums = np.array([sum(one) for one in self.log_probs], dtype=np.float64)
        if reduce == "sum":
            return sums
        if reduce == "mean":
            return sums / np.array([len(one) for one in self.log_probs])
        return sums / np.array([len(option.strip().encode()) for option in self.options])

    def best(self, reduce: Reduce = "mean") -> int:
        """The index of the likeliest option, the first of them in a tie."""
        return int(self.by(reduce).argmax())

    def probabilities(self, reduce: Reduce = "mean") -> Float[np.ndarray, " option"]:
        """The softmax of the numbers: how the options share a probability of one."""
        values = np.exp(self.by(reduce) - self.by(reduce).max())
        return values / values.sum()


@dataclass(frozen=True)
class _Spelled:
    """An option as tokens: those to read after the prompt's shared part, and from which of them on they are the option's own."""

    tokens: tuple[int, ...]
    first: int


@dataclass
class _Asked:
    """One prompt with its options, spelled; `back` tokens of the prompt are spelled again with each of them."""

    spelled: list[_Spelled]
    back: int


def score_options(
    subject: Subject, examples: Sequence[Example], options: Sequence[Sequence[str]], method: Method = "prefix"
) -> list[Likelihood]:
    """The log-likelihood of each example's `options` after its prompt, picture and all.

    An option is written where the answer begins, a space before it unless the prompt ends in one; prompt and option are tokenised
    together, and the tokens that reach beyond the prompt's last character are the option's (the space's, where it is one
    of its own, among them). `prefix` runs each prompt once and all options of the batch together after its keys and
    values; `whole` runs prompt and option anew for each option. Both give the same numbers to rounding.

    Raises ExampleError for an empty list, an empty option, or one that stands there twice, and ReplayError where a family's prompts
    cannot be shared (`cannot_share`), naming what to do instead.
    """
    for example, offered in zip(examples, options, strict=True):
        _check(example, offered)
    encoded = subject.encode(examples, padding="left")
    asked = [_spell(subject, encoded, i, offered) for i, offered in enumerate(options)]
    if method == "whole":
        found = [
            [_whole(subject, alone, one.back, spelled) for spelled in one.spelled]
            for alone, one in zip(map(subject.encode, examples), asked, strict=True)
        ]
    else:
        if reason := cannot_share(subject):
            raise ReplayError(f'{reason}: score its options with method="whole"')
        found = _after_prefix(subject, encoded, asked)
    return [
        Likelihood(tuple(offered), tuple(tuple(p.tolist()) for p, _ in rows), tuple(bool(g.all()) for _, g in rows))
        for offered, rows in zip(options, found, strict=True)
    ]


def cannot_share(subject: Subject) -> str:
    """Why a prompt of this model cannot be read once for several options; empty where it can."""
    anatomy = subject.anatomy
    if None in anatomy.attention:
        layer = anatomy.attention.index(None)
        return f"layer {layer} of this {anatomy.family} model keeps a running state and no keys, and does not go on from it by several tokens"
    return ""


def _check(example: Example, offered: Sequence[str]) -> None:
    stripped = [option.strip() for option in offered]
    if not stripped or "" in stripped:
        what = "an empty option" if stripped else "no options"
        raise ExampleError(f"example {example.id!r} has {what}: there is nothing whose likelihood could be said")
    if twice := next((option for i, option in enumerate(stripped) if option in stripped[:i]), None):
        raise ExampleError(f"example {example.id!r} offers {twice!r} twice: options must differ")


# --- from words to tokens --------------------------------------------------------------------------------------------


def _spell(subject: Subject, encoded: Encoded, number: int, offered: Sequence[str]) -> _Asked:
    """The options of one example as tokens. Raises ReplayError where a prompt's end is not the tokenizer's own spelling of it."""
    example = encoded.examples[number]
    text, base, tail = _ending(subject, example, encoded.maps[number].tokens)
    begin = not text[-1:].isspace() and not text.endswith(tuple(subject.tokenizer.all_special_tokens))
    joined = [
        subject.tokenizer(
            f"{text}{' ' if begin else ''}{option.strip()}", add_special_tokens=False, return_offsets_mapping=True
        )
        for option in offered
    ]
    shared = min(_common(base, made["input_ids"]) for made in joined)
    if len(base) - shared >= tail:
        raise ReplayError(f"the options of example {example.id!r} change how all of its prompt's words are spelled")
    spelled = []
    for made in joined:
        first = next(i for i, (_, stop) in enumerate(made["offset_mapping"]) if stop > len(text) and i >= shared)
        spelled.append(_Spelled(tuple(made["input_ids"][shared:]), first - shared))
    return _Asked(spelled, len(base) - shared)


def _ending(subject: Subject, example: Example, tokens: tuple[int, ...]) -> tuple[str, list[int], int]:
    """The prompt's text with what the processor writes after it (PaliGemma a line break), as tokens, and how many follow its media."""
    marks = {subject.tokenizer.convert_tokens_to_ids(mark) for mark in subject.marks.values()}
    rendered = subject.render(example).text
    for more in range(3):
        text = rendered + (subject.tokenizer.decode(tokens[-more:]) if more else "")
        base: list[int] = subject.tokenizer.encode(text, add_special_tokens=False)
        tail = next((i for i, token in enumerate(reversed(base)) if token in marks), len(base))
        if tail and tuple(base[-tail:]) == tokens[len(tokens) - tail :]:
            return text, base, tail
    raise ReplayError(
        f"the prompt of example {example.id!r} does not end in its own words as {subject.name} reads it, so that nobody knows what an "
        f"answer would follow"
    )


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _shortened(encoded: Encoded, back: int) -> Encoded:
    """The batch without its last positions."""
    if not back:
        return encoded
    inputs = {name: value[:, :-back] if name in _COLUMNS else value for name, value in encoded.inputs.items()}
    return replace(encoded, inputs=inputs)


def with_answers(subject: Subject, encoded: Encoded, answers: Sequence[str | None]) -> Encoded:
    """A batch (padded on the left) with an answer after each prompt, spelled as `score_options` spells options; None adds nothing.

    Raises ReplayError where nobody knows what an answer would follow.
    """
    asked = [
        _spell(subject, encoded, i, (answer,)) if answer else _Asked([_Spelled((), 0)], 0) for i, answer in enumerate(answers)
    ]
    back = max(one.back for one in asked)
    rows = [_reread(m.tokens, one, back).spelled[0].tokens for m, one in zip(encoded.maps, asked, strict=True)]
    longest = max(map(len, rows))
    if not longest:
        return encoded
    tokens = torch.tensor([[*row, *[-1] * (longest - len(row))] for row in rows])
    short = _shortened(encoded, back).with_maps([_cut(token_map, back) for token_map in encoded.maps])
    return extended(subject, short, tokens)


def _cut(token_map: TokenMap, back: int) -> TokenMap:
    stop = len(token_map) - back
    return replace(
        token_map, segments=token_map.segments[:stop], spellings=token_map.spellings[:stop], tokens=token_map.tokens[:stop]
    )


# --- one by one ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def _whole(subject: Subject, encoded: Encoded, back: int, spelled: _Spelled) -> tuple[Tensor, Tensor]:
    """Log-probabilities of an option's tokens, and whether each is the likeliest, from one full pass."""
    tokens = torch.tensor([spelled.tokens])
    full = extended(subject, _shortened(encoded, back), tokens)
    with subject.lock:
        logits = subject.model(**full.inputs, use_cache=False).logits[0, -len(spelled.tokens) - 1 : -1]
    return _told(logits, tokens[0], spelled.first)


def _told(logits: Tensor, tokens: Tensor, first: int) -> tuple[Tensor, Tensor]:
    tokens = tokens.to(logits.device)
    said = logits.float().log_softmax(-1)
    picked = said.gather(-1, tokens[:, None])[:, 0]
    return picked[first:].cpu(), (picked >= said.max(-1).values)[first:].cpu()


# --- the prompt once -------------------------------------------------------------------------------------------------


@dataclass
class _Prefix:
    """What the decoder was called with and gave back in the prompt's pass."""

    cache: Any = None
    last: Tensor | None = None  # the state after the final norm at each row's last position (batch width)
    positions: Tensor | None = None  # position ids as the family counts them (... batch position)
    crossed: dict[str, Tensor] = field(default_factory=dict)  # what rows may look at among a picture's keys

    def take(self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        self.cache, self.last = output.past_key_values, output.last_hidden_state[:, -1]
        self.positions = kwargs.get("position_ids")
        names = ("cross_attention_mask", "full_text_row_masked_out_mask")
        self.crossed = {name: kwargs[name][:, :, -1:] for name in names if kwargs.get(name) is not None}


@torch.no_grad()
def _after_prefix(subject: Subject, encoded: Encoded, asked: list[_Asked]) -> list[list[tuple[Tensor, Tensor]]]:
    """Every prompt once, then all options of all of them as rows of one batch that goes on from copies of its keys and values."""
    back = max(one.back for one in asked)
    short = _shortened(encoded, back)
    asked = [_reread(encoded.maps[i].tokens, one, back) for i, one in enumerate(asked)]
    rows = torch.tensor([i for i, one in enumerate(asked) for _ in one.spelled], device=subject.device)
    spelled = [option for one in asked for option in one.spelled]
    with subject.lock:
        prefix = _read_prefix(subject, short)
        assert prefix.last is not None
        first = _logits(subject, prefix.last[rows.to(prefix.last.device)])[:, None]
        later = _read_options(subject, short, prefix, rows, [one.tokens[:-1] for one in spelled])
    logits = first if later is None else torch.cat([first, later], 1)
    found = [_told(logits[k, : len(one.tokens)], torch.tensor(one.tokens), one.first) for k, one in enumerate(spelled)]
    parts = iter(found)
    return [[next(parts) for _ in one.spelled] for one in asked]


def _reread(tokens: tuple[int, ...], asked: _Asked, back: int) -> _Asked:
    """The same options where more of the prompt is read with them: the batch has one length for what is shared."""
    more = tokens[len(tokens) - back : len(tokens) - asked.back]
    return _Asked([_Spelled((*more, *one.tokens), one.first + len(more)) for one in asked.spelled], back)


def _logits(subject: Subject, states: Tensor) -> Tensor:
    return capped(subject.unembedding(states), subject.config)


def _read_prefix(subject: Subject, encoded: Encoded) -> _Prefix:
    prefix = _Prefix()
    with ExitStack() as stack:
        stack.callback(subject.decoder.register_forward_hook(prefix.take, with_kwargs=True).remove)
        # Gemma 4 with shared keys and values drops rows inside the decoder as well: there, everything is kept.
        shares = getattr(subject.config.get_text_config(), "num_kv_shared_layers", 0)
        one_row = (
            {"logits_to_keep": 1} if "logits_to_keep" in signature(subject.model.forward).parameters and not shares else {}
        )
        subject.model(**encoded.inputs, use_cache=True, **one_row)
    if prefix.cache is None:
        raise ReplayError(
            f'this {subject.anatomy.family} model keeps no keys and values: score its options with method="whole"'
        )
    return prefix


def _read_options(
    subject: Subject, encoded: Encoded, prefix: _Prefix, rows: Tensor, tokens: list[tuple[int, ...]]
) -> Tensor | None:
    """Logits at every token of every row (row token vocabulary); None where no option has a second token."""
    longest = max(len(one) for one in tokens)
    if not longest:
        return None
    fill = subject.tokenizer.pad_token_id or 0
    ids = torch.tensor([[*one, *[fill] * (longest - len(one))] for one in tokens], device=subject.device)
    there = torch.tensor([[1] * len(one) + [0] * (longest - len(one)) for one in tokens], device=subject.device)
    prefix.cache.reorder_cache(rows)
    options: dict[str, Any] = {}
    if prefix.positions is not None:  # text goes on by one in every coordinate, however the family counts them
        last = prefix.positions[..., -1:].expand(*prefix.positions.shape[:-2], len(encoded.inputs["input_ids"]), 1)
        options["position_ids"] = last.index_select(-2, rows.to(last.device)) + 1 + torch.arange(longest, device=last.device)
    for name, value in prefix.crossed.items():
        options[name] = value.index_select(0, rows.to(value.device)).expand(-1, -1, longest, -1)
    mask = torch.cat([encoded.inputs["attention_mask"][rows], there.to(encoded.inputs["attention_mask"])], 1)
    output = subject.decoder(input_ids=ids, attention_mask=mask, past_key_values=prefix.cache, use_cache=True, **options)
    return _logits(subject, output.last_hidden_state)
