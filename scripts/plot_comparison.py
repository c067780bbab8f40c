"""Draw one figure across all models; the figure's name says which comparison."""

import argparse
from pathlib import Path

from moe_atlas.files import read_json
from moe_atlas.log import run
from moe_atlas.plotting.registry import COMPARISONS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--figure", required=True, type=Path, help=f"png to write, NAME.png with NAME one of {', '.join(COMPARISONS)}"
    )
    parser.add_argument("--pdf", required=True, type=Path, help="pdf to write")
    parser.add_argument("--table", required=True, action="append", type=Path, help="a table of results/tables; repeat")
    parser.add_argument(
        "--checkpoints", nargs="*", default=[], type=Path, help="checkpoint.json of the models, for sizes and the null"
    )
    parser.add_argument("--corpora", nargs="*", help="corpora to draw, in this order (default: the four largest)")
    args = parser.parse_args()

    from moe_atlas.plotting.comparison import compare
    from moe_atlas.plotting.model import read_tables
    from moe_atlas.plotting.style import save

    checkpoints = [read_json(path) for path in args.checkpoints]
    checkpoints = {checkpoint["model"]: checkpoint for checkpoint in checkpoints}
    figure = compare(args.figure.stem, read_tables(args.table), checkpoints, args.corpora)
    save(figure, args.pdf)
    save(figure, args.figure)


if __name__ == "__main__":
    run(main)
