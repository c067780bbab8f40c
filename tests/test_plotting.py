"""Figures: every file is made, holds what the tables say, and has the same bytes every time."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import synthetic
from conftest import ROOT
from hypothesis import given
from hypothesis import strategies as st

from moe_atlas import tables
from moe_atlas.errors import AtlasError
from moe_atlas.plotting import arrays, style
from moe_atlas.plotting.comparison import compare
from moe_atlas.plotting.measures import measures
from moe_atlas.plotting.model import experiment, plot_all, plot_one
from moe_atlas.plotting.registry import COMPARISONS, EXPERIMENTS, experiments_of, split

NAMES = experiments_of({"prompt": "short", "prose": "long"})


@pytest.fixture(scope="module")
def toys():
    """Tables of every toy model: {model: {None or corpus: {table: frame}}}."""
    made = {}
    for model, toy in synthetic.TOYS.items():
        made[model] = {None: synthetic.parametric(toy)}
        made[model].update({corpus: synthetic.behavioral(toy, corpus) for corpus in ("prompt", "prose")})
    return made


def frames_of(toys, model, name):
    base, corpus = split(name)
    return {table: toys[model][corpus][table] for table in EXPERIMENTS[base].tables}


def drawn(toys, model, name):
    return experiment(model, name, frames_of(toys, model, name))


def ink(figure) -> np.ndarray:
    """The figure as RGB pixels."""
    figure.canvas.draw()
    return np.asarray(figure.canvas.buffer_rgba())[..., :3].astype(int)


def texts(figure) -> list[str]:
    """Every text a reader sees."""
    from matplotlib.text import Text

    return [text.get_text() for text in figure.findobj(Text) if text.get_visible() and text.get_text().strip()]


def test_every_experiment_of_the_registry_reads_tables_of_the_contract():
    for declared in EXPERIMENTS.values():
        assert set(declared.tables) <= set(tables.TABLES)
        for table in declared.tables:
            assert set(declared.kinds) <= set(tables.TABLES[table].kinds) or not declared.kinds
    assert all(set(needed) <= set(tables.TABLES | tables.ACROSS) for needed in COMPARISONS.values())


def test_registry_imports_neither_matplotlib_nor_polars():
    code = "import sys; import moe_atlas.plotting.registry; print(sorted({'matplotlib', 'polars'} & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT / "scripts", capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("model", ["toy-eight", "toy-sixteen", "toy-attention"])
def test_text_fits_on_the_figure_and_is_large_enough(toys, model, name):
    shown = drawn(toys, model, name)
    for page, which in ((shown.pages[0], "auto"), (shown.pages[-1], "full")):
        drawing = shown.draw(page)
        drawing.apply(shown.ranges(page, which), which)
        check_text(drawing.figure)
        assert any(text.startswith(model) and text.endswith(page.text) for text in texts(drawing.figure))
    check_text(shown.overview())


def check_text(figure):
    """Nothing that is drawn leaves the figure, and no text is smaller than it may be in print."""
    from matplotlib.text import Text

    figure.canvas.draw()
    width, height = figure.get_size_inches()
    box = figure.get_tightbbox()  # inches, of what is drawn
    assert box.x0 >= -0.01 and box.y0 >= -0.01 and box.x1 <= width + 0.01 and box.y1 <= height + 0.01, (
        f"{texts(figure)[:2]}: {box.extents} of {width:.2f} x {height:.2f}"
    )
    assert min(text.get_fontsize() for text in figure.findobj(Text)) >= style.SMALLEST_FONT


def test_heat_map_holds_the_pairs_of_the_table(toys):
    shown = drawn(toys, "toy-eight", "weight_similarity")
    page = shown.pages[2]
    rows = toys["toy-eight"][None]["similarity"].filter(
        (pl.col("layer") == page.layer) & (pl.col("matrix") == "act") & (pl.col("level") == "matrix")
    )
    figure = shown.draw(page).figure
    act = next(axes for axes in figure.axes if axes.get_title() == "act")
    image = act.images[0].get_array()
    labels = [str(e) for e in range(8)] + ["F"]
    assert [tick.get_text() for tick in act.get_xticklabels()] == labels
    for row in rows.iter_rows(named=True):
        i, j = labels.index(row["a"]), labels.index(row["b"])
        assert image[i, j] == image[j, i] == row["cosine"]


def test_full_range_is_common_to_all_layers_and_auto_is_not(toys):
    shown = drawn(toys, "toy-eight", "weight_similarity")
    cosine = toys["toy-eight"][None]["similarity"].filter(
        (pl.col("level") == "matrix") & pl.col("matrix").is_in(["up", "act", "down"])
    )
    full = {shown.ranges(page, "full")["colour"] for page in shown.pages}
    assert full == {(cosine["cosine"].min(), cosine["cosine"].max())}
    for page in shown.pages:
        here = cosine.filter((pl.col("layer") == page.layer) & (pl.col("a") != pl.col("b")))["cosine"]
        assert shown.ranges(page, "auto")["colour"] == (here.min(), here.max())


def test_attention_experts_have_their_own_figures(toys):
    stems = [page.stem for page in drawn(toys, "toy-attention", "load.prose").pages]
    assert stems == [f"layer_{i}" for i in range(4)] + [f"layer_{i}_attention" for i in range(4)]


def test_sum_over_layers_is_the_sum(toys):
    shown = drawn(toys, "toy-sixteen", "rank_counts.prose")
    total = next(page for page in shown.pages if page.layer == "all")
    rows = toys["toy-sixteen"]["prose"]["rank_counts"]
    expected = np.zeros((16, 16))
    for row in rows.iter_rows(named=True):
        expected[row["score_rank"], row["norm_rank"]] += row["count"]
    np.testing.assert_array_equal(total.data["counts"], expected)
    assert f"{np.trace(expected) / expected.sum():.2f} of all" in shown.caption(total, "auto")
    assert "(chance 0.062)" in shown.caption(total, "auto")


def test_rank_bars_stand_at_their_norm_rank_in_order_of_score_rank(toys):
    shown = drawn(toys, "toy-eight", "rank_counts.prose")
    page = shown.pages[0]
    axes = shown.draw(page).figure.axes[0]
    counts = page.data["counts"]
    for score, collection in enumerate(axes.collections):
        for norm, path in enumerate(collection.get_paths()):
            assert path.vertices[:, 1].max() == counts[score, norm]
            assert abs(path.vertices[:-1, 0].mean() - norm) < 0.5


def test_load_figure_stacks_to_the_share_of_tokens(toys):
    shown = drawn(toys, "toy-sixteen", "load.prose")
    page = shown.pages[0]
    axes = shown.draw(page).figure.axes[0]
    rows = toys["toy-sixteen"]["prose"]["load"].filter(pl.col("layer") == page.layer)
    for expert in range(16):
        chosen = rows.filter(pl.col("expert") == str(expert))["tokens"].sum()
        top = max(path.vertices[:, 1].max() for path in (c.get_paths()[expert] for c in axes.collections))
        assert top == pytest.approx(chosen / 300, abs=1e-12)


def test_chosen_experts_are_coloured_and_others_white(toys):
    shown = drawn(toys, "toy-eight", "chosen_experts.prompt")
    page = shown.pages[1]
    axes = shown.draw(page).figure.axes[0]
    image = np.ma.filled(axes.images[0].get_array(), np.nan)
    routing = toys["toy-eight"]["prompt"]["routing"].filter(pl.col("layer") == page.layer)
    for row in routing.iter_rows(named=True):
        assert image[int(row["expert"]), row["position"]] == row["weight"]
    assert np.isfinite(image).sum() == len(routing)
    labels = [tick.get_text() for tick in axes.get_xticklabels()]
    assert labels == ["<s>", "␣As", "␣an", "␣open", "⏎", "␣alter$native$", "␣□to"]


def test_token_panels_name_token_and_chosen_experts(toys):
    shown = drawn(toys, "toy-eight", "output_similarity_tokens.prompt")
    page = shown.pages[0]
    first = toys["toy-eight"]["prompt"]["routing"].filter((pl.col("layer") == page.layer) & (pl.col("position") == 1))
    chosen = " ".join(first.sort("rank")["expert"])
    assert f"␣As\n{chosen}" in texts(shown.draw(page).figure)


def test_long_token_lists_are_cut_and_the_caption_says_so():
    toy = synthetic.Toy("toy-long", layers=(0,), tokens={"prompt": 40})
    frames = synthetic.behavioral(toy, "prompt")
    for name in ("output_similarity_tokens.prompt", "norm_score.prompt"):
        shown = experiment("toy-long", name, frames)
        assert "the first 24 of 40 tokens" in shown.caption(shown.pages[0], "auto")
        assert any("first 24 of 40" in text for text in texts(shown.draw(shown.pages[0]).figure))


def test_64_experts_and_a_shared_one_have_thin_ticks():
    toy = synthetic.Toy("toy-big", 64, 6, (1,), ("SE",), ("SE",), tokens={"prompt": 7})
    shown = experiment("toy-big", "weight_similarity_neuron_mean", synthetic.parametric(toy))
    figure = shown.draw(shown.pages[0]).figure
    axes = figure.axes[0]
    figure.canvas.draw()
    labels = [tick for tick in axes.get_xticklabels() if tick.get_text()]
    assert labels[-1].get_text() == "SE" and labels[0].get_text() == "0"
    boxes = [label.get_window_extent() for label in labels]
    assert all(left.x1 < right.x0 for left, right in zip(boxes[:-1], boxes[1:], strict=True))
    for name in ("norm_score.prompt", "rank_counts.prompt", "load.prompt", "chosen_experts.prompt"):
        shown = experiment("toy-big", name, synthetic.behavioral(toy, "prompt"))
        check_text(shown.draw(shown.pages[0]).figure)


@given(st.integers(1, 300), st.lists(st.sampled_from(["F", "F_same_input", "SE"]), unique=True), st.floats(0.5, 6))
def test_ticks_never_overlap(experts, extras, inches):
    labels = [str(e) for e in range(experts)] + extras
    positions, shown = style.thinned(labels, inches)
    room = 0.16 / inches * len(labels)
    assert len(positions) == len(shown) >= 1
    if len(positions) < len(labels):
        assert all(b - a >= min(room, 2) - 1e-9 for a, b in zip(positions[:-1], positions[1:], strict=True))


@pytest.mark.parametrize(
    ("token", "shown"),
    [(" open", "␣open"), ("▁open", "␣open"), ("\n", "⏎"), ("", "∅"), ("日本", "□□"), ("a" * 20, "a" * 11 + "…")],
)
def test_tokens_are_made_visible(token, shown):
    assert style.visible(token) == shown


def test_dollar_signs_are_drawn_as_they_are():
    figure = style.new_figure(3, 1)
    style.heading(figure, "$x^2$ and $", "\\frac")
    assert ink(figure).min() < 100  # mathtext would raise or drop the signs
    assert figure.texts[0].get_parse_math() is False


def test_all_files_are_made_listed_and_repeatable(toys, tmp_path):
    frames = frames_of(toys, "toy-eight", "weight_similarity")
    folders = []
    for run in ("one", "two"):
        folder = tmp_path / run
        folder.mkdir()
        for stale in ("layer_9_auto.png", "layer_9_full.pdf"):
            (folder / stale).write_text("left by an earlier run")
        plot_all("toy-eight", "weight_similarity", frames, folder, folder / "figures.json", folder / "overview.png")
        folders.append({path.name: path.read_bytes() for path in folder.iterdir()})
    names = {f"layer_{i}_{r}.{s}" for i in range(4) for r in ("auto", "full") for s in ("png", "pdf")}
    assert set(folders[0]) == names | {"figures.json", "overview.png"}
    assert all(folders[0][name] == folders[1][name] for name in names | {"overview.png"})
    manifest = json.loads(folders[0]["figures.json"])
    assert list(manifest) == ["model", "experiment", "files"]
    assert {Path(file["path"]).name for file in manifest["files"]} == names
    for file in manifest["files"]:
        assert list(file) == ["path", "layer", "site", "range", "caption"]
        assert "toy-eight" in file["caption"] and f"layer {file['layer']}" in file["caption"]
    assert folders[0]["layer_0_auto.png"] != folders[0]["layer_0_full.png"]
    for name in ("layer_2_full.png", "layer_2_auto.pdf"):  # asked for alone: the same bytes
        single = tmp_path / "single" / name
        plot_one("toy-eight", "weight_similarity", frames, single)
        assert single.read_bytes() == folders[0][name]


@pytest.mark.parametrize("name", NAMES)
def test_dense_model_gets_a_sentence_and_an_empty_manifest(toys, tmp_path, name):
    frames = frames_of(toys, "toy-dense", name)
    plot_all("toy-dense", name, frames, tmp_path, tmp_path / "figures.json", tmp_path / "overview.png")
    assert json.loads((tmp_path / "figures.json").read_text())["files"] == []
    assert (tmp_path / "overview.png").stat().st_size > 1000
    assert any("no experts in any layer" in text for text in texts(drawn(toys, "toy-dense", name).overview()))
    assert not list(tmp_path.glob("layer_*"))


def test_an_undefined_regression_is_drawn_without_a_line_and_said(toys):
    frames = frames_of(toys, "toy-eight", "router_regression")
    numbers = ("r", "r2", "slope", "intercept", "p_value", "p_mantel", "r_low", "r_high")
    frames["regression"] = frames["regression"].with_columns(pl.lit(None, pl.Float64).alias(name) for name in numbers)
    shown = experiment("toy-eight", "router_regression", frames)
    figure = shown.draw(shown.pages[0]).figure
    assert all(len(axes.lines) == 1 for axes in figure.axes)
    assert "up\nr = undefined [undefined, undefined]\nMantel p undefined" in texts(figure)
    shown.overview()


def test_mistakes_are_told_in_a_sentence(toys, tmp_path):
    frames = frames_of(toys, "toy-eight", "weight_similarity")
    with pytest.raises(AtlasError, match="layer_0, layer_1"):
        plot_one("toy-eight", "weight_similarity", frames, tmp_path / "layer_7_auto.png")
    with pytest.raises(AtlasError, match="no row of model toy-other"):
        experiment("toy-other", "weight_similarity", frames)
    with pytest.raises(AtlasError, match="no such experiment"):
        experiment("toy-eight", "weights", frames)
    with pytest.raises(AtlasError, match="regression are missing"):
        experiment("toy-eight", "router_regression", frames)
    with pytest.raises(AtlasError, match="write load.CORPUS"):
        experiment("toy-eight", "load", frames)
    assert not list(tmp_path.iterdir())


def joined(toys, name, models=("toy-eight", "toy-sixteen", "toy-attention", "toy-dense")):
    parts = {}
    for table in COMPARISONS[name]:
        if table in tables.ACROSS:
            parts[table] = pl.concat([synthetic.across(synthetic.TOYS[model])[table] for model in models])
            continue
        corpora = ("prompt", "prose") if tables.TABLES[table].kinds else (None,)
        parts[table] = pl.concat([toys[model][corpus][table] for model in models for corpus in corpora])
    return parts


@pytest.mark.parametrize("name", [name for name in COMPARISONS if name != "claims"])  # test_claims_figure.py
def test_comparisons_show_every_model_with_experts(toys, name):
    figure = compare(name, joined(toys, name))
    check_text(figure)
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert legend[:3] == ["toy-eight", "toy-sixteen", "toy-attention"]
    empty = compare(name, joined(toys, name, ("toy-dense",)))
    assert any("nothing to compare" in text for text in texts(empty))


def test_measures_equal_a_plain_recomputation(toys):
    checkpoint = {"toy-eight": {"L": 5, "d": 64, "m": 96}}
    weights = measures("weight_similarity", joined(toys, "weight_similarity"), checkpoint)
    row = weights.filter(
        (pl.col("model") == "toy-eight") & (pl.col("layer") == 2) & (pl.col("row") == "matrix level")
    ).filter(pl.col("column") == "up")
    similar = toys["toy-eight"][None]["similarity"].filter(
        (pl.col("layer") == 2) & (pl.col("matrix") == "up") & (pl.col("level") == "matrix")
    )
    values = [r["cosine"] for r in similar.iter_rows(named=True) if r["a"] != r["b"] and "F" not in (r["a"], r["b"])]
    assert len(values) == 28
    assert row["value"].item() == pytest.approx(sum(values) / 28, abs=1e-12)
    assert row["depth"].item() == 0.5  # layer 2 of 0..4
    assert row["null_sd"].item() == pytest.approx(1 / np.sqrt(64 * 96))

    top = measures("top_score", joined(toys, "top_score"))
    load = toys["toy-sixteen"]["prose"]["load"].filter((pl.col("layer") == 1) & (pl.col("rank") == 1))
    value = top.filter((pl.col("model") == "toy-sixteen") & (pl.col("column") == "prose") & (pl.col("layer") == 1))
    assert value["value"][1] == pytest.approx(load["weight_sum"].sum() / load["tokens"].sum())


def test_diagonal_of_rank_counts_and_balance():
    assert arrays.diagonal_share(np.eye(4) * 3).tolist() == [1.0] * 4
    assert arrays.diagonal_share(np.ones((4, 4))).tolist() == [0.25] * 4
    entropy, violation = arrays.balance(np.full((8, 2), 5.0))
    assert entropy == pytest.approx(1) and violation == pytest.approx(0)
    entropy, violation = arrays.balance(np.array([[6.0], [0.0], [0.0], [0.0]]))
    assert entropy == 0 and violation == 3
    entropy, violation = arrays.balance(np.array([[1.0, 2.0], [3.0, 2.0]]))  # shares 3/8 and 5/8
    assert entropy == pytest.approx(-(3 / 8 * np.log2(3 / 8) + 5 / 8 * np.log2(5 / 8)))
    assert violation == pytest.approx(0.25)
