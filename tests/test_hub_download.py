"""download_checkpoint.py against a Hub on loopback, with the real client: what is fetched, and what goes wrong."""

import hashlib
import json
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from hub_server import HubServer
from test_checkpoints import Malicious

from moe_atlas.errors import AtlasError
from moe_atlas.files import read_json, sha256
from moe_atlas.hub.download import check_space
from moe_atlas.hub.errors import hub_errors
from moe_atlas.hub.repository import HubFile

ORACLE = ROOT / "tests/data/oracle/checkpoints"
MIXTRAL, GROK = "mistralai/Mixtral-8x7B-v0.1", "hpcai-tech/grok-1"
SHARDS = [f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)]


@pytest.fixture
def hub():
    with HubServer() as server:
        yield server


def run(hub: HubServer, folder: Path, repository: str, revision: str, token: str = "", **variables: str):
    """Run the program; returns (exit status, what it said, checkpoint.json or None)."""
    output = folder / "checkpoint.json"
    done = subprocess.run(
        [sys.executable, ROOT / "scripts/download_checkpoint.py", "--model", "m", "--repository", repository]
        + ["--revision", revision, "--output", output],
        env=hub.environment(folder, token) | variables,
        capture_output=True,
        text=True,
    )
    assert "Traceback" not in done.stderr
    return done.returncode, done.stderr, read_json(output) if output.exists() else None


def error(said: str) -> str:
    """The one sentence a failed run ends with."""
    (line,) = [line for line in said.splitlines() if line.startswith("error: ")]
    assert line.endswith(".")
    return line


def asked(hub: HubServer) -> list[str]:
    return [request.file for request in hub.files_asked()]


def test_a_repository_is_fetched_at_its_revision_without_duplicate_formats_and_described(hub, tmp_path):
    folder = shutil.copytree(ORACLE / "mixtral", tmp_path / "repository")
    for name in ("consolidated.00.pt", "original/model.safetensors", "model.gguf", "pytorch_model.bin", "modeling.py"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"another copy of the weights, or code")
    commit = hub.add(MIXTRAL, folder, licence="apache-2.0")
    (folder / "README.md").write_text("a later commit")
    assert hub.add(MIXTRAL, folder) != commit
    status, said, manifest = run(hub, tmp_path, MIXTRAL, commit)
    assert status == 0, said
    small = {"config.json", "generation_config.json", "special_tokens_map.json", "tokenizer_config.json"}
    assert sorted(asked(hub)) == sorted(small | {"tokenizer.json", "model.safetensors.index.json", *SHARDS})
    expected = {"source": f"hf:{MIXTRAL}", "revision": commit, "licence": "apache-2.0", "kept": True, "N": 8, "k": 2}
    assert {key: manifest[key] for key in expected} == expected
    sizes = [{"name": s, "bytes": (folder / s).stat().st_size, "sha256": sha256(folder / s)} for s in SHARDS]
    assert manifest["files"] == sizes and manifest["bytes"] == sum(entry["bytes"] for entry in sizes)
    assert Path(manifest["directory"]).parent.name == "snapshots" and Path(manifest["directory"]).name == commit
    assert all((Path(manifest["directory"]) / s).read_bytes() == (folder / s).read_bytes() for s in SHARDS)
    assert "100%" in said  # the progress bar
    hub.requests.clear()
    assert run(hub, tmp_path, MIXTRAL, commit)[0] == 0
    assert asked(hub) == []  # a second run fetches nothing


def test_bin_weights_without_a_model_type_are_fetched(hub, tmp_path):
    commit = hub.add(GROK, ORACLE / "grok")
    status, said, manifest = run(hub, tmp_path, GROK, commit)
    assert status == 0, said
    assert (manifest["architecture"], manifest["L"], manifest["N"]) == ("Grok1ModelForCausalLM", 4, 8)


def test_a_cut_connection_is_taken_up_and_one_that_stays_cut_leaves_finished_files_for_the_next_run(hub, tmp_path):
    commit = hub.add(MIXTRAL, ORACLE / "mixtral")
    hub.cut(MIXTRAL, SHARDS[1], after_bytes=50_000)
    status, said, manifest = run(hub, tmp_path, MIXTRAL, commit)
    assert status == 0, said
    assert asked(hub).count(SHARDS[1]) == 2
    assert manifest["files"][1]["sha256"] == sha256(ORACLE / "mixtral" / SHARDS[1])

    other = tmp_path / "other"
    other.mkdir()
    hub.requests.clear()
    hub.cut(MIXTRAL, SHARDS[2], after_bytes=0, times=7)
    status, said, manifest = run(hub, other, MIXTRAL, commit)
    assert status == 1 and manifest is None
    assert "broke off" in error(said) and "run again: finished files are kept" in error(said)
    hub.requests.clear()
    status, said, manifest = run(hub, other, MIXTRAL, commit)
    assert status == 0, said
    assert SHARDS[2] in asked(hub) and SHARDS[0] not in asked(hub)
    assert not list(other.rglob("*.incomplete"))


