"""What the workflow would run, from dry runs: counts, names and what a change reaches. Nothing is computed here."""

import os
import re
import shutil
import subprocess
import sys
from collections import Counter

import pytest
from workflow_runs import ROOT, copy_repository, counts, planned, pretend_finished, read_sheet, snakemake, write_sheet

from moe_atlas.plotting.registry import COMPARISONS, EXPERIMENTS
from moe_atlas.tables import TABLES

RULES = ROOT / "workflow" / "rules"
ACROSS_MODELS = {
    "judge_claims": 1,
    "compare_published": 1,
    "aggregate_tables": len(TABLES),
    "plot_comparison": len(COMPARISONS),
    "comparison_notebook": 1,
    "make_index": 1,
}


def of_one_model(shorts: int, longs: int) -> dict[str, int]:
    """Jobs that one more model needs, its checkpoint aside."""
    jobs = {
        "describe_checkpoint": 1,
        "weight_statistics": 1,
        "router_regression": 1,
        "extract_activations": shorts + longs,
        "short_tables": shorts,
        "long_tables": longs,
        "domain_table": 1,
        "model_notebook": 2,
    }
    for name, experiment in EXPERIMENTS.items():
        kinds = {"short": shorts, "long": longs}
        jobs[f"plot_{name}"] = sum(kinds[kind] for kind in experiment.kinds) if experiment.kinds else 1
    return jobs


