"""Figures of attention experts, and of FFN experts of the same model beside them (MoA, arXiv 2210.05144, section 5)."""

from collections.abc import Callable, Sequence

import matplotlib
import numpy as np
import polars as pl
from matplotlib.colors import Normalize, TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from moe_atlas.plotting.base import GREY, off_diagonal, sentence
from moe_atlas.plotting.emoe import limits_of, points
from moe_atlas.plotting.registry import HEADS_FIGURES
from moe_atlas.plotting.style import COLOURS, MARKERS, WIDTH, add_axes, heading, new_figure, thinned, widen
from moe_atlas.tables import FORMS

Frames = dict[str, pl.DataFrame]
KINDS = ("causal", "encoder", "decoder", "cross", "ffn")
_NAMES = {
    "causal": "causal attention",
    "encoder": "encoder attention",
    "decoder": "decoder attention",
    "cross": "cross-attention",
    "ffn": "FFN",
}
_LEARNED, _FROZEN, _RANDOM = (
    {"color": COLOURS[i], "marker": MARKERS[i], "markersize": 4, "linestyle": ""} for i in range(3)
)
_DIVERGING = matplotlib.colormaps["RdBu_r"].with_extremes(bad=GREY)
_SEQUENTIAL = matplotlib.colormaps["viridis"].with_extremes(bad="white")
_MOST_LAYERS = 4
_LEFT, _GAP, _HEAD, _TAIL, _BETWEEN = 0.75, 0.16, 0.78, 0.62, 0.66


def title_of(name: str, model: str, corpus: str | None = None) -> str:
    """First line of a figure: model, corpus, what it shows."""
    return " · ".join(part for part in (model, corpus, HEADS_FIGURES[name].title) if part)


def layers_of(rows: pl.DataFrame) -> list[int]:
    """At most four layers, evenly spaced, first and last among them."""
    layers = sorted(rows["layer"].unique())
    places = np.linspace(0, len(layers) - 1, min(len(layers), _MOST_LAYERS)).round().astype(int)
    return [layers[place] for place in places]


def kinds_of(rows: pl.DataFrame) -> list[str]:
    """Kinds of attention, then FFN, that there are."""
    return [kind for kind in KINDS if kind in rows["kind"].unique()]


def _grid(
    rows: pl.DataFrame,
    draw: Callable[..., object],
    title: str,
    subtitle: str,
    height: float,
    label: Callable[[str], str],
    square: bool = False,
    tail: float = _TAIL,
    left: float = _LEFT,
) -> tuple[Figure, object, float]:
    """A panel for each kind and layer, drawn by `draw(axes, rows, first)`: figure, last of what it gave, bottom."""
    layers, kinds, drawn = layers_of(rows), kinds_of(rows), None
    columns = max(len(layers), 2)
    width = (WIDTH - left - 0.15 - _GAP * (columns - 1)) / columns
    width = min(width, height) if square else width
    figure = new_figure(WIDTH, _HEAD + len(kinds) * (height + _BETWEEN) + tail - 0.2)
    heading(figure, title, subtitle)
    for i, kind in enumerate(kinds):
        for j, layer in enumerate(layers):
            panel = rows.filter((pl.col("kind") == kind) & (pl.col("layer") == layer))
            if panel.is_empty():
                continue
            axes = add_axes(figure, left + j * (width + _GAP), _HEAD + i * (height + _BETWEEN), width, height)
            axes.set_title(f"{_NAMES[kind]}, layer {layer}", fontsize=7)
            drawn = draw(axes, panel, j == 0) or drawn
            if j == 0:
                axes.set_ylabel(label(kind))
            else:
                axes.tick_params(labelleft=False)
    return figure, drawn, _HEAD + len(kinds) * (height + _BETWEEN) - 0.1


def _legend(figure: Figure, handles: Sequence) -> None:
    figure.legend(
        handles=handles, loc="lower left", ncols=min(len(handles), 3), bbox_to_anchor=(0.02, 0.0), handletextpad=0.4
    )


