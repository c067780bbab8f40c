"""A reduced demo on a real Slurm: the tables of a local run, byte by byte; killed jobs; a new model; GPUs.

`make test-cluster` runs it. Its name keeps it out of `make test`, which needs neither root nor Slurm.
"""

import re
import shutil
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import yaml
from slurm_node import SlurmNode, missing

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from workflow_runs import ROOT, copy_repository, counts, planned, read_sheet, snakemake, write_sheet

from moe_atlas.files import sha256

pytestmark = pytest.mark.skipif(bool(missing()), reason=missing() or "Slurm is here")

MODELS = ("demo-mistral", "demo-mixtral")
CORPORA = {"prompt": "0", "prose": "3"}
# Slurm is asked every second instead of every 40: the jobs here take seconds.
OFTEN = (
    "--slurm-init-seconds-before-status-checks",
    "1",
    "--seconds-between-status-checks",
    "1",
    "--latency-wait",
    "5",
)
RUN = ("--config", "demo_steps_factor=0.03", "--")
# Two models' weights, statistics and tables across models, without the claims that resample for a minute.
TARGETS = (
    "checkpoints",
    "parametric",
    "behavioral",
    "results/tables/similarity.parquet",
    "results/tables/load.parquet",
)
SECONDS = 900


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    node = SlurmNode(tmp_path_factory.mktemp("slurm"))
    node.start()
    yield node
    node.stop()


def reduced(folder: Path) -> Path:
    """A copy of the repository with two models and two corpora, and the names of the test's partitions filled in."""
    copy_repository(folder)
    models = {row["model"]: row for row in read_sheet(folder / "config/models.tsv")}
    corpora = {row["corpus"]: row for row in read_sheet(folder / "config/corpora.tsv")}
    write_sheet(folder / "config/models.tsv", [models[name] for name in MODELS])
    rows = [corpora[name] | {"max_sequences": most} for name, most in CORPORA.items()]
    write_sheet(folder / "config/corpora.tsv", rows)
    partitions = folder / "workflow/profiles/slurm/partitions.yaml"
    text = partitions.read_text()
    partitions.write_text(text.replace("CPU_PARTITION", "cpu").replace("GPU_PARTITION", "gpu"))
    return folder


