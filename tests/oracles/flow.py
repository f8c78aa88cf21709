"""The obvious versions of the flow statistics."""

import math


def relative_change(clean, edited, token):
    """Percent change of a probability, from plain lists of logits."""

    def prob(logits):
        top = max(logits)
        weights = [math.exp(x - top) for x in logits]
        return weights[token] / sum(weights)

    return 100 * (prob(edited) - prob(clean)) / prob(clean)


def kl(clean, edited):
    def softmax(logits):
        top = max(logits)
        weights = [math.exp(x - top) for x in logits]
        return [w / sum(weights) for w in weights]

    p, q = softmax(clean), softmax(edited)
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a > 0)
