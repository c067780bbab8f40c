"""hf: rows through Snakemake, against a Hub on loopback: fetched once, then offline; or fetched, used and deleted."""

import shutil
import subprocess
import sys
from pathlib import Path

import families
import pytest
from conftest import ROOT
from hub_server import HubServer
from safetensors.torch import load_file, save_file
from test_end_to_end import finished, hashes
from workflow_runs import copy_repository, planned, read_sheet, write_sheet

from moe_atlas import tables
from moe_atlas.files import read_json, sha256, write_json

ORACLE = ROOT / "tests/data/oracle/checkpoints"
# The published names, with tiny checkpoints behind them.
MISTRAL, MIXTRAL, BIG = "mistralai/Mistral-7B-v0.1", "mistralai/Mixtral-8x7B-v0.1", "mistralai/Mixtral-8x22B-v0.1"
TARGETS = ("parametric", "behavioral")


def snakemake(hub: HubServer, folder: Path, *arguments: str, token: str = "", check: bool = True) -> str:
    """Run Snakemake with the Hub's environment, as workflow_runs.snakemake does without."""
    done = subprocess.run(
        [sys.executable, "-m", "snakemake", "--cores", "2", *arguments],
        cwd=folder, env=hub.environment(folder, token), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    assert not check or done.returncode == 0, done.stdout
    return done.stdout


def resharded(source: Path, target: Path, count: int) -> Path:
    """The checkpoint in `count` shards of about equal size, layers one after another and straddling shards."""
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("*.safetensors*"))
    tensors = {
        name: tensor for path in sorted(source.glob("*.safetensors")) for name, tensor in load_file(path).items()
    }
    ordered = sorted(tensors, key=lambda name: [int(part) if part.isdigit() else -1 for part in name.split(".")])
    total, done, shard_of = sum(tensor.nbytes for tensor in tensors.values()), 0, {}
    for name in ordered:
        shard_of[name] = f"model-{done * count // total + 1:05d}-of-{count:05d}.safetensors"
        done += tensors[name].nbytes
    for shard in set(shard_of.values()):
        save_file({name: tensors[name] for name in ordered if shard_of[name] == shard}, target / shard)
    write_json(target / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": shard_of})
    return target


def shards_on_disk(folder: Path) -> list[str]:
    """Weight files of the model that is not kept: whole or half fetched in its folder, whole in the client's cache."""
    there = [
        path for path in (folder / "results/shards/big").rglob("*") if path.suffix in (".safetensors", ".incomplete")
    ]
    cached = (folder / "huggingface/hub" / f"models--{BIG.replace('/', '--')}").rglob("*.safetensors")
    return [path.name for path in (*there, *cached)]


@pytest.fixture(scope="module")
def hub():
    with HubServer() as server:
        yield server


@pytest.fixture(scope="module")
def atlas(hub, tmp_path_factory):
    """A finished run: Mixtral kept, with Mistral as its dense reference; the same Mixtral in twelve shards not kept."""
    folder = copy_repository(tmp_path_factory.mktemp("hub") / "atlas")
    big = resharded(ORACLE / "mixtral", folder / "big", 12)
    rows = read_sheet(folder / "config/models.tsv")
    empty = dict.fromkeys(rows[0], "") | {"keep": "true", "mem_mb": "3000", "dtype": "float32"}
    commits = {
        MISTRAL: hub.add(MISTRAL, ORACLE / "mistral"),
        MIXTRAL: hub.add(MIXTRAL, ORACLE / "mixtral", gated=True),
        BIG: hub.add(BIG, big),
    }
    hub.granted.add(MIXTRAL)
    added = [
        {"model": "mistral", "source": f"hf:{MISTRAL}", "revision": commits[MISTRAL]},
        {"model": "mixtral", "source": f"hf:{MIXTRAL}", "revision": commits[MIXTRAL], "dense_reference": "mistral"},
        {
            "model": "big",
            "source": f"hf:{BIG}",
            "revision": commits[BIG],
            "dense_reference": "mistral",
            "keep": "false",
        },
    ]
    write_sheet(folder / "config/models.tsv", [empty | row for row in added])
    corpora = {row["corpus"]: row for row in read_sheet(folder / "config/corpora.tsv")}
    write_sheet(folder / "config/corpora.tsv", [corpora["prompt"], corpora["prose"] | {"max_sequences": "3"}])
    most = []
    hub.on_request = lambda request: most.append((request.repository, len(shards_on_disk(folder))))
    folder.joinpath("output.txt").write_text(snakemake(hub, folder, *TARGETS, token=hub.token))
    folder.joinpath("most.txt").write_text(str(max(count for name, count in most if name == BIG)))
    return folder


def test_fetched_models_have_every_table_and_their_files_are_the_hubs(atlas):
    assert {rule for rule, model in finished((atlas / "output.txt").read_text()) if model == "mixtral"} >= {
        "download_checkpoint", "weight_statistics", "extract_activations",
    }  # fmt: skip
    manifest = read_json(atlas / "results/models/mixtral/checkpoint.json")
    assert {entry["name"]: entry["sha256"] for entry in manifest["files"]} == {
        path.name: sha256(path) for path in (ORACLE / "mixtral").glob("*.safetensors")
    }
    log = (atlas / "results/logs/download_checkpoint/mixtral.log").read_text()
    assert "100%" in log and "is what the Hub says" in log
    assert "100%" in (atlas / "output.txt").read_text()  # the bar is on the terminal too


def test_fetch_use_delete_gives_the_tables_of_the_model_that_is_kept(atlas):
    found = {path.name for path in (atlas / "results/models/big").rglob("*.parquet")}
    assert found == {path.name for path in (atlas / "results/models/mixtral").rglob("*.parquet")} and len(found) > 8
    for path in (atlas / "results/models/big").rglob("*.parquet"):
        name = path.stem
        ours, kept = tables.read(name, path), tables.read(name, Path(str(path).replace("/big/", "/mixtral/")))
        assert len(ours) > 0 and ours.drop("model").equals(kept.drop("model")), name
    manifest, kept = (read_json(atlas / f"results/models/{model}/checkpoint.json") for model in ("big", "mixtral"))
    same = ("L", "N", "k", "d", "m", "parameters", "dtype", "moe_layers")
    assert {key: manifest[key] for key in same} == {key: kept[key] for key in same} and not manifest["kept"]
    assert {entry["name"]: entry["sha256"] for entry in manifest["files"]} == {
        path.name: sha256(path) for path in (atlas / "big").glob("*.safetensors")
    }


def test_never_more_than_three_shards_lie_on_the_disk_and_none_in_the_end(atlas, hub):
    assert 1 <= int((atlas / "most.txt").read_text()) <= 3
    assert not (atlas / "results/shards/big").exists()
    cache = atlas / "huggingface/hub" / f"models--{BIG.replace('/', '--')}"
    assert not list(cache.rglob("*.safetensors"))
    shards = [
        request.file for request in hub.files_asked() if request.repository == BIG and "safetensors" in request.file
    ]
    assert len(shards) == 13 and len(set(shards)) == 13  # twelve shards and the index, each once
    log = (atlas / "results/logs/fetch_use_delete/big.log").read_text()
    assert "12 shards fetched, at most 1 on disk at a time" in log


def test_once_fetched_everything_is_made_without_the_network(atlas, hub, tmp_path):
    folder = shutil.copytree(atlas, tmp_path / "atlas", copy_function=shutil.copy, symlinks=True)
    before = hashes(folder)
    results = folder / "results/models/mixtral"
    for name in ("parametric/similarity", "behavioral/prompt/load"):
        (results / f"{name}.parquet").unlink()
    (results / "behavioral/prompt/activations.safetensors").unlink()
    hub.requests.clear()
    jobs = {rule for rule, model in finished(snakemake(hub, folder, *TARGETS)) if model}
    assert jobs >= {"weight_statistics", "extract_activations"} and "download_checkpoint" not in jobs
    assert hub.requests == []
    assert hashes(folder) == before
    assert "Nothing to be done" in snakemake(hub, folder, *TARGETS)


def test_a_new_corpus_or_revision_fetches_what_was_deleted_anew_and_nothing_else(atlas):
    rows = read_sheet(atlas / "config/corpora.tsv")
    try:
        write_sheet(atlas / "config/corpora.tsv", [*rows, rows[0] | {"corpus": "more", "source": "prompt:More text"}])
        jobs = planned(atlas, *TARGETS)
    finally:
        write_sheet(atlas / "config/corpora.tsv", rows)
    assert {job.rule for job in jobs if job.wildcards.get("model") == "big"} >= {"fetch_use_delete", "short_tables"}
    assert not [job for job in jobs if job.rule in ("download_checkpoint", "weight_statistics")]


def test_a_run_that_was_interrupted_goes_on_with_the_shards_it_has(hub, tmp_path):
    """The connection stays cut at the sixth shard; the second run fetches all of them, and ends with the same bytes."""
    families.save("mixtral", tmp_path / "plain", num_hidden_layers=6, vocab_size=512)
    shutil.copy(ORACLE / "mixtral/tokenizer.json", tmp_path / "plain")
    shutil.copy(ORACLE / "mixtral/tokenizer_config.json", tmp_path / "plain")
    commit = hub.add("a/cut", resharded(tmp_path / "plain", tmp_path / "repository", 12))
    shutil.copy(hub_corpus(tmp_path), tmp_path / "corpus.parquet")

    def run(name: str) -> subprocess.CompletedProcess:
        output = tmp_path / name
        return subprocess.run(
            [sys.executable, ROOT / "scripts/fetch_use_delete.py", "--model", "m", "--repository", "a/cut"]
            + ["--revision", commit, "--shards", tmp_path / "shards", "--similarity", output / "similarity.parquet"]
            + ["--corpus", "c", "short", tmp_path / "corpus.parquet", output / "a.safetensors", output / "t.parquet"]
            + [output / "i.safetensors", "--matching", output / "matching.parquet", "--matching-max-pairs", "3"]
            + ["--projection", output / "projection.parquet", "--explained-variance", output / "explained.parquet"]
            + ["--output", output / "checkpoint.json"],
            env=hub.environment(tmp_path) | {"MOE_ATLAS_RETRY_PAUSE": "0"}, capture_output=True, text=True,
        )  # fmt: skip

    sixth = "model-00006-of-00012.safetensors"
    hub.corrupt("a/cut", sixth, times=3)
    failed = run("first")
    assert failed.returncode == 1 and f"{sixth} is damaged" in failed.stderr and "Traceback" not in failed.stderr
    assert failed.stderr.count("try 1 of 3") == failed.stderr.count("try 2 of 3") == 1
    assert not (tmp_path / "first").exists()
    hub.corrupt("a/cut", sixth, times=2)  # the third try succeeds within the run
    again = run("second")
    assert again.returncode == 0, again.stderr
    assert run("third").returncode == 0
    tables_of_weights = ("similarity.parquet", "matching.parquet", "projection.parquet", "explained.parquet")
    for name in (*tables_of_weights, "a.safetensors", "t.parquet", "i.safetensors", "checkpoint.json"):
        assert (tmp_path / "second" / name).read_bytes() == (tmp_path / "third" / name).read_bytes()
    assert not (tmp_path / "shards").exists()


def hub_corpus(folder: Path) -> Path:
    import polars as pl

    pl.DataFrame({"text": ["As an open source alternative to"]}).write_parquet(folder / "text.parquet")
    return folder / "text.parquet"
