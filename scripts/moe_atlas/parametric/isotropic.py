"""The share of the variance that principal components of structureless rows have: the null of the projections."""

import functools

import numpy as np
from scipy.linalg import eigh_tridiagonal

DRAWS = 64


@functools.lru_cache(maxsize=64)
def null_ratios(rows: int, coordinates: int, components: int) -> tuple[np.ndarray, np.ndarray]:
    """Share of the variance of each component (components,) for independent Gaussian rows, standardised by coordinate.

    The components of q = rows - 1 centred rows in n coordinates are the eigenvalues of a Wishart matrix of the smaller
    of q and n dimensions with the larger as degrees of freedom. They are drawn from its bidiagonal form (Dumitriu and
    Edelman, Matrix Models for Beta Ensembles, 2002), which is exact and costs the number of dimensions, not that of
    weights. Standardising fixes the length of each coordinate over the rows, which leaves s / (s + 2) of the variance
    of the eigenvalues around their mean, s the smaller of q and n (fourth moments; right to first order).
    Seeded by the shape. Returns mean and standard deviation (n - 1) over draws; empty where there is no component.
    """
    centred = rows - 1
    size, freedom = min(centred, coordinates), max(centred, coordinates)
    if components < 1 or size < 1:
        return np.zeros(0), np.zeros(0)
    random = np.random.default_rng([rows, coordinates])
    wanted = (max(size - components, 0), size - 1)
    found = []
    for _ in range(DRAWS):
        diagonal = random.chisquare(freedom - np.arange(size))
        below = random.chisquare(np.arange(size - 1, 0, -1))
        largest = eigh_tridiagonal(
            diagonal + np.concatenate([[0], below]),
            np.sqrt(diagonal[:-1] * below),
            eigvals_only=True,
            select="i",
            select_range=wanted,
        )[::-1]
        found.append(largest / (diagonal.sum() + below.sum()))
    factor = np.sqrt(size / (size + 2))
    return 1 / size + factor * (np.mean(found, axis=0) - 1 / size), factor * np.std(found, axis=0, ddof=1)
