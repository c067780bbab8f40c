"""Cosine similarity of a layer's experts: their weight matrices, their mean neurons, their router rows.

Source: A Closer Look into Mixture-of-Experts (arXiv 2406.18219), sections 4.1.1 (matrix level),
4.1.2 and appendix D (neuron level by averaging), 4.2 and appendix E (router).

All pairs of a matrix come from one Gram matrix, accumulated over blocks of rows, so that the
weights are read once and never copied whole. Threads share the rows in the same spans, however many
they are. Products are float32 over at most 256 terms and their sums float64: longer float32 sums of
squares lose up to 1e-4 of a cosine at 1e6 terms.
"""

import math
from collections.abc import Iterator

import numpy as np
import polars as pl
import torch

from moe_atlas import tables
from moe_atlas.architectures.bank import FFN, ExpertBank
from moe_atlas.errors import AtlasError
from moe_atlas.parallel import each

REFERENCE, SHARED = "F", "SE"
_SMALLEST_NORM = 1e-8
_TERMS = 256  # length of a float32 dot product
_SPANS = 64  # of rows: each is summed up by one thread
_BLOCK_CPU, _BLOCK_GPU = 1 << 20, 1 << 24  # float32 numbers converted at once: 4 MiB, the size of a cache; 64 MiB


