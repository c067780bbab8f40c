"""Judge the claims of the sheet for every model, as parquet and as CSV."""

import argparse
from pathlib import Path

import polars as pl

from moe_atlas import tables
from moe_atlas.claims.judge import TABLES, judge
from moe_atlas.claims.sheet import load_claims
from moe_atlas.files import read_json
from moe_atlas.log import run, say
from moe_atlas.scan import scan


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--claims", required=True, help="sheet of claims (tsv)")
    parser.add_argument(
        "--table", action="append", default=[], type=Path, help=f"results/tables/NAME.parquet: {', '.join(TABLES)}"
    )
    parser.add_argument("--checkpoints", required=True, nargs="+", help="checkpoint.json of the models, in their order")
    parser.add_argument("--corpora", nargs="*", default=[], help="ids of the long corpora")
    parser.add_argument("--seed", required=True, type=int, help="seed of permutations and resampling, 0 or more")
    parser.add_argument("--parquet", required=True, help="table to write (parquet)")
    parser.add_argument("--csv", required=True, help="the same as CSV; an empty field is a missing value")
    arguments = parser.parse_args()
    claims = load_claims(arguments.claims)
    paths, found = {path.stem: path for path in arguments.table}, [tables.empty("claims")]
    for checkpoint in map(read_json, arguments.checkpoints):
        model = checkpoint["model"]
        frames = {name: of_model(name, paths.get(name), model) for name in TABLES}
        found.append(judge(model, frames, checkpoint, claims, arguments.corpora, arguments.seed))
        verdicts = found[-1]["verdict"].value_counts(sort=True).rows()
        say(f"{model}: " + ", ".join(f"{count} {verdict}" for verdict, count in verdicts))
    frame = pl.concat(found)
    tables.write("claims", frame, arguments.parquet, arguments.csv)
    say(f"claims: {len(frame)} rows written to {arguments.parquet}")


def of_model(name: str, path: Path | None, model: str) -> pl.DataFrame:
    """The rows of one model; none of a table that no corpus of the sheet has."""
    if path is None:
        return tables.empty(name)
    return scan(name, path).filter(pl.col("model") == model).collect()


if __name__ == "__main__":
    run(main)
