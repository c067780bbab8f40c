"""Figures of EMoE before any tuning: what experts hold, agree on and cost, by split and by gate (arXiv 2310.10908)."""

from collections.abc import Sequence

import matplotlib
import numpy as np
import polars as pl
from matplotlib.colors import Normalize, TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from moe_atlas.plotting.base import GREY, sentence
from moe_atlas.plotting.registry import EMOE_FIGURES
from moe_atlas.plotting.style import COLOURS, MARKERS, WIDTH, add_axes, heading, new_figure, span, thinned, widen

SPLITS = ("cluster", "random", "contiguous")
GATES = ("avg-k", "oracle", "random", "not-top-k", "bottom-k")
_LOOKS = {
    split: {"color": COLOURS[i], "marker": MARKERS[i], "markersize": 4, "linestyle": ""}
    for i, split in enumerate(SPLITS)
}
_DIVERGING = matplotlib.colormaps["RdBu_r"].with_extremes(bad=GREY)
_MAP = matplotlib.colormaps["viridis"].with_extremes(bad="white")
_MOST_LAYERS = 4
_LEFT, _GAP, _HEAD, _HEIGHT, _BETWEEN = 0.85, 0.16, 0.85, 1.2, 0.16


def title_of(name: str, model: str, corpus: str | None = None) -> str:
    """First line of a figure: model, corpus, what it shows."""
    return " · ".join(part for part in (model, corpus, EMOE_FIGURES[name].title) if part)


def _shown(layers: Sequence[int]) -> list[int]:
    """At most _MOST_LAYERS layers, evenly spaced, first and last among them."""
    layers = sorted(set(layers))
    places = np.linspace(0, len(layers) - 1, min(len(layers), _MOST_LAYERS)).round().astype(int)
    return [layers[place] for place in places]


def share_text(k: int, experts: int) -> str:
    """k/N as a fraction of 1 where it is one."""
    whole = experts / k
    return f"k/N = 1/{whole:.0f}" if abs(whole - round(whole)) < 1e-9 else f"k/N = {k / experts:.2g}"


def points(axes, places: np.ndarray, rows: pl.DataFrame, look: dict) -> None:
    """Values with their intervals, where there are any, at these places."""
    axes.vlines(places, rows["low"].to_numpy(), rows["high"].to_numpy(), color=look["color"], linewidth=1)
    axes.plot(places, rows["value"].to_numpy(), **look)


def limits_of(rows: pl.DataFrame, *more: float) -> tuple[float, float]:
    """A range that holds values, intervals and other numbers, with some room."""
    low, high = widen(
        *span(np.concatenate([rows[c].drop_nulls().to_numpy() for c in ("value", "low", "high")] + [more]))
    )
    return low - 0.06 * (high - low), high + 0.06 * (high - low)


def _legend(figure: Figure, handles: list) -> None:
    figure.legend(handles=handles, loc="lower left", ncols=len(handles), bbox_to_anchor=(0.02, 0.0), handletextpad=0.4)


def _split_handles() -> list[Line2D]:
    return [Line2D([], [], label=f"{split} split", **look) for split, look in _LOOKS.items()]


def _gates(name: str, rows: pl.DataFrame, title: str, subtitle: str, label: str) -> Figure:
    """A panel for each layer, k/N and N: gates along x, splits side by side, chance as a grey bar."""
    rows = rows.with_columns(share=pl.col("k") / pl.col("experts"))
    experts = sorted(rows["experts"].unique())
    downs = rows.select("layer", "share").unique().sort("layer", "share").rows()
    width = (WIDTH - _LEFT - 0.1 - _GAP * (len(experts) - 1)) / len(experts)
    figure = new_figure(WIDTH, _HEAD + len(downs) * (_HEIGHT + _BETWEEN) + 0.75)
    heading(figure, title, subtitle)
    for i, (layer, share) in enumerate(downs):
        down = rows.filter(pl.col("layer").eq_missing(layer) & (pl.col("share") == share))
        limits = limits_of(down, *down["chance"].drop_nulls(), 0.0)
        for j, count in enumerate(experts):
            axes = add_axes(figure, _LEFT + j * (width + _GAP), _HEAD + i * (_HEIGHT + _BETWEEN), width, _HEIGHT)
            panel = down.filter(pl.col("experts") == count)
            axes.set(xlim=(-0.5, len(GATES) - 0.5), ylim=limits, xticks=range(len(GATES)))
            axes.axhline(0, color="0.6", linewidth=0.5)
            axes.locator_params(axis="y", nbins=4)
            _panel_of_gates(axes, panel, chance=name == "mass")
            if i == 0:
                axes.set_title(f"N = {count}")
            axes.set_xticklabels(GATES if i == len(downs) - 1 else [], rotation=40, ha="right")
            if j:
                axes.tick_params(labelleft=False)
            else:
                place = "" if layer is None else f"layer {layer}, "
                k, of = down.select("k", "experts").row(0)
                axes.set_ylabel(f"{place}{share_text(k, of)}\n{label}")
    bar = [Line2D([], [], color="0.6", linewidth=3, label="share of experts chosen")] if name == "mass" else []
    _legend(figure, _split_handles() + bar)
    return figure


