"""Tables made from recorded sums, against plain loops in float64."""

import itertools
import json
import math
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from loops import loop_angular, loop_cosine, loop_rank_counts, normal
from recorded import all_recorders, arrays_of_chunks, compared, made_up, with_activation
from safetensors.torch import save_file
from scipy.stats import rankdata

from moe_atlas import tables
from moe_atlas.accumulate import PairSums, pair_cosines
from moe_atlas.behavioral.activations import Activations
from moe_atlas.behavioral.intermediate import intermediate
from moe_atlas.behavioral.specialization import specialization
from moe_atlas.behavioral.tables import FROM_LAYERS, FROM_SUMS, average_ranks, layers
from moe_atlas.behavioral.write import write_frames
from moe_atlas.errors import AtlasError
from moe_atlas.tables import DOCUMENT_MEASURES
from moe_atlas.text_index import TextIndex

SCRIPTS = Path(__file__).resolve().parent.parent / "scripts"


SITES = [
    {"layer": 1, "site": "ffn", "experts": 5, "top_k": 2, "labels": ["0", "1", "2", "3", "4", "F", "SE"]},
    {"layer": 2, "site": "attention", "experts": 3, "top_k": 3, "labels": ["0", "1", "2"]},
]
TOKENS = [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2), (1, 3)]  # sequence, position


def chunk_of(entry, count=None):
    """The tokens of a site: random outputs of its own; some logits and norms tie, one slot is empty."""
    lengths = Counter(sequence for sequence, _ in TOKENS[:count]).values()
    index = TextIndex.of([[7] * length for length in lengths])
    return index, made_up(index, entry["labels"], entry["experts"], entry["top_k"], seed=entry["layer"])


def record(entry, count):
    """What extraction records of them."""
    index, chunk = chunk_of(entry, count)
    if entry["site"] == "attention":
        with_activation(chunk, None)
    return arrays_of_chunks(all_recorders(index, entry["labels"], entry["experts"], entry["top_k"]), [chunk])


def write_run(directory, kind="short", sites=SITES, tokens=TOKENS, change=None):
    """activations.safetensors and tokens.parquet as extraction leaves them; returns the recorded arrays."""
    recorded = {(site["layer"], site["site"]): record(site, len(tokens)) for site in sites}
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


def program(directory, *names, check=True, states=None):
    options = [part for name in names for part in ("--" + name.replace("_", "-"), directory / f"{name}.parquet")]
    inputs = ["--activations", directory / "activations.safetensors", "--tokens", directory / "tokens.parquet"]
    inputs += ["--states", states] if states else []
    command = [sys.executable, SCRIPTS / "behavioral_tables.py", *inputs, *options]
    return subprocess.run(list(map(str, command)), check=check, capture_output=True, text=True)


SUMS = (*FROM_SUMS, *FROM_LAYERS)
PLAIN = ("layer", "site", "a", "b", "tokens", "cosine_mean", "cosine_sd", "angular_mean", "angular_sd")
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
            names = ("load_tokens", "load_tokens_first", "load_weight")
            wanted.append((*key, str(expert), rank, *(own[name][expert][rank] for name in names)))
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
    for entry, key, own in sites_of(short_run[2]):
        first = [token for token, (_, position) in enumerate(TOKENS) if position == 0]
        counts = loop_rank_counts(own["logits"], own["norms"])
        of_first = loop_rank_counts([own["logits"][t] for t in first], [own["norms"][t] for t in first])
        n = range(entry["experts"])
        wanted += [(*key, i, j, counts[i][j], of_first[i][j]) for i in n for j in n]
    assert_rows(short_run[1]["rank_counts"], wanted)


def test_output_similarity(short_run):
    wanted = []
    for entry, key, _ in sites_of(short_run[2]):
        outputs = compared(chunk_of(entry)[1]).tolist()
        for a, b in itertools.combinations_with_replacement(range(len(entry["labels"])), 2):
            cosines = [1.0 if a == b else loop_cosine(x, y) for x, y in zip(outputs[a], outputs[b], strict=True)]
            row = [*key, entry["labels"][a], entry["labels"][b], len(TOKENS)]
            for values in (cosines, [loop_angular(value) for value in cosines]):
                mean = math.fsum(values) / len(values)
                row += [mean, math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (len(values) - 1))]
            wanted.append(tuple(row))
    frame = short_run[1]["output_similarity"].select("model", "corpus", *PLAIN)
    off = frame.filter(pl.col("a") != pl.col("b"))
    assert_rows(off, [row for row in wanted if row[2] != row[3]])
    diagonal = frame.filter(pl.col("a") == pl.col("b")).select("cosine_mean", "cosine_sd", "angular_mean", "angular_sd")
    assert np.abs(diagonal.to_numpy() - [1, 0, 1, 0]).max() < 1e-7