def test_a_large_file_goes_on_where_it_was_cut(hub, tmp_path):
    folder = shutil.copytree(ORACLE / "mistral", tmp_path / "repository")
    torch.save({"unused": torch.zeros(6 << 20)}, folder / "pytorch_model.bin")  # 24 MiB
    (folder / "model.safetensors").unlink()
    commit = hub.add("a/b", folder)
    hub.cut("a/b", "pytorch_model.bin", after_bytes=15 << 20)
    status, said, _ = run(hub, tmp_path, "a/b", commit)
    # The model is dense, which is said before its weights are fetched: describe it as a reference.
    assert status == 1 and "has no experts" in error(said) and "pytorch_model.bin" not in asked(hub)
    program = (
        "import sys; sys.path.insert(0, 'scripts')\n"
        "from moe_atlas.hub.download import fetch\nfrom moe_atlas.hub.repository import look_up\n"
        f"repository = look_up('a/b', {commit!r}); fetch(repository, repository.weights)"
    )
    environment = hub.environment(tmp_path)
    subprocess.run([sys.executable, "-c", program], env=environment, cwd=ROOT, check=True, capture_output=True)
    first, second = [request for request in hub.files_asked() if request.file == "pytorch_model.bin"]
    assert first.range == "" and second.range == f"bytes={10 << 20}-"


@pytest.mark.parametrize("case", ["no token", "not granted", "granted"])
def test_a_gated_repository_says_where_to_go(hub, tmp_path, case):
    commit = hub.add(MIXTRAL, ORACLE / "mixtral", gated=True)
    # A token that a login has stored is not the environment's, and is not used.
    (tmp_path / "huggingface").mkdir()
    (tmp_path / "huggingface/token").write_text(hub.token)
    if case == "granted":
        hub.granted.add(MIXTRAL)
    status, said, _ = run(hub, tmp_path, MIXTRAL, commit, token="" if case == "no token" else hub.token)
    if case == "granted":
        assert status == 0, said
        assert all(request.host == "hub" for request in hub.requests if request.authorized)
        assert hub.token not in said
        return
    assert status == 1 and asked(hub) == []
    page = f"{hub.endpoint}/{MIXTRAL}"
    assert "is gated" in error(said) and page in error(said) and "HF_TOKEN" in error(said)
    assert ("HF_TOKEN is not set" in error(said)) == (case == "no token")
    assert any(request.authorized for request in hub.requests) == (case != "no token")


def test_what_is_not_there_is_a_sentence_with_the_page_to_go_to(hub, tmp_path):
    commit = hub.add(MIXTRAL, ORACLE / "mixtral")
    _, said, _ = run(hub, tmp_path, MIXTRAL, "0" * 40)
    assert f"there is no revision {'0' * 40}" in error(said) and f"{hub.endpoint}/{MIXTRAL}/commits/main" in error(said)
    _, said, _ = run(hub, tmp_path, "nobody/nothing", commit)
    assert "there is no such repository, or it is private" in error(said)
    _, said, _ = run(hub, tmp_path, MIXTRAL, commit, token="hf_wrong")
    assert "answered 401; set HF_TOKEN to a valid token" in error(said)
    folder = tmp_path / "gguf"
    folder.mkdir()
    (folder / "model-q4.gguf").write_bytes(b"GGUF")
    _, said, _ = run(hub, tmp_path, "a/gguf", hub.add("a/gguf", folder))
    assert "no weights in a format that is read" in error(said) and ".gguf" in error(said)
    hub.down = True
    _, said, _ = run(hub, tmp_path, MIXTRAL, commit)
    assert "answered 503; wait and run again" in error(said)
    hub.stop()
    _, said, _ = run(hub, tmp_path, MIXTRAL, commit)
    assert "cannot be reached" in error(said)
    _, said, _ = run(hub, tmp_path, MIXTRAL, commit, HF_HUB_OFFLINE="1")
    assert "HF_HUB_OFFLINE" in error(said)


