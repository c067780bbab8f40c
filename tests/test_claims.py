"""Estimators on tables whose answer is known, Holm's method, the rule at its boundaries, the two sheets."""

import itertools
import math

import numpy as np
import polars as pl
import pytest
from scipy import stats
from workflow_runs import ROOT

from moe_atlas import tables
from moe_atlas.claims import behavior, resample, weights
from moe_atlas.claims.estimate import Estimate, Evidence, NotEnough
from moe_atlas.claims.judge import TABLES, judge
from moe_atlas.claims.sheet import Claim, load_claims
from moe_atlas.claims.verdict import CANNOT_BE_TOLD, DOES_NOT_HOLD, HOLDS, holm, verdict

CLAIMS = load_claims(ROOT / "config/claims.tsv")
SIZES = {"N": 6, "d": 32, "m": 16}


def similarity(squares, level="matrix", matrices=("up", "act", "down")):
    """Table similarity of one model from (L, N, N), or {matrix: (L, N, N)}."""
    squares = squares if isinstance(squares, dict) else dict.fromkeys(matrices, squares)
    rows = []
    for matrix, stack in squares.items():
        for layer, square in enumerate(stack):
            for a, b in itertools.combinations_with_replacement(range(len(square)), 2):
                own = "matrix" if matrix == "router" else level
                rows.append(("m", layer, matrix, own, str(a), str(b), float(square[a, b])))
    return pl.DataFrame(rows, schema=tables.TABLES["similarity"].schema, orient="row")


def outputs(squares):
    """Table output_similarity with these mean cosines, (L, N, N)."""
    frame = similarity(squares, matrices=("up",)).select("model", "layer", "a", "b", cosine_mean_content="cosine")
    others = set(tables.TABLES["output_similarity"].schema) - set(frame.columns) - {"corpus", "site"}
    frame = frame.with_columns(corpus=pl.lit("c"), site=pl.lit("ffn"), **dict.fromkeys(others))
    return tables.conform("output_similarity", frame)


def documents(**measures):
    """Table documents from (L, B) values by measure; block b has 10 + b tokens."""
    rows = [
        ("m", "c", layer, "ffn", block, name, 10 + block, float(value))
        for name, values in measures.items()
        for layer, blocks in enumerate(values)
        for block, value in enumerate(blocks)
    ]
    names = ("model", "corpus", "layer", "site", "block", "measure", "tokens", "value")
    return tables.conform("documents", pl.DataFrame(rows, schema=names, orient="row"))


def evidence(direction="greater", seed=0, **parts):
    parameters = parts.pop("parameters", {})
    return Evidence(parts, SIZES, direction, parameters, np.random.default_rng(seed))


def normal_squares(layers, experts, seed, spread=1.0, level=0.0):
    values = np.random.default_rng(seed).normal(level, spread, (layers, experts, experts))
    return (values + values.transpose(0, 2, 1)) / 2


def level_squares(levels, experts=6, noise=0.01, seed=0):
    return np.asarray(levels)[:, None, None] + normal_squares(len(levels), experts, seed, noise)


# Estimators -----------------------------------------------------------------------------------
def test_weight_similarity_against_random_matrices():
    squares = level_squares([0.3, 0.5])
    found = weights.weight_similarity(evidence(similarity=similarity(squares)))
    assert found.value == pytest.approx(resample.pairs_of(squares).mean()) and found.n == 3 * 2 * 15
    assert found.low < found.value < found.high and found.p < 1e-12
    small = np.full((1, 6, 6), 0.004)
    found = weights.weight_similarity(evidence(similarity=similarity(small)))
    wanted = stats.norm.sf(0.004 * math.sqrt(16 * 32) * math.sqrt(45))
    assert found.p == pytest.approx(wanted)
    opposite = weights.weight_similarity(evidence("less", similarity=similarity(small)))
    assert opposite.p == pytest.approx(1 - wanted)


