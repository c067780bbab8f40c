"""Notebooks: stripped, parametrised, executed through the runner on made-up tables, offline, and failing loudly."""

import json
import os
import re
import subprocess
import sys

import emoe_tables
import heads_models
import moa_tables
import nbformat
import pytest
import synthetic
from conftest import ROOT

from moe_atlas import tables

NOTEBOOKS = ROOT / "notebooks"
PARAMETERS = {
    "parametric": {"model", "results"},
    "behavioral": {"model", "corpora", "results"},
    "comparison": {"models", "corpora", "results"},
    "emoe": {"models", "corpora", "results"},
    "moa": {"models", "objectives", "results"},
}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Results of two toy models, tables and checkpoint.json, as the workflow leaves them."""
    import polars as pl

    folder = tmp_path_factory.mktemp("run") / "results"
    toys = [synthetic.TOYS["toy-eight"], synthetic.TOYS["toy-dense"]]
    for toy in toys:
        directory = synthetic.write_model(toy, folder)
        (directory / "checkpoint.json").write_text(json.dumps(synthetic.checkpoint(toy)))
    for name, declared in tables.TABLES.items():
        files = [
            path for toy in toys for path in (folder / "models" / toy.model).glob(declared.path.format(corpus="*"))
        ]
        tables.write(
            name, pl.concat([tables.read(name, path) for path in files]), folder / "tables" / f"{name}.parquet"
        )
    for name in tables.ACROSS:
        frame = pl.concat([synthetic.across(toy)[name] for toy in toys])
        tables.write(name, frame, folder / "tables" / f"{name}.parquet")
    made = emoe_tables.two_backbones() | moa_tables.frames() | heads_tables(folder)
    for name, frame in made.items():
        tables.write(name, frame, folder / "tables" / f"{name}.parquet")
    return folder


def heads_tables(folder):
    """Tables of attention experts of a tiny JetMoE and of a tiny MoA with a frozen router."""
    import polars as pl
    from test_heads_run import SETTINGS, Names, material

    from moe_atlas.heads.model import open_host
    from moe_atlas.heads.run import Analysis

    heads_models.save_jetmoe(folder / "models" / "tiny-jetmoe")
    heads_models.save_moa(folder / "models" / "frozen", frozen_router=True)
    found = []
    for name, model in (("tiny-jetmoe", "tiny-jetmoe"), ("frozen", "router.causal.moa-frozen")):
        analysis = Analysis(open_host(folder / "models" / name, "float32"), model, Names(), SETTINGS)
        found.append(analysis.tables({"prose": material(repeat=4)}))
    return {name: pl.concat([one[name] for one in found]) for name in tables.HEADS}


def run(notebook, executed, html, parameters, cwd):
    command = [sys.executable, ROOT / "scripts" / "run_notebook.py", "--notebook", notebook, "--executed", executed]
    command += ["--html", html, "--parameters", parameters if isinstance(parameters, str) else json.dumps(parameters)]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(list(map(str, command)), cwd=cwd, capture_output=True, text=True, env=environment)


def test_there_are_five():
    assert {path.stem for path in NOTEBOOKS.glob("*.ipynb")} == set(PARAMETERS)


@pytest.mark.parametrize("name", PARAMETERS)
def test_notebook_is_stripped_and_declares_its_parameters(name):
    notebook = nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4)
    nbformat.validate(notebook)
    assert notebook.metadata.kernelspec.name == "python3"
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(not cell.outputs and cell.execution_count is None for cell in code)
    tagged = [cell for cell in code if "parameters" in cell.metadata.get("tags", [])]
    assert len(tagged) == 1
    values = {}
    exec(tagged[0].source, values)
    assert set(values) - {"__builtins__"} == PARAMETERS[name]


@pytest.mark.parametrize(
    ("name", "parameters", "expected"),
    [
        ("parametric", {"model": "toy-eight"}, ["Mean neurons", "Chance", "Mantel"]),
        ("behavioral", {"model": "toy-eight", "corpora": ["prompt", "prose"]}, ["MaxVio", "prose", "chance"]),
        ("behavioral", {"model": "toy-dense"}, ["this is a dense model"]),
        ("comparison", {"models": ["toy-eight", "toy-dense"]}, ["Dense models", "toy-dense"]),
        (
            "emoe",
            {"corpora": ["prose"]},
            ["Dense models: toy; texts: prose", "toy-encoder (bert)", "Of 64 differences"],
        ),
        (
            "moa",
            {"objectives": {"causal": {"kind": "causal", "texts": "demo prose", "decay": 0.25, "figures": ["grid"]}}},
            [
                *(
                    "Objectives: causal. Models that are looked into: tiny-jetmoe, router.causal.moa-frozen",
                    "5 % better",
                ),
                *(
                    "48 of 54 runs ended",
                    "1 of 2 published counts",
                    "Only what is above the random router",
                    "The frozen router",
                ),
                *("Transformer base", "Attention experts against the FFN experts", "share reordered", "QK cosines"),
            ],
        ),
    ],
)
def test_notebook_runs_and_its_page_needs_no_network(results, name, parameters, expected):
    executed, html = (results / "notebooks" / f"{name}.{suffix}" for suffix in ("ipynb", "html"))
    done = run(NOTEBOOKS / f"{name}.ipynb", executed, html, {**parameters, "results": "results"}, results.parent)
    assert done.returncode == 0, done.stderr
    text = html.read_text(encoding="utf-8")
    assert [part for part in expected if part not in " ".join(text.split())] == []
    assert "<script" not in text and "<link" not in text
    sources = re.findall(r"""(?:src|href)=["']([^"']*)""", text)
    assert all(re.match(r"data:image/png;base64,|#", s) or s == executed.name for s in sources)
    if parameters.get("model") == "toy-dense":
        assert "data:image" not in text
    else:
        assert text.count("data:image/png") >= 6
    notebook = nbformat.read(executed, as_version=4)
    assert all(cell.execution_count for cell in notebook.cells if cell.cell_type == "code")


def test_moa_without_rows_says_so(tmp_path):
    """Published costs need no training: they alone are there."""
    tables.write("moa_costs", moa_tables.costs(), tmp_path / "results/tables/moa_costs.parquet")
    executed, html = tmp_path / "moa.ipynb", tmp_path / "moa.html"
    done = run(NOTEBOOKS / "moa.ipynb", executed, html, {}, tmp_path)
    assert done.returncode == 0, done.stderr
    text = html.read_text(encoding="utf-8")
    assert "Objectives: none. Models that are looked into: none." in text and "Nothing was trained in this run." in text
    assert "1 of 2 published counts" in text and text.count("No rows.") >= 6 and "data:image/png" not in text


def small_notebook(path, *sources, tag="parameters"):
    cells = [nbformat.v4.new_code_cell(source) for source in sources]
    cells[0].metadata["tags"] = [tag]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), path)
    return path


