"""Neurons are dealt to experts of equal size, and the gate is the mean of an expert's keys."""

import itertools
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment
from sklearn.cluster import KMeans

from moe_atlas.emoe import split
from moe_atlas.emoe.assignment import equal_assignment
from moe_atlas.errors import AtlasError

SCRIPTS = Path(__file__).resolve().parent.parent / "scripts"


def planted(neurons=96, width=24, groups=8, noise=0.2, seed=0):
    """Keys (F, H) of lengths from 0.1 to 10 about the directions of groups of equal size, and their groups (F,)."""
    generator = torch.Generator().manual_seed(seed)
    groups = torch.randperm(neurons, generator=generator) % groups
    keys = torch.randn(groups.max() + 1, width, generator=generator)[groups]
    keys = keys + noise * torch.randn(neurons, width, generator=generator)
    lengths = 10 ** (2 * torch.rand(neurons, 1, generator=generator) - 1)
    return keys * lengths, groups.numpy()


@given(st.integers(1, 6), st.integers(1, 5), st.integers(0, 2**32 - 1), st.sampled_from([3, 40, 2**40]))
@settings(max_examples=60, deadline=None)
def test_no_assignment_of_equal_sizes_costs_less(clusters, size, seed, largest):
    random = np.random.default_rng(seed)
    costs = random.integers(-largest, largest, (clusters * size, clusters))
    rows, columns = linear_sum_assignment(np.repeat(costs, size, axis=1))
    for prices in (np.zeros(clusters, np.int64), random.integers(-largest, largest, clusters)):
        labels, proof = equal_assignment(costs, prices)
        assert np.bincount(labels, minlength=clusters).tolist() == [size] * clusters
        assert costs[np.arange(len(labels)), labels].sum() == costs[rows, columns // size].sum()
        # The prices prove it: every point is in its cheapest cluster once they are taken off.
        assert np.array_equal((costs - proof)[np.arange(len(labels)), labels], (costs - proof).min(axis=1))


def test_costs_that_could_overflow_are_refused():
    with pytest.raises(ValueError, match="2\\^48"):
        equal_assignment(np.full((2, 2), 2**50), np.zeros(2, np.int64))
    with pytest.raises(ValueError, match="3 points do not make 2 clusters"):
        equal_assignment(np.zeros((3, 2), np.int64), np.zeros(2, np.int64))


@pytest.mark.parametrize("rule", split.RULES)
@pytest.mark.parametrize("experts", [1, 2, 12, 96])
def test_every_expert_has_as_many_neurons(rule, experts):
    keys, _ = planted()
    labels = split.split_neurons(keys, experts, rule=rule)
    assert labels.dtype == np.int64 and labels.shape == (96,)
    assert np.bincount(labels, minlength=experts).tolist() == [96 // experts] * experts
    first = [int(np.flatnonzero(labels == expert)[0]) for expert in range(experts)]
    assert first == sorted(first)


def test_planted_groups_are_found_whatever_the_lengths_of_the_keys():
    keys, groups = planted()
    assert np.array_equal(split.split_neurons(keys, 8), split.in_order_of_first_neuron(groups))


def test_the_objective_lies_between_that_of_kmeans_and_that_of_a_random_split():
    # Groups of unequal sizes: balance must cost something, but less than taking no notice of the keys.
    generator = torch.Generator().manual_seed(1)
    groups = torch.multinomial(torch.arange(1.0, 9), 400, replacement=True, generator=generator)
    keys = torch.randn(8, 16, generator=generator)[groups] + 0.4 * torch.randn(400, 16, generator=generator)
    balanced = split.objective(keys, split.split_neurons(keys, 8))
    free = KMeans(8, n_init=10, random_state=0).fit(split.unit_keys(keys)).labels_
    assert (
        split.objective(keys, free)
        < balanced
        < 0.8 * split.objective(keys, split.split_neurons(keys, 8, rule="random"))
    )


def test_no_exchange_of_two_neurons_between_clusters_lowers_the_distances_to_the_means():
    keys, _ = planted(noise=1.0, neurons=48)
    unit, labels = split.unit_keys(keys).astype(np.float64), split.split_neurons(keys, 4)
    means = np.stack([unit[labels == expert].mean(axis=0) for expert in range(4)])
    distances = np.square(unit[:, None] - means).sum(axis=-1)
    for a, b in itertools.combinations(range(48), 2):
        now = distances[a, labels[a]] + distances[b, labels[b]]
        assert distances[a, labels[b]] + distances[b, labels[a]] >= now - 1e-6


def test_the_objective_is_the_sum_of_squared_distances_from_the_means():
    keys, _ = planted(neurons=12, groups=3)
    labels = np.arange(12) % 3
    unit = (keys.double() / keys.double().norm(dim=1, keepdim=True)).numpy()
    by_hand = sum(
        (
            (unit[neuron] - np.mean([unit[other] for other in range(12) if labels[other] == labels[neuron]], axis=0))
            ** 2
        ).sum()
        for neuron in range(12)
    )
    assert split.objective(keys, labels) == pytest.approx(by_hand, rel=1e-6)


def test_a_seed_gives_its_own_split():
    keys, _ = planted(noise=2.0)
    for rule in ("cluster", "random"):
        first, again, other = (split.split_neurons(keys, 8, rule=rule, seed=seed) for seed in (0, 0, 1))
        assert np.array_equal(first, again) and not np.array_equal(first, other)
    assert np.array_equal(split.split_neurons(keys, 8, rule="contiguous"), np.arange(96) // 12)
    assert not np.array_equal(split.split_neurons(keys, 8, rule="random"), np.arange(96) // 12)


def test_the_number_of_threads_changes_nothing():
    code = (
        "import torch; from moe_atlas.emoe.split import split_neurons; "
        "keys = torch.randn(512, 64, generator=torch.Generator().manual_seed(0)); "
        "print(split_neurons(keys, 16).tolist())"
    )
    printed = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONPATH": str(SCRIPTS), "OMP_NUM_THREADS": str(threads)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for threads in (1, 2)
    }
    assert len(printed) == 1 and "[0, " in printed.pop()


def test_the_gate_gives_the_mean_preactivation_without_the_biases():
    generator = torch.Generator().manual_seed(0)
    keys, bias = torch.randn(12, 5, generator=generator), torch.randn(12, generator=generator)
    inputs = torch.randn(7, 5, generator=generator)
    labels = split.split_neurons(keys, 3)
    gate = split.gate_vectors(keys, labels, 3)
    preactivation = inputs.double() @ keys.double().T + bias.double()
    for expert in range(3):
        mean = preactivation[:, labels == expert].mean(dim=1) - bias[labels == expert].double().mean()
        assert torch.allclose((inputs @ gate.T)[:, expert].double(), mean, atol=1e-6)


def test_the_gate_keeps_the_keys_dtype_and_passes_their_gradient():
    keys, labels = torch.randn(8, 4, dtype=torch.float64, requires_grad=True), np.array([0, 1] * 4)
    split.gate_vectors(keys, labels, 2)[0].sum().backward()
    assert torch.equal(keys.grad, torch.tensor([0.25, 0.0], dtype=torch.float64).repeat(4)[:, None].expand(8, 4))
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        assert split.gate_vectors(keys.to(dtype), labels, 2).dtype == dtype


def test_splits_that_cannot_be_made_are_refused_in_one_sentence():
    keys, _ = planted()
    with pytest.raises(AtlasError, match="96 neurons do not make 7 experts of equal size; choose a divisor of 96"):
        split.split_neurons(keys, 7)
    with pytest.raises(AtlasError, match="'kmeans' is no rule to split neurons by; write one of cluster, random, cont"):
        split.split_neurons(keys, 8, rule="kmeans")
    with pytest.raises(AtlasError, match="not finite"):
        split.split_neurons(keys.masked_fill(keys == keys.max(), torch.nan), 8)


def test_a_neuron_without_a_direction_gets_a_place():
    keys, _ = planted()
    keys[5] = 0
    assert np.bincount(split.split_neurons(keys, 8)).tolist() == [12] * 8


def test_neurons_that_are_all_alike_are_dealt_out():
    assert np.bincount(split.split_neurons(torch.ones(8, 3), 4)).tolist() == [2] * 4
