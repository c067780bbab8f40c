"""What chosen experts hold of an activation, and correlation within experts, against plain loops in float64."""

import tracemalloc

import numpy as np
import pytest
import torch

from moe_atlas.emoe.correlation import CorrelationOfSplits, Moments
from moe_atlas.emoe.mechanism import (
    GATES,
    Split,
    SplitSums,
    agreement,
    captured,
    choose,
    chosen,
    expert_mass,
    selected,
    splits,
)
from moe_atlas.emoe.split import gate_vectors

T, F, H, N = 60, 24, 10, 6


def drawn(seed: int = 0) -> dict:
    """Inputs, keys and activations of a small FFN, a split that is no run of neighbours, and blocks of documents."""
    generator = torch.Generator().manual_seed(seed)
    inputs, keys = torch.randn(T, H, generator=generator), torch.randn(F, H, generator=generator)
    activations = torch.nn.functional.silu(inputs @ keys.T) * torch.randn(T, F, generator=generator)
    labels = np.random.default_rng(seed).permutation(np.arange(F) % N)
    norms = torch.rand(F, generator=generator) + 0.1
    blocks = torch.arange(T) % 4
    return {
        "inputs": inputs,
        "keys": keys,
        "activations": activations,
        "labels": labels,
        "norms": norms,
        "blocks": blocks,
    }


def by_hand(one: dict, k: int) -> dict:
    """rho of each gate but the random one, the two agreements and choices of avg-k, token by token in float64."""
    labels = one["labels"]
    found = {gate: np.zeros(4) for gate in GATES} | {"activation": np.zeros(4), "output": np.zeros(4)}
    counts = np.zeros((4, N))
    for t in range(T):
        block = int(one["blocks"][t])
        a = one["activations"][t].double().numpy()
        x = one["inputs"][t].double().numpy()
        kappa = one["keys"].double().numpy()
        mass = [sum(abs(a[j]) for j in range(F) if labels[j] == e) for e in range(N)]
        output = [sum(abs(a[j]) * float(one["norms"][j]) for j in range(F) if labels[j] == e) for e in range(N)]
        score = [np.mean([kappa[j] @ x for j in range(F) if labels[j] == e]) for e in range(N)]
        by_score = sorted(range(N), key=lambda e: -score[e])
        best = set(sorted(range(N), key=lambda e: -mass[e])[:k])
        best_output = set(sorted(range(N), key=lambda e: -output[e])[:k])
        top = set(by_score[:k])
        sets = {"avg-k": top, "oracle": best, "not-top-k": set(by_score[k:]), "bottom-k": set(by_score[-k:])}
        for gate, experts in sets.items():
            found[gate][block] += sum(mass[e] for e in experts) / sum(mass)
        found["activation"][block] += len(top & best) / k
        found["output"][block] += len(top & best_output) / k
        for e in top:
            counts[block, e] += 1
    return found | {"counts": counts}


@pytest.mark.parametrize("k", [1, 2, 5])
def test_sums_by_block_are_those_of_a_plain_loop(k):
    one = drawn()
    sums = SplitSums(Split("random", N, 0, one["labels"]), [k], 4)
    for rows in (slice(0, 23), slice(23, T)):  # in chunks, as batches come
        parts = (one[name][rows] for name in ("inputs", "activations", "blocks"))
        sums.add(*parts, gate_vectors(one["keys"], one["labels"], N), one["norms"])
    expected = by_hand(one, k)
    assert sums.tokens.tolist() == [15.0] * 4
    for gate in ("avg-k", "oracle", "not-top-k", "bottom-k"):
        np.testing.assert_allclose(sums.mass[k, gate].numpy(), expected[gate], rtol=1e-6)
    np.testing.assert_allclose(sums.agreement[k, "activation"].numpy(), expected["activation"], rtol=1e-12)
    np.testing.assert_allclose(sums.agreement[k, "output"].numpy(), expected["output"], rtol=1e-12)
    np.testing.assert_array_equal(sums.counts[k].numpy(), expected["counts"])


def test_all_experts_hold_everything():
    one = drawn()
    mass, scores = expert_mass(one["activations"], one["labels"], N), torch.randn(T, N)
    for gate in ("avg-k", "oracle", "random", "bottom-k"):
        choice = choose(gate, scores, mass, N, torch.Generator().manual_seed(1))
        assert choice.all()
        torch.testing.assert_close(captured(mass, choice), torch.ones(T, dtype=torch.float64), rtol=1e-15, atol=0)
    assert not choose("not-top-k", scores, mass, N).any()
    assert (agreement(chosen(scores, N), chosen(mass, N)) == 1).all()


def test_gates_take_as_many_experts_as_they_say_and_the_oracle_takes_the_most_mass():
    one = drawn()
    mass, scores = expert_mass(one["activations"], one["labels"], N), torch.randn(T, N)
    held = {}
    for gate in GATES:
        choice = choose(gate, scores, mass, 2, torch.Generator().manual_seed(1))
        assert (choice.sum(1) == selected(gate, N, 2)).all()
        held[gate] = captured(mass, choice)
    for gate in ("avg-k", "random", "bottom-k"):
        assert (held["oracle"] >= held[gate]).all()
    torch.testing.assert_close(held["avg-k"] + held["not-top-k"], torch.ones(T, dtype=torch.float64))


