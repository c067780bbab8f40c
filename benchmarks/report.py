"""Medians and ratios of the rows that runs left, as markdown."""

from pathlib import Path

import polars as pl

from benchmarks import plan
from moe_atlas import log

_COLUMNS = ("", "files", "seconds", "times ours", "of the larger floor", "peak MiB", "read", "written")


def read(folder: Path) -> pl.DataFrame:
    """The rows of all suites in a folder, in the order of the plan."""
    paths = [folder / f"{suite}.parquet" for suite in plan.SUITES]
    return pl.concat([pl.DataFrame(schema=plan.SCHEMA), *(pl.read_parquet(path) for path in paths if path.exists())])


def cases(frame: pl.DataFrame) -> list[pl.DataFrame]:
    """The rows of each case of each machine."""
    return [part for _, part in frame.group_by(plan.KEYS, maintain_order=True)]


def title(row: dict) -> str:
    """One line on what a case is of."""
    shrunk = f" divided by {row['shrink']}" if row["shrink"] > 1 else ""
    layers = f", {row['layers']} layer{'s' * (row['layers'] > 1)}" if row["suite"] in ("extraction", "reading") else ""
    tokens = f", {row['tokens']} tokens" if row["suite"] == "extraction" else ""
    told = f", told {row['memory']:,} MiB" if row["memory"] else ""
    size = f", {log.size(row['bytes'])}" if row["bytes"] else ""
    threads = f", {row['threads']} thread{'s' * (row['threads'] > 1)}"
    return f"{row['suite']}, {row['shape']}{shrunk}{layers}{size}{tokens}{threads}{told}"


def machine(row: dict) -> str:
    """One line on where it ran, and when."""
    device = "" if row["device"] == "cpu" else f", {row['device']}"
    return f"{row['cpu']}, {row['cores']} cores{device}, torch {row['torch']}, {row['began'][:10]}"


def floors_of(row: dict) -> str:
    """The floors of a case, those that are there."""
    names = {"disk": row["floor_disk"], "arithmetic": row["floor_arithmetic"]}
    return "floors: " + ", ".join(f"{name} {seconds:.2f} s" for name, seconds in names.items() if seconds)


def summary(frame: pl.DataFrame) -> pl.DataFrame:
    """A row for each case, contender and state of the page cache, of medians over its runs.

    Beside KEYS, contender and cold: runs; seconds; times_ours, seconds over those of atlas; over_floor, seconds over
    the larger floor, of warm runs over that of arithmetic; peak_mib; read and written, bytes over those needed; failed.
    Null where there is nothing to divide by.
    """
    keys = [*plan.KEYS, "cold"]
    disk = pl.when("cold").then("floor_disk").otherwise(0.0)
    floor, size = pl.max_horizontal(disk, "floor_arithmetic"), pl.col("bytes").cast(pl.Float64)
    medians = frame.group_by(*keys, "contender", maintain_order=True).agg(
        pl.col("seconds").count().alias("runs"),
        pl.col("seconds").median(),
        (pl.col("seconds") / pl.when(floor > 0).then(floor)).median().alias("over_floor"),
        pl.col("peak_mib").median(),
        pl.coalesce("weights_read", pl.col("disk_read") / pl.when(size > 0).then(size)).median().alias("read"),
        (pl.col("disk_written") / pl.when(size > 0).then(size)).median().alias("written"),
        pl.col("failed").drop_nulls().first(),
    )
    ours = medians.filter(pl.col("contender") == "atlas").select(*keys, ours="seconds")
    joined = medians.join(ours, on=keys, how="left", maintain_order="left")
    return joined.with_columns(times_ours=pl.col("seconds") / pl.col("ours")).drop("ours")


def markdown(frame: pl.DataFrame) -> str:
    """A table for each case, under what it is of and where it ran."""
    lines = []
    for part in cases(frame):
        first = part.row(0, named=True)
        lines += [f"**{title(first)}** ({machine(first)}; {floors_of(first)})", ""]
        lines += [f"| {' | '.join(_COLUMNS)} |", f"|{'---|' * len(_COLUMNS)}"]
        lines += [
            f"| {' | '.join(_cells(row))} |"
            for row in summary(part).sort("cold", descending=True, maintain_order=True).iter_rows(named=True)
        ]
        lines.append("")
    return "\n".join(lines).strip()


def _cells(row: dict) -> list[str]:
    files = "cold" if row["cold"] else "warm"
    if row["seconds"] is None:
        return [row["contender"], files, f"failed: {row['failed']}", *[""] * (len(_COLUMNS) - 3)]
    numbers = {"times_ours": 2, "over_floor": 2, "peak_mib": 0, "read": 2, "written": 2}
    cells = ["" if row[name] is None else f"{row[name]:,.{digits}f}" for name, digits in numbers.items()]
    return [row["contender"], files, f"{row['seconds']:.3g} ({row['runs']})", *cells]