def gram_and_means(
    bank: torch.Tensor, extras: list[torch.Tensor], *, mean_axis: int, block: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Inner products of all flattened matrices, and the mean of each one's rows or columns, in one pass.

    bank: (N, rows, columns); extras: matrices (rows, columns); M = N + len(extras).
    mean_axis: 0 averages the rows (up, act: neurons are rows), 1 the columns (down).
    block: float32 numbers held at once, at least enough rows for whole dot products.
    Returns the Gram matrix (M, M) and the means (M, columns) or (M, rows), float64, on the bank's device.
    """
    experts, rows, columns = bank.shape
    count = experts + len(extras)

    def summed(span: slice) -> tuple[torch.Tensor, torch.Tensor]:
        gram = torch.zeros(count, count, dtype=torch.float64, device=bank.device)
        sums = []
        for _, part in row_blocks(bank[:, span], [extra[span] for extra in extras], block):
            add_products(gram, part.flatten(1))
            # Mean neurons of upcycled experts differ in the fourth digit, and a regression divides by that.
            sums.append(part.double().sum(1 if mean_axis == 0 else 2))
            if mean_axis == 0:
                sums = [sum(sums)]
        return gram, torch.cat(sums, 1)

    grams, sums = zip(*each(summed, row_spans(bank)), strict=True)
    means = sum(sums) / rows if mean_axis == 0 else torch.cat(sums, 1) / columns
    return sum(grams), means


def row_spans(bank: torch.Tensor) -> list[slice]:
    """The rows of bank (N, rows, columns) in spans that threads share: whole dot products, the same for any number."""
    rows, columns = bank.shape[1:]
    whole = _whole_rows(columns)
    step = rows if bank.is_cuda else whole * max(1, math.ceil(rows / _SPANS / whole))
    return [slice(first, min(first + step, rows)) for first in range(0, rows, step)]


def _whole_rows(columns: int) -> int:
    """Fewest rows that are a whole number of dot products, so that the size of a block does not move their ends."""
    return _TERMS // math.gcd(_TERMS, columns)


def row_blocks(
    bank: torch.Tensor, extras: list[torch.Tensor], block: int | None = None
) -> Iterator[tuple[int, torch.Tensor]]:
    """The same rows of all matrices, block after block: the first row's number and (M, block rows, columns) float32.

    bank: (N, rows, columns); extras: matrices (rows, columns); M = N + len(extras). `block`: as in gram_and_means.
    The memory is used again for the next block, so that a block may be changed in place.
    """
    experts, rows, columns = bank.shape
    count = experts + len(extras)
    if block is None:
        block = _BLOCK_GPU if bank.is_cuda else _BLOCK_CPU
    whole = _whole_rows(columns)
    step = min(rows, max(1, block // (count * columns * whole)) * whole)
    buffer = torch.empty(count, step, columns, dtype=torch.float32, device=bank.device)
    for first in range(0, rows, step):
        last = min(rows, first + step)
        part = buffer[:, : last - first]
        part[:experts].copy_(bank[:, first:last])
        for row, extra in enumerate(extras, start=experts):
            part[row].copy_(extra[first:last])
        yield first, part


def add_products(gram: torch.Tensor, vectors: torch.Tensor) -> None:
    """Add vectors (M, n) float32 times their transpose to gram (M, M) float64."""
    whole = vectors.shape[1] // _TERMS * _TERMS
    if whole:
        pieces = vectors[:, :whole].unflatten(1, (-1, _TERMS)).transpose(0, 1)
        gram += torch.bmm(pieces, pieces.transpose(1, 2)).sum(0, dtype=torch.float64)
    rest = vectors[:, whole:]
    if rest.shape[1]:
        gram += rest @ rest.T


def _products(rows: torch.Tensor) -> torch.Tensor:
    """Inner products (M, M) of rows (M, n), computed by one thread."""
    return each(lambda vectors: vectors @ vectors.T, [rows])[0]


def _cosines(gram: torch.Tensor) -> np.ndarray:
    """(M, M) cosines from a Gram matrix, as numpy: symmetric, in -1..1, norms counted as 1e-8 at least."""
    gram = gram.cpu().numpy()
    lengths = np.maximum(np.sqrt(np.diagonal(gram)), _SMALLEST_NORM)
    return np.clip((gram + gram.T) / 2 / lengths[:, None] / lengths[None, :], -1, 1)


def _frame(matrix: str, level: str, labels: list[str], gram: torch.Tensor) -> pl.DataFrame:
    first, second = np.triu_indices(len(labels))
    names = pl.Series(labels, dtype=pl.String)
    return pl.DataFrame(
        {"a": names[first], "b": names[second], "cosine": _cosines(gram)[first, second]},
    ).with_columns(matrix=pl.lit(matrix), level=pl.lit(level))


def _extra_matrices(bank: ExpertBank, reference: FFN | None, name: str) -> dict[str, torch.Tensor]:
    ffns = {REFERENCE: reference, SHARED: bank.shared}
    found = {label: getattr(ffn, name) for label, ffn in ffns.items() if ffn is not None}
    return {label: matrix for label, matrix in found.items() if matrix is not None}


def _matrix_frames(name: str, weights: torch.Tensor, others: dict[str, torch.Tensor]) -> list[pl.DataFrame]:
    """Both levels of one matrix. Entries of another shape than an expert's only have a mean neuron."""
    mean_axis = 1 if name == "down" else 0
    same = {label: other for label, other in others.items() if other.shape == weights.shape[1:]}
    routed = [str(expert) for expert in range(len(weights))]
    gram, means = gram_and_means(weights, list(same.values()), mean_axis=mean_axis)
    entries = dict(zip([*routed, *same], means, strict=True))
    for label, other in others.items():
        if label not in same:
            other = other.to(weights.device)[None]
            entries[label] = gram_and_means(other, [], mean_axis=mean_axis)[1][0]
    labels = [*routed, *others]
    means = torch.stack([entries[label] for label in labels])
    return [_frame(name, "matrix", [*routed, *same], gram), _frame(name, "neuron_mean", labels, _products(means))]


def check_width(bank: ExpertBank, reference: FFN, model: str) -> None:
    """Raise AtlasError when the experts and the reference's FFN have other hidden widths d."""
    ours, theirs = bank.up.shape[-1], reference.up.shape[-1]
    if ours != theirs:
        raise AtlasError(
            f"{model}: its hidden width is {ours} and that of its dense reference is {theirs}; "
            "in config/models.tsv name a model of the same width in the column dense_reference, or leave it empty."
        )


def weight_similarity(bank: ExpertBank, *, model: str, layer: int, reference: FFN | None = None) -> pl.DataFrame:
    """Table "similarity" of one layer: all pairs once, a before b, diagonal included.

    Entries are the N routed experts, then "F" (`reference`, the dense model's FFN of the same
    layer) and "SE" (the shared expert). Level "matrix" has F and SE only where their shape is an
    expert's; level "neuron_mean" always. The router has its rows' cosines at level "matrix".
    Weights of any floating dtype are read as float32; cosines are right to about 1e-7.
    Raises AtlasError when the reference has another hidden width, or a weight is not finite.
    """
    if reference is not None:
        check_width(bank, reference, model)
    frames = []
    for name, weights in bank.matrices.items():
        frames += _matrix_frames(name, weights, _extra_matrices(bank, reference, name))
    if bank.router is not None:
        rows = bank.router.to(torch.float64)
        frames.append(_frame("router", "matrix", [str(expert) for expert in range(len(bank))], _products(rows)))
    frame = pl.concat(frames)
    broken = frame.filter(~pl.col("cosine").is_finite())
    if len(broken):
        matrix, entry = broken.row(0, named=True)["matrix"], broken.row(0, named=True)["a"]
        raise AtlasError(
            f"{model}, layer {layer}: {matrix} of expert {entry} holds values that are not finite; "
            "check the checkpoint's files against their published hashes."
        )
    return tables.conform("similarity", frame.with_columns(model=pl.lit(model), layer=pl.lit(layer)))
