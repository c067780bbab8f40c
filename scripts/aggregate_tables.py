"""Put one table of all models together, as parquet and as CSV."""

import argparse

import polars as pl

from moe_atlas import tables
from moe_atlas.errors import AtlasError
from moe_atlas.files import atomic_path
from moe_atlas.log import run, say
from moe_atlas.scan import scan

ROWS_PER_GROUP = 1 << 18


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--table", required=True, choices=tables.TABLES | tables.EMOE | tables.HEADS, help="which table"
    )
    parser.add_argument(
        "--inputs", required=True, nargs="+", help="the models' parquet files, in the order of the rows"
    )
    parser.add_argument("--parquet", required=True, help="table to write (parquet)")
    parser.add_argument("--csv", required=True, help="the same as CSV; an empty field is a missing value")
    arguments = parser.parse_args()
    together = pl.concat([scan(arguments.table, path) for path in arguments.inputs])
    with atomic_path(arguments.parquet) as parquet, atomic_path(arguments.csv) as csv:
        try:
            together.sink_parquet(parquet, compression="zstd", row_group_size=ROWS_PER_GROUP)
        except pl.exceptions.ComputeError as error:
            inputs = ", ".join(arguments.inputs)
            raise AtlasError(f"one of {inputs} is damaged ({error}); delete it and run again.") from None
        pl.scan_parquet(parquet).sink_csv(csv)
    rows = pl.scan_parquet(arguments.parquet).select(pl.len()).collect().item()
    say(f"{arguments.table}: {rows} rows of {len(arguments.inputs)} files written to {arguments.parquet}")


if __name__ == "__main__":
    run(main)
