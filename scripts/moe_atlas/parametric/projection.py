"""Principal components of a layer's experts: whole matrices as points, and single neurons as points.

Source: A Closer Look into Mixture-of-Experts (arXiv 2406.18219), appendices C.1 and C.2: every coordinate is
standardised over the points (n - 1), so that large weights count no more than small ones. Two things are added: the
variance that a component explains, and the share it would have if all entries were independent and Gaussian.

Matrices have far more coordinates than there are experts, neurons far fewer than there are neurons: the components of
the first come from the inner products of the points, of the second from the correlations of the coordinates. Either
way products are float32, their sums float64, and the weights are never copied whole. Of the correlations, which are
symmetric, one half is computed.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import polars as pl
import torch
from scipy.linalg import eigh
from scipy.sparse.linalg import ArpackError, LinearOperator, eigsh

from moe_atlas import tables
from moe_atlas.architectures.bank import FFN, ExpertBank
from moe_atlas.errors import AtlasError
from moe_atlas.parallel import each, one_thread_each
from moe_atlas.parametric.isotropic import null_ratios
from moe_atlas.parametric.outliers import OutlierRule
from moe_atlas.parametric.similarity import REFERENCE, add_products, check_width, row_blocks, row_spans

COMPONENTS = 3
DEFAULT_RULE = OutlierRule()
_ROWS = 4096  # neurons in one product
_TERMS = 64  # neurons in one float32 sum
_SAMPLED = 64  # rows that say where the middle is
_TILE = 512  # coordinates a side of one thread's product
# A few eigenvalues of a matrix with more coordinates come from Lanczos vectors: products with it, not its reduction to
# a tridiagonal one. For independent weights of width 4096, the slowest case, a tenth of the time. An error in the
# vectors counts squared in the values, so that both are right to the last digit.
_LANCZOS_FROM, _LANCZOS_VECTORS, _LANCZOS_TOLERANCE = 1024, 80, 1e-8


@dataclass(frozen=True)
class Components:
    """Coordinates of points (n, c) float64 and the share of the variance each component has, (c,), nan if there is
    none. c is 3, or less where n points or the dimension allow no more."""

    coordinates: np.ndarray
    ratios: np.ndarray


def component_count(points: int, dimension: int) -> int:
    """How many components are looked at: centred points have one direction less than there are points."""
    return max(0, min(COMPONENTS, points - 1, dimension))


def matrix_components(bank: torch.Tensor, extras: list[torch.Tensor], *, block: int | None = None) -> Components:
    """Components of the flattened matrices as points.

    bank: (N, rows, columns); extras: matrices (rows, columns), after the experts; any floating dtype.
    block: float32 numbers held at once, as in row_blocks.
    A coordinate that all points share counts 0. A component's largest coordinate in absolute value is positive.
    """
    experts, rows, columns = bank.shape
    points = experts + len(extras)
    count = component_count(points, rows * columns)
    if not count:
        return Components(np.zeros((points, 0)), np.zeros(0))

    def summed(span: slice) -> torch.Tensor:
        gram = torch.zeros(points, points, dtype=torch.float64, device=bank.device)
        for _, part in row_blocks(bank[:, span], [extra[span] for extra in extras], block):
            # The first point is the origin: experts that were copied from one network differ in the last digits only.
            values = part.flatten(1)
            values = values - values[:1]
            values -= values.mean(0)
            values *= _inverse(values.square().sum(0) / (points - 1))
            add_products(gram, values)
        return gram

    inner = sum(each(summed, row_spans(bank))).cpu().numpy()
    _check_finite(inner)
    inner = (inner + inner.T) / 2
    inner = inner - inner.mean(0) - inner.mean(1)[:, None] + inner.mean()
    variances, vectors = _largest(inner, count)
    coordinates = vectors * np.sqrt(variances)
    return Components(coordinates * _signs(coordinates), _shares(variances, np.trace(inner)))


def neuron_components(parts: list[torch.Tensor], kept: np.ndarray, *, block: int = _ROWS) -> Components:
    """Components of neurons as points, computed over all of them; coordinates of the `kept` ones.

    parts: (m, d) float tensors, one for each expert, neurons as rows; kept: sorted numbers of rows, counted through all
    parts. block: neurons of one product. Memory: d x d numbers, in float64 twice and in float32 once.
    A coordinate that all neurons share counts 0. A component's largest weight in absolute value is positive.
    """
    points, dimension = sum(len(part) for part in parts), parts[0].shape[1]
    count = component_count(points, dimension)
    if not count:
        return Components(np.zeros((len(kept), 0)), np.zeros(0))
    origin, block = _typical(parts), min(block, points)
    covariance = torch.zeros(dimension, dimension, dtype=torch.float64, device=origin.device)
    sums = torch.zeros(dimension, dtype=torch.float64, device=origin.device)
    room = torch.empty(block, dimension, device=origin.device)
    for rows in _chunks(parts, block):
        values = torch.sub(rows, origin, out=room[: len(rows)])
        _add_moments(covariance, sums, values)
    del room, values
    covariance -= torch.outer(sums, sums / points)
    # What rounding leaves of a coordinate that hardly varies can be below 0.
    variance = covariance.diagonal().clamp_min(0) / (points - 1)
    mean, scale = sums / points, _inverse(variance)
    correlation = covariance.mul_(scale).mul_(scale[:, None])
    for across, down in _tiles(dimension):
        correlation[down, across] = correlation[across, down].T.clone()
    matrix = correlation.div_(points - 1).cpu().numpy()
    _check_finite(matrix)
    total = np.trace(matrix)
    variances, vectors = _largest(matrix, count)
    vectors = vectors * _signs(vectors)

    wanted, where = torch.from_numpy(kept), np.cumsum([0, *(len(part) for part in parts)])
    rows = [
        part[wanted[(wanted >= low) & (wanted < low + len(part))] - low]
        for part, low in zip(parts, where, strict=False)
    ]
    values = (torch.cat([part.float() for part in rows]).to(origin.device) - origin).double()
    return Components(((values - mean) * scale).cpu().numpy() @ vectors, _shares(variances, total))


def _chunks(parts: list[torch.Tensor], block: int) -> Iterator[torch.Tensor]:
    for part in parts:
        yield from part.split(block)


def _typical(parts: list[torch.Tensor]) -> torch.Tensor:
    """A row (d,) float32 near the middle of all: values less it are small, and 0 where a coordinate never varies.

    Each coordinate is the median of some rows, so that one of them that is far from the others does not count.
    """
    rows = torch.cat([part[:: max(1, len(part) // _SAMPLED)].float() for part in parts])
    return rows[:: max(1, len(rows) // _SAMPLED)].median(0).values


def _tiles(dimension: int) -> list[tuple[slice, slice]]:
    """Rows and columns of the tiles of a symmetric matrix that are on its diagonal or above, the largest first.

    Those on the diagonal have half the side: less is computed below it.
    """

    def sides(side: int) -> list[slice]:
        return [slice(first, min(first + side, dimension)) for first in range(0, dimension, side)]

    large, small = sides(_TILE), sides(_TILE // 2)
    above = [(across, down) for number, across in enumerate(large) for down in large[number + 1 :]]
    return [*above, *zip(small[::2], small[1::2], strict=False), *((side, side) for side in small)]


def _add_moments(products: torch.Tensor, sums: torch.Tensor, values: torch.Tensor) -> None:
    """Add those of the columns of values (m, d) float32: products to the upper tiles of (d, d), sums to (d,)."""

    def add(tile: tuple[slice, slice]) -> None:
        across, down = tile
        products[across, down] += values[:, across].T @ values[:, down]
        if across == down:
            for terms in values[:, across].split(_TERMS):
                sums[across] += terms.sum(0)

    each(add, _tiles(len(products)))


def _inverse(variance: torch.Tensor) -> torch.Tensor:
    """1 / standard deviation, 0 for a coordinate without variance."""
    return torch.where(variance > 0, variance.rsqrt(), 0)


def _largest(symmetric: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The largest eigenvalues (count,), falling and not negative, and their unit vectors as columns (n, count)."""
    last = len(symmetric) - 1
    if last >= _LANCZOS_FROM:
        with contextlib.suppress(ArpackError):
            return _lanczos(symmetric, count)
    values, vectors = eigh(symmetric, subset_by_index=(last - count + 1, last))
    return np.maximum(values[::-1], 0), vectors[:, ::-1]


