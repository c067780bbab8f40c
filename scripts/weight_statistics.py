"""Take every statistic of the experts' weights in one read: similarity, matched neurons, principal components."""

import argparse

from moe_atlas import tables
from moe_atlas.layerwise import each_layer
from moe_atlas.log import Progress, run, say, size
from moe_atlas.manifest import open_checkpoint
from moe_atlas.parametric.arguments import add_options, statistics_of
from moe_atlas.parametric.chosen import Share


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, help="row id of config/models.tsv")
    parser.add_argument("--checkpoint", required=True, help="the model's checkpoint.json")
    parser.add_argument("--dense-reference", help="checkpoint.json of the dense model whose FFN is F")
    parser.add_argument("--part", type=int, default=1, help="which range of the layers with experts, from 1")
    parser.add_argument("--parts", type=int, default=1, help="into how many ranges they are dealt; some may be empty")
    parser.add_argument("--matching-part", type=int, default=1, help="which pairs of a layer; above 1 nothing else")
    parser.add_argument("--matching-parts", type=int, default=1, help="into how many parts the pairs are dealt")
    add_options(parser)
    arguments = parser.parse_args()

    checkpoint, manifest = open_checkpoint(arguments.checkpoint)
    reference = open_checkpoint(arguments.dense_reference)[0] if arguments.dense_reference else None
    pairs = Share(arguments.matching_part, arguments.matching_parts)
    statistics = statistics_of(arguments, manifest["moe_layers"], pairs)
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
