"""The analysis of attention experts as rules: a JetMoE checkpoint of a folder needs a row and nothing else."""

import json
import shutil

import heads_models
import pytest
import yaml
from workflow_runs import ROOT, copy_repository, counts, planned, read_sheet, snakemake, write_sheet

from moe_atlas import tables

AMOUNTS = ("heads_tokens=2000", "heads_loss_tokens=200", "heads_map_tokens=100")
ALONE = ("--config", "moa=alone.yaml", *AMOUNTS)


@pytest.fixture(scope="module")
def atlas(tmp_path_factory):
    """A copy of the repository with one small JetMoE of a folder, one model without attention experts, a short text,
    and settings that keep no MoA model."""
    folder = copy_repository(tmp_path_factory.mktemp("attention experts") / "atlas")
    tokenizer = ROOT / "tests/data/oracle/checkpoints/mixtral"
    vocabulary = json.loads((tokenizer / "config.json").read_text())["vocab_size"]
    heads_models.save_jetmoe(folder / "local", vocab_size=vocabulary)
    for file in tokenizer.glob("*token*"):
        shutil.copy(file, folder / "local")
    rows = {row["model"]: row for row in read_sheet(folder / "config/models.tsv")}
    local = rows["demo-jetmoe"] | {"model": "local", "source": "path:local"}
    write_sheet(folder / "config/models.tsv", [local, rows["demo-olmoe"]])
    corpora = {row["corpus"]: row for row in read_sheet(folder / "config/corpora.tsv")}
    write_sheet(folder / "config/corpora.tsv", [corpora[name] | {"max_sequences": "12"} for name in ("prose",)])
    settings = yaml.safe_load((folder / "config/moa.yaml").read_text(encoding="utf-8"))
    (folder / "alone.yaml").write_text(yaml.safe_dump(settings | {"keep": []}), encoding="utf-8")
    return folder


def test_a_row_with_attention_experts_is_looked_into_and_no_other(atlas):
    jobs = counts(planned(atlas, "results/tables/moa_sites.csv", *ALONE))
    assert jobs == {"prepare_corpus": 1, "describe_checkpoint": 1, "analyse_heads": 1, "aggregate_heads": 1}


def test_the_models_that_the_experiments_keep_are_looked_into(atlas):
    settings = yaml.safe_load((atlas / "config/moa.yaml").read_text(encoding="utf-8"))
    jobs = planned(atlas, "results/tables/moa_load.csv")
    looked = {job.wildcards["looked"] for job in jobs if job.rule == "analyse_heads"}
    kept = [pair for pair in settings["keep"] if settings["arms"][pair[1]]["attention"] == "moa"]
    assert "local" in looked and len(looked) == 1 + len(kept)
    assert counts(jobs)["train_moa"] == len(kept)
    assert all(name.count(".") == 2 for name in looked - {"local"})


def test_a_row_that_is_not_there_ends_with_a_sentence(atlas):
    said = snakemake(atlas, "-n", "--config", "heads_models=other", check=False)
    assert "config, key heads_models: the model sheet has no enabled row other." in said and "Traceback" not in said


def test_a_checkpoint_of_a_folder_has_its_tables_and_figures_once(atlas):
    figure = "results/figures/moa/local/ablation.prose.png"
    snakemake(atlas, figure, *ALONE)
    assert (atlas / figure).stat().st_size > 10_000
    for name in tables.HEADS:
        frame = tables.read(name, atlas / f"results/moa/looked/local/{name}.parquet")
        assert frame["model"].unique().to_list() == ["local"], name
    frame = tables.read("moa_ablation", atlas / "results/tables/moa_ablation.parquet")
    assert set(frame["corpus"]) == {"prose"}
    assert planned(atlas, figure, *ALONE) == []
