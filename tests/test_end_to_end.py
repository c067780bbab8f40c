"""A reduced demo, really run: four models trained for a few steps, two corpora, through to the index page."""

import re
import shutil
import zipfile
from pathlib import Path

import polars as pl
import pytest
import reference
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from workflow_runs import copy_repository, planned, read_sheet, snakemake, write_sheet

from moe_atlas import tables
from moe_atlas.files import read_json, sha256, write_json

MODELS = ("demo-mistral", "demo-mixtral", "demo-deepseek", "demo-jetmoe")
CORPORA = {"prompt": "short", "prose": "long"}
# Columns that have no value in some rows: pairs of other widths, levels without neurons, texts of too few documents.
NULLABLE = {
    "matching": ["cosine_before", "tau", "null_tau_sd"],
    "projection": ["neuron", "outlier", "null_outlier"],
    "output_similarity": ["cosine_sd_documents"],
    "specialization": ["value", "chance", "low", "high", "random_router"],
    "domain": ["other", "expert", "chance", "p_value", "low", "high", "random_router"],
}
RUN = ("--config", "demo_steps_factor=0.06")


@pytest.fixture(scope="module")
def atlas(tmp_path_factory):
    """A copy of the repository after one run of a reduced sheet."""
    folder = copy_repository(tmp_path_factory.mktemp("end to end") / "atlas")
    models = {row["model"]: row for row in read_sheet(folder / "config/models.tsv")}
    corpora = {row["corpus"]: row for row in read_sheet(folder / "config/corpora.tsv")}
    write_sheet(folder / "config/models.tsv", [models[name] for name in MODELS])
    limits = {"prompt": "0", "prose": "5"}
    write_sheet(folder / "config/corpora.tsv", [corpora[name] | {"max_sequences": limits[name]} for name in CORPORA])
    # A third of the claims: their resampling is the longest job, and tests of their own look at each.
    write_sheet(folder / "config/claims.tsv", read_sheet(folder / "config/claims.tsv")[::3])
    snakemake(folder, *RUN)
    return folder


def finished(text: str) -> set[tuple[str, str]]:
    """(rule, its model or "") of the jobs that a run finished."""
    jobs = {}
    for block in re.split(r"\n(?=(?:local)?rule \w+:\n)", text)[1:]:
        rule = re.match(r"(?:local)?rule (\w+):", block)[1]
        number, wildcards = re.search(r"jobid: (\d+)", block), re.search(r"wildcards: .*?model=([^\s,]+)", block)
        jobs[number[1]] = (rule, wildcards[1] if wildcards else "")
    return {jobs[number] for number in re.findall(r"Finished jobid: (\d+)", text)}


def hashes(folder: Path) -> dict[str, str]:
    """sha256 of every result but logs and benchmarks."""
    files = (path for path in (folder / "results").rglob("*") if path.is_file())
    kept = (path for path in files if not {"logs", "benchmarks"} & set(path.parts))
    return {str(path.relative_to(folder)): sha256(path) for path in kept}


def model_table(folder: Path, model: str, name: str, corpus: str = "") -> pl.DataFrame:
    return tables.read(name, folder / "results/models" / model / tables.TABLES[name].path.format(corpus=corpus))


@pytest.mark.parametrize("model", MODELS)
def test_every_table_of_the_contract_is_there(atlas, model):
    dense = model == "demo-mistral"
    for name, declared in tables.TABLES.items():
        for corpus in [corpus for corpus, kind in CORPORA.items() if kind in declared.kinds] or [""]:
            if declared.kinds and not corpus:
                continue
            frame = model_table(atlas, model, name, corpus)
            assert frame.is_empty() == (dense and name != "tokens"), (name, corpus)
            assert frame.is_empty() or frame["model"].unique().to_list() == [model]
            filled = frame.drop(NULLABLE.get(name, []))
            assert filled.drop_nulls().height == frame.height, name
    if model == "demo-jetmoe":
        assert set(model_table(atlas, model, "load", "prose")["site"]) == {"ffn", "attention"}


