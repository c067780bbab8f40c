"""Definitions written out as loops over Python floats, for tests."""

import itertools
import math

import torch


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def loop_cosine(a, b):
    """Cosine of two sequences of numbers, by a loop over Python floats."""
    a, b = [float(value) for value in a], [float(value) for value in b]
    product = math.fsum(x * y for x, y in zip(a, b, strict=True))
    lengths = [max(math.sqrt(math.fsum(x * x for x in vector)), 1e-8) for vector in (a, b)]
    return product / lengths[0] / lengths[1]


def loop_angular(cosine):
    return 1 - math.acos(min(1.0, max(-1.0, cosine))) / math.pi


def loop_rank_counts(scores, norms):
    """Shares of every expert at every pair of ranks, expert by expert."""
    size = len(scores[0])
    counts = [[0.0] * size for _ in range(size)]
    for score, norm in zip(scores, norms, strict=True):
        for expert in range(size):
            ranks = []
            for values in (score, norm):
                below = sum(value < values[expert] for value in values)
                equal = sum(value == values[expert] for value in values)
                ranks.append(range(below, below + equal))
            for i, j in itertools.product(*ranks):
                counts[i][j] += 1 / len(ranks[0]) / len(ranks[1])
    return counts
