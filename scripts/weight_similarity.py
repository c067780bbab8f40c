"""Compare the experts of every layer by their weights: matrices, mean neurons, router rows."""

import argparse

import polars as pl

from moe_atlas import tables
from moe_atlas.layerwise import each_layer
from moe_atlas.log import Progress, run
from moe_atlas.manifest import open_checkpoint
from moe_atlas.parametric.similarity import weight_similarity


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, help="row id of config/models.tsv")
    parser.add_argument("--checkpoint", required=True, help="the model's checkpoint.json")
    parser.add_argument("--dense-reference", help="checkpoint.json of the dense model whose FFN is F")
    parser.add_argument("--output", required=True, help="similarity.parquet to write")
    arguments = parser.parse_args()

    checkpoint, manifest = open_checkpoint(arguments.checkpoint)
    reference = open_checkpoint(arguments.dense_reference)[0] if arguments.dense_reference else None
    progress, frames = Progress(len(manifest["moe_layers"]), "layer"), [tables.empty("similarity")]
    for index, bank, ffn in each_layer(checkpoint, reference, manifest["moe_layers"]):
        frames.append(weight_similarity(bank, model=arguments.model, layer=index, reference=ffn))
        progress.step()
    tables.write("similarity", pl.concat(frames), arguments.output)


if __name__ == "__main__":
    run(main)
