"""Sums of float64 tensors that do not depend on the order of the summands, or on how they were grouped.

A sum is kept as several tensors that add up to it without any rounding (an expansion; Shewchuk 1997, Adaptive Precision
Floating-Point Arithmetic, section 2; Python's math.fsum does the same for single numbers), and rounded once at the end.
"""

import math

import torch


def added(total: torch.Tensor, more: torch.Tensor) -> torch.Tensor:
    """The expansion (K', ...) of the sum of expansions (K, ...) and (J, ...), exact where nothing overflows.

    A float64 tensor x is the expansion x[None].

    K' grows with the range of the summands' bits, not with their number: 3 or so for numbers of about the same size.
    """
    parts = list(total)
    for rest in more:
        for number, part in enumerate(parts):
            parts[number], rest = _two_sum(part, rest)
        if bool(rest.any()):
            parts.append(rest)
    return torch.stack(parts)


def rounded(total: torch.Tensor) -> torch.Tensor:
    """The float64 tensor (...) nearest to what the expansion (K, ...) adds up to; ties go to the even one."""
    *parts, nearest = total
    error = torch.zeros_like(nearest)
    for part in reversed(parts):
        nearest, rest = _two_sum(part, nearest)
        error += rest.abs()
    # The sum lies within `error` of `nearest`, up to the rounding of `error` itself.
    error *= 1 + 2**-40
    unsure = (nearest + error != nearest) | (nearest - error != nearest)
    if bool(unsure.any()):
        sums = [math.fsum(numbers) for numbers in total[:, unsure].T.tolist()]
        nearest = nearest.masked_scatter(unsure, torch.tensor(sums, dtype=torch.float64, device=nearest.device))
    return nearest + 0.0  # no -0.0, which would show that a 0 was never added


def _two_sum(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """fl(a + b) and what it lacks of a + b (Knuth's two-sum)."""
    total = a + b
    of_b = total - a
    rest = (a - (total - of_b)) + (b - of_b)
    return total, rest.masked_fill_(~total.isfinite(), 0)