def _expert_axis(axes, experts: list[str]) -> None:
    """Ticks of experts in the order they are drawn in."""
    inches = axes.get_position().width * axes.figure.get_figwidth()
    places, _ = thinned([str(place) for place in range(len(experts))], inches, 0.2)
    axes.set_xticks(places, [experts[place] for place in places])
    axes.set_xlim(-0.6, len(experts) - 0.4)


def load(model: str, corpus: str, frames: Frames) -> Figure:
    """Each expert's part of the choices, times E, largest first; of the weights where all experts are chosen."""
    routing = frames["moa_routing"]
    dense = bool((routing["top_k"] == routing["experts"]).all())
    measure = "weight" if dense else "share"
    rows = frames["moa_load"].filter(pl.col("measure") == measure)
    scaled = rows.with_columns(pl.col("value", "low", "high") / pl.col("chance"))
    limits = limits_of(scaled, 0.0, 1.0)

    def draw(axes, panel: pl.DataFrame, first: bool) -> None:
        panel = panel.sort("value", descending=True)
        axes.axhline(1, color="0.45", linestyle="--", linewidth=0.8)
        points(axes, np.arange(len(panel)), panel, _LEARNED)
        _expert_axis(axes, panel["expert"].to_list())
        axes.set_ylim(limits)
        axes.locator_params(axis="y", nbins=5)
        key = panel.select("kind", "layer").row(0)
        own = routing.filter(
            (pl.col("kind") == key[0]) & (pl.col("layer") == key[1]) & (pl.col("measure") == "max_vio")
        )
        value, low, high = own.select("value", "chance_low", "chance_high").row(0)
        axes.set_xlabel(f"MaxVio {value:.2f}\neven: {low:.2f} to {high:.2f}", fontsize=7)

    what = "weights: k = E, so every token has all experts" if dense else f"choices, k = {routing['top_k'][0]}"
    subtitle = f"E × an expert's part of all {what}; dashed: even; 95 % intervals over documents; sorted"
    figure, _, _ = _grid(
        scaled, draw, title_of("load", model, corpus), subtitle, 1.25, lambda kind: "E × part", tail=0.3
    )
    return figure


def association(model: str, corpus: str, frames: Frames) -> Figure:
    """Information of token types about experts by layer, beside exchanges, a random router and a frozen one."""
    table = frames["moa_association"].filter(pl.col("measure") == "information")
    rows = table.filter(pl.col("model") == model)
    frozen = table.filter((pl.col("router") == "frozen") & (pl.col("model") != model))
    own_router = rows.filter(pl.col("router") != "random")["router"][0]
    kinds, layers = kinds_of(rows), sorted(rows["layer"].unique())
    shown = rows.with_columns(pl.col("low", "high") + pl.col("chance"))
    limits = limits_of(shown, 0.0, *frozen["value"].drop_nulls())
    width = (WIDTH - _LEFT - 0.15 - _GAP * (max(len(kinds), 2) - 1)) / max(len(kinds), 2)
    figure = new_figure(WIDTH, _HEAD + 1.9 + 1.0)
    subtitle = (
        "I(token type; expert) / H(expert) over choices, types with 20 tokens or more; 95 % intervals over documents"
    )
    heading(figure, title_of("association", model, corpus), subtitle)
    for j, kind in enumerate(kinds):
        axes = add_axes(figure, _LEFT + j * (width + _GAP), _HEAD, width, 1.9)
        panel = shown.filter(pl.col("kind") == kind)
        _association_panel(axes, panel, frozen.filter(pl.col("kind") == kind), layers, own_router)
        axes.set(ylim=limits, title=_NAMES[kind], xlabel="layer")
        if j:
            axes.tick_params(labelleft=False)
        else:
            axes.set_ylabel("share of H(expert)")
    looks = {"learned": _LEARNED, "frozen": _FROZEN}
    handles = [Line2D([], [], label=f"{own_router} router", **looks[own_router])]
    handles.append(Line2D([], [], label="random router, same states", **_RANDOM))
    if not frozen.is_empty():
        handles.append(Line2D([], [], label="model with a frozen router", **_FROZEN))
    handles.append(Patch(color="0.8", label="95 % of exchanges within sequences"))
    handles.append(Line2D([], [], color="0.45", linewidth=0.8, linestyle=":", label="most that k choices can tell"))
    _legend(figure, handles)
    return figure


