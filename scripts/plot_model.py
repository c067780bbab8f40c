"""Draw the figures of one model and one experiment: all layers, or a single figure."""

import argparse
from pathlib import Path

from moe_atlas.errors import AtlasError
from moe_atlas.log import run
from moe_atlas.plotting.registry import EXPERIMENTS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, help="row id of the models sheet")
    parser.add_argument(
        "--experiment", required=True, help=f"EXPERIMENT or EXPERIMENT.CORPUS; one of {', '.join(EXPERIMENTS)}"
    )
    parser.add_argument(
        "--table", required=True, action="append", type=Path, help="a table the experiment needs; repeat for each"
    )
    parser.add_argument("--output-dir", type=Path, help="where the figures of all layers go")
    parser.add_argument("--manifest", type=Path, help="JSON list of the figures, with captions")
    parser.add_argument("--overview", type=Path, help="png with all layers in small multiples")
    parser.add_argument("--figure", type=Path, help="draw this one figure only (…/layer_3_auto.png)")
    args = parser.parse_args()
    everything = (args.output_dir, args.manifest, args.overview)
    if bool(args.figure) == any(everything) or (any(everything) and not all(everything)):
        raise AtlasError("give either --figure, or --output-dir, --manifest and --overview together.")

    from moe_atlas.plotting.model import plot_all, plot_one, read_tables

    frames = read_tables(args.table)
    if args.figure:
        plot_one(args.model, args.experiment, frames, args.figure)
    else:
        plot_all(args.model, args.experiment, frames, *everything)


if __name__ == "__main__":
    run(main)
