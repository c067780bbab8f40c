"""Set our numbers beside those that the paper published, as parquet and as CSV."""

import argparse
from collections import defaultdict
from functools import cache
from pathlib import Path

import polars as pl

from moe_atlas import tables
from moe_atlas.claims.published import TABLES, compare, load_published
from moe_atlas.files import read_json
from moe_atlas.log import run, say
from moe_atlas.scan import scan


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--published", required=True, help="sheet of published numbers (tsv)")
    parser.add_argument(
        "--table", action="append", default=[], type=Path, help=f"results/tables/NAME.parquet: {', '.join(TABLES)}"
    )
    parser.add_argument("--checkpoints", required=True, nargs="+", help="checkpoint.json of the models, in their order")
    parser.add_argument(
        "--paper-rounding", action="store_true", help="round similarities to bfloat16 first, as the paper's code did"
    )
    parser.add_argument("--parquet", required=True, help="table to write (parquet)")
    parser.add_argument("--csv", required=True, help="the same as CSV; an empty field is a missing value")
    arguments = parser.parse_args()
    paths, rows = {path.stem: path for path in arguments.table}, defaultdict(list)
    for checkpoint in map(read_json, arguments.checkpoints):
        scheme, _, repository = checkpoint["source"].partition(":")
        if scheme == "hf":
            rows[repository].append(checkpoint["model"])

    @cache
    def frame_of(model: str, corpus: str, name: str) -> pl.DataFrame:
        if name not in paths:
            return tables.empty(name)
        rows_of_model = scan(name, paths[name]).filter(pl.col("model") == model)
        if corpus and "corpus" in tables.declared(name).schema:
            rows_of_model = rows_of_model.filter(pl.col("corpus") == corpus)
        return rows_of_model.collect()

    def frames_of(model: str, corpus: str, names: tuple[str, ...]) -> dict[str, pl.DataFrame]:
        return {name: frame_of(model, corpus, name) for name in names}

    frame = compare(load_published(arguments.published), rows, frames_of, arguments.paper_rounding)
    tables.write("published", frame, arguments.parquet, arguments.csv)
    compared, agree = frame["agrees"].drop_nulls().len(), frame["agrees"].sum()
    say(f"published: {len(frame)} numbers, {compared} beside ours, of which {agree} agree")


if __name__ == "__main__":
    run(main)
