"""The Hub on loopback against the real clients: what they ask it, take from it and say when it refuses.

Each client is a process of its own, since the address of the Hub is read on import.
"""

import hashlib
import json
import os
import subprocess
import sys
import textwrap
import urllib.error
import urllib.request
from pathlib import Path

import polars as pl
import pytest
import torch
from hub_server import HubServer
from huggingface_hub.constants import DOWNLOAD_CHUNK_SIZE
from safetensors.torch import save_file

NAME = "someone/tiny-moe"
PREAMBLE = """
import json, sys
import huggingface_hub as hub
def failure(function, *arguments, **named):
    try:
        function(*arguments, **named)
    except Exception as error:
        return [each.__name__ for each in type(error).__mro__]
"""


@pytest.fixture
def server():
    with HubServer() as server:
        yield server


@pytest.fixture
def checkpoint(tmp_path):
    """A folder in the Hub's format: weights twice, files in a subfolder."""
    folder = tmp_path / "checkpoint"
    (folder / "original").mkdir(parents=True)
    weights = {"w": torch.arange(60_000.0).reshape(200, 300)}
    save_file(weights, folder / "model.safetensors")
    torch.save(weights, folder / "pytorch_model.bin")
    (folder / "config.json").write_text('{"model_type": "mixtral"}')
    (folder / "original" / "params.json").write_text("{}")
    return folder


def client(server: HubServer, folder: Path, code: str, token: str = "", **environment: str):
    """What the code assigns to `answer`, run by a process whose Hub is the server."""
    program = PREAMBLE + textwrap.dedent(code) + "\nprint(json.dumps(answer))"
    environment = server.environment(folder, token) | environment
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def test_information_names_every_file_with_its_size_and_hash(server, checkpoint, tmp_path):
    commit = server.add(NAME, checkpoint, licence="mit")
    answer = client(
        server,
        tmp_path,
        f"""
        info = hub.model_info("{NAME}", files_metadata=True, securityStatus=True)
        files = {{each.rfilename: [each.size, each.blob_id, each.lfs and each.lfs.sha256] for each in info.siblings}}
        expanded = hub.model_info("{NAME}", revision=info.sha, expand=["gated", "siblings"])
        answer = [info.sha, info.gated, info.card_data.license, files, expanded.gated, len(expanded.siblings)]
        """,
    )
    files = files_of(checkpoint)
    assert answer[:3] == [commit, False, "mit"] and answer[4:] == [False, len(files)]
    assert set(answer[3]) == set(files)
    for path, (size, oid, lfs) in answer[3].items():
        large = path.endswith((".safetensors", ".bin"))
        assert size == len(files[path]) and len(oid) == 40
        assert lfs == (sha256(files[path]) if large else None)


def test_the_clients_own_check_finds_the_hashes_right(server, checkpoint, tmp_path):
    server.add(NAME, checkpoint)
    code = f"""
    hub.snapshot_download("{NAME}")
    found = hub.HfApi().verify_repo_checksums("{NAME}")
    answer = [found.checked_count, found.mismatches, found.missing_paths, found.extra_paths]
    """
    assert client(server, tmp_path, code) == [len(files_of(checkpoint)), [], [], []]


def test_listings_come_in_pages_and_by_folder(server, checkpoint, tmp_path):
    server.add(NAME, checkpoint)
    server.page_size = 2
    answer = client(
        server,
        tmp_path,
        f"""
        api = hub.HfApi()
        everything = list(api.list_repo_tree("{NAME}", recursive=True, expand=True))
        answer = {{
            "files": [each.path for each in everything if isinstance(each, hub.hf_api.RepoFile)],
            "folders": [each.path for each in everything if isinstance(each, hub.hf_api.RepoFolder)],
            "top": [each.path for each in api.list_repo_tree("{NAME}")],
            "inside": [each.path for each in api.list_repo_tree("{NAME}", "original")],
            "asked": [each.path for each in api.get_paths_info("{NAME}", ["config.json", "original", "gone"])],
            "main": api.list_repo_refs("{NAME}").branches[0].target_commit,
            "gone": failure(lambda: list(api.list_repo_tree("{NAME}", "gone"))),
        }}
        """,
    )
    assert set(answer["files"]) == set(files_of(checkpoint)) and len(answer["files"]) == 4
    assert answer["folders"] == ["original"] and answer["inside"] == ["original/params.json"]
    assert answer["top"] == ["config.json", "model.safetensors", "original", "pytorch_model.bin"]
    assert answer["asked"] == ["config.json", "original"]
    assert answer["main"] == server.commit(server.repository("model", NAME, ""), "main")
    assert answer["gone"][0] == "RemoteEntryNotFoundError"


