"""Regression of router similarity on weight similarity against plain loops, planted truths and nulls."""

import itertools
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_parametric import bank

from moe_atlas import tables
from moe_atlas.architectures.bank import ExpertBank
from moe_atlas.parametric import regression
from moe_atlas.parametric.regression import router_regression
from moe_atlas.parametric.similarity import weight_similarity

SCRIPTS = Path(__file__).resolve().parent.parent / "scripts"


def random_square(experts, seed):
    values = np.random.default_rng(seed).uniform(-1, 1, (experts, experts))
    square = (values + values.T) / 2
    np.fill_diagonal(square, 1)
    return square


def similarity_table(squares, model="m", layer=0):
    """Table similarity from {matrix: (N, N)}: neuron means, and the router's rows."""
    rows = []
    for matrix, square in squares.items():
        level = "matrix" if matrix == "router" else "neuron_mean"
        for a, b in itertools.combinations_with_replacement(range(len(square)), 2):
            rows.append((model, layer, matrix, level, str(a), str(b), float(square[a, b])))
    return pl.DataFrame(rows, schema=tables.TABLES["similarity"].schema, orient="row")


def squares(experts, seed=0, names=("up", "act", "down", "router")):
    return {name: random_square(experts, 10 * seed + number) for number, name in enumerate(names)}


def pairs_of(square):
    return [square[a, b] for a in range(len(square)) for b in range(a + 1, len(square))]


def loop_r(x, y):
    mean_x, mean_y = math.fsum(x) / len(x), math.fsum(y) / len(y)
    xy = math.fsum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    xx, yy = math.fsum((a - mean_x) ** 2 for a in x), math.fsum((b - mean_y) ** 2 for b in y)
    return xy / math.sqrt(xx * yy), xy / xx, mean_y - xy / xx * mean_x


@pytest.mark.parametrize("experts", [3, 5, 9])
def test_the_line_matches_loops(experts):
    given_squares = squares(experts)
    table = similarity_table(given_squares)
    frame = router_regression(table, seed=1)
    assert dict(frame.schema) == tables.TABLES["regression"].schema
    assert frame["matrix"].to_list() == ["up", "act", "down"]
    for row in frame.iter_rows(named=True):
        r, slope, intercept = loop_r(pairs_of(given_squares[row["matrix"]]), pairs_of(given_squares["router"]))
        assert row["n_pairs"] == experts * (experts - 1) // 2
        assert [row["r"], row["r2"], row["slope"], row["intercept"]] == pytest.approx([r, r * r, slope, intercept])


def test_the_mantel_test_of_few_experts_goes_through_all_permutations():
    given_squares = squares(5)
    x, y = given_squares["act"], given_squares["router"]
    observed = abs(loop_r(pairs_of(x), pairs_of(y))[0])
    reached = [
        abs(loop_r(pairs_of(x), pairs_of(y[np.ix_(order, order)]))[0]) >= observed - 1e-12
        for order in itertools.permutations(range(5))
    ]
    frame = router_regression(similarity_table(given_squares), seed=1).filter(matrix="act")
    assert frame["p_mantel"].item() == pytest.approx(sum(reached) / math.factorial(5), abs=1e-12)


def test_random_permutations_approach_the_exact_test(monkeypatch):
    table = similarity_table(squares(6))
    exact = router_regression(table, seed=1)["p_mantel"].to_numpy()
    monkeypatch.setattr(regression, "EXACT_PERMUTATIONS", 1)
    monkeypatch.setattr(regression, "_BLOCK", 40_000)  # several blocks
    drawn = router_regression(table, seed=1)["p_mantel"].to_numpy()
    assert not np.array_equal(drawn, exact)
    assert np.abs(drawn - exact).max() < 4 * 0.5 / math.sqrt(regression.RANDOM_PERMUTATIONS)


def test_the_mantel_p_of_unrelated_matrices_is_uniform():
    generator = np.random.default_rng(5)
    orders, exact = regression.permutations(6, generator)
    p = np.array(
        [regression.mantel_p(random_square(6, 2 * n), random_square(6, 2 * n + 1), orders, exact) for n in range(600)]
    )
    assert exact and p.min() > 0 and p.max() <= 1
    for level in (0.05, 0.2, 0.5, 0.8):
        assert abs((p <= level).mean() - level) < 4 * math.sqrt(level * (1 - level) / 600)


def test_the_bootstrap_matches_written_out_draws():
    x, y = random_square(6, 1), random_square(6, 2)
    generator = np.random.default_rng(3)
    draws = [[0, 1, 2, 3, 4, 5], [0, 0, 1, 2, 2, 2], [3, 3, 3, 3, 3, 3], [4, 4, 4, 5, 5, 5]]
    draws += generator.integers(6, size=(20, 6)).tolist()
    counts = np.array([[draw.count(expert) for expert in range(6)] for draw in draws])
    wanted = []
    for draw in draws:
        pairs = [(a, b) for a, b in itertools.combinations(draw, 2) if a != b]
        if len(set(draw)) >= 3:
            wanted.append(loop_r([x[a, b] for a, b in pairs], [y[a, b] for a, b in pairs])[0])
    assert len(wanted) < len(draws)
    assert regression.bootstrap_r(x, y, counts).tolist() == pytest.approx(wanted, abs=1e-9)


