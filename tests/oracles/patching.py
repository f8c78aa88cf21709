"""Activation patching the slow way: a full run for each patch, with a plain hook; and slopes by finite differences."""

import torch


def patched_difference(model, inputs, module, change, tokens, last):
    """Logit difference at position `last` of one example while `change` rewrites what a module puts out (position width)."""

    def hook(_, args, output):
        state = (output[0] if isinstance(output, tuple) else output).clone()
        state[0] = change(state[0])
        return (state, *output[1:]) if isinstance(output, tuple) else state

    handle = module.register_forward_hook(hook)
    try:
        with torch.no_grad():
            logits = model(**inputs, use_cache=False).logits[0, last]
    finally:
        handle.remove()
    return float(logits[tokens[0]] - logits[tokens[1]])


def slope(model, inputs, module, positions, direction, tokens, last, step=1e-2):
    """Central difference of the logit difference along a direction (position width) at some positions."""

    def moved(size):
        def change(state):
            state = state.clone()
            state[positions] += size * direction
            return state

        return patched_difference(model, inputs, module, change, tokens, last)

    return (moved(step) - moved(-step)) / (2 * step)


def correlation(x, y):
    """Pearson's correlation of two lists, from its definition."""
    mx, my = sum(x) / len(x), sum(y) / len(y)
    top = sum((a - mx) * (b - my) for a, b in zip(x, y, strict=True))
    return top / (sum((a - mx) ** 2 for a in x) * sum((b - my) ** 2 for b in y)) ** 0.5
