"""Permutations, bootstraps and jackknives that the estimators share: numpy only.

Squares are (L, N, N) float64, symmetric, one for each of L layers with N experts; their diagonals are not used.
"""

import math
from collections.abc import Callable

import numpy as np

from moe_atlas.parametric.regression import permutations

PERMUTATIONS = 4_999  # of experts, drawn in each layer on its own
DRAWS = 1_000  # of a bootstrap
TAIL = 0.025
_BLOCK = 1 << 22  # float64 numbers of permuted similarities held at once: 32 MiB
_EXACT_SIGNS = 13  # layers up to which all 2^L signs are gone through


def pairs_of(square: np.ndarray) -> np.ndarray:
    """(..., N, N) to its pairs a < b, (..., N (N - 1) / 2)."""
    first, second = np.triu_indices(square.shape[-1], 1)
    return square[..., first, second]


def tail(drawn: np.ndarray, observed: float, sign: int, exact: bool = False) -> float:
    """One-sided p: share of `drawn` at least as far in the direction `sign` as `observed`.

    Unless all values are gone through (`exact`), the observed one counts as one more draw.
    """
    room = 1e-9 * max(abs(observed), np.abs(drawn).max(initial=0.0), 1e-300)
    reached = int((sign * drawn >= sign * observed - room).sum())
    return reached / len(drawn) if exact else (1 + reached) / (1 + len(drawn))


def interval(draws: np.ndarray, value: float | None = None) -> tuple[float, float]:
    """95 % percentile interval of the draws that are numbers; moved to have the mean `value` where that is given.

    Squares and largest values grow by drawing the same expert twice, so their draws are moved back.
    """
    draws = draws[np.isfinite(draws)]
    if not len(draws):
        return np.nan, np.nan
    low, high = np.quantile(draws, (TAIL, 1 - TAIL))
    move = 0.0 if value is None else value - draws.mean()
    return float(low + move), float(high + move)


def expert_counts(layers: int, experts: int, generator: np.random.Generator) -> np.ndarray:
    """How often each expert is drawn when each layer's N are drawn with replacement, (L, DRAWS, N) float64."""
    return generator.multinomial(experts, np.full(experts, 1 / experts), size=(layers, DRAWS)).astype(np.float64)


def off_diagonal(square: np.ndarray) -> np.ndarray:
    """The squares with zeros on the diagonal."""
    return np.where(np.eye(square.shape[-1], dtype=bool), 0.0, square)


