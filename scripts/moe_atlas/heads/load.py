"""How evenly a router uses its experts, beside as many choices that are even and independent (MoA, section 4).

Numpy in, rows out. Choices of one layer on one text: ids (T, k) and weights (T, k) of its T counted tokens.
"""

from collections.abc import Callable

import numpy as np

from moe_atlas.behavioral.measures import dead_share, divide, even_loads, load_entropy, max_vio
from moe_atlas.heads.frames import Row, drawn, null

_EVEN_DRAWS = 1000


def variation(load: np.ndarray) -> np.ndarray:
    """Coefficient of variation of a load (..., N): population standard deviation over mean, 0 is even."""
    return divide(load.std(-1), load.mean(-1))


def dead(load: np.ndarray) -> np.ndarray:
    """Number of experts (...) of a load (..., N) that no token chose."""
    return dead_share(load) * load.shape[-1]


MEASURES: dict[str, tuple[Callable[[np.ndarray], np.ndarray], Callable[[int], float]]] = {
    "entropy": (load_entropy, lambda experts: 1.0),
    "max_vio": (max_vio, lambda experts: experts - 1.0),
    "cv": (variation, lambda experts: np.sqrt(experts - 1.0)),
    "dead": (dead, lambda experts: float(experts)),
}


def by_block(ids: np.ndarray, values: np.ndarray, blocks: np.ndarray, experts: int, count: int) -> np.ndarray:
    """Sums (B, E) of values (T, k) by the block (T,) of the token and the chosen expert (T, k)."""
    cells = blocks[:, None] * experts + ids
    sums = np.bincount(cells.ravel(), weights=values.ravel(), minlength=count * experts)
    return sums.reshape(count, experts)


def load_rows(loads: np.ndarray, weights: np.ndarray, drawn_blocks: np.ndarray, tokens: int) -> list[Row]:
    """Rows of moa_load: each expert's part of the choices and of the weights.

    loads, weights: (B, E) by block; drawn_blocks: (R, B) of resampling.block_weights.
    """
    rows: list[Row] = []
    experts = loads.shape[1]
    for measure, sums in (("share", loads), ("weight", weights)):
        totals = drawn_blocks @ sums
        shares = divide(totals, totals.sum(-1, keepdims=True))
        for expert in range(experts):
            fields = {"expert": str(expert), "measure": measure, "chance": 1 / experts, "tokens": tokens}
            rows.append(fields | drawn(shares[:, expert], 0, 1))
    return rows


def routing_rows(
    loads: np.ndarray, drawn_blocks: np.ndarray, tokens: int, top_k: int, generator: np.random.Generator
) -> list[Row]:
    """Rows of moa_routing: evenness of the load (B, E), beside that of even and independent choices."""
    experts = loads.shape[1]
    even = even_loads(tokens, top_k, experts, generator, _EVEN_DRAWS)
    totals = drawn_blocks @ loads
    fields = {"experts": experts, "top_k": top_k, "tokens": tokens}
    return [
        {"measure": name} | fields | drawn(measure(totals), 0, most(experts)) | null(measure(even))
        for name, (measure, most) in MEASURES.items()
    ]
