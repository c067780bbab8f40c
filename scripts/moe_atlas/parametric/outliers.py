"""Experts that lie apart from the others in the plane of the first two principal components.

Source: A Closer Look into Mixture-of-Experts (arXiv 2406.18219), appendix C.1: DBSCAN (Ester et al. 1996) with eps 50
and 5 points, on DeepSeekMoE only.
"""

import functools
import math
from dataclasses import dataclass

import numpy as np

from moe_atlas.parametric.isotropic import null_ratios

PAPER_COORDINATES = 1408 * 2048  # of an expert's matrix of DeepSeekMoE-16B
DRAWS = 100


@dataclass(frozen=True)
class OutlierRule:
    """Which experts are outliers: those in no cluster of DBSCAN.

    eps: largest distance of neighbours, min_samples: points of a neighbourhood that makes a cluster, itself included;
    the paper's numbers. Distances of standardised rows grow with the square root of their coordinates, so eps is scaled
    by that, and is the number itself at DeepSeekMoE-16B's size, the only model that the paper asks it of.
    """

    eps: float = 50.0
    min_samples: int = 5

    def radius(self, coordinates: int) -> float:
        """eps for rows of so many coordinates."""
        return self.eps * math.sqrt(coordinates / PAPER_COORDINATES)

    def labels(self, scores: np.ndarray, coordinates: int) -> np.ndarray:
        """DBSCAN's cluster (rows,) of each row of scores (rows, components >= 2), by its first two; -1 none."""
        # Imported here: it takes a second, and a layer of a few experts has no use for it.
        from sklearn.cluster import DBSCAN

        clusters = DBSCAN(eps=self.radius(coordinates), min_samples=self.min_samples)
        return clusters.fit_predict(scores[:, :2])

    def find(self, scores: np.ndarray, coordinates: int) -> tuple[list[bool | None], float | None]:
        """Whether each row is an outlier, and the share of rows that are when all are independent.

        None for all of them below twice min_samples rows, where hardly more than one cluster could be.
        """
        rows = len(scores)
        if rows < 2 * self.min_samples:
            return [None] * rows, None
        return (self.labels(scores, coordinates) < 0).tolist(), null_share(self, rows, coordinates)


@functools.lru_cache(maxsize=64)
def null_share(rule: OutlierRule, rows: int, coordinates: int) -> float:
    """Mean share of outliers among independent isotropic rows, seeded by their number.

    The first two components of such rows are a random plane in the space of centred rows, as long as their expected
    share of the variance, which is rows - 1 for each coordinate.
    """
    random = np.random.default_rng(rows)
    lengths = np.sqrt(null_ratios(rows, coordinates, 2)[0] * (rows - 1) * coordinates)
    shares = []
    for _ in range(DRAWS):
        drawn = random.standard_normal((rows, 2))
        plane = np.linalg.qr(drawn - drawn.mean(0))[0]
        shares.append(np.mean(rule.labels(plane * lengths, coordinates) < 0))
    return float(np.mean(shares))
