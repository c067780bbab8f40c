"""Tables made from recorded sums, against plain loops in float64."""

import itertools
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from loops import loop_angular, loop_cosine, loop_rank_counts, normal
from safetensors.torch import save_file
from scipy.stats import rankdata

from moe_atlas import tables
from moe_atlas.accumulate import LoadCounts, PairSums, pair_cosines, rank_counts
from moe_atlas.behavioral.activations import Activations
from moe_atlas.behavioral.tables import average_ranks, layers
from moe_atlas.behavioral.write import write_frames
from moe_atlas.errors import AtlasError
from moe_atlas.router_rule import RouterRule

SCRIPTS = Path(__file__).resolve().parent.parent / "scripts"


SITES = [
    {"layer": 1, "site": "ffn", "experts": 5, "top_k": 2, "labels": ["0", "1", "2", "3", "4", "F", "SE"]},
    {"layer": 2, "site": "attention", "experts": 3, "top_k": 3, "labels": ["0", "1", "2"]},
]
TOKENS = [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2), (1, 3)]  # sequence, position


def record(entry, count, seed):
    """What extraction records of random outputs; some logits and norms tie, one slot is empty."""
    experts, top_k, outputs = entry["experts"], entry["top_k"], normal(len(entry["labels"]), count, 6, seed=seed)
    logits = normal(count, experts, seed=seed + 1)
    logits[0, 1] = logits[0, 0]
    weights, ids = logits.softmax(-1).topk(top_k)
    ids[-1, -1] = -1
    norms = outputs[:experts].norm(dim=-1).T.contiguous()
    norms[-1, 2] = norms[-1, 0]
    cosines, sums, load = pair_cosines(outputs), PairSums(len(outputs)), LoadCounts(experts, top_k)
    sums.add(cosines)
    load.add(ids, weights)
    rule = RouterRule(experts)
    rule.add(logits, ids.where(ids >= 0, experts), weights)
    arrays = sums.arrays() | load.arrays() | rule.arrays() | {"rank_counts": rank_counts(logits, norms)}
    return arrays | {"ids": ids, "weights": weights, "logits": logits, "norms": norms, "cosine": cosines.float()}


def write_run(directory, kind="short", sites=SITES, tokens=TOKENS, change=None):
    """activations.safetensors and tokens.parquet as extraction leaves them; returns the recorded arrays."""
    recorded = {(site["layer"], site["site"]): record(site, len(tokens), site["layer"]) for site in sites}
    arrays = {f"layer_{layer}.{site}.{name}": a for (layer, site), own in recorded.items() for name, a in own.items()}
    if kind == "long":
        arrays = {
            name: a
            for name, a in arrays.items()
            if name.split(".")[2] not in ("ids", "weights", "logits", "norms", "cosine")
        }
    if change:
        change(arrays)
    metadata = {"model": "m", "corpus": "c", "kind": kind, "layers": sites}
    save_file(arrays, directory / "activations.safetensors", {"atlas": json.dumps(metadata)})
    rows = [("m", "c", sequence, position, 7, "x") for sequence, position in tokens]
    frame = pl.DataFrame(rows, schema=tables.TABLES["tokens"].schema, orient="row")
    tables.write("tokens", frame, directory / "tokens.parquet")
    return recorded


def program(directory, *names, check=True):
    options = [part for name in names for part in ("--" + name.replace("_", "-"), directory / f"{name}.parquet")]
    inputs = ["--activations", directory / "activations.safetensors", "--tokens", directory / "tokens.parquet"]
    command = [sys.executable, SCRIPTS / "behavioral_tables.py", *inputs, *options]
    return subprocess.run(list(map(str, command)), check=check, capture_output=True, text=True)


SUMS = ("load", "rank_counts", "output_similarity", "router_rule")
SINGLE = ("routing", "norm_score", "output_similarity_tokens")


@pytest.fixture(scope="module")
def short_run(tmp_path_factory):
    """Every table of a short corpus, by the program, and the recorded arrays as Python lists."""
    directory = tmp_path_factory.mktemp("short")
    recorded = write_run(directory)
    program(directory, *SUMS, *SINGLE)
    frames = {name: tables.read(name, directory / f"{name}.parquet") for name in (*SUMS, *SINGLE)}
    lists = {key: {name: array.tolist() for name, array in own.items()} for key, own in recorded.items()}
    return directory, frames, lists


