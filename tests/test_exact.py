"""Sums that do not depend on the order of the summands, against fractions, which round nothing."""

from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_atlas import exact

NUMBERS = st.floats(-1e30, 1e30, allow_nan=False, allow_subnormal=True)


def total(tensors: list[torch.Tensor]) -> torch.Tensor:
    """The expansion of a sum, one summand after another."""
    found = tensors[0][None]
    for tensor in tensors[1:]:
        found = exact.added(found, tensor[None])
    return found


@given(st.lists(NUMBERS, min_size=1, max_size=20), st.randoms(use_true_random=False), st.integers(1, 4))
@settings(deadline=None)
def test_a_sum_is_that_of_fractions_in_any_order_and_grouping(numbers, random, groups):
    expected = float(sum(map(Fraction, numbers)))
    random.shuffle(numbers)
    parts = [
        total([torch.tensor(x, dtype=torch.float64) for x in part])
        for g in range(groups)
        if (part := numbers[g::groups])
    ]
    whole = parts[0]
    for part in parts[1:]:
        whole = exact.added(whole, part)
    assert sum(map(Fraction, whole.tolist())) == sum(map(Fraction, numbers))
    assert exact.rounded(whole).item() == expected


# The sum lies at, or beside, the middle of two neighbours: where one rounding too many shows.
HALF = 2.0**-53
HARD = [
    ([1.0, HALF], 1.0),
    ([1.0, HALF, 2.0**-200], 1 + 2 * HALF),
    ([1.0, HALF, -(2.0**-200)], 1.0),
    ([1 + 2 * HALF, HALF], 1 + 4 * HALF),
    ([1 + 2 * HALF, HALF, -(2.0**-200)], 1 + 2 * HALF),
    ([1.0, -HALF / 2, -(2.0**-120)], 1 - HALF),
    ([1e16, 1.0, -1e16], 1.0),
    ([1e300, 1e-300, -1e300], 1e-300),
    ([0.1] * 10, 1.0),
    ([0.0, -0.0], 0.0),
]


@pytest.mark.parametrize(("numbers", "expected"), HARD)
def test_the_nearest_number_is_found_where_that_is_hard(numbers, expected):
    assert float(sum(map(Fraction, numbers))) == expected
    for ordered in (numbers, numbers[::-1], sorted(numbers)):
        found = exact.rounded(total([torch.tensor([[x]], dtype=torch.float64) for x in ordered]))
        assert found.shape == (1, 1) and found.item() == expected and not found.signbit().any()


def test_many_tensors_of_like_size_take_a_few_tensors_of_memory():
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(50, 4, dtype=torch.float64, generator=generator).exp() for _ in range(300)]
    whole, other = total(tensors), total(tensors[150:] + tensors[:150])
    assert len(whole) <= 4
    assert torch.equal(exact.rounded(whole), exact.rounded(other))
    expected = [
        float(sum(Fraction(tensor[row, column].item()) for tensor in tensors)) for row, column in ((0, 0), (49, 3))
    ]
    assert exact.rounded(whole)[[0, 49], [0, 3]].tolist() == expected


def test_what_is_no_number_stays_none():
    infinite, finite = (torch.tensor([x, 1.0], dtype=torch.float64) for x in (torch.inf, 0.1))
    for order in ([infinite, finite], [finite, infinite], [finite, infinite, finite]):
        assert exact.rounded(total(order))[0] == torch.inf
    assert exact.rounded(total([infinite, finite, -infinite]))[0].isnan()
