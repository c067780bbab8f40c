"""Revisions of a model against the last one, and texts against each other: by hand, planted, at chance, refused."""

import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from choice_records import arrays_of, choose, noise
from test_behavioral import SITES

from moe_atlas import tables
from moe_atlas.behavioral.domain import domain, permutation_test
from moe_atlas.behavioral.measures import js_divergence
from moe_atlas.behavioral.saturation import Choices, exchange_test, saturation, units_of
from moe_atlas.errors import AtlasError
from moe_atlas.text_index import TextIndex

SCRIPTS = Path(__file__).resolve().parent.parent / "scripts"


def choices(model, ids, lengths, experts=4, series="s", layer=1, corpus="c"):
    """The three tables of a model whose tokens chose `ids` (T, k); -1 is an empty slot."""
    ids = np.asarray(ids)
    places = [(sequence, position) for sequence, length in enumerate(lengths) for position in range(length)]
    keys = {"model": model, "corpus": corpus}
    routing = [
        {
            **keys,
            "layer": layer,
            "site": "ffn",
            "sequence": s,
            "position": p,
            "rank": r,
            "expert": str(e),
            "weight": 0.5,
        }
        for (s, p), own in zip(places, ids, strict=True)
        for r, e in enumerate(own)
        if e >= 0
    ]
    load = [
        {**keys, "layer": layer, "site": "ffn", "expert": str(e), "rank": r, "tokens": 1, "weight_sum": 1.0}
        for e in range(experts)
        for r in range(ids.shape[1])
    ]
    tokens = [{**keys, "sequence": s, "position": p, "token_id": 7 + p, "token": "x"} for s, p in places]
    frames = {"routing": routing, "load": load, "tokens": tokens}
    frames = {name: pl.DataFrame(rows, schema=tables.TABLES[name].schema) for name, rows in frames.items()}
    return Choices(series, model, corpus, **frames)


def test_a_tiny_series_by_hand():
    end = [[0, 1], [0, 1], [2, 3], [1, 0], [3, 0]]
    early = [[3, 2], [1, 0], [2, 1], [2, 3], [3, -1]]  # position 0 is not counted
    frame = saturation([choices("early", early, [5]), choices("end", end, [5])])
    row = frame.row(0, named=True)
    assert len(frame) == 1
    assert (row["series"], row["model"], row["end"], row["corpus"], row["layer"]) == ("s", "early", "end", "c", 1)
    assert row["overlap"] == pytest.approx((2 + 1 + 0 + 1) / 2 / 4) and row["chance"] == pytest.approx(7 / 4 / 4)
    assert row["top1"] == pytest.approx(2 / 4) and row["top1_chance"] == 1 / 4
    loads = [1, 2, 2, 2], [3, 2, 1, 2]
    wanted = sum(
        0.5 * p / n * math.log2((p / n) / ((p / n + q / m) / 2))
        for a, b in (loads, loads[::-1])
        for n, m in ((sum(a), sum(b)),)
        for p, q in zip(a, b, strict=True)
    )
    assert row["js_divergence"] == pytest.approx(wanted)
    assert (row["unit"], row["units"], row["tokens"]) == ("run", 1, 4)
    assert {row[f"{name}{end}"] for name in ("", "top1_", "js_") for end in ("low", "high")} == {None}
    assert row["js_chance"] is row["js_p_value"] is None


def test_models_are_compared_with_the_last_of_their_series_in_the_order_given():
    ids = choose(noise(TextIndex.of([[0] * 9] * 6), 4)).tolist()
    models = [choices(name, ids, [9] * 6, series=s) for s, name in zip("abaab", "mnopq", strict=True)]
    frame = saturation(models)
    assert frame.select("series", "model", "end").rows() == [("a", "m", "p"), ("a", "o", "p"), ("b", "n", "q")]
    assert set(frame["overlap"]) == set(frame["low"]) == set(frame["high"]) == set(frame["top1"]) == {1.0}
    assert set(frame["js_divergence"]) == {0.0} and set(frame["js_p_value"]) == {1.0}
    assert saturation(models[:2]).is_empty() and saturation([]).is_empty()


