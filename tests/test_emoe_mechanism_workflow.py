"""The mechanism test as rules: what is planned, what a change repeats, and a small dense model, really run."""

import json
import shutil

import families
import pytest
from workflow_runs import ROOT, copy_repository, counts, planned, read_sheet, snakemake, write_sheet

from moe_atlas import tables
from moe_atlas.plotting.registry import EMOE_MECHANISM

GRID = ("mechanism_grid=4:1,4 8:2", "mechanism_seeds=2", "mechanism_loss_tokens=100", "mechanism_models=local")


@pytest.fixture(scope="module")
def atlas(tmp_path_factory):
    """A copy of the repository with one small dense model of a folder, and two short texts read as long corpora."""
    folder = copy_repository(tmp_path_factory.mktemp("emoe mechanism") / "atlas")
    tokenizer = ROOT / "tests/data/oracle/checkpoints/mixtral"
    vocabulary = json.loads((tokenizer / "config.json").read_text())["vocab_size"]
    families.save("mistral", folder / "local", num_hidden_layers=2, vocab_size=vocabulary)
    for file in tokenizer.glob("*token*"):
        shutil.copy(file, folder / "local")
    rows = {row["model"]: row for row in read_sheet(folder / "config/models.tsv")}
    dense = rows["demo-mistral"] | {"model": "local", "source": "path:local"}
    write_sheet(folder / "config/models.tsv", [dense, rows["demo-mixtral"] | {"dense_reference": "local"}])
    corpora = {row["corpus"]: row for row in read_sheet(folder / "config/corpora.tsv")}
    write_sheet(folder / "config/corpora.tsv", [corpora[name] | {"max_sequences": "12"} for name in ("prose", "code")])
    return folder


def test_a_dense_reference_is_tested_when_it_is_asked_for_and_not_by_all(atlas):
    wanted = [f"results/tables/{name}.csv" for name in tables.EMOE]
    jobs = counts(planned(atlas, *wanted))
    assert jobs == {"prepare_corpus": 2, "describe_checkpoint": 1, "emoe_mechanism": 1, "aggregate_emoe": 3}
    assert not [rule for rule in counts(planned(atlas)) if "emoe" in rule]


def test_the_target_emoe_has_every_table_figure_and_the_notebook(atlas):
    jobs = planned(atlas, "emoe")
    made = {path for job in jobs for path in job.output}
    drawn = sum(2 if figure.kinds else 1 for figure in EMOE_MECHANISM.values())  # two corpora
    assert sum(path.startswith("results/figures/emoe/local/") and path.endswith(".png") for path in made) == drawn
    assert "results/notebooks/emoe.html" in made
    assert {"results/tables/emoe_mechanism.parquet", "results/tables/emoe_differences.parquet"} <= made


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ("mechanism_models=other", "config, key mechanism_models: the model sheet has no enabled row other."),
        ("mechanism_grid=some", "config, key mechanism_grid: 'some' is not allowed here; write N:k,k"),
        ("mechanism_seeds=0", "config, key mechanism_seeds: 0 is below 1; write a whole number from 1"),
    ],
)
def test_a_faulty_value_ends_with_a_sentence(atlas, given, sentence):
    said = snakemake(atlas, "-n", "--config", given, check=False)
    assert sentence in said and "Traceback" not in said


def test_a_small_model_is_tested_and_a_change_repeats_what_reads_it(atlas):
    figure = "results/figures/emoe/local/mass.prose.png"
    snakemake(atlas, figure, "results/tables/emoe_selection.csv", "--config", *GRID)
    frame = tables.read("emoe_mechanism", atlas / "results/tables/emoe_mechanism.parquet")
    assert frame["model"].unique().to_list() == ["local"]
    assert (frame.filter(measure="loss_rise", experts=4, k=4)["value"] == 0).all()
    assert frame["layer"].unique().drop_nulls().to_list() == [1]  # of two layers every second one, the last among them
    assert (atlas / figure).stat().st_size > 10_000
    assert planned(atlas, figure, "--config", *GRID) == []
    jobs = planned(atlas, figure, "--config", *GRID[:1], "mechanism_seeds=3", *GRID[2:])
    assert counts(jobs) == {"emoe_mechanism": 1, "aggregate_emoe": 1, "plot_emoe": 1}
    code = atlas / "scripts/moe_atlas/modularity/frames.py"
    code.write_text(code.read_text(encoding="utf-8") + "\n# a comment\n", encoding="utf-8")
    assert planned(atlas, figure, "--config", *GRID) == []