def _totals(square: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Sum over pairs of different experts, each as often as both were drawn, (L, DRAWS)."""
    return ((counts @ square) * counts).sum(-1)


def bootstrap_means(square: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Mean over pairs of each draw, (L, DRAWS); NaN where a draw has no pair of different experts."""
    weight = _totals(off_diagonal(np.ones_like(square)), counts)
    total = _totals(off_diagonal(square), counts)
    return np.divide(total, weight, out=np.full(weight.shape, np.nan), where=weight > 0)


def bootstrap_correlations(x: np.ndarray, y: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Pearson r over pairs of each draw, (L, DRAWS); NaN where fewer than 3 experts differ or values are constant."""
    weight = _totals(off_diagonal(np.ones_like(x)), counts)
    weight = np.where((counts > 0).sum(-1) >= 3, weight, np.nan)
    x, y = (off_diagonal(z - pairs_of(z).mean(-1)[:, None, None]) for z in (x, y))
    mean_x, mean_y = _totals(x, counts) / weight, _totals(y, counts) / weight
    var_x = _totals(x * x, counts) / weight - mean_x**2
    var_y = _totals(y * y, counts) / weight - mean_y**2
    covariance = _totals(x * y, counts) / weight - mean_x * mean_y
    least_x, least_y = (1e-12 * pairs_of(z).var(-1)[:, None] for z in (x, y))
    usable = (var_x > least_x) & (var_y > least_y)
    r = np.divide(
        covariance, np.sqrt(np.where(usable, var_x * var_y, 1)), where=usable, out=np.full(weight.shape, np.nan)
    )
    return np.clip(r, -1, 1)


def correlations(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Pearson r over the pairs of each layer, (L,); NaN where one of the two is constant."""
    x, y = pairs_of(x), pairs_of(y)
    x, y = x - x.mean(-1, keepdims=True), y - y.mean(-1, keepdims=True)
    scale = np.sqrt((x * x).sum(-1) * (y * y).sum(-1))
    varies = (np.ptp(x, axis=-1) > 1e-12) & (np.ptp(y, axis=-1) > 1e-12)
    return np.divide((x * y).sum(-1), scale, out=np.full(len(x), np.nan), where=varies)


def orders(experts: int, generator: np.random.Generator) -> np.ndarray:
    """PERMUTATIONS random permutations of the experts, (PERMUTATIONS, N)."""
    return generator.permuted(np.broadcast_to(np.arange(experts), (PERMUTATIONS, experts)), axis=1)


def smallest_permuted(layers: int, experts: int) -> float:
    """The smallest p that permutations of the experts, in each layer on its own, can give."""
    return max(1 / (1 + PERMUTATIONS), 1 / float(math.factorial(experts)) ** layers)


def permuted_correlations(xs: list[np.ndarray], y: np.ndarray, permuted: np.ndarray) -> np.ndarray:
    """Pearson r of each of xs with y of one layer, the experts of y permuted, (len(xs), P).

    xs and y: (N, N); permuted: (P, N). Mantel's null: names of experts say nothing.
    """
    first, second = np.triu_indices(len(y), 1)
    centred = np.stack([pairs_of(x) - pairs_of(x).mean() for x in xs])
    centred /= np.linalg.norm(centred, axis=1, keepdims=True)
    own = y - pairs_of(y).mean()
    own = own / np.linalg.norm(pairs_of(own))
    step = max(1, _BLOCK // len(first))
    parts = [own[p[:, first], p[:, second]] @ centred.T for p in np.split(permuted, range(step, len(permuted), step))]
    return np.concatenate(parts).T


def jackknife(square: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean over pairs of each layer and its standard error by leaving out one expert at a time, (L,) each.

    Pairs share experts, so that experts are the units. Where pairs are independent of each other, as with experts
    that have nothing in common, the variance comes out about twice too large.
    """
    experts = square.shape[-1]
    zeroed = off_diagonal(square)
    by_expert = zeroed.sum(-1)  # (L, N)
    total = by_expert.sum(-1) / 2
    left = (total[:, None] - by_expert) / ((experts - 1) * (experts - 2) / 2)
    error = np.sqrt((experts - 1) / experts * ((left - left.mean(-1, keepdims=True)) ** 2).sum(-1))
    return total / (experts * (experts - 1) / 2), error


def student_p(value: float, error: float, degrees: int, sign: int) -> float:
    """One-sided p of value / error under Student's t; without any spread 0 or 1."""
    from scipy.stats import t  # half a second to import

    if error <= 1e-12 * max(abs(value), 1e-300):
        return 0.0 if sign * value > 0 else 1.0
    return float(t.sf(sign * value / error, degrees))


def rank_trend(values: np.ndarray) -> np.ndarray:
    """Spearman's rho of each row of (R, L) with the number of the layer, (R,); NaN where a row is constant."""
    from scipy.stats import rankdata

    known = np.isfinite(values).all(1)
    ranks = rankdata(np.where(known[:, None], values, 0), axis=1)
    ranks = ranks - ranks.mean(1, keepdims=True)
    depth = np.arange(values.shape[1]) - (values.shape[1] - 1) / 2
    scale = np.sqrt((ranks**2).sum(1) * (depth**2).sum())
    return np.divide(ranks @ depth, scale, out=np.full(len(values), np.nan), where=known & (scale > 0))


def permuted_trend(values: np.ndarray, sign: int, generator: np.random.Generator) -> tuple[float, float]:
    """One-sided p of Spearman's rho of (L,) values with depth when layers are permuted, and the smallest possible p.

    All permutations of up to 7 layers are gone through, 9,999 random ones of more.
    """
    order, exact = permutations(len(values), generator)
    smallest = 1 / len(order) if exact else 1 / (1 + len(order))
    return tail(rank_trend(values[order]), float(rank_trend(values[None])[0]), sign, exact), smallest


def flipped_signs(values: np.ndarray, sign: int, generator: np.random.Generator) -> tuple[float, float]:
    """One-sided p of the mean of (L,) values when their signs are flipped at random, and the smallest possible p."""
    layers = len(values)
    if layers <= _EXACT_SIGNS:
        flips = 1 - 2 * ((np.arange(2**layers)[:, None] >> np.arange(layers)) & 1)
        return tail(flips @ values / layers, values.mean(), sign, True), 2.0**-layers
    flips = generator.choice((-1.0, 1.0), size=(PERMUTATIONS, layers))
    return tail(flips @ values / layers, values.mean(), sign), 1 / (1 + PERMUTATIONS)


def block_draws(
    values: np.ndarray, tokens: np.ndarray, generator: np.random.Generator, statistic: Callable = lambda means: means
) -> np.ndarray:
    """`statistic` of the token-weighted means over blocks of documents drawn with replacement.

    values, tokens: (B, ...) with one shape. statistic maps means (R, ...) to anything of R rows; the first row is the
    text itself, the DRAWS others are the draws.
    """
    blocks = len(values)
    drawn = generator.multinomial(blocks, np.full(blocks, 1 / blocks), size=DRAWS)
    weights = np.concatenate([np.ones((1, blocks)), drawn])
    flat = np.where(tokens > 0, values * tokens, 0).reshape(blocks, -1), tokens.reshape(blocks, -1).astype(np.float64)
    above, below = (weights @ part for part in flat)
    means = np.divide(above, below, out=np.full(above.shape, np.nan), where=below > 0)
    return statistic(means.reshape(-1, *values.shape[1:]))
