"""Figures of EMoE on small made-up tables: every panel, point and interval is where the table says."""

import re
from pathlib import Path

import emoe_tables
import numpy as np
import polars as pl
import pytest
from emoe_tables import ARMS, GRID, VARIED, differences, mechanism, runs
from test_plotting import check_text, texts

from moe_atlas.errors import AtlasError
from moe_atlas.plotting.emoe import GATES
from moe_atlas.plotting.emoe_figure import draw
from moe_atlas.plotting.registry import EMOE_FIGURES, EMOE_TUNING


@pytest.fixture(scope="module")
def frames() -> dict[str, pl.DataFrame]:
    return emoe_tables.frames()


def name_of(figure: str) -> str:
    return f"{figure}.prose" if EMOE_FIGURES[figure].kinds else figure


@pytest.mark.parametrize("figure", EMOE_FIGURES)
def test_every_figure_has_a_title_with_the_model_and_no_text_that_is_cut_or_overlaps(frames, figure):
    drawn = draw(name_of(figure), "toy", frames)
    check_text(drawn)
    title = drawn.texts[0].get_text()
    assert title.startswith("toy · ") and title.endswith(EMOE_FIGURES[figure].title)
    assert ("prose" in title) == bool(EMOE_FIGURES[figure].kinds)


def test_two_backbones_do_not_mix_in_a_figure(frames):
    both = emoe_tables.two_backbones()
    for name in EMOE_TUNING:
        assert [points_of(axes) for axes in draw(name, "toy", both).axes] == [
            points_of(axes) for axes in draw(name, "toy", frames).axes
        ]
    drawn = draw("arms", "toy-encoder", both)
    check_text(drawn)
    assert [text.get_text().split(" − ")[0] for text in drawn.axes[0].get_yticklabels()] == list(ARMS[:3])
    values = [x for axes in drawn.axes for x, _ in points_of(axes)]
    assert len(values) == 3 * len(drawn.axes) and min(values) > 0.25  # its differences are 0.3 larger
    check_text(draw("selection", "toy-encoder", both))
    for name in ("grid", "layers", "fraction"):  # its study varies none of these
        assert not draw(name, "toy-encoder", both).axes


def test_the_report_has_a_caption_for_every_figure():
    text = (Path(__file__).resolve().parent.parent / "workflow/report/emoe.rst").read_text(encoding="utf-8")
    captions = dict(re.findall(r'^  "(\w+)": "(.+)",$', text, re.MULTILINE))
    assert list(captions) == list(EMOE_FIGURES) and all(len(caption.split()) > 5 for caption in captions.values())


def points_of(axes) -> list[tuple[float, float]]:
    return [
        (round(float(x), 6), round(float(y), 6))
        for line in axes.lines
        if line.get_marker() not in ("None", "", None)
        for x, y in zip(line.get_xdata(), line.get_ydata(), strict=True)
    ]


@pytest.mark.parametrize("figure", ["mass", "loss"])
def test_each_gate_and_split_is_a_point_with_its_interval(frames, figure):
    drawn = draw(f"{figure}.code", "toy", frames)
    assert len(drawn.axes) == (2 if figure == "mass" else 1) * 2 * len(GRID)  # layers, k/N, N
    for number, axes in enumerate(drawn.axes):
        gates = [g for g in range(len(GATES)) if figure == "mass" or number < 2 or GATES[g] != "not-top-k"]
        assert {y for _, y in points_of(axes)} == {round(0.1 * g + 0.01 * s, 6) for g in gates for s in range(3)}
        low, high = axes.get_ylim()
        assert low < -0.02 and high > 0.44
    assert [axes.get_title() for axes in drawn.axes[:2]] == ["N = 8", "N = 16"]


def test_a_model_with_one_masked_layer_has_its_losses(frames):
    alone = frames | {"emoe_mechanism": mechanism(layers=(3,))}
    assert len(draw("loss.prose", "toy", alone).axes) == 4
    assert any("Only one layer" in text for text in texts(draw("layer_loss.prose", "toy", alone)))


def test_lines_by_layer_have_all_layers_and_splits(frames):
    for figure, panels, points in (("agreement", 4, 12), ("correlation", 2, 6), ("layer_loss", 2, 6)):
        drawn = draw(f"{figure}.prose", "toy", frames)
        assert len(drawn.axes) == panels
        assert all(len(points_of(axes)) == points for axes in drawn.axes), figure
        assert [label.get_text() for label in drawn.axes[0].get_xticklabels()] == ["1", "3"]


def test_maps_show_the_values_of_the_table(frames):
    drawn = draw("correlation_map.prose", "toy", frames)
    images = [
        axes.images[0].get_array() for axes in drawn.axes if axes.images and len(axes.images[0].get_array()) == 16
    ]
    assert len(images) == 4
    assert all(image[2, 2] == 0.3 and image[2, 5] == 0.1 for image in images)


