"""Read a table of many models without holding it in memory."""

import os

import polars as pl

from moe_atlas import tables
from moe_atlas.errors import AtlasError


def scan(name: str, path: str | os.PathLike) -> pl.LazyFrame:
    """One table, unread; its columns are checked from the file's footer. AtlasError where it is missing or another."""
    try:
        frame = pl.scan_parquet(path)
        schema = dict(frame.collect_schema())
    except (FileNotFoundError, pl.exceptions.ComputeError) as error:
        raise AtlasError(f"{path}: this is not a readable parquet table ({error}); delete it and run again.") from None
    wanted = tables.declared(name).schema
    if schema != wanted or list(schema) != list(wanted):
        raise AtlasError(f"{path}: these are not the columns of the table {name}; delete it and run again.")
    return frame
