"""Scores of heads and neurons, unit by unit and weight by weight; and a mixture of experts, token by token."""

import torch
from torch.nn import functional


def unit_weights(layer, kind, unit, dim=None, groups=None):
    """The slices of a Llama-like layer's matrices that belong to one unit: (matrix, rows, columns)."""
    if kind == "neurons":
        mlp, here = layer.mlp, slice(unit, unit + 1)
        return [(mlp.gate_proj, here, slice(None)), (mlp.up_proj, here, slice(None)), (mlp.down_proj, slice(None), here)]
    attention = layer.self_attn
    queries = attention.q_proj.out_features // groups
    mine, keys = slice(unit * queries, (unit + 1) * queries), slice(unit * dim, (unit + 1) * dim)
    return [
        (attention.q_proj, mine, slice(None)), (attention.k_proj, keys, slice(None)), (attention.v_proj, keys, slice(None)),
        (attention.o_proj, slice(None), mine),
    ]  # fmt: skip


def summed(layer, kind, count, of, dim=None):
    """The sum of |of(matrix)| over each unit's slices."""
    return [
        sum(float(of(matrix)[rows, columns].abs().sum()) for matrix, rows, columns in unit_weights(layer, kind, unit, dim, count))
        for unit in range(count)
    ]  # fmt: skip


def inputs_of(model, module, prompts):
    """Every row that a linear map is given, of prompts without padding (token input)."""
    rows = []
    hook = module.register_forward_pre_hook(lambda _, args: rows.append(args[0].reshape(-1, args[0].shape[-1])))
    with torch.no_grad():
        for inputs in prompts:
            model(**inputs, use_cache=False)
    hook.remove()
    return torch.cat(rows).double()


def flap(rows, weight, kind, count):
    """FLAP's WIFV: one number for each input, standardised over the layer, and its mean over a unit's inputs."""
    metric = []
    for j in range(rows.shape[1]):
        mean = sum(float(x) for x in rows[:, j]) / len(rows)
        variance = sum((float(x) - mean) ** 2 for x in rows[:, j]) / (len(rows) - 1)
        value = variance * sum(float(w) ** 2 for w in weight[:, j])
        metric.append(value**2 if kind == "heads" else value)
    mean = sum(metric) / len(metric)
    spread = (sum((m - mean) ** 2 for m in metric) / (len(metric) - 1)) ** 0.5
    standard, each = [(m - mean) / spread for m in metric], len(metric) // count
    return [sum(standard[unit * each : (unit + 1) * each]) / each for unit in range(count)]


def mixture(block, states, kept, visited):
    """What a block of stacked experts gives when only some are left: each token's softmax over those, its best ones, and their sum."""
    given = []
    for state in states:
        logits = torch.stack(
            [block.gate.weight[e] @ state if e in kept else torch.tensor(-torch.inf) for e in range(len(block.gate.weight))]
        )
        shares = logits.softmax(0)
        best = sorted(range(len(shares)), key=lambda e: -float(shares[e]))[:visited]
        total = torch.zeros_like(state)
        for e in best:
            gate, up = (block.experts.gate_up_proj[e] @ state).chunk(2)
            total = total + shares[e] / shares[best].sum() * (block.experts.down_proj[e] @ (functional.silu(gate) * up))
        given.append(total)
    return torch.stack(given)
