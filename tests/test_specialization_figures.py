"""The figures of specialisation hold what the tables say."""

import numpy as np
import polars as pl
import pytest
import synthetic

from moe_atlas.plotting.comparison import compare
from moe_atlas.plotting.measures import measures
from moe_atlas.plotting.model import experiment
from moe_atlas.plotting.specialization import PANELS


@pytest.fixture(scope="module")
def frame():
    return synthetic.behavioral(synthetic.TOYS["toy-attention"], "prose")["specialization"]


def test_panels_hold_value_chance_interval_and_random_router(frame):
    shown = experiment("toy-attention", "specialization.prose", {"specialization": frame})
    assert [page.stem for page in shown.pages] == ["layer_all", "layer_all_attention"]
    figure = shown.draw(shown.pages[1]).figure
    for (measure, subject), title in PANELS.items():
        rows = frame.filter(site="attention", measure=measure, subject=subject).sort("layer")
        (axes,) = (axes for axes in figure.axes if axes.get_title() == title)
        for line, column in zip(axes.lines, ("chance", "random_router", "value"), strict=True):
            assert line.get_xdata().tolist() == [0, 1, 2, 3]
            assert np.array_equal(line.get_ydata(), rows[column].to_numpy(), equal_nan=True), (measure, column)
        intervals = [path.vertices[:, 1].tolist() for path in axes.collections[0].get_paths()]
        assert intervals == [list(pair) for pair in rows.select("low", "high").rows()] and len(intervals) == 4
    assert len(shown.overview().axes[0].lines) == 6  # both sites in one figure


def test_ranges_hold_everything_that_is_drawn(frame):
    shown = experiment("toy-attention", "specialization.prose", {"specialization": frame})
    for page, which in zip(shown.pages, ("auto", "full"), strict=True):
        drawing = shown.draw(page)
        drawing.apply(shown.ranges(page, which), which)
        rows = frame.filter(site=page.site, measure="repeat_any")
        low, high = next(axes for axes in drawing.figure.axes if axes.get_title() == "an expert in common").get_ylim()
        assert low < rows.select("low", "chance", "random_router").to_numpy().min()
        assert high > rows.select("high", "chance", "random_router").to_numpy().max()


def test_heat_map_has_expert_i_down_and_j_across(frame):
    shown = experiment("toy-attention", "co_activation.prose", {"specialization": frame})
    page = next(page for page in shown.pages if page.stem == "layer_2")
    figure = shown.draw(page).figure
    rows = frame.filter(pl.col("layer") == 2, pl.col("site") == "ffn", pl.col("measure") == "co_activation")
    for title, column in (("router", "value"), ("random router", "random_router")):
        image = next(axes for axes in figure.axes if axes.get_title() == title).images[0].get_array()
        for row in rows.filter(pl.col("subject") != "mean_abs").iter_rows(named=True):
            i, j = map(int, row["subject"].split(","))
            assert image[i, j] == row[column]
        assert np.ma.getmaskarray(np.ma.masked_invalid(image)).sum() == 8  # the diagonal
    low, high = shown.ranges(page, "auto")["colour"]
    assert low == -high < 0  # white is chance


def test_comparison_takes_off_the_level_of_each_measure(frame):
    found = measures("specialization", {"specialization": frame})
    for measure, subject, level in (
        ("repeat_top1", "layer", "chance"),
        ("context_independence", "layer", "random_router"),
    ):
        rows = frame.filter(pl.col("measure") == measure, pl.col("subject") == subject, pl.col("site") == "ffn")
        title = {
            "repeat_top1": "same first choice\nas the token before",
            "context_independence": "context\nindependence",
        }
        part = found.filter(pl.col("row") == title[measure], pl.col("site") == "ffn")
        for column in ("value", "low", "high"):
            assert part[column].to_list() == pytest.approx((rows[column] - rows[level]).to_list())
    assert set(found["chance"]) == {0.0}


def test_divergence_of_texts_is_drawn_by_pair_and_one_text_gets_a_sentence():
    toy = synthetic.TOYS["toy-eight"]
    table = synthetic.domain(toy)
    shown = experiment("toy-eight", "domain", {"domain": table})
    figure = shown.draw(shown.pages[0]).figure
    assert [axes.get_title() for axes in figure.axes] == ["prose and code"]
    rows = table.filter(measure="js_divergence")
    drawn = [line.get_ydata().tolist() for line in figure.axes[0].lines]
    assert drawn == [rows[column].to_list() for column in ("chance", "random_router", "value")]
    alone = experiment("toy-eight", "domain", {"domain": table.filter(pl.col("measure") == "share")})
    drawing = alone.draw(alone.pages[0])
    drawing.apply(alone.ranges(alone.pages[0], "auto"), "auto")
    assert any("no two long corpora" in text.get_text() for text in drawing.figure.texts)
    assert any("no two long corpora" in text.get_text() for text in alone.overview().texts)


def test_a_chance_level_that_is_no_unit_fraction_is_written_as_a_number():
    parts = [synthetic.across(toy)["saturation"] for toy in synthetic.TOYS.values()]
    frame = pl.concat(parts).with_columns(
        pl.when(model="toy-sixteen").then(pl.lit(0.3)).otherwise(pl.col("chance")).alias("chance")
    )
    drawn = [text.get_text() for axes in compare("saturation", {"saturation": frame}).axes for text in axes.texts]
    assert {"0.3", "1/4", "1/8", "1/16"} == set(drawn)
