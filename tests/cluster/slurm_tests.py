"""A reduced demo on a real Slurm: the tables of a local run, byte by byte; killed jobs; a new model; GPUs.

`make test-cluster` runs it. Its name keeps it out of `make test`, which needs neither root nor Slurm.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml
from slurm_node import SlurmNode, missing

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from workflow_runs import ROOT, copy_repository, counts, planned, read_sheet, snakemake, write_sheet

from moe_atlas.files import read_json, sha256

pytestmark = pytest.mark.skipif(bool(missing()), reason=missing() or "Slurm is here")

MODEL = "demo-grok"
CORPORA = {"prompt": "0", "prose": "40"}
IMPATIENT = Path(__file__).with_name("impatient.py")
RUN = ("--config", "demo_steps_factor=0.03", "--")
# As for machines where jobs are killed: no table changes.
KEPT = ("--config", "keep_state=true", *RUN[1:])
# A model's weights, statistics and tables across models, without the claims that resample for a minute.
TARGETS = (
    "checkpoints",
    "parametric",
    "behavioral",
    "results/tables/similarity.parquet",
    "results/tables/load.parquet",
)
EXTRACTED = f"results/models/{MODEL}/behavioral/prose"
SECONDS = 600


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    node = SlurmNode(tmp_path_factory.mktemp("slurm"))
    node.start()
    yield node
    node.stop()


def reduced(folder: Path) -> Path:
    """A copy of the repository with a model and two corpora, and the names of the test's partitions filled in."""
    copy_repository(folder)
    models = {row["model"]: row for row in read_sheet(folder / "config/models.tsv")}
    corpora = {row["corpus"]: row for row in read_sheet(folder / "config/corpora.tsv")}
    write_sheet(folder / "config/models.tsv", [models[MODEL]])
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
        command = [sys.executable, str(IMPATIENT), flag, f"workflow/profiles/{profile}", *arguments]
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


class Killed(NamedTuple):
    """A run that was disturbed: the job that was cancelled, its program's environment, the layers it had done."""

    folder: Path
    jobs: list[dict[str, str]]
    victim: str
    environment: dict[str, str]
    layers: int


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
    shutil.copytree(folder / "results/checkpoints" / MODEL, folder / "my checkpoint")
    rows = read_sheet(folder / "config/models.tsv")
    write_sheet(folder / "config/models.tsv", [*rows, rows[0] | {"model": "mine", "source": "path:my checkpoint"}])


def program_of(node: SlurmNode, job: str) -> int | None:
    """Process of a running job that is a program of the library, if there is one yet."""
    for pid in re.findall(r"^ *(\d+)", node.ask("scontrol", "listpids", job), re.MULTILINE):
        try:
            words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if words[1:2] == [b"scripts/extract_activations.py"]:
            return int(pid)
    return None


def layers_done(folder: Path) -> int:
    state = folder / EXTRACTED / "state/done.json"
    return read_json(state)["layers"] if state.exists() else 0


@pytest.fixture(scope="module")
def killed(slurm, tmp_path_factory):
    """A whole run on Slurm in which a running extraction is cancelled after a layer, and what was seen of the job."""
    folder = reduced(tmp_path_factory.mktemp("on slurm") / "atlas")
    run = Run(folder, slurm, *KEPT, *TARGETS)
    try:
        while not layers_done(folder):
            assert run.process.poll() is None, run.output.read_text()
            time.sleep(0.01)
        (victim,) = (
            job["id"]
            for job in slurm.jobs()
            if job["state"] == "RUNNING" and job["comment"] == f"rule_extract_activations_wildcards_{MODEL}_prose"
        )
        pid = program_of(slurm, victim)
        os.kill(pid, signal.SIGSTOP)
        layers = layers_done(folder)
        environment = Path(f"/proc/{pid}/environ").read_bytes().decode()
        slurm.ask("scancel", victim)
        run.finish()
    finally:
        run.process.kill()
    environment = dict(pair.split("=", 1) for pair in environment.split("\0") if "=" in pair)
    return Killed(folder, slurm.jobs(), victim, environment, layers)


def test_every_table_of_a_run_on_slurm_has_the_bytes_of_a_local_run(killed, local):
    before, _ = local
    assert {*TARGETS[3:], f"{EXTRACTED}/load.parquet"} <= set(before)
    assert tables(killed.folder) == before


