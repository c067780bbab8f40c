"""Projections of experts: against SVD in float64, planted structure, none, and the arrays of the paper's notebooks."""

import numpy as np
import polars as pl
import pytest
import torch
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_atlas import tables
from moe_atlas.architectures.bank import FFN, ExpertBank
from moe_atlas.checkpoints import Checkpoint
from moe_atlas.errors import AtlasError
from moe_atlas.layerwise import each_layer
from moe_atlas.parametric.isotropic import null_ratios
from moe_atlas.parametric.outliers import PAPER_COORDINATES, OutlierRule
from moe_atlas.parametric.projection import evenly, matrix_components, neuron_components, project_experts

ORACLE = ROOT / "tests/data/oracle"
SCORES = ["pc1", "pc2", "pc3"]


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def bank_of(experts: int = 8, m: int = 12, d: int = 10, seed: int = 0) -> ExpertBank:
    return ExpertBank(
        draw(experts, m, d, seed=seed), draw(experts, m, d, seed=seed + 1), draw(experts, d, m, seed=seed + 2)
    )


def decomposed(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """All coordinates and shares of the variance, by SVD of the standardised points in float64."""
    rows = rows.astype(np.float64)
    deviation = rows.std(0, ddof=1)
    values = np.where(deviation > 0, (rows - rows.mean(0)) / np.where(deviation > 0, deviation, 1), 0)
    left, singular, _ = np.linalg.svd(values, full_matrices=False)
    return left * singular, singular**2 / max((singular**2).sum(), 1e-300)


def assert_same_points(found: np.ndarray, expected: np.ndarray, tolerance: float) -> None:
    """Coordinates (n, c) to `tolerance` of the largest, whatever the sign of a component."""
    assert found.shape == expected.shape
    flipped = found * np.where((found * expected).sum(0) < 0, -1, 1)
    assert np.abs(flipped - expected).max() <= tolerance * np.abs(expected).max()


@settings(max_examples=20, deadline=None)
@given(st.integers(2, 9), st.integers(1, 7), st.integers(1, 90), st.integers(0, 10**6))
def test_matrices_are_where_the_svd_puts_them(points, rows, columns, seed):
    bank = draw(points, rows, columns, seed=seed) * torch.arange(1, points + 1)[:, None, None]
    bank[:, 0, 0] = 0.3
    expected, ratios = decomposed(bank.flatten(1).numpy())
    found = matrix_components(bank[:-1], [bank[-1]])
    count = min(3, points - 1, rows * columns)
    gram = found.coordinates.T @ found.coordinates
    assert found.coordinates.shape == (points, count)
    if rows * columns == 1:  # nothing varies
        assert not found.coordinates.any() and np.isnan(found.ratios).all()
        return
    assert found.ratios == pytest.approx(ratios[:count], abs=1e-6)
    assert gram == pytest.approx(gram * np.eye(count), abs=1e-5 * gram.max())
    gaps = np.abs(np.diff(ratios, append=0))[: count - 1] if count > 1 else np.ones(1)
    if gaps.size and gaps.min() > 0.01 and ratios[count - 1] - ratios[count : count + 1].sum() > 0.01:
        assert_same_points(found.coordinates, expected[:, :count], 1e-4)


def test_neurons_are_where_the_svd_puts_them():
    spread = torch.linspace(1, 4, 10) * draw(10, 10, seed=5)
    parts = [draw(m, 10, seed=m) @ spread + 3 for m in (40, 7, 25)]
    parts = [part.clone() for part in parts]
    for part in parts:
        part[:, 4] = -0.7
    rows = torch.cat(parts).numpy()
    expected, ratios = decomposed(rows)
    kept = np.array([0, 3, 39, 40, 46, 47, 71])
    for block in (1, 16, 1024):
        found = neuron_components(parts, kept, block=block)
        assert found.ratios == pytest.approx(ratios[:3], abs=1e-6)
        everything = neuron_components(parts, np.arange(72), block=block)
        assert_same_points(everything.coordinates, expected[:, :3], 1e-5)
        assert found.coordinates == pytest.approx(everything.coordinates[kept], abs=1e-12)


def test_the_block_of_rows_does_not_matter():
    bank, other = draw(6, 40, 30) + 2, draw(40, 30, seed=1)
    whole = matrix_components(bank, [other], block=1 << 30)
    for block in (1, 1000):
        part = matrix_components(bank, [other], block=block)
        assert part.coordinates == pytest.approx(whole.coordinates, abs=1e-5)
        assert part.ratios == pytest.approx(whole.ratios, abs=1e-7)


def test_experts_that_differ_in_the_last_digits_are_still_told_apart():
    """Copies of one network, trained a little: in float32 a mean of the copies would lose the differences."""
    base, change = draw(20, 30) * 4 + 40, draw(5, 20, 30, seed=3) * 1e-4
    bank = base + change
    assert_same_points(matrix_components(bank, []).coordinates, decomposed(bank.flatten(1).numpy())[0][:, :3], 1e-5)


def test_the_sign_of_a_component_is_fixed_and_the_bytes_are_the_same_twice(tmp_path):
    files = []
    for number in range(2):
        points, ratios = project_experts(bank_of(), model="m", layer=0, max_neurons=50)
        tables.write("projection", points, tmp_path / f"points{number}.parquet")
        tables.write("explained_variance", ratios, tmp_path / f"ratios{number}.parquet")
        files.append([(tmp_path / f"{kind}{number}.parquet").read_bytes() for kind in ("points", "ratios")])
    assert files[0] == files[1]
    for _, part in points.filter(pl.col("level") == "matrix").group_by("matrix"):
        scores = part.select(SCORES).to_numpy()
        assert (scores[np.abs(scores).argmax(0), range(3)] > 0).all()


def test_a_planted_outlier_is_found_and_nothing_else():
    """Noise that is nearly the same for all, and one expert that is another network."""
    size = (16, 32, 64)
    bank = draw(1, *size[1:]) + draw(*size, seed=1) * torch.linspace(0.99, 1.01, 16)[:, None, None] * 1e-5
    stranger = 11
    bank[stranger] = draw(*size[1:], seed=9)
    other = ExpertBank(bank, None, bank.transpose(1, 2).contiguous())
    points, ratios = project_experts(other, model="m", layer=0)
    outliers = points.filter(pl.col("outlier")).select("matrix", "expert").rows()
    assert outliers == [("up", str(stranger)), ("down", str(stranger))]
    first = ratios.filter(pl.col("level") == "matrix", pl.col("component") == 1)
    assert (first["ratio"] > 5 * first["null_ratio"]).all()
    everyone = project_experts(other, model="m", layer=0, rule=OutlierRule(1e9))[0]
    assert not everyone.filter(pl.col("level") == "matrix")["outlier"].any()


def test_planted_clusters_are_found():
    centres = draw(2, 30, 40)
    bank = centres.repeat_interleave(8, dim=0) + 1e-4 * draw(16, 30, 40, seed=1)
    labels = OutlierRule().labels(matrix_components(bank, []).coordinates, 30 * 40).tolist()
    assert labels == [labels[0]] * 8 + [labels[8]] * 8 and {labels[0], labels[8]} == {0, 1}


def test_independent_experts_are_outliers_as_often_as_the_null_says():
    shares, nulls = [], []
    for seed in range(10):
        points, _ = project_experts(bank_of(40, 20, 30, seed=3 * seed), model="m", layer=0, rule=OutlierRule(170))
        matrices = points.filter(pl.col("level") == "matrix")
        shares += matrices.group_by("matrix").agg(pl.col("outlier").mean())["outlier"].to_list()
        nulls += matrices["null_outlier"].unique().to_list()
    assert len(set(nulls)) == 1 and 0.1 < nulls[0] < 0.9
    assert abs(np.mean(shares) - nulls[0]) < 4 * np.std(shares, ddof=1) * (1 / 30 + 1 / 100) ** 0.5


def test_too_few_experts_for_clusters_have_no_outliers():
    points, _ = project_experts(bank_of(9), model="m", layer=0)
    assert points["outlier"].null_count() == points["null_outlier"].null_count() == len(points)


def test_the_radius_is_the_papers_at_deepseeks_size_and_grows_with_the_length_of_a_point():
    assert OutlierRule().radius(1408 * 2048) == 50
    lengths = [np.linalg.norm(decomposed(draw(8, size).numpy())[0], axis=1).mean() for size in (100, 900)]
    assert OutlierRule().radius(900) / OutlierRule().radius(100) == pytest.approx(lengths[1] / lengths[0], rel=0.02)


@pytest.mark.parametrize(("points", "dimension"), [(9, 6144), (16, 400), (5, 30), (864, 64), (300, 200), (40, 300)])
def test_the_null_is_the_mean_spectrum_of_independent_points(points, dimension):
    """Against SVDs of points drawn in float64."""
    random = np.random.default_rng(1)
    drawn = np.array([decomposed(random.standard_normal((points, dimension)))[1][:3] for _ in range(60)])
    means, spreads = null_ratios(points, dimension, 3)
    spread = drawn.std(0, ddof=1)
    assert (np.abs(means - drawn.mean(0)) < 5 * spread * (1 / 60 + 1 / 64) ** 0.5 + 0.01 * drawn.mean(0)).all()
    assert np.log(spreads / spread) == pytest.approx([0] * 3, abs=0.5)


def test_isotropic_experts_are_at_the_null_and_structured_ones_above():
    _, ratios = project_experts(bank_of(8, 64, 48), model="m", layer=0)
    assert len(ratios) == 18
    assert (ratios["ratio"] / ratios["null_ratio"]).to_list() == pytest.approx([1] * 18, abs=0.08)
    structured = bank_of(8, 64, 48)
    structured.up.add_(draw(8, 64, 1, seed=8) * draw(48, seed=9))
    _, ratios = project_experts(structured, model="m", layer=0)
    row = ratios.filter(pl.col("matrix") == "up", pl.col("level") == "neuron", pl.col("component") == 1)
    assert row["ratio"].item() > 3 * row["null_ratio"].item()


def test_the_tables_say_which_expert_and_neuron_a_point_is():
    bank = bank_of(4, 12, 10)
    wide = FFN(draw(20, 10, seed=7), draw(20, 10, seed=8), draw(10, 20, seed=9))
    points, _ = project_experts(bank, model="m", layer=3, reference=wide, max_neurons=0)
    assert points.columns == list(tables.TABLES["projection"].schema)
    assert set(points["layer"]) == {3} and points["pc1"].null_count() == 0
    matrices, neurons = (
        points.filter(pl.col("level") == level, pl.col("matrix") == "down") for level in ("matrix", "neuron")
    )
    assert matrices["expert"].to_list() == ["0", "1", "2", "3"] and matrices["neuron"].null_count() == 4
    assert neurons["expert"].to_list() == [str(e) for e in range(4) for _ in range(12)] + ["F"] * 20
    assert neurons["neuron"].to_list() == [*range(12)] * 4 + [*range(20)] and neurons["outlier"].null_count() == 68
    rows = torch.cat([*(weight.T for weight in bank.down), wide.down.T]).numpy()
    assert_same_points(neurons.select(SCORES).to_numpy(), decomposed(rows)[0][:, :3], 1e-5)
    some, _ = project_experts(bank, model="m", layer=3, reference=wide, max_neurons=17)
    some = some.filter(pl.col("level") == "neuron", pl.col("matrix") == "down")
    assert len(some) == 17 and some.equals(neurons[evenly(68, 17)])
    assert some["expert"][0] == "0" and some["expert"][-1] == "F"
    same = FFN(bank.up[1] + 1e-3, None, bank.down[1])
    labels = project_experts(bank, model="m", layer=3, reference=same)[0].filter(pl.col("level") == "matrix")
    assert labels.filter(pl.col("expert") == "F")["matrix"].to_list() == ["up", "down"]


def test_few_experts_have_few_components_and_equal_ones_no_variance():
    points, ratios = project_experts(bank_of(2), model="m", layer=0)
    matrices = points.filter(pl.col("level") == "matrix")
    assert matrices["pc1"].null_count() == 0 and matrices["pc2"].null_count() == len(matrices) == 6
    assert ratios.filter(pl.col("level") == "matrix")["component"].to_list() == [1, 1, 1]
    alone, _ = project_experts(bank_of(1), model="m", layer=0)
    assert alone.filter(pl.col("level") == "matrix")["pc1"].null_count() == 3
    copy = draw(1, 12, 10).repeat(5, 1, 1)
    points, ratios = project_experts(ExpertBank(copy, None, copy.mT.contiguous()), model="m", layer=0)
    matrices = points.filter(pl.col("level") == "matrix")
    assert not matrices.select(SCORES).to_numpy().any()
    assert ratios.filter(pl.col("level") == "matrix")["ratio"].null_count() == 6
    assert ratios.filter(pl.col("level") == "neuron")["ratio"].null_count() == 0


def test_a_reference_of_another_hidden_width_is_an_error():
    wide = FFN(draw(12, 14), draw(12, 14), draw(14, 12))
    with pytest.raises(AtlasError, match="hidden width is 10 and that of its dense reference is 14"):
        project_experts(bank_of(), model="m", layer=0, reference=wide)


def test_weights_that_are_not_finite_are_named():
    bank = bank_of()
    bank.act[2, 1, 1] = torch.inf
    with pytest.raises(AtlasError, match="m, layer 4: act holds values that are not finite"):
        project_experts(bank, model="m", layer=4)


@pytest.mark.parametrize("name", ["mixtral", "deepseek", "grok"])
def test_the_arrays_of_the_papers_notebooks(name):
    """Experiments `pca_matrix`, `pca_neuron_2d` and `pca_neuron_3d`: every point, and DBSCAN's labels of DeepSeek."""
    files = {
        kind: np.load(ORACLE / "expected" / name / f"{kind}.npz")
        for kind in ("pca_matrix", "pca_neuron_2d", "pca_neuron_3d")
    }
    dense = Checkpoint(ORACLE / "checkpoints/mistral") if name == "mixtral" else None
    layers, compared = files["pca_matrix"]["layers"].tolist(), 0
    for number, (index, bank, reference) in enumerate(
        each_layer(Checkpoint(ORACLE / "checkpoints" / name), dense, layers)
    ):
        size = bank.up[0].numel()
        rule = OutlierRule(50 * (PAPER_COORDINATES / size) ** 0.5)  # a radius of 50, as in the notebooks, at this size
        points, _ = project_experts(bank, model=name, layer=index, reference=reference, max_neurons=0, rule=rule)
        for place, matrix in enumerate(("up", "act", "down")):
            part = points.filter(pl.col("matrix") == matrix)
            for kind, expected in files.items():
                rows = part.filter(pl.col("level") == kind.split("_")[1])
                wanted = expected["proj"][number, place]
                found = rows.select(SCORES[: wanted.shape[1]]).to_numpy()
                assert_same_points(found, wanted, 2e-4 if kind == "pca_matrix" else 1e-3)
                compared += 1
                if "dbscan_labels" in expected:
                    labels = rule.labels(found, size).tolist()
                    assert rows["outlier"].to_list() == [label < 0 for label in labels]
                    pairs = set(zip(labels, expected["dbscan_labels"][number, place].tolist(), strict=True))
                    assert len(pairs) == len({a for a, _ in pairs}) == len({b for _, b in pairs})
                    assert all((ours == -1) == (theirs == -1) for ours, theirs in pairs)
    assert compared == {"mixtral": 36, "deepseek": 27, "grok": 36}[name]