def test_output_similarity_of_content_quantiles_and_documents(short_run):
    """Without position 0; order statistics to a bin; sd of the two documents' means."""
    for entry, (layer, site), _ in sites_of(short_run[2]):
        cosines = pair_cosines(compared(chunk_of(entry)[1])).numpy()
        content = [token for token, (_, position) in enumerate(TOKENS) if position]
        by_document = [[t for t in content if TOKENS[t][0] == document] for document in (0, 1)]
        rows = short_run[1]["output_similarity"].filter(layer=layer, site=site)
        for row in rows.iter_rows(named=True):
            a, b = entry["labels"].index(row["a"]), entry["labels"].index(row["b"])
            values = cosines[:, a, b]
            assert row["cosine_mean_content"] == pytest.approx(values[content].mean(), abs=1e-12)
            angles = [loop_angular(value) for value in values[content]]
            assert row["angular_mean_content"] == pytest.approx(np.mean(angles), abs=1e-7)
            means = [values[tokens].mean() for tokens in by_document]
            assert row["cosine_sd_documents"] == pytest.approx(np.std(means, ddof=1), abs=1e-12)
            for q in (5, 25, 50, 75, 95):
                true = np.quantile(values, q / 100, method="inverted_cdf")
                assert abs(row[f"cosine_q{q:02}"] - true) < 0.01


def test_documents(short_run):
    """Means of the recorded sums, position 0 apart; a measure that no token has is not there."""
    frame = short_run[1]["documents"]
    for _, (layer, site), own in sites_of(short_run[2]):
        wanted = {}
        for suffix, sums, counts in zip(("", "_first"), own["document_sum"], own["document_count"], strict=True):
            for block, number in itertools.product(range(2), range(len(DOCUMENT_MEASURES))):
                key = DOCUMENT_MEASURES[number] + suffix
                if counts[0][number] or counts[1][number]:
                    count = counts[block][number]
                    wanted[block, key] = count, sums[block][number] / count if count else None
        rows = frame.filter(layer=layer, site=site)
        found = {(b, m): (t, v) for b, m, t, v in rows.select("block", "measure", "tokens", "value").iter_rows()}
        assert found == wanted
        assert {"active", "active_first"} & set(rows["measure"]) == (
            {"active", "active_first"} if site == "ffn" else set()
        )
        assert rows.filter(measure="pair_cosine")["tokens"].to_list() == [2, 3]
        assert rows.filter(measure="norm_first")["tokens"].to_list() == [1, 1]


def test_activation_ratio(short_run):
    """At every threshold what a direct count gives; experts of attention have none."""
    frame = short_run[1]["activation_ratio"]
    assert set(frame["site"]) == {"ffn"} and 0.001 in frame["threshold"] and 0.0 in frame["threshold"]
    magnitude = chunk_of(SITES[0])[1].activation.abs()
    for row in frame.iter_rows(named=True):
        above = magnitude[int(row["expert"])] > row["threshold"]
        assert row["ratio"] == pytest.approx(above.double().mean().item(), abs=1e-15)
        assert row["tokens"] == len(TOKENS)
    assert len(frame) == 5 * 16 and frame.filter(threshold=0.001)["ratio"].is_between(0.5, 0.999).all()


@pytest.mark.parametrize("width", [5, 128, 300])
def test_intermediate_states_are_pooled_to_what_a_page_holds(tmp_path, width):
    write_run(tmp_path)
    states = normal(len(TOKENS), 3, width)
    metadata = {"model": "m", "corpus": "c", "kind": "short", "labels": {"layer_4": ["0", "1", "F"]}}
    save_file({"layer_4": states}, tmp_path / "states.safetensors", {"atlas": json.dumps(metadata)})
    program(tmp_path, *SUMS, "intermediate", states=tmp_path / "states.safetensors")
    frame = tables.read("intermediate", tmp_path / "intermediate.parquet")
    run = -(-width // 128)
    wanted = []
    for place, values in zip(TOKENS, states.tolist(), strict=True):
        for expert, label in enumerate("01F"):
            for first in range(0, width, run):
                wanted.append((4, "ffn", *place, label, first, run, max(values[expert][first : first + run], key=abs)))
    assert_rows(frame, wanted)
    other = tables.read("tokens", tmp_path / "tokens.parquet")[:-1]
    with pytest.raises(AtlasError, match="layer_4 has 7 tokens and tokens.parquet 6"):
        list(intermediate(tmp_path / "states.safetensors", other))
    with pytest.raises(AtlasError, match="not a file of intermediate states"):
        list(intermediate(tmp_path / "activations.safetensors", other))


def test_output_similarity_of_single_tokens(short_run):
    wanted = []
    for entry, key, own in sites_of(short_run[2]):
        for token, cosine in zip(TOKENS, own["cosine"], strict=True):
            for a, b in itertools.combinations_with_replacement(range(len(entry["labels"])), 2):
                wanted.append((*key, *token, entry["labels"][a], entry["labels"][b], cosine[a][b]))
    assert_rows(short_run[1]["output_similarity_tokens"], wanted)


def test_specialization(short_run):
    """The table is that of the function for each layer; super experts come from all layers of a site, here one each."""
    frame = short_run[1]["specialization"]
    for entry, arrays in Activations(short_run[0] / "activations.safetensors"):
        largest = arrays["importance_output_max"]
        wanted = specialization(arrays, entry["labels"], largest == largest.max(), entry["layer"])
        found = frame.filter(pl.col("layer") == entry["layer"], pl.col("site") == entry["site"])
        assert found.select(wanted.columns).equals(wanted)


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
