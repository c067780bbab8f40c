"""Regress the router's similarity on the experts' weight similarity, layer by layer."""

import argparse

from moe_atlas import tables
from moe_atlas.log import run, say
from moe_atlas.parametric.regression import router_regression


def seed(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"a seed is 0 or more, not {value}")
    return value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--similarity", required=True, help="table similarity of one model (parquet)")
    parser.add_argument(
        "--seed", required=True, type=seed, help="seed of the permutations and the resampling, 0 or more"
    )
    parser.add_argument("--output", required=True, help="table regression to write (parquet)")
    arguments = parser.parse_args()
    regression = router_regression(tables.read("similarity", arguments.similarity), seed=arguments.seed)
    tables.write("regression", regression, arguments.output)
    say(f"{len(regression)} lines written to {arguments.output}")


if __name__ == "__main__":
    run(main)
