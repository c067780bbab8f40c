"""Sentences that are computed from the tables of MoA: they say what is there, and no more."""

import moa_tables
import polars as pl
import pytest
from moa_tables import MAIN
from workflow_runs import ROOT

from moe_atlas.moa.settings import load_settings
from moe_atlas.moa.shown import objectives, texts_of, varied
from moe_atlas.plotting import moa_words
from moe_atlas.plotting.base import sentence
from moe_atlas.plotting.moa_figure import draw
from moe_atlas.tables import declared

ROW = {
    **{"study": "s", "objective": "causal", "arm": "a", "baseline": "b", "test": "test", "metric": "perplexity"},
    **{"seeds": 3, "difference": -0.051293, "low": -0.105361, "high": -0.010050, "p_value": 0.02, "p_adjusted": 0.04},
}


@pytest.fixture(scope="module")
def frames():
    return moa_tables.frames()


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, "**a** against b, perplexity: 5 % better, 95 % interval −10 to −1 %, adjusted p = 0.04."),
        (
            {"p_adjusted": 0.2},
            "better, 95 % interval −10 to −1 %; adjusted for all rows of the study p is 0.2, so this may",
        ),
        ({"high": 0.01}, "95 % interval −10 to +1 %: over 3 seeds the two cannot be told apart."),
        ({"low": None, "high": None, "seeds": 1}, "5 % better; over 1 seed nothing is known of the spread."),
        ({"difference": 0.0953102, "low": 0.01, "high": 0.2}, "perplexity: 10 % worse"),
        (
            {"metric": "bleu", "difference": 2.0, "low": 1.0, "high": 3.0},
            "BLEU: 2 points better, 95 % interval +1 to +3 points",
        ),
        ({"metric": "exact", "difference": -0.1, "low": -0.2, "high": -0.05}, "exact match: 10 points of 100 worse"),
    ],
)
def test_a_contrast_says_how_far_and_how_sure(change, expected):
    assert expected in moa_words.contrast(ROW | change)


def test_contrasts_are_sorted_by_question(frames):
    found = {question: rows.select("objective", "arm", "baseline").rows() for question, rows in moa_words.asked(frames)}
    heads, router, others = found.values()
    assert heads[:2] == [("causal", MAIN, "mha-parameters"), ("causal", MAIN, "mha-macs")]
    assert heads[2:] == [("masked", MAIN, "mha-3"), ("translation", MAIN, "mha-parameters")]
    assert [baseline for _, _, baseline in router] == [f"{MAIN}-frozen"] * 2
    assert len(others) == 4 and all(objective == "causal" for objective, _, _ in others)
    empty = {name: pl.DataFrame(schema=declared(name).schema) for name in frames}
    assert all(rows.is_empty() for _, rows in moa_words.asked(empty))


def test_counts_of_the_tables_are_told_beside_chance(frames):
    table = frames["moa_differences"]
    clear = table.filter((pl.col("low") > 0) | (pl.col("high") < 0), pl.col("p_value").is_not_null())
    text = moa_words.counts(table)
    assert f"{len(clear)} have an interval without 0, where chance alone would give about 0.5;" in text
    assert "nothing can be tested" in moa_words.counts(table.clear())
    text = moa_words.plateaus(frames["moa_arms"])
    assert text.startswith("48 of 54 runs") and text.endswith("mha-3 (causal), mha-3 (masked).")
    assert moa_words.nothing_selected(frames["moa_arms"]).startswith("moa-4k4e16d: k = E")
    assert moa_words.nothing_selected(frames["moa_arms"].filter(arm=MAIN)) == ""
    assert moa_words.costs(frames["moa_costs"]).startswith("1 of 2 published counts")


def association(own: float, random: float, beyond: tuple, router: str = "learned") -> pl.DataFrame:
    """Of FFN experts other numbers, which are not told."""
    rows = [
        {"layer": layer, "router": name, "corrected": value if site == "attention" else 0.95, "site": site}
        | {"low": -1.0, "high": 1.0}
        | (dict(zip(("beyond_low", "beyond_high"), beyond, strict=True)) if name == router else {})
        for layer in (0, 1)
        for site in ("attention", "ffn")
        for name, value in ((router, own), ("random", random))
    ]
    same = {"model": "m", "corpus": "prose", "kind": "causal", "measure": "information"}
    schema = declared("moa_association").schema
    return pl.DataFrame([dict.fromkeys(schema) | row | same for row in rows], schema=schema)


