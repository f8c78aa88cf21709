"""Slow, obvious versions of what the studies of attention compute, as loops over eager patterns and plain lists."""

import math


def received(pattern, token_map, rows, columns):
    """Attention that columns receive from rows, mean over rows and heads: `pattern` is (head query key) of one layer."""
    total, count = 0.0, 0
    for head in pattern:
        for row in rows:
            total += sum(float(head[row, column]) for column in columns)
            count += 1
    return total / count


def pearson(a, b):
    n = len(a)
    mean_a, mean_b = sum(a) / n, sum(b) / n
    over = sum((x - mean_a) * (y - mean_b) for x, y in zip(a, b, strict=True))
    return over / math.sqrt(sum((x - mean_a) ** 2 for x in a) * sum((y - mean_b) ** 2 for y in b))


def around(token_map):
    """before, between, shown, after: positions, one after the other."""
    media = set(token_map.positions("media").tolist())
    found = {"before": [], "between": [], "shown": [], "after": []}
    for position, segment in enumerate(token_map.segments):
        if segment == "pad":
            continue
        if position in media:
            found["shown"].append(position)
        elif position < min(media):
            found["before"].append(position)
        elif position > max(media):
            found["after"].append(position)
        else:
            found["between"].append(position)
    return found


def phi(state, dimensions):
    """Sink score of one state, a list of numbers."""
    rms = math.sqrt(sum(x * x for x in state) / len(state) + 1e-6)
    return max(abs(state[d]) for d in dimensions) / rms


def ratio(pattern, row, columns):
    """For each head, the attention of a row to columns."""
    return [sum(float(head[row, column]) for column in columns) for head in pattern]


def auroc(scores, positive, strata=None):
    """The share of pairs that are in order, ties counting half."""
    won, pairs = 0.0, 0
    for i in range(len(scores)):
        for j in range(len(scores)):
            if positive[i] and not positive[j] and (strata is None or strata[i] == strata[j]):
                pairs += 1
                won += 1.0 if scores[i] > scores[j] else 0.5 if scores[i] == scores[j] else 0.0
    return won / pairs


def matched_gap(values, positive, strata):
    """Mean over positives of their value less the mean of the negatives of their stratum; strata without negatives left out."""
    gaps = []
    for value, mine, stratum in zip(values, positive, strata, strict=True):
        others = [v for v, p, s in zip(values, positive, strata, strict=True) if not p and s == stratum]
        if mine and others:
            gaps.append(value - sum(others) / len(others))
    return sum(gaps) / len(gaps)
