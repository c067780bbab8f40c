"""Intermediate states of the experts: heat maps token by token, and the share of active neurons."""

import math

import matplotlib
import numpy as np
import polars as pl
from matplotlib.colors import Normalize

from moe_atlas.plotting.arrays import chosen_labels, label_order, numbered, pages_of, token_index
from moe_atlas.plotting.base import Drawing, Experiment, Limits, Page
from moe_atlas.plotting.maps import token_titles, tokens_drawn
from moe_atlas.plotting.style import (
    COLOURS,
    MARKERS,
    WIDTH,
    add_axes,
    bars,
    heading,
    new_figure,
    span,
    thinned,
    union,
    widen,
)

THRESHOLD = 0.001  # A Closer Look, appendix H
_OTHERS = (8, 64)  # times the threshold: the tail of the distribution
_MAP = matplotlib.colormaps["viridis"].with_extremes(bad="white")


class Intermediate(Experiment):
    """One map for each token: an expert a row, its neurons from left to right."""

    cell = (1.4, 0.7)
    columns = 4
    overview_title = "Activations of the experts (rows) by neuron, mean over the tokens drawn; layer on top, one range"
    overview_label = "activation"

    def read(self, tables):
        frame = tables["intermediate"]
        self.total = len(tables["tokens"])
        routing = pages_of(tables["routing"]) if "routing" in tables else {}
        pages = []
        for key, part in pages_of(frame).items():
            labels = label_order(set(part["expert"]))
            tokens = token_index(tables["tokens"], tokens_drawn(len(labels)))
            part = part.join(tokens.select("sequence", "position", "t"), on=["sequence", "position"])
            length = int(part["neurons"][0])
            runs = part["neuron"].to_numpy() // length
            tokens = tokens.head(part["t"].n_unique())
            states = np.full((len(tokens), len(labels), runs.max() + 1), np.nan)
            states[part["t"].to_numpy(), numbered(part["expert"], labels), runs] = part["value"].to_numpy()
            chosen = chosen_labels(routing[key], tokens) if key in routing else [[]] * len(tokens)
            titles = token_titles(tokens["token"].to_list(), chosen)
            pages.append(Page(*key, {"states": states, "labels": labels, "length": length, "titles": titles}))
        return pages

    def limits(self, page: Page, whole: bool) -> Limits:
        return {"colour": span(page.data["states"])}

    def pooled(self, page: Page) -> str:
        """Said where a column is more than one neuron."""
        length = page.data["length"]
        return f", each column the largest of {length} neighbouring neurons" if length > 1 else ""

    def draw(self, page: Page) -> Drawing:
        states, labels, titles = page.data["states"], page.data["labels"], page.data["titles"]
        tokens, experts, runs = states.shape
        across = min(3, tokens)
        left, right, gap, head, between, foot = 0.38, 0.8, 0.14, 0.82, 0.36, 0.42
        height = min(max(0.09 * experts, 0.7), 1.6)
        width = (WIDTH - left - right - gap * (across - 1)) / across
        down = math.ceil(tokens / across)
        figure = new_figure(WIDTH, head + down * height + (down - 1) * between + foot)
        cut = f" (first {tokens} of {self.total})" if self.total > tokens else ""
        heading(
            figure,
            self.title(page),
            f"Activation before the product with up, expert by neuron, for each token{cut}{self.pooled(page)}; "
            "title: token, experts it chose",
        )
        norm = Normalize(0, 1)
        positions, texts = thinned(labels, height)
        for i in range(tokens):
            row, column = divmod(i, across)
            axes = add_axes(figure, left + column * (width + gap), head + row * (height + between), width, height)
            image = axes.imshow(states[i], cmap=_MAP, norm=norm, interpolation="nearest", aspect="auto")
            axes.spines[["top", "right"]].set_visible(True)
            axes.set_yticks(positions, texts if column == 0 else [""] * len(positions))
            last = (runs - 1) * page.data["length"]
            axes.set_xticks([0, runs - 1], ["0", str(last)] if i + across >= tokens else ["", ""])
            axes.get_xticklabels()[1].set_ha("right")
            axes.set_title(titles[i].replace("\n", " · "), fontsize=7, pad=2)
            if i == (down - 1) * across:
                axes.set_xlabel("neuron")
        bar = add_axes(figure, left + across * (width + gap) - gap + 0.12, head, 0.1, min(2.2, down * height))
        figure.colorbar(image, cax=bar, label="activation")

        def apply(limits: Limits, which: str) -> None:
            norm.vmin, norm.vmax = limits["colour"]

        return Drawing(figure, apply)

    def mini(self, axes, page: Page, part: int, limits: Limits):
        axes.spines[["top", "right"]].set_visible(True)
        mean = page.data["states"].mean(axis=0)
        return axes.imshow(mean, cmap=_MAP, norm=Normalize(*limits["colour"]), interpolation="nearest", aspect="auto")

    def overview_limits(self, pages: list[Page]) -> Limits:
        return {"colour": widen(*union([span(page.data["states"].mean(axis=0)) for page in pages]))}

    def caption(self, page: Page, which: str) -> str:
        tokens = len(page.data["states"])
        cut = f"the first {tokens} of {self.total}" if self.total > tokens else f"each of the {tokens}"
        low, high = span(page.data["states"])
        scale = "this layer" if which == "auto" else "all layers of the model (the paper's figure 12 ends it at 1)"
        other = "; F is the dense reference's FFN on its own hidden states" if "F" in page.data["labels"] else ""
        return (
            f"Activation of every expert's neurons in {page.text} {self.place}, before the product with the up branch, "
            f"for {cut} tokens (title: token and the experts it chose){self.pooled(page)}; values here are "
            f"{low:.2g} to {high:.2g}, the colours span {scale}{other}."
        )


