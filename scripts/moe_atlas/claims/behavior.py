"""Estimators of what experts do on text. Their intervals are over blocks of documents, unless they say experts."""

import functools

import numpy as np

from moe_atlas.claims import read
from moe_atlas.claims.estimate import Estimate, Evidence, NotEnough
from moe_atlas.claims.resample import (
    PERMUTATIONS,
    block_draws,
    bootstrap_correlations,
    bootstrap_means,
    correlations,
    expert_counts,
    flipped_signs,
    interval,
    jackknife,
    orders,
    pairs_of,
    permuted_correlations,
    permuted_trend,
    rank_trend,
    smallest_permuted,
    student_p,
    tail,
)
from moe_atlas.claims.weights import weight_trend_draws
from moe_atlas.parametric.null import null_cosine_sd

_ACTIVE_THRESHOLD = 0.001
_LOGIT_DRAWS = 4_000


def _trend(evidence: Evidence, measure: str) -> tuple[float, np.ndarray, np.ndarray]:
    """Spearman's rho of depth with a measure, its draws over documents, and the measure by layer."""
    _, values, tokens = read.blocks(evidence.tables["documents"], measure)
    used = values.shape[1] - int(evidence.parameters.get("leave_out_last", 0))
    means = block_draws(values[:, :used, 0], tokens[:, :used, 0], evidence.generator)
    rho = rank_trend(means)
    if not np.isfinite(rho[0]):
        raise NotEnough(f"{measure} is the same in all layers")
    return float(rho[0]), rho[1:], means[0]


def output_trend(evidence: Evidence) -> Estimate:
    """Spearman's rho of depth with the mean cosine of two experts' outputs. n: layers. Null: layers permuted.

    Parameter leave_out_last: how many layers at the end are left out.
    """
    value, draws, means = _trend(evidence, "pair_cosine")
    p, smallest = permuted_trend(means, evidence.sign, evidence.generator)
    return Estimate(value, *interval(draws), 0.0, p, len(means), smallest)


def norm_trend(evidence: Evidence) -> Estimate:
    """Spearman's rho of depth with the mean norm of the experts' outputs. n: layers. Null: layers permuted."""
    value, draws, means = _trend(evidence, "norm")
    p, smallest = permuted_trend(means, evidence.sign, evidence.generator)
    return Estimate(value, *interval(draws), 0.0, p, len(means), smallest)


def diversity_trend(evidence: Evidence) -> Estimate:
    """The weaker of the depth trends of weight and of output similarity, for the claim that both are there. n: layers.

    Null: layers permuted, for each on its own; p is the larger of the two, a test of "both" at the same level.
    """
    weaker = np.minimum if evidence.sign > 0 else np.maximum
    weight, weight_draws, weight_means = weight_trend_draws(evidence)
    output, output_draws, output_means = _trend(evidence, "pair_cosine")
    tests = [permuted_trend(means, evidence.sign, evidence.generator) for means in (weight_means, output_means)]
    low, high = interval(weaker(weight_draws, output_draws))
    p, smallest = (max(test[i] for test in tests) for i in (0, 1))
    return Estimate(float(weaker(weight, output)), low, high, 0.0, p, len(output_means), smallest)


def last_layer_output(evidence: Evidence) -> Estimate:
    """Mean cosine of outputs in the last layer minus that of the layers just before it (parameter `before`)."""
    return _last_layer(evidence, lambda means: means[..., -1 - int(evidence.parameters["before"]) : -1].mean(-1))


def last_layer_outlier(evidence: Evidence) -> Estimate:
    """Mean cosine of outputs in the last layer minus the largest of all other layers."""
    return _last_layer(evidence, lambda means: means[..., :-1].max(-1))


def _last_layer(evidence: Evidence, others) -> Estimate:
    """The difference by documents. p: Student's t of it with errors of the jackknife over experts. n: layers used.

    Null: experts of the last layer are like those of the others. The error of what it is compared with is that of the
    layer with the largest error, which is not too small for a mean or for one layer. Degrees of freedom: N - 1.
    """
    _, values, tokens = read.blocks(evidence.tables["documents"], "pair_cosine")
    if values.shape[1] <= int(evidence.parameters.get("before", 1)):
        raise NotEnough("there are fewer layers than are compared")
    draws = block_draws(values[..., 0], tokens[..., 0], evidence.generator, lambda means: means[:, -1] - others(means))
    _, square = read.outputs(evidence.tables["output_similarity"])
    means, errors = jackknife(square)
    error = float(np.hypot(errors[-1], errors[:-1].max()))
    p = student_p(float(means[-1] - others(means)), error, square.shape[-1] - 1, evidence.sign)
    return Estimate(float(draws[0]), *interval(draws[1:]), 0.0, p, len(means))


