"""trace_generation(): what trace() records and edits, token by token, while the model writes its answer with its cache."""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn
from transformers import StoppingCriteria, StoppingCriteriaList

from probe.attention import Call, listening
from probe.edits import Ablate, Edit, Patch
from probe.errors import EditError, ExampleError
from probe.example import Example
from probe.points import hook
from probe.recorders import Mass, Named, Patterns, Recorder
from probe.subject import Encoded, Subject
from probe.tokens import SEGMENTS, TokenMap
from probe.tracing import Session, Trace


@dataclass(frozen=True)
class Generation:
    """A greedy answer and one Trace for each of its tokens.

    `steps[0]` is the prompt's pass, which writes the first token; `steps[t]` the pass of token t - 1, which writes token t. Each
    has the maps of what could be seen then, and its logits are those that the token was chosen by. `encoded` is the prompt
    with its answer after it, as one full pass would read it. Tokens after an answer's end are -1.
    """

    encoded: Encoded
    tokens: Int[Tensor, "batch step"]
    texts: tuple[str, ...]
    steps: tuple[Trace, ...]

    def __getitem__(self, name: str) -> Named:
        """What the position that writes each token recorded, `step` the first dimension; keys not there yet are 0."""
        named = [step[name] for step in self.steps]
        pieces = [self._written(one) for one in named]
        longest = [max(piece.shape[i] for piece in pieces) for i in range(pieces[0].dim())]
        full = [
            nn.functional.pad(p, [n for i in reversed(range(p.dim())) for n in (0, longest[i] - p.shape[i])]) for p in pieces
        ]
        return Named(torch.stack(full), ("step", *named[-1].dims), named[-1].labels)

    @staticmethod
    def _written(named: Named) -> Tensor:
        """A step's record without the groups that only the prompt's pass has rows for."""
        if "row_group" not in named.dims:
            return named.tensor
        at = named.labels["row_group"].index("last")
        return named.tensor.narrow(named.dims.index("row_group"), at, 1)


def trace_generation(
    subject: Subject,
    examples: Example | Sequence[Example] | Encoded,
    record: Sequence[Recorder] = (),
    edit: Sequence[Edit] = (),
    max_new_tokens: int = 16,
) -> Generation:
    """Greedy answers, recorded and edited at every token, from the model's own cached decoding.

    The prompt's pass records what `trace` would. In the passes after it the only row is the one that writes the next token:
    recorders of `last` go on there, others (the question's rows, patterns) are done. A knock-out of the rows `last` cuts
    each position at the time when it is the last one, one of `answer` every position of the answer; an ablation takes
    each position as it comes, and a patch is for the prompt alone. The numbers are those of one full pass over prompt
    and answer with the same rows cut, to rounding.

    Raises EditError as `trace` does, and for an ablation over positions that are not there yet at once (a mean, noise).
    Raises ExampleError for a batch that is not padded on the left.
    """
    encoded = examples if isinstance(examples, Encoded) else subject.encode(examples, padding="left")
    if any(token_map.last != len(token_map) - 1 for token_map in encoded.maps):
        raise ExampleError('answers are generated from batches padded on the left: encode(examples, padding="left")')
    writing = _Writing(subject, encoded, [_with_columns(one, encoded.maps) for one in record], edit)
    with ExitStack() as stack:
        stack.enter_context(subject.lock)
        stack.enter_context(torch.no_grad())
        if writing.session.wants_attention:
            stack.enter_context(listening(subject, writing))
        stack.callback(subject.decoder.register_forward_pre_hook(writing.begin, with_kwargs=True).remove)
        for point, layer in sorted({*writing.session.states, *writing.session.changes}):
            if point != "z":
                stack.callback(hook(subject, point, layer, partial(writing.visit, point, layer)).remove)
        made = subject.model.generate(
            **encoded.inputs, max_new_tokens=max_new_tokens, do_sample=False, return_dict_in_generate=True, output_logits=True,
            stopping_criteria=StoppingCriteriaList([writing]),
        )  # fmt: skip
    sessions, tokens = writing.sessions, writing.tokens()
    steps = tuple(
        Trace(session.encoded, logits.float().to(subject.device), session.results())
        for session, logits in zip(sessions, made.logits, strict=True)
    )
    texts = [subject.tokenizer.decode(row[row >= 0], skip_special_tokens=True).strip() for row in tokens]
    return Generation(extended(subject, encoded, tokens), tokens, tuple(texts), steps)