def _panel_of_gates(axes, panel: pl.DataFrame, chance: bool) -> None:
    for place, gate in enumerate(GATES):
        own = panel.filter(pl.col("gate") == gate)
        if chance and not own.is_empty():
            level = own["chance"][0]
            axes.hlines(level, place - 0.4, place + 0.4, color="0.75", linewidth=3, zorder=0)
        for number, split in enumerate(SPLITS):
            mine = own.filter(pl.col("split") == split)
            points(axes, np.full(len(mine), place + 0.24 * (number - 1)), mine, _LOOKS[split])


def mass(model: str, corpus: str, frames: dict[str, pl.DataFrame]) -> Figure:
    """Share of a token's activation in the chosen experts."""
    rows = frames["emoe_mechanism"].filter(pl.col("measure") == "mass")
    shown = _shown(rows["layer"].unique())
    subtitle = (
        "Share of a token's Σ|a| in the chosen experts' neurons, by gate; 95 % intervals over documents and seeds"
    )
    return _gates(
        "mass", rows.filter(pl.col("layer").is_in(shown)), title_of("mass", model, corpus), subtitle, "share of Σ|a|"
    )


def loss(model: str, corpus: str, frames: dict[str, pl.DataFrame]) -> Figure:
    """Rise of the loss with all masked layers masked, or with the only one."""
    rows = frames["emoe_mechanism"].filter(pl.col("measure") == "loss_rise")
    together = rows.filter(pl.col("layer").is_null())
    dense = frames["emoe_mechanism"].filter(pl.col("measure") == "loss")["value"][0]
    subtitle = (
        "Loss of the next token with the chosen experts' neurons only, minus that of the dense model "
        f"({dense:.2f} nats); 95 % intervals over documents and seeds. Where k = N/2, not-top-k is bottom-k"
    )
    rows = together if not together.is_empty() else rows
    return _gates("loss", rows, title_of("loss", model, corpus), subtitle, "nats a token")


def _lines(
    title: str,
    subtitle: str,
    label: str,
    panels: list[list[tuple[str, pl.DataFrame]]],
    draw,
    handles: list,
    layers: list,
) -> Figure:
    """A grid of panels with layers along x; `draw(axes, rows)` draws one."""
    across = max(map(len, panels))
    width = (WIDTH - _LEFT - 0.1 - _GAP * (across - 1)) / max(across, 2)
    figure = new_figure(WIDTH, _HEAD + len(panels) * (_HEIGHT + 0.42) + 0.55)
    heading(figure, title, subtitle)
    for i, row in enumerate(panels):
        for j, (name, rows) in enumerate(row):
            axes = add_axes(figure, _LEFT + j * (width + _GAP), _HEAD + i * (_HEIGHT + 0.42), width, _HEIGHT)
            axes.set_title(name)
            draw(axes, rows)
            axes.set_xlim(-0.5, len(layers) - 0.5)
            ticks, texts = thinned([str(layer) for layer in layers], width, 0.22)
            if len(texts) < len(ticks) or not ticks:
                ticks, texts = list(range(len(layers))), [str(layer) for layer in layers]
            axes.set_xticks(ticks, texts)
            axes.locator_params(axis="y", nbins=5)
            if i == len(panels) - 1:
                axes.set_xlabel("layer")
            if j == 0:
                axes.set_ylabel(label)
            else:
                axes.tick_params(labelleft=False)
    _legend(figure, handles)
    return figure


