"""Does the router's similarity follow the experts' weight similarity? One line per layer and matrix.

Source: A Closer Look into Mixture-of-Experts (arXiv 2406.18219), section 4.2, tables 3 and 5. There
the squared r is averaged; here r keeps its sign, and because pairs share experts, and so are
not independent, there are a permutation test and an interval over experts beside the p-value.
"""

import itertools
import math

import numpy as np
import polars as pl

from moe_atlas import tables

MATRICES = ("up", "act", "down")
EXACT_PERMUTATIONS = 10_000  # up to this many, the Mantel test goes through all of them
RANDOM_PERMUTATIONS = 9_999
BOOTSTRAP_DRAWS = 2_000
_CONSTANT = 1e-12  # cosines that spread less than this are one number and rounding
_BLOCK = 1 << 22  # float64 numbers of permuted similarities held at once: 32 MiB


def _square(pairs: pl.DataFrame, experts: int) -> np.ndarray:
    """(N, N) symmetric similarities of the routed experts; NaN where there is no row, diagonal NaN."""
    square = np.full((experts, experts), np.nan)
    first, second = pairs["a"].cast(pl.Int64).to_numpy(), pairs["b"].cast(pl.Int64).to_numpy()
    square[first, second] = square[second, first] = pairs["cosine"].to_numpy()
    np.fill_diagonal(square, np.nan)
    return square


def _varies(values: np.ndarray) -> bool:
    return bool(np.isfinite(values).all()) and float(np.ptp(values)) > _CONSTANT


def permutations(experts: int, generator: np.random.Generator) -> tuple[np.ndarray, bool]:
    """Permutations of the experts for the Mantel test, (P, N), and whether they are all there are."""
    if math.factorial(experts) <= EXACT_PERMUTATIONS:
        return np.array(list(itertools.permutations(range(experts)))), True
    identity = np.broadcast_to(np.arange(experts), (RANDOM_PERMUTATIONS, experts))
    return generator.permuted(identity, axis=1), False


