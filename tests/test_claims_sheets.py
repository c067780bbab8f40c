"""The sheets of claims and of published numbers, and the two programs that read them."""

import json
import subprocess
import sys

import numpy as np
import polars as pl
import pytest
import torch
from test_claims import CLAIMS, SIZES, frames, level_squares, similarity
from workflow_runs import ROOT

from moe_atlas import tables
from moe_atlas.claims import published
from moe_atlas.claims.estimators import ESTIMATORS
from moe_atlas.claims.judge import judge
from moe_atlas.claims.published import ITEMS, bfloat16, compare, load_published
from moe_atlas.claims.sheet import load_claims
from moe_atlas.errors import AtlasError


def test_every_estimator_is_used_and_every_claim_says_what_the_paper_says():
    assert {claim.estimator for claim in CLAIMS.values()} == set(ESTIMATORS)
    numbers = {name[:3] for name in CLAIMS}
    assert numbers == {f"o{n:02}" for n in range(1, 14)} | {"h1-", "h2-", "h3a", "h3b"}
    assert all(
        {claim.paper_mixtral, claim.paper_deepseek, claim.paper_grok} != {"not stated"} for claim in CLAIMS.values()
    )


@pytest.mark.parametrize(
    ("column", "value", "sentence"),
    [
        ("estimator", "weight_tren", r"line 2 \(o03.*no estimator weight_tren \(did you mean weight_trend\?\)"),
        ("null", "zero", r"column null: that of weight_trend is not 'zero'; write permuted layers"),
        ("interval", "documents", r"column interval: that of weight_trend is not 'documents'; write experts"),
        ("level", "often", r"column level: 'often' is not a number; write a number above 0"),
        ("level", "nan", r"column level: 'nan' is not a number"),
        ("level", "0", r"column level: 0.0 is not above 0"),
        ("margin", "-0.1", r"column margin: -0.1 is below 0"),
        ("layers", "0", r"column layers: 0 is below 1"),
        ("direction", "more", r"column direction: 'more' is not one of greater, less"),
        ("parameters", "leave_out=1", r"has no parameter leave_out \(did you mean leave_out_last\?\)"),
        ("parameters", "leave_out_last=one", r"'leave_out_last=one' gives leave_out_last no number"),
        ("paper_grok", "maybe", r"column paper_grok: 'maybe' is not one of holds"),
    ],
)  # fmt: skip
def test_a_faulty_sheet_is_refused_with_a_sentence(tmp_path, column, value, sentence):
    header, *lines = (ROOT / "config/claims.tsv").read_text(encoding="utf-8").splitlines()
    cells = dict(zip(header.split("\t"), next(x for x in lines if x.startswith("o03")).split("\t"), strict=True))
    path = tmp_path / "claims.tsv"
    path.write_text(header + "\n" + "\t".join((cells | {column: value}).values()) + "\n", encoding="utf-8")
    with pytest.raises(AtlasError, match=sentence) as caught:
        load_claims(path)
    assert str(caught.value).endswith(".") and "\n" not in str(caught.value)


def test_a_missing_parameter_and_an_unknown_column_are_refused(tmp_path):
    text = (ROOT / "config/claims.tsv").read_text(encoding="utf-8")
    path = tmp_path / "claims.tsv"
    path.write_text(text.replace("before=3", ""), encoding="utf-8")
    with pytest.raises(AtlasError, match="last_layer_output needs before; write before=NUMBER"):
        load_claims(path)
    path.write_text(text.replace("\tmargin\t", "\tmargins\t", 1), encoding="utf-8")
    with pytest.raises(AtlasError, match=r"column 'margins': there is no such column \(did you mean margin\?\)"):
        load_claims(path)


def test_the_program_judges_each_model_as_the_library_does(tmp_path):
    table = similarity(level_squares([0.9, 0.7, 0.5, 0.3]))
    both = pl.concat([table, table.with_columns(model=pl.lit("other"), cosine=pl.col("cosine") / 2)])
    tables.write("similarity", both, tmp_path / "similarity.parquet")
    for model in ("m", "other"):
        (tmp_path / f"{model}.json").write_text(f'{{"model": "{model}", "N": 6, "d": 32, "m": 16}}')
    command = [
        *("judge_claims.py", "--claims", ROOT / "config/claims.tsv", "--table", tmp_path / "similarity.parquet"),
        *("--checkpoints", tmp_path / "m.json", tmp_path / "other.json", "--corpora", "c", "--seed", "3"),
        *("--parquet", tmp_path / "claims.parquet", "--csv", tmp_path / "claims.csv"),
    ]
    subprocess.run([sys.executable, *map(str, command)], cwd=ROOT / "scripts", check=True, capture_output=True)
    found = tables.read("claims", tmp_path / "claims.parquet")
    assert found.filter(model="m").equals(judge("m", frames(similarity=table), SIZES, CLAIMS, ["c"], 3))
    assert set(found["model"]) == {"m", "other"}
    assert len((tmp_path / "claims.csv").read_text().splitlines()) == len(found) + 1


