"""The tables of a model's weights, put together from parts. Nothing here imports torch."""

from collections.abc import Sequence

import polars as pl

# Made together, in one read of the weights.
NAMES = ("similarity", "matching", "projection", "explained_variance")


def gathered(parts: Sequence[pl.DataFrame]) -> pl.DataFrame:
    """One table of parts whose rows are in order within each layer: layers in order, within a layer part after part.

    In one piece, so that the file it is written to does not depend on how many parts there were.
    """
    return pl.concat(parts).sort("layer", maintain_order=True).rechunk()
