"""Sums over tokens that the probe keeps, against plain loops in float64."""

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loops import loop_angular, loop_cosine, loop_rank_counts, normal

from moe_atlas import accumulate
from moe_atlas.accumulate import LoadCounts, PairSums, pair_cosines, rank_counts
from moe_atlas.errors import AtlasError

SCRIPTS = Path(__file__).resolve().parent.parent / "scripts"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_pair_cosines_match_loops(dtype):
    outputs = normal(4, 5, 7).to(dtype)
    outputs[2, 3] = 0
    outputs[1, 0] *= 1e-10  # shorter than the smallest norm
    cosines = pair_cosines(outputs)
    assert cosines.dtype == torch.float64 and cosines.shape == (5, 4, 4)
    for token, a, b in itertools.product(range(5), range(4), range(4)):
        wanted = loop_cosine(outputs[a, token].tolist(), outputs[b, token].tolist())
        assert cosines[token, a, b].item() == pytest.approx(wanted, abs=1e-12)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 5), st.integers(1, 6), st.integers(1, 9), st.integers(0, 1000), st.sampled_from([1e-12, 1.0, 1e12])
)
def test_pair_cosines_are_symmetric_and_bounded(count, tokens, hidden, seed, scale):
    cosines = pair_cosines(normal(count, tokens, hidden, seed=seed) * scale)
    assert torch.equal(cosines, cosines.transpose(1, 2))
    assert cosines.abs().max() <= 1
    if scale >= 1:
        assert (cosines.diagonal(dim1=1, dim2=2) - 1).abs().max() < 1e-12


def test_identical_opposite_and_orthogonal_outputs():
    outputs = torch.tensor([[3.0, 0, 0], [3.0, 0, 0], [-1.0, 0, 0], [0, 5.0, 0]])[:, None]
    cosines = pair_cosines(outputs)
    assert cosines[0, 0].tolist() == [1, 1, -1, 0]
    sums = PairSums(4)
    sums.add(cosines)
    assert sums.arrays()["angular_sum"][0].tolist() == pytest.approx([1, 1, 0, 0.5], abs=1e-15)


def test_rounding_does_not_take_a_cosine_past_one():
    outputs = normal(1, 300, 9).expand(2, 300, 9)
    outputs = torch.stack([outputs[0], 3 * outputs[1]])
    cosines = pair_cosines(outputs)[:, 0, 1]
    assert cosines.max() <= 1 and cosines.min() > 1 - 1e-14


def test_pair_sums_match_loops_however_the_tokens_are_split():
    cosines = pair_cosines(normal(3, 11, 6))
    whole, parts = PairSums(3), PairSums(3)
    whole.add(cosines)
    for first, last in ((0, 4), (4, 4), (4, 10), (10, 11)):
        parts.add(cosines[first:last])
    assert whole.arrays()["tokens"].tolist() == parts.arrays()["tokens"].tolist() == [11]
    for measure, of in (("cosine", float), ("angular", loop_angular)):
        for moment, power in (("sum", 1), ("square", 2)):
            name = f"{measure}_{moment}"
            assert (whole.arrays()[name] - parts.arrays()[name]).abs().max() < 1e-12
            for a, b in itertools.product(range(3), range(3)):
                wanted = math.fsum(of(value) ** power for value in cosines[:, a, b].tolist())
                assert whole.arrays()[name][a, b].item() == pytest.approx(wanted, abs=1e-7 if a == b else 1e-12)


def test_rank_counts_match_loops_without_ties():
    scores, norms = normal(30, 6), normal(30, 6, seed=1)
    assert rank_counts(scores, norms).tolist() == loop_rank_counts(scores.tolist(), norms.tolist())


def test_a_tie_is_shared_out_written_by_hand():
    counts = rank_counts(torch.tensor([[1.0, 2.0, 2.0]]), torch.tensor([[5.0, 4.0, 6.0]]))
    # Expert 0: score rank 0, norm rank 1. Experts 1 and 2 share score ranks 1 and 2; norm ranks 0 and 2.
    assert counts.tolist() == [[0, 1, 0], [0.5, 0, 0.5], [0.5, 0, 0.5]]


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 6), st.integers(0, 12), st.integers(1, 5), st.integers(0, 1000), st.randoms())
def test_rank_counts_with_ties(experts, tokens, values, seed, random):
    generator = torch.Generator().manual_seed(seed)
    scores, norms = torch.randint(values, (2, tokens, experts), generator=generator).float()
    counts = rank_counts(scores, norms)
    assert counts.dtype == torch.float64
    if tokens:
        wanted = torch.tensor(loop_rank_counts(scores.tolist(), norms.tolist()), dtype=torch.float64)
        assert (counts - wanted).abs().max() < 1e-12
    for axis in (0, 1):
        assert (counts.sum(axis) - tokens).abs().max() < 1e-9
    order = list(range(experts))
    random.shuffle(order)
    assert torch.allclose(rank_counts(scores[:, order], norms[:, order]), counts, atol=1e-12)
    assert torch.allclose(rank_counts(norms, scores), counts.T, atol=1e-12)


def test_rank_counts_do_not_depend_on_the_blocks_of_tied_tokens(monkeypatch):
    scores, norms = normal(50, 5).round(), normal(50, 5, seed=1)
    whole = rank_counts(scores, norms)
    monkeypatch.setattr(accumulate, "_TIED_ELEMENTS", 80)
    assert (rank_counts(scores, norms) - whole).abs().max() < 1e-12


def test_values_that_are_not_numbers_are_refused():
    scores = normal(3, 4)
    broken = scores.clone()
    broken[1, 2] = float("nan")
    for pair in ((scores, broken), (broken, scores)):
        with pytest.raises(AtlasError, match="float32"):
            rank_counts(*pair)


def test_load_counts_match_loops_and_leave_out_empty_slots():
    ids = torch.tensor([[2, 0, -1], [1, 2, 0], [2, -1, -1], [2, 0, 1]])
    weights = torch.tensor([[0.6, 0.4, 0.9], [0.5, 0.3, 0.2], [1.0, 9.0, 9.0], [0.7, 0.2, 0.1]])
    load = LoadCounts(4, 3)
    load.add(ids[:1], weights[:1])
    load.add(ids[1:], weights[1:])
    arrays = load.arrays()
    tokens, sums = np.zeros((4, 3), dtype=int), np.zeros((4, 3))
    for chosen, applied in zip(ids.tolist(), weights.tolist(), strict=True):
        for rank, expert in enumerate(chosen):
            if expert >= 0:
                tokens[expert, rank] += 1
                sums[expert, rank] += applied[rank]
    assert arrays["load_tokens"].dtype == torch.int64 and arrays["load_tokens"].tolist() == tokens.tolist()
    assert arrays["load_weight"].dtype == torch.float64
    assert np.abs(arrays["load_weight"].numpy() - sums).max() < 1e-12
    with pytest.raises(ValueError, match="for 4 experts"):
        load.add(torch.tensor([[4, 0, 1]]), weights[:1])