def test_what_a_random_router_has_too_is_not_learned():
    table = association(0.55, 0.25, (0.2, 0.4))
    text = moa_words.association(table)
    assert "Token types tell 0.55" in text and "random router on the same hidden states 0.25" in text
    assert "in 2 of 2 layers and texts, below in 0" in text
    assert "in 0 of 2 layers and texts, below in 0" in moa_words.association(association(0.3, 0.25, (-0.1, 0.2)))
    below = moa_words.association(association(0.12, 0.25, (-0.2, -0.05), "frozen"))
    assert "The frozen router" in below and "in 0 of 2 layers and texts, below in 2" in below
    assert moa_words.association(table.clear()) == ""
    dense = table.with_columns(pl.lit(None, pl.Float64).alias("corrected"))
    assert "nothing of the chosen experts" in moa_words.association(dense)


def test_loads_are_told_by_kind_and_of_choices_only():
    kinds = (("encoder", 0.5, 0), ("cross", 2.0, 3))
    rows = []
    for kind, worst, dead in kinds:
        same = {
            "model": "m",
            "corpus": "prose",
            "site": "attention",
            "kind": kind,
            "layer": 0,
            "experts": 8,
            "top_k": 2,
        }
        rows.append(same | {"measure": "max_vio", "value": worst, "chance": 0.1, "chance_high": 1.0})
        rows.append(same | {"measure": "dead", "value": float(dead), "chance": 0.0, "chance_high": 0.0})
    schema = declared("moa_routing").schema
    table = pl.DataFrame([dict.fromkeys(schema) | row for row in rows], schema=schema)
    text = moa_words.load(table)
    assert "encoder: MaxVio 0.50 (even and independent choices: 0.10; above what holds 95 % of them in 0 of 1" in text
    assert "cross: MaxVio 2.00" in text and "3 experts that no token chose" in text
    assert (
        "k = E" in moa_words.load(table.with_columns(top_k=pl.col("experts"))) and moa_words.load(table.clear()) == ""
    )


def test_the_shipped_settings_ask_for_figures_of_what_they_vary():
    settings = load_settings(ROOT / "config/moa.yaml")
    assert objectives(settings) == ["causal", "masked", "translation"]
    assert varied(settings, "causal") == {"differences", "grid", "routing"}
    assert varied(settings, "masked") == {"differences"}
    assert texts_of(settings.tasks["causal"]) == "demo prose and code"
    wmt = load_settings(ROOT / "config/moa_wmt.yaml")
    assert objectives(wmt) == ["en-de", "en-fr"] and texts_of(wmt.tasks["en-de"]) == "wmt14-en-de"
    assert {"differences", "routing"} <= varied(wmt, "en-de") and varied(wmt, "en-fr") == {"differences"}


def test_what_is_asked_for_is_more_than_a_sentence(frames):
    """The settings and the figures agree on what is varied."""
    nothing = len(sentence("title", "text").axes)
    for name in varied(load_settings(ROOT / "config/moa.yaml"), "causal"):
        assert len(draw(f"{name}.causal", frames).axes) > nothing


def test_sites_are_counted_by_intervals_without_zero():
    schema = declared("moa_sites").schema
    rows = [("entropy", 0.1, 0.2), ("entropy", -0.2, 0.1), ("max_vio", -0.3, -0.1), ("domain", None, None)]
    same = dict.fromkeys(schema) | {"model": "m", "corpus": "prose", "layer": 0}
    named = [same | dict(zip(("measure", "low", "high"), row, strict=True)) for row in rows]
    table = pl.DataFrame(named, schema=schema)
    text = moa_words.sites(table)
    assert "entropy: above in 1, below in 0 of 2; max_vio: above in 0, below in 1 of 1; domain: above in 0" in text
    assert "chance alone would give one in twenty" in text and moa_words.sites(table.clear()) == ""
