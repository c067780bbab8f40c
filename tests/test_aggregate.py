"""One table of all models, made by the program from per-model files."""

import subprocess
import sys
from pathlib import Path

import polars as pl
import pytest

from moe_atlas import tables

PROGRAM = Path(__file__).resolve().parent.parent / "scripts" / "aggregate_tables.py"


def regression(model, layers):
    """A small table regression with nulls, a value that needs all digits, and a tiny one."""
    rows = [
        (model, layer, matrix, 28, 1 / 3, 1 / 9, -0.1, 1e-17, None, 0.5, None, 0.25)
        for layer in layers
        for matrix in ("up", "act")
    ]
    return pl.DataFrame(rows, schema=tables.TABLES["regression"].schema, orient="row")


def aggregate(directory, name, inputs, check=True):
    command = [sys.executable, PROGRAM, "--table", name, "--inputs", *inputs]
    command += ["--parquet", directory / f"{name}.parquet", "--csv", directory / f"{name}.csv"]
    return subprocess.run(list(map(str, command)), check=check, capture_output=True, text=True)


@pytest.fixture
def inputs(tmp_path):
    frames = {"zebra": regression("zebra", [0, 1]), "dense": tables.empty("regression"), "ant": regression("ant", [3])}
    for name, frame in frames.items():
        tables.write("regression", frame, tmp_path / f"{name}.parquet")
    return [tmp_path / f"{name}.parquet" for name in frames], pl.concat(frames.values())


def test_rows_come_in_the_order_of_the_inputs_and_csv_equals_parquet(inputs, tmp_path):
    paths, together = inputs
    aggregate(tmp_path, "regression", paths)
    assert tables.read("regression", tmp_path / "regression.parquet").equals(together)
    csv = pl.read_csv(tmp_path / "regression.csv", schema=tables.TABLES["regression"].schema)
    assert csv.equals(together)
    assert together["p_value"].null_count() == len(together)


def test_the_same_inputs_give_the_same_bytes_and_no_other_file(inputs, tmp_path):
    paths, _ = inputs
    written = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        aggregate(tmp_path / name, "regression", paths)
        assert sorted(file.name for file in (tmp_path / name).iterdir()) == ["regression.csv", "regression.parquet"]
        written.append([(tmp_path / name / f"regression.{suffix}").read_bytes() for suffix in ("csv", "parquet")])
    assert written[0] == written[1]


def test_many_rows_keep_their_order_over_row_groups(tmp_path):
    count = 400_000
    paths = []
    for model in ("b", "a"):
        frame = pl.select(pl.int_range(count).alias("position")).with_columns(
            model=pl.lit(model),
            corpus=pl.lit("c"),
            sequence=pl.lit(0),
            token_id=pl.col("position") % 7,
            token=pl.lit('a "b",\n'),
        )
        paths.append(tmp_path / f"{model}.parquet")
        tables.write("tokens", frame, paths[-1])
    aggregate(tmp_path, "tokens", paths)
    together = tables.read("tokens", tmp_path / "tokens.parquet")
    assert together["model"].to_list() == ["b"] * count + ["a"] * count
    assert together["position"].to_list() == [*range(count)] * 2
    assert pl.read_csv(tmp_path / "tokens.csv", schema=tables.TABLES["tokens"].schema).equals(together)


def test_empty_inputs_alone_give_an_empty_table_with_its_columns(tmp_path):
    tables.write("load", tables.empty("load"), tmp_path / "dense.parquet")
    aggregate(tmp_path, "load", [tmp_path / "dense.parquet"])
    assert len(tables.read("load", tmp_path / "load.parquet")) == 0
    assert (tmp_path / "load.csv").read_text().strip() == ",".join(tables.TABLES["load"].schema)


def other_columns(path):
    tables.write("load", tables.empty("load"), path)


def other_order(path):
    regression("m", [0]).select(sorted(tables.TABLES["regression"].schema)).write_parquet(path)


def other_dtype(path):
    regression("m", [0]).with_columns(pl.col("layer").cast(pl.Int32)).write_parquet(path)


def cut_short(path):
    path.write_bytes(path.read_bytes()[:-20])


def damaged_data(path):
    content = bytearray(path.read_bytes())
    content[4:200] = bytes(196)  # the footer still reads well
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [other_columns, other_order, other_dtype, cut_short, damaged_data, Path.unlink])
def test_a_wrong_input_is_named_and_the_old_table_stays(inputs, tmp_path, damage):
    paths, _ = inputs
    aggregate(tmp_path, "regression", paths)
    before = [(tmp_path / f"regression.{suffix}").read_bytes() for suffix in ("csv", "parquet")]
    damage(paths[2])
    refused = aggregate(tmp_path, "regression", paths, check=False)
    assert refused.returncode == 1
    assert "error: " in refused.stderr and "ant.parquet" in refused.stderr and "Traceback" not in refused.stderr
    assert [(tmp_path / f"regression.{suffix}").read_bytes() for suffix in ("csv", "parquet")] == before
