"""What reducers choose, by loops over tokens: slow and obvious, double precision, of equal scores the earlier token first."""

import numpy as np


def top(score, count):
    """The count highest scores by repeated search, in order of place."""
    left, taken = list(range(len(score))), []
    for _ in range(count):
        best = left[0]
        for i in left[1:]:
            if score[i] > score[best]:
                best = i
        taken.append(best)
        left.remove(best)
    return sorted(taken)


def cosine(a, b):
    return float(a @ b / max(1e-12, np.linalg.norm(a)) / max(1e-12, np.linalg.norm(b)))


def visionzip(attention, keys, states, count, merged):
    """Dominant tokens by attention summed over heads; of the rest every n-th is a target, and the others join the most alike."""
    dominant = top(attention.sum(0), count - merged)
    others = [i for i in range(len(states)) if i not in dominant]
    step = max(1, len(others) // merged)
    targets = others[::step][:merged]
    members = {t: [t] for t in targets}
    for i in others:
        if i not in targets:
            alike = [cosine(keys[i], keys[t]) for t in targets]
            members[targets[int(np.argmax(alike))]].append(i)
    return {i: states[i] for i in dominant} | {t: np.mean([states[i] for i in own], axis=0) for t, own in members.items()}


def prumerge(attention, keys, states, count, neighbours):
    """Tokens by attention averaged over heads, each averaged with its nearest others by key, weighed by attention."""
    weight = attention.mean(0)
    found = {}
    for i in top(weight, count):
        order = sorted((j for j in range(len(states)) if j != i), key=lambda j: (-cosine(keys[i], keys[j]), j))[:neighbours]
        own = [i, *order]
        found[i] = sum(weight[j] * states[j] for j in own) / sum(weight[j] for j in own)
    return found


def sparsevlm(rows, words, image, count):
    """`rows` (head word token): attention of the words that rate, averaged. A word rates whose share of resemblance is above the mean."""
    alike = image @ words.T
    share = np.exp(alike - alike.max(1, keepdims=True))
    share = (share / share.sum(1, keepdims=True)).mean(0)
    raters = [w for w in range(len(words)) if share[w] > share.mean() - 1e-12]
    return top(rows[:, raters].mean((0, 1)), count)


def dart(size, word_size, states, words, count, pivots):
    """Pivots by the size of their keys; then, pivot by pivot, the tokens least like it, each its share of what is still wanted."""
    visual = sorted(range(len(size)), key=lambda i: (-size[i], i))[: min(pivots, count)]
    spoken = sorted(range(len(word_size)), key=lambda i: (-word_size[i], i))[: min(pivots, len(words))]
    around = [states[i] for i in visual] + [words[i] for i in spoken]
    taken = set(visual)
    for number, pivot in enumerate(around):
        share = -(-(count - len(taken)) // (len(around) - number))
        order = sorted((i for i in range(len(states)) if i not in taken), key=lambda i: (cosine(pivot, states[i]), i))
        taken |= set(order[:share])
    return sorted(taken)


def evs(frames, count):
    """Every cell by how much it changed since the frame before; those of the first frame before all others."""
    score = [255.0] * len(frames[0])
    for now, before in zip(frames[1:], frames[:-1], strict=True):
        score += [1 - cosine(a, b) for a, b in zip(now, before, strict=True)]
    return top(score, count)


def sharpened(query, key, hidden, scaling, temperature):
    """Softmax of one head's scores over a temperature, row by row; what is hidden gets nothing."""
    made = np.zeros((len(query), len(key)))
    for i in range(len(query)):
        score = [-np.inf if hidden[i, j] else float(query[i] @ key[j]) * scaling / temperature for j in range(len(key))]
        weight = np.exp(np.array(score) - max(score))
        made[i] = weight / weight.sum()
    return made
