"""Make one corpus from a data set of the Hub: fetch its files, cut its texts into sequences, write them as parquet."""

import argparse

from moe_atlas.corpora import RULES
from moe_atlas.corpora.hub import fetch
from moe_atlas.files import atomic_path
from moe_atlas.log import run, say


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--corpus", required=True, help="row id of config/corpora.tsv")
    parser.add_argument("--repository", required=True, help="OWNER/NAME on the Hub")
    parser.add_argument("--revision", required=True, help="commit of the data set, 40 hex digits")
    parser.add_argument("--subset", default="", help="subset (configuration); its only or default one if not given")
    parser.add_argument("--split", required=True, help="split that is read, test for example")
    parser.add_argument("--column", default="text", help="column that holds the texts")
    parser.add_argument("--kind", required=True, choices=("short", "long"), help="short corpora keep a row a token")
    parser.add_argument("--rule", required=True, choices=RULES, help="how a text becomes sequences")
    parser.add_argument("--start-at", default="", help="line at which reading starts, the beginning if not given")
    parser.add_argument("--max-sequences", type=int, default=0, help="keep the first so many sequences (0: all)")
    parser.add_argument("--output", required=True, help="parquet file to write")
    arguments = parser.parse_args()

    frame = fetch(
        arguments.corpus,
        arguments.repository,
        arguments.revision,
        arguments.subset,
        arguments.split,
        arguments.column,
        arguments.rule,
        arguments.max_sequences,
        arguments.start_at,
    )
    with atomic_path(arguments.output) as temporary:
        frame.write_parquet(temporary, compression="zstd")
    say(
        f"{arguments.corpus} ({arguments.kind}): {len(frame)} sequences from {frame['document'].n_unique()} rows, "
        f"{frame['text'].str.len_chars().sum()} characters"
    )


if __name__ == "__main__":
    run(main)
