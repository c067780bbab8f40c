"""Figures of intermediate states and active neurons hold what their tables say."""

import numpy as np
import polars as pl
import pytest
import synthetic

from moe_atlas.plotting.model import experiment

TOY = "toy-eight"


@pytest.fixture(scope="module")
def frames():
    return synthetic.behavioral(synthetic.TOYS[TOY], "prompt")


def test_a_map_holds_the_states_of_its_token(frames):
    shown = experiment(
        TOY, "intermediate.prompt", {name: frames[name] for name in ("intermediate", "routing", "tokens")}
    )
    page = shown.pages[2]
    figure = shown.draw(page).figure
    maps = [axes for axes in figure.axes if axes.images]
    rows = frames["intermediate"].filter(layer=page.layer)
    labels = [*map(str, range(8)), "F"]
    assert len(maps) == len(frames["tokens"]) == 7
    for position, axes in enumerate(maps):
        image = axes.images[0].get_array()
        own = rows.filter(position=position)
        assert image.shape == (9, 100) and len(own) == 900
        for row in own.sample(50, seed=0).iter_rows(named=True):
            assert image[labels.index(row["expert"]), row["neuron"] // 3] == row["value"]
    assert "largest of 3 neighbouring neurons" in shown.caption(page, "auto")
    assert "ends it at 1" in shown.caption(page, "full")


def test_full_range_is_the_models_and_auto_the_layers(frames):
    shown = experiment(
        TOY, "intermediate.prompt", {name: frames[name] for name in ("intermediate", "routing", "tokens")}
    )
    values = frames["intermediate"]["value"]
    assert shown.ranges(shown.pages[0], "full")["colour"] == (values.min(), values.max())
    own = frames["intermediate"].filter(layer=shown.pages[0].layer)["value"]
    assert shown.ranges(shown.pages[0], "auto")["colour"] == (own.min(), own.max())


def test_bars_are_the_ratios_at_the_threshold(frames):
    shown = experiment(TOY, "activation_ratio.prompt", {"activation_ratio": frames["activation_ratio"]})
    page = shown.pages[1]
    rows = frames["activation_ratio"].filter(pl.col("layer") == page.layer, pl.col("threshold") == 0.001)
    axes = shown.draw(page).figure.axes[0]
    tops = [path.vertices[:, 1].max() for path in axes.collections[0].get_paths()]
    np.testing.assert_allclose(tops, rows["ratio"].to_numpy())
    for line, threshold in zip(axes.lines, (0.008, 0.064), strict=True):
        above = frames["activation_ratio"].filter(pl.col("layer") == page.layer, pl.col("threshold") == threshold)
        np.testing.assert_allclose(line.get_ydata(), above["ratio"].to_numpy())
