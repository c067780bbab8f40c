"""Make a task of tuning: from texts that CPython brings along, or from data sets that a file names."""

import argparse

import polars as pl

from moe_atlas import tables
from moe_atlas.errors import AtlasError
from moe_atlas.log import run, say
from moe_atlas.tuning.tasks import demo_task


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--task", required=True, help="id of the task")
    parser.add_argument(
        "--source", required=True, help="demo:NAME; data:FILE or instructions:FILE, which name data sets (yaml)"
    )
    parser.add_argument("--output", required=True, help="table emoe_tasks to write (parquet)")
    arguments = parser.parse_args()
    scheme, _, locator = arguments.source.partition(":")
    if scheme == "demo":
        task = demo_task(locator)
        rows = [
            {"split": split, "document": example.document, "text": example.text, "label": float(example.label)}
            for split, examples in task.splits.items()
            for example in examples
        ]
        frame = pl.DataFrame(rows).with_columns(
            task=pl.lit(arguments.task), pair=pl.lit(None, pl.String), classes=pl.lit(len(task.classes))
        )
    elif scheme == "data":
        from moe_atlas.tuning.datasets import load_task  # it imports datasets

        frame = load_task(locator).with_columns(task=pl.lit(arguments.task))
    elif scheme == "instructions":
        from moe_atlas.tuning.instructions import load_instructions

        frame = load_instructions(locator).with_columns(task=pl.lit(arguments.task))
    else:
        raise AtlasError(f"{arguments.source}: a task's source is demo:NAME, data:FILE or instructions:FILE.")
    tables.write("emoe_tasks", frame, arguments.output)
    counts = frame.group_by("split", maintain_order=True).len()
    say(f"{arguments.task}: " + ", ".join(f"{split} {count}" for split, count in counts.iter_rows()))


if __name__ == "__main__":
    run(main)
