"""Layer scores the slow way: one plain forward pass for each number, one token after another."""

import math

import numpy as np
import torch

from compress.layer_scores import visual_positions
from probe.tracing import last_logits


def kl(p, q):
    """KL(p || q) from logits, entry by entry."""
    p, q = (torch.softmax(one.double(), -1).tolist() for one in (p, q))
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a > 0)


def states(subject, example):
    """What enters and what leaves each layer of one example."""
    entered, left, handles = [], [], []
    for layer in subject.layers:
        handles.append(layer.register_forward_pre_hook(
            lambda module, args, kwargs: entered.append((args[0] if args else kwargs["hidden_states"])[0].clone()), with_kwargs=True
        ))  # fmt: skip
        handles.append(
            layer.register_forward_hook(
                lambda module, args, output: left.append((output[0] if isinstance(output, tuple) else output)[0].clone())
            )
        )
    with torch.no_grad():
        last_logits(subject, subject.encode(example))
    for handle in handles:
        handle.remove()
    return entered, left


def cosine(a, b):
    a, b = a.double().tolist(), b.double().tolist()
    dot = sum(x * y for x, y in zip(a, b, strict=True))
    return dot / math.sqrt(sum(x * x for x in a)) / math.sqrt(sum(y * y for y in b))


def block_influence(subject, example, kind="all"):
    encoded = subject.encode(example)
    visual = set(visual_positions(subject, encoded)[0].tolist())
    chosen = [i for i in range(len(encoded.maps[0])) if kind == "all" or (i in visual) == (kind == "visual")]
    return [
        np.mean([1 - cosine(a[i], b[i]) for i in chosen]) for a, b in zip(*states(subject, example), strict=True)
    ]  # fmt: skip


def angle(subject, example, length, first):
    entered, left = states(subject, example)
    chain = [state[-1] for state in (*entered, left[-1])]
    return math.acos(max(-1.0, min(1.0, cosine(chain[first], chain[first + length])))) / math.pi


def frozen(subject, encoded, layer):
    """Logits with the visual rows put back after a layer."""
    visual = visual_positions(subject, encoded)
    kept = {}

    def before(module, args, kwargs):
        kept["state"] = args[0] if args else kwargs["hidden_states"]

    def after(module, args, output):
        state = (output[0] if isinstance(output, tuple) else output).clone()
        for row, places in enumerate(visual):
            for place in places:
                state[row, place] = kept["state"][row, place]
        return (state, *output[1:]) if isinstance(output, tuple) else state

    handles = [
        subject.layers[layer].register_forward_pre_hook(before, with_kwargs=True), subject.layers[layer].register_forward_hook(after),
    ]  # fmt: skip
    try:
        with torch.no_grad():
            return last_logits(subject, encoded)
    finally:
        for handle in handles:
            handle.remove()


def contribution(subject, example):
    encoded = subject.encode(example)
    with torch.no_grad():
        plain = last_logits(subject, encoded)[0]
    return [kl(frozen(subject, encoded, layer)[0], plain) for layer in range(subject.n_layers)]
