"""Figures of the MoA experiments on small made-up tables: every point, interval and name is where the table says."""

import itertools
import math
import re
from pathlib import Path

import moa_tables
import numpy as np
import polars as pl
import pytest
from matplotlib.text import Text
from moa_tables import ARMS, DECAY, MAIN, UNIGRAM
from test_plotting import check_text, texts
from workflow_runs import ROOT

from moe_atlas.errors import AtlasError
from moe_atlas.moa.arms import arms
from moe_atlas.plotting.labels import place_labels
from moe_atlas.plotting.moa_arms import DENSE, MHA, MOA, OTHER, About
from moe_atlas.plotting.moa_figure import draw
from moe_atlas.plotting.moa_training import plateau_step
from moe_atlas.plotting.registry import MOA_FIGURES
from moe_atlas.plotting.style import new_figure

ABOUT = About("demo prose", DECAY)
T2 = 4.302652729911275  # Student's t with 2 degrees of freedom, 97.5 %
ALL = [(name, kind) for name, figure in MOA_FIGURES.items() for kind in figure.kinds]


@pytest.fixture(scope="module")
def frames() -> dict[str, pl.DataFrame]:
    return moa_tables.frames()


@pytest.fixture(scope="module")
def drawn(frames):
    """Figures by name and objective, each drawn once."""
    made = {}

    def get(name: str, objective: str = "causal"):
        if (name, objective) not in made:
            made[name, objective] = draw(f"{name}.{objective}", frames, ABOUT)
        return made[name, objective]

    return get


def marks(axes) -> list:
    """Lines that are markers."""
    return [
        line for line in axes.lines if line.get_marker() not in ("None", "", None) and line.get_linestyle() == "None"
    ]


def looks(line) -> tuple:
    return line.get_marker(), line.get_color(), line.get_markerfacecolor()


def look(style: dict) -> tuple:
    return style["marker"], style["color"], style.get("markerfacecolor", style["color"])


def interval(arm: str) -> tuple[float, float, float]:
    """Geometric mean of the perplexities of the three seeds, with Student's interval, by hand."""
    losses = [moa_tables.loss(arm, seed) for seed in range(3)]
    mean = sum(losses) / 3
    error = math.sqrt(sum((x - mean) ** 2 for x in losses) / 2 / 3)
    return math.exp(mean), math.exp(mean - T2 * error), math.exp(mean + T2 * error)


def segments(axes) -> list[np.ndarray]:
    return [segment for collection in axes.collections for segment in collection.get_segments()]


@pytest.mark.parametrize(("figure", "objective"), ALL)
def test_every_figure_names_objective_and_texts_and_nothing_is_cut(drawn, figure, objective):
    made = drawn(figure, objective)
    check_text(made)
    assert made.texts[0].get_text() == f"{objective} · demo prose · {MOA_FIGURES[figure].title}"


def test_the_report_has_a_caption_for_every_figure():
    text = (ROOT / "workflow/report/moa.rst").read_text(encoding="utf-8")
    captions = dict(re.findall(r'^  "(\w+)": "(.+)",$', text, re.MULTILINE))
    assert list(captions) == list(MOA_FIGURES) and all(len(caption.split()) > 5 for caption in captions.values())


def test_the_mean_over_seeds_is_that_of_losses_with_students_interval(frames):
    table = frames["moa_arms"].filter(objective="causal", test="test")
    assert table["arm"].to_list() == list(ARMS)  # once each, though the main one is in two studies
    for arm in table.iter_rows(named=True):
        assert (arm["value"], arm["low"], arm["high"]) == pytest.approx(interval(arm["arm"]), rel=1e-9)
        assert (arm["seeds"], arm["plateaus"], arm["steps"]) == (3, 0 if arm["arm"] == "mha-3" else 3, 1250)
    one = arms(frames["moa_runs"].filter(seed=1)).filter(arm=MAIN, objective="causal").row(0, named=True)
    assert one["value"] == pytest.approx(math.exp(ARMS[MAIN][1])) and one["low"] is None and one["seeds"] == 1


def test_every_arm_is_a_point_by_both_sizes_with_the_same_y(drawn):
    left, right = drawn("perplexity").axes
    assert left.get_ylim() == right.get_ylim()
    assert f"{UNIGRAM:g}" in " ".join(texts(drawn("perplexity")))
    for axes, size in ((left, "parameters"), (right, "macs")):
        points = marks(axes)
        assert len(points) == len(ARMS)
        for line, (arm, (shape, _)) in zip(points, ARMS.items(), strict=True):
            x, y = line.get_xdata()[0], line.get_ydata()[0]
            assert (x, y) == pytest.approx((moa_tables.size(shape)[size], interval(arm)[0]))
            usual = all(shape.get(key) == value for key, value in moa_tables.USUAL.items())
            expected = MHA if "heads" in shape else OTHER if not usual else MOA if shape["selects"] else DENSE
            assert looks(line) == look(expected), arm
        ends = [end for bar in segments(axes) for end in bar[:, 1]]
        assert ends == pytest.approx([end for arm in ARMS for end in interval(arm)[1:]])
    assert len({look(style) for style in (MHA, MOA, DENSE, OTHER)}) == 4
    assert "k = E: selects nothing" in texts(drawn("perplexity"))


