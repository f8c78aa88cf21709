"""The collector of `Confidence`: what each layer's states say of a few words, reduced as the layers pass."""

import torch
from torch import Tensor

from probe.errors import EditError
from probe.recorders import Confidence, Named, pad_positions
from probe.tokens import TokenMap
from probe.vocabulary import Vocabulary


class ConfidenceCollector:
    """Reads words off the residual stream; (layer batch row word) is the largest thing that is kept."""

    def __init__(
        self, recorder: Confidence, maps: tuple[TokenMap, ...], vocabulary: Vocabulary, device: torch.device, cached: int = 0
    ) -> None:
        self.recorder, self.vocabulary = recorder, vocabulary
        self.positions = pad_positions(maps, recorder.positions, cached)
        if not self.positions.shape[1]:
            raise EditError(f"no example of the batch has positions {recorder.positions!r} in its sequence to read words at")
        self.index = (self.positions - cached).clamp(min=0).to(device)
        self.real = (self.positions >= 0).to(device)
        self.ids, self.spellings = _square(recorder, len(maps), len(vocabulary.weight))
        self.found: dict[int, tuple[Tensor, ...]] = {}

    def take(self, layer: int, state: Tensor) -> None:
        batch = torch.arange(state.shape[0], device=state.device)[:, None]
        picked = state[batch, self.index.to(state.device)]
        read = self.vocabulary.read(layer, picked, self.ids.flatten(1), self.recorder.top)
        wanted = read.wanted.unflatten(2, (-1, self.spellings)).amax(-1)
        padding = ~self.real.to(wanted.device)[..., None]
        kept = (wanted.masked_fill(padding, -torch.inf), read.top_ids, read.top.exp().masked_fill(padding, 0.0))
        self.found[layer] = tuple(one.cpu() for one in kept)

    def result(self) -> dict[str, Named]:
        layers = tuple(sorted(self.found))
        labels = {"layer": layers}
        words, ids, probs = (torch.stack([self.found[i][part] for i in layers]) for part in range(3))
        made = {
            "confidence": Named(words.amax((0, 2)).exp(), ("batch", "word"), {}),
            "confidence_log_prob": Named(words, ("layer", "batch", "row", "word"), labels),
            "confidence_positions": Named(self.positions, ("batch", "row"), {}),
        }
        if self.recorder.top:
            made["confidence_top_ids"] = Named(ids, ("layer", "batch", "row", "top"), labels)
            made["confidence_top_probs"] = Named(probs, ("layer", "batch", "row", "top"), labels)
        return made


def _square(recorder: Confidence, batch: int, vocabulary: int) -> tuple[Tensor, int]:
    """Token ids (batch word spelling); a word of fewer spellings repeats its first one."""
    words = [[(word,) if isinstance(word, int) else tuple(word) for word in own] for own in recorder.words]
    if len(words) != batch or len({len(own) for own in words}) != 1 or not words[0]:
        raise EditError(f"confidence is asked of the same number of words for each of the {batch} examples")
    longest = max((len(word) for own in words for word in own), default=0)
    if not all(word for own in words for word in own):
        raise EditError("a word needs at least one token id to be read by")
    ids = torch.tensor([[[*word, *word[:1] * (longest - len(word))] for word in own] for own in words])
    if ids.min() < 0 or ids.max() >= vocabulary:
        raise EditError(f"token ids run from 0 to {vocabulary - 1}, not {int(ids.min())} to {int(ids.max())}")
    return ids, longest