# Published numbers ----------------------------------------------------------------------------
PUBLISHED = load_published(ROOT / "config/published.tsv")
MIXTRAL = "mistralai/Mixtral-8x7B-v0.1"


def table(name, rows):
    """A table from dicts; columns not given are null."""
    schema = tables.declared(name).schema
    return pl.DataFrame([{column: row.get(column) for column in schema} for row in rows], schema=schema)


def published_rows(item, **cells):
    return [row for row in PUBLISHED if row.item == item and all(getattr(row, k) == v for k, v in cells.items())]


def compared(rows, frames, rounded=False):
    return compare(rows, {MIXTRAL: ["mine"]}, lambda model, corpus, names: frames, rounded)


def test_the_published_sheet_has_what_the_paper_prints():
    counts = {item: len(published_rows(item)) for item in ITEMS}
    assert counts["router_mean_r2"] == 12 and counts["router_act_r"] == 32 + 56 + 27 + 64 and counts["rank_count"] == 64
    # Table 3 is the mean of table 5's squares, to the rounding of both.
    for model in {row.model for row in published_rows("router_act_r")}:
        (wanted,) = published_rows("router_mean_r2", model=model, subject="act")
        squares = [float(row.value) ** 2 for row in published_rows("router_act_r", model=model)]
        assert np.mean(squares) == pytest.approx(float(wanted.value), abs=0.006)
    # The counts read from the picture: each rank has as many tokens as there are tokens and layers.
    for axis in (0, 1):
        for rank in range(1, 9):
            rows = [row for row in published_rows("rank_count") if int(row.subject.split()[1 + 2 * axis]) == rank]
            assert sum(int(row.value) for row in rows) == pytest.approx(1183 * 32, rel=0.01)
    assert len({row.model for row in PUBLISHED}) == 4


def test_bfloat16_is_that_of_torch():
    values = np.concatenate([np.random.default_rng(0).normal(size=2000), [0.0, 1.0, -1.0, 0.29945, 1.00390625, 3e-39]])
    assert np.array_equal(bfloat16(values), torch.tensor(values.astype(np.float32)).bfloat16().double().numpy())


def test_a_row_is_found_by_its_repository_and_a_number_without_one_stays():
    act, router = (level_squares([0.2] * 32, experts=8, noise=0.2, seed=s) for s in (1, 2))
    similar = pl.concat([similarity({"act": act}, "neuron_mean"), similarity({"router": router})])
    frame = compared(published_rows("router_act_r", layer=3), {"similarity": similar})
    row = frame.filter(pl.col("row") == "mine").row(0, named=True)
    first, second = np.triu_indices(8, 1)
    r = np.corrcoef(act[3][first, second], router[3][first, second])[0, 1]
    assert float(row["ours"]) == pytest.approx(r, abs=1e-5) and row["difference"] == pytest.approx(r - 0.54)
    assert row["agrees"] == (abs(r - 0.54) <= row["tolerance"])
    others = frame.filter(pl.col("row").is_null())
    assert len(others) == 3 and others["ours"].null_count() == others["agrees"].null_count() == 3


def test_the_rounding_of_the_paper_changes_r_as_its_code_did():
    act, router = (level_squares([0.3], experts=8, noise=0.02, seed=s) for s in (1, 2))
    similar = pl.concat([similarity({"act": act}, "neuron_mean"), similarity({"router": router})])
    first, second = np.triu_indices(8, 1)
    x, y = (torch.tensor(s[0][first, second]).bfloat16().double().numpy() for s in (act, router))
    exact = published._router_r(similar, "act", False)[0]
    rounded = published._router_r(similar, "act", True)[0]
    assert rounded == pytest.approx(np.corrcoef(x, y)[0, 1]) and abs(rounded - exact) > 1e-4
    row = published_rows("router_mean_r2", model=MIXTRAL, subject="act")
    assert float(compared(row, {"similarity": similar}, True)["ours"].item()) == round(rounded**2, 2)


def routing(choices, layer):
    return table(
        "routing",
        [
            {"model": "mine", "corpus": "prompt", "layer": layer, "site": "ffn", "sequence": 0, "position": t}
            | {"rank": rank, "expert": str(expert), "weight": 0.5}
            for t, experts in enumerate(choices)
            for rank, expert in enumerate(experts)
        ],
    )


def test_chosen_experts_are_compared_token_by_token():
    (row,) = published_rows("chosen_experts", model=MIXTRAL)
    given = [(5, 3), (0, 7), (1, 4), (6, 4), (4, 6), (4, 3), (1, 4)]
    found = compared([row], {"routing": routing(given, 7)})
    assert found["agrees"].item() is True and found["ours"].item() == row.value
    given[4] = (6, 4)
    found = compared([row], {"routing": routing(given, 7)})
    assert found["agrees"].item() is False and "(6,4) (6,4)" in found["ours"].item()
    (some,) = published_rows("chosen_experts_of_some", model=MIXTRAL, layer=6)  # (1,6) (2,3) (2,0)
    for choices, agrees in (([(0, 5), (6, 1), (2, 3), (7, 1), (0, 2)], True), ([(2, 3), (6, 1), (0, 2)], False)):
        assert compared([some], {"routing": routing(choices, 6)})["agrees"].item() is agrees


