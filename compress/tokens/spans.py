"""Where blocks of visual tokens, the words of the question and the answer's beginning lie in a prompt, told from its ids alone."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from compress.tokens.media import Medium, find_media
from probe.errors import SightlineError
from probe.example import Example
from probe.subject import Subject

SPECIMENS = ("what is this ?", "tell me more .")


@dataclass(frozen=True)
class Spans:
    """A batch of prompts as attention masks speak of them.

    `block` is the number of the picture, clip or sound at each column (-1 where there is none), `words` are the columns that hold words, `until`
    is, in the columns of a block, the column where the answer to the question after it begins (0 elsewhere, -1 where nothing says where it
    begins), and `prompt` the columns that were put to the model; what follows them was written by it.
    """

    real: Bool[Tensor, "batch position"]
    block: Int[Tensor, "batch position"]
    words: Bool[Tensor, "batch position"]
    until: Int[Tensor, "batch position"]
    prompt: Bool[Tensor, "batch position"]

    @property
    def shown(self) -> Bool[Tensor, "batch position"]:
        """Columns of visual tokens; clips and sounds are visual here."""
        return self.block >= 0


@dataclass(frozen=True)
class Reader:
    """Reads spans off ids for one model; what it needs of the tokenizer is looked up once."""

    subject: Subject

    @cached_property
    def header(self) -> tuple[int, ...]:
        """The ids that a chat template opens an answer with; empty where nothing marks where an answer begins."""
        try:
            found = [self._header(Example(f"specimen {i}", text)) for i, text in enumerate(SPECIMENS)]
        except SightlineError:  # a family that has no prompt without a picture has no header either
            return ()
        common = 0
        while common < min(map(len, found)) and found[0][-1 - common] == found[1][-1 - common]:
            common += 1
        return found[0][len(found[0]) - common :]

    def _header(self, example: Example) -> tuple[int, ...]:
        token_map = self.subject.encode(example).maps[0]
        return tuple(token_map.tokens[i] for i in token_map.positions("header"))

    @cached_property
    def special(self) -> tuple[int, ...]:
        """Ids that are no words: what stands around and between pictures among them."""
        return tuple(i for i, token in self.subject.tokenizer.added_tokens_decoder.items() if token.special)

    @cached_property
    def line_break(self) -> int | None:
        """The id between the rows of one picture, in families that write one."""
        found = getattr(self.subject.processor, "image_break_token", None)
        return None if found is None else int(self.subject.tokenizer.convert_tokens_to_ids(found))

    def read(
        self, ids: Int[Tensor, "batch position"], real: Bool[Tensor, "batch position"], inputs: Mapping[str, Any]
    ) -> Spans:
        """The spans of a batch: ids, which of them are no padding, and the model's other inputs.

        The question of a block is what follows up to the next opening of an answer; a picture that is cut into tiles with separators is a block for
        each tile, one whose rows have breaks between them is one block.
        """
        block, until = torch.full_like(ids, -1), torch.zeros_like(ids)
        prompt = real.clone()
        for row, media in enumerate(find_media(self.subject, ids, inputs)):
            begins = self._openings(ids[row])
            for number, places in enumerate(self._blocks(ids[row], media)):
                block[row, places] = number
                until[row, places] = next((start for start in begins if start > int(places[-1])), -1)
            if begins:
                prompt[row, begins[-1] + len(self.header) :] = False
        words = real & (block < 0) & ~torch.isin(ids, torch.tensor(self.special, device=ids.device, dtype=ids.dtype))
        return Spans(real, block, words, until, prompt)

    def _openings(self, line: Int[Tensor, " position"]) -> list[int]:
        """Columns where an answer's header begins."""
        size = len(self.header)
        if not 0 < size <= len(line):
            return []
        found = line.unfold(0, size, 1) == torch.tensor(self.header, device=line.device, dtype=line.dtype)
        return [int(start) for start in torch.nonzero(found.all(1))[:, 0]]

    def _blocks(self, line: Int[Tensor, " position"], media: list[Medium]) -> list[Int[Tensor, " n"]]:
        """The columns of each block, breaks between a picture's rows included."""
        blocks: list[Tensor] = []
        for medium in media:
            start, stop = int(medium.positions[0]), int(medium.positions[-1]) + 1
            if blocks and start == int(blocks[-1][-1]) + 2 and int(line[start - 1]) == self.line_break:
                start = int(blocks.pop()[0])
            blocks.append(torch.arange(start, stop, device=line.device))
        return blocks