class _Writing(StoppingCriteria):  # type: ignore[misc]
    """Follows generate() from token to token, and gives each pass its own session."""

    def __init__(self, subject: Subject, encoded: Encoded, record: Sequence[Recorder], edit: Sequence[Edit]) -> None:
        self.subject, self.prompt = subject, encoded
        self.record, self.edit = _of_last(record), [one for one in edit if not isinstance(one, Patch)]
        for one in self.edit:
            _check_alone(one, encoded)
        self.session = Session(subject, encoded, record, edit)
        self.sessions: list[Session] = []
        self.written: list[Tensor] = []
        ends = subject.model.generation_config.eos_token_id
        self.ends = torch.tensor([] if ends is None else ends, dtype=torch.long).reshape(-1)

    def begin(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """Before each pass of the decoder."""
        if self.sessions:
            seen = self.tokens()
            seen[:, -1].masked_fill_(torch.isin(seen[:, -1], self.ends), -1)  # an end writes nothing
            maps = tuple(_longer(self.subject, m, row) for m, row in zip(self.prompt.maps, seen, strict=True))
            encoded = replace(self.prompt, inputs={}, maps=maps)
            self.session = Session(self.subject, encoded, self.record, self.edit, cached=len(maps[0]) - 1)
        self.sessions.append(self.session)

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        self.written.append(input_ids[:, -1].cpu())
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

    def tokens(self) -> Tensor:
        """What has been written so far (batch step), -1 after an answer's end."""
        made = torch.stack(self.written, 1)
        ended = torch.isin(made, self.ends).cumsum(1) - torch.isin(made, self.ends).long()
        return made.masked_fill(ended > 0, -1)

    def attend(self, layer: int, call: Call) -> tuple[Tensor, Tensor | None]:
        return self.session.attend(layer, call)

    def visit(self, point: str, layer: int, state: Tensor) -> Tensor | None:
        return self.session.visit(point, layer, state)


def _with_columns(recorder: Recorder, maps: tuple[TokenMap, ...]) -> Recorder:
    """Masses over the same columns at every step, the answer among them."""
    if not isinstance(recorder, Mass) or recorder.columns is not None:
        return recorder
    spaces = [space for m in maps for space in (m, m.crossed) if space is not None]
    present = [name for name in SEGMENTS if name == "answer" or any(name in space.segments for space in spaces)]
    return replace(recorder, columns=tuple(present))


def _of_last(record: Sequence[Recorder]) -> list[Recorder]:
    """What goes on after the prompt's pass: recorders of the last position."""
    kept: list[Recorder] = []
    for one in record:
        if isinstance(one, Mass):
            kept += [replace(one, rows=("last",))] if "last" in one.rows else []
        elif not isinstance(one, Patterns) and one.positions == "last":
            kept.append(one)
    return kept


def _check_alone(edit: Edit, encoded: Encoded) -> None:
    if not isinstance(edit, Ablate) or edit.how == "zero" or (edit.how == "mean" and edit.reference is not None):
        return
    if isinstance(edit.positions, str) and edit.positions in ("last", "answer", "text", "real"):
        raise EditError(
            f"an ablation by {edit.how} over {edit.positions!r} would need the tokens that are not written yet: ablate by zero, by "
            f"a reference, or groups of the prompt"
        )


def _longer(subject: Subject, token_map: TokenMap, tokens: Tensor) -> TokenMap:
    """The map with an answer after it; what follows the answer's end (-1) is padding."""
    ids = tokens.tolist()
    spellings = tuple(subject.tokenizer.decode([token]) if token >= 0 else "" for token in ids)
    return replace(
        token_map,
        segments=(*token_map.segments, *("answer" if token >= 0 else "pad" for token in ids)),
        spellings=(*(token_map.spellings or [""] * len(token_map)), *spellings),
        tokens=(*(token_map.tokens or [-1] * len(token_map)), *ids),
    )


def extended(subject: Subject, encoded: Encoded, tokens: Int[Tensor, "batch step"]) -> Encoded:
    """The batch with given answers after its prompts (teacher forcing): `tokens`, -1 where an answer is shorter.

    The last token is part of it, though no pass of a generation ever reads it.
    """
    fill = subject.tokenizer.pad_token_id or 0
    there = tokens >= 0
    maps = tuple(_longer(subject, m, row) for m, row in zip(encoded.maps, tokens, strict=True))
    inputs, length = dict(encoded.inputs), len(encoded.maps[0])
    new = {"input_ids": tokens.masked_fill(~there, fill), "attention_mask": there.long()}
    for name, value in inputs.items():
        if name in new:
            more = new[name].to(value)
        elif name in ("token_type_ids", "mm_token_type_ids"):
            more = torch.full_like(tokens, subject.anatomy.row.answer_type).to(value)
        elif name == "cross_attention_mask":  # batch position picture tile
            more = value[:, -1:].expand(-1, tokens.shape[1], -1, -1)
        else:
            continue
        inputs[name] = torch.cat([value[:, :length], more], 1)
    return replace(encoded, inputs=inputs, maps=maps)
