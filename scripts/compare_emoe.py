"""Put the runs of all jobs together and compare the arms seed by seed, as parquet and as CSV."""

import argparse
from pathlib import Path

import polars as pl

from moe_atlas import tables
from moe_atlas.log import run, say
from moe_atlas.tuning.differences import differences


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", nargs="+", required=True, help="tables emoe_runs of the jobs (parquet)")
    parser.add_argument("--selection", nargs="+", required=True, help="their tables emoe_training_selection (parquet)")
    parser.add_argument("--output", type=Path, required=True, help="folder of the tables to write")
    arguments = parser.parse_args()
    runs = pl.concat(tables.read("emoe_runs", path) for path in arguments.runs)
    selection = pl.concat(tables.read("emoe_training_selection", path) for path in arguments.selection)
    found = {"emoe_runs": runs, "emoe_differences": differences(runs), "emoe_training_selection": selection}
    for name, frame in found.items():
        path = arguments.output / f"{name}.parquet"
        tables.write(name, frame, path, path.with_suffix(".csv"))
        say(f"{name}: {len(frame)} rows")


if __name__ == "__main__":
    run(main)
