"""Write how hard the translation task is: its size, how often its rules matter, and what answers without them score."""

import argparse

import polars as pl

from moe_atlas import tables
from moe_atlas.log import run
from moe_atlas.moa.settings import load_settings
from moe_atlas.moa.translation import make_task, measures, settings_of


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--settings", required=True, help="settings of the experiments (yaml)")
    parser.add_argument("--output", required=True, help="table moa_tasks to write (parquet)")
    arguments = parser.parse_args()
    tasks = load_settings(arguments.settings).tasks
    made = [name for name, task in tasks.items() if task.source == "demo:translation"]
    frames = [measures(make_task(settings_of(tasks[name])), name) for name in made]
    tables.write("moa_tasks", pl.concat([tables.empty("moa_tasks"), *frames]), arguments.output)


if __name__ == "__main__":
    run(main)
