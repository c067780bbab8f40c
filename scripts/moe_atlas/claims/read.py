"""From tables to arrays: squares of pairs by layer, and means by block of documents."""

import numpy as np
import polars as pl

from moe_atlas.claims.estimate import NotEnough

MATRICES = ("up", "act", "down")
_NUMBER = r"^\d+$"


def routed(frame: pl.DataFrame) -> pl.DataFrame:
    """Pairs of different routed experts."""
    numbers = pl.col("a").str.contains(_NUMBER) & pl.col("b").str.contains(_NUMBER)
    return frame.filter(numbers & (pl.col("a") != pl.col("b")))


def pairs_with(frame: pl.DataFrame, label: str) -> pl.DataFrame:
    """Pairs of a routed expert and the entry `label`, such as F."""
    return frame.filter(pl.col("a").str.contains(_NUMBER) & (pl.col("b") == label))


def square(frame: pl.DataFrame, value: str, what: str) -> tuple[list[int], np.ndarray]:
    """Pairs (layer, a, b, value) of routed experts to the layers' numbers and (L, N, N) float64, diagonal 0.

    what: names the pairs in the sentence of NotEnough, raised when there are none, a pair has no value, or layers have
    different numbers of experts.
    """
    frame = routed(frame)
    if frame.is_empty():
        raise NotEnough(f"there is no {what}")
    layers = sorted(frame["layer"].unique().to_list())
    first, second = (frame[name].cast(pl.Int64).to_numpy() for name in ("a", "b"))
    experts = int(max(first.max(), second.max())) + 1
    place = np.searchsorted(layers, frame["layer"].to_numpy())
    found = np.full((len(layers), experts, experts), np.nan)
    found[place, first, second] = found[place, second, first] = frame[value].to_numpy()
    found[:, np.arange(experts), np.arange(experts)] = 0
    if not np.isfinite(found).all():
        raise NotEnough(f"layers have different numbers of experts, or a pair has no {what}")
    return layers, found


def weights(similarity: pl.DataFrame, level: str, matrices=MATRICES) -> tuple[list[int], dict[str, np.ndarray]]:
    """Similarity of each matrix that the model has (experts without a gate have no act), by layer."""
    found = {}
    for matrix in matrices:
        part = similarity.filter(matrix=matrix, level="matrix" if matrix == "router" else level)
        if len(routed(part)):
            layers, found[matrix] = square(part, "cosine", f"similarity of {matrix}")
    if not found or len({len(s) for s in found.values()}) != 1:
        raise NotEnough("there is no weight similarity of all layers")
    return layers, found


def mean_weights(similarity: pl.DataFrame) -> tuple[list[int], np.ndarray]:
    """Matrix-level similarity, mean over the matrices, (L, N, N)."""
    layers, found = weights(similarity, "matrix")
    return layers, np.mean(list(found.values()), axis=0)


def outputs(table: pl.DataFrame) -> tuple[list[int], np.ndarray]:
    """Mean cosine of outputs over tokens, the first of each sequence left out, (L, N, N)."""
    return square(table, "cosine_mean_content", "output similarity")


def blocks(documents: pl.DataFrame, *measures: str) -> tuple[list[int], np.ndarray, np.ndarray]:
    """Layers, values and tokens of measures of the table documents, (B, L, len(measures)) each; 0 tokens where null."""
    part = documents.filter(pl.col("measure").is_in(measures))
    if part["measure"].n_unique() != len(measures):
        raise NotEnough(f"the table documents has no {' and '.join(measures)}")
    layers, numbers = (sorted(part[name].unique().to_list()) for name in ("layer", "block"))
    values = np.zeros((len(numbers), len(layers), len(measures)))
    tokens = np.zeros_like(values)
    place = (
        np.searchsorted(numbers, part["block"].to_numpy()),
        np.searchsorted(layers, part["layer"].to_numpy()),
        part["measure"].replace_strict({name: i for i, name in enumerate(measures)}, return_dtype=pl.Int64).to_numpy(),
    )
    known = part["value"].is_not_null().to_numpy() & np.isfinite(part["value"].fill_null(np.nan).to_numpy())
    values[place] = np.where(known, part["value"].fill_null(0.0).to_numpy(), 0.0)
    tokens[place] = np.where(known, part["tokens"].to_numpy(), 0)
    if not (tokens.sum(0) > 0).all():
        raise NotEnough(f"a layer has no {' and '.join(measures)}")
    return layers, values, tokens


def cross(table: pl.DataFrame, value: str) -> np.ndarray:
    """Table norm_score_cross to the share of tokens, or mean product, (L, N, N): [norm of expert, score of expert]."""
    if table.is_empty():
        raise NotEnough("there is no table of norms against scores")
    layers = sorted(table["layer"].unique().to_list())
    first, second = (table[name].cast(pl.Int64).to_numpy() for name in ("norm_expert", "score_expert"))
    experts = int(first.max()) + 1
    found = np.full((len(layers), experts, experts), np.nan)
    place = np.searchsorted(layers, table["layer"].to_numpy())
    found[place, first, second] = (table[value] / table["tokens"]).to_numpy()
    if not np.isfinite(found).all():
        raise NotEnough("layers have different numbers of experts")
    return found