@pytest.mark.parametrize(("experts", "top_k", "lengths"), [(8, 2, [60] * 20), (16, 4, [400])])
def test_independent_choices_are_at_chance(experts, top_k, lengths):
    index = TextIndex.of([[0] * length for length in lengths])
    first, second = (choose(noise(index, experts, seed=seed), top_k).tolist() for seed in (3, 4))
    frame = saturation([choices("a", first, lengths, experts), choices("b", second, lengths, experts)])
    row = frame.row(0, named=True)
    assert row["chance"] == top_k / experts and row["low"] < row["chance"] < row["high"]
    assert row["top1_low"] < 1 / experts < row["top1_high"]
    assert row["js_divergence"] < 3 * row["js_chance"]
    assert row["unit"] == ("sequence" if len(lengths) > 1 else "run")
    assert row["units"] == (20 if len(lengths) > 1 else 50)


def test_another_load_is_seen_and_the_test_keeps_its_level():
    index, lengths = TextIndex.of([[0] * 40] * 10), [40] * 10
    even = choose(noise(index, 8, seed=5)).tolist()
    uneven = choose(noise(index, 8, seed=6) + torch.linspace(0, 0.6, 8)).tolist()
    row = saturation([choices("a", even, lengths, 8), choices("b", uneven, lengths, 8)]).row(0, named=True)
    assert row["js_p_value"] <= 0.005 and row["js_low"] > row["js_chance"]
    generator, found, exchanged = np.random.default_rng(0), [], []
    for _ in range(200):  # blocks with loads of their own, as documents have, from one source
        blocks = generator.multinomial(60, generator.dirichlet(np.full(6, 2.0), size=24)[:, None], size=(24, 1))[:, 0]
        found.append(permutation_test(blocks[:12], blocks[12:], generator)[1])
        exchanged.append(exchange_test(blocks[:12], blocks[12:], generator)[1])
    for p_values in (found, exchanged):
        assert 0.01 <= np.mean(np.array(p_values) <= 0.05) <= 0.10


def test_units_are_sequences_where_there_are_enough_and_runs_else():
    def tokens(lengths):
        return choices("m", [[0]] * sum(lengths), lengths).tokens

    units, name = units_of(tokens([3, 2, 1, 2, 2, 2]))
    assert name == "sequence" and units.tolist() == [-1, 0, 0, -1, 1, -1, -1, 2, -1, 3, -1, 4]
    units, name = units_of(tokens([10, 3]))
    assert name == "run" and units.tolist() == [-1] + [0] * 8 + [1, -1, 2, 2]
    assert units_of(tokens([1, 1]))[0].tolist() == [-1, -1]
    assert saturation([choices(m, [[0], [1]], [1, 1]) for m in "ab"])["overlap"].to_list() == [None]


def test_what_cannot_be_compared_is_refused_with_a_sentence():
    ids = [[0, 1]] * 6
    one, other = choices("one", ids, [6]), choices("other", ids, [3, 3])
    with pytest.raises(AtlasError, match=r"series s: one reads the corpus c as other tokens than other, .* of one in"):
        saturation([one, other])
    changed = Choices("s", "other", "c", one.routing, one.load, one.tokens.with_columns(token_id=pl.lit(3)))
    with pytest.raises(AtlasError, match="other tokens"):
        saturation([one, changed])
    for different in (choices("other", ids, [6], experts=5), choices("other", ids, [6], layer=2)):
        with pytest.raises(AtlasError, match="one has other layers or another number of experts than other"):
            saturation([one, different])


