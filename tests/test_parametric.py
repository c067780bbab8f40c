"""Weight similarity against plain loops in float64, planted truths and its null."""

import math
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loops import loop_cosine

from moe_atlas import tables
from moe_atlas.architectures.bank import FFN, ExpertBank
from moe_atlas.errors import AtlasError
from moe_atlas.parametric.null import null_cosine_sd
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
