"""The paper's configurations: published files on a loopback Hub, cut down, through the same rules to numbers."""

import json
import math
import subprocess
import sys
from pathlib import Path

import moa_data
import numpy as np
import polars as pl
import pytest
import torch
import yaml
from hub_server import HubServer
from tokenizers import Tokenizer
from workflow_runs import ROOT, copy_repository

from moe_atlas import tables
from moe_atlas.architectures.moa_config import MoAConfig
from moe_atlas.errors import AtlasError
from moe_atlas.files import read_json
from moe_atlas.moa.described import measures, scores
from moe_atlas.moa.plateau import End
from moe_atlas.moa.prepare import prepare
from moe_atlas.moa.ragged import Ragged
from moe_atlas.moa.registry import objective_of
from moe_atlas.moa.run import configuration, run_job
from moe_atlas.moa.settings import Job, load_settings

RUNS = "results/moa/runs/english_german/en-de/moa-16k32e256d/runs.parquet"
TASKS = "results/tables/moa_tasks.parquet"
SETTINGS = {name: ROOT / f"config/{name}.yaml" for name in ("moa_wmt", "moa_wikitext")}


# WMT14 through Snakemake


@pytest.fixture(scope="module")
def atlas(tmp_path_factory):
    """A copy of the repository in which English-German was fetched from a Hub and an arm trained on it."""
    folder = copy_repository(tmp_path_factory.mktemp("wmt") / "atlas")
    with HubServer() as hub:
        commit = hub.add(moa_data.WMT, moa_data.wmt14(folder.parent / "wmt14"), kind="dataset")
        moa_data.at_commit(folder / "config/moa/wmt14-en-de.yaml", commit, tokenizer=600)
        content = moa_data.cut_down(
            folder / "config/moa_wmt.yaml",
            objectives={"en-de": {"source": "data:config/moa/wmt14-en-de.yaml"}},
            studies={"english_german": {"objective": "en-de", "arms": ["moa-16k32e256d"], "contrasts": []}},
        )
        content["defaults"] |= {"batch_tokens": 512, "validation": 20}
        (folder / "config/moa_wmt.yaml").write_text(yaml.safe_dump(content))
        command = [sys.executable, "-m", "snakemake", "--cores", "1", "--config", "moa=config/moa_wmt.yaml"]
        done = subprocess.run(
            [*command, "--", RUNS, TASKS],
            cwd=folder, env=hub.environment(folder), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        logs = "\n".join(path.read_text() for path in (folder / "results/logs").rglob("*.log"))
        assert done.returncode == 0, done.stdout + logs
        asked = {each.file for each in hub.files_asked() if each.file.endswith(".parquet")}
    assert asked == {f"de-en/{name}.parquet" for name in moa_data.WMT_FILES}
    return folder


def test_wmt_ends_in_numbers(atlas):
    runs = tables.read("moa_runs", atlas / RUNS)
    assert set(runs["study"]) == {"english_german"} and set(runs["objective"]) == {"en-de"}
    assert runs.select("test", "metric").rows() == [
        ("validation", "perplexity"), ("test", "perplexity"), ("test", "bleu"), ("test", "exact")
    ]  # fmt: skip
    values = dict(runs.filter(test="test").select("metric", "value").iter_rows())
    assert 1 < values["perplexity"] < 2000 and 0 <= values["bleu"] <= 100 and values["exact"] == 0
    assert runs["steps"].unique().to_list() == [12] and not runs["plateau"].any()
    assert (runs["experts"][0], runs["k"][0], runs["selects"][0]) == (32, 16, True)


def test_chance_is_the_score_of_the_source(atlas):
    runs = tables.read("moa_runs", atlas / RUNS).filter(test="test")
    test = moa_data.pairs()[530:560]
    copied = scores([source for source, _ in test], [target for _, target in test])
    chances = dict(runs.select("metric", "chance").iter_rows())
    assert chances["bleu"] == pytest.approx(copied["bleu"]) and chances["exact"] == copied["exact"]
    described = tables.read("moa_tasks", atlas / TASKS).filter(split="test", answer="copy")
    assert dict(described.select("measure", "value").iter_rows()) == {name: chances[name] for name in ("bleu", "exact")}


def test_the_loss_falls_by_the_published_schedule(atlas):
    curve = pl.read_parquet((atlas / RUNS).with_name("curves.parquet"))
    validation = curve.filter(split="validation")
    assert validation["step"].to_list() == [4, 8, 12] and validation["loss"][2] < validation["loss"][0]


def test_what_was_fetched_is_described_and_the_state_is_gone(atlas):
    done = read_json(atlas / "results/moa/data/wmt14-en-de/done.json")
    assert done["entries"] == 600 and set(done["counts"]) == {"train", "validation", "test"}
    assert done["counts"]["train"]["sequences"] + done["counts"]["train"]["left out"] == 500  # the empty pair is no row
    assert done["counts"]["test"]["sequences"] == 30
    checkpoint = atlas / "results/moa/checkpoints/english_german/en-de/moa-16k32e256d"
    assert json.loads((checkpoint / "seed-0/config.json").read_text())["objective"] == "translation"
    assert [path.name for path in checkpoint.iterdir()] == ["seed-0"]


# WikiText-103 by the programs' functions


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """Token ids of raw text in the data set's layout, from files on this machine; (settings, folder)."""
    folder = tmp_path_factory.mktemp("wikitext")
    moa_data.wikitext(folder / "data")
    content = yaml.safe_load((ROOT / "config/moa/wikitext-103.yaml").read_text())
    for split, values in content["sets"].items():
        (path,) = (folder / "data" / values["subset"]).glob(f"{split}-*.parquet")
        content["sets"][split] = {"source": f"path:{path}"}
    (folder / "wikitext-103.yaml").write_text(yaml.safe_dump(content | {"tokenizer": 400}))
    prepare(folder / "wikitext-103.yaml", folder / "ids/done.json")
    (folder / "settings.yaml").write_text(SETTINGS["moa_wikitext"].read_text())
    content = moa_data.cut_down(folder / "settings.yaml")
    content["defaults"] |= {"batch": 16, "validation": 20}
    (folder / "settings.yaml").write_text(yaml.safe_dump(content))
    settings = load_settings(folder / "settings.yaml")
    return settings, folder


def test_wikitext_ends_in_numbers(text, tmp_path):
    settings, folder = text
    objective = objective_of(settings.tasks["masked"], folder / "ids")
    found = run_job(settings, Job("experts", "masked", "moa-8k16e256d"), objective, tmp_path / "seed-0")
    runs = tables.conform("moa_runs", found["moa_runs"])
    rates = runs.filter(test="validation")
    assert sorted(rates["learning_rate"]) == [3e-4, 6e-4] and rates.filter("chosen")["value"][0] == rates["value"].min()
    (value,) = runs.filter(test="test")["value"]
    assert 1 < value < 1000 and (tmp_path / "seed-0/done.json").is_file()


def test_a_stream_is_every_line_with_its_end(text):
    settings, folder = text
    tokenizer = Tokenizer.from_file(str(folder / "ids/tokenizer.json"))
    stream = Ragged.load(folder / "ids", "train.text")
    (path,) = (folder / "data/wikitext-103-raw-v1").glob("train-*")
    lines = [line.strip() for line in pl.read_parquet(path)["text"] if line.strip()]
    assert len(stream) == len(lines) and tokenizer.get_vocab_size() == 400
    assert all(stream[i][-1] == 2 for i in range(len(stream)))
    assert tokenizer.decode_batch([stream[i].tolist() for i in range(20)]) == lines[:20]


def test_batches_of_a_stream_read_all_of_it_once(text):
    settings, folder = text
    objective = objective_of(settings.tasks["masked"], folder / "ids")
    stream, width = np.asarray(objective.stream), objective.width
    first = int(np.random.default_rng(3).integers(width))  # a pass begins somewhere in the first sequence
    count = (len(stream) - first) // width
    found, batches = [], objective.batches(3)
    while len(found) < count:
        batch = next(batches)
        labels, ids = batch["labels"].numpy(), batch["input_ids"].numpy()
        assert (ids[:, 0] == 1).all() and (labels[:, 0] == -100).all() and ids.shape[1] == 128
        found += [tuple(row) for row in np.where(labels == -100, ids, labels)[:, 1:]]
    starts = range(first, first + count * width, width)
    assert sorted(found) == sorted(tuple(stream[start : start + width]) for start in starts)
    again = next(objective.batches(3))["input_ids"]
    assert torch.equal(again, next(objective.batches(3))["input_ids"])


def test_prepared_data_are_measured(text, tmp_path):
    settings, folder = text
    found = measures(settings.tasks["masked"], folder / "ids")
    stream = Ragged.load(folder / "ids", "test.text")
    values = dict(found.filter(split="test").select("measure", "value").iter_rows())
    assert values == {"texts": len(stream), "text tokens": len(stream.ids) / len(stream)}
    prepare(pair_file(tmp_path, ROWS), tmp_path / "ids/done.json")
    found = measures(load_settings(SETTINGS["moa_wmt"]).tasks["en-de"], tmp_path / "ids").filter(split="test")
    assert found.filter(measure="sentences")["value"].item() == 3 and set(found["task"]) == {"en-de"}
    assert found.filter(answer="copy").select("measure", "value").rows() == [("bleu", 0.0), ("exact", 0.0)]
    assert "tok:13a" in found.filter(measure="bleu")["note"].item()


# What is refused, and what is left out


def pair_file(folder: Path, rows: list[dict], **changes) -> Path:
    """A data file of pairs, the same rows in each set."""
    pl.DataFrame({"translation": rows}).write_parquet(folder / "rows.parquet")
    place = {"source": f"path:{folder / 'rows.parquet'}"}
    content = {"kind": "pairs", "tokenizer": 300, "columns": {"source": "en", "target": "de"}}
    content |= {"sets": dict.fromkeys(("train", "validation", "test"), place)} | changes
    (folder / "pairs.yaml").write_text(yaml.safe_dump(content))
    return folder / "pairs.yaml"


SIDES = [("a b c", "x y z"), ("a", "x y z"), ("a b c d e f", "u v w x y z"), ("  ", "x")]
ROWS = [{"en": source, "de": target} for source, target in SIDES]


def test_training_pairs_that_are_long_or_uneven_are_left_out_and_tests_are_not(tmp_path):
    path = pair_file(tmp_path, ROWS, longest=5, ratio=2.0)
    record = prepare(path, tmp_path / "ids/done.json")
    counts = {name: (each["sequences"], each["left out"]) for name, each in record["counts"].items()}
    assert counts == {"train": (1, 2), "validation": (3, 0), "test": (3, 0)}
    assert pl.read_parquet(tmp_path / "ids/test.parquet")["target"].to_list() == [row["de"] for row in ROWS[:3]]
    assert record == read_json(tmp_path / "ids/done.json")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"columns": {"source": "en", "target": "fr"}}, "`translation` has no 'fr', but en, de; mend `columns`"),
        ({"columns": {"text": "en"}}, "columns names source, target"),
        ({"kind": "sentences"}, "has kind .pairs or text., tokenizer, columns and sets"),
        ({"sets": {}}, "sets needs train, validation and test"),
        ({"row": 1}, "has kind .pairs or text., tokenizer, columns and sets"),
        ({"kind": "text", "columns": {"text": "line"}}, "there is no column 'line'; there are translation"),
        ({"longest": 0}, "train: no row"),
    ],
)
def test_a_data_file_that_is_wrong_is_refused(tmp_path, changes, message):
    path = pair_file(tmp_path, ROWS, **changes)
    with pytest.raises(AtlasError, match=message):
        prepare(path, tmp_path / "ids/done.json")
    assert not (tmp_path / "ids/done.json").exists()


