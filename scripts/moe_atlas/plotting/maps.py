"""Heat maps of pairs of experts: weights, routers, outputs, outputs token by token."""

import math

import matplotlib
import numpy as np
import polars as pl
from matplotlib.colors import Normalize

from moe_atlas.plotting.arrays import (
    chosen_labels,
    label_order,
    pages_of,
    square,
    token_index,
    token_squares,
)
from moe_atlas.plotting.base import GREY, Drawing, Experiment, Limits, Page, off_diagonal
from moe_atlas.plotting.style import WIDTH, add_axes, heading, new_figure, span, thinned, union, visible, widen

CMAP = matplotlib.colormaps["viridis"].with_extremes(over=GREY, bad="white")


def tokens_drawn(experts: int) -> int:
    """How many tokens a figure with a panel for each shows: what a printed page holds."""
    return 24 if experts <= 20 else 12


def heat_map(axes, matrix: np.ndarray, labels: list[str], norm: Normalize, inches: float, ticks=("x", "y")):
    """Draw (M, M) with expert labels on both axes, thinned to what fits."""
    image = axes.imshow(matrix, cmap=CMAP, norm=norm, interpolation="nearest", aspect="auto")
    axes.spines[["top", "right"]].set_visible(True)
    positions, texts = thinned(labels, inches)
    for axis in "xy":
        if axis in ticks:
            axes.set(**{f"{axis}ticks": positions, f"{axis}ticklabels": texts})
        else:
            axes.set(**{f"{axis}ticks": []})
    return image


class PairMaps(Experiment):
    """Panels of one quantity side by side; subclasses give `data["panels"]`: (title, labels, matrix)."""

    quantity = "cosine"
    subtitle = ""
    across = 3
    diagonal_note = " (diagonal grey)"

    def limits(self, page: Page, whole: bool) -> Limits:
        """With the diagonal for the whole model; without it for one layer, so that differences show."""
        ranges = [span(m if whole or len(m) < 2 else off_diagonal(m)) for _, _, m in page.data["panels"]]
        return {"colour": union(ranges)}

    def draw(self, page: Page) -> Drawing:
        panels = page.data["panels"]
        across = min(self.across, len(panels)) if len(panels[0][1]) <= 20 else min(self.across, 3)
        if len(panels) == 4 and len(panels[0][1]) > 20:
            across = 2
        left, gap, bar = 0.38, 0.36, 0.75
        size = min((WIDTH - left - bar - gap * (across - 1)) / across, 2.6)
        down = math.ceil(len(panels) / across)
        head, between, foot = 0.72, 0.5, 0.32
        figure = new_figure(WIDTH, head + down * size + (down - 1) * between + foot)
        heading(figure, self.title(page), self.subtitle)
        norm = Normalize(0, 1)
        for i, (title, labels, matrix) in enumerate(panels):
            x, top = left + i % across * (size + gap), head + i // across * (size + between)
            axes = add_axes(figure, x, top, size, size)
            image = heat_map(axes, matrix, labels, norm, size)
            axes.set_title(title)
        cax = add_axes(figure, left + across * size + (across - 1) * gap + 0.12, head, 0.1, size)
        colorbar = figure.colorbar(image, cax=cax)

        def apply(limits: Limits, which: str) -> None:
            norm.vmin, norm.vmax = limits["colour"]
            note = self.diagonal_note if which == "auto" and len(panels[0][1]) > 1 else ""
            colorbar.set_label(self.quantity + note)

        return Drawing(figure, apply)

    def mini(self, axes, page: Page, part: int, limits: Limits):
        norm = Normalize(*limits["colour"])
        axes.spines[["top", "right"]].set_visible(True)
        return axes.imshow(page.data["panels"][part][2], cmap=CMAP, norm=norm, interpolation="nearest", aspect="auto")

    def overview_limits(self, pages: list[Page]) -> Limits:
        """One range for all layers, diagonals left out."""
        return {"colour": widen(*union([self.limits(page, False)["colour"] for page in pages]))}

    def caption_range(self, which: str) -> str:
        if which == "auto":
            return "the colours span this layer's values off the diagonal (the diagonal is grey)"
        return "the colours span one range for all layers of the model, diagonal included"

    def extras(self, page: Page) -> str:
        labels = {label for _, names, _ in page.data["panels"] for label in names}
        said = {
            "F": "F is the dense reference's FFN",
            "F_same_input": "F′ is the same FFN on the MoE's inputs",
            "SE": "SE is the shared expert",
        }
        texts = [text for label, text in said.items() if label in labels]
        return ("; " + ", ".join(texts)) if texts else ""


