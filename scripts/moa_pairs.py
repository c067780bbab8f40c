"""Write the first test of a translation task as token ids: columns source, target and document."""

import argparse
from pathlib import Path

import polars as pl

from moe_atlas.errors import AtlasError
from moe_atlas.files import atomic_path
from moe_atlas.log import run, say
from moe_atlas.moa.settings import load_settings


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--settings", required=True, help="file with the objectives (yaml)")
    parser.add_argument("--objective", required=True, help="id of a translation objective in it")
    parser.add_argument("--data", type=Path, help="of a source data:FILE, the folder of its token ids")
    parser.add_argument("--output", required=True, help="parquet to write")
    arguments = parser.parse_args()
    tasks = load_settings(arguments.settings).tasks
    if arguments.objective not in tasks or tasks[arguments.objective].kind != "translation":
        raise AtlasError(f"{arguments.settings}: there is no translation objective {arguments.objective}; name one.")

    from moe_atlas.moa.registry import objective_of

    objective = objective_of(tasks[arguments.objective], arguments.data)
    pairs = objective.pairs[objective.tests[0]]
    sides = {
        name: [[int(token) for token in side[place]] for place in range(len(side))]
        for name, side in (("source", pairs.source), ("target", pairs.target))
    }
    schema = {name: pl.List(pl.Int64) for name in sides} | {"document": pl.Int64}
    frame = pl.DataFrame(sides | {"document": range(len(pairs.source))}, schema=schema)
    with atomic_path(arguments.output) as temporary:
        frame.write_parquet(temporary, compression="zstd")
    say(f"{arguments.objective}: {len(frame)} pairs of {objective.tests[0]}")


if __name__ == "__main__":
    run(main)
