"""Figures of projections: what they show is what the tables say."""

import numpy as np
import polars as pl
import pytest
import synthetic

from moe_atlas.plotting.measures import measures
from moe_atlas.plotting.model import experiment
from moe_atlas.plotting.style import save


@pytest.fixture(scope="module")
def frames() -> dict[str, pl.DataFrame]:
    return synthetic.projection(synthetic.TOYS["toy-eight"])


def panels(figure) -> dict:
    """First panel of each matrix."""
    found = {}
    for axes in figure.axes:
        if axes.name != "3d" and axes.get_title():
            found[axes.get_title().split("\n")[0]] = axes
    return found


def test_a_point_stands_where_the_table_says_and_outliers_have_a_ring(frames):
    shown = experiment("toy-eight", "projection", frames)
    page = shown.pages[1]
    drawn = panels(shown.draw(page).figure)
    for matrix, axes in drawn.items():
        rows = frames["projection"].filter(layer=page.layer, matrix=matrix, level="matrix")
        for line, condition in zip(
            axes.lines, (pl.col("expert") != "F", pl.col("expert") == "F", pl.col("outlier")), strict=True
        ):
            wanted = rows.filter(condition).select("pc1", "pc2").to_numpy()
            np.testing.assert_array_equal(line.get_xydata(), wanted)
        named = {text.get_text(): tuple(text.xy) for text in axes.texts}
        assert named == {row["expert"]: (row["pc1"], row["pc2"]) for row in rows.iter_rows(named=True)}
        assert "PC1 40.0 % (15.0 %)" in axes.get_title()
    assert set(drawn) == {"up", "act", "down"}
    assert "outliers of up: 7 (of independent experts 90 % are)" in shown.caption(page, "auto")


def test_neurons_are_drawn_in_two_and_three_components(frames):
    shown = experiment("toy-eight", "neuron_projection", frames)
    page = shown.pages[2]
    figure = shown.draw(page).figure
    rows = frames["projection"].filter(layer=page.layer, level="neuron", matrix="act")
    routed = rows.filter(pl.col("expert") != "F")
    flat = panels(figure)["act"].collections
    np.testing.assert_array_equal(flat[0].get_offsets(), routed.select("pc1", "pc2").to_numpy())
    np.testing.assert_array_equal(flat[0].get_array(), routed["expert"].cast(pl.Int64).to_numpy())
    np.testing.assert_array_equal(flat[1].get_offsets(), rows.filter(expert="F").select("pc1", "pc2").to_numpy())
    solid = [axes for axes in figure.axes if axes.name == "3d"]
    assert len(solid) == 3
    np.testing.assert_array_equal(
        np.stack(solid[1].collections[0]._offsets3d, 1), routed.select("pc1", "pc2", "pc3").to_numpy()
    )


def test_one_range_for_all_components_and_matrices(frames):
    shown = experiment("toy-eight", "projection", frames)
    scores = frames["projection"].filter(level="matrix").select("pc1", "pc2").to_numpy()
    low, high = shown.ranges(shown.pages[0], "full")["score"]
    assert low < scores.min() and high > scores.max()
    drawing = shown.draw(shown.pages[0])
    drawing.apply({"score": (low, high)}, "full")
    for axes in panels(drawing.figure).values():
        assert axes.get_xlim() == axes.get_ylim() == (low, high)


def test_many_experts_are_named_where_they_lie_far_out():
    toy = synthetic.Toy("toy-many", 64, 6, (0,))
    shown = experiment("toy-many", "projection", synthetic.projection(toy))
    axes = panels(shown.draw(shown.pages[0]).figure)["up"]
    rows = synthetic.projection(toy)["projection"].filter(level="matrix", matrix="up")
    distance = rows.select((pl.col("pc1") ** 2 + pl.col("pc2") ** 2).alias("r"), "expert").sort("r", descending=True)
    assert {text.get_text() for text in axes.texts} == {*distance["expert"].head(8), "63"}  # 63 is the outlier


def test_two_experts_have_one_component_and_are_drawn(frames):
    scores = {"pc2": pl.lit(None, pl.Float64), "pc3": pl.lit(None, pl.Float64), "outlier": pl.lit(None, pl.Boolean)}
    points = frames["projection"].with_columns(**scores, null_outlier=pl.lit(None, pl.Float64))
    ratios = frames["explained_variance"].filter(pl.col("component") == 1)
    for name in ("projection", "neuron_projection"):
        shown = experiment("toy-eight", name, {"projection": points, "explained_variance": ratios})
        drawing = shown.draw(shown.pages[0])
        drawing.apply(shown.ranges(shown.pages[0], "auto"), "auto")
        drawing.figure.canvas.draw()
        shown.overview()


def test_a_pdf_of_thousands_of_neurons_stays_small(tmp_path):
    toy = synthetic.Toy("toy-many", 64, 6, (0,))
    frames = synthetic.projection(toy)
    many = frames["projection"].filter(level="neuron")
    frames["projection"] = pl.concat([many] * 4)  # 5,120 points a matrix
    shown = experiment("toy-many", "neuron_projection", frames)
    save(shown.draw(shown.pages[0]).figure, tmp_path / "figure.pdf")
    assert (tmp_path / "figure.pdf").stat().st_size < 300_000


def test_comparison_is_the_first_component_above_chance(frames):
    numbers = measures("projection", frames)
    assert set(numbers["row"]) == {"experts", "neurons"} and set(numbers["column"]) == {"up", "act", "down"}
    np.testing.assert_allclose(numbers["value"], 0.25)
    assert set(numbers["null_sd"]) == {0.01}
