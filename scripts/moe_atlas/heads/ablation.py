"""What leaving out one expert costs, by class of token, beside what the other experts of its layer cost.

An expert is left out by setting its router logit to minus infinity; the others take its place as the model would have
it. The losses with and without are of the same tokens, so that an interval over documents is of their difference.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from moe_atlas.behavioral.measures import divide
from moe_atlas.behavioral.resampling import interval
from moe_atlas.heads.frames import Row, null, p_value

EXCHANGES = 999
FEWEST = 20  # predicted tokens of a class whose cost is correlated


@dataclass(frozen=True)
class Classes:
    """Classes of the P predicted tokens: by ("read", "predicted"), family, names, and of each token its class (P,), -1
    where it has none."""

    by: str
    family: str
    names: tuple[str, ...]
    of: np.ndarray


def class_of(types: np.ndarray, named: Mapping[int, str], names: Sequence[str]) -> np.ndarray:
    """Place in `names` of each token's class, (P,), -1 for types that have none."""
    places = {one: names.index(name) for one, name in named.items() if name in names}
    return np.array([places.get(int(one), -1) for one in types], dtype=np.int64)


def sums_by_class(values: np.ndarray, classes: Classes, blocks: np.ndarray, count: int) -> np.ndarray:
    """Sums (A, C, B) of values (A, P) by class and block of documents (P,)."""
    size = len(classes.names)
    kept = classes.of >= 0
    cells = classes.of[kept] * count + blocks[kept]
    sums = [np.bincount(cells, weights=one[kept], minlength=size * count) for one in values]
    return np.stack(sums).reshape(len(values), size, count)


@dataclass(frozen=True)
class Costs:
    """Rises (R, E, C) of the loss by expert and class, resamples first; tokens (C,) of the classes."""

    rises: np.ndarray
    tokens: np.ndarray

    @property
    def excess(self) -> np.ndarray:
        """(R, E, C): rise less the mean rise without one of the other experts; NaN where there is one expert."""
        experts = self.rises.shape[1]
        others = (self.rises.sum(1, keepdims=True) - self.rises) / max(experts - 1, 1)
        return self.rises - others if experts > 1 else np.full_like(self.rises, np.nan)


def costs(deltas: np.ndarray, classes: Classes, blocks: np.ndarray, drawn_blocks: np.ndarray) -> Costs:
    """deltas (E, P): loss without each expert less the loss with all; drawn_blocks (R, B)."""
    count = drawn_blocks.shape[1]
    above = sums_by_class(deltas, classes, blocks, count)
    tokens = sums_by_class(np.ones((1, deltas.shape[1])), classes, blocks, count)[0]
    return Costs(
        divide(np.einsum("rb,ecb->rec", drawn_blocks, above), (drawn_blocks @ tokens.T)[:, None]), tokens.sum(1)
    )


def log_shares(ids: np.ndarray, classes: np.ndarray, experts: int, size: int) -> np.ndarray:
    """(E, C): log of a class's share of an expert's choices over its share of all, from ids (T, k), classes (T,).

    Half a choice is added to each count, so that none is infinite; NaN for classes that no token has.
    """
    kept = classes >= 0
    cells = classes[kept, None] + size * ids[kept]
    counts = np.bincount(cells.ravel(), minlength=experts * size).reshape(experts, size) + 0.5
    own = counts / counts.sum(1, keepdims=True)
    found = np.log(own) - np.log(counts.sum(0) / counts.sum())
    found[:, np.bincount(classes[kept], minlength=size) == 0] = np.nan
    return found


def ablation_rows(found: Costs, classes: Classes, association: np.ndarray | None) -> list[Row]:
    """Rows of moa_ablation of one layer and family; association: (E, C) of log_shares, None where tokens are hidden."""
    rows: list[Row] = []
    value, low, high = interval(found.rises)
    excess, excess_low, excess_high = interval(found.excess)
    for expert in range(value.shape[0]):
        for place, name in enumerate(classes.names):
            if not found.tokens[place]:
                continue
            at = expert, place
            rows.append(
                {
                    "expert": str(expert),
                    "by": classes.by,
                    "family": classes.family,
                    "token_class": name,
                    "value": float(value[at]),
                    "low": float(low[at]),
                    "high": float(high[at]),
                    "others": float(value[at] - excess[at]),
                    "difference": float(excess[at]),
                    "difference_low": float(excess_low[at]),
                    "difference_high": float(excess_high[at]),
                    "association": None if association is None else float(association[at]),
                    "tokens": int(found.tokens[place]),
                }
            )
    return rows


def correlation_row(found: Costs, association: np.ndarray, generator: np.random.Generator) -> Row:
    """The row `ablation` of moa_association: Spearman's rho over cells of experts and classes, association against
    excess; the null exchanges the experts of the associations."""
    kept = (found.tokens >= FEWEST) & np.isfinite(association).all(0)
    own, cost = association[:, kept], found.excess[0][:, kept]
    row: Row = {"measure": "ablation", "types": int(cost.size), "tokens": int(found.tokens[kept].sum())}
    if cost.size < 3 or not np.isfinite(cost).all() or np.ptp(cost) == 0 or np.ptp(own) == 0:
        return row
    ranks, other = stats.rankdata(own).reshape(own.shape), stats.rankdata(cost)

    def rho(of: np.ndarray) -> float:
        return float(np.corrcoef(of.ravel(), other)[0, 1])

    value = rho(ranks)
    nulls = np.array([rho(ranks[generator.permutation(len(ranks))]) for _ in range(EXCHANGES)])
    return (
        row
        | {
            "value": value,
            "corrected": value - float(nulls.mean()),
            "p_value": p_value(value, nulls),
        }
        | null(nulls)
    )