def test_an_unlike_expert_is_found_and_its_drop_measured():
    squares = level_squares([0.5, 0.5, 0.5])
    squares[1, 3, :] = squares[1, :, 3] = 0.1
    found = weights.unlike_expert(evidence(similarity=similarity(squares)))
    others = [squares[1, a, b] for a, b in itertools.combinations([0, 1, 2, 4, 5], 2)]
    assert found.value == pytest.approx(np.mean(others) - 0.1)
    assert found.p <= 0.02 and found.null < 0.3 < found.low <= found.value <= found.high
    plain = weights.unlike_expert(evidence(similarity=similarity(level_squares([0.5] * 3, noise=0.1))))
    assert plain.p > 0.01


def test_a_trend_of_few_layers_goes_through_all_orders_and_knows_its_smallest_p():
    falling = weights.weight_trend(evidence("less", similarity=similarity(level_squares([0.9, 0.7, 0.5, 0.3]))))
    assert falling.value == -1 and falling.p == falling.smallest_p == pytest.approx(1 / 24)
    values = [0.9, 0.5, 0.7, 0.3, 0.1]
    part = weights.weight_trend(evidence("less", similarity=similarity(level_squares(values, noise=0))))
    rho = stats.spearmanr(range(5), values).statistic
    reached = [stats.spearmanr(range(5), order).statistic <= rho + 1e-9 for order in itertools.permutations(values)]
    assert part.value == pytest.approx(rho) and part.p == pytest.approx(np.mean(reached))
    without = evidence(
        "less", similarity=similarity(level_squares([0.9, 0.7, 0.5, 1.0])), parameters={"leave_out_last": 1}
    )
    assert weights.weight_trend(without).value == -1


def test_matrices_with_one_pattern_and_with_their_own():
    shared = normal_squares(3, 7, 1)
    found = {name: shared + normal_squares(3, 7, i, 0.2) for i, name in enumerate(("up", "act", "down"), 10)}
    same = weights.matrix_patterns(evidence(similarity=similarity(found)))
    assert same.value > 0.9 and same.low > 0.5 and same.p == pytest.approx(1 / 5000)
    apart = {name: normal_squares(3, 7, i) for i, name in enumerate(found, 20)}
    assert weights.matrix_patterns(evidence(similarity=similarity(apart))).p > 0.05


def with_router(act, router, seed=5):
    layers, experts = act.shape[:2]
    others = {name: normal_squares(layers, experts, seed + i) for i, name in enumerate(("up", "down"))}
    return similarity(others | {"act": act, "router": router}, "neuron_mean")


def test_router_rows_that_follow_act_have_r_one_and_their_sign():
    act = normal_squares(4, 6, 2)
    table = with_router(act, act)
    for name in ("router_r", "router_r2"):
        found = getattr(weights, name)(evidence(similarity=table))
        assert (found.value, found.low, found.high) == pytest.approx((1, 1, 1)) and found.p == pytest.approx(1 / 5000)
    excess = weights.router_act_excess(evidence(similarity=table))
    assert excess.value > 0.7 and excess.low > 0 and excess.p < 0.01
    turned = with_router(act, 0.2 - 0.5 * act)
    assert weights.router_r(evidence(similarity=turned)).value == pytest.approx(-1)
    assert weights.router_r(evidence(similarity=turned)).p > 0.99
    assert weights.router_r2(evidence(similarity=turned)).value == pytest.approx(1)


def test_the_null_of_r_squared_is_one_over_the_pairs_less_one():
    table = with_router(normal_squares(6, 8, 3), normal_squares(6, 8, 4))
    assert weights.router_r2(evidence(similarity=table)).null == pytest.approx(1 / 27, rel=0.1)
    assert weights.router_r(evidence(similarity=table)).null == pytest.approx(0, abs=0.01)


