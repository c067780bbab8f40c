"""A corpus with parts in its row is run in so many jobs, and every file made of it is the same."""

import json
import shutil

import families
import pytest
from conftest import ROOT
from workflow_runs import copy_repository, counts, planned, read_sheet, snakemake, write_sheet

from moe_atlas.files import sha256
from moe_atlas.tables import TABLES

FOLDER = "results/models/local/behavioral/prose"
RECORDED = ("activations.safetensors", "tokens.parquet", "intermediate.safetensors")


@pytest.fixture
def atlas(tmp_path):
    """A copy of the repository with one small model, a prompt and a text of several batches."""
    folder = copy_repository(tmp_path / "atlas")
    tokenizer = ROOT / "tests/data/oracle/checkpoints/mixtral"
    vocabulary = json.loads((tokenizer / "config.json").read_text())["vocab_size"]
    families.save("mixtral", folder / "local", num_hidden_layers=2, vocab_size=vocabulary)
    for file in tokenizer.glob("*token*"):
        shutil.copy(file, folder / "local")
    row = read_sheet(folder / "config/models.tsv")[-1]
    write_sheet(folder / "config/models.tsv", [row | {"model": "local", "source": "path:local", "dense_reference": ""}])
    corpora = {row["corpus"]: row for row in read_sheet(folder / "config/corpora.tsv")}
    write_sheet(folder / "config/corpora.tsv", [corpora["prompt"], corpora["prose"] | {"max_sequences": "120"}])
    return folder


def deal(folder, **parts: str) -> None:
    """Write parts into the corpus sheet."""
    rows = read_sheet(folder / "config/corpora.tsv")
    write_sheet(folder / "config/corpora.tsv", [row | {"parts": parts.get(row["corpus"], "")} for row in rows])


def tables() -> list[str]:
    names = [
        f"results/models/local/{table.path.format(corpus='prose')}"
        for table in TABLES.values()
        if "long" in table.kinds
    ]
    return [*names, f"{FOLDER}/activations.safetensors"]


def hashes(folder) -> dict[str, str]:
    return {path.name: sha256(path) for path in (folder / FOLDER).iterdir() if path.is_file()}


def test_parts_change_no_byte(atlas):
    snakemake(atlas, "--", *tables())
    whole = hashes(atlas)
    assert whole.keys() >= set(RECORDED)
    deal(atlas)
    assert planned(atlas, "--", *tables()) == []
    deal(atlas, prose="3")
    jobs = planned(atlas, "--", *tables())
    assert counts(jobs) == {"extract_part": 3, "merge_activations": 1, "long_tables": 1}
    of_parts = [job for job in jobs if job.rule == "extract_part"]
    assert sorted(job.wildcards["part"] for job in of_parts) == ["1", "2", "3"]
    state = atlas / FOLDER / "parts/2-of-3/state"
    state.mkdir(parents=True)
    (state / "done.json").write_text("not a state")
    snakemake(atlas, "--config", "keep_state=true", "--", *tables())
    assert hashes(atlas) == whole
    assert [path for path in (atlas / FOLDER).rglob("*") if path.is_dir() and any(path.iterdir())] == []
    logs = [(atlas / f"results/logs/extract_part/local/prose/{part}-of-3.log").read_text() for part in (1, 2, 3)]
    assert all("layer 2/2" in log for log in logs)
    assert ["done.json is damaged" in log for log in logs] == [False, True, False]  # each has a state of its own
    assert planned(atlas, "--", *tables()) == []


def test_a_part_asks_for_what_the_whole_asks_for(atlas):
    target = [f"{FOLDER}/activations.safetensors"]
    (whole,) = (job for job in planned(atlas, "--", *target) if job.rule == "extract_activations")
    deal(atlas, prose="2")
    first, second = (job for job in planned(atlas, "--", *target) if job.rule == "extract_part")
    assert whole.resources == first.resources == second.resources
    # A prompt goes on as it was.
    assert (
        counts(planned(atlas, "--", "results/models/local/behavioral/prompt/routing.parquet"))["extract_activations"]
        == 1
    )


def test_a_short_corpus_is_not_dealt_out(atlas):
    deal(atlas, prompt="2")
    printed = snakemake(atlas, "-n", check=False)
    assert (
        "(prompt), column parts: only a long corpus can be dealt to several jobs; write 1 or empty the cell." in printed
    )
