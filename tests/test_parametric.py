"""Weight similarity and router regression against plain loops in float64, planted truths and nulls."""

import itertools
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_atlas import tables
from moe_atlas.architectures.bank import FFN, ExpertBank
from moe_atlas.errors import AtlasError
from moe_atlas.parametric import regression
from moe_atlas.parametric.null import null_cosine_sd
from moe_atlas.parametric.regression import router_regression
from moe_atlas.parametric.similarity import gram_and_means, weight_similarity

SCRIPTS = Path(__file__).resolve().parent.parent / "scripts"


def ffn(width, hidden, seed, offset=0.0, dtype=torch.float32, gated=True):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return (torch.randn(*shape, generator=generator) + offset).to(dtype)

    up, act, down = normal(width, hidden), normal(width, hidden), normal(hidden, width)
    return FFN(up, act if gated else None, down)


def bank(experts=4, width=24, hidden=20, seed=0, dtype=torch.float32, gated=True, shared=None):
    parts = [ffn(width, hidden, seed * 1000 + expert, 0.3, dtype, gated) for expert in range(experts)]
    router = torch.randn(experts, hidden, generator=torch.Generator().manual_seed(seed + 77)).to(dtype)
    act = torch.stack([part.act for part in parts]) if gated else None
    up, down = torch.stack([part.up for part in parts]), torch.stack([part.down for part in parts])
    return ExpertBank(up, act, down, router, shared)


def loop_cosine(a, b):
    """Cosine of two sequences of Python floats, by a loop."""
    a, b = [float(value) for value in a], [float(value) for value in b]
    product = math.fsum(x * y for x, y in zip(a, b, strict=True))
    lengths = [max(math.sqrt(math.fsum(x * x for x in vector)), 1e-8) for vector in (a, b)]
    return product / lengths[0] / lengths[1]


def loop_mean_neuron(matrix, name):
    neurons = matrix.T if name == "down" else matrix
    return [math.fsum(float(value) for value in column) / len(neurons) for column in neurons.T]


def expected(bank, reference=None):
    """The table's rows by plain loops: {(matrix, level, a, b): cosine}."""
    entries = {str(e): {n: w[e] for n, w in bank.matrices.items()} for e in range(len(bank))}
    for label, other in (("F", reference), ("SE", bank.shared)):
        if other is not None:
            entries[label] = {"up": other.up, "act": other.act, "down": other.down}
    rows = {}
    for name, weights in bank.matrices.items():
        labels = [label for label, own in entries.items() if own[name] is not None]
        for i, a in enumerate(labels):
            for b in labels[i:]:
                x, y = entries[a][name], entries[b][name]
                means = loop_mean_neuron(x, name), loop_mean_neuron(y, name)
                rows[name, "neuron_mean", a, b] = loop_cosine(*means)
                if x.shape == y.shape == weights.shape[1:]:
                    rows[name, "matrix", a, b] = loop_cosine(x.flatten(), y.flatten())
    for a in range(len(bank)):
        for b in range(a, len(bank)):
            rows["router", "matrix", str(a), str(b)] = loop_cosine(bank.router[a], bank.router[b])
    return rows


def as_dict(frame):
    return {row[:4]: row[4] for row in frame.select("matrix", "level", "a", "b", "cosine").iter_rows()}


def assert_matches_loops(bank, reference=None, tolerance=1e-6):
    frame = weight_similarity(bank, model="m", layer=3, reference=reference)
    assert dict(frame.schema) == tables.TABLES["similarity"].schema
    assert set(frame["model"]) == {"m"} and set(frame["layer"]) == {3}
    ours, theirs = as_dict(frame), expected(bank, reference)
    assert len(frame) == len(ours) and ours.keys() == theirs.keys()
    for key, value in theirs.items():
        assert ours[key] == pytest.approx(value, abs=tolerance), key


def test_experts_alone_match_loops():
    assert_matches_loops(bank())


def test_reference_and_shared_expert_of_an_experts_shape_take_part_in_both_levels():
    ours = bank(shared=ffn(24, 20, 5, 0.2))
    assert_matches_loops(ours, ffn(24, 20, 6, -0.1))
    frame = weight_similarity(ours, model="m", layer=3, reference=ffn(24, 20, 6))
    labels = frame.filter(matrix="up", level="matrix")["b"].unique(maintain_order=True).to_list()
    assert labels == ["0", "1", "2", "3", "F", "SE"]


