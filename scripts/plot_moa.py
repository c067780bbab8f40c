"""Draw one figure of the MoA experiments of one objective; the figure's name says which."""

import argparse
from pathlib import Path

from moe_atlas.log import run
from moe_atlas.plotting.registry import MOA_FIGURES


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    names = ", ".join(MOA_FIGURES)
    parser.add_argument("--figure", required=True, type=Path, help=f"png to write, NAME.OBJECTIVE.png: {names}")
    parser.add_argument("--pdf", required=True, type=Path, help="pdf to write")
    parser.add_argument("--table", required=True, action="append", type=Path, help="a table of results/tables; repeat")
    parser.add_argument("--texts", default="", help="the objective's texts, for the title")
    parser.add_argument("--decay", type=float, help="steps after the plateau, as a share of those before it")
    args = parser.parse_args()

    from moe_atlas.plotting.moa_arms import About
    from moe_atlas.plotting.moa_figure import draw
    from moe_atlas.plotting.model import read_tables
    from moe_atlas.plotting.style import save

    figure = draw(args.figure.stem, read_tables(args.table), About(args.texts, args.decay))
    save(figure, args.pdf)
    save(figure, args.figure)


if __name__ == "__main__":
    run(main)