def test_a_snapshot_holds_the_chosen_files_and_is_fetched_once(server, checkpoint, tmp_path):
    commit = server.add(NAME, checkpoint, gated=True)
    server.granted.add(NAME)
    code = f"""
    answer = hub.snapshot_download("{NAME}", revision="{commit}", allow_patterns=["*.json", "*.safetensors"])
    """
    snapshot = Path(client(server, tmp_path, code, token=server.token))
    expected = {path: content for path, content in files_of(checkpoint).items() if not path.endswith(".bin")}
    assert files_of(snapshot) == expected
    assert {each.file for each in server.files_asked()} == set(expected)
    storage = [each for each in server.requests if each.host == "storage"]
    assert storage and not any(each.authorized for each in storage)
    assert all(each.authorized for each in server.requests if each.host == "hub")
    before = len(server.requests)
    assert client(server, tmp_path, code, token=server.token) == str(snapshot)
    assert len(server.requests) == before


def test_older_commits_stay_and_main_moves(server, checkpoint, tmp_path):
    first = server.add(NAME, checkpoint)
    (checkpoint / "config.json").write_text("{}")
    second = server.add(NAME, checkpoint)
    answer = client(
        server,
        tmp_path,
        f"""
        paths = [hub.hf_hub_download("{NAME}", "config.json", revision=each) for each in ("{first}", "main")]
        answer = [hub.model_info("{NAME}").sha, *(open(path).read() for path in paths)]
        """,
    )
    assert first != second and answer == [second, '{"model_type": "mixtral"}', "{}"]


@pytest.fixture
def large(tmp_path):
    """A file of more than one block in which the client writes to disk."""
    folder = tmp_path / "large"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(os.urandom(DOWNLOAD_CHUNK_SIZE + 50_000))
    (folder / "config.json").write_text("{}")
    return folder


def test_a_cut_download_is_continued_by_a_range(server, large, tmp_path):
    server.add(NAME, large)
    server.cut(NAME, "model.safetensors", DOWNLOAD_CHUNK_SIZE + 1000)
    path = client(server, tmp_path, f'answer = hub.hf_hub_download("{NAME}", "model.safetensors")')
    assert Path(path).read_bytes() == (large / "model.safetensors").read_bytes()
    asked = [(each.range, each.status, each.sent) for each in server.files_asked()]
    rest = (large / "model.safetensors").stat().st_size - DOWNLOAD_CHUNK_SIZE
    assert asked == [("", 200, DOWNLOAD_CHUNK_SIZE + 1000), (f"bytes={DOWNLOAD_CHUNK_SIZE}-", 206, rest)]


def test_a_second_process_continues_a_file_by_a_range(server, large, tmp_path):
    server.add(NAME, large)
    code = f"""
    from huggingface_hub.file_download import http_get
    file = hub.get_hf_file_metadata(hub.hf_hub_url("{NAME}", "model.safetensors"))
    with open("{tmp_path}/part", "ab") as part:
        answer = failure(http_get, file.location, part, resume_size=part.tell(), expected_size=file.size)
    """
    server.cut(NAME, "model.safetensors", DOWNLOAD_CHUNK_SIZE + 1000)
    server.on_request = lambda request: setattr(server, "down", True)
    assert "HfHubHTTPError" in client(server, tmp_path, code)
    assert (tmp_path / "part").stat().st_size == DOWNLOAD_CHUNK_SIZE
    before = len(server.files_asked())
    server.down, server.on_request = False, None
    assert client(server, tmp_path, code) is None
    (asked,) = server.files_asked()[before:]
    assert (asked.range, asked.status, asked.sent) == (f"bytes={DOWNLOAD_CHUNK_SIZE}-", 206, 50_000)
    assert (tmp_path / "part").read_bytes() == (large / "model.safetensors").read_bytes()


