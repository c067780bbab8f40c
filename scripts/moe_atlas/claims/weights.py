"""Estimators that read weights alone. Their intervals are over experts: drawn with replacement in each layer."""

import numpy as np

from moe_atlas.claims import read
from moe_atlas.claims.estimate import Estimate, Evidence, NotEnough
from moe_atlas.claims.resample import (
    PERMUTATIONS,
    bootstrap_correlations,
    bootstrap_means,
    correlations,
    expert_counts,
    interval,
    off_diagonal,
    orders,
    pairs_of,
    permuted_correlations,
    permuted_trend,
    rank_trend,
    smallest_permuted,
    tail,
)
from moe_atlas.parametric.null import null_cosine_sd


def weight_similarity(evidence: Evidence) -> Estimate:
    """Mean cosine of two experts' matrices over layers, matrices and pairs. n: pairs of all layers and matrices.

    Null: random matrices. Cosines of pairs of independent matrices of m d numbers have mean 0, variance 1 / (m d) and
    no correlation with each other, also of pairs that share an expert; their mean is taken as normal.
    """
    from scipy.stats import norm

    _, found = read.weights(evidence.tables["similarity"], "matrix")
    stacked = np.concatenate(list(found.values()))
    value, n = float(pairs_of(stacked).mean()), pairs_of(stacked).size
    spread = null_cosine_sd((evidence.sizes["m"], evidence.sizes["d"])) / np.sqrt(n)
    layers, experts = len(stacked) // len(found), stacked.shape[-1]
    counts = expert_counts(layers, experts, evidence.generator)
    draws = np.mean([bootstrap_means(square, counts).mean(0) for square in found.values()], axis=0)
    return Estimate(value, *interval(draws), 0.0, float(norm.sf(evidence.sign * value / spread)), n)


def unlike_expert(evidence: Evidence) -> Estimate:
    """How much less alike the most unlike expert of any layer is to the others than they are to each other.

    Cosines are means over the matrices. Null: pairs of a layer permuted, which leaves the similarities and takes away
    what pairs of one expert share; its value is the mean over permutations of the same largest difference, its p their
    share that reach it. Interval: the expert found, the others drawn with replacement. n: experts of all layers.
    """
    _, square = read.mean_weights(evidence.tables["similarity"])
    experts = square.shape[-1]
    observed = _drops(off_diagonal(square))
    layer, expert = np.unravel_index(observed.argmax(), observed.shape)
    first, second = np.triu_indices(experts, 1)
    largest = np.full(PERMUTATIONS, -np.inf)
    for pairs in pairs_of(square):
        by_expert = np.zeros((len(first), experts))
        by_expert[np.arange(len(first)), first] = by_expert[np.arange(len(first)), second] = 1
        shuffled = evidence.generator.permuted(np.broadcast_to(pairs, (PERMUTATIONS, len(pairs))), axis=1)
        largest = np.maximum(largest, _drops_of_sums(shuffled @ by_expert, pairs.sum()).max(1))
    kept = np.arange(experts) != expert
    counts = expert_counts(1, experts - 1, evidence.generator)
    among = bootstrap_means(square[layer][np.ix_(kept, kept)][None], counts)[0]
    draws = among - counts[0] @ square[layer, expert, kept] / (experts - 1)
    value = float(observed.max())
    return Estimate(
        value, *interval(draws), float(largest.mean()), tail(largest, value, 1), observed.size, 1 / (1 + PERMUTATIONS)
    )


def _drops(square: np.ndarray) -> np.ndarray:
    return _drops_of_sums(square.sum(-1), pairs_of(square).sum(-1)[..., None])


def _drops_of_sums(by_expert: np.ndarray, total: np.ndarray | float) -> np.ndarray:
    """Mean of the pairs without an expert minus mean of its own, from sums over pairs, (..., N)."""
    experts = by_expert.shape[-1]
    return (total - by_expert) / ((experts - 1) * (experts - 2) / 2) - by_expert / (experts - 1)


def weight_trend(evidence: Evidence) -> Estimate:
    """Spearman's rho of depth with the mean cosine of two experts' matrices. n: layers.

    Null: layers permuted. Parameter leave_out_last: how many layers at the end are left out.
    """
    value, draws, means = weight_trend_draws(evidence)
    p, smallest = permuted_trend(means, evidence.sign, evidence.generator)
    return Estimate(value, *interval(draws), 0.0, p, len(means), smallest)


