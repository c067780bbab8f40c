"""With keep_state a killed run of the workflow goes on after the last layer that is done."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import families
import pytest
from conftest import ROOT
from workflow_runs import copy_repository, counts, planned, read_sheet, snakemake, write_sheet

from moe_atlas.files import read_json, sha256

LAYERS = 8
KEPT = ("--config", "keep_state=true")
FOLDER = "results/models/local/behavioral/prose"
TARGET = f"{FOLDER}/activations.safetensors"


@pytest.fixture
def atlas(tmp_path):
    """A copy of the repository with one model of many layers and one text that takes a while."""
    folder = copy_repository(tmp_path / "atlas")
    tokenizer = ROOT / "tests/data/oracle/checkpoints/mixtral"
    vocabulary = json.loads((tokenizer / "config.json").read_text())["vocab_size"]
    families.save("mixtral", folder / "local", num_hidden_layers=LAYERS, vocab_size=vocabulary)
    for file in tokenizer.glob("*token*"):
        shutil.copy(file, folder / "local")
    row = read_sheet(folder / "config/models.tsv")[-1]
    write_sheet(folder / "config/models.tsv", [row | {"model": "local", "source": "path:local", "dense_reference": ""}])
    corpora = {row["corpus"]: row for row in read_sheet(folder / "config/corpora.tsv")}
    write_sheet(folder / "config/corpora.tsv", [corpora["prose"] | {"max_sequences": "40"}])
    return folder


def layers_done(folder) -> int:
    try:
        return read_json(folder / FOLDER / "state/done.json")["layers"]
    except Exception:  # it is not there yet
        return 0


def test_a_killed_run_goes_on_and_the_setting_repeats_nothing(atlas):
    command = [sys.executable, "-m", "snakemake", "--cores", "2", *KEPT, "--", TARGET]
    with subprocess.Popen(
        command, cwd=atlas, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    ) as run:
        while not layers_done(atlas):
            assert run.poll() is None
            time.sleep(0.002)
        os.killpg(run.pid, signal.SIGKILL)
    done = layers_done(atlas)
    assert 1 <= done < LAYERS and not (atlas / TARGET).exists()
    snakemake(atlas, "--unlock")
    snakemake(atlas, *KEPT, "--", TARGET)
    log = (atlas / "results/logs/extract_activations/local/prose.log").read_text()
    assert int(re.search(r"the run goes on after layer (\d+), the last", log)[1]) == done - 1
    assert f"layer {done + 1}/{LAYERS} ·" in log
    assert not (atlas / FOLDER / "state").exists()
    assert planned(atlas, "--", TARGET) == planned(atlas, *KEPT, "--", TARGET) == []
    first = {path.name: sha256(path) for path in (atlas / FOLDER).iterdir()}
    (atlas / TARGET).unlink()
    assert counts(planned(atlas, "--", TARGET)) == {"extract_activations": 1}
    snakemake(atlas, "--", TARGET)
    assert {path.name: sha256(path) for path in (atlas / FOLDER).iterdir()} == first
