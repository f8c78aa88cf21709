"""Slow, obvious versions of what the lens computes: the whole vocabulary at every position, loops over pairs."""

import torch

from probe.tracing import read_out


def log_probs(subject, example, norm):
    """(layer position vocabulary) of one example alone, from the states that leave each layer."""
    states, handles = [], []
    for block in subject.layers:
        handles.append(
            block.register_forward_hook(lambda m, a, out: states.append((out[0] if isinstance(out, tuple) else out).detach()))
        )
    encoded = subject.encode(example)
    try:
        with torch.no_grad():
            subject.model(**encoded.inputs, use_cache=False)
            last = len(states) - 1
            rows = [
                read_out(subject, state) if norm == "final" or layer == last else raw(subject, state)
                for layer, state in enumerate(states)
            ]
    finally:
        for handle in handles:
            handle.remove()
    return torch.stack([row[0].float().log_softmax(-1) for row in rows]), encoded.maps[0]


def raw(subject, state):
    logits = subject.unembedding(state)
    cap = getattr(subject.config.get_text_config(), "final_logit_softcapping", None)
    return cap * torch.tanh(logits / cap) if cap else logits


def erased(state, directions, alpha):
    """Plain lists: one vector, some directions, one after the other."""
    for t in directions:
        share = sum(a * b for a, b in zip(state, t, strict=True)) / sum(b * b for b in t)
        if share > 0:
            state = [a - alpha * share * b for a, b in zip(state, t, strict=True)]
    return state


def auroc(scores, present):
    """Every pair of a present and an absent case."""
    wins = [
        1.0 if a > b else 0.5 if a == b else 0.0
        for a, yes in zip(scores, present, strict=True) if yes
        for b, no in zip(scores, present, strict=True) if not no
    ]  # fmt: skip
    return sum(wins) / len(wins)
