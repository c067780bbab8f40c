"""Figures of attention experts, from tables of tiny models: what is drawn is what the tables say."""

import heads_models
import numpy as np
import polars as pl
import pytest
from test_heads_run import SETTINGS, Names, material
from test_plotting import check_text, texts

from moe_atlas.errors import AtlasError
from moe_atlas.heads.model import open_host
from moe_atlas.heads.run import Analysis
from moe_atlas.plotting.heads_figure import draw
from moe_atlas.plotting.registry import HEADS_FIGURES
from moe_atlas.tables import FORMS

MOA, FROZEN = "language.causal.moa-2k16e16d-no-loss", "router.causal.moa-2k16e16d-frozen"


@pytest.fixture(scope="module")
def frames(tmp_path_factory) -> dict[str, pl.DataFrame]:
    """Tables of a JetMoE, a causal MoA, the same with a frozen router, and a translation model with k = E."""
    folder = tmp_path_factory.mktemp("heads")
    heads_models.save_jetmoe(folder / "jetmoe")
    heads_models.save_moa(folder / MOA)
    heads_models.save_moa(folder / FROZEN, frozen_router=True)
    heads_models.save_moa(folder / "dense", "translation", num_experts_per_tok=4, num_hidden_layers=1)
    found = []
    for model in ("jetmoe", MOA, FROZEN, "dense"):
        host = open_host(folder / model, "float32")
        read = {"prose": material(host.objective, 12)} | ({"code": material(repeat=6)} if model == "jetmoe" else {})
        found.append(Analysis(host, model, Names(), SETTINGS).tables(read))
    return {name: pl.concat([one[name] for one in found]) for name in found[0]}


def name_of(figure: str) -> str:
    return f"{figure}.prose" if HEADS_FIGURES[figure].kinds else figure


@pytest.mark.parametrize("model", ["jetmoe", MOA, "dense"])
@pytest.mark.parametrize("figure", HEADS_FIGURES)
def test_every_figure_has_a_title_with_the_model_and_nothing_is_cut(frames, figure, model):
    drawn = draw(name_of(figure), model, frames)
    check_text(drawn)
    title = drawn.texts[0].get_text()
    assert title.startswith(f"{model} · ") and title.endswith(HEADS_FIGURES[figure].title)
    assert ("prose" in title) == bool(HEADS_FIGURES[figure].kinds)


def panel(figure, title: str):
    return next(axes for axes in figure.axes if axes.get_title().startswith(title))


def test_heat_maps_hold_the_values_of_their_tables(frames):
    found = draw("circuits", "jetmoe", frames)
    image = panel(found, "OV, causal, layer 1").images[0].get_array()
    own = frames["moa_circuits"].filter(model="jetmoe", circuit="OV", layer=1)
    for a, b, cosine in own.select("a", "b", "cosine").rows():
        assert image[int(a), int(b)] == image[int(b), int(a)] == cosine
    scales = {axes.images[0].get_clim() for axes in found.axes if axes.images}
    assert len(scales) == 1
    image = panel(draw("divergence.prose", "jetmoe", frames), "causal attention, layer 0").images[0].get_array()
    own = frames["moa_maps"].filter(model="jetmoe", corpus="prose", measure="divergence", layer=0)
    assert image[0, 3] == own.filter(a="0", b="3")["value"][0]
    axes = panel(draw("ablation.prose", "jetmoe", frames), "FFN, layer 1")
    own = frames["moa_ablation"].filter(model="jetmoe", corpus="prose", site="ffn", layer=1, family="form", by="read")
    names = [name for name in FORMS if name in own["token_class"].unique()]
    for row in own.rows(named=True):
        place = names.index(row["token_class"]), int(row["expert"])
        assert axes.images[0].get_array()[place] == row["value"]
    dots = {(int(y), int(x)) for x, y in zip(*axes.lines[0].get_data(), strict=True)}
    apart = own.filter((pl.col("difference_low") > 0) | (pl.col("difference_high") < 0))
    assert dots == {(names.index(c), int(e)) for c, e in apart.select("token_class", "expert").rows()}


def drawn_points(axes) -> set[float]:
    lines = [line for line in axes.lines if line.get_marker() not in ("None", "", None)]
    return {round(float(y), 9) for line in lines for y in line.get_ydata()}


def test_the_association_of_a_frozen_router_stands_beside_the_learned_one(frames):
    found = draw("association.prose", MOA, frames)
    table = frames["moa_association"].filter(measure="information", corpus="prose")
    own, other = (table.filter(pl.col("model") == model) for model in (MOA, FROZEN))
    values = {*own["value"], *other.filter(router="frozen")["value"]}
    assert drawn_points(panel(found, "causal attention")) == {round(value, 9) for value in values}
    labels = [text.get_text() for text in found.legends[0].get_texts()]
    assert "model with a frozen router" in labels
    alone = draw("association.prose", "jetmoe", frames)
    assert "model with a frozen router" not in [text.get_text() for text in alone.legends[0].get_texts()]


def test_loads_and_distances_are_drawn_for_every_expert(frames):
    axes = panel(draw("load.prose", "jetmoe", frames), "FFN, layer 0")
    own = frames["moa_load"].filter(model="jetmoe", corpus="prose", site="ffn", layer=0, measure="share")
    assert drawn_points(axes) == {round(4 * value, 9) for value in own["value"]}
    axes = panel(draw("distance.prose", MOA, frames), "causal attention, layer 1")
    own = frames["moa_maps"].filter(model=MOA, measure="distance", layer=1)
    assert drawn_points(axes) == {round(value, 9) for value in own["value"]}


def test_where_all_experts_are_chosen_weights_are_drawn_and_the_figure_says_so(frames):
    found = draw("load.prose", "dense", frames)
    assert any("every token has all experts" in text for text in texts(found))
    axes = panel(found, "cross-attention, layer 0")
    own = frames["moa_load"].filter(model="dense", kind="cross", layer=0, measure="weight")
    assert drawn_points(axes) == {round(4 * value, 9) for value in own["value"]}
    assert not np.allclose(own["value"], 0.25)


def test_both_sites_and_their_difference_are_drawn(frames):
    found = draw("sites.prose", "jetmoe", frames)
    axes = panel(found, "MaxVio")
    own = frames["moa_sites"].filter(model="jetmoe", corpus="prose", measure="max_vio")
    assert drawn_points(axes) == {round(v, 9) for c in ("attention", "ffn", "difference") for v in own[c]}
    assert panel(found, "divergence of loads").get_title().endswith("prose, code")
    assert any("no FFN experts" in text for text in texts(draw("sites.prose", MOA, frames)))


def test_what_is_not_there_is_said(frames):
    assert any("nothing of other" in text for text in texts(draw("load.prose", "other", frames)))
    for name, sentence in {
        "some": "no such figure",
        "load": "write load.CORPUS",
        "circuits.prose": "without a corpus",
    }.items():
        with pytest.raises(AtlasError, match=sentence):
            draw(name, "jetmoe", frames)
    with pytest.raises(AtlasError, match="moa_routing are missing"):
        draw("load.prose", "jetmoe", {"moa_load": frames["moa_load"]})