def test_corrupted_bytes_come_under_the_true_hash_and_the_client_takes_them(server, checkpoint, tmp_path):
    """Why a download has to be checked here: the client looks at the size alone."""
    server.add(NAME, checkpoint)
    server.corrupt(NAME, "model.safetensors", times=1)
    code = f'answer = hub.hf_hub_download("{NAME}", "model.safetensors", force_download=True)'
    true = (checkpoint / "model.safetensors").read_bytes()
    blob = Path(client(server, tmp_path, code)).resolve()
    assert blob.name == sha256(true) and blob.read_bytes()[:-1] == true[:-1]
    assert blob.read_bytes() != true and blob.stat().st_size == len(true)
    assert Path(client(server, tmp_path, code)).read_bytes() == true


@pytest.mark.parametrize(
    "token, granted, status, error",
    [
        ("", True, 401, "GatedRepoError"),
        ("hf_secret", False, 403, "GatedRepoError"),
        ("hf_old", True, 401, "HfHubHTTPError"),
    ],
)
def test_a_gated_repository_is_refused_as_on_the_hub(server, checkpoint, tmp_path, token, granted, status, error):
    server.add(NAME, checkpoint, gated=True)
    server.granted |= {NAME} if granted else set()
    code = f"""
    answer = [
        failure(function, "{NAME}")[0] for function in (hub.auth_check, hub.snapshot_download)
    ]
    """
    assert client(server, tmp_path, code, token) == [error, error]
    assert {each.status for each in server.requests if "resolve" in each.path or "auth" in each.path} == {status}
    assert not server.files_asked()


def test_a_granted_token_opens_a_gated_repository(server, checkpoint, tmp_path):
    server.add(NAME, checkpoint, gated=True)
    server.granted.add(NAME)
    code = f'answer = [failure(hub.auth_check, "{NAME}"), hub.model_info("{NAME}").gated]'
    assert client(server, tmp_path, code, server.token) == [None, "auto"]


@pytest.mark.parametrize("token, status", [("", 401), ("hf_secret", 404)])
def test_what_does_not_exist_is_refused_as_on_the_hub(server, checkpoint, tmp_path, token, status):
    commit = server.add(NAME, checkpoint)
    code = f"""
    answer = [
        failure(hub.model_info, "no/such")[0],
        failure(hub.model_info, "{NAME}", revision="{"0" * 40}")[0],
        failure(hub.snapshot_download, "{NAME}", revision="{"0" * 40}")[0],
        failure(hub.hf_hub_download, "{NAME}", "gone.json", revision="{commit}")[0],
    ]
    """
    expected = ["RepositoryNotFoundError", "RevisionNotFoundError", "RevisionNotFoundError", "RemoteEntryNotFoundError"]
    assert client(server, tmp_path, code, token) == expected
    assert next(each.status for each in server.requests if "no/such" in each.path) == status


def test_a_hub_that_is_down_or_out_of_reach(server, checkpoint, tmp_path):
    server.add(NAME, checkpoint)
    server.down = True
    code = f'answer = failure(hub.model_info, "{NAME}")'
    assert client(server, tmp_path, code)[0] == "HfHubHTTPError"
    assert client(server, tmp_path, code, HF_HUB_OFFLINE="1")[0] == "OfflineModeIsEnabled"
    server.stop()
    assert client(server, tmp_path, code)[0] == "ConnectError"


def test_the_header_of_a_safetensors_file_is_read_by_a_range(server, tmp_path):
    (tmp_path / "checkpoint").mkdir()
    path = tmp_path / "checkpoint" / "model.safetensors"
    save_file({"w": torch.zeros(300, 400)}, path)
    server.add(NAME, tmp_path / "checkpoint")
    code = f"""
    found = hub.get_safetensors_metadata("{NAME}").files_metadata["model.safetensors"].tensors["w"]
    answer = [found.dtype, found.shape]
    """
    assert client(server, tmp_path, code) == ["F32", [300, 400]]
    (asked,) = server.files_asked()
    assert asked.status == 206 and 0 < asked.sent < path.stat().st_size


