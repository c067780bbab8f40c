"""Draw one figure of the attention experts of one model; the figure's name says which, and for which corpus."""

import argparse
from pathlib import Path

from moe_atlas.log import run
from moe_atlas.plotting.registry import HEADS_FIGURES


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, help="model of the tables")
    parser.add_argument(
        "--figure",
        required=True,
        type=Path,
        help=f"png to write, NAME.png or NAME.CORPUS.png: {', '.join(HEADS_FIGURES)}",
    )
    parser.add_argument("--pdf", required=True, type=Path, help="pdf to write")
    parser.add_argument("--table", required=True, action="append", type=Path, help="a table of results/tables; repeat")
    args = parser.parse_args()

    from moe_atlas.plotting.heads_figure import draw
    from moe_atlas.plotting.model import read_tables
    from moe_atlas.plotting.style import save

    figure = draw(args.figure.stem, args.model, read_tables(args.table))
    save(figure, args.pdf)
    save(figure, args.figure)


if __name__ == "__main__":
    run(main)