class ActivationRatio(Experiment):
    """Share of active neurons of each expert at the threshold 0.001, with two higher thresholds beside it."""

    cell = (1.4, 0.75)
    columns = 4
    overview_title = "Share of neurons with an absolute activation above 0.001, by expert; layer on top"

    def read(self, tables):
        pages = []
        for key, part in pages_of(tables["activation_ratio"]).items():
            at = {factor: _ratios(part, factor * THRESHOLD) for factor in (1, *_OTHERS)}
            pages.append(Page(*key, {"ratios": at, "tokens": int(part["tokens"].max())}))
        return pages

    def limits(self, page: Page, whole: bool) -> Limits:
        return {"share": (0.0, 1.02 if whole else 1.08 * float(page.data["ratios"][1].max()) + 1e-6)}

    def draw(self, page: Page) -> Drawing:
        ratios = page.data["ratios"]
        experts = len(ratios[1])
        figure = new_figure(WIDTH, 2.9)
        heading(
            figure,
            self.title(page),
            f"Share of an expert's neurons with |activation| above {THRESHOLD}, over {page.data['tokens']:,} tokens, "
            f"chosen or not; mean {ratios[1].mean():.3f}",
        )
        width = WIDTH - 1.9
        axes = add_axes(figure, 0.62, 0.6, width, 1.8)
        x = np.arange(experts, dtype=np.float64)
        bars(axes, x - 0.4, ratios[1], 0.8, COLOURS[0])
        for number, factor in enumerate(_OTHERS, start=1):
            axes.plot(
                x, ratios[factor], linestyle="none", marker=MARKERS[number], markersize=3.5, color=COLOURS[number],
                markeredgecolor="white", markeredgewidth=0.4, label=f"above {factor * THRESHOLD:g}",
            )  # fmt: skip
        positions, texts = thinned([str(e) for e in range(experts)], width)
        axes.set_xticks(positions, texts)
        axes.set(xlim=(-0.7, experts - 0.3), xlabel="expert", ylabel="share of neurons")
        figure.legend(loc="upper right", bbox_to_anchor=(1.0, 0.82), handlelength=1)

        def apply(limits: Limits, which: str) -> None:
            axes.set_ylim(limits["share"])

        return Drawing(figure, apply)

    def mini(self, axes, page: Page, part: int, limits: Limits):
        ratios = page.data["ratios"][1]
        bars(axes, np.arange(len(ratios)) - 0.4, ratios, 0.8, COLOURS[0])
        axes.set(xlim=(-0.7, len(ratios) - 0.3), ylim=limits["share"])

    def overview_limits(self, pages: list[Page]) -> Limits:
        return {"share": (0.0, 1.02)}

    def caption(self, page: Page, which: str) -> str:
        ratios = page.data["ratios"][1]
        scale = "the range of this layer" if which == "auto" else "0 to 1"
        return (
            f"Share of each expert's neurons whose activation before the product with the up branch is above "
            f"{THRESHOLD} in absolute value in {page.text} {self.place}, over {page.data['tokens']:,} tokens, "
            f"chosen or not: {ratios.min():.3f} to {ratios.max():.3f}; the axis is {scale}."
        )


def _ratios(part: pl.DataFrame, threshold: float) -> np.ndarray:
    """Ratios at one threshold of the table, by expert, (N,) float64."""
    rows = part.filter((pl.col("threshold") - threshold).abs() < 1e-9)
    return rows.sort(pl.col("expert").cast(pl.Int64))["ratio"].to_numpy()
