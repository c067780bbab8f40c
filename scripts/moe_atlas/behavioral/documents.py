"""Tables documents and activation_ratio: means by block of documents, and how many neurons of an expert are active.

Numpy in, polars out. Each builder takes the recorded arrays of a layer and site (see activations.py) and `labels`, the
N routed experts first. Source of the activation ratio: A Closer Look into Mixture-of-Experts (arXiv 2406.18219),
appendix H, which gives it at the threshold 0.001, one number a model.
"""

import numpy as np
import polars as pl

from moe_atlas.behavioral.activations import Arrays
from moe_atlas.tables import DOCUMENT_MEASURES

# Thresholds of the table: 0 and 0.001 times these; each is an edge of the histogram.
_FACTORS = 2.0 ** np.arange(-7, 8)


def documents(arrays: Arrays, labels: list[str]) -> pl.DataFrame:
    """Mean of each measure over the tokens of each block; null where no token of the block has a value.

    A measure whose name ends in _first is over the tokens at position 0, any other over all the others. Measures that
    no token of the layer has, such as a cosine with a reference that there is not, have no rows.
    """
    frames = []
    for suffix, sums, counts in zip(("", "_first"), arrays["document_sum"], arrays["document_count"], strict=True):
        for number, measure in enumerate(DOCUMENT_MEASURES):
            tokens = counts[:, number]
            if not tokens.any():
                continue
            means = np.divide(sums[:, number], tokens, out=np.full(len(tokens), np.nan), where=tokens > 0)
            frame = pl.DataFrame({"block": np.arange(len(tokens)), "tokens": tokens, "value": means})
            frames.append(frame.with_columns(pl.lit(measure + suffix).alias("measure"), pl.col("value").fill_nan(None)))
    return pl.concat(frames)


def activation_ratio(arrays: Arrays, labels: list[str]) -> pl.DataFrame:
    """Share of each expert's neurons, over all tokens, with |a| above a threshold; no rows without an activation."""
    empty = {"expert": pl.String, "threshold": pl.Float64, "ratio": pl.Float64, "tokens": pl.Int64}
    if "activation_histogram" not in arrays:
        return pl.DataFrame(schema=empty)
    histogram, edges = arrays["activation_histogram"], arrays["activation_edges"]
    thresholds = np.concatenate([[0.0], 0.001 * _FACTORS])
    # Edges are those numbers in float32, in which activations are compared.
    places = np.searchsorted(edges, thresholds.astype(np.float32).astype(np.float64))
    above = histogram.sum(1, keepdims=True) - histogram.cumsum(1)[:, places]
    ratio = above / histogram.sum(1, keepdims=True)
    experts = len(histogram)
    return pl.DataFrame(
        {
            "expert": np.repeat(labels[:experts], len(thresholds)),
            "threshold": np.tile(thresholds, experts),
            "ratio": ratio.ravel(),
            "tokens": np.full(ratio.size, arrays["tokens"][0]),
        },
        schema=empty,
    )
