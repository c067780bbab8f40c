"""What a router's choices say about its experts: measures by layer, and which experts come together."""

import matplotlib
import numpy as np
import polars as pl
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from moe_atlas.plotting.arrays import pages_of
from moe_atlas.plotting.base import GREY, Drawing, Experiment, Limits, Page
from moe_atlas.plotting.maps import heat_map
from moe_atlas.plotting.style import COLOURS, WIDTH, add_axes, heading, new_figure, span, union, widen

# (measure, subject) of the table -> title of the panel
PANELS = {
    ("load_entropy", "layer"): "load entropy",
    ("max_vio", "layer"): "MaxVio",
    ("dead_share", "layer"): "dead experts, share",
    ("co_activation", "mean_abs"): "co-activation, mean |C − chance|",
    ("repeat_top1", "layer"): "same first choice as before",
    ("repeat_any", "layer"): "an expert in common",
    ("vocabulary_input", "layer"): "vocabulary, input token",
    ("vocabulary_next", "layer"): "vocabulary, next token",
    ("context_independence", "layer"): "context independence",
    ("confidence_entropy", "layer"): "entropy of the scores",
    ("margin", "layer"): "score margin, first − second",
    ("topk_mass", "layer"): "score of the k best",
}
_COLUMNS = ("value", "chance", "low", "high", "random_router")
_ACROSS = 3
SITES = {"ffn": COLOURS[0], "attention": COLOURS[2]}
_RANDOM = COLOURS[1]
_DIVERGING = matplotlib.colormaps["RdBu_r"].with_extremes(bad=GREY)