def weight_trend_draws(evidence: Evidence) -> tuple[float, np.ndarray, np.ndarray]:
    """Spearman's rho, its bootstrap draws, and the means of the layers used."""
    _, square = read.mean_weights(evidence.tables["similarity"])
    square = square[: len(square) - int(evidence.parameters.get("leave_out_last", 0))]
    means = pairs_of(square).mean(-1)
    value = float(rank_trend(means[None])[0])
    if not np.isfinite(value):
        raise NotEnough("weight similarity is the same in all layers")
    counts = expert_counts(len(square), square.shape[-1], evidence.generator)
    return value, rank_trend(bootstrap_means(square, counts).T), means


def matrix_patterns(evidence: Evidence) -> Estimate:
    """Pearson r over pairs of experts of two matrices' cosines, mean over layers and up-act, up-down, act-down.

    Null: experts of the second and third matrix permuted (Mantel). n: pairs of experts of all layers.
    """
    _, found = read.weights(evidence.tables["similarity"], "matrix")
    if len(found) != 3:
        raise NotEnough("experts without a gate have two matrices")
    up, act, down = found.values()
    couples = ((up, act), (down, act), (up, down))
    by_layer = np.mean([correlations(x, y) for x, y in couples], axis=0)
    kept = np.isfinite(by_layer)
    if not kept.any():
        raise NotEnough("similarities of pairs do not vary")
    value, drawn = float(by_layer[kept].mean()), np.zeros(PERMUTATIONS)
    for u, a, d in zip(up[kept], act[kept], down[kept], strict=True):
        of_up, of_down = orders(len(a), evidence.generator), orders(len(a), evidence.generator)
        relative = np.take_along_axis(of_down, np.argsort(of_up, axis=1), axis=1)  # r of up and down knows only this
        for x, y, permuted in ((a, u, of_up), (a, d, of_down), (u, d, relative)):
            drawn += permuted_correlations([x], y, permuted)[0]
    drawn /= 3 * kept.sum()
    counts = expert_counts(len(up), up.shape[-1], evidence.generator)
    draws = np.mean([bootstrap_correlations(x, y, counts)[kept] for x, y in couples], axis=0)
    return Estimate(
        value, *interval(draws.mean(0), value), 0.0, tail(drawn, value, evidence.sign), pairs_of(up[kept]).size,
        smallest_permuted(*up[kept].shape[:2]),
    )  # fmt: skip


def router_r(evidence: Evidence) -> Estimate:
    """Pearson r, sign kept, of router similarity with that of mean act neurons, mean over layers."""
    return _router(evidence, lambda r: r["act"], squared=False)


def router_r2(evidence: Evidence) -> Estimate:
    """Pearson r squared of the same, mean over layers: an association of either sign, as in table 3."""
    return _router(evidence, lambda r: r["act"], squared=True)


def router_act_excess(evidence: Evidence) -> Estimate:
    """r squared of router and act minus the mean of those of router and up, router and down, mean over layers."""
    return _router(evidence, lambda r: r["act"] - (r["up"] + r["down"]) / 2, squared=True)


def _router(evidence: Evidence, combine, squared: bool) -> Estimate:
    """`combine` of {matrix: r or r squared}, each of any shape, for the statistic, its null and its interval.

    Null: the router's rows permuted over the experts, in each layer on its own (Mantel); its value is the mean over
    permutations. n: pairs of experts of all layers. Layers with constant similarities are left out.
    """
    names = (*read.MATRICES, "router")
    layers, found = read.weights(evidence.tables["similarity"], "neuron_mean", names)
    if set(found) != set(names):
        raise NotEnough(f"there is no similarity of {', '.join(sorted(set(names) - set(found)))}")
    power = 2 if squared else 1
    r = {name: correlations(found[name], found["router"]) for name in read.MATRICES}
    kept = np.isfinite(np.sum(list(r.values()), axis=0))
    if not kept.any():
        raise NotEnough("similarities of pairs do not vary")
    found = {name: square[kept] for name, square in found.items()}
    value = float(combine({name: r[name][kept] ** power for name in r}).mean())
    drawn = np.zeros(PERMUTATIONS)
    for layer in range(kept.sum()):
        xs = [found[name][layer] for name in read.MATRICES]
        permuted = permuted_correlations(xs, found["router"][layer], orders(len(xs[0]), evidence.generator)) ** power
        drawn += combine(dict(zip(read.MATRICES, permuted, strict=True))) / kept.sum()
    counts = expert_counts(kept.sum(), found["act"].shape[-1], evidence.generator)
    draws = {name: bootstrap_correlations(found[name], found["router"], counts) ** power for name in read.MATRICES}
    low, high = interval(combine(draws).mean(0), value)
    return Estimate(
        value, low, high, float(drawn.mean()), tail(drawn, value, evidence.sign), pairs_of(found["act"]).size,
        smallest_permuted(*found["act"].shape[:2]),
    )  # fmt: skip