@pytest.mark.parametrize("model", ["demo-mixtral", "demo-deepseek"])
def test_every_value_equals_a_float64_recomputation(atlas, model):
    directory = atlas / "results/checkpoints" / model
    dense = atlas / "results/checkpoints/demo-mistral" if model == "demo-mixtral" else None
    second = reference.Reference(directory, dense)
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    expected = {("similarity", ""): second.similarity(model), ("regression", ""): second.regression(model)}
    near_ties, tokens = {}, {}
    for corpus in CORPORA:
        texts = pl.read_parquet(atlas / f"results/corpora/{corpus}.parquet")
        ids = [tokenizer.encode(text).ids for text in texts["text"].to_list()]
        assert model_table(atlas, model, "tokens", corpus)["token_id"].to_list() == [i for row in ids for i in row]
        found = second.behavior(model, corpus, ids, texts["document"].to_list())
        kept = {name for name, declared in tables.TABLES.items() if CORPORA[corpus] in declared.kinds}
        expected |= {(name, corpus): frame for name, frame in found.items() if name in kept}
        near_ties[corpus] = sum(second.near_ties.values())
        tokens[corpus] = sum(map(len, ids))
    assert len(expected) == 2 + 10 + 7
    width = read_json(atlas / f"results/models/{model}/checkpoint.json")["m"]
    for (name, corpus), frame in expected.items():
        ours = model_table(atlas, model, name, corpus)
        for column, difference in reference.largest_difference(name, ours, frame).items():
            # Norms closer than float32 resolves may swap ranks, activations cross a threshold; nothing else may differ.
            allowed = 0
            if column in ("count", "norm_rank", "score_rank", "largest_both", "rank_product"):
                allowed = 2 * near_ties[corpus]
            elif name == "documents":
                allowed = 2 * near_ties[corpus] / tokens[corpus]
            elif column == "ratio":
                allowed = 3 / (tokens[corpus] * width)
            assert difference < 1e-5 + allowed, (name, corpus, column, difference)


def test_demo_checkpoints_say_how_well_they_do(atlas):
    for model in MODELS:
        training = read_json(atlas / "results/checkpoints" / model / "training.json")
        perplexity, unigram = training["perplexity"]["overall"], training["unigram_perplexity"]["overall"]
        assert 1 < perplexity < training["settings"]["config"]["vocab_size"] and unigram > 1
        if not training["settings"]["start_from"]:
            assert training["loss"]["last"] < training["loss"]["first"]


def test_all_models_are_put_together(atlas):
    for name in tables.TABLES:
        together = tables.read(name, atlas / f"results/tables/{name}.parquet")
        assert set(together["model"]) == set(MODELS) - (set() if name == "tokens" else {"demo-mistral"})
        assert (atlas / f"results/tables/{name}.csv").read_text().startswith(",".join(together.columns))


def test_every_figure_of_the_manifests_is_there_and_is_a_target(atlas):
    manifests = sorted((atlas / "results/figures").glob("*/*/figures.json"))
    listed = [atlas / entry["path"] for manifest in manifests for entry in read_json(manifest)["files"]]
    assert len(listed) > 300 and all(path.stat().st_size > 1000 for path in listed)
    figure = "results/figures/demo-mixtral/weight_similarity/layer_1_full.png"
    before = (atlas / figure).read_bytes()
    (atlas / figure).unlink()
    assert finished(snakemake(atlas, *RUN, "--", figure)) == {("plot_layer", "demo-mixtral")}
    assert (atlas / figure).read_bytes() == before


def test_every_link_of_the_index_resolves(atlas):
    page = (atlas / "results/index.html").read_text()
    links = re.findall(r'(?:href|src)="([^"#][^"]*)"', page)
    assert len(links) > 100
    assert not [link for link in links if not (atlas / "results" / link.split("#")[0]).exists()]
    for model in MODELS:
        assert model in page and f"parametric-{model}.html" in page


def test_every_job_left_a_log_and_a_measurement(atlas):
    logs = list((atlas / "results/logs").rglob("*.log"))
    assert logs and not [path for path in logs if path.stat().st_size == 0]
    extraction = (atlas / "results/logs/extract_activations/demo-mixtral/prose.log").read_text()
    assert re.search(r"layer 4/4 · [\d.]+ (layers/s|s/layer) · done in", extraction)
    assert len(list((atlas / "results/benchmarks").rglob("*.tsv"))) >= len(logs)


def test_a_second_run_does_nothing_and_a_moved_folder_neither(atlas, tmp_path):
    assert "Nothing to be done" in snakemake(atlas, *RUN)
    moved = shutil.copytree(atlas, tmp_path / "elsewhere", copy_function=shutil.copy)
    assert "Nothing to be done" in snakemake(moved, *RUN, "-n")


def test_the_report_carries_figures_and_tables_with_captions(atlas):
    snakemake(atlas, *RUN, "--report", "results/report.zip")
    with zipfile.ZipFile(atlas / "results/report.zip") as report:
        names = report.namelist()
        text = "".join(report.read(name).decode("utf-8", "ignore") for name in names if name.endswith((".html", ".js")))
    assert sum(name.endswith("overview.png") for name in names) > 40
    assert sum(name.endswith(".csv") for name in names) == len(tables.TABLES | tables.ACROSS)
    for wanted in ("demo-deepseek", "weight_similarity", "Comparison", "Tables", "cosine"):
        assert wanted in text


