"""The tokens of a word, and the direction that stands for it in the residual stream."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from probe.errors import EditError, did_you_mean
from probe.example import Example
from probe.recorders import Residual
from probe.subject import Encoded, Subject
from probe.tokens import TokenMap
from probe.tracing import trace

SOURCES = ("state", "embedding", "unembedding")


@dataclass(frozen=True)
class Spelling:
    """A word's tokens: `ids`, the single tokens that mean it, and `running`, the word as it stands within a sentence.

    `whole` is False for a word that no single token spells: `ids` is then the first piece of it, a prefix.
    """

    word: str
    ids: tuple[int, ...]
    running: tuple[int, ...]
    whole: bool


def spell(subject: Subject, word: str) -> Spelling:
    """The word after a space and without one, in lower case and capitalised, as far as one token spells it.

    A token that is only the mark of a space is passed over. Raises EditError for a word of nothing but spaces.
    """
    bare = word.strip()
    if not bare:
        raise EditError("a word to read needs at least one letter")
    lower, capital = bare.lower(), bare[0].upper() + bare[1:]
    found: list[int] = []
    pieces: list[list[int]] = []
    for text in (f" {lower}", lower, f" {capital}", capital):
        tokens = subject.tokenizer.encode(text, add_special_tokens=False)
        pieces.append([token for token in tokens if subject.tokenizer.decode([token]).strip()] or tokens)
        if len(pieces[-1]) == 1 and subject.tokenizer.decode(pieces[-1]).strip() == text.strip():
            found += pieces[-1]
    running = next((one for one in pieces if len(one) == 1 and one[0] in found), pieces[0])
    return Spelling(bare, tuple(dict.fromkeys(found)) or tuple(pieces[0][:1]), tuple(running), bool(found))


def word_direction(subject: Subject, word: str, source: str = "state", layer: int = 1) -> Float[Tensor, " width"]:
    """What stands for a word in the residual stream (width, float32, on the CPU).

    `state` is the hidden state of the word's last token as it leaves `layer` of the decoder when the word is read alone (arXiv
    2410.02762); `embedding` and `unembedding` are the means of the rows of its tokens.

    Raises EditError for another source or a layer that the model does not have.
    """
    if source not in SOURCES:
        raise EditError(f"there is no direction {source!r}{did_you_mean(source, SOURCES)}")
    tokens = list(spell(subject, word).running)
    if source != "state":
        weight = getattr(subject, source).get_parameter("weight")
        return weight[tokens].detach().float().mean(0).cpu()
    states = trace(subject, _alone(subject, word, tokens), [Residual("resid_post", [layer], "last")])["states"]
    return states.tensor[0, 0, 0].float().cpu()


def _alone(subject: Subject, word: str, tokens: list[int]) -> Encoded:
    """A word by itself, after the token that begins every text where the tokenizer has one."""
    bos = subject.tokenizer.bos_token_id
    ids = [*([] if bos is None else [bos]), *tokens]
    segments = (*(() if bos is None else ("bos",)), *("question" for _ in tokens))
    read = torch.tensor([ids], device=subject.device)
    inputs = {"input_ids": read, "attention_mask": torch.ones_like(read)}
    return Encoded(inputs, (TokenMap(segments, tokens=tuple(ids)),), (Example(word, word),))
