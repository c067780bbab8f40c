"""Match the neurons of experts, pair by pair: are they the same neurons in another order?"""

import argparse

import polars as pl

from moe_atlas import tables
from moe_atlas.layerwise import each_layer
from moe_atlas.log import Progress, run
from moe_atlas.manifest import open_checkpoint
from moe_atlas.parametric.matching import chosen_layers, neuron_matching


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, help="row id of config/models.tsv")
    parser.add_argument("--checkpoint", required=True, help="the model's checkpoint.json")
    parser.add_argument("--dense-reference", help="checkpoint.json of the dense model whose FFN is F")
    parser.add_argument("--layers", default="", help="layers, separated by commas; evenly spaced ones if not given")
    parser.add_argument("--max-layers", type=int, default=0, help="how many evenly spaced layers (0: all)")
    parser.add_argument("--max-pairs", type=int, default=0, help="how many pairs of experts a layer (0: all)")
    parser.add_argument("--output", required=True, help="matching.parquet to write")
    arguments = parser.parse_args()

    checkpoint, manifest = open_checkpoint(arguments.checkpoint)
    reference = open_checkpoint(arguments.dense_reference)[0] if arguments.dense_reference else None
    layers = chosen_layers(manifest["moe_layers"], arguments.layers, arguments.max_layers)
    progress, frames = Progress(len(layers), "layer"), [tables.empty("matching")]
    for index, bank, ffn in each_layer(checkpoint, reference, layers):
        frames.append(
            neuron_matching(bank, model=arguments.model, layer=index, reference=ffn, max_pairs=arguments.max_pairs)
        )
        progress.step()
    tables.write("matching", pl.concat(frames), arguments.output)


if __name__ == "__main__":
    run(main)
