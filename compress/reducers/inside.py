"""Methods that choose inside the decoder, by its own attention.

Paper or code:

- FastV (arXiv 2403.06764): the paper speaks of the average attention a token receives, its code reads the last prompt token's
  row; so does `fastv`.
- SparseVLM (arXiv 2410.04417): rater words are chosen once, at the embeddings; its code's recycling of dropped tokens is left out, as in
  the authors' second version, and positions are preserved, as there.
- AIM (arXiv 2412.03248): importance is attention *received*, as in the code; the printed formula is the transpose. Rows of
  tokens that are gone are gone (the published version only masks them, so that they go on voting).
- DART (arXiv 2502.11494): what the published code draws from a Python set is drawn in order here.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from compress.tokens.choice import Kept, Seen, best


def fastv(seen: Seen, count: int) -> Kept:
    """The tokens that the last prompt token attends to most, heads averaged."""
    return Kept(best(seen.attention.mean(0), count))


def raters(image: Float[Tensor, "n width"], words: Float[Tensor, "m width"]) -> Tensor:
    """Which words rate: those whose share of what the picture's tokens resemble is above the mean (SparseVLM, section 3.2)."""
    share = (image.float() @ words.float().T).softmax(-1).mean(0)
    return torch.nonzero(share > share.mean() - 1e-12)[:, 0]


def sparsevlm(seen: Seen, count: int) -> Kept:
    """The tokens that the rater words after the picture attend to most, heads and raters averaged."""
    assert seen.words is not None
    chosen = seen.words[raters(seen.entered, seen.entered_text)]
    return Kept(best(seen.rows(chosen).mean((0, 1)), count))


def aim(seen: Seen, count: int, *, temperature: float = 0.1, iterations: int = 5) -> Kept:
    """The tokens of highest PageRank in the graph of attention, all positions that are left taking part (AIM, section 3.3)."""
    flows = torch.cat([flowed(links, iterations) for links in seen.sharpened(temperature)])
    return Kept(best(over_heads(flows)[torch.searchsorted(seen.voters, seen.columns)], count))


def pagerank(links: Float[Tensor, "head n n"], iterations: int = 5) -> Float[Tensor, " n"]:
    """Root mean square over heads of the importance that flows along the rows, from an even start."""
    return over_heads(flowed(links, iterations))


def flowed(links: Float[Tensor, "head n n"], iterations: int) -> Float[Tensor, "head n"]:
    """Importance in each head, after it has flowed along the rows so often."""
    flow = links.new_full((len(links), 1, links.shape[-1]), 1 / links.shape[-1])
    for _ in range(iterations):
        flow = flow @ links
    return flow[:, 0]


def over_heads(flow: Float[Tensor, "head n"]) -> Float[Tensor, " n"]:
    """The root mean square over heads."""
    return flow.square().mean(0).sqrt()


def dart(seen: Seen, count: int, *, pivots: int = 4) -> Kept:
    """Pivots by the size of their keys, and then, pivot by pivot, the tokens least like them: what is dropped is what is doubled.

    `pivots` of the medium and as many of the words, by the L1 norm of the keys of the layer before; each takes its share of the
    tokens whose states have the lowest cosine with its own. Of several with one cosine the earlier is taken.
    """
    size = seen.keys.abs().float().sum((0, 2))
    visual = size[seen.columns].argsort(descending=True, stable=True)[: min(pivots, count)]
    words = size[seen.words].argsort(descending=True, stable=True)[: min(pivots, len(seen.text))]
    around = torch.cat([seen.states[visual], seen.text[words]]).float()
    alike = unit(around) @ unit(seen.states.float()).T  # pivot token
    taken = torch.zeros(len(seen), dtype=torch.bool, device=alike.device)
    taken[visual] = True
    for number, row in enumerate(alike):
        left = count - int(taken.sum())
        share = -(-left // (len(alike) - number))
        order = row.masked_fill(taken, float("inf")).argsort(stable=True)
        taken[order[:share]] = True
    return Kept(torch.nonzero(taken)[:, 0])


def unit(states: Float[Tensor, "n width"]) -> Float[Tensor, "n width"]:
    return torch.nn.functional.normalize(states.float(), dim=-1)
