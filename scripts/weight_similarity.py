"""Compare the experts of every layer by their weights: matrices, mean neurons, router rows."""

import argparse
import contextlib
import itertools

import polars as pl

from moe_atlas import tables
from moe_atlas.log import Progress, run
from moe_atlas.manifest import open_checkpoint
from moe_atlas.parametric.similarity import layer_similarity
from moe_atlas.stream import LayerStream


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, help="row id of config/models.tsv")
    parser.add_argument("--checkpoint", required=True, help="the model's checkpoint.json")
    parser.add_argument("--dense-reference", help="checkpoint.json of the dense model whose FFN is F")
    parser.add_argument("--output", required=True, help="similarity.parquet to write")
    arguments = parser.parse_args()

    checkpoint, manifest = open_checkpoint(arguments.checkpoint)
    stream, dense = LayerStream(checkpoint), None
    if arguments.dense_reference:
        dense = LayerStream(open_checkpoint(arguments.dense_reference)[0])
    frames = [tables.empty("similarity")]
    indices = manifest["moe_layers"]
    progress = Progress(len(indices), "layer")
    for index, following in itertools.pairwise([*indices, len(stream)]):
        paired = dense is not None and index < len(dense)
        dense_layer = dense.layer(index, following) if paired else contextlib.nullcontext()
        with stream.layer(index, following) as layer, dense_layer as reference:
            frames.append(layer_similarity(layer, reference, model=arguments.model, index=index))
        progress.step()
    tables.write("similarity", pl.concat(frames), arguments.output)


if __name__ == "__main__":
    run(main)