def test_data_of_another_kind_are_refused(text):
    settings, folder = text
    wmt = load_settings(SETTINGS["moa_wmt"])
    with pytest.raises(AtlasError, match="the data are of kind text, and the objective en-de needs pairs"):
        objective_of(wmt.tasks["en-de"], folder / "ids")
    with pytest.raises(AtlasError, match="needs the folder of its prepared data"):
        objective_of(wmt.tasks["en-de"])


# What the shipped files say


def test_the_shipped_data_files_name_commits():
    for path in (ROOT / "config/moa").glob("*.yaml"):
        sets = yaml.safe_load(path.read_text())["sets"]
        assert all(len(values["revision"]) == 40 for values in sets.values())


class Entries:
    """In the place of an objective: what a configuration asks of one."""

    special = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3}

    def __init__(self, entries: int):
        self.tokenizer = self
        self.get_vocab_size = lambda: entries

    def shape(self) -> tuple[int, int]:
        return 10, 10


def parameters_of(config: MoAConfig) -> int:
    """Numbers of a model that is never made."""
    from moe_atlas.architectures.moa_models import MoAForMaskedLM, MoAForTranslation

    with torch.device("meta"):
        model = (MoAForTranslation if config.objective == "translation" else MoAForMaskedLM)(config)
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(
    ("objective", "arm", "millions"),
    [
        *[("en-de", "moa-8k8e128d", 65.25), ("en-fr", "moa-8k8e128d", 69.32)],
        *[("en-de", "moa-16k32e256d", 199.95), ("en-fr", "moa-16k32e256d", 204.03)],
    ],
)
def test_translation_models_have_the_published_number_of_parameters(objective, arm, millions):
    settings = load_settings(SETTINGS["moa_wmt"])
    task = settings.tasks[objective]
    entries = yaml.safe_load((ROOT / task.data_file).read_text())["tokenizer"]
    config = configuration(settings, Entries(entries), task, arm)
    assert parameters_of(config) / 1e6 == pytest.approx(millions, abs=0.03)
    assert (config.norm, config.positions, config.dropout, config.label_smoothing) == ("post", "sinusoidal", 0.2, 0.1)


