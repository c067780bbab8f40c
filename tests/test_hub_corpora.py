"""Corpora from data sets of the Hub: the real client and `datasets` against a Hub on loopback."""

import gzip
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import polars as pl
import pytest
from hub_server import HubServer
from workflow_runs import ROOT, copy_repository, counts, planned, snakemake, write_sheet

NAME = "someone/texts"
CARD = """---
configs:
- config_name: long
  data_files:
  - {split: train, path: long/train-*}
  - {split: test, path: long/test-*}
- config_name: short
  data_files:
  - {split: test, path: short/test-*}
---
"""


@pytest.fixture
def server():
    with HubServer() as server:
        yield server


@pytest.fixture
def texts(tmp_path):
    """A folder with two subsets; its longest split is in two files. A row without a text is among them."""
    folder = tmp_path / "texts"
    splits = {
        "long/train-00000-of-00002": ["a = b\n", " = Title = \n", None],
        "long/train-00001-of-00002": ["of the second file\n", "and its last\n"],
        "long/test-00000-of-00001": ["tested\n"],
        "short/test-00000-of-00001": ["short\n"],
    }
    for path, rows in splits.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        frame = pl.DataFrame({"id": range(len(rows)), "text": rows, "other": [f"other {i}" for i in range(len(rows))]})
        frame.write_parquet(folder / f"{path}.parquet")
    (folder / "README.md").write_text(CARD)
    return folder


PROGRAM = """
import json, sys
from moe_atlas.corpora.hub import fetch
from moe_atlas.errors import AtlasError
for row in json.load(sys.stdin):
    try:
        print(json.dumps(fetch(**row).rows()))
    except AtlasError as error:
        print(json.dumps(str(error)))
"""


