"""Write a dense checkpoint as an EMoE: the same weights, with the neurons of its FFNs dealt to experts."""

import argparse
from pathlib import Path

from moe_atlas.errors import AtlasError
from moe_atlas.files import write_json
from moe_atlas.log import run


def layer_numbers(text: str) -> tuple[int, ...] | None:
    """Layers as they are written, or None for all."""
    return None if text == "all" else tuple(int(number) for number in text.split(","))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, help="row id of config/models.tsv")
    parser.add_argument("--dense", required=True, help="checkpoint.json of the dense model")
    parser.add_argument("--experts", type=int, required=True, help="experts of each FFN; divides its neurons")
    parser.add_argument("--top-k", type=int, required=True, help="experts that a token is sent to")
    parser.add_argument("--layers", type=layer_numbers, default="all", help="decoder layers, such as 20,22, or all")
    parser.add_argument("--score", choices=("gate", "up"), default="gate", help="rows whose mean scores an expert")
    parser.add_argument("--split", choices=("cluster", "random", "contiguous"), default="cluster")
    parser.add_argument("--seed", type=int, default=0, help="seed of the split")
    parser.add_argument("--output", type=Path, required=True, help="emoe.json; the checkpoint is written beside it")
    arguments = parser.parse_args()

    from moe_atlas.emoe.derive import Settings, derive  # after --help: it imports torch
    from moe_atlas.manifest import open_checkpoint

    checkpoint, dense = open_checkpoint(arguments.dense)
    settings = Settings(
        arguments.experts, arguments.top_k, arguments.layers, arguments.score, arguments.split, arguments.seed
    )
    try:
        record = derive(checkpoint, settings, arguments.output.parent)
    except AtlasError as error:
        raise AtlasError(f"{arguments.model}, made from {dense['model']}: {error}") from None
    description = {name: dense[name] for name in ("model", "source", "revision", "model_type", "files")}
    write_json(arguments.output, {"model": arguments.model, "dense": description, **record})


if __name__ == "__main__":
    run(main)
