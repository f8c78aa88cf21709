"""A demo model as the training loop sees it, and what its auxiliary tasks ask of its insides."""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from studies.demo import build, world
from studies.demo.batches import Batch
from studies.demo.senses import sense_of

SUMMARY_LAYER, MENTION_LAYER = 2, 4  # after which the auxiliary tasks read the residual stream


def kept_apart() -> Tensor:
    """(colour, name): True for the combinations kept from training, with a last row and column for empty cells."""
    table = torch.zeros(len(world.COLOURS) + 1, len(world.NAMES) + 1, dtype=torch.bool)
    for colour, name in world.HELD_OUT:
        table[world.COLOURS.index(colour), world.NAMES.index(name)] = True
    return table


def facts_loss(guesses: list[Tensor], facts: Tensor) -> Tensor:
    """Cross-entropy of each guess (..., class) with its fact: colour, name, perhaps more (..., fact).

    A colour is never shown on one of the names. Were that name's logit pushed down whenever the colour is seen, the pair
    would be taught not to exist; it takes no part in the loss instead.
    """
    apart = kept_apart().to(facts.device)
    losses = []
    for i, guess in enumerate(guesses):
        if i < 2:
            hidden = apart.T[facts[..., 1]] if i == 0 else apart[facts[..., 0].where(facts[..., 0] >= 0, len(world.COLOURS))]
            guess = guess.masked_fill(hidden[..., : guess.shape[-1]], float("-inf"))
        losses.append(nn.functional.cross_entropy(guess.flatten(0, -2), facts[..., i].flatten(), reduction="none"))
    return torch.stack([loss.view(facts.shape[:-1]) for loss in losses], -1)


def presence_loss(guess: Tensor, presence: Tensor) -> Tensor:
    """Binary cross-entropy over the combinations that training shows (batch, colour x name).

    Where there are several guesses of each scene, one for each frame, they follow one another.
    """
    presence = presence.repeat_interleave(len(guess) // len(presence), 0)
    shown = ~kept_apart()[:-1, :-1].flatten().to(guess.device)
    return nn.functional.binary_cross_entropy_with_logits(guess[:, shown], presence[:, shown])


def answer_loss(logits: Tensor, batch: Batch) -> Tensor:
    """Cross-entropy of the answers' tokens (token, vocabulary); answers that training keeps apart are not punished."""
    barred = batch.barred[batch.answers]
    hidden = torch.zeros_like(logits, dtype=torch.bool).scatter(1, barred.clamp(min=0), barred >= 0)
    return nn.functional.cross_entropy(logits.masked_fill(hidden, float("-inf")), batch.ids[batch.answers])


class Pupil(nn.Module):
    """A demo model with the heads of its auxiliary tasks, which are thrown away after training."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.sense = sense_of(model)
        self.presence = nn.Linear(build.WIDTH, len(world.COLOURS) * len(world.NAMES))
        self.facts = nn.ModuleList(
            nn.Linear(build.WIDTH, n) for n in (len(world.COLOURS), len(world.NAMES), len(world.CELLS), len(world.MOVES) + 1)
        )
        heads = (len(world.COLOURS), len(world.NAMES), len(world.MOVES))[: self.sense.facts if self.sense else 0]
        self.cells = nn.ModuleList(nn.Linear(build.WIDTH, n + 1) for n in heads)
        self.mentioned = nn.Linear(build.WIDTH, len(world.COLOURS))
        self.middle: dict[int, Tensor] = {}
        self.positions: Tensor | None = None
        for layer in (SUMMARY_LAYER, MENTION_LAYER):
            model.get_decoder().layers[layer].register_forward_hook(partial(self._keep, layer))

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """Logits for the tokens of the answers, and the tower's presence logits where it was shown something it sums up."""
        embeds = self.model.get_input_embeddings()(batch.ids)
        guess = None
        if batch.shown is not None:
            assert self.sense is not None
            guess = self.look(batch)
            placed = self.model.model.multi_modal_projector(self.positions)
            embeds = embeds.masked_scatter((batch.ids == self.sense.mark)[..., None], placed)
        states = self.model.get_decoder()(
            inputs_embeds=embeds, attention_mask=batch.mask, position_ids=batch.positions, use_cache=False
        ).last_hidden_state
        before = batch.answers.roll(-1, 1)
        return self.model.get_output_embeddings()(states[before]), guess

    def _keep(self, layer: int, module: nn.Module, args: object, out: Tensor) -> None:
        self.middle[layer] = out

    def look(self, batch: Batch) -> Tensor | None:
        """The tower alone: keeps its positions, gives the presence logits of its summaries."""
        assert self.sense is not None
        assert batch.shown is not None
        self.positions, summary = self.sense.look(batch.shown)
        return None if summary is None else self.presence(summary)

    def _cell_guesses(self) -> list[Tensor]:
        """Logits of colour and thing (and move) for each view of each cell: batch cell view class."""
        assert self.sense is not None
        assert self.positions is not None
        views = self.sense.views(self.positions)
        return [head(views) for head in self.cells]

    def cell_accuracy(self, batch: Batch) -> list[float]:
        """Share of the views of occupied cells that name the colour, the thing (and the move) rightly."""
        there = batch.cells[..., 0] < len(world.COLOURS)
        return [
            (guess.argmax(-1) == batch.cells[..., i, None])[there].float().mean().item()
            for i, guess in enumerate(self._cell_guesses())
        ]

    def cell_loss(self, batch: Batch) -> Tensor:
        """How badly the views of a cell know what stands in it."""
        guesses = self._cell_guesses()
        facts = batch.cells[:, :, None, : len(guesses)].expand(-1, -1, guesses[0].shape[2], -1)
        return facts_loss(guesses, facts).mean()

    def align_loss(self, batch: Batch) -> Tensor:
        """How unlike a phrase's end, read by the same heads, the best position of each occupied cell is after a few layers."""
        assert self.sense is not None
        placed = batch.ids == self.sense.mark
        states = self.middle[SUMMARY_LAYER][placed].view(len(batch.ids), -1, build.WIDTH)
        there = batch.cells[..., 0] < len(world.COLOURS)
        places = torch.arange(len(world.CELLS), device=states.device).expand(len(states), -1)
        # In the order of the heads: colour, name, cell, and the move where the sense has one to tell.
        wanted = torch.cat([batch.cells[..., :2], places[..., None], batch.cells[..., 2 : self.sense.facts]], -1)[there]
        candidates = self.sense.by_cell(states)[there]  # thing position width
        guesses = [head(candidates) for head in list(self.facts)[: wanted.shape[1]]]
        return facts_loss(guesses, wanted[:, None].expand(-1, candidates.shape[1], -1)).mean(-1).amin(1).mean()

    def summary_loss(self, batch: Batch) -> Tensor:
        """How badly the end of each phrase of a twin knows, after a few layers, what the phrase said."""
        ends = batch.phrases[..., 0] >= 0
        state, wanted = self.middle[SUMMARY_LAYER][ends], batch.phrases[ends]
        losses = [nn.functional.cross_entropy(head(state), wanted[:, i]) for i, head in enumerate(self.facts)]
        return torch.stack(losses).mean()

    def mention_loss(self, batch: Batch) -> Tensor:
        """How badly the name of a thing in a `compare` question knows, after more layers, that thing's colour."""
        named = batch.mentions >= 0
        return nn.functional.cross_entropy(self.mentioned(self.middle[MENTION_LAYER][named]), batch.mentions[named])