def _lanczos(symmetric: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """_largest of a large matrix, with the implicitly restarted Lanczos method."""
    matrix, size = torch.from_numpy(symmetric), len(symmetric)
    blocks, threads = matrix.split(_TILE), torch.get_num_threads()
    with one_thread_each(threads) if threads > 1 else contextlib.nullcontext() as pool:

        def product(vector: np.ndarray) -> np.ndarray:
            vector = torch.from_numpy(np.ascontiguousarray(vector).ravel())
            return torch.cat(list((pool.map if pool else map)(lambda rows: rows @ vector, blocks))).numpy()

        start = np.random.default_rng(size).standard_normal(size)
        operator = LinearOperator(symmetric.shape, matvec=product, dtype=np.float64)
        values, vectors = eigsh(operator, k=count, which="LA", ncv=_LANCZOS_VECTORS, v0=start, tol=_LANCZOS_TOLERANCE)
    order = np.argsort(values)[::-1]
    return np.maximum(values[order], 0), vectors[:, order]


def _signs(columns: np.ndarray) -> np.ndarray:
    """1 or -1 for each column, so that its largest entry in absolute value becomes positive."""
    extremes = columns[np.abs(columns).argmax(0), np.arange(columns.shape[1])]
    return np.where(extremes < 0, -1.0, 1.0)


def _shares(variances: np.ndarray, total: float) -> np.ndarray:
    return variances / total if total > 0 else np.full(len(variances), np.nan)


def _check_finite(matrix: np.ndarray) -> None:
    if not np.isfinite(matrix).all():
        raise FloatingPointError("a weight is not finite")


def evenly(rows: int, most: int) -> np.ndarray:
    """At most `most` numbers of `rows` rows, evenly spaced, first and last included; all for most 0."""
    if not most or rows <= most:
        return np.arange(rows)
    return np.linspace(0, rows - 1, most).round().astype(np.int64)


def project_experts(
    bank: ExpertBank,
    *,
    model: str,
    layer: int,
    reference: FFN | None = None,
    max_neurons: int = 2048,
    rule: OutlierRule = DEFAULT_RULE,
) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Tables "projection" and "explained_variance" of one layer, up, act and down at both levels.

    Points are the N routed experts, then F (`reference`): at matrix level where its shape is an expert's, at neuron
    level always. The shared expert is left out, as in the paper. Of the neurons at most `max_neurons` are kept, evenly
    spaced over all; the components come from every neuron. rule: which experts are outliers, by their matrices.
    Raises AtlasError when the reference has another hidden width, or a weight is not finite.
    """
    if reference is not None:
        check_width(bank, reference, model)
    points, ratios = [tables.empty("projection")], [tables.empty("explained_variance")]
    for name, weights in bank.matrices.items():
        other = getattr(reference, name) if reference is not None else None
        fixed = {"model": model, "layer": layer, "matrix": name}
        try:
            for level in (_matrix_level(weights, other, rule), _neuron_level(weights, other, name, max_neurons)):
                points.append(_points(level, fixed))
                ratios.append(_ratios(level, fixed))
        except FloatingPointError:
            raise AtlasError(
                f"{model}, layer {layer}: {name} holds values that are not finite; "
                "check the checkpoint's files against their published hashes."
            ) from None
    return pl.concat(points), pl.concat(ratios)


@dataclass(frozen=True)
class _Level:
    """One level of one matrix: its components, the shape they are of, and the columns that name the points."""

    name: str
    components: Components
    shape: tuple[int, int]
    columns: dict


def _matrix_level(weights: torch.Tensor, other: torch.Tensor | None, rule: OutlierRule) -> _Level:
    same = [other] if other is not None and other.shape == weights.shape[1:] else []
    found = matrix_components(weights, same)
    points, size = len(weights) + len(same), weights[0].numel()
    outlier, null = [None] * points, None
    if found.coordinates.shape[1] > 1:
        outlier, null = rule.find(found.coordinates, size)
    labels = [*map(str, range(len(weights))), *[REFERENCE] * len(same)]
    columns = {"expert": labels, "neuron": [None] * points, "outlier": outlier, "null_outlier": [null] * points}
    return _Level("matrix", found, (points, size), columns)


def _neuron_level(weights: torch.Tensor, other: torch.Tensor | None, name: str, most: int) -> _Level:
    parts = [weight.T if name == "down" else weight for weight in weights]
    parts += [] if other is None else [(other.T if name == "down" else other).to(weights.device)]
    lengths = [len(part) for part in parts]
    kept = evenly(sum(lengths), most)
    found = neuron_components(parts, kept)
    labels = [*map(str, range(len(weights))), *[REFERENCE] * (other is not None)]
    columns = {
        "expert": np.repeat(labels, lengths)[kept],
        "neuron": np.concatenate([np.arange(length) for length in lengths])[kept],
        "outlier": [None] * len(kept),
        "null_outlier": [None] * len(kept),
    }
    return _Level("neuron", found, (sum(lengths), parts[0].shape[1]), columns)


def _points(level: _Level, fixed: dict) -> pl.DataFrame:
    found = level.components.coordinates
    scores = {f"pc{i + 1}": found[:, i] if i < found.shape[1] else [None] * len(found) for i in range(COMPONENTS)}
    frame = pl.DataFrame(level.columns | scores)
    constants = fixed | {"level": level.name}
    return tables.conform("projection", frame.with_columns(**{key: pl.lit(value) for key, value in constants.items()}))


def _ratios(level: _Level, fixed: dict) -> pl.DataFrame:
    found = level.components.ratios
    means, spreads = null_ratios(*level.shape, len(found))
    frame = pl.DataFrame(
        {
            "component": np.arange(1, len(found) + 1),
            "ratio": pl.Series(found, dtype=pl.Float64).fill_nan(None),
            "null_ratio": means,
            "null_sd": spreads,
        }
    )
    constants = fixed | {"level": level.name}
    return tables.conform(
        "explained_variance", frame.with_columns(**{key: pl.lit(value) for key, value in constants.items()})
    )