AGGREGATES = {"aggregate_tables", "plot_comparison", "comparison_notebook", "make_index", "saturation", "all"}
AGGREGATES |= {"judge_claims", "compare_published"}


def test_a_copied_checkpoint_as_a_new_row_runs_that_model_and_removing_it_takes_it_out(atlas, tmp_path):
    folder = shutil.copytree(atlas, tmp_path / "atlas", copy_function=shutil.copy)
    shutil.copytree(folder / "results/checkpoints/demo-mixtral", folder / "my checkpoint")
    rows = read_sheet(folder / "config/models.tsv")
    mine = {"model": "mine", "source": "path:my checkpoint", "dense_reference": "demo-mistral"}
    write_sheet(folder / "config/models.tsv", [*rows, rows[1] | mine])
    jobs = finished(snakemake(folder, *RUN))
    assert {rule for rule, model in jobs if model != "mine"} == AGGREGATES
    assert {model for _, model in jobs} == {"mine", ""}
    for name in ("similarity", "regression"):
        copied, original = (model_table(folder, model, name).drop("model") for model in ("mine", "demo-mixtral"))
        assert copied.equals(original)
    # The copied row has the series of demo-mixtral, and chooses what it chooses.
    saturation = tables.read("saturation", folder / "results/tables/saturation.parquet")
    assert saturation.select("model", "end").unique().rows() == [("demo-mixtral", "mine")]
    assert set(saturation["overlap"]) == set(saturation["top1"]) == {1.0} and set(saturation["js_divergence"]) == {0.0}
    write_sheet(folder / "config/models.tsv", rows)
    assert {job.rule for job in planned(folder, *RUN)} == AGGREGATES - {"all"}
    table = "results/tables/load.parquet"
    assert finished(snakemake(folder, *RUN, "--", table)) == {("aggregate_tables", "")}
    assert set(tables.read("load", folder / "results/tables/load.parquet")["model"]) == set(MODELS[1:])


def test_faulty_rows_end_with_a_sentence_each_and_take_nothing_away(atlas, tmp_path):
    """A truncated shard, NaN weights, a config without experts, an unknown architecture, an empty corpus."""
    folder = shutil.copytree(atlas, tmp_path / "atlas", copy_function=shutil.copy)
    before = hashes(folder)
    for name in ("truncated", "nan", "no-experts", "unknown"):
        shutil.copytree(folder / "results/checkpoints/demo-mixtral", folder / name)
    shard = folder / "truncated/model.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1000])
    weights = load_file(folder / "nan/model.safetensors")
    weights["model.layers.2.block_sparse_moe.experts.3.w1.weight"][5, 7] = torch.nan
    save_file(weights, folder / "nan/model.safetensors", metadata={"format": "pt"})
    config = read_json(folder / "no-experts/config.json")
    write_json(folder / "no-experts/config.json", {k: v for k, v in config.items() if k != "num_local_experts"})
    write_json(folder / "unknown/config.json", config | {"model_type": "hydra", "architectures": ["Hydra"]})
    (folder / "empty.txt").write_text("\n\n")
    models, corpora = read_sheet(folder / "config/models.tsv"), read_sheet(folder / "config/corpora.tsv")
    faulty = [{"model": name, "source": f"path:{name}"} for name in ("truncated", "nan", "no-experts", "unknown")]
    write_sheet(folder / "config/models.tsv", [*models, *(models[1] | row for row in faulty)])
    nothing = corpora[0] | {"corpus": "nothing", "source": "file:empty.txt"}
    write_sheet(folder / "config/corpora.tsv", [*corpora, nothing])
    with pytest.raises(AssertionError) as failure:
        snakemake(folder, *RUN)
    text = str(failure.value)
    for sentence in (
        r"error: truncated/model\.safetensors: the file is truncated: .* again\.",
        r"error: nan/model\.safetensors: the tensor model\.layers\.2\.\S+3\.w1\.weight holds NaN .* again\.",
        r"error: no-experts/config\.json: the number of experts is missing \(num_local_experts\); restore the file\.",
        r"error: unknown/config\.json: there is no model class for model type 'hydra'; .* in CONTRIBUTING\.md",
        r"error: .*nothing.*empty\.txt.*\.",
    ):
        assert re.search(sentence, text), sentence
    assert "Traceback" not in text
    after = hashes(folder)
    assert {path: after.get(path) for path in before} == before