def test_names_beside_points_do_not_overlap(drawn):
    figure = drawn("perplexity")
    figure.canvas.draw()
    renderer = figure.canvas.get_renderer()
    for axes in figure.axes:
        names = [text for text in axes.texts if text.get_text()]
        assert sorted(text.get_text() for text in names) == sorted(list(ARMS)[:10])
        boxes = [Text.get_window_extent(text, renderer) for text in names]  # without the line to the point
        for one, other in itertools.combinations(boxes, 2):
            assert not one.overlaps(other)
        points = [axes.transData.transform((line.get_xdata()[0], line.get_ydata()[0])) for line in marks(axes)]
        assert not any(box.contains(*point) for box in boxes for point in points)


def test_a_crowd_of_names_is_spread_and_keeps_to_the_axes():
    figure = new_figure(4, 3)
    axes = figure.add_axes((0.1, 0.1, 0.8, 0.8), xlim=(0, 1), ylim=(0, 1))
    points = [(0.98, 0.5 + 0.004 * i, f"moa-2k16e{i}d", "black") for i in range(8)]
    renderer = figure.canvas.get_renderer()
    names = place_labels(axes, points)
    figure.canvas.draw()
    boxes = [Text.get_window_extent(text, renderer) for text in names]
    frame = axes.get_window_extent()
    assert not any(one.overlaps(other) for one, other in itertools.combinations(boxes, 2))
    assert all(frame.x0 <= box.x0 and box.x1 <= frame.x1 for box in boxes)


def test_differences_are_in_per_cent_with_holms_p(drawn, frames):
    (axes,) = drawn("differences").axes
    table = frames["moa_differences"].filter(objective="causal")
    points = marks(axes)
    assert len(points) == len(table) == 8
    labels = [label.get_text() for label in axes.get_yticklabels()]
    assert labels == [f"{arm} − {baseline}" for arm, baseline in table.select("arm", "baseline").rows()]
    # The main arm's losses are 0.05 below mha-parameters', by seed 0.056, 0.05, 0.044 or the other way round.
    gaps = [moa_tables.loss(MAIN, seed) - moa_tables.loss("mha-parameters", seed) for seed in range(3)]
    error = np.std(gaps, ddof=1) / math.sqrt(3)
    assert points[0].get_xdata()[0] == pytest.approx((math.exp(-0.05) - 1) * 100)
    ends = [(math.exp(-0.05 + sign * T2 * error) - 1) * 100 for sign in (-1, 1)]
    assert segments(axes)[0][:, 0] == pytest.approx(ends)
    filled = [line.get_markerfacecolor() != "white" for line in points]
    assert filled == [p is not None and p < 0.05 for p in table["p_adjusted"]] and len(set(filled)) == 2
    written = [text.get_text() for text in axes.texts]
    assert [f"{p:.2g}" if p is not None else "–" for p in table["p_adjusted"]] == written[:8]
    assert written[-2:] == ["language", "router"]


def test_translation_differences_have_a_panel_for_each_test_and_metric(drawn):
    panels = {axes.get_title(): axes for axes in drawn("differences", "translation").axes}
    assert len(panels) == 6
    mean = moa_tables.ARMS["mha-parameters"][1] - moa_tables.ARMS[MAIN][1]
    assert marks(panels["BLEU, test"])[0].get_xdata()[0] == pytest.approx(10 * mean)
    assert marks(panels["exact match, test"])[0].get_xdata()[0] == pytest.approx(50 * mean)


def test_translation_has_every_arm_and_the_best_answer_that_knows_no_rule(drawn):
    panels = {axes.get_title(): axes for axes in drawn("translation", "translation").axes}
    assert len(panels) == 4
    levels = {"BLEU, test": 60.0, "exact match, test": 0.2, "BLEU, test-longer": 62.0, "exact match, test-longer": 0.05}
    for title, level in levels.items():
        lines = [line.get_xdata()[0] for line in panels[title].lines if line.get_linestyle() == "--"]
        assert lines == [level] and len(marks(panels[title])) == 2
    assert panels["BLEU, test"].get_xlim() == panels["BLEU, test-longer"].get_xlim()
    assert marks(panels["BLEU, test"])[0].get_xdata()[0] == pytest.approx(100 - 10 * (ARMS[MAIN][1] - 2))


def test_the_grid_varies_one_of_three_at_a_time(drawn):
    panels = drawn("grid").axes
    assert [axes.get_title() for axes in panels] == ["E at k = 2, D = 16", "k at E = 16, D = 16", "D at E = 16, k = 2"]
    ticks = [[label.get_text() for label in axes.get_xticklabels()] for axes in panels]
    assert ticks == [["4", "16", "32"], ["1", "2", "4"], ["8", "16"]]
    expected = [
        ["moa-2k4e16d", MAIN, "moa-2k32e16d"],
        ["moa-1k16e16d", MAIN, "moa-4k16e16d"],
        ["moa-2k16e8d", MAIN],
    ]
    for axes, names in zip(panels, expected, strict=True):
        assert [line.get_ydata()[0] for line in marks(axes)] == pytest.approx([interval(name)[0] for name in names])
    assert len({axes.get_ylim() for axes in panels}) == 1


