"""Command-line options of the programs that compute all statistics of a model's weights."""

import argparse
from collections.abc import Sequence

from moe_atlas.parametric.chosen import EVERYTHING, Share, chosen_layers
from moe_atlas.parametric.gather import NAMES
from moe_atlas.parametric.outliers import OutlierRule
from moe_atlas.parametric.together import WeightStatistics


def add_options(parser: argparse.ArgumentParser) -> None:
    """What is matched and projected, and the files of the tables in NAMES."""
    parser.add_argument("--matching-layers", default="", help="layers whose neurons are matched, separated by commas")
    parser.add_argument("--matching-max-layers", type=int, default=0, help="else so many, evenly spaced (0: all)")
    parser.add_argument("--matching-max-pairs", type=int, default=0, help="pairs of experts a layer (0: all)")
    parser.add_argument(
        "--projection-max-neurons", type=int, default=2048, help="neurons a layer and matrix, evenly spaced (0: all)"
    )
    parser.add_argument(
        "--dbscan-eps",
        type=float,
        default=OutlierRule.eps,
        help="largest distance of neighbours at the size of DeepSeekMoE-16B's experts; scaled by that of this model's",
    )
    parser.add_argument(
        "--dbscan-min-samples", type=int, default=OutlierRule.min_samples, help="experts that make a cluster"
    )
    for name in NAMES:
        parser.add_argument(f"--{name.replace('_', '-')}", required=True, help=f"{name}.parquet to write")


def statistics_of(
    arguments: argparse.Namespace, moe_layers: Sequence[int], pairs: Share = EVERYTHING
) -> WeightStatistics:
    """WeightStatistics as the options ask; moe_layers: the model's layers with experts; pairs: share of a layer's."""
    return WeightStatistics(
        arguments.model,
        chosen_layers(moe_layers, arguments.matching_layers, arguments.matching_max_layers),
        arguments.matching_max_pairs,
        arguments.projection_max_neurons,
        OutlierRule(arguments.dbscan_eps, arguments.dbscan_min_samples),
        pairs,
    )