class Run:
    """Snakemake at work on Slurm, as a user starts it: with a profile. `finish` returns what it printed."""

    def __init__(self, folder: Path, node: SlurmNode, *arguments: str, profile: str = "slurm", flag: str = "--profile"):
        self.output = folder / "snakemake.out"
        command = [sys.executable, "-m", "snakemake", flag, f"workflow/profiles/{profile}"]
        command += [*(OFTEN if profile == "slurm" else OFTEN[2:]), *arguments]
        with self.output.open("w") as out:
            self.process = subprocess.Popen(command, cwd=folder, env=node.environment, stdout=out, stderr=out)

    def finish(self, check: bool = True) -> str:
        try:
            code = self.process.wait(timeout=SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise AssertionError(self.output.read_text()) from None
        assert not check or code == 0, self.output.read_text()
        return self.output.read_text()


def tables(folder: Path) -> dict[str, str]:
    """sha256 of every table."""
    return {str(path.relative_to(folder)): sha256(path) for path in sorted((folder / "results").rglob("*.parquet"))}


def submitted(node: SlurmNode, since: int) -> list[dict[str, str]]:
    """Jobs of this Slurm after the first `since`."""
    return node.jobs()[since:]


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    """What a run without Slurm makes, where a copied checkpoint is added as a row afterwards."""
    folder = reduced(tmp_path_factory.mktemp("local") / "atlas")
    snakemake(folder, *RUN, *TARGETS)
    before = tables(folder)
    add_copy(folder)
    snakemake(folder, *RUN, *TARGETS)
    return before, tables(folder)


def add_copy(folder: Path) -> None:
    shutil.copytree(folder / "results/checkpoints/demo-mixtral", folder / "my checkpoint")
    rows = read_sheet(folder / "config/models.tsv")
    write_sheet(folder / "config/models.tsv", [*rows, rows[1] | {"model": "mine", "source": "path:my checkpoint"}])


def environment_of(node: SlurmNode, job: str) -> dict[str, str]:
    """Environment of a program of the library in a running job, as the kernel has it; empty if there is none yet."""
    for pid in re.findall(r"^ *(\d+)", node.ask("scontrol", "listpids", job), re.MULTILINE):
        try:
            command = Path(f"/proc/{pid}/cmdline").read_bytes()
            text = Path(f"/proc/{pid}/environ").read_bytes().decode()
        except OSError:
            continue
        if b"scripts/extract_activations.py" in command and b"/bin/bash" not in command:
            return dict(pair.split("=", 1) for pair in text.split("\0") if "=" in pair)
    return {}


@pytest.fixture(scope="module")
def killed(slurm, tmp_path_factory):
    """A whole run on Slurm in which one running extraction is cancelled: (folder, jobs, the id, its environment)."""
    folder = reduced(tmp_path_factory.mktemp("on slurm") / "atlas")
    run, victim, environment = Run(folder, slurm, *RUN, *TARGETS), "", {}
    try:
        while run.process.poll() is None and not victim:
            for job in slurm.jobs():
                if job["state"] == "RUNNING" and job["comment"].startswith("rule_extract_activations"):
                    environment = environment_of(slurm, job["id"])
                    if environment:
                        victim = job["id"]
                        slurm.ask("scancel", victim)
                        break
            time.sleep(0.1)
        run.finish()
    finally:
        run.process.kill()
    return folder, submitted(slurm, 0), victim, environment


def test_every_table_of_a_run_on_slurm_has_the_bytes_of_a_local_run(killed, local):
    folder, before = killed[0], local[0]
    assert len(before) > 30 and tables(folder) == before


def test_a_killed_job_is_submitted_again_with_more_memory_and_finishes(killed):
    _, jobs, victim, _ = killed
    (first,) = (job for job in jobs if job["id"] == victim)
    again = [job for job in jobs if job["comment"] == first["comment"] and job["id"] != victim]
    assert first["state"] == "CANCELLED" and [job["state"] for job in again] == ["COMPLETED"]
    assert int(again[0]["memory"].rstrip("M")) == 2 * int(first["memory"].rstrip("M"))
    repeated = Counter(job["comment"] for job in jobs)
    assert [comment for comment, count in repeated.items() if count > 1] == [first["comment"]]


def test_programs_on_a_node_ask_no_hub_and_hold_their_threads(killed):
    environment = killed[3]
    assert environment["HF_HUB_OFFLINE"] == "1" and environment["OMP_NUM_THREADS"] == "1"
    assert environment["SLURM_JOB_ID"] == killed[2]


def test_heavy_rules_go_to_slurm_and_aggregates_stay(killed):
    folder, jobs, _, _ = killed
    rules = {re.match(r"rule_(\w+?)(_wildcards_|$)", job["comment"])[1] for job in jobs}
    assert {"train_demo_checkpoint", "describe_checkpoint", "extract_activations", "short_tables"} <= rules
    assert not {"aggregate_tables", "make_index", "checkpoints", "parametric"} & rules
    assert {job["partition"] for job in jobs} == {"cpu"}
    assert (folder / "results/logs/slurm/rule_extract_activations").is_dir()


def test_a_second_run_submits_nothing(killed, slurm):
    before = len(slurm.jobs())
    assert "Nothing to be done" in Run(killed[0], slurm, *RUN, *TARGETS).finish()
    assert "Nothing to be done" in Run(killed[0], slurm, *RUN, *TARGETS, flag="--workflow-profile").finish()
    assert len(slurm.jobs()) == before


def test_a_new_model_submits_its_own_jobs_and_gives_the_bytes_of_a_local_run(killed, slurm, local):
    folder, before = killed[0], len(slurm.jobs())
    add_copy(folder)
    expected = planned(folder, *RUN, *TARGETS)
    text = Run(folder, slurm, *RUN, *TARGETS).finish()
    jobs = submitted(slurm, before)
    assert jobs and all(re.search(r"_wildcards_(mine|\w+_mine|mine_\w+)$", job["comment"]) for job in jobs)
    at_home = {"aggregate_tables": 2}
    assert len(jobs) == sum(counts(expected).values()) - sum(at_home.values())
    assert counts([job for job in expected if "model" not in job.wildcards]) == at_home
    assert len(re.findall(r"localrule aggregate_tables:", text)) == 2
    assert tables(folder) == local[1]


@pytest.mark.parametrize(
    ("gres", "asked"),
    [
        ("", {"per_job": "gres:gpu:1", "per_node": "N/A"}),
        ("gpu:large", {"per_job": "N/A", "per_node": "gres:gpu:large:1"}),
    ],
)
def test_a_job_on_a_gpu_asks_for_one_and_runs_on_the_one_it_gets(killed, slurm, tmp_path, gres, asked):
    """Without a GPU the program ends with a sentence, which names the device that Slurm has given."""
    folder = shutil.copytree(killed[0], tmp_path / "atlas")
    rows = read_sheet(folder / "config/models.tsv")[:2]
    write_sheet(folder / "config/models.tsv", [rows[0], rows[1] | {"gpus": "1"}])
    config = folder / "config/config.yaml"
    config.write_text(config.read_text().replace('gpu_gres: ""', f'gpu_gres: "{gres}"'))
    output, before = "results/models/demo-mixtral/behavioral/prompt/activations.safetensors", len(slurm.jobs())
    (folder / output).unlink()
    Run(folder, slurm, "--retries", "0", *RUN, output).finish(check=False)
    (job,) = submitted(slurm, before)
    assert {key: job[key] for key in asked} == asked and job["partition"] == "gpu"
    log = (folder / "results/logs/extract_activations/demo-mixtral/prompt.log").read_text()
    given = "1" if gres else "[01]"
    assert re.search(rf"--device cuda \(CUDA_VISIBLE_DEVICES={given}\): torch finds no GPU|running on cuda", log), log


def test_the_generic_profile_runs_a_model_and_notices_a_killed_job(slurm, tmp_path):
    folder, before = reduced(tmp_path / "atlas"), len(slurm.jobs())
    target = "results/corpora/prompt.parquet"
    slurm.ask("scontrol", "update", "PartitionName=cpu", "State=DOWN")
    run = Run(folder, slurm, *RUN, target, profile="cluster-generic")
    try:
        while run.process.poll() is None and not submitted(slurm, before):
            time.sleep(0.2)
        slurm.ask("scancel", submitted(slurm, before)[0]["id"])
    finally:
        slurm.ask("scontrol", "update", "PartitionName=cpu", "State=UP")
    run.finish()
    assert [job["state"] for job in submitted(slurm, before)] == ["CANCELLED", "COMPLETED"]
    assert (folder / target).exists()


@pytest.mark.parametrize("profile", ["slurm", "cluster-generic"])
def test_a_cluster_s_profile_has_every_line_of_the_default_one(profile):
    default, own = (
        yaml.safe_load((ROOT / "workflow/profiles" / name / "config.yaml").read_text()) for name in ("default", profile)
    )
    assert {key: own.get(key) for key in default} == default