def agreement(model: str, corpus: str, frames: dict[str, pl.DataFrame]) -> Figure:
    """Overlap of the avg-k choice with that of an oracle, layer by layer."""
    table = frames["emoe_mechanism"]
    rows = table.filter(pl.col("measure").is_in(["agreement", "agreement_output"]))
    layers = sorted(rows["layer"].unique())

    def draw(axes, panel: pl.DataFrame) -> None:
        axes.axhline(panel["chance"][0], color="0.45", linestyle="--", linewidth=0.8)
        for number, split in enumerate(SPLITS):
            for measure, face in (("agreement", None), ("agreement_output", "white")):
                own = panel.filter((pl.col("split") == split) & (pl.col("measure") == measure)).sort("layer")
                places = np.array([layers.index(layer) for layer in own["layer"]]) + 0.2 * (number - 1)
                look = _LOOKS[split] | ({"markerfacecolor": face} if face else {})
                points(axes, places + (0.09 if face else 0), own, look)
        axes.set_ylim(0, 1.02)

    handles = [*_split_handles(), Line2D([], [], color="0.3", marker="o", markersize=4, linestyle="", label="by Σ|a|")]
    handles.append(
        Line2D(
            [],
            [],
            color="0.3",
            marker="o",
            markerfacecolor="white",
            markersize=4,
            linestyle="",
            label="by Σ|a|·|value|",
        )
    )
    subtitle = "Share of avg-k's k experts among the k with the most activation; dashed: chance k/N; 95 % intervals"
    return _lines(title_of("agreement", model, corpus), subtitle, "share", _by_shape(rows), draw, handles, layers)


def _by_shape(rows: pl.DataFrame) -> list[list[tuple[str, pl.DataFrame]]]:
    """Rows of panels, one for each k/N, and in each of them a panel for each N."""
    rows = rows.with_columns(share=pl.col("k") / pl.col("experts"))
    grid = []
    for share in sorted(rows["share"].unique()):
        parts = rows.filter(pl.col("share") == share).partition_by("experts", "k", as_dict=True)
        grid.append([(f"N = {experts}, k = {k}", part) for (experts, k), part in sorted(parts.items())])
    return grid


def correlation(model: str, corpus: str, frames: dict[str, pl.DataFrame]) -> Figure:
    """Mean |r| within experts over that between them, beside random splits."""
    rows = frames["emoe_mechanism"].filter(pl.col("measure") == "correlation_ratio")
    layers = sorted(rows["layer"].unique())
    limits = limits_of(rows, *rows["chance_low"], *rows["chance_high"])

    def draw(axes, panel: pl.DataFrame) -> None:
        null = panel.filter(pl.col("split") == "cluster").sort("layer")
        for place, low, high in zip(range(len(layers)), null["chance_low"], null["chance_high"], strict=True):
            axes.fill_between([place - 0.4, place + 0.4], low, high, color="0.8", linewidth=0)
        axes.axhline(1, color="0.45", linestyle="--", linewidth=0.8)
        for number, split in enumerate(SPLITS):
            own = panel.filter(pl.col("split") == split).sort("layer")
            points(axes, np.arange(len(layers)) + 0.22 * (number - 1), own, _LOOKS[split])
        axes.set_ylim(limits)

    parts = sorted(rows.partition_by("experts", as_dict=True).items())
    panels = [[(f"N = {experts}", part) for (experts,), part in parts]]
    handles = [*_split_handles(), Patch(color="0.8", label="95 % of 100 random splits")]
    subtitle = (
        "Mean |r| of the activations of neurons of one expert over that of two experts; 95 % intervals over seeds"
    )
    return _lines(title_of("correlation", model, corpus), subtitle, "ratio", panels, draw, handles, layers)


def correlation_map(model: str, corpus: str, frames: dict[str, pl.DataFrame]) -> Figure:
    """|r| of neurons in the order of the matrix and sorted by expert."""
    table = frames["emoe_correlation"]
    layers, experts = _shown(table["layer"].unique()), table["experts"][0]
    table = table.filter(pl.col("layer").is_in(layers))
    side, head = 2.45, 0.85
    figure = new_figure(WIDTH, head + len(layers) * (side + 0.3) + 0.2)
    subtitle = f"Mean |r| of the activations of neurons, in the order of the matrix and sorted by expert, N = {experts}"
    heading(figure, title_of("correlation_map", model, corpus), subtitle)
    norm = Normalize(0, float(table["value"].drop_nulls().quantile(0.99, "linear")))
    for i, layer in enumerate(layers):
        for j, (order, name) in enumerate((("index", "order of the matrix"), ("cluster", "sorted by expert"))):
            part = table.filter((pl.col("layer") == layer) & (pl.col("order") == order))
            cells = np.full((part["row"].max() + 1,) * 2, np.nan)
            cells[part["row"], part["column"]] = part["value"].to_numpy()
            axes = add_axes(figure, 0.6 + j * (side + 0.25), head + i * (side + 0.3), side, side)
            image = axes.imshow(cells, cmap=_MAP, norm=norm, interpolation="nearest")
            axes.set_xticks([])
            axes.set_yticks([])
            axes.set_title(f"layer {layer}, {name}")
            if j and experts <= 64:  # where one expert ends and the next begins
                ends = np.arange(1, experts) * len(cells) / experts - 0.5
                axes.set_xticks(ends, [""] * len(ends))
                axes.set_yticks(ends, [""] * len(ends))
    bar = add_axes(figure, 0.6 + 2 * (side + 0.25) + 0.05, head, 0.1, side)
    figure.colorbar(image, cax=bar, label="mean |r|", extend="max")
    return figure


