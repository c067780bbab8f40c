"""Set published parameters and multiply-accumulates beside those of our formulas, as parquet and CSV."""

import argparse
import os
from pathlib import Path

# Set before transformers is imported: nothing is read from the network.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from moe_atlas import tables
from moe_atlas.log import run, say


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--published", required=True, help="sheet of the published numbers (tsv)")
    parser.add_argument("--output", type=Path, required=True, help="folder of the table to write")
    arguments = parser.parse_args()

    from moe_atlas.architectures.moa_published import published_costs  # after --help: it takes seconds

    found = published_costs(arguments.published)
    path = arguments.output / "moa_costs.parquet"
    tables.write("moa_costs", found, path, path.with_suffix(".csv"))
    say(f"moa_costs: {found['agrees'].sum()} of {len(found)} numbers agree")


if __name__ == "__main__":
    run(main)
