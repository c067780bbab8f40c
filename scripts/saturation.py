"""Compare the choices of the models of each series with those of its last model, as parquet and as CSV."""

import argparse

from moe_atlas import tables
from moe_atlas.behavioral.saturation import Choices, saturation
from moe_atlas.log import run, say


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--choices",
        action="append",
        default=[],
        nargs=6,
        metavar=("SERIES", "MODEL", "CORPUS", "ROUTING", "LOAD", "TOKENS"),
        help="a model of a series on a short corpus, with three of its tables; once for each, in the sheet's order",
    )
    parser.add_argument("--parquet", required=True, help="table to write (parquet)")
    parser.add_argument("--csv", required=True, help="the same as CSV; an empty field is a missing value")
    arguments = parser.parse_args()
    names = ("routing", "load", "tokens")
    recorded = [
        Choices(*ids[:3], *(tables.read(name, path) for name, path in zip(names, ids[3:], strict=True)))
        for ids in arguments.choices
    ]
    frame = saturation(recorded)
    tables.write("saturation", frame, arguments.parquet, arguments.csv)
    say(f"saturation: {len(frame)} rows written to {arguments.parquet}")


if __name__ == "__main__":
    run(main)
