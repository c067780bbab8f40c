"""Put the runs of all MoA jobs together and compare the arms seed by seed, as parquet and as CSV."""

import argparse
from pathlib import Path

from moe_atlas import tables
from moe_atlas.log import run, say
from moe_atlas.moa.arms import arms
from moe_atlas.moa.differences import differences, of_studies
from moe_atlas.moa.settings import load_settings


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--settings", required=True, help="file with arms, objectives and studies (yaml)")
    for name in ("runs", "curves", "throughput"):
        parser.add_argument(f"--{name}", nargs="+", required=True, help=f"tables moa_{name} of the jobs (parquet)")
    parser.add_argument("--output", type=Path, required=True, help="folder of the tables to write")
    arguments = parser.parse_args()
    settings = load_settings(arguments.settings)
    found = {}
    for name in ("moa_runs", "moa_curves", "moa_throughput"):
        parts = [tables.read(name, path) for path in getattr(arguments, name.removeprefix("moa_"))]
        found[name] = of_studies(settings, name, parts)
    found["moa_arms"] = arms(found["moa_runs"])
    found["moa_differences"] = differences(settings, found["moa_runs"])
    for name, frame in found.items():
        path = arguments.output / f"{name}.parquet"
        tables.write(name, frame, path, path.with_suffix(".csv"))
        say(f"{name}: {len(frame)} rows")


if __name__ == "__main__":
    run(main)