def test_reference_and_shared_expert_of_other_widths_have_only_a_mean_neuron():
    ours, reference = bank(shared=ffn(48, 20, 5, 0.2)), ffn(10, 20, 6, -0.1)
    assert_matches_loops(ours, reference)
    frame = weight_similarity(ours, model="m", layer=3, reference=reference)
    assert not set(frame.filter(level="matrix")["b"]) & {"F", "SE"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_are_read_at_their_own_values(dtype):
    assert_matches_loops(bank(dtype=dtype), ffn(24, 20, 6, dtype=dtype))


def test_experts_without_a_gate_branch_have_no_act_rows():
    ours = bank(gated=False)
    assert_matches_loops(ours, ffn(24, 20, 6, gated=True))
    assert set(weight_similarity(ours, model="m", layer=0)["matrix"]) == {"up", "down", "router"}


def test_a_reference_without_a_gate_branch_is_left_out_of_act_alone():
    assert_matches_loops(bank(), ffn(24, 20, 6, gated=False))


def test_one_expert_has_its_diagonal():
    frame = weight_similarity(bank(experts=1), model="m", layer=0)
    assert len(frame) == 7
    assert frame["cosine"].to_list() == pytest.approx([1.0] * 7, abs=1e-12)


def test_a_layer_without_a_router_has_no_router_rows():
    ours = bank()
    frame = weight_similarity(ExpertBank(ours.up, ours.act, ours.down), model="m", layer=0)
    assert set(frame["matrix"]) == {"up", "act", "down"}


def test_long_vectors_keep_float64_precision():
    # 600,000 terms: one float32 sum would be wrong by about 1e-4 here.
    weights = torch.randn(2, 300, 2000, generator=torch.Generator().manual_seed(0)) + 0.5
    gram, means = gram_and_means(weights, [], mean_axis=0)
    flat = weights.flatten(1).double().numpy()
    scale = np.linalg.norm(flat, axis=1)
    assert np.abs((gram.numpy() - flat @ flat.T) / np.outer(scale, scale)).max() < 2e-7
    assert np.abs(means.numpy() - weights.double().mean(1).numpy()).max() < 1e-7


@pytest.mark.parametrize("shape", [(3, 40, 24), (2, 70, 77), (5, 9, 256), (2, 3, 5)])
@pytest.mark.parametrize("mean_axis", [0, 1])
def test_the_size_of_the_blocks_does_not_change_the_result(shape, mean_axis):
    weights = torch.randn(shape, generator=torch.Generator().manual_seed(1)) + 0.1
    other = torch.randn(shape[1:], generator=torch.Generator().manual_seed(2))
    whole = gram_and_means(weights, [other], mean_axis=mean_axis, block=1 << 30)
    for block in (1, 3000, 20_000):
        parts = gram_and_means(weights, [other], mean_axis=mean_axis, block=block)
        for one, many in zip(whole, parts, strict=True):
            assert (one - many).abs().max() <= 1e-12 * one.abs().max()


def test_identical_experts_have_cosine_one_and_disjoint_ones_zero():
    same = bank(experts=1)
    up, act, down = (weights.expand(3, -1, -1) for weights in (same.up, same.act, same.down))
    frame = weight_similarity(ExpertBank(up, act, down, same.router.expand(3, -1)), model="m", layer=0)
    assert frame["cosine"].to_list() == pytest.approx([1.0] * len(frame), abs=1e-12)

    apart = torch.zeros(4, 8, 12)
    for expert in range(4):
        apart[expert, :, 3 * expert : 3 * expert + 3] = torch.rand(8, 3) + 0.1
    disjoint = ExpertBank(apart, None, apart.transpose(1, 2).contiguous(), torch.eye(4, 12))
    frame = weight_similarity(disjoint, model="m", layer=0).filter(pl.col("a") != pl.col("b"))
    assert frame["cosine"].to_list() == [0.0] * len(frame)


def test_a_zero_expert_has_cosine_zero_with_all():
    ours = bank()
    ours.up[2] = 0
    frame = weight_similarity(ours, model="m", layer=0).filter(
        pl.col("matrix") == "up", (pl.col("a") == "2") | (pl.col("b") == "2")
    )
    assert frame["cosine"].to_list() == [0.0] * len(frame)


def test_the_order_of_the_neurons_matters_to_the_matrix_level_alone():
    ours, order = bank(), torch.randperm(24, generator=torch.Generator().manual_seed(3))
    up, act, down = ours.up.clone(), ours.act.clone(), ours.down.clone()
    up[1], act[1], down[1] = up[1][order], act[1][order], down[1][:, order]
    before = weight_similarity(ours, model="m", layer=0)
    after = weight_similarity(ExpertBank(up, act, down, ours.router), model="m", layer=0)
    for level, largest in (("neuron_mean", 1e-7), ("matrix", None)):
        change = (before.filter(level=level)["cosine"] - after.filter(level=level)["cosine"]).abs().max()
        assert change < largest if largest else change > 0.01


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 5), st.integers(1, 20), st.integers(1, 20), st.integers(0, 1000), st.randoms())
def test_similarity_is_bounded_and_follows_a_renaming_of_the_experts(experts, width, hidden, seed, random):
    ours = bank(experts, width, hidden, seed)
    order = list(range(experts))
    random.shuffle(order)
    renamed = ExpertBank(ours.up[order], ours.act[order], ours.down[order], ours.router[order])
    values = as_dict(weight_similarity(ours, model="m", layer=0))
    assert all(-1 <= value <= 1 for value in values.values())
    for (matrix, level, a, b), value in as_dict(weight_similarity(renamed, model="m", layer=0)).items():
        first, second = sorted((order[int(a)], order[int(b)]))
        assert values[matrix, level, str(first), str(second)] == pytest.approx(value, abs=1e-6)


def test_a_reference_of_another_hidden_width_is_refused_in_a_sentence():
    with pytest.raises(AtlasError, match="hidden width is 20 and that of its dense reference is 32.*dense_reference"):
        weight_similarity(bank(), model="m", layer=0, reference=ffn(24, 32, 0))


def test_a_weight_that_is_not_finite_is_named():
    ours = bank()
    ours.act[2, 0, 0] = float("nan")
    with pytest.raises(AtlasError, match="m, layer 7: act of expert"):
        weight_similarity(ours, model="m", layer=7)


def test_the_null_spread_is_that_of_random_vectors():
    generator = np.random.default_rng(0)
    a, b = generator.normal(size=(2, 20_000, 3 * 8))
    cosines = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    assert null_cosine_sd((3, 8)) == pytest.approx(cosines.std(), rel=0.02)
    with pytest.raises(ValueError, match="has none"):
        null_cosine_sd((0, 8))


# ---- regression


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