def test_routings_of_one_shape_say_what_is_other(drawn):
    (axes,) = drawn("routing").axes
    names = [label.get_text().split("\n") for label in axes.get_yticklabels()]
    assert names[0] == [MAIN, "as all others"] and names[1] == [f"{MAIN}-no-loss", "balance loss: 0, z-loss: 0"]
    assert names[2] == [f"{MAIN}-none", "weights normalised: none"] and names[4][1].endswith("router: frozen")
    assert [line.get_xdata()[0] for line in marks(axes)] == pytest.approx([interval(name)[0] for name, _ in names])


def test_curves_mark_where_the_rate_begins_to_fall(drawn):
    panels = {axes.get_title(): axes for axes in drawn("curves").axes}
    assert list(panels) == list(ARMS)
    for arm, axes in panels.items():
        points = marks(axes)
        assert [line.get_xdata()[0] for line in points] == [800, 1000, 1200]
        assert {line.get_marker() for line in points} == {"x" if arm == "mha-3" else "v"}
        nats = moa_tables.loss(arm, 0) + 2.2 * math.exp(-4) + 0.1
        assert points[0].get_ydata()[0] == pytest.approx(nats)
        level = math.log(0.8 * moa_tables.UNIGRAM)  # of the validation texts, whose losses are drawn
        assert any(line.get_linestyle() == "--" and line.get_ydata()[0] == pytest.approx(level) for line in axes.lines)
    assert [text.get_text() for text in panels["moa-4k4e16d"].texts] == ["selects nothing"]
    assert len({(axes.get_xlim(), axes.get_ylim()) for axes in panels.values()}) == 1
    assert "39 of 42 runs ended at a plateau" in " ".join(" ".join(texts(drawn("curves"))).split())
    assert (plateau_step(1000, None, [800, 1000]), plateau_step(937, 0.25, [700, 750, 937])) == (1000, 750)


def test_speed_is_relative_to_the_first_multi_head_arm(drawn):
    (axes,) = drawn("throughput").axes
    medians = [line for line in marks(axes) if len(line.get_xdata()) == 1]
    assert len(medians) == len(ARMS) and axes.get_ylabel() == "tokens a second over mha-3"
    base = moa_tables.size(ARMS["mha-3"][0])["macs"]
    for line, (shape, _) in zip(medians, ARMS.values(), strict=True):
        macs = moa_tables.size(shape)["macs"]
        assert (line.get_xdata()[0], line.get_ydata()[0]) == pytest.approx((macs, base / macs))
    runs = [line for line in marks(axes) if len(line.get_xdata()) == 3]
    assert runs[0].get_ydata() == pytest.approx([1, 1, 0.9])
    assert "depends on the machine" in " ".join(" ".join(texts(drawn("throughput"))).split())


def test_what_was_not_varied_or_not_trained_is_said(frames):
    alone = {"a": moa_tables.Study("a", "causal", (MAIN,), ())}
    few = moa_tables.frames(alone)
    for figure, part in (
        ("grid", "the same E, k and D"),
        ("routing", "routed in the same way"),
        ("throughput", "No multi-head"),
    ):
        assert part in texts(draw(f"{figure}.causal", few, ABOUT))[-1]
    assert "no contrasts of causal" in texts(draw("differences.causal", few))[-1]
    for figure in MOA_FIGURES:
        assert "The tables hold no" in texts(draw(f"{figure}.other", frames))[-1]
    for figure in ("perplexity", "curves"):
        check_text(draw(f"{figure}.causal", few, ABOUT))


def test_faults_are_sentences(frames):
    for name, text in (("perplexities.causal", "no such figure"), ("perplexity", "write perplexity.OBJECTIVE")):
        with pytest.raises(AtlasError, match=text):
            draw(name, frames)
    with pytest.raises(AtlasError, match="the tables moa_runs are missing"):
        draw("curves.causal", {"moa_curves": frames["moa_curves"]})


def test_the_program_writes_png_and_pdf(frames, tmp_path):
    import subprocess
    import sys

    frames["moa_arms"].write_parquet(tmp_path / "moa_arms.parquet")
    command = [sys.executable, ROOT / "scripts/plot_moa.py", "--table", tmp_path / "moa_arms.parquet"]
    command += [
        "--figure",
        tmp_path / "grid.causal.png",
        "--pdf",
        tmp_path / "grid.causal.pdf",
        "--texts",
        "demo prose",
    ]
    subprocess.run(list(map(str, command)), check=True, capture_output=True)
    assert all(Path(tmp_path / f"grid.causal.{suffix}").stat().st_size > 1000 for suffix in ("png", "pdf"))