def assert_rows(frame, wanted):
    """The frame's rows after model and corpus, in order; numbers to 1e-9."""
    assert set(frame["model"]) == {"m"} and set(frame["corpus"]) == {"c"}
    rows = frame.drop("model", "corpus").rows()
    assert len(rows) == len(wanted)
    for row, other in zip(rows, wanted, strict=True):
        assert [x for x in row if not isinstance(x, float)] == [x for x in other if not isinstance(x, float)]
        numbers = [[x for x in each if isinstance(x, float)] for each in (row, other)]
        assert numbers[0] == pytest.approx(numbers[1], abs=1e-9)


def sites_of(lists):
    for entry in SITES:
        yield entry, (entry["layer"], entry["site"]), lists[entry["layer"], entry["site"]]


def test_routing(short_run):
    wanted = []
    for _, key, own in sites_of(short_run[2]):
        for token, ids, weights in zip(TOKENS, own["ids"], own["weights"], strict=True):
            wanted += [
                (*key, *token, r, str(e), w) for r, (e, w) in enumerate(zip(ids, weights, strict=True)) if e >= 0
            ]
    assert_rows(short_run[1]["routing"], wanted)


def test_load(short_run):
    wanted = []
    for entry, key, own in sites_of(short_run[2]):
        for expert, rank in itertools.product(range(entry["experts"]), range(entry["top_k"])):
            wanted.append((*key, str(expert), rank, own["load_tokens"][expert][rank], own["load_weight"][expert][rank]))
    assert_rows(short_run[1]["load"], wanted)


def loop_rank(values, value):
    below, equal = sum(other < value for other in values), sum(other == value for other in values)
    return below + (equal - 1) / 2


def test_norm_score(short_run):
    wanted = []
    for entry, key, own in sites_of(short_run[2]):
        for token, logits, norms in zip(TOKENS, own["logits"], own["norms"], strict=True):
            total = math.fsum(math.exp(logit) for logit in logits)
            for expert in range(entry["experts"]):
                score = math.exp(logits[expert]) / total
                ranks = loop_rank(norms, norms[expert]), loop_rank(logits, logits[expert])
                wanted.append((*key, *token, str(expert), norms[expert], score, *ranks))
    assert_rows(short_run[1]["norm_score"], wanted)
    for column in ("norm_rank", "score_rank"):  # the planted ties are there
        assert (short_run[1]["norm_score"][column] % 1 == 0.5).any()


def test_rank_count_table(short_run):
    wanted = []
    for _, key, own in sites_of(short_run[2]):
        counts = loop_rank_counts(own["logits"], own["norms"])
        wanted += [(*key, i, j, count) for i, row in enumerate(counts) for j, count in enumerate(row)]
    assert_rows(short_run[1]["rank_counts"], wanted)


def test_output_similarity(short_run):
    wanted = []
    for entry, key, _ in sites_of(short_run[2]):
        outputs = normal(len(entry["labels"]), len(TOKENS), 6, seed=entry["layer"]).tolist()
        for a, b in itertools.combinations_with_replacement(range(len(entry["labels"])), 2):
            cosines = [1.0 if a == b else loop_cosine(x, y) for x, y in zip(outputs[a], outputs[b], strict=True)]
            row = [*key, entry["labels"][a], entry["labels"][b], len(TOKENS)]
            for values in (cosines, [loop_angular(value) for value in cosines]):
                mean = math.fsum(values) / len(values)
                row += [mean, math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (len(values) - 1))]
            wanted.append(tuple(row))
    frame = short_run[1]["output_similarity"]
    off = frame.filter(pl.col("a") != pl.col("b"))
    assert_rows(off, [row for row in wanted if row[2] != row[3]])
    diagonal = frame.filter(pl.col("a") == pl.col("b")).select("cosine_mean", "cosine_sd", "angular_mean", "angular_sd")
    assert np.abs(diagonal.to_numpy() - [1, 0, 1, 0]).max() < 1e-7


def test_output_similarity_of_single_tokens(short_run):
    wanted = []
    for entry, key, own in sites_of(short_run[2]):
        for token, cosine in zip(TOKENS, own["cosine"], strict=True):
            for a, b in itertools.combinations_with_replacement(range(len(entry["labels"])), 2):
                wanted.append((*key, *token, entry["labels"][a], entry["labels"][b], cosine[a][b]))
    assert_rows(short_run[1]["output_similarity_tokens"], wanted)


def test_the_same_run_gives_the_same_bytes(short_run, tmp_path):
    write_run(tmp_path)
    program(tmp_path, *SUMS, *SINGLE)
    for name in (*SUMS, *SINGLE):
        assert (tmp_path / f"{name}.parquet").read_bytes() == (short_run[0] / f"{name}.parquet").read_bytes(), name


def test_arrays_are_read_by_layer_and_site(short_run):
    activations = Activations(short_run[0] / "activations.safetensors")
    assert activations.metadata["layers"] == SITES
    arrays = {(entry["layer"], entry["site"]): found for entry, found in activations}
    assert list(arrays) == [(1, "ffn"), (2, "attention")]
    assert arrays[1, "ffn"]["logits"].tolist() == short_run[2][1, "ffn"]["logits"]