class Specialization(Experiment):
    """Every measure of a layer against the layers, with interval, chance level and the value of a random router."""

    overview_title = "Measures of the choices by layer: value with 95 % interval, chance level, a random router"

    def read(self, tables):
        frame = tables["specialization"]
        pages = []
        for site in SITES:
            rows, panels = frame.filter(pl.col("site") == site), {}
            if rows.is_empty():
                continue
            for measure, subject in PANELS:
                part = rows.filter((pl.col("measure") == measure) & (pl.col("subject") == subject)).sort("layer")
                panels[measure] = {name: part[name].to_numpy() for name in ("layer", *_COLUMNS)}
            pages.append(Page("all", site, {"panels": panels, "tokens": int(rows["tokens"].max())}))
        return pages

    def limits(self, page: Page, whole: bool) -> Limits:
        panels = page.data["panels"].items()
        return {name: union([span(panel[column]) for column in _COLUMNS]) for name, panel in panels}

    def _figure(self, pages: list[Page], title: str) -> tuple[Figure, dict]:
        left, gap, head, height, between = 0.5, 0.5, 0.78, 0.95, 0.42
        width = (WIDTH - left - 0.12 - gap * (_ACROSS - 1)) / _ACROSS
        down = -(-len(PANELS) // _ACROSS)
        figure = new_figure(WIDTH, head + down * (height + between) + 0.35)
        tokens = max(page.data["tokens"] for page in pages)
        heading(
            figure, title, f"Choices of {tokens:,} tokens, first tokens of sequences left out; dashed: chance level"
        )
        axes_of = {}
        for number, ((measure, _), name) in enumerate(PANELS.items()):
            row, column = divmod(number, _ACROSS)
            axes = add_axes(figure, left + column * (width + gap), head + row * (height + between), width, height)
            axes_of[measure] = axes
            axes.set_title(name)
            layers = np.concatenate([page.data["panels"][measure]["layer"] for page in pages])
            for page in pages:
                lines(axes, page.data["panels"][measure], SITES[page.site])
            axes.set_xlim(*_around(layers))
            axes.xaxis.get_major_locator().set_params(integer=True, nbins=6)
            axes.yaxis.get_major_locator().set_params(nbins=4)
            if row == down - 1:
                axes.set_xlabel("layer")
        legend(figure, [page.site for page in pages])
        return figure, axes_of

    def draw(self, page: Page) -> Drawing:
        figure, axes_of = self._figure([page], self.title(page))

        def apply(limits: Limits, which: str) -> None:
            set_limits(axes_of, limits)

        return Drawing(figure, apply)

    def overview(self) -> Figure:
        """All layers are in one figure already; both sites of a model that has two."""
        if not self.pages:
            return super().overview()
        figure, axes_of = self._figure(self.pages, self.title())
        set_limits(axes_of, self.ranges(self.pages[0], "full"))
        return figure

    def mini(self, axes, page: Page, part: int, limits: Limits):
        """No panel by layer: the overview is one figure."""

    def caption(self, page: Page, which: str) -> str:
        scale = "this figure's range" if which == "auto" else "one range for all sites of the model"
        return (
            f"Measures of the experts' use by layer {self.place} ({page.text}, {page.data['tokens']:,} tokens): values "
            "with 95 % intervals over documents where there are five or more, chance levels (dashed; an even router, "
            "for vocabulary and context independence the same choices permuted) and a random router on the same inputs "
            f"(crosses), which shows what follows from the tokens alone; {scale}."
        )


def legend(figure: Figure, sites: list[str]) -> None:
    """What the lines of these figures are, below them."""
    handles = [
        Line2D([], [], color=SITES[site], marker="o", markersize=3.5, label=f"{_experts(site)} (95 % interval)")
        for site in sites
    ]
    handles.append(Line2D([], [], color="0.35", linestyle="--", linewidth=0.9, label="chance"))
    handles.append(Line2D([], [], color=_RANDOM, marker="x", markersize=4, linestyle="", label="random router"))
    figure.legend(handles=handles, loc="lower left", ncols=len(handles), bbox_to_anchor=(0.02, 0.0))


def _experts(site: str) -> str:
    return "value" if site == "ffn" else f"{site} experts"


def _around(layers: np.ndarray) -> tuple[float, float]:
    low, high = span(layers.astype(np.float64))
    return low - 0.4, high + 0.4


def lines(axes, panel: dict, colour: str) -> None:
    """Value with interval, chance and random router against the layers; arrays by the table's column names."""
    layers = panel["layer"]
    axes.plot(layers, panel["chance"], color="0.35", linestyle="--", linewidth=0.9, marker="_", markersize=5)
    axes.plot(layers, panel["random_router"], color=_RANDOM, marker="x", markersize=4, linestyle="")
    axes.plot(layers, panel["value"], color=colour, marker="o", markersize=3.5)
    known = np.isfinite(panel["low"]) & np.isfinite(panel["high"])
    axes.vlines(layers[known], panel["low"][known], panel["high"][known], color=colour, linewidth=0.8)


def set_limits(axes_of: dict, limits: Limits) -> None:
    """Vertical ranges of panels by name, with some room."""
    for measure, axes in axes_of.items():
        low, high = widen(*limits[measure])
        room = max(0.08 * (high - low), 0.005)  # a measure that is 0 everywhere keeps readable ticks
        axes.set_ylim(low - room, high + room)


class CoActivation(Experiment):
    """Share of the tokens of expert i that choose expert j too, minus chance: the router's, and a random router's."""

    cell = (0.8, 0.8)
    columns = 7
    overview_title = "Share of the tokens of expert i (vertical) that choose j too, minus chance; layer on top"
    overview_label = "N_ij / N_i − chance (diagonal grey)"

    def read(self, tables):
        frame = tables["specialization"].filter(
            (pl.col("measure") == "co_activation") & (pl.col("subject") != "mean_abs")
        )
        pages = []
        for key, part in pages_of(frame).items():
            pairs = part["subject"].str.split_exact(",", 1).struct.unnest().cast(pl.Int64).to_numpy()
            size = int(pairs.max()) + 1
            matrices = []
            for column in ("value", "random_router"):
                matrix = np.full((size, size), np.nan)
                matrix[pairs[:, 0], pairs[:, 1]] = part[column].to_numpy()
                matrices.append(matrix)
            pages.append(Page(*key, {"matrices": matrices, "tokens": int(part["tokens"].max())}))
        return pages

    def limits(self, page: Page, whole: bool) -> Limits:
        low, high = union([span(matrix) for matrix in page.data["matrices"]])
        largest = max(abs(low), abs(high))
        return {"colour": (-largest, largest)}

    def draw(self, page: Page) -> Drawing:
        size, left, pitch, head = 2.4, 0.5, 2.85, 0.78
        figure = new_figure(WIDTH, head + size + 0.5)
        heading(
            figure,
            self.title(page),
            f"Share of the tokens of expert i that choose expert j too, minus chance; {page.data['tokens']:,} tokens",
        )
        norm, labels = Normalize(-1, 1), [str(expert) for expert in range(len(page.data["matrices"][0]))]
        for number, (title, matrix) in enumerate(zip(("router", "random router"), page.data["matrices"], strict=True)):
            axes = add_axes(figure, left + number * pitch, head, size, size)
            image = heat_map(axes, matrix, labels, norm, size)
            image.set_cmap(_DIVERGING)
            axes.set_title(title)
            axes.set_xlabel("expert j")
            if number == 0:
                axes.set_ylabel("expert i")
        figure.colorbar(image, cax=add_axes(figure, left + pitch + size + 0.12, head, 0.1, size))

        def apply(limits: Limits, which: str) -> None:
            norm.vmin, norm.vmax = limits["colour"]

        return Drawing(figure, apply)

    def mini(self, axes, page: Page, part: int, limits: Limits):
        norm = Normalize(*limits["colour"])
        axes.spines[["top", "right"]].set_visible(True)
        matrix = page.data["matrices"][0]
        return axes.imshow(matrix, cmap=_DIVERGING, norm=norm, interpolation="nearest", aspect="auto")

    def caption(self, page: Page, which: str) -> str:
        scale = "this layer's range" if which == "auto" else "one range for all layers of the model"
        return (
            f"Co-activation in {page.text} {self.place} over {page.data['tokens']:,} tokens: the share of the tokens "
            "that chose expert i which chose expert j too, minus the chance level (k − 1)/(N − 1) of an even router, "
            f"beside the same of a random router on the same inputs; grey is undefined, the colours span {scale}."
        )