def test_a_model_that_cannot_be_looked_into_is_refused_before_its_weights_are_fetched(hub, tmp_path):
    folder = shutil.copytree(ORACLE / "mixtral", tmp_path / "repository")
    config = read_json(folder / "config.json") | {"model_type": "hydra", "architectures": ["Hydra"]}
    (folder / "config.json").write_text(json.dumps(config))
    _, said, _ = run(hub, tmp_path, "a/hydra", hub.add("a/hydra", folder))
    assert "there is no model class for model type 'hydra'" in error(said)
    assert not [name for name in asked(hub) if name in SHARDS]


def test_a_corrupted_shard_is_named_deleted_and_fetched_anew_by_the_next_run(hub, tmp_path):
    commit = hub.add(MIXTRAL, ORACLE / "mixtral")
    hub.corrupt(MIXTRAL, SHARDS[1], times=1)
    status, said, manifest = run(hub, tmp_path, MIXTRAL, commit)
    true = sha256(ORACLE / "mixtral" / SHARDS[1])
    assert status == 1 and manifest is None
    assert f"{SHARDS[1]} is damaged: its sha256 is not the {true} of the Hub" in error(said)
    hub.requests.clear()
    status, said, manifest = run(hub, tmp_path, MIXTRAL, commit)
    assert status == 0 and asked(hub) == [SHARDS[1]]
    assert sha256(Path(manifest["directory"]) / SHARDS[1]) == true


def test_a_malicious_pickle_is_refused_and_nothing_in_it_runs(hub, tmp_path):
    folder, trace = shutil.copytree(ORACLE / "grok", tmp_path / "repository"), tmp_path / "trace"
    shard = folder / "pytorch_model-00002-of-00003.bin"
    shard.write_bytes(pickle.dumps({"model.embed_tokens.weight": Malicious(trace)}))
    status, said, manifest = run(hub, tmp_path, GROK, hub.add(GROK, folder))
    assert status == 1 and manifest is None and not trace.exists()
    assert "pytorch_model-00002-of-00003.bin: the file holds more than tensors and was refused" in error(said)


def test_room_on_the_disk_is_looked_for_before_the_first_weight_is_fetched(hub, tmp_path):
    with pytest.raises(
        AtlasError, match=r"hf:a/b: 10\.0 PB|hf:a/b: .* are wanted in .* are free; free space, set HF_HOME"
    ):
        check_space(tmp_path / "not there yet", 10**16, "a/b")
    check_space(tmp_path / "not there yet", 10, "a/b")
    commit = hub.add(MIXTRAL, ORACLE / "mixtral")
    # The same check with a disk that has one megabyte left, which no test can make.
    program = (
        "import collections, runpy, shutil, sys; sys.path.insert(0, 'scripts')\n"
        "shutil.disk_usage = lambda path: collections.namedtuple('usage', 'total used free')(1, 1, 1_000_000)\n"
        "names = ('--repository', '--revision', '--output')\n"
        "pairs = [part for pair in zip(names, sys.argv[1:]) for part in pair]\n"
        "sys.argv[1:] = ['--model', 'm', *pairs]\n"
        "runpy.run_path('scripts/download_checkpoint.py', run_name='__main__')"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, MIXTRAL, commit, tmp_path / "checkpoint.json"],
        env=hub.environment(tmp_path), cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    total = sum((ORACLE / "mixtral" / shard).stat().st_size for shard in SHARDS)
    assert done.returncode == 1
    assert f"{total / 1e6:.1f} MB are wanted" in error(done.stderr) and "1.0 MB are free" in error(done.stderr)
    assert not [name for name in asked(hub) if name in SHARDS]


def test_a_full_disk_is_a_sentence():
    with pytest.raises(AtlasError, match="is full; free space, or set HF_HOME"), hub_errors("a/b", "c"):
        raise OSError(28, "No space left on device")


def test_small_files_are_checked_by_gits_hash(tmp_path):
    (tmp_path / "config.json").write_bytes(b"{}")
    # What `git hash-object` gives for these two bytes, written out from git's definition.
    blob = hashlib.sha1(b"blob 2\x00{}").hexdigest()
    assert HubFile("config.json", 2, None, blob).is_content_of(tmp_path / "config.json")
    assert not HubFile("config.json", 2, None, blob[::-1]).is_content_of(tmp_path / "config.json")
    assert not HubFile("config.json", 3, None, blob).is_content_of(tmp_path / "config.json")
