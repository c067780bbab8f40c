"""Take every statistic of the experts' weights in one read: similarity, matched neurons, principal components."""

import argparse

from moe_atlas import tables
from moe_atlas.layerwise import each_layer
from moe_atlas.log import Progress, run, say, size
from moe_atlas.manifest import open_checkpoint
from moe_atlas.parametric.chosen import Share, chosen_layers
from moe_atlas.parametric.gather import NAMES
from moe_atlas.parametric.outliers import OutlierRule
from moe_atlas.parametric.together import WeightStatistics


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, help="row id of config/models.tsv")
    parser.add_argument("--checkpoint", required=True, help="the model's checkpoint.json")
    parser.add_argument("--dense-reference", help="checkpoint.json of the dense model whose FFN is F")
    parser.add_argument("--part", type=int, default=1, help="which range of the layers with experts, from 1")
    parser.add_argument("--parts", type=int, default=1, help="into how many ranges they are dealt; some may be empty")
    parser.add_argument("--matching-part", type=int, default=1, help="which pairs of a layer; above 1 nothing else")
    parser.add_argument("--matching-parts", type=int, default=1, help="into how many parts the pairs are dealt")
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
    arguments = parser.parse_args()

    checkpoint, manifest = open_checkpoint(arguments.checkpoint)
    reference = open_checkpoint(arguments.dense_reference)[0] if arguments.dense_reference else None
    statistics = WeightStatistics(
        arguments.model,
        chosen_layers(manifest["moe_layers"], arguments.matching_layers, arguments.matching_max_layers),
        arguments.matching_max_pairs,
        arguments.projection_max_neurons,
        OutlierRule(arguments.dbscan_eps, arguments.dbscan_min_samples),
        Share(arguments.matching_part, arguments.matching_parts),
    )
    layers = statistics.needed(Share(arguments.part, arguments.parts).of(manifest["moe_layers"]))
    progress = Progress(len(layers), "layer")
    for index, bank, ffn in each_layer(checkpoint, reference, layers):
        statistics.add(index, bank, ffn)
        progress.step()
    say(f"{len(layers)} layers, {size(checkpoint.bytes_read)} ({checkpoint.bytes_read} bytes) read")
    for name, frame in statistics.tables().items():
        tables.write(name, frame, getattr(arguments, name))


if __name__ == "__main__":
    run(main)