def test_a_failing_cell_fails_the_job_and_leaves_the_executed_copy(tmp_path):
    source = "print(f'before {model}')\nraise ValueError('planted fault')"
    notebook = small_notebook(tmp_path / "faulty.ipynb", "model = 'none'", source)
    executed, html = tmp_path / "out" / "faulty.ipynb", tmp_path / "out" / "faulty.html"
    done = run(notebook, executed, html, {"model": "mine"}, tmp_path)
    assert done.returncode == 1
    error = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert len(error) == 1 and str(executed) in error[0] and "planted fault" in error[0]
    assert "Traceback" not in done.stderr
    assert "before mine" in executed.read_text()
    assert not html.exists()


def test_a_parameter_that_is_not_declared_is_refused(tmp_path):
    notebook = small_notebook(tmp_path / "plain.ipynb", "model = 'none'")
    done = run(notebook, tmp_path / "e.ipynb", tmp_path / "e.html", {"modle": "x"}, tmp_path)
    assert done.returncode == 1 and "does not declare modle" in done.stderr and "declares model" in done.stderr
    untagged = small_notebook(tmp_path / "untagged.ipynb", "model = 'none'", tag="other")
    done = run(untagged, tmp_path / "e.ipynb", tmp_path / "e.html", {"model": "x"}, tmp_path)
    assert done.returncode == 1 and "0 cells are tagged `parameters`" in done.stderr
    for wrong in ("{", "[1]"):
        done = run(notebook, tmp_path / "e.ipynb", tmp_path / "e.html", wrong, tmp_path)
        assert done.returncode == 1 and "error: --parameters:" in done.stderr
    assert not (tmp_path / "e.ipynb").exists() and not (tmp_path / "e.html").exists()