def outputs_mirror_weights(evidence: Evidence) -> Estimate:
    """Pearson r over pairs of experts of output cosine and matrix-level cosine, mean over layers. Interval: experts.

    Null: experts of the outputs permuted, in each layer on its own (Mantel). n: pairs of experts of all layers.
    """
    layers, weights = read.mean_weights(evidence.tables["similarity"])
    other, outputs = read.outputs(evidence.tables["output_similarity"])
    weights, outputs = _common(layers, weights, other, outputs)
    by_layer = correlations(weights, outputs)
    kept = np.isfinite(by_layer)
    if not kept.any():
        raise NotEnough("similarities of pairs do not vary")
    weights, outputs = weights[kept], outputs[kept]
    drawn = np.zeros(PERMUTATIONS)
    for x, y in zip(weights, outputs, strict=True):
        drawn += permuted_correlations([x], y, orders(len(y), evidence.generator))[0] / len(weights)
    draws = bootstrap_correlations(weights, outputs, expert_counts(*weights.shape[:2], evidence.generator)).mean(0)
    value = float(by_layer[kept].mean())
    return Estimate(
        value, *interval(draws, value), 0.0, tail(drawn, value, evidence.sign), pairs_of(weights).size,
        smallest_permuted(*weights.shape[:2]),
    )  # fmt: skip


def _common(layers, square, other_layers, other) -> tuple[np.ndarray, np.ndarray]:
    both = sorted(set(layers) & set(other_layers))
    if not both or square.shape[-1] != other.shape[-1]:
        raise NotEnough("weights and outputs have no layer with the same experts")
    return square[np.searchsorted(layers, both)], other[np.searchsorted(other_layers, both)]


def alike_outputs_of_unlike_weights(evidence: Evidence) -> Estimate:
    """The smaller of output cosine and `weights_below` - weight cosine, means over layers and pairs. Interval: experts.

    Null: 0, that is outputs of random matrices, or weights that are alike. p is the larger of two. Of the outputs: the
    mean over tokens of the cosine of two independent isotropic vectors has at most the variance 1 / d, and pairs are
    uncorrelated. Of the weights: Student's t with the error of the jackknife over experts. n: pairs of all layers.
    """
    from scipy.stats import norm

    layers, weights = read.mean_weights(evidence.tables["similarity"])
    other, outputs = read.outputs(evidence.tables["output_similarity"])
    weights, outputs = _common(layers, weights, other, outputs)
    room, n = evidence.parameters["weights_below"], pairs_of(outputs).size
    output = float(pairs_of(outputs).mean())
    p_output = norm.sf(evidence.sign * output / (null_cosine_sd((evidence.sizes["d"],)) / np.sqrt(n)))
    means, errors = jackknife(weights)
    left = room - float(means.mean())
    error = float(np.sqrt((errors**2).sum()) / len(errors))
    p_weight = student_p(left, error, weights.shape[-1] - 1, evidence.sign)
    counts = expert_counts(*weights.shape[:2], evidence.generator)
    draws = [bootstrap_means(square, counts).mean(0) for square in (outputs, weights)]
    low, high = interval(np.minimum(draws[0], room - draws[1]))
    return Estimate(min(output, left), low, high, 0.0, float(max(p_output, p_weight)), n)


def largest_norm_largest_score(evidence: Evidence) -> Estimate:
    """Share of tokens whose expert with the largest output norm has the highest score. Null: see _cross."""
    return _cross(evidence, "top_norm_top_score", "largest_both")


def norm_score_correlation(evidence: Evidence) -> Estimate:
    """Mean over tokens of Spearman's rho over experts of output norm and router score. Null: see _cross."""
    return _cross(evidence, "norm_score_spearman", "rank_product")


def _cross(evidence: Evidence, measure: str, column: str) -> Estimate:
    """Mean over layers of `measure`. Null: the router's rows permuted over the experts, in each layer on its own.

    A text does not tell a router that follows the norms from one that by chance scores a large expert high: only
    other pairings of the same rows and experts do. The null's value is the mean over permutations. n: tokens.
    """
    _, values, tokens = read.blocks(evidence.tables["documents"], measure)
    draws = block_draws(values[..., 0], tokens[..., 0], evidence.generator, lambda means: means.mean(-1))
    cross = read.cross(evidence.tables["norm_score_cross"], column)
    experts = cross.shape[-1]
    drawn = np.zeros(PERMUTATIONS)
    for layer in cross:
        drawn += layer[orders(experts, evidence.generator), np.arange(experts)].sum(1) / len(cross)
    observed = float(cross[:, np.arange(experts), np.arange(experts)].sum(1).mean())
    return Estimate(
        float(draws[0]), *interval(draws[1:]), float(drawn.mean()), tail(drawn, observed, evidence.sign),
        int(tokens[..., 0].sum(0).max()), smallest_permuted(*cross.shape[:2]),
    )  # fmt: skip


