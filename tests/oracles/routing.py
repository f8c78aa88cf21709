"""Routing as a loop over positions, from the router's own logits; divergence and information as loops over units."""

import math

import torch


def routing_counts(subject, example, groups, top_k, routers):
    """{(layer, modality): [tokens that use each expert]}, one example alone, one position after the other."""
    seen, handles = {}, []
    for layer, router in routers.items():
        handles.append(router.register_forward_hook(lambda _, args, output, layer=layer: seen.__setitem__(layer, output[0])))
    encoded = subject.encode(example)
    with torch.no_grad():
        subject.model(**encoded.inputs)
    for handle in handles:
        handle.remove()
    made = {}
    for layer, logits in seen.items():
        for position, segment in enumerate(encoded.maps[0].segments):
            modality = next((name for name, segments in groups.items() if segment in segments), None)
            if modality is None:
                continue
            row = made.setdefault((layer, modality), [0] * logits.shape[-1])
            order = sorted(range(logits.shape[-1]), key=lambda e: -float(logits[position, e]))
            for expert in order[:top_k]:
                row[expert] += 1
    return made


def strongest(values, count):
    """The indices of the greatest magnitudes."""
    return set(sorted(range(len(values)), key=lambda i: -abs(float(values[i])))[:count])


def entropy(p):
    return -sum(x * math.log(x) for x in p if x > 0)


def jensen_shannon(rows):
    rows = [[x / sum(row) for x in row] for row in rows]
    middle = [sum(column) / len(rows) for column in zip(*rows, strict=True)]
    return entropy(middle) - sum(map(entropy, rows)) / len(rows)


def mutual_information(rows):
    total = sum(map(sum, rows))
    columns = [sum(column) for column in zip(*rows, strict=True)]
    return sum(
        x / total * math.log(x * total / (sum(row) * columns[j])) for row in rows for j, x in enumerate(row) if x
    )  # fmt: skip
