"""Write a table frame by frame, so that memory holds one layer however many there are."""

import os
from collections.abc import Iterable, Iterator

import polars as pl
from polars.io.plugins import register_io_source

from moe_atlas import tables
from moe_atlas.files import atomic_path

ROWS_PER_GROUP = 1 << 18


def write_frames(name: str, frames: Iterable[pl.DataFrame], path: str | os.PathLike) -> int:
    """Write the frames of table `name` one after another as zstd parquet, atomically; return the rows.

    An exception raised while a frame is made leaves `path` as it was and reaches the caller as it is.
    """
    rows = 0

    def source(columns, predicate, row_limit, batch_size) -> Iterator[pl.DataFrame]:  # a plain sink asks for all
        nonlocal rows
        for frame in frames:
            rows += len(frame)
            yield tables.conform(name, frame)

    with atomic_path(path) as temporary:
        lazy = register_io_source(source, schema=tables.TABLES[name].schema)
        lazy.sink_parquet(temporary, compression="zstd", row_group_size=ROWS_PER_GROUP)
    return rows
