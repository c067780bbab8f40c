"""Make the behavioral tables of one model and corpus from what extraction recorded."""

import argparse

from moe_atlas import tables
from moe_atlas.behavioral.activations import Activations
from moe_atlas.behavioral.intermediate import intermediate
from moe_atlas.behavioral.tables import FROM_LAYERS, FROM_SUMS, FROM_TOKENS, layers
from moe_atlas.behavioral.write import write_frames
from moe_atlas.errors import AtlasError
from moe_atlas.log import run, say


def option(name: str) -> str:
    return "--" + name.replace("_", "-")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--activations", required=True, help="recorded statistics (safetensors)")
    parser.add_argument("--tokens", required=True, help="table tokens of the same extraction (parquet)")
    for name in (*FROM_SUMS, *FROM_LAYERS):
        parser.add_argument(option(name), required=True, help=f"table {name} to write (parquet)")
    for name in FROM_TOKENS:
        parser.add_argument(option(name), help=f"table {name} to write (parquet); short corpora only")
    parser.add_argument(
        "--states", help="intermediate states (safetensors) of the same extraction; with --intermediate"
    )
    parser.add_argument("--intermediate", help="table intermediate to write (parquet); short corpora only")
    arguments = vars(parser.parse_args())
    if (arguments["states"] is None) != (arguments["intermediate"] is None):
        parser.error("--states and --intermediate go together")
    activations = Activations(arguments["activations"])
    tokens = tables.read("tokens", arguments["tokens"])
    wanted = [name for name in (*FROM_SUMS, *FROM_LAYERS, *FROM_TOKENS) if arguments[name] is not None]
    if activations.metadata["kind"] != "short" and (refused := [name for name in wanted if name in FROM_TOKENS]):
        raise AtlasError(
            f"{arguments['activations']}: a long corpus has no record of single tokens; leave out {option(refused[0])} "
            "or give the corpus the kind short."
        )
    for name in wanted:
        rows = write_frames(name, layers(name, activations, tokens), arguments[name])
        say(f"{name}: {rows} rows written to {arguments[name]}")
    if arguments["intermediate"] is not None:
        rows = write_frames("intermediate", intermediate(arguments["states"], tokens), arguments["intermediate"])
        say(f"intermediate: {rows} rows written to {arguments['intermediate']}")


if __name__ == "__main__":
    run(main)