def plots(jobs: list) -> set[str]:
    return {job.rule for job in jobs if job.rule.startswith("plot_")}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A copy of the repository with four models and two corpora, all results recorded as finished."""
    folder = copy_repository(tmp_path_factory.mktemp("finished") / "atlas")
    models = {row["model"]: row for row in read_sheet(folder / "config/models.tsv")}
    corpora = {row["corpus"]: row for row in read_sheet(folder / "config/corpora.tsv")}
    write_sheet(folder / "config/models.tsv", [models[name] for name in ("demo-mistral", "demo-mixtral", "demo-olmoe")])
    write_sheet(folder / "config/corpora.tsv", [corpora[name] for name in ("prompt", "prose")])
    add_local_model(folder, "local")
    pretend_finished(folder)
    return folder


@pytest.fixture
def atlas(finished, tmp_path):
    """A private copy of the finished atlas. Copied file by file, so that every file is new to the clock."""
    return shutil.copytree(finished, tmp_path / "moved atlas", copy_function=shutil.copy)


def change_model(folder, name: str, **cells: str) -> None:
    rows = read_sheet(folder / "config/models.tsv")
    write_sheet(folder / "config/models.tsv", [row | cells if row["model"] == name else row for row in rows])


def add_local_model(folder, name: str) -> None:
    checkpoint = folder / "checkpoints" / name
    checkpoint.mkdir(parents=True)
    (checkpoint / "config.json").write_text("{}")
    (checkpoint / "model.safetensors").write_bytes(b"weights")
    rows = read_sheet(folder / "config/models.tsv")
    row = rows[-1] | {"model": name, "source": f"path:checkpoints/{name}", "dense_reference": ""}
    write_sheet(folder / "config/models.tsv", [*rows, row])


def append(path, text: str) -> None:
    path.write_text(path.read_text(encoding="utf-8") + text, encoding="utf-8")


def test_the_shipped_sheets_need_these_jobs():
    jobs = planned(ROOT, "--forceall")
    models = [row for row in read_sheet(ROOT / "config/models.tsv") if row["enabled"] == "true"]
    kinds = Counter(row["kind"] for row in read_sheet(ROOT / "config/corpora.tsv"))
    each = of_one_model(kinds["short"], kinds["long"])
    expected = {rule: number * len(models) for rule, number in each.items()} | ACROSS_MODELS
    demos = {row["source"].removeprefix("demo:") for row in models if row["source"].startswith("demo:")}
    expected |= {"prepare_corpus": kinds.total(), "train_demo_checkpoint": len(demos), "saturation": 1}
    expected |= {"derive_emoe": len(models) - len(demos)}
    assert counts(jobs) == expected
    trained = {job.wildcards["recipe"] for job in jobs if job.rule == "train_demo_checkpoint"}
    assert trained == demos
    assert [job.wildcards["model"] for job in jobs if job.rule == "derive_emoe"] == ["demo-emoe"]


def test_after_a_run_there_is_nothing_to_do(finished):
    assert "Nothing to be done" in snakemake(finished, "-n")


def test_a_copied_checkout_with_other_file_times_runs_nothing(atlas):
    for path in sorted(atlas.rglob("*")):
        if path.is_file() and ".snakemake" not in path.parts:
            os.utime(path)
    assert planned(atlas) == []


def test_a_new_row_runs_that_model_and_the_aggregates(atlas):
    add_local_model(atlas, "added")
    jobs = planned(atlas)
    assert counts(jobs) == of_one_model(shorts=1, longs=1) | ACROSS_MODELS
    assert {job.wildcards["model"] for job in jobs if "model" in job.wildcards} == {"added"}


def test_a_removed_row_runs_the_aggregates(atlas):
    rows = read_sheet(atlas / "config/models.tsv")
    write_sheet(atlas / "config/models.tsv", [row for row in rows if row["model"] != "demo-olmoe"])
    assert counts(planned(atlas)) == ACROSS_MODELS
    change_model(atlas, "demo-mixtral", enabled="false")
    assert counts(planned(atlas)) == ACROSS_MODELS


def test_a_changed_row_runs_what_reads_the_changed_cell(atlas):
    change_model(atlas, "demo-olmoe", dtype="bfloat16")
    jobs = planned(atlas)
    assert {job.wildcards["model"] for job in jobs if "model" in job.wildcards} == {"demo-olmoe"}
    numbers = counts(jobs)
    assert numbers["extract_activations"] == 2
    assert not {"describe_checkpoint", "weight_statistics", "router_regression", "train_demo_checkpoint"} & set(numbers)
    change_model(atlas, "demo-olmoe", dtype="float32", notes="other words", mem_mb="5000", runtime="99", gpus="1")
    assert planned(atlas) == []


def test_another_dense_reference_repeats_that_model_only(atlas):
    change_model(atlas, "demo-mixtral", dense_reference="")
    jobs = planned(atlas)
    assert {job.wildcards["model"] for job in jobs if "model" in job.wildcards} == {"demo-mixtral"}
    assert {"weight_statistics", "extract_activations"} <= set(counts(jobs))
    assert "describe_checkpoint" not in counts(jobs)


def test_a_changed_checkpoint_repeats_its_model_and_a_touched_one_nothing(atlas):
    weights, config = atlas / "checkpoints/local/model.safetensors", atlas / "checkpoints/local/config.json"
    weights.write_bytes(b"other weights")
    assert counts(planned(atlas)) == of_one_model(shorts=1, longs=1) | ACROSS_MODELS
    weights.write_bytes(b"weights")
    assert planned(atlas) == []
    config.write_text('{"num_experts": 9}')
    assert counts(planned(atlas)) == of_one_model(shorts=1, longs=1) | ACROSS_MODELS


def test_an_edit_of_plotting_code_draws_again_and_computes_nothing(atlas):
    append(atlas / "scripts/moe_atlas/plotting/style.py", "\n# a comment\n")
    rules = set(counts(planned(atlas)))
    assert {f"plot_{name}" for name in EXPERIMENTS} | {"plot_comparison", "make_index"} <= rules
    assert rules <= plots(planned(atlas)) | {"model_notebook", "comparison_notebook", "make_index"}


def test_an_edit_of_expensive_code_runs_nothing_until_its_version_is_raised(atlas):
    for name in (
        "extract_activations",
        "train_demo_checkpoint",
        "describe_checkpoint",
        "weight_statistics",
        "derive_emoe",
    ):
        append(atlas / f"scripts/{name}.py", "\n# a comment\n")
    append(atlas / "scripts/moe_atlas/stream.py", "\n# a comment\n")
    assert planned(atlas) == []
    common = atlas / "workflow/rules/common.smk"
    text = common.read_text(encoding="utf-8")
    common.write_text(re.sub(r'("extract_activations": )(\d+)', r"\g<1>99", text), encoding="utf-8")
    numbers = counts(planned(atlas))
    assert numbers["extract_activations"] == 8
    assert not {"train_demo_checkpoint", "describe_checkpoint", "weight_statistics", "prepare_corpus"} & set(numbers)


def test_models_that_share_a_series_are_compared(atlas):
    change_model(atlas, "local", series="demo-olmoe")
    assert planned(atlas) == []
    change_model(atlas, "demo-olmoe", series="demo-olmoe")
    assert set(counts(planned(atlas))) == {
        *("saturation", "judge_claims", "plot_comparison", "comparison_notebook", "make_index")
    }


def test_a_config_value_runs_what_reads_it(atlas):
    seeded = counts(planned(atlas, "--config", "seed=7"))
    assert seeded["train_demo_checkpoint"] == 3 and seeded["router_regression"] == 4
    assert "prepare_corpus" not in seeded
    append(atlas / "config/config.yaml", "\n# a comment\n")
    assert planned(atlas) == []


def test_a_recipe_is_trained_again_when_its_own_numbers_change(atlas):
    recipes = atlas / "scripts/moe_atlas/training/recipes.yaml"
    text = recipes.read_text(encoding="utf-8")
    start = text.index("\n  demo-olmoe:")
    steps = re.compile(r"steps: \d+")
    recipes.write_text(text[:start] + steps.sub("steps: 7", text[start:], count=1), encoding="utf-8")
    jobs = [job for job in planned(atlas) if job.rule == "train_demo_checkpoint"]
    assert [job.wildcards["recipe"] for job in jobs] == ["demo-olmoe"]


def test_another_sheet_by_config(atlas):
    rows = read_sheet(atlas / "config/models.tsv")
    write_sheet(atlas / "other.tsv", [row for row in rows if row["model"] == "demo-mistral"])
    assert counts(planned(atlas, "--config", "models=other.tsv")) == ACROSS_MODELS


def test_an_emoe_row_is_made_from_a_local_checkpoint_and_follows_it(atlas):
    rows = read_sheet(atlas / "config/models.tsv")
    cells = {"source": "emoe:local", "emoe_experts": "4", "emoe_top_k": "2"}
    write_sheet(atlas / "config/models.tsv", [*rows, rows[0] | {"model": "made"} | cells])
    jobs = planned(atlas)
    one = of_one_model(shorts=1, longs=1) | {"derive_emoe": 1}
    assert counts(jobs) == one | ACROSS_MODELS
    assert {job.wildcards["model"] for job in jobs if "model" in job.wildcards} == {"made"}
    pretend_finished(atlas)
    assert planned(atlas) == []
    change_model(atlas, "made", emoe_top_k="1")
    assert counts(planned(atlas)) == one | ACROSS_MODELS
    change_model(atlas, "made", emoe_top_k="2", notes="other words")
    assert planned(atlas) == []
    (atlas / "checkpoints/local/model.safetensors").write_bytes(b"other weights")
    assert {job.wildcards["model"] for job in planned(atlas) if job.rule == "derive_emoe"} == {"made"}


def test_gpus_are_asked_for_by_the_sheet_and_are_not_cut_by_the_profile(atlas):
    change_model(atlas, "demo-olmoe", gpus="4")
    jobs = [job for job in planned(atlas, "--forceall") if job.rule == "extract_activations"]
    asked = {job.wildcards["model"]: job.resources for job in jobs}
    assert (asked["demo-olmoe"]["gpu"], asked["demo-olmoe"]["gpu_jobs"]) == ("4", "1")
    assert "gpu" not in asked["demo-mixtral"] and "gpu_jobs" not in asked["demo-mixtral"]


def test_each_figure_and_table_is_a_target(atlas):
    targets = {
        "results/figures/demo-olmoe/load.prose/layer_2_full.pdf": "plot_layer",
        "results/figures/demo-olmoe/load.prose/layer_2_attention_auto.png": "plot_layer",
        "results/figures/demo-olmoe/norm_score.prompt/overview.png": "plot_norm_score",
        "results/figures/comparison/weight_similarity.pdf": "plot_comparison",
        "results/tables/load.csv": "aggregate_tables",
        "results/notebooks/behavioral-demo-olmoe.html": "model_notebook",
        "results/models/demo-olmoe/behavioral/prompt/tokens.parquet": "extract_activations",
        "results/models/demo-olmoe/parametric/regression.parquet": "router_regression",
    }
    for target in targets:
        (atlas / target).unlink(missing_ok=True)
    made = {output: job.rule for job in planned(atlas, "--", *targets) for output in job.output}
    assert {target: made.get(target) for target in targets} == targets


def test_each_stage_is_a_target(finished):
    stages = ("checkpoints", "parametric", "behavioral", "tables", "figures", "notebooks")
    assert "Nothing to be done" in snakemake(finished, "-n", "--", *stages)


def test_a_name_that_is_not_in_the_sheet_has_no_rule(finished):
    text = snakemake(finished, "-n", "--", "results/models/demo-olmo/checkpoint.json", check=False)
    assert "MissingRuleException" in text


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--config", "modles=x.tsv"], "config, key modles: there is no such key (did you mean models?)"),
        (["--config", "models=x.tsv"], "x.tsv: there is no such file; name the sheet in config/config.yaml."),
        (["--config", "seed=-1"], "config, key seed: -1 is below 0; write a whole number from 0."),
    ],
)
def test_a_faulty_config_ends_with_a_sentence(finished, arguments, sentence):
    text = snakemake(finished, "-n", *arguments, check=False)
    assert sentence in text
    assert "Traceback" not in text


def test_a_faulty_sheet_ends_with_a_sentence_and_takes_nothing_away(atlas):
    before = sorted(path for path in atlas.rglob("results/**/*"))
    sheet = atlas / "config/models.tsv"
    sheet.write_text(sheet.read_text(encoding="utf-8").replace("\tgpus\t", "\tgpu\t"), encoding="utf-8")
    text = snakemake(atlas, check=False)
    assert "config/models.tsv, line 1, column 'gpu': there is no such column (did you mean gpus?)" in text
    assert sorted(path for path in atlas.rglob("results/**/*")) == before


def test_lint():
    text = snakemake(ROOT, "--lint")
    assert "good condition" in text


@pytest.mark.parametrize(
    "command", [["snakefmt", "--check", "workflow"], ["ruff", "check"], ["ruff", "format", "--check"]]
)
def test_layout(command):
    environment = os.environ | {"PATH": f"{os.path.dirname(sys.executable)}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def rule_blocks() -> dict[str, str]:
    """Rule -> its text, target rules aside."""
    blocks = {}
    for path in RULES.glob("*.smk"):
        if path.name == "targets.smk":
            continue
        for block in re.split(r"(?m)^(?= *rule\b.*:$)", path.read_text(encoding="utf-8"))[1:]:
            name = re.search(r"rule (\w+):", block) or re.search(r'f"(plot_)\{name\}"', block)
            blocks[name[1]] = block
    return blocks


def test_rules_made_from_others_log_and_are_measured_in_places_of_their_own():
    """Such a rule without them would write where the rule it is made from does."""
    made = {}
    for path in RULES.glob("*.smk"):
        for block in re.split(r"(?m)^(?=(?:use )?rule\b)", path.read_text(encoding="utf-8")):
            if name := re.match(r"use rule \w+ as (\w+) with:", block):
                made[name[1]] = block
    assert set(made) == {"extract_part", "aggregate_emoe", "emoe_notebook", "aggregate_heads", "moa_notebook"}
    for name, block in made.items():
        for directive in ("log", "benchmark"):
            assert re.search(rf'(?m)^ +{directive}:\n +"results/{directive}\w*/{name}\b', block), (name, directive)


def test_every_rule_says_what_it_does_logs_and_is_measured():
    blocks = rule_blocks()
    assert len(blocks) == 40
    for name, block in blocks.items():
        assert '"""' in block.split("input:")[0], f"{name} has no docstring"
        for directive in ("log", "benchmark", "conda", "threads", "resources", "shell"):
            assert re.search(rf"(?m)^ +{directive}:", block), f"{name} has no {directive}"
        shell = block.split("shell:")[1]
        text = shell.split('"""')[1].strip()
        # Downloads show their progress on the terminal too: one command, all of whose output goes both ways.
        whole = text.startswith("exec >{log:q} 2>&1") or text.endswith("2>&1 | tee {log:q} >&2")
        assert whole, f"{name} does not log from its start"
        assert not re.search(r"\{(input|output|params|wildcards)[^}]*(?<!:q)\}", shell), f"{name} has an unquoted name"


def test_the_published_models_are_planned_without_a_network(tmp_path):
    """Two of them are larger than most disks: no rule of theirs asks for all the weights at once."""
    folder = copy_repository(tmp_path / "atlas")
    os.environ["HF_ENDPOINT"] = "http://127.0.0.1:9"  # nobody listens there
    try:
        jobs = planned(folder, "--configfile", "config/paper.yaml")
    finally:
        del os.environ["HF_ENDPOINT"]
    rows = [row for row in read_sheet(folder / "config/paper-models.tsv") if row["enabled"] == "true"]
    deleted = {row["model"] for row in rows if row["keep"] == "false"}
    by_rule = {rule: {job.wildcards.get("model") for job in jobs if job.rule == rule} for rule in counts(jobs)}
    assert by_rule["fetch_use_delete"] == deleted == {"mixtral-8x22b", "grok-1"}
    assert by_rule["download_checkpoint"] == {row["model"] for row in rows} - deleted
    assert not deleted & (by_rule["weight_statistics"] | by_rule["extract_activations"])
    assert "describe_checkpoint" not in by_rule
    corpora = read_sheet(folder / "config/paper-corpora.tsv")
    assert counts(jobs)["fetch_corpus"] == sum(row["source"].startswith("hf:") for row in corpora)