@functools.cache
def normal_gaps(experts: int) -> tuple[np.ndarray, np.ndarray]:
    """Mean largest softmax score of N independent normal logits, and mean gap to the second, for rising spreads."""
    logits = np.random.default_rng(0).standard_normal((_LOGIT_DRAWS, experts))
    logits = np.sort(logits, axis=1)[:, ::-1]
    logits -= logits[:, :1]
    tops, gaps = [1 / experts], [0.0]
    for spread in np.geomspace(0.02, 400, 120):
        scores = np.exp(spread * logits)
        tops.append((1 / scores.sum(1)).mean())
        gaps.append(((1 - scores[:, 1]) / scores.sum(1)).mean())
    return np.array(tops), np.array(gaps)


def top_score_gap(evidence: Evidence) -> Estimate:
    """Largest minus second score of a token, beyond what normal logits with the same mean largest score have.

    Scores are softmax over all N. Mean over layers. Null: logits of a layer are independent normal numbers, as those of
    random rows are, with one spread for all tokens; p by flipping the signs of the layers' excess. n: layers.
    Tokens of very different spread raise the excess too: the margin is to be above that.
    """
    _, values, tokens = read.blocks(evidence.tables["documents"], "top1_score", "top2_score")
    experts = read.outputs(evidence.tables["output_similarity"])[1].shape[-1]
    tops, gaps = normal_gaps(experts)

    def excess(means: np.ndarray) -> np.ndarray:
        return means[..., 0] - means[..., 1] - np.interp(means[..., 0], tops, gaps)

    by_layer = block_draws(values, tokens, evidence.generator, excess)
    p, smallest = flipped_signs(by_layer[0], evidence.sign, evidence.generator)
    draws = by_layer.mean(-1)
    return Estimate(float(draws[0]), *interval(draws[1:]), 0.0, p, by_layer.shape[1], smallest)


def active_share(evidence: Evidence) -> Estimate:
    """Share of neurons whose activation is above 0.001 in absolute value, mean over layers, experts and tokens.

    Null: 0.5 (parameter `share`): weights without a preferred sign leave at least half of the pre-activations positive.
    p: Student's t over experts, layers as they are. n: experts of all layers.
    """
    _, values, tokens = read.blocks(evidence.tables["documents"], "active")
    draws = block_draws(values[..., 0], tokens[..., 0], evidence.generator, lambda means: means.mean(-1))
    null = evidence.parameters["share"]
    table = evidence.tables["activation_ratio"]
    table = table.filter((table["threshold"] - _ACTIVE_THRESHOLD).abs() < 1e-9, table["expert"].str.contains(r"^\d+$"))
    parts = [part["ratio"].to_numpy() for part in table.partition_by("layer")]
    if not parts or min(map(len, parts)) < 2:
        raise NotEnough("there is no activation ratio of several experts")
    error = np.sqrt(sum(part.var(ddof=1) / len(part) for part in parts)) / len(parts)
    degrees = sum(len(part) - 1 for part in parts)
    p = student_p(float(np.mean([part.mean() for part in parts])) - null, float(error), degrees, evidence.sign)
    return Estimate(float(draws[0]), *interval(draws[1:]), null, p, sum(map(len, parts)))


def routing_overlap(evidence: Evidence) -> Estimate:
    """Share of a token's experts that the last model of the same series chooses too, mean over layers.

    Null: half-way between chance (k / N) and 1. Interval: means of the layers' own, over documents, which is wide
    enough however layers depend on each other; p from its width, as of a normal number. n: tokens.
    """
    from scipy.stats import norm

    table = evidence.tables["saturation"]
    if table.is_empty():
        raise NotEnough("no other model of the sheet has the same series")
    value, chance = float(table["overlap"].mean()), float(table["chance"].mean())
    if table["low"].null_count() or table["high"].null_count():
        raise NotEnough("the text is too short for an interval")
    low, high, null = float(table["low"].mean()), float(table["high"].mean()), (1 + chance) / 2
    error = max(high - low, 1e-12) / (2 * norm.isf(0.025))
    p = float(norm.sf(evidence.sign * (value - null) / error))
    return Estimate(value, low, high, null, p, int(table["tokens"].max()))
