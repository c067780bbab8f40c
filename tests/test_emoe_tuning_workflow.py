"""The fine-tuning of a tiny model: from texts to tables, and what a change of the settings runs again."""

import polars as pl
import pytest
import torch
import yaml
from transformers import MistralConfig, MistralForCausalLM
from workflow_runs import ROOT, copy_repository, counts, planned, snakemake

from moe_atlas import tables
from moe_atlas.training.save import save_checkpoint
from moe_atlas.training.tokenizer import train_tokenizer
from moe_atlas.tuning.arms import ARMS
from moe_atlas.tuning.settings import load_settings

FOLDER = "checkpoints/tiny"
TARGET = "results/tables/emoe_runs.parquet"
SETTINGS = {
    "models": {"tiny": {"folder": FOLDER, "ready": f"{FOLDER}/config.json"}},
    "tasks": {"source": {"source": "demo:source", "metric": "accuracy"}},
    "training": {"length": 16, "steps": 4, "batch": 4, "evaluate": 2, "patience": 2, "weight_decay": 0.0},
    "copies": {"experts": 2, "k": 1},
    "arms_per_job": 2,
    "job_needs": {"gpus": 0, "mem_mb": 2000, "runtime": 10},
    "defaults": {
        **{"models": ["tiny"], "tasks": ["source"], "experts": [4], "shares": [0.5], "layers": [[0]]},
        **{"fractions": [0.1], "seeds": 2, "selection_seeds": 1, "rates": {"full": [0.01], "lora": [0.01]}},
    },
    "studies": {"arms": {"arms": ["dense", "emoe", "gmoe"]}, "grid": {"arms": ["dense"], "fractions": [0.2]}},
}


def write(folder, settings) -> None:
    (folder / "config" / "emoe.yaml").write_text(yaml.safe_dump(settings))


@pytest.fixture(scope="module")
def atlas(tmp_path_factory):
    """A copy of the repository with a tiny random model, tuned."""
    folder = copy_repository(tmp_path_factory.mktemp("tuning") / "atlas")
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    config = MistralConfig(vocab_size=300, num_key_value_heads=1, pad_token_id=None, **sizes)
    torch.manual_seed(0)
    save_checkpoint(MistralForCausalLM(config), train_tokenizer(["prose or code"], 300), folder / FOLDER, 0)
    write(folder, SETTINGS)
    snakemake(folder, TARGET)
    return folder


def test_the_tables_have_every_run(atlas):
    runs = tables.read("emoe_runs", atlas / "results/tables/emoe_runs.parquet")
    tested = runs.filter(pl.col("test") != "validation").group_by("study", "arm").len().sort("study", "arm")
    arms = ("dense", "dense2emoe", "emoe", "emoe2dense", "gmoe")
    expected = [("arms", arm, 4) for arm in arms] + [("grid", arm, 4) for arm in arms[:2]]
    assert tested.rows() == expected
    differences = tables.read("emoe_differences", atlas / "results/tables/emoe_differences.parquet")
    assert set(differences["seeds"]) == {2} and {"emoe", "gmoe"} < set(differences["arm"])
    for name in ("emoe_runs", "emoe_differences", "emoe_training_selection"):
        table = tables.read(name, atlas / f"results/tables/{name}.parquet")
        assert len(pl.read_csv(atlas / f"results/tables/{name}.csv", infer_schema=False)) == len(table) > 0
    assert tables.read("emoe_tasks", atlas / "results/emoe/tasks/source.parquet")["classes"].unique().item() == 2


def test_a_change_runs_what_it_is_about(atlas):
    assert "Nothing to be done" in snakemake(atlas, "-n", TARGET)
    studies = SETTINGS["studies"]
    write(atlas, SETTINGS | {"studies": studies | {"grid": studies["grid"] | {"seeds": 1}}})
    jobs = planned(atlas, TARGET)
    assert counts(jobs) == {"tune_emoe": 1, "compare_emoe": 1}
    assert {job.wildcards["study"] for job in jobs if job.rule == "tune_emoe"} == {"grid"}
    # Another checkpoint under the same id, and the file that says it is whole is the same.
    write(atlas, SETTINGS | {"models": {"tiny": SETTINGS["models"]["tiny"] | {"folder": "checkpoints/other"}}})
    assert counts(planned(atlas, TARGET)) == {"tune_emoe": 3, "compare_emoe": 1}
    write(atlas, SETTINGS)


def test_faulty_settings_end_the_run_with_a_sentence(atlas):
    write(atlas, SETTINGS | {"studies": {"arms": {"arms": ["denes"]}}})
    printed = snakemake(atlas, "-n", TARGET, check=False)
    write(atlas, SETTINGS)
    assert "config/emoe.yaml, studies, arms, arms: denes is not one of dense" in printed and "Traceback" not in printed


def test_the_shipped_settings_need_these_jobs():
    settings = load_settings(ROOT / "config/emoe.yaml")
    expected = {"prepare_task": len(settings.tasks), "tune_emoe": len(settings.jobs()), "compare_emoe": 1}
    jobs = planned(ROOT, "--forceall", TARGET)
    assert counts(jobs) == expected | {"train_demo_checkpoint": len(settings.models)}
    assert {job.wildcards["recipe"] for job in jobs if job.rule == "train_demo_checkpoint"} == set(settings.models)


def test_each_model_has_the_figures_of_what_its_studies_vary():
    """Both backbones, though only the causal one is read before the tuning and has its N, k, layers and data varied."""
    settings = load_settings(ROOT / "config/emoe.yaml")
    assert [settings.varied(model) for model in settings.models] == [{"grid", "layers", "fraction"}, set()]
    jobs = [job for job in planned(ROOT, "--forceall", "emoe") if job.rule == "plot_emoe"]
    figures = {model: {job.wildcards["figure"] for job in jobs if job.wildcards["backbone"] == model}
               for model in settings.models}  # fmt: skip
    assert figures["demo-mistral"] >= {"arms", "selection", "grid", "layers", "fraction"}
    assert figures["demo-encoder"] == {"arms", "selection"}


def test_the_settings_of_the_paper_are_whole():
    """Every arm with BERT-large on the small sets of GLUE; each file of data sets is there and names commits."""
    settings = load_settings(ROOT / "config/emoe_paper.yaml")
    assert set(settings.studies["arms"].arms) == set(ARMS) and len(settings.tasks) == 8
    for task in settings.tasks.values():
        content = yaml.safe_load((ROOT / task["source"].removeprefix("data:")).read_text())
        assert {"train", "in-domain"} <= set(content["sets"])
        assert all(len(values["revision"]) == 40 for values in content["sets"].values())


def test_the_settings_of_a_language_model_need_these_jobs(atlas):
    ready = atlas / "data/models/llama-2-7b/config.json"
    ready.parent.mkdir(parents=True)
    ready.write_text("{}")
    jobs = planned(atlas, "--config", "emoe=config/emoe_llama.yaml", "--forceall", "--", TARGET)
    expected = len(load_settings(ROOT / "config/emoe_llama.yaml").jobs())
    assert counts(jobs) == {"fetch_task": 1, "tune_emoe": expected, "compare_emoe": 1}
