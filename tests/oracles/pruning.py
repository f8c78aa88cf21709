"""Pruning as plainly as it can be said: loops over rows and columns, float64, no tricks."""

import itertools

import numpy as np


def least(scores, count):
    """Positions of the `count` lowest; of equal ones the earlier."""
    return sorted(range(len(scores)), key=lambda i: (scores[i], i))[:count]


def wanda(weight, squares, sparsity=0.0, gone=0, of=0):
    """Which weights stay: within each row, or within each group of `of` inputs of each row."""
    kept = np.ones(weight.shape, dtype=bool)
    for i, row in enumerate(weight):
        scores = [abs(w) * s**0.5 for w, s in zip(row, squares, strict=True)]
        if of:
            for start in range(0, len(row), of):
                for j in least(scores[start : start + of], gone):
                    kept[i, start + j] = False
        else:
            for j in least(scores, int(len(row) * sparsity)):
                kept[i, j] = False
    return kept


def sparsegpt(weight, rows, sparsity=0.0, gone=0, of=0, block=4):
    """Optimal brain surgery column by column, the inverse of what is left taken anew each time."""
    made = np.array(weight, dtype=np.float64)
    products = rows.T @ rows / len(rows)
    dead = np.diag(products) == 0
    products[dead, dead] = 1.0
    products += 0.01 * np.mean(np.diag(products)) * np.eye(len(products))
    n, columns = made.shape
    goes = np.zeros(made.shape, dtype=bool)
    done = 0

    def saliency(i, j):
        return -1.0 if dead[j] else made[i, j] ** 2 / np.linalg.inv(products[j:, j:])[0, 0]

    for column in range(columns):
        if of and column % of == 0:
            for i in range(n):
                for j in least([saliency(i, column + k) for k in range(of)], gone):
                    goes[i, column + j] = True
        if not of and column % block == 0:
            stop = min(column + block, columns)
            where = list(itertools.product(range(n), range(column, stop)))
            share = int(n * stop * sparsity) - done
            for k in least([saliency(i, j) for i, j in where], share):
                goes[where[k]] = True
            done += share
        inverse = np.linalg.inv(products[column:, column:])
        for i in np.nonzero(goes[:, column])[0]:
            made[i, column:] -= made[i, column] / inverse[0, 0] * inverse[0]
            made[i, column] = 0.0
    return made


def answers_loss(model, encoded):
    """The mean negative log-likelihood of the answers' tokens, one token at a time."""
    import torch

    values = []
    logits = model(**encoded.inputs, use_cache=False).logits.double()
    for i, token_map in enumerate(encoded.maps):
        for j, segment in enumerate(token_map.segments):
            if segment == "answer":
                token = int(encoded.inputs["input_ids"][i, j])
                values.append(-float(torch.log_softmax(logits[i, j - 1], -1)[token]))
    return sum(values) / len(values)
