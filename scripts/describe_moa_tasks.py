"""Write how hard the translation task is: its size, how often its rules matter, and what answers without them score."""

import argparse

import polars as pl

from moe_atlas import tables
from moe_atlas.files import atomic_path
from moe_atlas.log import run
from moe_atlas.moa.settings import load_settings
from moe_atlas.moa.translation import make_task, measures, settings_of


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--settings", required=True, help="settings of the experiments (yaml)")
    parser.add_argument("--parquet", required=True, help="table moa_tasks to write")
    parser.add_argument("--csv", required=True, help="the same as CSV; an empty field is a missing value")
    arguments = parser.parse_args()
    tasks = load_settings(arguments.settings).tasks
    made = [name for name, task in tasks.items() if task.source == "demo:translation"]
    frames = [measures(make_task(settings_of(tasks[name])), name) for name in made]
    frame = pl.concat([tables.empty("moa_tasks"), *frames])
    tables.write("moa_tasks", frame, arguments.parquet)
    with atomic_path(arguments.csv) as csv:
        frame.write_csv(csv)


if __name__ == "__main__":
    run(main)
