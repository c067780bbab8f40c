"""Every table's columns, declared once: the data contract.

One row is one observation. Layers count from 0. Expert labels are strings: "0"... routed
experts, "F" the dense reference's FFN on its own model's hidden states, "F_same_input" the
same FFN on the MoE's inputs, "SE" the shared expert. Pairs are kept once, a before b in the
order of the labels, diagonal included. A dense model has the same tables; only tokens has rows.
"""

import os

import polars as pl

from moe_atlas.errors import AtlasError
from moe_atlas.files import atomic_path
from moe_atlas.tables.across import ACROSS
from moe_atlas.tables.behavioral import BEHAVIORAL, CHOOSING_SCORES, DOCUMENT_MEASURES, GROUPINGS, SCORES
from moe_atlas.tables.columns import Table
from moe_atlas.tables.emoe import EMOE
from moe_atlas.tables.heads import FORMS, HEADS
from moe_atlas.tables.moa import MOA
from moe_atlas.tables.parametric import PARAMETRIC
from moe_atlas.tables.tuning import TUNING

__all__ = [
    "ACROSS",
    "ALL",
    "CHOOSING_SCORES",
    "DOCUMENT_MEASURES",
    "EMOE",
    "FORMS",
    "GROUPINGS",
    "HEADS",
    "MOA",
    "SCORES",
    "TABLES",
    "TUNING",
    "Table",
    "conform",
    "declared",
    "empty",
    "read",
    "write",
]

# Of one model. `domain` compares the texts of one model, which is why it is among the behavioral ones.
TABLES: dict[str, Table] = PARAMETRIC | BEHAVIORAL
ALL: dict[str, Table] = TABLES | ACROSS | EMOE | TUNING | MOA | HEADS


def declared(name: str) -> Table:
    """The table of this name: of one model, across models, of EMoE, of fine-tuning, of MoA or of attention experts."""
    return ALL[name]


def conform(name: str, frame: pl.DataFrame) -> pl.DataFrame:
    """Give `frame` the declared columns in the declared order and dtypes.

    Raises AtlasError when a column is missing or too many; a column is never filled in.
    """
    schema = declared(name).schema
    if set(frame.columns) != set(schema):
        missing, extra = set(schema) - set(frame.columns), set(frame.columns) - set(schema)
        raise AtlasError(f"table {name}: columns missing {sorted(missing)}, not declared {sorted(extra)}.")
    return frame.select(pl.col(column).cast(dtype) for column, dtype in schema.items())


def empty(name: str) -> pl.DataFrame:
    """The table with its columns and no rows."""
    return pl.DataFrame(schema=declared(name).schema)


def write(name: str, frame: pl.DataFrame, path: str | os.PathLike, csv: str | os.PathLike | None = None) -> None:
    """Write one table as zstd parquet, and as CSV where `csv` names a file, atomically, after checking its columns."""
    frame = conform(name, frame)
    with atomic_path(path) as temporary:
        frame.write_parquet(temporary, compression="zstd")
    if csv is not None:
        with atomic_path(csv) as temporary:
            frame.write_csv(temporary)


def read(name: str, path: str | os.PathLike) -> pl.DataFrame:
    """Read one table; a file that is missing or has other columns is an AtlasError naming it."""
    try:
        frame = pl.read_parquet(path)
    except (FileNotFoundError, pl.exceptions.ComputeError) as error:
        raise AtlasError(f"{path}: this is not a readable parquet table ({error}); delete it and run again.") from None
    if dict(frame.schema) != declared(name).schema:
        raise AtlasError(f"{path}: these are not the columns of the table {name}; delete it and run again.")
    return frame
