"""Project the experts of every layer on the principal components of their matrices and of their neurons."""

import argparse

import polars as pl

from moe_atlas import tables
from moe_atlas.layerwise import each_layer
from moe_atlas.log import Progress, run
from moe_atlas.manifest import open_checkpoint
from moe_atlas.parametric.outliers import OutlierRule
from moe_atlas.parametric.projection import project_experts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, help="row id of config/models.tsv")
    parser.add_argument("--checkpoint", required=True, help="the model's checkpoint.json")
    parser.add_argument("--dense-reference", help="checkpoint.json of the dense model whose FFN is F")
    parser.add_argument(
        "--max-neurons", type=int, default=2048, help="neurons a layer and matrix to keep, evenly spaced (0: all)"
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
    parser.add_argument("--projection", required=True, help="projection.parquet to write")
    parser.add_argument("--explained-variance", required=True, help="explained_variance.parquet to write")
    arguments = parser.parse_args()

    checkpoint, manifest = open_checkpoint(arguments.checkpoint)
    reference = open_checkpoint(arguments.dense_reference)[0] if arguments.dense_reference else None
    rule = OutlierRule(arguments.dbscan_eps, arguments.dbscan_min_samples)
    points, ratios = [tables.empty("projection")], [tables.empty("explained_variance")]
    progress = Progress(len(manifest["moe_layers"]), "layer")
    for index, bank, ffn in each_layer(checkpoint, reference, manifest["moe_layers"]):
        found = project_experts(
            bank, model=arguments.model, layer=index, reference=ffn, max_neurons=arguments.max_neurons, rule=rule
        )
        points.append(found[0])
        ratios.append(found[1])
        progress.step()
    tables.write("projection", pl.concat(points), arguments.projection)
    tables.write("explained_variance", pl.concat(ratios), arguments.explained_variance)


if __name__ == "__main__":
    run(main)
