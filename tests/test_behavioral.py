"""Sums over tokens and the tables made from them, against plain loops in float64."""

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
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from scipy.stats import rankdata

from moe_atlas import accumulate, tables
from moe_atlas.accumulate import LoadCounts, PairSums, pair_cosines, rank_counts
from moe_atlas.behavioral.activations import Activations, read_activations
from moe_atlas.behavioral.tables import average_ranks, layers
from moe_atlas.behavioral.write import write_frames
from moe_atlas.errors import AtlasError

SCRIPTS = Path(__file__).resolve().parent.parent / "scripts"


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def loop_cosine(a, b):
    product = math.fsum(x * y for x, y in zip(a, b, strict=True))
    lengths = [max(math.sqrt(math.fsum(x * x for x in vector)), 1e-8) for vector in (a, b)]
    return product / lengths[0] / lengths[1]


def loop_angular(cosine):
    return 1 - math.acos(min(1.0, max(-1.0, cosine))) / math.pi


def loop_rank_counts(scores, norms):
    """Shares of every expert at every pair of ranks, expert by expert."""
    size = len(scores[0])
    counts = [[0.0] * size for _ in range(size)]
    for score, norm in zip(scores, norms, strict=True):
        for expert in range(size):
            ranks = []
            for values in (score, norm):
                below = sum(value < values[expert] for value in values)
                equal = sum(value == values[expert] for value in values)
                ranks.append(range(below, below + equal))
            for i, j in itertools.product(*ranks):
                counts[i][j] += 1 / len(ranks[0]) / len(ranks[1])
    return counts


# ---- sums over tokens


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_pair_cosines_match_loops(dtype):
    outputs = normal(4, 5, 7).to(dtype)
    outputs[2, 3] = 0
    outputs[1, 0] *= 1e-10  # shorter than the smallest norm
    cosines = pair_cosines(outputs)
    assert cosines.dtype == torch.float64 and cosines.shape == (5, 4, 4)
    for token, a, b in itertools.product(range(5), range(4), range(4)):
        wanted = loop_cosine(outputs[a, token].tolist(), outputs[b, token].tolist())
        assert cosines[token, a, b].item() == pytest.approx(wanted, abs=1e-12)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 5), st.integers(1, 6), st.integers(1, 9), st.integers(0, 1000), st.sampled_from([1e-12, 1.0, 1e12])
)
def test_pair_cosines_are_symmetric_and_bounded(count, tokens, hidden, seed, scale):
    cosines = pair_cosines(normal(count, tokens, hidden, seed=seed) * scale)
    assert torch.equal(cosines, cosines.transpose(1, 2))
    assert cosines.abs().max() <= 1
    if scale >= 1:
        assert (cosines.diagonal(dim1=1, dim2=2) - 1).abs().max() < 1e-12


def test_identical_opposite_and_orthogonal_outputs():
    outputs = torch.tensor([[3.0, 0, 0], [3.0, 0, 0], [-1.0, 0, 0], [0, 5.0, 0]])[:, None]
    cosines = pair_cosines(outputs)
    assert cosines[0, 0].tolist() == [1, 1, -1, 0]
    sums = PairSums(4)
    sums.add(cosines)
    assert sums.arrays()["angular_sum"][0].tolist() == pytest.approx([1, 1, 0, 0.5], abs=1e-15)


def test_rounding_does_not_take_a_cosine_past_one():
    outputs = normal(1, 300, 9).expand(2, 300, 9)
    outputs = torch.stack([outputs[0], 3 * outputs[1]])
    cosines = pair_cosines(outputs)[:, 0, 1]
    assert cosines.max() <= 1 and cosines.min() > 1 - 1e-14


def test_pair_sums_match_loops_however_the_tokens_are_split():
    cosines = pair_cosines(normal(3, 11, 6))
    whole, parts = PairSums(3), PairSums(3)
    whole.add(cosines)
    for first, last in ((0, 4), (4, 4), (4, 10), (10, 11)):
        parts.add(cosines[first:last])
    assert whole.arrays()["tokens"].tolist() == parts.arrays()["tokens"].tolist() == [11]
    for measure, of in (("cosine", float), ("angular", loop_angular)):
        for moment, power in (("sum", 1), ("square", 2)):
            name = f"{measure}_{moment}"
            assert (whole.arrays()[name] - parts.arrays()[name]).abs().max() < 1e-12
            for a, b in itertools.product(range(3), range(3)):
                wanted = math.fsum(of(value) ** power for value in cosines[:, a, b].tolist())
                assert whole.arrays()[name][a, b].item() == pytest.approx(wanted, abs=1e-7 if a == b else 1e-12)


