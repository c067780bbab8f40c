"""Train one demo model on the texts that CPython brings along and save it in the Hub's format."""

import argparse
import os
from pathlib import Path

# Set before transformers is imported: training reads nothing from the network.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from moe_atlas.log import run
from moe_atlas.training.recipes import get, load_all


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--recipe", required=True, help=f"one of {', '.join(load_all())}")
    parser.add_argument("--steps-factor", type=float, default=1.0, help="multiplies the recipe's number of steps")
    parser.add_argument("--seed", type=int, default=0, help="seed of the weights and of the order of the texts")
    parser.add_argument("--start-from", type=Path, help="directory of the recipe that this one starts from")
    parser.add_argument("--output", type=Path, required=True, help="training.json; the checkpoint is written beside it")
    arguments = parser.parse_args()
    recipe = get(arguments.recipe)

    from moe_atlas.training.run import train_recipe  # after --help and a wrong name: it imports torch

    train_recipe(recipe, arguments.output, arguments.steps_factor, arguments.seed, arguments.start_from)


if __name__ == "__main__":
    run(main)