def mantel_p(x: np.ndarray, y: np.ndarray, orders: np.ndarray, exact: bool) -> float:
    """Two-sided p of the Mantel test (Mantel 1967): are two similarity matrices of N experts unrelated?

    x, y: (N, N) symmetric, diagonal unused. orders: (P, N) permutations of y's experts. p is the
    share with |r| at least as large as the observed one; random orders count the observed one too.
    """
    first, second = np.triu_indices(len(x), 1)
    centred = x[first, second] - x[first, second].mean()
    level = y[first, second].mean()  # the same under every permutation, as is the spread: r is a linear function
    observed = abs(centred @ (y[first, second] - level))
    reached = 0
    step = max(1, _BLOCK // len(first))
    for start in range(0, len(orders), step):
        order = orders[start : start + step]
        covariance = (y[order[:, first], order[:, second]] - level) @ centred
        reached += int((np.abs(covariance) >= observed * (1 - 1e-9)).sum())
    return reached / len(orders) if exact else (1 + reached) / (1 + len(orders))


def bootstrap_counts(experts: int, generator: np.random.Generator) -> np.ndarray:
    """How often each expert is drawn, (draws, N), when N experts are drawn with replacement."""
    drawn = generator.integers(experts, size=(BOOTSTRAP_DRAWS, experts))
    cells = drawn + experts * np.arange(BOOTSTRAP_DRAWS)[:, None]
    return np.bincount(cells.ravel(), minlength=BOOTSTRAP_DRAWS * experts).reshape(BOOTSTRAP_DRAWS, experts)


def bootstrap_r(x: np.ndarray, y: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Pearson r of every draw of experts that has one.

    x, y: (N, N) symmetric, diagonal unused; counts: (B, N) multiplicities. A pair of different experts
    counts as often as both were drawn, a pair of an expert with itself never. Draws of fewer
    than 3 distinct experts, or with constant values, are left out.
    """
    off = ~np.eye(len(x), dtype=bool)
    x = np.where(off, x - x[off].mean(), 0.0)
    y = np.where(off, y - y[off].mean(), 0.0)
    counts = counts[(counts > 0).sum(1) >= 3].astype(np.float64)

    def total(values: np.ndarray) -> np.ndarray:
        return ((counts @ values) * counts).sum(1)

    weight = total(off.astype(np.float64))
    mean_x, mean_y = total(x) / weight, total(y) / weight
    variance_x = total(x * x) / weight - mean_x**2
    variance_y = total(y * y) / weight - mean_y**2
    covariance = total(x * y) / weight - mean_x * mean_y
    usable = (variance_x > 1e-12 * x[off].var()) & (variance_y > 1e-12 * y[off].var())
    return np.clip(covariance[usable] / np.sqrt(variance_x[usable] * variance_y[usable]), -1, 1)


def _line(x: np.ndarray, y: np.ndarray, resamples: tuple) -> dict[str, float | None]:
    """The numbers of one row; x, y: (N, N) similarities of weights and of router rows."""
    from scipy.stats import linregress  # half a second to import

    first, second = np.triu_indices(len(x), 1)
    regressor, response = x[first, second], y[first, second]
    row: dict[str, float | None] = dict.fromkeys(
        ("r", "r2", "slope", "intercept", "p_value", "p_mantel", "r_low", "r_high")
    )
    if len(first) < 3 or not _varies(regressor) or not _varies(response):
        return row
    line = linregress(regressor, response)
    orders, exact, counts = resamples
    drawn = bootstrap_r(x, y, counts)
    low, high = np.quantile(drawn, (0.025, 0.975)) if len(drawn) else (None, None)
    row.update(r=line.rvalue, r2=line.rvalue**2, slope=line.slope, intercept=line.intercept, p_value=line.pvalue)
    row.update(p_mantel=mantel_p(x, y, orders, exact), r_low=low, r_high=high)
    return row


def _layer_rows(layer: pl.DataFrame, seed: int) -> list[dict]:
    """The rows of one model's layer; `layer` holds its pairs of routed experts, diagonal included."""
    model, number = layer["model"][0], layer["layer"][0]
    experts = 1 + max(layer["a"].cast(pl.Int64).max(), layer["b"].cast(pl.Int64).max())
    # One stream per layer, shared by the three matrices: they are compared on the same resamples,
    # and which other layers or models are in the table does not matter.
    generator = np.random.default_rng([seed, number])
    resamples = (*permutations(experts, generator), bootstrap_counts(experts, generator))
    router = _square(layer.filter(matrix="router"), experts)
    rows = []
    for matrix in MATRICES:
        pairs = layer.filter(matrix=matrix, level="neuron_mean")
        if len(pairs):
            row = _line(_square(pairs, experts), router, resamples)
            rows.append(
                {"model": model, "layer": number, "matrix": matrix, "n_pairs": experts * (experts - 1) // 2, **row}
            )
    return rows


def router_regression(similarity: pl.DataFrame, *, seed: int) -> pl.DataFrame:
    """Table "regression" from table "similarity": a row for each model, layer and matrix up, act, down.

    x is the neuron-mean similarity of the pairs of routed experts, y the similarity of their router
    rows. With fewer than 3 pairs, constant values or no router, r and what follows from it are null.
    The same `seed` (0 or more) gives the same numbers, whatever the order of the rows.
    """
    routed = similarity.filter(pl.col("a").str.contains(r"^\d+$"), pl.col("b").str.contains(r"^\d+$"))
    groups = routed.partition_by("model", "layer", as_dict=True)
    rows = [row for key in sorted(groups) for row in _layer_rows(groups[key], seed)]
    if not rows:
        return tables.empty("regression")
    return tables.conform("regression", pl.DataFrame(rows, schema=tables.TABLES["regression"].schema))