def fetch(server: HubServer, folder: Path, *rows: dict, token: str = "") -> list:
    """For each row the texts of its corpus, or the sentence with which it is refused; all in one process."""
    rows = [{"corpus": "mine", "repository": NAME, "subset": "", "split": "test"} | row for row in rows]
    environment = server.environment(folder, token) | {"PYTHONPATH": str(ROOT / "scripts")}
    command = [sys.executable, "-c", PROGRAM]
    done = subprocess.run(command, env=environment, cwd=folder, input=json.dumps(rows), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    for answer in answers:
        if isinstance(answer, str):
            assert answer.startswith("corpus mine: hf:") and answer.endswith(".") and "\n" not in answer
    return [answer if isinstance(answer, str) else [text for *_, text in answer] for answer in answers]


def files(server: HubServer) -> list[str]:
    """Data files that were asked for, in order."""
    return [each.file for each in server.files_asked() if each.file != "README.md"]


def test_a_split_is_read_in_order_and_a_file_only_when_its_texts_are_wanted(server, texts, tmp_path):
    row = {"revision": server.add(NAME, texts, kind="dataset"), "subset": "long", "split": "train"}
    first, second = (f"long/train-0000{i}-of-00002.parquet" for i in range(2))
    assert fetch(server, tmp_path, row | {"max_sequences": 2}) == [["a = b\n", " = Title = \n"]]
    assert files(server) == [first]
    answers = fetch(server, tmp_path, row | {"max_sequences": 3}, row | {"rule": "paragraphs"})
    assert answers == [
        ["a = b\n", " = Title = \n", "of the second file\n"],
        ["a = b", "of the second file", "and its last"],
    ]
    assert files(server) == [first, second]


def test_the_revision_of_the_row_is_read_and_no_later_one(server, texts, tmp_path):
    first = server.add(NAME, texts, kind="dataset")
    pl.DataFrame({"text": ["changed"]}).write_parquet(texts / "short" / "test-00000-of-00001.parquet")
    second = server.add(NAME, texts, kind="dataset")
    # A folder of the same name lies where the program runs.
    shutil.copytree(texts, tmp_path / NAME)
    rows = [{"revision": commit, "subset": "short"} for commit in (second, first)]
    assert fetch(server, tmp_path, *rows) == [["changed"], ["short\n"]]


ROWS = pl.DataFrame({"text": ["one, two", "three"], "n": [1, 2]})
FORMATS = {
    "jsonl": ROWS.write_ndjson().encode(),
    "jsonl.gz": gzip.compress(ROWS.write_ndjson().encode()),
    "csv": ROWS.write_csv().encode(),
    "tsv": ROWS.write_csv(separator="\t").encode(),
    "txt": b"one, two\nthree\n",
}


def test_plain_files_without_a_card_are_read(server, tmp_path):
    rows = []
    for suffix, content in FORMATS.items():
        folder = tmp_path / suffix
        folder.mkdir()
        (folder / f"train.{suffix}").write_bytes(content)
        row = {"repository": f"plain/{suffix}", "revision": server.add(f"plain/{suffix}", folder, kind="dataset")}
        rows += [row | {"split": "train", "subset": subset} for subset in ("", "default")]
    assert fetch(server, tmp_path, *rows) == [["one, two", "three"]] * len(rows)


def test_what_is_not_in_the_data_set_is_named_with_what_is(server, texts, tmp_path):
    row = {"revision": server.add(NAME, texts, kind="dataset"), "subset": "long"}
    expected = [
        ({"subset": "logn"}, "there is no subset 'logn'; write one of these into the cell `subset`: long, short."),
        ({"subset": ""}, "the data set has several subsets; write one of these into the cell `subset`: long, short."),
        ({"split": "dev"}, "there is no split 'dev'; write one of these into the cell `split`: train, test."),
        ({"split": "test[:1]"}, "there is no split 'test[:1]'; write one of these"),
        ({"column": "txt"}, "has no column 'txt'; write one of these into the cell `column`: id, text, other."),
        ({"column": "id"}, "the column id of long/test-00000-of-00001.parquet holds values of type int, not texts"),
    ]
    answers = fetch(server, tmp_path, *(row | change for change, _ in expected), row | {"column": "other"})
    for (_, sentence), answer in zip(expected, answers[:-1], strict=True):
        assert sentence in answer
    assert answers[-1] == ["other 0"]


def test_a_data_set_that_the_hub_does_not_give_is_a_sentence(server, texts, tmp_path):
    row = {"revision": server.add(NAME, texts, kind="dataset"), "subset": "short"}
    page = f"{server.endpoint}/datasets/{NAME}"
    changes = ({"revision": "0" * 40}, {"repository": "no/such"}, {"revision": "main"})
    unknown, missing, branch = fetch(server, tmp_path, *(row | change for change in changes))
    assert "the revision 'main' is not a commit of 40 hex digits" in branch and f"{page}/commits/main" in branch
    assert f"there is no revision {'0' * 40}" in unknown and f"{page}/commits/main" in unknown
    assert "there is no such repository" in missing
    server.add(NAME, texts, kind="dataset", gated=True)
    for token in ("", server.token):
        (gated,) = fetch(server, tmp_path, row, token=token)
        assert "gated" in gated and page in gated and "HF_TOKEN" in gated
    server.granted.add(NAME)
    assert fetch(server, tmp_path, row, token=server.token) == [["short\n"]]
    server.down = True
    assert "answered 503" in fetch(server, tmp_path, row, token=server.token)[0]
    server.stop()
    assert "cannot be reached" in fetch(server, tmp_path, row, token=server.token)[0]


def test_damaged_files_are_refused_and_fetched_anew(server, texts, tmp_path):
    row = {"revision": server.add(NAME, texts, kind="dataset"), "subset": "short"}
    (texts / "short" / "test-00000-of-00001.parquet").write_bytes(b"no parquet")
    other = row | {"revision": server.add(NAME, texts, kind="dataset")}
    server.corrupt(NAME, "short/test-00000-of-00001.parquet", times=1)
    damaged, again, broken = fetch(server, tmp_path, row, row, other)
    assert "short/test-00000-of-00001.parquet is damaged: its sha256" in damaged
    assert again == ["short\n"]
    assert "short/test-00000-of-00001.parquet cannot be read" in broken


def test_code_and_data_elsewhere_are_refused(server, texts, tmp_path):
    """No script is run, no format read that may hold pickled objects, and nothing that the revision does not pin."""
    trace = tmp_path / "trace"
    for name in ("scripted", "pickled", "linked", "empty"):
        (tmp_path / name).mkdir()
    (tmp_path / "scripted" / "scripted.py").write_text(f"open({str(trace)!r}, 'w')\n")
    (tmp_path / "scripted" / "test.txt").write_text("data beside it\n")
    with tarfile.open(tmp_path / "pickled" / "test-0.tar", "w") as archive:
        archive.addfile(tarfile.TarInfo("0.txt"), io.BytesIO(b""))
    server.add("other/data", texts, kind="dataset")
    address = "hf://datasets/other/data/short/test-00000-of-00001.parquet"
    card = f"---\nconfigs:\n- config_name: short\n  data_files: [{{split: test, path: '{address}'}}]\n---\n"
    (tmp_path / "linked" / "README.md").write_text(card)
    (tmp_path / "empty" / "README.md").write_text("# Nothing yet\n")
    rows = [
        {"repository": f"odd/{name}", "revision": server.add(f"odd/{name}", tmp_path / name, kind="dataset")}
        for name in ("scripted", "pickled", "linked", "empty")
    ]
    scripted, pickled, linked, empty = fetch(server, tmp_path, *rows)
    assert "made by a script, which is never run" in scripted and not trace.exists()
    assert "the format webdataset is not read" in pickled
    assert "the data set cannot be read" in linked
    assert "no data files are found" in empty
    assert not [file for file in files(server) if not file.endswith(".py")]


@pytest.fixture
def repository(server, texts, tmp_path, monkeypatch):
    """A copy of the repository whose sheet has a corpus of the Hub, and the Hub's environment for Snakemake."""
    row = {"corpus": "hub", "source": f"hf:{NAME}", "kind": "long", "rule": "paragraphs", "max_sequences": "2"}
    row |= {"revision": server.add(NAME, texts, kind="dataset"), "subset": "long", "split": "train"}
    prompt = dict.fromkeys(row, "") | {"corpus": "prompt", "source": "prompt:As an open source", "kind": "short"}
    folder = copy_repository(tmp_path / "copy")
    write_sheet(folder / "config" / "corpora.tsv", [row, prompt])
    for name in os.environ:
        if name.startswith("HF_"):
            monkeypatch.delenv(name)
    for name, value in server.environment(tmp_path).items():
        monkeypatch.setenv(name, value)
    return folder


def test_the_workflow_fetches_a_corpus_once(server, repository):
    path = "results/corpora/hub.parquet"
    snakemake(repository, path)
    assert pl.read_parquet(repository / path)["text"].to_list() == ["a = b", "of the second file"]
    asked = len(server.requests)
    assert asked and "Nothing to be done" in snakemake(repository, path) and len(server.requests) == asked
    sheet = repository / "config" / "corpora.tsv"
    sheet.write_text(sheet.read_text().replace("\ttrain", "\ttest"))
    assert counts(planned(repository, path)) == {"fetch_corpus": 1}


def test_a_plan_asks_the_hub_for_nothing(server, repository):
    jobs = counts(planned(repository))
    assert (jobs["fetch_corpus"], jobs["prepare_corpus"]) == (1, 1)
    assert not server.requests


def test_a_refused_corpus_is_tried_again_and_said_in_its_log(server, repository):
    server.down = True
    printed = snakemake(repository, "results/corpora/hub.parquet", check=False)
    assert "fetch_corpus" in printed and not (repository / "results" / "corpora" / "hub.parquet").exists()
    log = (repository / "results" / "logs" / "fetch_corpus" / "hub.log").read_text()
    assert log.splitlines()[-1].startswith(f"error: corpus hub: hf:{NAME}: the Hub at {server.endpoint} answered 503")
    assert sum("auth-check" in each.path for each in server.requests) > 1
