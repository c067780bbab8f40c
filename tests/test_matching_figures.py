"""Figures of neuron matching: what they show is what the table says."""

import numpy as np
import polars as pl
import pytest
import synthetic

from moe_atlas.plotting.measures import measures
from moe_atlas.plotting.model import experiment


@pytest.fixture(scope="module")
def table() -> pl.DataFrame:
    return pl.concat([synthetic.matching(toy) for toy in synthetic.TOYS.values()])


def shown(table, model, name):
    return experiment(model, name, {"matching": table.filter(pl.col("model") == model)})


def value(row: dict, column: str) -> float | None:
    return row["cosine_after"] - row["null_after_mean"] if column == "above chance" else row[column]


@pytest.mark.parametrize("model", ["toy-eight", "toy-sixteen"])
@pytest.mark.parametrize(
    "name, panels",
    [
        ("neuron_matching", {", before": "cosine_before", ", after": "cosine_after", ", above chance": "above chance"}),
        ("neuron_order", {"": "tau"}),
    ],
)
def test_each_panel_holds_the_pairs_of_its_matrix(table, model, name, panels):
    drawn = shown(table, model, name)
    page = drawn.pages[1]
    axes = {axes.get_title(): axes for axes in drawn.draw(page).figure.axes}
    labels = page.data["panels"][0][1]
    for row in table.filter(model=model, layer=page.layer).iter_rows(named=True):
        place = labels.index(row["a"]), labels.index(row["b"])
        for suffix, column in panels.items():
            image, wanted = axes[row["matrix"] + suffix].images[0].get_array(), value(row, column)
            if wanted is None:
                assert np.ma.getmaskarray(image)[place] and np.ma.getmaskarray(image)[place[::-1]]
            else:
                assert image[place] == image[place[::-1]] == pytest.approx(wanted)


def test_overview_shows_the_excess_in_its_own_range(table):
    drawn = shown(table, "toy-eight", "neuron_matching")
    rows = table.filter(model="toy-eight")
    excess = (rows["cosine_after"] - rows["null_after_mean"]).to_numpy()
    figure = drawn.overview()
    images = [axes.images[0] for axes in figure.axes if axes.images]
    assert len(images) == 4 * rows["layer"].n_unique()
    assert all(image.get_clim() == pytest.approx((excess.min(), excess.max())) for image in images)
    drawn_values = np.unique(np.concatenate([image.get_array().compressed() for image in images]))
    np.testing.assert_allclose(drawn_values, np.unique(excess))


def test_experts_without_a_gate_have_the_other_panels(table):
    drawn = shown(table.filter(pl.col("matrix") != "act"), "toy-eight", "neuron_matching")
    panels = {title: matrix for title, _, matrix in drawn.pages[0].data["panels"]}
    assert np.isnan(panels["act, after"]).all() and np.isfinite(panels["down, after"]).any()
    drawn.overview()


def test_comparison_is_the_mean_over_routed_pairs_with_the_spread_of_one(table):
    numbers = measures("neuron_matching", {"matching": table})
    rows = table.filter(model="toy-eight", layer=2, matrix="joint").to_dicts()
    routed = [row for row in rows if row["b"].isdigit()]
    assert 0 < len(routed) < len(rows)
    found = numbers.filter(model="toy-eight", layer=2, column="joint").sort("row")
    means = [np.mean([value(row, column) for row in routed]) for column in ("tau", "above chance")]
    assert found["value"].to_list() == pytest.approx(means)
    assert found["null_sd"].to_list() == pytest.approx([routed[0]["null_tau_sd"], routed[0]["null_after_sd"]])