def test_rank_counts_match_loops_without_ties():
    scores, norms = normal(30, 6), normal(30, 6, seed=1)
    assert rank_counts(scores, norms).tolist() == loop_rank_counts(scores.tolist(), norms.tolist())


def test_a_tie_is_shared_out_written_by_hand():
    counts = rank_counts(torch.tensor([[1.0, 2.0, 2.0]]), torch.tensor([[5.0, 4.0, 6.0]]))
    # Expert 0: score rank 0, norm rank 1. Experts 1 and 2 share score ranks 1 and 2; norm ranks 0 and 2.
    assert counts.tolist() == [[0, 1, 0], [0.5, 0, 0.5], [0.5, 0, 0.5]]


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 6), st.integers(0, 12), st.integers(1, 5), st.integers(0, 1000), st.randoms())
def test_rank_counts_with_ties(experts, tokens, values, seed, random):
    generator = torch.Generator().manual_seed(seed)
    scores, norms = torch.randint(values, (2, tokens, experts), generator=generator).float()
    counts = rank_counts(scores, norms)
    assert counts.dtype == torch.float64
    if tokens:
        wanted = torch.tensor(loop_rank_counts(scores.tolist(), norms.tolist()), dtype=torch.float64)
        assert (counts - wanted).abs().max() < 1e-12
    for axis in (0, 1):
        assert (counts.sum(axis) - tokens).abs().max() < 1e-9
    order = list(range(experts))
    random.shuffle(order)
    assert torch.allclose(rank_counts(scores[:, order], norms[:, order]), counts, atol=1e-12)
    assert torch.allclose(rank_counts(norms, scores), counts.T, atol=1e-12)


def test_rank_counts_do_not_depend_on_the_blocks_of_tied_tokens(monkeypatch):
    scores, norms = normal(50, 5).round(), normal(50, 5, seed=1)
    whole = rank_counts(scores, norms)
    monkeypatch.setattr(accumulate, "_TIED_ELEMENTS", 80)
    assert (rank_counts(scores, norms) - whole).abs().max() < 1e-12


def test_values_that_are_not_numbers_are_refused():
    scores = normal(3, 4)
    broken = scores.clone()
    broken[1, 2] = float("nan")
    for pair in ((scores, broken), (broken, scores)):
        with pytest.raises(AtlasError, match="float32"):
            rank_counts(*pair)


def test_load_counts_match_loops_and_leave_out_empty_slots():
    ids = torch.tensor([[2, 0, -1], [1, 2, 0], [2, -1, -1], [2, 0, 1]])
    weights = torch.tensor([[0.6, 0.4, 0.9], [0.5, 0.3, 0.2], [1.0, 9.0, 9.0], [0.7, 0.2, 0.1]])
    load = LoadCounts(4, 3)
    load.add(ids[:1], weights[:1])
    load.add(ids[1:], weights[1:])
    arrays = load.arrays()
    tokens, sums = np.zeros((4, 3), dtype=int), np.zeros((4, 3))
    for chosen, applied in zip(ids.tolist(), weights.tolist(), strict=True):
        for rank, expert in enumerate(chosen):
            if expert >= 0:
                tokens[expert, rank] += 1
                sums[expert, rank] += applied[rank]
    assert arrays["load_tokens"].dtype == torch.int64 and arrays["load_tokens"].tolist() == tokens.tolist()
    assert arrays["load_weight"].dtype == torch.float64
    assert np.abs(arrays["load_weight"].numpy() - sums).max() < 1e-12
    with pytest.raises(ValueError, match="for 4 experts"):
        load.add(torch.tensor([[4, 0, 1]]), weights[:1])


# ---- tables

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
    arrays = sums.arrays() | load.arrays() | {"rank_counts": rank_counts(logits, norms)}
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
    metadata = {"model": "m", "corpus": "c", "kind": kind, "method": 1, "layers": sites}
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


SUMS = ("load", "rank_counts", "output_similarity")
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


def test_reading_everything_at_once(short_run):
    metadata, arrays = read_activations(short_run[0] / "activations.safetensors")
    assert metadata["layers"] == SITES and list(arrays) == [(1, "ffn"), (2, "attention")]
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
