"""Slow, obvious versions of relevance: eager attention, every matrix kept, the full R rule, autograd through the whole model."""

from contextlib import contextmanager

import torch


@contextmanager
def _eager(subject):
    before = subject.decoder.config._attn_implementation
    subject.model.set_attn_implementation("eager")
    try:
        yield
    finally:
        subject.model.set_attn_implementation(before)


def graph(subject, encoded, targets):
    """The target's logit of one example, every attention matrix and the state that enters the first layer, all in one graph."""
    leaf = []

    def enter(module, args, kwargs):
        state = args[0] if args else kwargs["hidden_states"]
        leaf.append(state.detach().requires_grad_(True))
        return ((leaf[0].clone(), *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": leaf[0].clone()})

    handle = subject.layers[0].register_forward_pre_hook(enter, with_kwargs=True)
    try:
        with _eager(subject), torch.enable_grad():
            out = subject.model(**encoded.inputs, use_cache=False, output_attentions=True)
    finally:
        handle.remove()
    logits = out.logits[torch.arange(len(encoded)), encoded.last].float()
    return logits.gather(1, targets[:, None])[:, 0], list(out.attentions), leaf[0]


def by_the_rules(subject, encoded, targets):
    """Rows of the last position by every rule that multiplies matrices, and gradient times input; one example without padding."""
    score, attentions, leaf = graph(subject, encoded, targets)
    slopes = torch.autograd.grad(score.sum(), [*attentions, leaf])
    eye = torch.eye(attentions[0].shape[-1])
    relevance, rolled = eye.clone(), eye.clone()
    for attention, slope in zip(attentions, slopes, strict=False):
        relevance = relevance + (attention[0] * slope[0]).clamp(min=0).mean(0) @ relevance
        mixed = attention[0].mean(0) + eye
        rolled = (mixed / mixed.sum(-1, keepdim=True)) @ rolled
    last = int(encoded.last[0])
    return {
        "attention": torch.stack([a[0].mean(0)[last] for a in attentions]).mean(0).detach(),
        "gradient-attention": relevance[last].detach(),
        "rollout": rolled[last].detach(),
        "gradient-input": (leaf * slopes[-1])[0].sum(-1).detach(),
    }


def integrated(subject, encoded, targets, shown, baseline, steps):
    """Integrated gradients of one example by autograd through the whole model, a step at a time; and the rise of the logit."""
    _, _, leaf = graph(subject, encoded, targets)
    full = leaf.detach()
    start = full.clone()
    start[0, shown] = baseline
    scores, slopes = [], []
    for share in [0.0, 1.0, *((k + 0.5) / steps for k in range(steps))]:
        state = (start + share * (full - start)).requires_grad_(True)

        def enter(module, args, kwargs, state=state):
            return ((state.clone(), *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": state.clone()})

        handle = subject.layers[0].register_forward_pre_hook(enter, with_kwargs=True)
        try:
            with torch.enable_grad():
                out = subject.model(**encoded.inputs, use_cache=False).logits[0, int(encoded.last[0]), int(targets[0])]
                slopes.append(torch.autograd.grad(out, state)[0])
        finally:
            handle.remove()
        scores.append(float(out.detach()))
    return ((full - start) * torch.stack(slopes[2:]).mean(0))[0].sum(-1), scores[1] - scores[0]
