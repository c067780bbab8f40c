"""Write how hard the tasks of the MoA experiments are: sizes, and what translations score that follow no rules."""

import argparse
from pathlib import Path

import polars as pl

from moe_atlas import tables
from moe_atlas.log import run
from moe_atlas.moa import described
from moe_atlas.moa.settings import load_settings
from moe_atlas.moa.translation import make_task, measures, settings_of


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--settings", required=True, help="settings of the experiments (yaml)")
    parser.add_argument("--data", type=Path, nargs="*", default=[], help="folders of token ids, named as their files")
    parser.add_argument("--parquet", required=True, help="table moa_tasks to write")
    parser.add_argument("--csv", required=True, help="the same as CSV; an empty field is a missing value")
    arguments = parser.parse_args()
    folders = {folder.name: folder for folder in arguments.data}
    frames = []
    for name, task in load_settings(arguments.settings).tasks.items():
        if task.data_file:
            frames.append(described.measures(task, folders[Path(task.data_file).stem]))
        elif task.kind == "translation":
            frames.append(measures(make_task(settings_of(task)), name))
    frame = pl.concat([tables.empty("moa_tasks"), *frames])
    tables.write("moa_tasks", frame, arguments.parquet, arguments.csv)


if __name__ == "__main__":
    run(main)