class WeightSimilarity(PairMaps):
    """Cosine of flattened matrices (level matrix) or of mean neurons (level neuron_mean)."""

    parts = ("up", "act", "down")
    matrices = (("up", None), ("act", None), ("down", None))
    overview_label = "cosine (diagonal grey)"

    def __init__(self, model, corpus, tables, level: str = "matrix"):
        self.level = level
        what = "flattened weight matrices" if level == "matrix" else "mean neurons"
        self.subtitle = f"Cosine of the experts' {what}; independent ones have 0"
        self.overview_title = f"Cosine of the experts' {what}, every layer (number on top), one colour range"
        super().__init__(model, corpus, tables)

    def read(self, tables):
        frame = tables["similarity"]
        pages = []
        for (layer,), part in pages_of(frame, ("layer",)).items():
            panels = []
            for matrix, level in self.matrices:
                rows = part.filter((pl.col("matrix") == matrix) & (pl.col("level") == (level or self.level)))
                if len(self.matrices) == 4:
                    rows = rows.filter(pl.col("a").str.contains(r"^\d+$") & pl.col("b").str.contains(r"^\d+$"))
                if len(rows):
                    panels.append((matrix, *square(rows, "cosine")))
            if len(panels) == len(self.matrices):
                pages.append(Page(layer, "ffn", {"panels": panels}))
        return pages

    def caption(self, page: Page, which: str) -> str:
        what = "flattened up, act and down matrices" if self.level == "matrix" else "mean neurons of up, act and down"
        return (
            f"Cosine similarity of the {what} of the experts in {page.text} {self.place}; independent vectors have 0, "
            f"{self.caption_range(which)}{self.extras(page)}."
        )


class RouterSimilarity(WeightSimilarity):
    """Router rows beside the mean neurons of the routed experts: router, up, act, down."""

    parts = ("router", "up", "act", "down")
    matrices = (("router", "matrix"), ("up", "neuron_mean"), ("act", "neuron_mean"), ("down", "neuron_mean"))
    across = 4

    def __init__(self, model, corpus, tables):
        super().__init__(model, corpus, tables, "neuron_mean")
        self.subtitle = "Cosine of the router's rows and of the experts' mean neurons; independent ones have 0"
        self.overview_title = (
            "Cosine of the router's rows and of the experts' mean neurons, every layer (number on top)"
        )

    def caption(self, page: Page, which: str) -> str:
        return (
            f"Cosine similarity of the router's rows and of the mean up, act and down neurons of the routed experts in "
            f"{page.text} {self.place}; independent vectors have 0, {self.caption_range(which)}."
        )


class OutputSimilarity(PairMaps):
    """Mean cosine and mean angular similarity of expert outputs, side by side, each with its own colour bar."""

    overview_title = "Mean cosine of the experts' outputs, every layer (number on top), one colour range"
    overview_label = "mean cosine (diagonal grey)"
    titles = (("mean cosine", "cosine_mean", "cosine, orthogonal 0"), ("mean angular", "angular_mean", "angular"))

    def read(self, tables):
        pages = []
        for (layer, site), part in pages_of(tables["output_similarity"]).items():
            labels = label_order(set(part["a"].unique()) | set(part["b"].unique()))
            panels = [(title, *square(part, column, labels)) for title, column, _ in self.titles]
            pages.append(Page(layer, site, {"panels": panels, "tokens": int(part["tokens"].max())}))
        return pages

    def limits(self, page: Page, whole: bool) -> Limits:
        panels = page.data["panels"]
        return {t: span(m if whole or len(m) < 2 else off_diagonal(m)) for t, _, m in panels}

    def draw(self, page: Page) -> Drawing:
        size, left, pitch, head = 2.2, 0.38, 3.3, 0.72
        figure = new_figure(WIDTH, head + size + 0.32)
        heading(
            figure,
            self.title(page),
            f"Similarity of the experts' outputs, mean over {page.data['tokens']:,} tokens; "
            "orthogonal is 0 (cosine) and 0.5 (angular)",
        )
        norms, colorbars = {}, {}
        for i, (title, labels, matrix) in enumerate(page.data["panels"]):
            norms[title] = Normalize(0, 1)
            axes = add_axes(figure, left + i * pitch, head, size, size)
            image = heat_map(axes, matrix, labels, norms[title], size)
            axes.set_title(title)
            cax = add_axes(figure, left + i * pitch + size + 0.1, head, 0.1, size)
            colorbars[title] = figure.colorbar(image, cax=cax)

        def apply(limits: Limits, which: str) -> None:
            for title, norm in norms.items():
                norm.vmin, norm.vmax = limits[title]
                note = " (diagonal grey)" if which == "auto" else ""
                colorbars[title].set_label(f"{title} similarity{note}")

        return Drawing(figure, apply)

    def overview_limits(self, pages: list[Page]) -> Limits:
        return {"colour": widen(*union([self.limits(page, False)["mean cosine"] for page in pages]))}

    def caption(self, page: Page, which: str) -> str:
        return (
            f"Mean cosine and mean angular similarity of the experts' outputs in {page.text} {self.place}, over "
            f"{page.data['tokens']:,} tokens; orthogonal outputs have cosine 0 and angular similarity 0.5, "
            f"{self.caption_range(which)}{self.extras(page)}."
        )


