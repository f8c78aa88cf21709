"""How much each decoder layer does: scores by which layers are removed, skipped, or left by the visual tokens. Nothing is changed.

Every score is computed one example at a time, so that there is no padding in it, and kept for each example, so that it has an interval.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from compress.tokens.media import find_media
from probe.edits import Edit, Knockout, Patch
from probe.errors import PassError, ReplayError
from probe.example import Example
from probe.replay import sweep
from probe.sites import watching
from probe.subject import Encoded, Subject
from probe.tracing import last_logits

COSINES = ("block_influence", "block_influence_visual", "block_influence_text")
SCORES = (*COSINES, "contribution", "angular")
Array = Float[np.ndarray, "example *layer"]


def visual_positions(subject: Subject, encoded: Encoded) -> list[Int[np.ndarray, " n"]]:
    """Where the tokens of pictures, clips and sounds stand in each row: the positions that passes of `compress` act on."""
    inputs = {key: value for key, value in encoded.inputs.items() if key != "input_ids"}
    found = find_media(subject, encoded.inputs["input_ids"], inputs)
    return [
        np.concatenate([np.empty(0, np.int64), *(medium.positions.cpu().numpy() for medium in row)]).astype(np.int64)
        for row in found
    ]


def measurable(subject: Subject) -> tuple[str, ...]:
    """The scores that this architecture has: visual tokens outside the sequence cannot be told apart in it, nor frozen."""
    return tuple(score for score in SCORES if score in COSINES[::2] or score == "angular") if _apart(subject) else SCORES


def _apart(subject: Subject) -> bool:
    return any(subject.anatomy.cross) or subject.anatomy.row.places == "unmarked"


def layer_scores(
    subject: Subject, examples: Sequence[Example], scores: Sequence[str] = SCORES, advance: Callable[[int], None] = lambda n: None
) -> dict[str, Array]:  # fmt: skip
    """Scores of every layer for every example: (example layer), low where a layer does little.

    `block_influence` is 1 - cosine of what enters and what leaves a layer, averaged over an example's tokens (ShortGPT, arXiv 2403.03853),
    `_visual` and `_text` over its tokens of one kind: NaN where it has none. `contribution` is ShortV's (arXiv 2504.00502, the direction of its
    code): KL(modified || original) in nats at the last position, with the visual tokens frozen in that layer alone. `angular` (arXiv
    2403.17887) is (example length first): the angle over pi between the last token's states before layer `first` and `length + 1` layers later,
    NaN where there are fewer; the state after the last layer is taken before the final norm.

    Raises PassError for scores that this architecture does not have.
    """
    if missing := [score for score in scores if score not in measurable(subject)]:
        raise PassError(
            f"{subject.anatomy.family} has no tokens of pictures in its sequence, so no score {missing[0]!r}: take {', '.join(measurable(subject))}"
        )
    rows: dict[str, list[np.ndarray]] = {score: [] for score in scores}
    for example in examples:
        encoded = subject.encode(example)
        visual = np.empty(0, np.int64) if _apart(subject) else visual_positions(subject, encoded)[0]
        cosines, entered, last = _watched(subject, encoded, visual)
        found: dict[str, np.ndarray] = {**cosines, "angular": _angles(last)} if "angular" in scores else dict(cosines)
        if "contribution" in scores:
            found["contribution"] = _contribution(subject, encoded, visual, entered)
        for score in scores:
            rows[score].append(found[score])
        advance(1)
    return {score: np.stack(values) for score, values in rows.items()}


def _watched(
    subject: Subject, encoded: Encoded, visual: Int[np.ndarray, " n"]
) -> tuple[dict[str, np.ndarray], list[Tensor], Tensor]:
    """One pass: cosine scores by layer, the visual states entering each layer, and the last token's states (layer + 1, width)."""
    groups = {"block_influence": encoded.maps[0].positions("real"), "block_influence_visual": visual}
    groups["block_influence_text"] = np.setdiff1d(groups["block_influence"], visual)
    cosines = {score: np.full(subject.n_layers, np.nan) for score in groups}
    entering: dict[int, Tensor] = {}
    last, frozen = [], []
    end = encoded.maps[0].last

    def take(site: str, layer: int, state: Tensor) -> None:
        if site == "in":
            entering[layer] = state[0]
            frozen.append(state[0, torch.from_numpy(visual).to(state.device)].clone())
            last.append(state[0, end].float())
            return
        change = 1 - torch.nn.functional.cosine_similarity(entering.pop(layer).float(), state[0].float(), dim=-1)
        for score, positions in groups.items():
            if len(positions):
                cosines[score][layer] = max(0.0, float(change[torch.from_numpy(positions).to(change.device)].mean()))
        if layer == subject.n_layers - 1:
            last.append(state[0, end].float())

    with torch.no_grad(), watching(subject, take, ("in", "out")):
        last_logits(subject, encoded)
    return cosines, frozen, torch.stack([state.cpu() for state in last])


