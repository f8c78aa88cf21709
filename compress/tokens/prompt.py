"""One prompt while its tokens are dropped, and what its cache must remember of it afterwards."""

from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from compress.tokens import masks
from compress.tokens.media import Medium
from compress.tokens.positions import Policy, moved, next_ids


@dataclass
class Prompt:
    """What is left of a batch of prompts. Columns are those of the whole, unreduced prompt.

    `now` names the column at each place that is left (-1 where a row has fewer than others) and `ids` its position ids;
    `columns_at` and `hidden_at` are the same as each layer's cache has them; `next_at` (axis batch) the ids of the first token after.
    """

    media: list[list[Medium]]
    real: Bool[Tensor, "batch position"]
    ids_given: Int[Tensor, "axis batch position"]
    place: Int[Tensor, "batch position"]  # the number of the medium at each column, -1 for text
    now: Int[Tensor, "batch place"]
    ids: Int[Tensor, "axis batch place"]
    hidden: Bool[Tensor, "batch position"]  # what simulated reducers have hidden
    entered: Tensor | None = None  # batch position width: what entered the decoder, where a reducer wants to see it
    preserves: bool = True
    renumbered_inside: bool = False  # the layers' rotary embedding, made before the first of them, no longer fits
    columns_at: list[Tensor] = field(default_factory=list)
    next_at: list[Tensor] = field(default_factory=list)
    hidden_at: list[Tensor] = field(default_factory=list)
    simulates: bool = False  # something is hidden
    changed: bool = True  # since the last layer that was entered
    stood: tuple[Tensor, Tensor] | None = None  # `now`, and where it stands among what entered the decoder

    @classmethod
    def of(cls, media: list[list[Medium]], real: Tensor, given: Tensor | None, embeds: Tensor) -> "Prompt":
        """A prompt of which nothing is dropped yet; `given` are the position ids that the model made, if any."""
        batch, length = embeds.shape[:2]
        columns = torch.arange(length, device=embeds.device)
        ids = columns[None, None] if given is None else (given if given.dim() == 3 else given[None])
        ids = ids.expand(ids.shape[0], batch, length).to(embeds.device)
        place = torch.full((batch, length), -1, device=embeds.device)
        for row, own in enumerate(media):
            for number, medium in enumerate(own):
                place[row, medium.positions.to(embeds.device)] = number
        real = real.to(embeds.device)
        return cls(media, real, ids, place, columns.expand(batch, length), ids, torch.zeros_like(real))

    @property
    def length(self) -> int:
        return self.real.shape[1]

    def standing(self) -> masks.Index:
        """Where what is left stands among what entered the decoder; found once for all layers that hold the same."""
        if self.stood is None or self.stood[0] is not self.now:
            self.stood = self.now, masks.among(self.columns_at[0], self.now)
        return self.stood[1]

    def real_now(self) -> Bool[Tensor, "batch place"]:
        return masks.picked(self.real, self.now)

    def shown_now(self) -> Bool[Tensor, "batch place"]:
        """What is left and not hidden, padding included."""
        return (self.now >= 0) & ~masks.picked(self.hidden, self.now)

    def places_of(self, row: int, number: int) -> Int[Tensor, " n"]:
        """Where a medium's tokens stand among what is left and shown."""
        return torch.nonzero((masks.follow(self.place, self.now, -2)[row] == number) & self.shown_now()[row])[:, 0]

    def words(self, row: int, after: int) -> Int[Tensor, " m"]:
        """Where the words after a place stand; all words where none do."""
        words = self.real_now()[row] & (masks.follow(self.place, self.now, -2)[row] == -1)
        later = words & (torch.arange(len(words), device=words.device) > after)
        return torch.nonzero(later if bool(later.any()) else words)[:, 0]

    def renumber(self, policy: Policy, keep: Bool[Tensor, "batch place"]) -> None:
        """New position ids of what is kept, by a reducer's policy."""
        gapless = policy not in ("preserve", "rebase_grid")
        self.preserves = self.preserves and not gapless
        self.renumbered_inside = self.renumbered_inside or (gapless and bool(self.columns_at))
        kept, ids, places = self.real_now() & keep, self.ids.clone(), masks.follow(self.place, self.now)
        for row in range(len(keep)):
            at = torch.nonzero(kept[row])[:, 0]
            ids[:, row, at] = moved(policy, self.ids[:, row, at], places[row, at])
        self.ids, self.changed = ids, True

    def hide(self, keep: Bool[Tensor, "batch place"]) -> None:
        """What is not kept stays, and nobody looks at it."""
        self.changed = True
        for row in range(len(keep)):
            gone = self.now[row][(self.now[row] >= 0) & ~keep[row]]
            self.hidden[row, gone] = True
            self.simulates = self.simulates or len(gone) > 0

    def drop(self, keep: Bool[Tensor, "batch place"], state: Tensor) -> Tensor:
        """What is not kept goes; the states of the rest."""
        order, self.changed = masks.left_over(keep), True
        self.now = masks.follow(self.now, order)
        self.ids = torch.stack([masks.follow(axis, order, 0) for axis in self.ids])
        return masks.gathered(state, order)

    def enter_layer(self) -> None:
        """Notes what the next layer's cache will hold: where nothing was dropped, what the last one's does."""
        if not self.changed:
            for noted in (self.columns_at, self.hidden_at, self.next_at):
                noted.append(noted[-1])
            return
        self.changed = False
        left = masks.picked(self.real & ~self.hidden, self.now)
        self.columns_at.append(self.now)
        self.hidden_at.append(masks.picked(self.hidden, self.now))
        policy: Policy = "preserve" if self.preserves else "reindex"
        self.next_at.append(torch.stack([
            next_ids(self.ids[:, row, left[row]], self.ids_given[:, row, self.real[row]], policy) for row in range(len(left))
        ], 1))  # fmt: skip