def _association_panel(axes, panel: pl.DataFrame, frozen: pl.DataFrame, layers: list[int], own_router: str) -> None:
    looks = {"learned": _LEARNED, "frozen": _FROZEN}
    for router, shift, look in ((own_router, -0.15, looks[own_router]), ("random", 0.15, _RANDOM)):
        rows = panel.filter(pl.col("router") == router).sort("layer")
        places = np.array([layers.index(layer) for layer in rows["layer"]]) + shift
        for place, low, high, most in zip(places, rows["chance_low"], rows["chance_high"], rows["most"], strict=True):
            if low is not None:
                axes.fill_between([place - 0.13, place + 0.13], low, high, color="0.8", linewidth=0)
            if most is not None and router != "random":
                axes.hlines(most, place - 0.3, place + 0.5, color="0.45", linewidth=0.8, linestyle=":")
        points(axes, places, rows, look)
    rows = frozen.filter(pl.col("layer").is_in(layers)).sort("layer")
    axes.plot([layers.index(layer) for layer in rows["layer"]], rows["value"].to_numpy(), **_FROZEN)
    ticks, _ = thinned([str(layer) for layer in layers], axes.get_position().width * WIDTH, 0.22)
    axes.set_xticks(ticks, [str(layers[tick]) for tick in ticks])
    axes.set_xlim(-0.5, len(layers) - 0.5)


def _matrix(panel: pl.DataFrame, column: str) -> np.ndarray:
    """(E, E) of pairs, both ways; NaN where there is none."""
    a, b = (panel[name].cast(pl.Int64).to_numpy() for name in ("a", "b"))
    cells = np.full((max(a.max(), b.max()) + 1,) * 2, np.nan)
    cells[a, b] = cells[b, a] = panel[column].to_numpy()
    return cells


def _heat_map(axes, cells: np.ndarray, colours, norm) -> object:
    image = axes.imshow(cells, cmap=colours, norm=norm, interpolation="nearest")
    inches = axes.get_position().width * WIDTH
    ticks, names = thinned([str(expert) for expert in range(len(cells))], inches, 0.2)
    axes.set_xticks(ticks, names)
    axes.set_yticks(ticks, names)
    return image


def _bar(figure: Figure, image, top: float, label: str, **options) -> None:
    axes = add_axes(figure, _LEFT, top, 2.6, 0.09)
    figure.colorbar(image, cax=axes, orientation="horizontal", label=label, **options)
    axes.locator_params(axis="x", nbins=5)


def circuits(model: str, _corpus: None, frames: Frames) -> Figure:
    """Cosine of the circuits of each two experts: QK above OV, the same colours everywhere."""
    table = frames["moa_circuits"]
    kinds, layers = kinds_of(table), layers_of(table)
    apart = table.filter(pl.col("a") != pl.col("b"))["cosine"].abs()
    reach = widen(0.0, float(apart.max() or 0))[1]
    norm, side = Normalize(-reach, reach), min(1.35, (WIDTH - _LEFT - 0.6) / max(len(layers), 2) - 0.25)
    figure = new_figure(WIDTH, _HEAD + 2 * len(kinds) * (side + 0.62) + 0.5)
    subtitle = (
        "Cosine of W_q^T W_k (QK) and of W_o W_v (OV) of two experts; above each map what holds 95 % of pairs of "
        "random experts with the same keys or values"
    )
    heading(figure, title_of("circuits", model), subtitle)
    places = [(kind, circuit) for kind in kinds for circuit in ("QK", "OV")]
    for i, (kind, circuit) in enumerate(places):
        for j, layer in enumerate(layers):
            wanted = (pl.col("kind") == kind) & (pl.col("layer") == layer) & (pl.col("circuit") == circuit)
            panel = table.filter(wanted)
            if panel.is_empty():
                continue
            axes = add_axes(figure, _LEFT + j * (side + 0.3), _HEAD + 0.2 + i * (side + 0.62), side, side)
            image = _heat_map(axes, _matrix(panel, "cosine"), _DIVERGING, norm)
            low, high = panel.select("chance_low", "chance_high").row(0)
            name = _NAMES[kind].replace(" attention", "").replace("-attention", "")
            axes.set_title(f"{circuit}, {name}, layer {layer}\n{low:+.3f} to {high:+.3f}", fontsize=7)
            if j == 0:
                axes.set_ylabel("expert")
    _bar(figure, image, _HEAD + len(places) * (side + 0.62) + 0.05, "cosine", extend="both")
    return figure


