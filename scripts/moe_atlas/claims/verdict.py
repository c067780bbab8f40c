"""The rule of the verdicts, as claims/__init__.py states it."""

import math

import numpy as np

from moe_atlas.claims.estimate import Estimate
from moe_atlas.claims.sheet import Claim

HOLDS, DOES_NOT_HOLD, CANNOT_BE_TOLD = VERDICTS = ("holds", "does not hold", "cannot be told")


def holm(p_values: list[float]) -> list[float]:
    """Holm's adjusted p values (Holm 1979), in the order given: the k-th smallest of n times n - k + 1, not falling."""
    order = np.argsort(p_values, kind="stable")
    adjusted, largest = np.empty(len(p_values)), 0.0
    for place, index in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - place) * p_values[index]))
        adjusted[index] = largest
    return adjusted.tolist()


def too_few(claim: Claim, layers: int, experts: int, blocks: int | None) -> str:
    """Which minimum of the claim is not reached, as a reason; "" where all are. blocks: None where no text is read."""
    found = {"layers with experts": (layers, claim.layers), "experts": (experts, claim.experts)}
    if blocks is not None:
        found["blocks of documents"] = (blocks, claim.blocks)
    missing = [f"{has} {name} and at least {asked} are asked" for name, (has, asked) in found.items() if has < asked]
    if not missing:
        return ""
    if layers < claim.layers and claim.null == "permuted layers" and layers > 0:
        smallest = 1 / math.factorial(layers)
        missing.append(f"the smallest p of {layers} permuted layers is {smallest:.2g}")
    return "; ".join(missing)


def verdict(claim: Claim, estimate: Estimate, p_adjusted: float | None) -> tuple[str, str]:
    """(verdict, reason) of an estimate; p_adjusted is None where its smallest p is above the level."""
    if p_adjusted is None:
        return CANNOT_BE_TOLD, f"the smallest p on so few data is {estimate.smallest_p:.2g}, above {claim.level:g}"
    low, high, null = estimate.low, estimate.high, estimate.null
    if not (math.isfinite(low) and math.isfinite(high)):
        return CANNOT_BE_TOLD, "there is no interval"
    if null - claim.margin < low and high < null + claim.margin:
        return DOES_NOT_HOLD, f"the interval is less than {claim.margin:g} from the null"
    greater = claim.direction == "greater"
    if high < null if greater else low > null:
        return DOES_NOT_HOLD, "the interval is on the other side of the null"
    if not (low > null if greater else high < null):
        return CANNOT_BE_TOLD, "the interval holds the null"
    if p_adjusted >= claim.level:
        return CANNOT_BE_TOLD, f"the adjusted p is not below {claim.level:g}"
    return HOLDS, f"the interval is on the claimed side of the null and the adjusted p below {claim.level:g}"
