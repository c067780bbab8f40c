"""The MoA experiments through Snakemake: tiny models from texts to tables, and what a change runs again."""

import json

import polars as pl
import pytest
import yaml
from workflow_runs import ROOT, copy_repository, counts, planned, snakemake

from moe_atlas import tables
from moe_atlas.moa.settings import load_settings

TARGET = "results/tables/moa_runs.parquet"
CHECKPOINT = "results/moa/checkpoints/language/causal/moa/seed-0"
SETTINGS = {
    "model": {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "max_position_embeddings": 16},
    "training": {
        **{"warmup": 1, "evaluate": 2, "window": 1, "gain": 0.5, "decay": 0.5, "least": 4, "most": 9},
        **{"margin": 0.0, "weight_decay": 0.0},
    },
    "routing": {"normalization": "detached", "balance": 0.01, "z": 0.001, "router": "learned"},
    "defaults": {
        **{"source": "demo:texts", "mix": {"prose": 0.5, "code": 0.5}, "tokenizer": 300, "length": 16, "batch": 4},
        **{"validation": 8, "seeds": 2, "selection_seeds": 1, "rates": [0.01, 0.001]},
    },
    "objectives": {"causal": {}, "masked": {"mask": 0.3}},
    "arms": {
        "mha": {"attention": "mha", "match": "parameters", "of": "moa"},
        "moa": {"attention": "moa", "experts": 4, "k": 2, "head_dim": 4},
    },
    "studies": {
        "language": {"objective": "causal", "arms": ["moa", "mha"], "contrasts": [["moa", "mha"]]},
        "again": {"objective": "causal", "arms": ["moa"]},
    },
    "keep": [["again", "moa"]],
    "job_needs": {"gpus": 0, "mem_mb": 2000, "runtime": 10},
}


def write(folder, settings) -> None:
    (folder / "config" / "moa.yaml").write_text(yaml.safe_dump(settings, sort_keys=False))


@pytest.fixture(scope="module")
def atlas(tmp_path_factory):
    """A copy of the repository whose tiny models are trained."""
    folder = copy_repository(tmp_path_factory.mktemp("moa") / "atlas")
    write(folder, SETTINGS)
    snakemake(folder, TARGET)
    return folder


def test_the_tables_have_every_run(atlas):
    runs = tables.read("moa_runs", atlas / TARGET)
    found = runs.filter(test="test").group_by("study", "arm", "objective").len().sort("study", "arm").rows()
    expected = [("again", "moa", "causal"), ("language", "mha", "causal"), ("language", "moa", "causal")]
    assert found == [(*row, 2) for row in expected]
    assert len(runs.filter(test="validation")) == 3 * 3 and (runs["chance"] > 1).all()
    once, again = (runs.filter(study=study, arm="moa").drop("study") for study in ("language", "again"))
    assert once.equals(again)
    difference = tables.read("moa_differences", atlas / "results/tables/moa_differences.parquet").row(0, named=True)
    assert (difference["arm"], difference["baseline"], difference["seeds"]) == ("moa", "mha", 2)
    for name in ("moa_runs", "moa_curves", "moa_throughput", "moa_arms", "moa_differences"):
        table = tables.read(name, atlas / f"results/tables/{name}.parquet")
        assert len(pl.read_csv(atlas / f"results/tables/{name}.csv", infer_schema=False)) == len(table) > 0


def test_the_model_of_seed_0_lies_beside_the_file_that_vouches_for_it(atlas):
    done = json.loads((atlas / CHECKPOINT / "done.json").read_text())
    config = json.loads((atlas / CHECKPOINT / "config.json").read_text())
    assert {"model.safetensors", "tokenizer.json", "config.json"} <= set(done["files"])
    assert config["model_type"] == "moa" and config["num_attention_experts"] == 4
    runs = tables.read("moa_runs", atlas / TARGET).filter(pl.col("chosen"), study="language", arm="moa", seed=0)
    assert set(runs["learning_rate"]) == {done["learning_rate"]} and set(runs["steps"]) == {done["steps"]}


def test_a_change_runs_what_it_is_about(atlas):
    assert "Nothing to be done" in snakemake(atlas, "-n", TARGET)
    arms, studies = SETTINGS["arms"], SETTINGS["studies"]
    # An arm that was trained for another study is not trained again; one of another objective is.
    more = {
        "again": {"objective": "causal", "arms": ["moa", "mha"]},
        "masked": {"objective": "masked", "arms": ["moa"]},
    }
    write(atlas, SETTINGS | {"studies": studies | more})
    jobs = planned(atlas, TARGET)
    assert counts(jobs) == {"train_moa": 1, "compare_moa": 1}
    assert [job.wildcards["objective"] for job in jobs if job.rule == "train_moa"] == ["masked"]
    # An arm that is sized by another one changes with it.
    write(atlas, SETTINGS | {"arms": arms | {"moa": arms["moa"] | {"experts": 5}}})
    assert counts(planned(atlas, TARGET)) == {"train_moa": 2, "compare_moa": 1}
    write(atlas, SETTINGS)


def test_faulty_settings_end_the_run_with_a_sentence(atlas):
    write(atlas, SETTINGS | {"keep": [["again", "mha"]]})
    printed = snakemake(atlas, "-n", TARGET, check=False)
    write(atlas, SETTINGS)
    assert "config/moa.yaml, keep: no study again has an arm mha" in printed and "Traceback" not in printed


def test_the_shipped_settings_need_these_jobs():
    settings = load_settings(ROOT / "config/moa.yaml")
    plan = planned(ROOT, "--forceall", "moa")
    made = {path for job in plan for path in job.output}
    for name in (*tables.MOA, *tables.HEADS):
        assert {f"results/tables/{name}.parquet", f"results/tables/{name}.csv"} <= made
    figures = {path for path in made if path.startswith("results/figures/moa/")}
    experiments = {"perplexity", "differences", "grid", "routing", "curves", "throughput"}
    expected = {f"{name}.causal" for name in experiments}
    expected |= {f"{name}.masked" for name in experiments - {"grid", "routing"}}
    expected |= {f"{name}.translation" for name in experiments - {"grid", "routing", "perplexity"} | {"translation"}}
    found = {path.split("/")[-1] for path in figures if path.count("/") == 3}
    assert found == {f"{name}.{suffix}" for name in expected for suffix in ("png", "pdf")}
    assert "results/figures/moa/demo-jetmoe/sites.prose.png" in figures and "results/notebooks/moa.html" in made
    jobs = counts(plan)
    assert jobs["train_moa"] == len(settings.jobs()) and jobs["compare_moa"] == 1
    assert "extract_activations" not in jobs and jobs["train_demo_checkpoint"] == 1  # demo-jetmoe
