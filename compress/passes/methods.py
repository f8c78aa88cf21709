"""The table of token reducers: where each stands by default, what it looks at, and where it comes from."""

from compress.passes.tokens import Method
from compress.reducers import diverse, frames, inside, plain, tower

CLASS, KEYS, STATES, PATCHES = "class_attention", "tower_keys", "tower_states", "tower_attention"
METHODS: dict[str, Method] = {
    "random": Method(plain.at_random, source="baseline"),
    "uniform": Method(plain.uniform, source="baseline"),
    "pooling": Method(plain.pooling, source="baseline; InfMLLM's pool adapter (arXiv 2311.06791), training-free"),
    "downsampling": Method(plain.downsampling, source="baseline"),
    "fopru": Method(tower.fopru, needs=(PATCHES,), source="arXiv 2411.14164"),
    "fastervlm": Method(tower.fastervlm, needs=(CLASS,), source="arXiv 2412.01818"),
    "visionzip": Method(tower.visionzip, needs=(CLASS, KEYS), source="arXiv 2412.04467"),
    "prumerge": Method(tower.prumerge, needs=(CLASS, KEYS), source="arXiv 2403.15388"),
    "vispruner": Method(tower.vispruner, needs=(CLASS, STATES), source="arXiv 2412.01818"),
    "divprune": Method(diverse.divprune, source="arXiv 2503.02175; Cen-Prune with cen"),
    "cdpruner": Method(diverse.cdpruner, text_conditioned=True, source="arXiv 2506.10967; Cen-Prune with cen"),
    "aim-merge": Method(diverse.aim_merge, source="arXiv 2412.03248"),
    "dpc-knn": Method(diverse.dpc_knn, source="Chat-UniVi, arXiv 2311.08046"),
    "evs": Method(frames.evs, policy="preserve", source="efficient video sampling, as vLLM has it"),
    "progressive-pooling": Method(frames.progressive, policy="preserve", source="arXiv 2409.20018"),
    "thumbnail-and-sampling": Method(frames.thumbnail_and_sampling, policy="preserve", source="TS-LLaVA, arXiv 2411.11066"),
    "fastv": Method(inside.fastv, 2, "preserve", ("before",), True, "arXiv 2403.06764"),
    "pdrop": Method(inside.fastv, 0.25, "reindex", ("here",), True, "arXiv 2410.17247"),
    "sparsevlm": Method(inside.sparsevlm, 2, "preserve", ("before",), True, "arXiv 2410.04417"),
    "aim": Method(inside.aim, 0.4, "preserve", ("before",), True, "arXiv 2412.03248"),
    "dart": Method(inside.dart, 2, "preserve", ("before",), True, "arXiv 2502.11494"),
}  # fmt: skip