def test_trends_over_documents():
    levels = np.linspace(0.9, 0.2, 6)[:, None] + np.random.default_rng(1).normal(0, 0.01, (6, 9))
    table = documents(pair_cosine=levels, norm=-levels)
    found = behavior.output_trend(evidence("less", documents=table))
    assert (found.value, found.low, found.high) == (-1, -1, -1) and found.p == pytest.approx(1 / 720)
    assert behavior.norm_trend(evidence(documents=table)).value == 1
    both = evidence("less", documents=table, similarity=similarity(level_squares(np.linspace(0.5, 0.1, 6))))
    assert behavior.diversity_trend(both).value == -1
    rising = evidence("less", documents=table, similarity=similarity(level_squares(np.linspace(0.1, 0.5, 6))))
    assert behavior.diversity_trend(rising).value == 1 and behavior.diversity_trend(rising).p == 1


def test_a_last_layer_apart():
    levels = np.array([0.3, 0.2, 0.1, 0.2, 0.8])
    parts = {
        "documents": documents(pair_cosine=np.tile(levels[:, None], 9)),
        "output_similarity": outputs(level_squares(levels)),
    }
    found = behavior.last_layer_output(evidence(**parts, parameters={"before": 3}))
    assert (found.value, found.low, found.high) == pytest.approx((0.8 - 0.5 / 3,) * 3) and found.p < 1e-4
    assert behavior.last_layer_outlier(evidence(**parts)).value == pytest.approx(0.5)
    flat = np.full(5, 0.3)
    parts = {
        "documents": documents(pair_cosine=np.tile(flat[:, None], 9)),
        "output_similarity": outputs(level_squares(flat, noise=0.2)),
    }
    assert behavior.last_layer_output(evidence(**parts, parameters={"before": 3})).p > 0.05


def test_outputs_beside_weights():
    square = normal_squares(3, 7, 6, 0.2)
    parts = {"similarity": similarity(square), "output_similarity": outputs(square * 2)}
    assert behavior.outputs_mirror_weights(evidence(**parts)).value == pytest.approx(1)
    apart = {"similarity": similarity(square), "output_similarity": outputs(normal_squares(3, 7, 9))}
    assert behavior.outputs_mirror_weights(evidence(**apart)).p > 0.01
    limit = {"weights_below": 0.1}
    unlike, alike = level_squares([0.02] * 3), level_squares([0.6] * 3)
    for own, output, wanted in ((unlike, alike, 0.08), (alike, alike, -0.5), (unlike, unlike, 0.02)):
        parts = {"similarity": similarity(own), "output_similarity": outputs(output)}
        found = behavior.alike_outputs_of_unlike_weights(evidence(**parts, parameters=limit))
        assert found.value == pytest.approx(wanted, abs=0.01)
        assert (found.p < 0.01) == (wanted == 0.08)


def cross(matrix, layers=3, tokens=100):
    rows = [
        ("m", "c", layer, "ffn", str(a), str(b), float(matrix[a, b]), float(matrix[a, b]), tokens)
        for layer in range(layers)
        for a, b in np.ndindex(matrix.shape)
    ]
    return pl.DataFrame(rows, schema=tables.TABLES["norm_score_cross"].schema, orient="row")


def test_a_router_that_follows_norms_and_one_that_favours_the_same_expert_by_chance():
    share = np.full((3, 9), 0.9)
    follows = evidence(
        documents=documents(top_norm_top_score=share), norm_score_cross=cross(np.diag([15.0] * 6) + 10 / 36)
    )
    found = behavior.largest_norm_largest_score(follows)
    assert found.value == pytest.approx(0.9) and found.null == pytest.approx(1 / 6, abs=0.02)
    assert found.p == pytest.approx(1 / 5000)
    # One large expert whose row scores high on every token: in each layer one pairing of six does the same.
    chance = np.zeros((6, 6))
    chance[2, 2] = 90
    found = behavior.largest_norm_largest_score(
        evidence(documents=documents(top_norm_top_score=share), norm_score_cross=cross(chance, layers=1))
    )
    assert found.p == pytest.approx(1 / 6, abs=0.03)


