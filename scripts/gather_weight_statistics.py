"""Put the parts of one model's weight statistics together, as one job would have written them."""

import argparse

from moe_atlas import tables
from moe_atlas.log import run, say
from moe_atlas.parametric.gather import NAMES, gathered


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name in NAMES:
        option = name.replace("_", "-")
        parser.add_argument(f"--{option}-parts", required=True, nargs="+", help=f"parts of {name}, in order")
        parser.add_argument(f"--{option}", required=True, help=f"{name}.parquet to write")
    arguments = parser.parse_args()
    for name in NAMES:
        parts = [tables.read(name, path) for path in getattr(arguments, f"{name}_parts")]
        frame = gathered(parts)
        tables.write(name, frame, getattr(arguments, name))
        say(f"{name}: {len(frame)} rows of {len(parts)} parts")


if __name__ == "__main__":
    run(main)
