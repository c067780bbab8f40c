"""Compare how a model's experts are used on its long corpora."""

import argparse

from moe_atlas.behavioral.activations import Activations
from moe_atlas.behavioral.domain import domain
from moe_atlas.behavioral.write import write_frames
from moe_atlas.log import run, say


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--activations", nargs="*", default=[], help="recorded statistics of each long corpus (safetensors)"
    )
    parser.add_argument("--output", required=True, help="table domain to write (parquet)")
    arguments = parser.parse_args()
    recorded = [Activations(path) for path in arguments.activations]
    rows = write_frames("domain", domain(recorded), arguments.output)
    say(f"domain: {rows} rows of {len(recorded)} corpora written to {arguments.output}")


if __name__ == "__main__":
    run(main)