def test_top_scores_of_normal_logits_have_no_excess():
    logits = np.random.default_rng(4).normal(0, 1.5, (7, 9, 2000, 6))
    scores = np.sort(np.exp(logits) / np.exp(logits).sum(-1, keepdims=True), -1)
    tops = {"top1_score": scores[..., -1].mean(-1), "top2_score": scores[..., -2].mean(-1)}
    shape = {"output_similarity": outputs(level_squares([0.1] * 7))}
    found = behavior.top_score_gap(evidence(documents=documents(**tops), **shape))
    assert abs(found.value) < 0.01 and found.smallest_p == 1 / 128
    apart = {"top1_score": np.full((7, 9), 0.7), "top2_score": np.full((7, 9), 0.06)}
    found = behavior.top_score_gap(evidence(documents=documents(**apart), **shape))
    assert found.value > 0.1 and found.low > 0.1 and found.p == 1 / 128


def test_few_and_many_active_neurons():
    for level, p in ((0.25, 0), (0.99, 1)):
        rows = [
            ("m", "c", layer, "ffn", str(e), t, level + 0.001 * e, 90)
            for layer, e, t in itertools.product(range(3), range(6), (0.0, 0.001))
        ]
        ratio = pl.DataFrame(rows, schema=tables.TABLES["activation_ratio"].schema, orient="row")
        found = behavior.active_share(
            evidence(
                "less",
                documents=documents(active=np.full((3, 9), level)),
                activation_ratio=ratio,
                parameters={"share": 0.5},
            )
        )
        assert (found.value, found.null, found.n) == (pytest.approx(level), 0.5, 18)
        assert found.p == pytest.approx(p, abs=1e-6)


def test_routing_of_a_series_is_compared_with_half_way():
    values = {"overlap": 0.9, "chance": 0.25, "low": 0.85, "high": 0.95, "tokens": 50}
    columns = tables.declared("saturation").schema
    frame = pl.DataFrame([{name: values.get(name) for name in columns}], schema=columns)
    found = behavior.routing_overlap(evidence(saturation=frame))
    assert found.null == 0.625 and found.p == pytest.approx(stats.norm.sf(0.275 / (0.1 / 3.919928)), rel=1e-4)
    with pytest.raises(NotEnough, match="too short for an interval"):
        behavior.routing_overlap(evidence(saturation=frame.with_columns(low=pl.lit(None, pl.Float64))))


def test_the_jackknife_is_that_of_leaving_out_experts():
    square = normal_squares(1, 5, 8)[0]
    left = [np.mean([square[a, b] for a, b in itertools.combinations(set(range(5)) - {out}, 2)]) for out in range(5)]
    mean, error = resample.jackknife(square[None])
    assert mean[0] == pytest.approx(resample.pairs_of(square).mean())
    assert error[0] == pytest.approx(math.sqrt(4 / 5 * np.sum((np.array(left) - np.mean(left)) ** 2)))


def test_the_interval_over_documents_weighs_blocks_by_their_tokens():
    values, tokens = np.array([[1.0], [3.0]]), np.array([[30], [10]])
    draws = resample.block_draws(values, tokens, np.random.default_rng(0))
    assert draws[0, 0] == pytest.approx(1.5) and set(np.round(draws[1:, 0], 9)) == {1.0, 1.5, 3.0}


# Holm and the rule ----------------------------------------------------------------------------
def test_holm_is_the_method_written_out():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0] and holm([]) == []


def a_claim(**cells):
    row = dict.fromkeys(Claim.__dataclass_fields__, "") | {"parameters": {}, "direction": "greater"}
    return Claim(**(row | {"margin": 0.1, "level": 0.05, "layers": 1, "experts": 5, "blocks": 8} | cells))