def test_chance_levels_of_mass_and_agreement_are_what_blind_choices_give():
    generator = torch.Generator().manual_seed(3)
    mass, scores = torch.rand(20_000, 8, generator=generator).double(), torch.randn(20_000, 8, generator=generator)
    for gate in GATES:
        if gate != "oracle":  # scores and mass are independent here
            rho = captured(mass, choose(gate, scores, mass, 3, generator))
            assert float(rho.mean()) == pytest.approx(selected(gate, 8, 3) / 8, abs=0.005)
    assert float(agreement(chosen(scores, 3), chosen(mass, 3)).mean()) == pytest.approx(3 / 8, abs=0.005)


def test_a_token_without_any_activation_counts_nowhere():
    one = drawn()
    one["activations"][7] = 0
    sums = SplitSums(Split("random", N, 0, one["labels"]), [2], 4)
    gate = gate_vectors(one["keys"], one["labels"], N)
    sums.add(one["inputs"], one["activations"], one["blocks"], gate, one["norms"])
    assert sums.tokens.sum() == T - 1 and sums.counts[2].sum() == 2 * (T - 1)
    assert all(torch.isfinite(values).all() for values in sums.mass.values())


def test_splits_are_of_equal_size_and_the_clusters_are_not_the_random_ones():
    found = splits(drawn()["keys"], N, 3)
    assert [(one.rule, one.seed) for one in found] == [
        *(("cluster", seed) for seed in range(3)), *(("random", seed) for seed in range(3)), ("contiguous", 0)
    ]  # fmt: skip
    assert all(np.bincount(one.labels).tolist() == [F // N] * N for one in found)
    assert not np.array_equal(found[0].labels, found[3].labels)


def modular(experts: int, neurons: int, tokens: int, strength: float, seed: int = 0) -> tuple[torch.Tensor, np.ndarray]:
    """Activations whose neurons share a signal with the others of their expert, and the experts, shuffled."""
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.arange(neurons) % experts)
    signal = rng.standard_normal((tokens, experts))[:, labels]
    noise = rng.standard_normal((tokens, neurons))
    return torch.from_numpy(5 + strength * signal + noise), labels


def test_correlation_is_numpys_in_chunks_of_any_size():
    activations, _ = modular(4, 16, 300, 1.0)
    moments = Moments(16)
    for rows in activations.split(7):
        moments.add(rows)
    np.testing.assert_allclose(moments.correlation(), np.abs(np.corrcoef(activations.numpy().T)), atol=1e-12)


def test_large_means_cost_no_digits():
    activations, _ = modular(4, 16, 300, 1.0)
    moments = Moments(16)
    moments.add(activations + 1e6)
    np.testing.assert_allclose(moments.correlation(), np.abs(np.corrcoef(activations.numpy().T)), atol=1e-8)


def test_modularity_is_the_mean_over_pairs():
    activations, labels = modular(3, 12, 50, 0.5)
    r = np.abs(np.corrcoef(activations.numpy().T))
    within = [r[i, j] for i in range(12) for j in range(i) if labels[i] == labels[j]]
    between = [r[i, j] for i in range(12) for j in range(i) if labels[i] != labels[j]]
    found = CorrelationOfSplits(r).of(labels)
    assert found.within == pytest.approx(np.mean(within), rel=1e-12)
    assert found.between == pytest.approx(np.mean(between), rel=1e-12)
    assert found.ratio == pytest.approx(np.mean(within) / np.mean(between), rel=1e-12)


def test_planted_modules_stand_far_above_random_splits_and_noise_does_not():
    for strength, is_modular in ((1.0, True), (0.0, False)):
        activations, labels = modular(8, 64, 2000, strength)
        moments = Moments(64)
        moments.add(activations)
        found = CorrelationOfSplits(moments.correlation())
        ratio = found.of(labels).ratio
        null = np.array([one.ratio for one in found.null(8, np.random.default_rng(0))])
        assert len(null) == 100 and abs(null.mean() - 1) < 0.05
        assert (ratio > 10 * null.max()) if is_modular else (null.min() <= ratio <= null.max())


def test_neurons_that_never_change_are_left_out():
    activations, labels = modular(4, 16, 300, 1.0)
    still = activations.clone()
    still[:, 5] = 3.0
    moments = Moments(16)
    moments.add(still)
    r = moments.correlation()
    assert np.isnan(r[5]).all() and np.isnan(r[:, 5]).all() and np.isfinite(np.delete(np.delete(r, 5, 0), 5, 1)).all()
    rest = np.delete(np.arange(16), 5)
    expected = CorrelationOfSplits(np.abs(np.corrcoef(activations.numpy()[:, rest].T))).of(labels[rest])
    assert CorrelationOfSplits(r).of(labels).ratio == pytest.approx(expected.ratio, rel=1e-9)


@pytest.mark.parametrize("cells", [4, 5, 12, 99])
def test_the_map_has_the_means_of_its_cells(cells):
    activations, labels = modular(3, 12, 50, 1.0)
    r = np.abs(np.corrcoef(activations.numpy().T))
    order = np.argsort(labels, kind="stable")
    found, count = CorrelationOfSplits(r).map(order, cells), min(cells, 12)
    edges = [i * 12 // count for i in range(count + 1)]
    for i in range(count):
        for j in range(count):
            rows, columns = order[edges[i] : edges[i + 1]], order[edges[j] : edges[j + 1]]
            pairs = [r[a, b] for a in rows for b in columns if a != b]
            assert found[i, j] == pytest.approx(np.mean(pairs), rel=1e-9) if pairs else np.isnan(found[i, j])


def test_the_map_holds_no_second_matrix():
    """At 14,336 neurons a matrix of |r| is 1.6 GB."""
    found, order = CorrelationOfSplits(np.full((1024, 1024), 0.5)), np.random.default_rng(0).permutation(1024)
    tracemalloc.start()
    found.map(order)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < found.correlation.nbytes / 8
