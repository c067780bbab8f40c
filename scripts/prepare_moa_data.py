"""Make token ids and a tokenizer of the data sets that a file names, for the MoA experiments at full scale."""

import argparse
from pathlib import Path

from moe_atlas.log import run
from moe_atlas.moa.prepare import prepare


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--file", required=True, help="data sets, their columns and the size of the tokenizer (yaml)")
    parser.add_argument("--output", required=True, type=Path, help="done.json, written last; the rest goes beside it")
    arguments = parser.parse_args()
    prepare(arguments.file, arguments.output)


if __name__ == "__main__":
    run(main)