@pytest.mark.parametrize(
    ("low", "high", "p", "wanted"),
    [
        (0.01, 0.5, 0.049, HOLDS),
        (0.01, 0.5, 0.05, CANNOT_BE_TOLD),  # the level itself is not below the level
        (0.0, 0.5, 0.001, CANNOT_BE_TOLD),  # the interval touches the null
        (-0.01, 0.5, 0.001, CANNOT_BE_TOLD),
        (0.01, 0.0999, 0.001, DOES_NOT_HOLD),  # there, but smaller than the claim means
        (0.01, 0.1, 0.001, HOLDS),
        (-0.0999, 0.0999, 0.9, DOES_NOT_HOLD),
        (-0.5, 0.0999, 0.9, CANNOT_BE_TOLD),
        (-0.5, -0.001, 0.99, DOES_NOT_HOLD),
        (-0.5, 0.0, 0.99, CANNOT_BE_TOLD),
        (math.nan, math.nan, 0.001, CANNOT_BE_TOLD),
        (0.2, 0.5, None, CANNOT_BE_TOLD),
    ],
)
def test_the_rule_at_its_boundaries(low, high, p, wanted):
    estimate = Estimate(0.2, low, high, 0.0, 0.01, 9, smallest_p=0.2 if p is None else 0.001)
    assert verdict(a_claim(), estimate, p)[0] == wanted
    mirrored = Estimate(-0.2, -high, -low, 0.0, 0.01, 9, smallest_p=estimate.smallest_p)
    assert verdict(a_claim(direction="less"), mirrored, p)[0] == wanted


def frames(**given):
    return {name: given.get(name, tables.empty(name)) for name in TABLES}


def test_too_few_data_never_get_a_verdict_and_the_reason_says_why():
    table = similarity(level_squares([0.9, 0.7, 0.5, 0.3])).with_columns(model=pl.lit("m"))
    judged = judge("m", frames(similarity=table), SIZES, CLAIMS, ["c"], 0)
    by_claim = {row["claim"]: row for row in judged.iter_rows(named=True)}
    trend = by_claim["o03-weights-by-depth"]
    assert trend["verdict"] == CANNOT_BE_TOLD and trend["estimate"] is None and trend["p_value"] is None
    assert "4 layers with experts and at least 6 are asked" in trend["reason"] and "is 0.042" in trend["reason"]
    assert by_claim["o02-alike-weights"]["verdict"] == HOLDS
    assert "0 blocks of documents and at least 8" in by_claim["o06b-last-layer-outputs"]["reason"]
    assert judged.filter(pl.col("reason").is_null() | (pl.col("reason") == "")).is_empty()


def test_a_test_that_cannot_reach_its_level_gives_no_verdict():
    claim = {"o03": a_claim(claim="o03", estimator="weight_trend", direction="less", layers=3, null="permuted layers")}
    table = similarity(level_squares([0.9, 0.5, 0.1]))
    row = judge("m", frames(similarity=table), SIZES, claim, [], 0).row(0, named=True)
    assert row["verdict"] == CANNOT_BE_TOLD and row["p_value"] == pytest.approx(1 / 6) and row["p_adjusted"] is None
    assert "smallest p on so few data is 0.17" in row["reason"]


def test_a_dense_model_and_a_sheet_without_long_texts_are_told_in_a_sentence():
    judged = judge("m", frames(), {"N": 0, "d": 8, "m": 8}, CLAIMS, [], 0)
    assert set(judged["verdict"]) == {CANNOT_BE_TOLD} and set(judged["claim"]) == set(CLAIMS)
    assert "0 layers with experts" in judged.filter(claim="o02-alike-weights")["reason"].item()
    assert judged.filter(claim="o09-largest-norm")["reason"].item() == "there is no long text"


def test_p_values_are_adjusted_over_all_claims_of_the_model():
    table = pl.concat(
        [similarity(normal_squares(8, 6, 1, 0.3)), with_router(*normal_squares(16, 6, 2, 0.3).reshape(2, 8, 6, 6))]
    )
    judged = judge("m", frames(similarity=table), SIZES, CLAIMS, [], 0).drop_nulls("p_value")
    assert judged["p_adjusted"].to_list() == pytest.approx(holm(judged["p_value"].to_list())) and len(judged) > 5
    again = judge("m", frames(similarity=table.sample(fraction=1.0, shuffle=True, seed=1)), SIZES, CLAIMS, [], 0)
    assert again.drop_nulls("p_value").equals(judged)