def _angles(states: Float[Tensor, "depth width"]) -> Float[np.ndarray, "length first"]:
    """Angles over pi between states that lie 1, 2, ... layers apart."""
    n = len(states) - 1
    unit = torch.nn.functional.normalize(states.double(), dim=-1)
    angle = (torch.arccos((unit @ unit.T).clamp(-1, 1)) / torch.pi).numpy()
    made = np.full((n, n), np.nan)
    for length in range(1, n + 1):
        made[length - 1, : n - length + 1] = np.diagonal(angle, length)
    return made


def _contribution(subject: Subject, encoded: Encoded, visual: np.ndarray, entered: Sequence[Tensor]) -> np.ndarray:
    if not len(visual):
        return np.full(subject.n_layers, np.nan)
    frozen = [Patch("resid_post", layer, visual.tolist(), state) for layer, state in enumerate(entered)]
    original, modified = _swept(subject, encoded, frozen)
    return divergence(modified, original)


def withdrawal_kl(
    subject: Subject, examples: Sequence[Example], advance: Callable[[int], None] = lambda n: None
) -> Float[np.ndarray, "example layer"]:
    """VTW's measure (arXiv 2405.05803): KL(full || withdrawn) in nats at the last position, all visual tokens gone from each layer on.

    (example layer), NaN for an example that shows nothing. Raises PassError for visual tokens that are not in the sequence.
    """
    if _apart(subject):
        raise PassError(
            f"the pictures of {subject.anatomy.family} are not in the sequence: there is nothing to withdraw from it"
        )
    rows = []
    for example in examples:
        encoded = subject.encode(example)
        visual = visual_positions(subject, encoded)[0]
        rows.append(np.full(subject.n_layers, np.nan))
        if len(visual):
            others = np.setdiff1d(encoded.maps[0].positions("real"), visual).tolist()
            gone = [
                Knockout(others, visual.tolist(), range(layer, subject.n_layers)) for layer in range(subject.n_layers)
            ]  # fmt: skip
            full, withdrawn = _swept(subject, encoded, gone)
            rows[-1] = divergence(full.expand_as(withdrawn), withdrawn)
        advance(1)
    return np.stack(rows)


def _swept(subject: Subject, encoded: Encoded, entries: Sequence[Edit]) -> tuple[Tensor, Tensor]:
    """Logits of the last position as they are (1 vocabulary) and under each entry (entry vocabulary): replayed where that is exact."""
    try:
        found = sweep(subject, encoded, list(entries))
    except ReplayError:
        found = sweep(subject, encoded, list(entries), "naive")
    return found.clean, found.edited[0]


def divergence(
    p: Float[Tensor, "#row vocabulary"], q: Float[Tensor, "#row vocabulary"]
) -> Float[np.ndarray, " row"]:  # fmt: skip
    """KL(p || q) in nats of distributions given by their logits, row by row."""
    first, second = p.double().log_softmax(-1), q.double().log_softmax(-1)
    found: np.ndarray = (first.exp() * (first - second)).sum(-1).clamp(min=0).cpu().numpy()
    return found