def distance(model: str, corpus: str, frames: Frames) -> Figure:
    """How far each expert looks, nearest first, beside experts exchanged and an even map."""
    rows = frames["moa_maps"].filter(pl.col("measure") == "distance").rename({"a": "expert"})
    if rows.is_empty():
        return sentence(title_of("distance", model, corpus), "Only cross-attention has experts: it has no distances.")
    limits = limits_of(rows, 0.0, *rows["uniform"], *rows["chance_high"])

    def draw(axes, panel: pl.DataFrame, first: bool) -> None:
        panel = panel.sort("value")
        for place, low, high in zip(range(len(panel)), panel["chance_low"], panel["chance_high"], strict=True):
            axes.fill_between([place - 0.45, place + 0.45], low, high, color="0.8", linewidth=0)
        axes.axhline(panel["uniform"][0], color="0.45", linestyle="--", linewidth=0.8)
        points(axes, np.arange(len(panel)), panel, _LEARNED)
        _expert_axis(axes, panel["expert"].to_list())
        axes.set_ylim(limits)

    subtitle = "Mean of Σ a |t − s| of each expert on all tokens, chosen or not; 95 % intervals over documents; sorted"
    title = title_of("distance", model, corpus)
    figure, _, _ = _grid(rows, draw, title, subtitle, 1.25, lambda kind: "tokens")
    handles = [Line2D([], [], label="expert", **_LEARNED), Patch(color="0.8", label="95 % of exchanges of experts")]
    _legend(figure, [*handles, Line2D([], [], color="0.45", linestyle="--", linewidth=0.8, label="even map")])
    return figure


def divergence(model: str, corpus: str, frames: Frames) -> Figure:
    """Divergence of the maps of each two experts on the same token."""
    rows = frames["moa_maps"].filter(pl.col("measure") == "divergence")
    norm = Normalize(0, widen(0.0, float(rows["value"].max() or 0))[1])

    def draw(axes, panel: pl.DataFrame, first: bool) -> object:
        cells = _matrix(panel, "value")
        image = _heat_map(axes, cells, _SEQUENTIAL, norm)
        low, high = panel["chance_low"].min(), panel["chance_high"].max()
        axes.set_xlabel(f"mean {np.nanmean(off_diagonal(cells)):.3f}\n{low:.3f} to {high:.3f}", fontsize=7)
        return image

    subtitle = (
        "Jensen-Shannon divergence of two experts' attention from the same token, mean over tokens and heads. Below: "
        "mean of all pairs, and what holds 95 % of pairs when experts are exchanged in each block of documents"
    )
    title = title_of("divergence", model, corpus)
    figure, image, bottom = _grid(rows, draw, title, subtitle, 1.35, lambda kind: "expert", square=True, tail=0.85)
    _bar(figure, image, bottom + 0.18, "bits")
    return figure