def layer_loss(model: str, corpus: str, frames: dict[str, pl.DataFrame]) -> Figure:
    """Rise of the loss when one layer alone is masked, by avg-k and at random."""
    rows = frames["emoe_mechanism"].filter(pl.col("measure") == "loss_rise")
    if rows["layer"].is_not_null().all():
        return sentence(
            title_of("layer_loss", model, corpus), "Only one layer is masked: the figure `loss` is of that layer."
        )
    rows = rows.filter(pl.col("layer").is_not_null())
    layers, (experts, k) = sorted(rows["layer"].unique()), rows.select("experts", "k").row(0)
    limits = limits_of(rows, 0.0)

    def draw(axes, panel: pl.DataFrame) -> None:
        axes.axhline(0, color="0.6", linewidth=0.5)
        for number, split in enumerate(SPLITS):
            own = panel.filter(pl.col("split") == split).sort("layer")
            places = np.array([layers.index(layer) for layer in own["layer"]])
            points(axes, places + 0.2 * (number - 1), own, _LOOKS[split])
        axes.set_ylim(limits)

    panels = [[(f"{gate} gate", rows.filter(pl.col("gate") == gate)) for gate in ("avg-k", "random")]]
    subtitle = (
        f"Loss of the next token minus the dense model's, one layer masked, N = {experts}, k = {k}; 95 % intervals"
    )
    return _lines(
        title_of("layer_loss", model, corpus), subtitle, "nats a token", panels, draw, _split_handles(), layers
    )


def corpora(model: str, _corpus: None, frames: dict[str, pl.DataFrame]) -> Figure:
    """Share of the choices of each corpus that each expert has, before tuning."""
    table = frames["emoe_selection"].filter(pl.col("split") == "cluster")
    if table.is_empty():
        return sentence(title_of("corpora", model), "There is no long corpus: add one to the corpora sheet.")
    experts, k = table.select("experts", "k").row(0)
    table = table.filter((pl.col("experts") == experts) & (pl.col("k") == k))
    names, layers = table["corpus"].unique(maintain_order=True).to_list(), _shown(table["layer"].unique())
    height, left = 0.24 * len(names) + 0.05, 1.0
    figure = new_figure(WIDTH, 0.85 + len(layers) * (height + 0.62) + 0.5)
    subtitle = (
        f"N × share of the choices by avg-k, N = {experts}, k = {k}; 1 is even. Dots: the 95 % interval holds 1. "
        "Experts sorted by the difference of the last and the first corpus"
    )
    heading(figure, title_of("corpora", model), subtitle)
    stretch = experts * float(table["share"].max())
    norm = TwoSlopeNorm(1, 0, max(2.0, stretch))
    for i, layer in enumerate(layers):
        part = table.filter(pl.col("layer") == layer).sort(pl.col("expert").cast(pl.Int64))
        shares = np.stack([part.filter(pl.col("corpus") == name)["share"].to_numpy() for name in names]) * experts
        order = np.argsort(shares[-1] - shares[0], kind="stable")
        axes = add_axes(figure, left, 0.85 + i * (height + 0.62), WIDTH - left - 0.15, height)
        image = axes.imshow(shares[:, order], cmap=_DIVERGING, norm=norm, aspect="auto", interpolation="nearest")
        for row, name in enumerate(names):
            own = part.filter(pl.col("corpus") == name)
            even = ((own["low"] <= own["chance"]) & (own["high"] >= own["chance"])).fill_null(True).to_numpy()[order]
            axes.plot(np.flatnonzero(even), np.full(even.sum(), row), ".", color="0.2", markersize=2.5)
        axes.set_yticks(range(len(names)), names)
        places, _ = thinned([str(e) for e in range(experts)], WIDTH - left)
        axes.set_xticks(places, [str(order[place]) for place in places])
        axes.set_title(f"layer {layer}")
    axes.set_xlabel("expert")
    bar = add_axes(figure, left, 0.85 + len(layers) * (height + 0.62) + 0.02, 2.6, 0.09)
    figure.colorbar(image, cax=bar, orientation="horizontal", label="N × share")
    return figure


FIGURES = {
    "mass": mass,
    "agreement": agreement,
    "correlation": correlation,
    "correlation_map": correlation_map,
    "loss": loss,
    "layer_loss": layer_loss,
    "corpora": corpora,
}