def test_average_ranks_are_those_of_scipy():
    values = np.random.default_rng(0).integers(6, size=(200, 9)).astype(np.float32)
    assert np.array_equal(average_ranks(values), rankdata(values, axis=1) - 1)
    assert average_ranks(np.zeros((0, 4))).shape == (0, 4)


def frames_of(directory, name):
    tokens = tables.read("tokens", directory / "tokens.parquet")
    return pl.concat(layers(name, Activations(directory / "activations.safetensors"), tokens))


def test_equal_tokens_have_no_spread_and_one_token_none_at_all(tmp_path):
    site = SITES[1] | {"layer": 0}

    def repeat(arrays):
        cosines = pair_cosines(normal(3, 1, 6)).expand(len(TOKENS), 3, 3)
        sums = PairSums(3)
        sums.add(cosines)
        arrays.update({f"layer_0.attention.{name}": array for name, array in sums.arrays().items()})

    write_run(tmp_path, sites=[site], change=repeat)
    frame = frames_of(tmp_path, "output_similarity")
    for column in ("cosine_sd", "angular_sd"):
        assert frame[column].is_between(0, 1e-7).all(), frame[column]
    write_run(tmp_path, sites=[site], tokens=TOKENS[:1])
    frame = frames_of(tmp_path, "output_similarity")
    assert frame["cosine_sd"].null_count() == frame["angular_sd"].null_count() == len(frame) == 6
    assert frame["cosine_mean"].null_count() == 0


def test_a_dense_model_has_empty_tables(tmp_path):
    write_run(tmp_path, sites=[])
    program(tmp_path, *SUMS, *SINGLE)
    for name in (*SUMS, *SINGLE):
        assert len(tables.read(name, tmp_path / f"{name}.parquet")) == 0


def test_a_long_corpus_has_the_tables_of_sums_and_no_others(tmp_path):
    write_run(tmp_path, kind="long")
    program(tmp_path, *SUMS)
    short = tmp_path / "short"
    short.mkdir()
    write_run(short)
    for name in SUMS:
        assert tables.read(name, tmp_path / f"{name}.parquet").equals(frames_of(short, name))
    refused = program(tmp_path, *SUMS, "norm_score", check=False)
    assert refused.returncode == 1 and "leave out --norm-score" in refused.stderr
    assert not (tmp_path / "norm_score.parquet").exists()


def test_faults_in_the_file_are_named(tmp_path):
    path = tmp_path / "activations.safetensors"
    with pytest.raises(AtlasError, match=r"activations.safetensors: there is no such file"):
        Activations(path)
    write_run(tmp_path, change=lambda arrays: arrays.pop("layer_2.attention.norms"))
    with pytest.raises(AtlasError, match=r"the array layer_2.attention.norms is missing"):
        frames_of(tmp_path, "load")
    write_run(tmp_path, change=lambda arrays: arrays.update({"layer_1.ffn.logits": torch.zeros(7, 4)}))
    with pytest.raises(AtlasError, match=r"layer_1.ffn.logits has shape \(7, 4\) and not \(7, 5\)"):
        frames_of(tmp_path, "load")
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(AtlasError, match="not a file of recorded activations"):
        Activations(path)
    save_file({"x": torch.zeros(1)}, path)
    with pytest.raises(AtlasError, match="not a file of recorded activations"):
        Activations(path)


def test_a_failure_in_the_last_layer_leaves_the_old_table(tmp_path):
    write_run(tmp_path, change=lambda arrays: arrays.pop("layer_2.attention.norms"))
    tokens = tables.read("tokens", tmp_path / "tokens.parquet")
    old = tmp_path / "load.parquet"
    old.write_bytes(b"old")
    with pytest.raises(AtlasError, match="is missing"):
        write_frames("load", layers("load", Activations(tmp_path / "activations.safetensors"), tokens), old)
    assert old.read_bytes() == b"old"
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "activations.safetensors",
        "load.parquet",
        "tokens.parquet",
    ]


def test_tokens_of_another_run_are_refused(tmp_path):
    write_run(tmp_path)
    tokens = tables.read("tokens", tmp_path / "tokens.parquet")[:-1]
    with pytest.raises(AtlasError, match=r"layer 1 has 7 tokens and tokens.parquet 6"):
        list(layers("load", Activations(tmp_path / "activations.safetensors"), tokens))


def test_the_tables_need_no_torch():
    code = "import sys, behavioral_tables; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=SCRIPTS).returncode == 0