def test_bootstrap_draws_hold_every_expert_alike():
    counts = regression.bootstrap_counts(7, np.random.default_rng(0))
    assert counts.shape == (2000, 7) and set(counts.sum(1)) == {7}
    assert np.abs(counts.mean(0) - 1).max() < 0.1


def test_router_rows_equal_to_mean_act_neurons_give_r_one():
    ours = bank(experts=6)
    planted = ExpertBank(ours.up, ours.act, ours.down, ours.act.double().mean(1))
    frame = router_regression(weight_similarity(planted, model="m", layer=0), seed=0)
    row = frame.filter(matrix="act").row(0, named=True)
    assert [row["r"], row["slope"]] == pytest.approx([1, 1], abs=1e-5)
    assert row["intercept"] == pytest.approx(0, abs=1e-5)
    assert row["r_low"] > 0.999 and row["p_mantel"] <= 2 / 720
    assert frame.filter(matrix="up")["r"].item() < 0.99


def test_r_keeps_its_sign():
    act = random_square(8, 4)
    frame = router_regression(similarity_table({"act": act, "router": 0.3 - 0.5 * act}), seed=0)
    row = frame.row(0, named=True)
    assert [row["r"], row["slope"], row["intercept"]] == pytest.approx([-1, -0.5, 0.3])
    assert row["r_high"] < -0.999 and row["p_mantel"] == pytest.approx(1 / 10_000)


def test_reference_and_shared_expert_and_the_matrix_level_take_no_part():
    table = similarity_table(squares(5))
    others = table.with_columns(b=pl.lit("F"), cosine=pl.lit(0.9)).unique()
    shared = others.with_columns(b=pl.lit("SE"))
    matrix_level = table.filter(pl.col("matrix") != "router").with_columns(level=pl.lit("matrix"), cosine=pl.lit(0.1))
    more = pl.concat([others, shared, table, matrix_level])
    assert router_regression(more, seed=2).equals(router_regression(table, seed=2))


def test_neither_row_order_nor_other_layers_and_models_change_a_number():
    table = similarity_table(squares(9))
    alone = router_regression(table, seed=2)
    others = [similarity_table(squares(4, 3), layer=1), similarity_table(squares(8, 4), model="other")]
    mixed = pl.concat([*others, table]).sample(fraction=1, shuffle=True, seed=0)
    assert router_regression(mixed, seed=2).filter(model="m", layer=0).equals(alone)
    assert router_regression(table, seed=2).equals(alone)
    assert not router_regression(table, seed=3).equals(alone)


@settings(max_examples=15, deadline=None)
@given(st.integers(3, 6), st.integers(0, 1000), st.randoms())
def test_a_renaming_of_the_experts_changes_neither_line_nor_exact_test(experts, seed, random):
    given_squares = squares(experts, seed)
    order = list(range(experts))
    random.shuffle(order)
    renamed = {name: square[np.ix_(order, order)] for name, square in given_squares.items()}
    columns = ["r", "r2", "slope", "intercept", "p_value", "p_mantel"]
    one, other = (
        router_regression(similarity_table(each), seed=0).select(columns) for each in (given_squares, renamed)
    )
    assert one.to_numpy() == pytest.approx(other.to_numpy(), abs=1e-9)


NULLABLE = ["r", "r2", "slope", "intercept", "p_value", "p_mantel", "r_low", "r_high"]


@pytest.mark.parametrize("experts", [1, 2])
def test_too_few_pairs_keep_their_rows_without_a_line(experts):
    frame = router_regression(similarity_table(squares(experts)), seed=0)
    assert frame["n_pairs"].to_list() == [experts * (experts - 1) // 2] * 3
    assert all(frame[column].null_count() == 3 for column in NULLABLE)


def test_constant_values_have_no_line():
    act, flat = random_square(6, 1), np.full((6, 6), 0.25)
    for given_squares in ({"act": flat, "router": act}, {"act": act, "router": flat}):
        frame = router_regression(similarity_table(given_squares), seed=0)
        assert frame["n_pairs"].item() == 15
        assert all(frame[column].null_count() == 1 for column in NULLABLE)


def test_a_layer_without_router_rows_has_no_line():
    frame = router_regression(similarity_table({"up": random_square(4, 0)}), seed=0)
    assert len(frame) == 1 and frame["r"].null_count() == 1


def test_a_dense_model_has_an_empty_table():
    frame = router_regression(tables.empty("similarity"), seed=0)
    assert len(frame) == 0 and dict(frame.schema) == tables.TABLES["regression"].schema


def test_the_program_writes_the_table_without_importing_torch(tmp_path):
    table = similarity_table(squares(4))
    tables.write("similarity", table, tmp_path / "similarity.parquet")
    outputs = []
    for name in ("one.parquet", "two.parquet"):
        command = ["--similarity", tmp_path / "similarity.parquet", "--seed", "5", "--output", tmp_path / name]
        subprocess.run([sys.executable, SCRIPTS / "router_regression.py", *map(str, command)], check=True)
        outputs.append((tmp_path / name).read_bytes())
    assert outputs[0] == outputs[1]
    assert tables.read("regression", tmp_path / "one.parquet").equals(router_regression(table, seed=5))
    code = "import sys, moe_atlas.parametric.regression; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=SCRIPTS).returncode == 0