CONTENT = bytes(range(256)) * 3


@pytest.mark.parametrize(
    "wanted, expected",
    [
        ("bytes=0-9", CONTENT[:10]),
        ("bytes=700-", CONTENT[700:]),
        ("bytes=-5", CONTENT[-5:]),
        ("bytes=760-9999", CONTENT[760:]),
    ],
)
def test_ranges_are_python_slices(server, tmp_path, wanted, expected):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "some.txt").write_bytes(CONTENT)
    server.add(NAME, tmp_path / "data", kind="dataset")
    url = f"{server.endpoint}/datasets/{NAME}/resolve/main/some.txt"
    open_directly = urllib.request.build_opener(urllib.request.ProxyHandler({})).open
    with open_directly(urllib.request.Request(url, headers={"Range": wanted})) as response:
        assert response.status == 206 and response.read() == expected
    with pytest.raises(urllib.error.HTTPError, match="416"):
        open_directly(urllib.request.Request(url, headers={"Range": f"bytes={len(CONTENT)}-"}))


def test_each_file_is_announced_before_it_is_sent(server, checkpoint, tmp_path):
    server.add(NAME, checkpoint)
    seen = []
    server.on_request = lambda request: seen.append((request.file, request.sent))
    client(server, tmp_path, f'answer = hub.snapshot_download("{NAME}")')
    assert sorted(seen) == [(path, 0) for path in sorted(files_of(checkpoint))]


def test_a_client_gets_no_token_and_no_setting_of_the_caller(server, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_of_the_user")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    environment = server.environment(tmp_path)
    assert "HF_TOKEN" not in environment and "HF_HUB_OFFLINE" not in environment
    assert server.environment(tmp_path, "hf_secret")["HF_TOKEN"] == "hf_secret"


def write_data(folder: Path) -> list[str]:
    """A data repository of one configuration, a test split in two parquet files; returns the texts."""
    texts = [f"text {i}" for i in range(6)]
    (folder / "data").mkdir(parents=True)
    for part in range(2):
        rows = pl.DataFrame({"text": texts[part * 3 : part * 3 + 3]})
        rows.write_parquet(folder / "data" / f"test-0000{part}-of-00002.parquet")
    configuration = "- config_name: parts\n  data_files: [{split: test, path: data/test-*}]\n"
    (folder / "README.md").write_text(f"---\nconfigs:\n{configuration}---\n# Some data\n")
    return texts


@pytest.mark.parametrize("streaming", [False, True])
def test_datasets_reads_data_repositories(server, tmp_path, streaming):
    texts = write_data(tmp_path / "parquet")
    (tmp_path / "lines").mkdir()
    (tmp_path / "lines" / "train.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    commits = [server.add(f"someone/{each}", tmp_path / each, kind="dataset") for each in ("parquet", "lines")]
    code = f"""
    import datasets
    def load(name, split, revision):
        rows = datasets.load_dataset(name, split=split, revision=revision, streaming={streaming})
        return [row["text"] for row in rows]
    answer = [load("someone/parquet", "test", "{commits[0]}"), load("someone/lines", "train", "{commits[1]}")]
    answer += [failure(load, "someone/lines", "train", "{"0" * 40}")[0]]
    """
    assert client(server, tmp_path, code) == [texts, ["one", "two"], "DatasetNotFoundError"]
    assert {each.repository for each in server.files_asked()} == {"someone/parquet", "someone/lines"}


def test_a_model_and_a_data_set_may_share_a_name(server, checkpoint, tmp_path):
    write_data(tmp_path / "data-set")
    commits = [server.add(NAME, checkpoint), server.add(NAME, tmp_path / "data-set", kind="dataset")]
    code = f'answer = [hub.model_info("{NAME}").sha, hub.dataset_info("{NAME}").sha]'
    assert client(server, tmp_path, code) == commits