def test_a_killed_job_is_submitted_again_with_more_memory_and_finishes(killed):
    jobs = killed.jobs
    (first,) = (job for job in jobs if job["id"] == killed.victim)
    again = [job for job in jobs if job["comment"] == first["comment"] and job["id"] != killed.victim]
    assert first["state"] == "CANCELLED" and [job["state"] for job in again] == ["COMPLETED"]
    assert int(again[0]["memory"].rstrip("M")) == 2 * int(first["memory"].rstrip("M"))
    repeated = Counter(job["comment"] for job in jobs)
    assert [comment for comment, count in repeated.items() if count > 1] == [first["comment"]]


def test_a_killed_extraction_that_keeps_its_state_goes_on_at_its_layer(killed):
    log = (killed.folder / f"results/logs/extract_activations/{MODEL}/prose.log").read_text()
    depth = read_json(killed.folder / f"results/models/{MODEL}/checkpoint.json")["L"]
    assert 1 <= killed.layers < depth
    assert f"the run goes on after layer {killed.layers - 1}, the last" in log
    assert f"layer {killed.layers + 1}/{depth} ·" in log and f"layer {killed.layers}/{depth} ·" not in log
    assert not (killed.folder / EXTRACTED / "state").exists()


def test_programs_on_a_node_ask_no_hub_and_hold_their_threads(killed):
    environment = killed.environment
    assert environment["HF_HUB_OFFLINE"] == "1" and environment["OMP_NUM_THREADS"] == "1"
    assert environment["SLURM_JOB_ID"] == killed.victim


def test_heavy_rules_go_to_slurm_and_aggregates_stay(killed):
    rules = {re.match(r"rule_(\w+?)(_wildcards_|$)", job["comment"])[1] for job in killed.jobs}
    assert {"train_demo_checkpoint", "describe_checkpoint", "extract_activations", "short_tables"} <= rules
    assert not {"aggregate_tables", "make_index", "checkpoints", "parametric"} & rules
    assert {job["partition"] for job in killed.jobs} == {"cpu"}
    assert (killed.folder / "results/logs/slurm/rule_extract_activations").is_dir()


def test_a_second_run_submits_nothing(killed, slurm):
    before = len(slurm.jobs())
    assert "Nothing to be done" in Run(killed.folder, slurm, *RUN, *TARGETS).finish()
    assert "Nothing to be done" in Run(killed.folder, slurm, *RUN, *TARGETS, flag="--workflow-profile").finish()
    assert len(slurm.jobs()) == before


def test_a_new_model_submits_its_own_jobs_and_gives_the_bytes_of_a_local_run(killed, slurm, local):
    folder, before = killed.folder, len(slurm.jobs())
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
    folder = shutil.copytree(killed.folder, tmp_path / "atlas")
    rows = read_sheet(folder / "config/models.tsv")
    write_sheet(folder / "config/models.tsv", [rows[0] | {"gpus": "1"}])
    config = folder / "config/config.yaml"
    config.write_text(config.read_text().replace('gpu_gres: ""', f'gpu_gres: "{gres}"'))
    output, before = f"results/models/{MODEL}/behavioral/prompt/activations.safetensors", len(slurm.jobs())
    (folder / output).unlink()
    Run(folder, slurm, "--retries", "0", *RUN, output).finish(check=False)
    (job,) = submitted(slurm, before)
    assert {key: job[key] for key in asked} == asked and job["partition"] == "gpu"
    log = (folder / f"results/logs/extract_activations/{MODEL}/prompt.log").read_text()
    given = "1" if gres else "[01]"
    assert re.search(rf"--device cuda \(CUDA_VISIBLE_DEVICES={given}\): torch finds no GPU|running on cuda", log), log


def test_the_generic_profile_runs_a_job_and_repeats_one_that_was_killed(slurm, tmp_path):
    folder, before = reduced(tmp_path / "atlas"), len(slurm.jobs())
    target = "results/corpora/prompt.parquet"
    run = Run(folder, slurm, *RUN, target, profile="cluster-generic")
    while not (jobs := submitted(slurm, before)) or jobs[0]["state"] != "RUNNING":
        assert run.process.poll() is None, run.output.read_text()
        time.sleep(0.1)
    slurm.ask("scancel", jobs[0]["id"])
    run.finish()
    assert [job["state"] for job in submitted(slurm, before)] == ["CANCELLED", "COMPLETED"]
    assert (folder / target).exists()


@pytest.mark.parametrize("profile", ["slurm", "cluster-generic"])
def test_a_cluster_s_profile_has_every_line_of_the_default_one(profile):
    default, own = (
        yaml.safe_load((ROOT / "workflow/profiles" / name / "config.yaml").read_text()) for name in ("default", profile)
    )
    assert {key: own.get(key) for key in default} == default