class OutputSimilarityTokens(PairMaps):
    """One cosine map per token, titled with the token and the experts it chose."""

    overview_title = "Cosine of the experts' outputs, mean over the tokens drawn, every layer (number on top)"
    overview_label = "mean cosine (diagonal grey)"

    def read(self, tables):
        frame = tables["output_similarity_tokens"]
        tokens = token_index(tables["tokens"], tokens_drawn(frame["a"].n_unique()))
        self.total = len(tables["tokens"])
        routing = pages_of(tables["routing"]) if "routing" in tables else {}
        pages = []
        for key, part in pages_of(frame).items():
            labels, stack = token_squares(part, tokens, "cosine")
            chosen = chosen_labels(routing[key], tokens) if key in routing else [[]] * len(tokens)
            titles = token_titles(tokens["token"].to_list(), chosen)
            panels = [(title, labels, matrix) for title, matrix in zip(titles, stack, strict=True)]
            pages.append(Page(*key, {"panels": panels}))
        return pages

    def draw(self, page: Page) -> Drawing:
        panels = page.data["panels"]
        labels = panels[0][1]
        across = 4 if len(labels) <= 20 else 3
        across = min(across, len(panels)) if len(panels) > 2 else 3
        left, gap, bar, head, between, foot = 0.38, 0.14, 0.72, 0.82, 0.36, 0.32
        size = (WIDTH - left - bar - gap * (across - 1)) / across
        down = math.ceil(len(panels) / across)
        figure = new_figure(WIDTH, head + down * size + (down - 1) * between + foot)
        cut = f" (first {len(panels)} of {self.total})" if self.total > len(panels) else ""
        heading(
            figure,
            self.title(page),
            f"Cosine of the experts' outputs for each token{cut}, orthogonal 0; title: token, experts it chose",
        )
        norm = Normalize(0, 1)
        for i, (title, _, matrix) in enumerate(panels):
            row, column = divmod(i, across)
            last = i + across >= len(panels)
            ticks = ("y" if column == 0 else "") + ("x" if last else "")
            axes = add_axes(figure, left + column * (size + gap), head + row * (size + between), size, size)
            image = heat_map(axes, matrix, labels, norm, size, ticks)
            axes.set_title(title, fontsize=7, pad=2)
        cax = add_axes(figure, left + across * (size + gap) - gap + 0.12, head, 0.1, min(2.2, down * size))
        colorbar = figure.colorbar(image, cax=cax)

        def apply(limits: Limits, which: str) -> None:
            norm.vmin, norm.vmax = limits["colour"]
            colorbar.set_label("cosine" + (" (diagonal grey)" if which == "auto" else ""))

        return Drawing(figure, apply)

    def mini(self, axes, page: Page, part: int, limits: Limits):
        mean = np.mean([matrix for _, _, matrix in page.data["panels"]], axis=0)
        axes.spines[["top", "right"]].set_visible(True)
        return axes.imshow(mean, cmap=CMAP, norm=Normalize(*limits["colour"]), interpolation="nearest", aspect="auto")

    def overview_limits(self, pages: list[Page]) -> Limits:
        means = [np.mean([matrix for _, _, matrix in page.data["panels"]], axis=0) for page in pages]
        return {"colour": widen(*union([span(off_diagonal(mean)) for mean in means]))}

    def caption(self, page: Page, which: str) -> str:
        drawn = len(page.data["panels"])
        cut = f"the first {drawn} of {self.total}" if self.total > drawn else f"each of the {drawn}"
        return (
            f"Cosine similarity of the experts' outputs in {page.text} {self.place} for {cut} tokens (title: token and "
            f"the experts it chose, largest weight first); orthogonal outputs have 0, "
            f"{self.caption_range(which)}{self.extras(page)}."
        )


def token_titles(tokens: list[str], chosen: list[list[int]]) -> list[str]:
    """Two lines: the token made visible, the chosen experts by weight."""
    return [
        f"{visible(token)}\n{' '.join(map(str, experts))}" if experts else visible(token)
        for token, experts in zip(tokens, chosen, strict=True)
    ]
