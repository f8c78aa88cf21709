"""Skipped rows the slow way: every row is run, each by itself if need be, and what a rule leaves out is taken out of it again.

`rows` (batch position) says which rows of a full pass a rule holds for, written ones among them.
"""

from contextlib import ExitStack

import torch

from probe.points import hook
from probe.tracing import last_logits


def run(subject, call, rows, layers, query=True, ffn=True, kv=True):
    """What `call()` gives while rows of these layers add no attention (`query` false), no feed-forward block, or are not looked at."""
    entered = {}

    def out_of(state):
        state = state.clone()
        for i in range(len(rows)):
            for place in torch.nonzero(rows[i])[:, 0]:
                state[i, place] = 0.0
        return state

    def back(layer):
        def change(state):
            state = state.clone()
            state[rows] = entered[layer][rows]
            return state

        return change

    def close(module, args, kwargs):
        mask = kwargs["attention_mask"]
        length = rows.shape[1]
        if mask is None:
            mask = torch.ones(length, length, dtype=torch.bool).tril()[None, None].expand(len(rows), 1, -1, -1)
        closed = rows[:, None, None, :] & ~rows[:, None, :, None]
        blocked = mask & ~closed if mask.dtype == torch.bool else mask.masked_fill(closed, torch.finfo(mask.dtype).min)
        return args, {**kwargs, "attention_mask": blocked}

    with ExitStack() as stack:
        for layer in layers:
            if not query and not ffn:
                keep = lambda state, layer=layer: entered.update({layer: state.clone()})  # noqa: E731
                stack.callback(hook(subject, "resid_pre", layer, keep).remove)
                stack.callback(hook(subject, "resid_post", layer, back(layer)).remove)
            elif not query:
                stack.callback(hook(subject, "attn_out", layer, out_of).remove)
            elif not ffn:
                stack.callback(hook(subject, "mlp_out", layer, out_of).remove)
            if not kv:
                stack.callback(subject.layers[layer].register_forward_pre_hook(close, with_kwargs=True).remove)
        return call()


def logits(subject, encoded, rows, layers, **rule):
    with torch.no_grad():
        return run(subject, lambda: last_logits(subject, encoded), rows, layers, **rule)
