"""Measures of routing from counts, vectorised over a first axis of resamples: numpy only.

What has no value is NaN. Sources: OLMoE (2409.02060, section 5), Mixtral (2401.04088, section 5), OpenMoE (2402.01739,
section 4), auxiliary-loss-free load balancing (Wang et al. 2024, 2408.15664) for MaxVio.
"""

from math import comb

import numpy as np


def divide(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    """Quotient in float64; NaN where `below` is 0."""
    above, below = np.broadcast_arrays(np.asarray(above, np.float64), np.asarray(below, np.float64))
    return np.divide(above, below, out=np.full(above.shape, np.nan), where=below != 0)


def entropy(counts: np.ndarray) -> np.ndarray:
    """Entropy in bits of counts along the last axis, (..., n) to (...); NaN where all are 0."""
    share = divide(counts, counts.sum(-1, keepdims=True))
    return -(share * np.log2(share, where=share > 0, out=np.zeros_like(share))).sum(-1)


def load_entropy(load: np.ndarray) -> np.ndarray:
    """Entropy of the load as a share of log N: 1 is even, 0 one expert alone. load: (..., N) choices."""
    return divide(entropy(load), np.log2(load.shape[-1]))


def max_vio(load: np.ndarray) -> np.ndarray:
    """MaxVio, the largest load over the mean load, minus 1: 0 is even, N - 1 one expert alone."""
    return divide(load.max(-1), load.mean(-1)) - 1


def dead_share(load: np.ndarray) -> np.ndarray:
    """Share of the experts that no token chose."""
    return np.where(load.sum(-1) > 0, (load == 0).mean(-1), np.nan)


def co_activation(pairs: np.ndarray) -> np.ndarray:
    """N_ij / N_i: of the tokens that chose i, the share that chose j too. (..., N, N); NaN on the diagonal."""
    share = divide(pairs, pairs.diagonal(axis1=-2, axis2=-1)[..., None])
    share[..., np.eye(pairs.shape[-1], dtype=bool)] = np.nan
    return share


def mean_deviation(pairs: np.ndarray, chance: float) -> np.ndarray:
    """Mean over ordered pairs of |co-activation - chance|, experts that no token chose aside."""
    deviation = np.abs(co_activation(pairs) - chance)
    known = np.isfinite(deviation)
    return divide(np.where(known, deviation, 0).sum((-2, -1)), known.sum((-2, -1)))


def largest_share(table: np.ndarray) -> np.ndarray:
    """Mean over token types of the share of their most frequent expert. table: (..., V, N) tokens."""
    share = divide(table.max(-1), table.sum(-1))
    known = np.isfinite(share)
    return divide(np.where(known, share, 0).sum(-1), known.sum(-1))


def context_independence(table: np.ndarray) -> np.ndarray:
    """I(v; i) / H(i) of token type v and expert i: 1 if the type decides. table: (..., V, N) tokens.

    NaN where all tokens have one expert.
    """
    by_type, by_expert = entropy(table.sum(-1)), entropy(table.sum(-2))
    joint = entropy(table.reshape(*table.shape[:-2], table.shape[-2] * table.shape[-1]))
    return np.where(by_expert > 0, divide(by_type + by_expert - joint, by_expert), np.nan)


def js_divergence(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Jensen-Shannon divergence in bits of two loads (..., N): 0 equal, 1 without a common expert."""
    first = divide(first, first.sum(-1, keepdims=True))
    second = divide(second, second.sum(-1, keepdims=True))
    return np.maximum(entropy((first + second) / 2) - (entropy(first) + entropy(second)) / 2, 0)


# Chance levels --------------------------------------------------------------------------------


def even_loads(tokens: int, choices: float, experts: int, generator: np.random.Generator, draws: int) -> np.ndarray:
    """Loads (draws, N) of a router that gives each token `choices` (on average) of N experts at random.

    The multinomial of all choices, its deviations made smaller by what choosing without replacement takes away:
    mean and covariance are exact, and for one choice a token the distribution is.
    """
    total = round(tokens * choices)
    deviation = generator.multinomial(total, np.full(experts, 1 / experts), size=draws) - total / experts
    smaller = np.sqrt(max(experts - choices, 0) / max(experts - 1, 1))
    return np.maximum(total / experts + deviation * smaller, 0)


def common_expert(used: np.ndarray, experts: int) -> float:
    """Chance that two tokens share an expert: 1 - C(N - k, k) / C(N, k); NaN without tokens.

    used: (k + 1,) tokens by the number of experts they chose, which all but a few routers have at k.
    """
    share = divide(used, used.sum())
    apart = np.array([[comb(experts - a, b) / comb(experts, b) for b in range(len(used))] for a in range(len(used))])
    return float(1 - share @ apart @ share)


def mean_binomial_deviation(tokens: np.ndarray, chance: float) -> np.ndarray:
    """Mean of |X / n - p| for X binomial with n = `tokens` and p = `chance`; NaN for n = 0.

    De Moivre's closed form, 2 (v + 1) C(n, v + 1) p^(v + 1) (1 - p)^(n - v) / n with v the whole part of n p.
    """
    from scipy.special import gammaln, xlogy

    n = np.asarray(tokens, np.float64)
    v = np.minimum(np.floor(n * chance), np.maximum(n - 1, 0))
    log = gammaln(n + 1) - gammaln(v + 1) - gammaln(n - v) + xlogy(v + 1, chance) + xlogy(n - v, 1 - chance)
    return divide(2 * np.exp(log), n)


def permuted(statistic, table: np.ndarray, draws: int, generator: np.random.Generator) -> float:
    """Mean of `statistic` over tables with the margins of `table` (V, N): the experts permuted over the tokens."""
    from scipy.stats import random_table

    rows, columns = table.sum(1), table.sum(0)
    if table.sum() == 0:
        return float("nan")
    kept = columns > 0
    drawn = random_table(rows.astype(np.int64), columns[kept].astype(np.int64)).rvs(draws, random_state=generator)
    values = [statistic(one[None].astype(np.float64))[0] for one in drawn]
    return float(np.mean(values))