def test_the_program_writes_both_files_and_nothing_on_a_fault(tmp_path):
    def program(*recorded):
        command = [sys.executable, SCRIPTS / "saturation.py"]
        for run in recorded:
            names = ("routing", "load", "tokens")
            paths = [tmp_path / f"{run.model}-{name}.parquet" for name in names]
            for name, path in zip(names, paths, strict=True):
                tables.write(name, getattr(run, name), path)
            command += ["--choices", run.series, run.model, run.corpus, *paths]
        command += ["--parquet", tmp_path / "saturation.parquet", "--csv", tmp_path / "saturation.csv"]
        return subprocess.run(list(map(str, command)), capture_output=True, text=True)

    refused = program(choices("a", [[0, 1]] * 6, [6]), choices("b", [[0, 1]] * 6, [3, 3]))
    assert refused.returncode == 1 and "error: series s: a reads" in refused.stderr
    assert not (tmp_path / "saturation.parquet").exists()
    assert program().returncode == 0
    assert tables.read("saturation", tmp_path / "saturation.parquet").is_empty()
    assert program(*(choices(name, [[0, 1]] * 6, [6]) for name in "ab")).returncode == 0
    frame = tables.read("saturation", tmp_path / "saturation.parquet")
    assert frame["overlap"].to_list() == [1.0]
    assert pl.read_csv(tmp_path / "saturation.csv", schema=frame.schema).equals(frame)


# Texts against each other ----------------------------------------------------------------------

SITE = SITES[0] | {"experts": 8}


class Recorded:
    """Recorded counts of one corpus, as behavioral.activations.Activations hands them out."""

    def __init__(self, corpus, ids, index, random_ids=None, site=SITE):
        labels = [str(expert) for expert in range(site["experts"])]
        self.path = f"{corpus}.safetensors"
        self.metadata = {"model": "m", "corpus": corpus, "layers": [site | {"labels": labels}]}
        self.found = arrays_of(ids, index, site["experts"], random_ids)

    def arrays(self, entry):
        return self.found


def rows_of(frame, measure):
    return frame.filter(measure=measure).rows(named=True)


def test_texts_with_other_experts_diverge_and_equal_ones_do_not():
    index = TextIndex.of([[0] * 80] * 12)
    plain, again = (choose(noise(index, 8, seed=seed)) for seed in (7, 8))
    tilted = choose(noise(index, 8, seed=9) + torch.linspace(0, 0.5, 8))
    recorded = [Recorded("a", plain, index), Recorded("b", again, index), Recorded("c", tilted, index, plain)]
    (frame,) = domain(recorded)
    found = {(row["corpus"], row["other"]): row for row in rows_of(frame, "js_divergence")}
    assert list(found) == [("a", "b"), ("a", "c"), ("b", "c")]
    same, other = found["a", "b"], found["a", "c"]
    assert same["p_value"] > 0.01 and same["low"] < same["chance"] < same["high"]
    assert other["p_value"] == 0.001 and other["low"] > 2 * other["chance"]
    loads = [np.bincount(ids[index.position > 0].flatten(), minlength=8) for ids in (plain, tilted)]
    assert other["value"] == pytest.approx(float(js_divergence(*loads)))
    assert other["random_router"] == 0 and other["expert"] is None
    shares = rows_of(frame, "share")
    assert [(row["corpus"], row["expert"]) for row in shares] == [(c, str(e)) for c in "abc" for e in range(8)]
    for row, count in zip(shares[16:], loads[1], strict=True):
        assert row["value"] == pytest.approx(count / (12 * 79)) and row["chance"] == 2 / 8
        assert row["low"] < row["value"] < row["high"] and row["other"] is None
    assert dict(frame.schema) == tables.TABLES["domain"].schema


def test_few_documents_have_no_interval_and_no_test():
    short, long = TextIndex.of([[0] * 30] * 3), TextIndex.of([[0] * 30] * 9)
    (frame,) = domain([Recorded("a", choose(noise(short, 8)), short), Recorded("b", choose(noise(long, 8)), long)])
    (row,) = rows_of(frame, "js_divergence")
    assert row["value"] > 0 and row["low"] is row["chance"] is row["p_value"] is None
    assert [row["low"] is None for row in rows_of(frame, "share")] == [True] * 8 + [False] * 8


def test_runs_of_other_layers_are_refused_and_no_text_gives_no_rows():
    index = TextIndex.of([[0] * 30] * 3)
    ids = choose(noise(index, 8))
    with pytest.raises(AtlasError, match=r"b.safetensors: its layers are not those of a.safetensors"):
        list(domain([Recorded("a", ids, index), Recorded("b", ids, index, site=SITE | {"layer": 5})]))
    assert list(domain([])) == []
