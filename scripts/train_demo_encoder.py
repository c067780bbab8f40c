"""Pre-train the demo encoder, a small BERT, on the texts that CPython brings along and save it in the Hub's format."""

import argparse
import os
from pathlib import Path

# Set before transformers is imported: training reads nothing from the network.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from moe_atlas.log import run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps-factor", type=float, default=1.0, help="multiplies the number of steps")
    parser.add_argument("--seed", type=int, default=0, help="seed of the weights, the texts' order and the masks")
    parser.add_argument("--output", type=Path, required=True, help="training.json; the checkpoint is written beside it")
    arguments = parser.parse_args()

    from moe_atlas.tuning.encoder import train_encoder  # after --help: it imports torch

    train_encoder(arguments.output, arguments.steps_factor, arguments.seed)


if __name__ == "__main__":
    run(main)