@pytest.mark.parametrize(
    ("arm", "millions"),
    [("moa-8k8e128d", 52.45), ("moa-8k8e256d", 61.90), ("moa-8k16e256d", 78.75), ("moa-8k32e256d", 112.47),
     ("moa-8k64e256d", 179.91)],
)  # fmt: skip
def test_masked_models_are_larger_than_dense_by_the_published_numbers(arm, millions):
    """The paper's dense model has 51.34 million; heads and positions beside attention are the same in all of a row."""
    settings = load_settings(SETTINGS["moa_wikitext"])
    sizes = [parameters_of(configuration(settings, Entries(50265), settings.tasks["masked"], name))
             for name in (arm, "mha-8")]  # fmt: skip
    assert (sizes[0] - sizes[1]) / 1e6 == pytest.approx(millions - 51.34, abs=0.011)


def test_the_published_schedule_by_hand():
    schedule = load_settings(SETTINGS["moa_wmt"]).tasks["en-de"].schedule
    end = End(schedule, 10.0)
    rates = {step: 7e-4 * end.factor(step) for step in (0, 1999, 3999, 15999, 49999)}
    assert math.isclose(rates[0], 1e-7 + (7e-4 - 1e-7) / 4000, rel_tol=1e-3)
    assert math.isclose(rates[1999], 3.5e-4, rel_tol=1e-3) and math.isclose(rates[3999], 7e-4, rel_tol=1e-3)
    assert math.isclose(rates[15999], 3.5e-4, rel_tol=1e-3) and end.last == 50000
    tokens = schedule.accumulate * load_settings(SETTINGS["moa_wmt"]).tasks["en-de"].data["batch_tokens"]
    assert tokens == 262144
