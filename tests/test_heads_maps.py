"""Circuits of attention experts and their maps against plain loops in float64 and truths that were planted."""

import math

import numpy as np
import pytest
import torch

from moe_atlas.architectures.attention_experts import Circuits
from moe_atlas.behavioral.resampling import block_weights
from moe_atlas.heads import circuits, maps


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


# Circuits -----------------------------------------------------------------------------------------


def test_circuits_have_the_cosines_of_the_dense_matrices():
    generator = torch.Generator().manual_seed(0)
    E, H, D, d = 5, 3, 4, 11
    own = Circuits(
        torch.randn(E, H, D, d, generator=generator),
        torch.randn(H, D, d, generator=generator),
        torch.randn(H, D, d, generator=generator),
        torch.randn(E, H, d, D, generator=generator),
    )
    rows = {(row["circuit"], row["a"], row["b"]): row["cosine"] for row in circuits.circuit_rows(own, 0)}
    assert len(rows) == 2 * 15
    for name in ("QK", "OV"):
        dense = []
        for e in range(E):
            if name == "QK":
                dense.append(torch.stack([own.query[e, h].double().T @ own.key[h].double() for h in range(H)]))
            else:
                dense.append(torch.stack([own.output[e, h].double() @ own.value[h].double() for h in range(H)]))
        for a in range(E):
            for b in range(a, E):
                mine = torch.cosine_similarity(dense[a].flatten(), dense[b].flatten(), dim=0)
                assert rows[name, str(a), str(b)] == pytest.approx(float(mine), abs=1e-6)


def test_equal_experts_are_1_and_orthogonal_ones_0():
    own = Circuits(torch.zeros(3, 1, 2, 6), torch.randn(1, 2, 6), torch.randn(1, 2, 6), torch.randn(3, 1, 6, 2))
    own.query[:2, 0, 0, 0] = 1
    own.query[2, 0, 0, 1] = 3
    own.output[1] = -2 * own.output[0]
    rows = {(row["circuit"], row["a"], row["b"]): row["cosine"] for row in circuits.circuit_rows(own, 0)}
    assert rows["QK", "0", "1"] == pytest.approx(1) and rows["QK", "0", "2"] == pytest.approx(0, abs=1e-9)
    assert rows["OV", "0", "1"] == pytest.approx(-1)


def test_shared_keys_of_few_directions_widen_the_null_and_random_experts_lie_in_it():
    generator = torch.Generator().manual_seed(1)
    key = torch.randn(1, 16, 64, generator=generator)
    narrow = key.clone()
    narrow[:, 1:] *= 0.01
    wide_null, narrow_null = circuits.null_cosines(key, 0), circuits.null_cosines(narrow, 0)
    assert narrow_null.std() > 2 * wide_null.std() and abs(wide_null.mean()) < 0.02
    drawn = torch.randn(12, 1, 16, 64, generator=generator)
    own = circuits.cosines(circuits.inner_products(drawn, narrow))[np.triu_indices(12, 1)]
    assert own.std() == pytest.approx(narrow_null.std(), rel=0.2)


def test_products_in_chunks_are_the_same(monkeypatch):
    drawn, key = torch.randn(6, 2, 4, 9), torch.randn(2, 4, 9)
    whole = circuits.inner_products(drawn, key)
    monkeypatch.setattr(circuits, "_NUMBERS", 6 * 16 * 2)
    torch.testing.assert_close(circuits.inner_products(drawn, key), whole, rtol=1e-12, atol=0)


# Maps ---------------------------------------------------------------------------------------------


def summed(attention: torch.Tensor, visible: torch.Tensor, blocks: np.ndarray, count: int) -> maps.MapSums:
    found = maps.MapSums(attention.shape[1], count)
    found.add(attention, visible, torch.arange(len(attention)), blocks)
    return found


def test_even_maps_do_not_diverge_and_reach_back_half_the_way():
    T = 9
    visible = torch.ones(T, T, dtype=torch.bool).tril()
    even = (visible / visible.sum(1, keepdim=True))[:, None, None].expand(T, 3, 2, T)
    found = summed(even, visible, np.arange(T) // 2, 5)
    assert found.divergence.max() == pytest.approx(0, abs=1e-6)
    assert found.distance.sum(0) / T == pytest.approx([sum(t / 2 for t in range(T)) / T] * 3)
    rows = maps.map_rows(found, block_weights(5, rng()), rng())
    for row in rows:
        if row["measure"] == "distance":
            assert row["value"] == pytest.approx(2) and row["uniform"] == pytest.approx(2)
    assert sum(row["measure"] == "divergence" for row in rows) == 3


def test_maps_without_a_common_token_diverge_by_one_bit():
    T = 4
    attention = torch.zeros(T, 2, 1, T)
    attention[:, 0, 0, 0] = 1
    attention[:, 1, 0, 3] = 1
    found = summed(attention, torch.ones(T, T, dtype=torch.bool), np.zeros(T, dtype=int), 1)
    assert found.divergence[0, 0, 1] / T == pytest.approx(1)
    assert found.distance[0] / T == pytest.approx([np.mean([0, 1, 2, 3]), np.mean([3, 2, 1, 0])])
    (row,) = [row for row in maps.map_rows(found, np.ones((1, 1)), rng()) if row["measure"] == "divergence"]
    assert row["value"] == pytest.approx(1) and math.isnan(row["low"])


def test_divergence_and_distance_are_those_of_a_plain_loop():
    T, E, H = 6, 3, 2
    visible = torch.ones(T, T, dtype=torch.bool).tril()
    scores = torch.randn(T, E, H, T, generator=torch.Generator().manual_seed(0))
    attention = scores.masked_fill(~visible[:, None, None], -torch.inf).softmax(-1)
    found = summed(attention, visible, np.array([0, 0, 1, 1, 1, 2]), 3)
    a = attention.double().numpy()

    def bits(p: np.ndarray) -> float:
        return float(-sum(x * math.log2(x) for x in p if x > 0))

    for block, rows in enumerate(([0, 1], [2, 3, 4], [5])):
        for i in range(E):
            far = sum(a[t, i, h] @ abs(t - np.arange(T)) for t in rows for h in range(H)) / H
            assert found.distance[block, i] == pytest.approx(far, abs=1e-6)
            for j in range(E):
                p, q = a[:, i], a[:, j]
                js = sum(
                    bits((p[t, h] + q[t, h]) / 2) - (bits(p[t, h]) + bits(q[t, h])) / 2 for t in rows for h in range(H)
                )
                assert found.divergence[block, i, j] == pytest.approx(js / H if i != j else 0, abs=1e-5)


def test_the_null_of_maps_exchanges_experts_and_is_passed_by_one_that_looks_further():
    found = maps.MapSums(4, 8)
    found.tokens[:] = 10
    found.distance[:] = 10 * (5 + rng().random((8, 4)) * 0.1)
    found.distance[:, 2] = 100
    found.divergence[:] = 1 + rng(1).random((8, 4, 4))
    rows = [row for row in maps.map_rows(found, block_weights(8, rng()), rng()) if row["measure"] == "distance"]
    mean = found.distance.sum() / 80 / 4
    for row in rows:
        assert row["chance"] == pytest.approx(mean, rel=0.05)
        far = row["a"] == "2"
        assert (row["value"] > row["chance_high"]) == far and (row["value"] == pytest.approx(10)) == far
    assert not any(row["measure"] == "distance" for row in maps.map_rows(found, np.ones((1, 8)), rng(), False))