def test_counts_and_means_of_the_other_items():
    (row,) = published_rows("rank_count", subject="score 8 norm 8")
    counts = [{"layer": layer, "score_rank": 7, "norm_rank": 7, "count": 800.0 + layer} for layer in range(32)]
    counts += [{"layer": 0, "score_rank": 6, "norm_rank": 7, "count": 9.0}]
    assert float(compared([row], {"rank_counts": table("rank_counts", counts)})["ours"].item()) == 32 * 800 + 496
    (row,) = published_rows("active_share", model=MIXTRAL)
    ratios = [
        {"expert": e, "threshold": t, "ratio": r}
        for e, t, r in (("0", 0.001, 0.99), ("1", 0.001, 1.0), ("0", 0.0, 0.1))
    ]
    found = compared([row], {"activation_ratio": table("activation_ratio", ratios)})
    assert float(found["ours"].item()) == 0.995 and found["agrees"].item() is True
    (row,) = published_rows("weight_similarity", model=MIXTRAL, subject="F")
    rows = [
        {"matrix": m, "level": "matrix", "a": "0", "b": b, "cosine": c}
        for m, b, c in (("up", "F", 0.5), ("act", "F", 0.7), ("up", "1", 9.0))
    ]
    assert float(compared([row], {"similarity": table("similarity", rows)})["ours"].item()) == pytest.approx(0.6)
    (row,) = published_rows("matching_tau", model=MIXTRAL)
    every = table("similarity", [{"layer": layer} for layer in range(32)])
    taus = [
        {"layer": layer, "matrix": "up", "a": "0", "b": "1", "tau": t} for layer, t in ((5, 0.7), (31, 0.9), (6, 0.0))
    ]
    found = compared([row], {"similarity": every, "matching": table("matching", taus)})
    assert float(found["ours"].item()) == pytest.approx(0.8)
    (row,) = published_rows("output_cosine", layer=6, subject="routed (1,6)")
    pairs = [{"layer": 6, "site": "ffn", "sequence": 0, "position": t, "a": "0", "b": b, "cosine": c}
             for t, b, c in ((0, "1", 0.6), (0, "2", 0.8), (0, "F", 0.1), (1, "1", 0.0))]  # fmt: skip
    own = {
        "routing": routing([(1, 6), (6, 1)], 6),
        "output_similarity_tokens": table("output_similarity_tokens", pairs),
    }
    assert float(compared([row], own)["ours"].item()) == pytest.approx(0.7)


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("tokns\ta/b\t\t7\tx", r"line 2 \(tokns\), column item: there is no item tokns \(did you mean tokens\?\)"),
        ("tokens\tmixtral\t\t7\tx", r"column model: 'mixtral' is not allowed here; write OWNER/NAME"),
        ("tokens\ta/b\t\tmany\tx", r"column value: 'many' is not what tokens has; write a number"),
        ("chosen_experts\ta/b\t3\t7\tx", r"column value: '7' is not what chosen_experts has; write lists"),
        ("tokens\ta/b\t-2\t7\tx", r"column layer: -2 is below -1"),
    ],
)
def test_a_faulty_sheet_of_published_numbers_is_refused_with_a_sentence(tmp_path, line, sentence):
    path = tmp_path / "published.tsv"
    path.write_text(f"item\tmodel\tlayer\tvalue\tplace\n{line}\n", encoding="utf-8")
    with pytest.raises(AtlasError, match=sentence):
        load_published(path)
    path.write_text("item\tmodel\tlayer\tvalue\tplace\n" + "tokens\ta/b\t\t7\tx\n" * 2, encoding="utf-8")
    with pytest.raises(AtlasError, match="line 3 .*already that of line 2"):
        load_published(path)


def test_the_program_finds_rows_by_the_source_of_the_checkpoint(tmp_path):
    rows = [{"model": m, "corpus": "prompt", "sequence": 0, "position": t} for m in ("mine", "copy") for t in range(7)]
    tables.write("tokens", table("tokens", rows), tmp_path / "tokens.parquet")
    for model, source in (("mine", f"hf:{MIXTRAL}"), ("copy", "path:somewhere")):
        (tmp_path / f"{model}.json").write_text(json.dumps({"model": model, "source": source}))
    command = [
        *("compare_published.py", "--published", ROOT / "config/published.tsv", "--table", tmp_path / "tokens.parquet"),
        *("--checkpoints", tmp_path / "mine.json", tmp_path / "copy.json", "--paper-rounding"),
        *("--parquet", tmp_path / "published.parquet", "--csv", tmp_path / "published.csv"),
    ]
    subprocess.run([sys.executable, *map(str, command)], cwd=ROOT / "scripts", check=True, capture_output=True)
    found = tables.read("published", tmp_path / "published.parquet")
    assert len(found) == len(PUBLISHED) and set(found["row"].drop_nulls()) == {"mine"}
    ours = found.filter(pl.col("ours").is_not_null())
    assert ours.select("item", "corpus", "ours", "agrees").rows() == [("tokens", "prompt", "7", True)]
