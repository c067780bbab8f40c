"""Whether neurons of one expert are active together: |correlation| of activations within and between experts.

Source: EMoE (arXiv 2310.10908), whose figure of activations sorted by cluster has no number; the ratio of the mean
|correlation| within experts to that between them, and what random experts of the same size give, are additions.
"""

from dataclasses import dataclass

import numpy as np
import torch

NULL_SPLITS = 100
_ROWS = 1024  # tokens whose float64 activations are held at once
MAP_CELLS = 128


class Moments:
    """First and second moments of activations (T, F) by sums over tokens, float64: 8 F^2 bytes whatever the text.

    The sums are of deviations from the mean of the first tokens, so that large means cost no digits.
    """

    def __init__(self, neurons: int):
        self.tokens = 0
        self.total = torch.zeros(neurons, dtype=torch.float64)
        self.products = torch.zeros(neurons, neurons, dtype=torch.float64)
        self._near: torch.Tensor | None = None

    def add(self, activations: torch.Tensor) -> None:
        """Take activations (T, F) of any float dtype."""
        for rows in activations.split(_ROWS):
            rows = rows.to("cpu", torch.float64)
            if self._near is None and len(rows):
                self._near = rows.mean(0)
            rows = rows - self._near
            self.tokens += len(rows)
            self.total += rows.sum(0)
            self.products.addmm_(rows.T, rows)

    def correlation(self) -> np.ndarray:
        """|r| of each pair of neurons, (F, F) float64: NaN with a neuron that never changes. Overwrites the sums."""
        mean = self.total / max(self.tokens, 1)
        products = self.products.addr_(self.total, mean, alpha=-1)
        spread = products.diagonal().clone()
        # What is left of a constant after the subtraction is rounding.
        flat = spread <= 1e-12 * (mean + (self._near if self._near is not None else 0)).square() * self.tokens
        spread[flat | (spread <= 0)] = torch.nan
        lengths = spread.sqrt()
        return products.div_(lengths).div_(lengths[:, None]).abs_().clamp_(max=1).numpy()


@dataclass(frozen=True)
class Modularity:
    """Mean |r| of two different neurons of one expert, and of two experts; their ratio."""

    within: float
    between: float

    @property
    def ratio(self) -> float:
        return self.within / self.between if self.between else np.nan


class CorrelationOfSplits:
    """Modularity of splits of the neurons whose |r| is given, (F, F) float64 as Moments.correlation gives it."""

    def __init__(self, correlation: np.ndarray):
        self.known = np.isfinite(correlation.diagonal())
        self.correlation = np.where(np.isfinite(correlation), correlation, 0.0)
        np.fill_diagonal(self.correlation, 0.0)
        count = int(self.known.sum())
        self._pairs, self._sum = count * (count - 1), float(self.correlation.sum())

    def of(self, labels: np.ndarray) -> Modularity:
        """The modularity of one split; NaN where no pair is within an expert, or none between."""
        inside, pairs = 0.0, 0
        for members in members_of(labels):
            inside += float(self.correlation[np.ix_(members, members)].sum())
            count = int(self.known[members].sum())
            pairs += count * (count - 1)
        outside = self._pairs - pairs
        return Modularity(inside / pairs if pairs else np.nan, (self._sum - inside) / outside if outside else np.nan)

    def null(self, experts: int, generator: np.random.Generator, draws: int = NULL_SPLITS) -> list[Modularity]:
        """The modularity of random splits into experts of equal size."""
        dealt = np.arange(len(self.correlation)) // (len(self.correlation) // experts)
        return [self.of(generator.permutation(dealt)) for _ in range(draws)]

    def map(self, order: np.ndarray, cells: int = MAP_CELLS) -> np.ndarray:
        """Mean |r| in at most cells x cells runs of neurons in this order (F,); no diagonal, no unknown pairs."""
        count = min(cells, len(order))
        starts = np.arange(count) * len(order) // count
        # Run by run: in another order the whole matrix would be one more in memory.
        runs = np.split(order, starts[1:])
        sums = np.stack([np.add.reduceat(self.correlation[run].sum(axis=0)[order], starts) for run in runs])
        known = np.add.reduceat(self.known[order].astype(np.int64), starts)
        pairs = np.outer(known, known) - np.diag(known)
        return np.divide(sums, pairs, out=np.full(sums.shape, np.nan), where=pairs > 0)


def members_of(labels: np.ndarray) -> list[np.ndarray]:
    """Neurons of each expert, by number."""
    order = np.argsort(labels, kind="stable")
    return np.split(order, np.cumsum(np.bincount(labels))[:-1])
