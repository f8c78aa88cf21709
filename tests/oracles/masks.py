"""Attention masks pair by pair, from the map of an encoded example: who may look at whom, said in words."""

import torch

TILED = ("idefics3", "smolvlm")  # tiles with separators between them are blocks of their own


def blocks(token_map, family):
    """The positions of each block of visual tokens."""
    if family not in TILED:
        return [set(map(int, run)) for run in (*token_map.pictures, *token_map.videos, *token_map.sounds)]
    return [set(range(start, stop)) for segment, start, stop in token_map.spans() if segment == "image"]


def allowed(method, token_map, family, special, before):
    """The full mask (query key) of one example as nested loops; `before` is the model's own."""
    n, segments = len(token_map), token_map.segments
    shown = blocks(token_map, family)
    number = [next((k for k, block in enumerate(shown) if i in block), None) for i in range(n)]
    begins = min((i for i in range(n) if segments[i] == "header"), default=n)
    rows = before.tolist()
    for i in range(n):
        for j in range(n):
            mine, its = number[i], number[j]
            both, one = mine is not None and its is not None, (mine is None) != (its is None)
            if (
                "pad" in (segments[i], segments[j])
                or (method == "naavit" and both and i != j)
                or (method == "unimodal" and one)
            ):
                rows[i][j] = False
            elif method == "croc" and mine is not None and mine == its:
                rows[i][j] = True
            elif method == "aki" and mine is not None and its is None and max(shown[mine]) < j < begins:
                rows[i][j] = rows[i][j] or token_map.tokens[j] not in special
    return torch.tensor(rows)


def pairs_left(mask):
    """How many pairs a mask leaves, counted one by one."""
    return sum(sum(row) for row in mask.tolist())
