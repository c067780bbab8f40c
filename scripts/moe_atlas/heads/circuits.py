"""How alike the circuits of a layer's experts are, beside random experts with the same keys and values.

Of an expert with H heads the QK circuit is the list of W_q,h^T W_k,h, the OV circuit that of W_o,h W_v,h: d x d maps of
rank D, which are never built. <A^T K, B^T K> = <A B^T, K K^T> needs D x D matrices only (all inner products are of
Frobenius, summed over heads). All experts share K and V. That moves no mean, but it narrows the space that circuits lie
in, so that independent experts spread further around 0 than unshared ones would: the null has the layer's own keys.
Rotary positions, norms and biases are left out.
"""

from collections.abc import Iterator

import numpy as np
import torch

from moe_atlas.architectures.attention_experts import Circuits
from moe_atlas.heads.frames import TAIL, Row

RANDOM_EXPERTS = 24  # of the null: 276 pairs
_NUMBERS = 1 << 24  # of one chunk of pairs


def inner_products(left: torch.Tensor, shared: torch.Tensor) -> torch.Tensor:
    """Inner products (E, E) float64 of the maps left_i,h^T shared_h: left (E, H, D, d), shared (H, D, d)."""
    left, shared = left.float(), shared.float()
    gram = (shared @ shared.transpose(1, 2)).double()  # (H, D, D)
    experts, heads, width, _ = left.shape
    found = torch.zeros(experts, experts, dtype=torch.float64)
    step = max(1, _NUMBERS // (experts * width * width))
    for head in range(heads):
        own = left[:, head]
        for first in range(0, experts, step):
            part = own[first : first + step]
            products = torch.einsum("iad,jbd->ijab", part, own).double()
            found[first : first + step] += (products * gram[head]).sum((-2, -1)).cpu()
    return found


def cosines(products: torch.Tensor) -> np.ndarray:
    """Cosines (E, E) from inner products (E, E)."""
    length = products.diagonal().sqrt()
    return (products / (length[:, None] * length)).numpy()


def of_layer(circuits: Circuits) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    """(name, left (E, H, D, d), shared (H, D, d)) of the QK and the OV circuit, of which the transpose is meant."""
    yield "QK", circuits.query, circuits.key
    yield "OV", circuits.output.transpose(2, 3), circuits.value


def null_cosines(shared: torch.Tensor, seed: int, experts: int = RANDOM_EXPERTS) -> np.ndarray:
    """Cosines of all pairs of independent Gaussian experts with these keys or values (H, D, d)."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(experts, *shared.shape, generator=generator).to(shared.device)
    return cosines(inner_products(drawn, shared))[np.triu_indices(experts, 1)]


def circuit_rows(circuits: Circuits, seed: int) -> list[Row]:
    """Rows of moa_circuits of one layer: every pair of experts, the diagonal too."""
    rows: list[Row] = []
    for name, left, shared in of_layer(circuits):
        found, nulls = cosines(inner_products(left, shared)), null_cosines(shared, seed)
        low, high = np.quantile(nulls, TAIL)
        chance = {"chance": float(nulls.mean()), "chance_low": float(low), "chance_high": float(high)}
        for a, b in zip(*np.triu_indices(len(found)), strict=True):
            rows.append({"circuit": name, "a": str(a), "b": str(b), "cosine": float(found[a, b])} | chance)
    return rows
