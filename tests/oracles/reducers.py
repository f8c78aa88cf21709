"""Token reducers as plainly as they can be said: loops over tokens, NumPy, no tricks."""

import itertools

import numpy as np


def cos(a, b):
    return float(np.dot(a, b) / max(1e-12, np.linalg.norm(a)) / max(1e-12, np.linalg.norm(b)))


def top(score, count):
    """The `count` highest, ascending; of equal ones the earlier."""
    return sorted(sorted(range(len(score)), key=lambda i: (-score[i], i))[:count])


def divprune(x, count, centred=False):
    n = len(x)
    alike = [[cos(a, b) for b in x] for a in x]
    distance = [[1 - alike[i][j] for j in range(n)] for i in range(n)]
    first = max(range(n), key=lambda i: (min([distance[i][j] for j in range(n) if j != i] or [0]), -i))
    weight = [1.0] * n
    if centred:
        mean = np.mean(x, 0)
        distance = [[1 - cos(x[i] - mean, x[j] - mean) for j in range(n)] for i in range(n)]
        lone = [-sum(alike[i][j] for j in range(n) if j != i) / (n - 1) for i in range(n)]
        weight = [(g - min(lone)) / (max(lone) - min(lone)) for g in lone]
    chosen = [first]
    while len(chosen) < count:
        left = [i for i in range(n) if i not in chosen]
        chosen.append(max(left, key=lambda i: (weight[i] * min(distance[i][j] for j in chosen), -i)))
    return sorted(chosen)


def best_dpp(kernel, count):
    """The greedy set by determinants of minors."""
    chosen = []
    while len(chosen) < count:
        left = [i for i in range(len(kernel)) if i not in chosen]
        chosen.append(max(left, key=lambda i: (np.linalg.det(kernel[np.ix_([*chosen, i], [*chosen, i])]), -i)))
    return sorted(chosen)


def pagerank(p, iterations):
    """Importance received, head by head, root mean square over heads."""
    found = []
    for head in p:
        s = np.full(len(head), 1 / len(head))
        for _ in range(iterations):
            s = np.array([sum(s[i] * head[i, j] for i in range(len(head))) for j in range(len(head))])
        found.append(s)
    return np.sqrt(np.mean(np.square(found), 0))


def merge_round(x, pairs):
    """AIM's round: (states by place) after the `pairs` best even tokens were averaged into odd ones."""
    source, target = range(0, len(x), 2), range(1, len(x), 2)
    best = {i: max(target, key=lambda j: (cos(x[i], x[j]), -j)) for i in source}
    gone = sorted(source, key=lambda i: (-cos(x[i], x[best[i]]), i))[:pairs]
    made = {i: x[i] for i in source if i not in gone}
    for j in target:
        made[j] = np.mean([x[j], *[x[i] for i in gone if best[i] == j]], 0)
    return dict(sorted(made.items()))


def merge_rounds(x, count):
    """AIM's rounds until `count` tokens are left: each token that is left under its first place."""
    made = dict(enumerate(x))
    while len(made) > count:
        places, states = list(made), list(made.values())
        left = merge_round(states, min(len(states) - count, len(states) // 2))
        made = {places[i]: state for i, state in left.items()}
    return made


def dpc_knn(x, count, k):
    n = len(x)
    d = np.array([[np.linalg.norm(a - b) / np.sqrt(x.shape[1]) for b in x] for a in x])
    density = np.array([np.exp(-np.mean(np.sort(row)[:k] ** 2)) for row in d])
    order = sorted(range(n), key=lambda i: (-density[i], i))
    rank = {token: at for at, token in enumerate(order)}
    peak = [min([d[i][j] for j in range(n) if rank[j] < rank[i]] or [d.max()]) for i in range(n)]
    centres = top([density[i] * peak[i] for i in range(n)], count)
    members = {c: [c] for c in centres}
    for i in range(n):
        if i not in centres:
            members[min(centres, key=lambda c: (d[i][c], c))].append(i)
    return centres, np.array([np.mean(x[members[c]], 0) for c in centres])


def significance(a):
    """FoPru: column or row means of the head-averaged map, whichever varies more."""
    mean = np.mean(a, 0)
    received, given = mean.mean(0), mean.mean(1)
    return received if np.var(received) > np.var(given) + 1e-20 else given


def vispruner(attention, x, count, share):
    first = top(attention, int(count * share))
    rest = sorted((i for i in range(len(x)) if i not in first), key=lambda i: (-attention[i], i))
    while len(rest) > count - len(first):
        even, odd = rest[0::2], rest[1::2]
        doubled = [max(cos(x[i], x[j]) for j in odd) for i in even]
        gone = sorted(range(len(even)), key=lambda i: (-doubled[i], i))[: min(8, len(rest) - count + len(first))]
        rest = [r for at, r in enumerate(rest) if at // 2 not in gone or at % 2]
    return sorted([*first, *rest])


def windows(rows, columns, count):
    """Every way to cut a grid into windows down and across, the one nearest the grid's own shape."""
    pairs = [(a, b) for a, b in itertools.product(range(1, rows + 1), range(1, columns + 1)) if a * b == count]
    return min(pairs, key=lambda p: abs(p[0] * columns - p[1] * rows), default=None)