def test_experts_of_corpora_are_sorted_by_their_difference(frames):
    drawn = draw("corpora", "toy", frames)
    first = drawn.axes[0]
    shares = first.images[0].get_array()
    assert shares.shape == (2, 8) and (np.diff(shares[1] - shares[0]) >= 0).all()
    np.testing.assert_allclose(shares.sum(1), 8)
    assert [label.get_text() for label in first.get_yticklabels()] == ["prose", "code"]
    even = {int(x) for x, _ in points_of(first)}
    assert even == {3, 4}  # the shares 4/36 and 5/36 are within 0.02 of 1/8; the others are not


def test_arms_are_differences_to_their_baseline_and_validation_is_not_shown(frames):
    drawn = draw("arms", "toy", frames)
    assert len(drawn.axes) == 4
    assert [label.get_text() for label in drawn.axes[0].get_yticklabels()] == [f"{arm} − dense" for arm in ARMS]
    assert points_of(drawn.axes[0]) == [(0.01, 0), (0.02, 1), (0.03, 2), (0.04, 3)]
    assert points_of(drawn.axes[2]) == [(-0.01, 0), (-0.02, 1), (-0.03, 2), (-0.04, 3)]
    said = " ".join(" ".join(texts(drawn)).split())
    assert "validation" not in said and "N = 8, k = 2" in said


@pytest.mark.parametrize(("figure", "points"), [("grid", 3), ("layers", 3)])
def test_what_is_varied_is_along_x(frames, figure, points):
    drawn = draw(figure, "toy", frames)
    assert len(drawn.axes) == 4 and all(len(points_of(axes)) == points for axes in drawn.axes)
    ticks = [label.get_text() for label in drawn.axes[0].get_xticklabels()]
    assert ticks == (["0.25", "0.5"] if figure == "grid" else ["1", "1,3", "3"])


def test_shares_of_the_data_have_a_dot_a_seed_and_a_line_of_means(frames):
    drawn = draw("fraction", "toy", frames)
    axes = drawn.axes[0]
    assert len(points_of(axes)) == 2 * 3 * 3
    level, *means = [line.get_ydata() for line in axes.lines if line.get_marker() in ("None", "", None)]
    assert list(level) == [0.4, 0.4]
    np.testing.assert_allclose(means, [[0.53, 0.61, 0.71], [0.58, 0.66, 0.76]])


def test_choices_during_tuning_are_in_order_of_steps_and_of_the_first_share(frames):
    drawn = draw("selection", "toy", frames)
    maps = [axes for axes in drawn.axes if axes.images and axes.get_title()]
    assert len(maps) == 4  # two arms, two layers
    image = maps[0].images[0].get_array()
    assert image.shape == (8, 3) and (np.diff(image[:, 0]) < 0).all() and (np.diff(image[:, 2]) > 0).all()
    lines = [line.get_ydata() for line in drawn.axes[-1].lines if line.get_marker() not in ("None", "", None)]
    np.testing.assert_allclose(lines, [[0.95, 0.7, 0.45]] * 2)


@pytest.mark.parametrize("figure", ["grid", "layers", "fraction"])
def test_where_lora_alone_is_varied_it_is_drawn(frames, figure):
    """As the settings of the paper have it."""
    names = {"emoe": "lora-emoe", "dense": "lora"}
    lora = {
        name: table.with_columns(
            pl.col(column).replace(names) for column in ("arm", "baseline") if column in table.columns
        )
        for name, table in frames.items()
    }
    of_lora, of_all = (draw(figure, "toy", tables) for tables in (lora, frames))
    assert len(of_lora.axes) == len(of_all.axes) == 4
    assert [points_of(axes) for axes in of_lora.axes] == [points_of(axes) for axes in of_all.axes]
    assert "lora-emoe" in " ".join(texts(of_lora))


@pytest.mark.parametrize("figure", ["grid", "layers", "fraction"])
def test_what_was_not_varied_is_said(frames, figure):
    alone = {"arms": VARIED["arms"]}
    drawn = draw(figure, "toy", frames | {"emoe_differences": differences(alone), "emoe_runs": runs(alone)})
    assert not drawn.axes and len(texts(drawn)[-1].split()) > 5


def test_faults_are_sentences(frames):
    for name, text in (
        ("mas.prose", "no such figure"),
        ("mass", "write mass.CORPUS"),
        ("arms.prose", "without a corpus"),
    ):
        with pytest.raises(AtlasError, match=text):
            draw(name, "toy", frames)
    with pytest.raises(AtlasError, match="emoe_runs"):
        draw("fraction", "toy", {"emoe_mechanism": mechanism()})
    assert "hold nothing of other" in texts(draw("mass.prose", "other", frames))[-1]