def ablation(model: str, corpus: str, frames: Frames) -> Figure:
    """What leaving out an expert costs tokens of each form, against the other experts of its layer."""
    table = frames["moa_ablation"].filter(pl.col("family") == "form")
    by = "read" if "read" in table["by"].to_list() else "predicted"
    rows = table.filter(pl.col("by") == by)
    names = [name for name in FORMS if name in rows["token_class"].unique()]
    largest = float(rows["value"].abs().quantile(0.98, "linear") or 0)
    norm = TwoSlopeNorm(0, -widen(0.0, largest)[1], widen(0.0, largest)[1])

    def draw(axes, panel: pl.DataFrame, first: bool) -> object:
        experts = sorted(panel["expert"].unique(), key=int)
        cells, apart = (np.full((len(names), len(experts)), np.nan) for _ in range(2))
        at = [names.index(name) for name in panel["token_class"]], panel["expert"].cast(pl.Int64).to_numpy()
        cells[at] = panel["value"].to_numpy()
        differs = ((panel["difference_low"] > 0) | (panel["difference_high"] < 0)).fill_null(False)
        apart[at] = differs.to_numpy()
        image = axes.imshow(cells, cmap=_DIVERGING, norm=norm, aspect="auto", interpolation="nearest")
        axes.plot(*np.argwhere(apart == 1).T[::-1], ".", color="0.1", markersize=2.5)
        axes.set_yticks(range(len(names)), names if first else [""] * len(names))
        _expert_axis(axes, experts)
        return image

    token = "token that is read" if by == "read" else "hidden token" if len(table["by"].unique()) == 1 else by
    subtitle = (
        f"Loss without the expert minus the model's loss, by form of the {token}; dots: the 95 % interval of the "
        "difference from the other experts of the layer does not hold 0"
    )
    title, height = title_of("ablation", model, corpus), 0.2 * len(names)
    figure, image, bottom = _grid(rows, draw, title, subtitle, height, lambda kind: "", tail=0.75, left=0.95)
    _bar(figure, image, bottom + 0.05, "nats a token", extend="both")
    return figure


_SITES = {
    "information": "I(type; expert) / H(expert)\nless exchanges",
    "entropy": "entropy of the load\nover log E",
    "max_vio": "MaxVio",
    "domain": "divergence of loads, bits\n",
}


def sites(model: str, corpus: str, frames: Frames) -> Figure:
    """Measures of attention experts beside those of FFN experts, layer by layer."""
    table = frames["moa_sites"]
    rows = table.filter((pl.col("corpus") == corpus) | (pl.col("measure") == "domain"))
    if rows.is_empty():
        return sentence(title_of("sites", model, corpus), f"{model} has no FFN experts beside its attention experts.")
    layers = sorted(rows["layer"].unique())
    measures = [name for name in _SITES if name in rows["measure"].to_list()]
    width = (WIDTH - _LEFT - 0.1 - 0.62 * (len(measures) - 1)) / len(measures)
    figure = new_figure(WIDTH, _HEAD + 0.3 + 1.6 + 0.85)
    subtitle = (
        "The same measures of both routers of a layer, and their difference with its 95 % interval over documents"
    )
    heading(figure, title_of("sites", model, corpus), subtitle)
    for j, measure in enumerate(measures):
        axes = add_axes(figure, _LEFT - 0.2 + j * (width + 0.62), _HEAD + 0.3, width, 1.6)
        own = rows.filter(pl.col("measure") == measure).group_by("layer", maintain_order=True).first().sort("layer")
        places = np.array([layers.index(layer) for layer in own["layer"]])
        axes.axhline(0, color="0.6", linewidth=0.5)
        axes.plot(places - 0.2, own["attention"].to_numpy(), **_LEARNED)
        axes.plot(places, own["ffn"].to_numpy(), **_FROZEN)
        points(axes, places + 0.2, own.rename({"difference": "value"}), _RANDOM)
        pair = f"on {own['corpus'][0].replace(',', ', ')}" if measure == "domain" else ""
        axes.set_title(_SITES[measure] + pair, fontsize=7)
        ticks, _ = thinned([str(layer) for layer in layers], width, 0.22)
        axes.set_xticks(ticks, [str(layers[tick]) for tick in ticks])
        axes.set(xlim=(-0.5, len(layers) - 0.5), xlabel="layer")
        axes.locator_params(axis="y", nbins=5)
    names = ("attention experts", "FFN experts", "attention minus FFN")
    looks = (_LEARNED, _FROZEN, _RANDOM)
    _legend(figure, [Line2D([], [], label=name, **look) for name, look in zip(names, looks, strict=True)])
    return figure


FIGURES = {
    "load": load,
    "association": association,
    "circuits": circuits,
    "distance": distance,
    "divergence": divergence,
    "ablation": ablation,
    "sites": sites,
}
