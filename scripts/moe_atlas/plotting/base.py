"""What every figure of one model has: pages (layers), ranges, a drawing, a caption, an overview."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import polars as pl
from matplotlib.figure import Figure

from moe_atlas.plotting.style import WIDTH, add_axes, bare, heading, new_figure, union, widen

Limits = dict[str, tuple[float, float]]
GREY = "0.8"


@dataclass(frozen=True)
class Page:
    """What one figure shows: a layer (or "all"), the site of its experts, and arrays."""

    layer: int | str
    site: str
    data: dict

    @property
    def stem(self) -> str:
        """Beginning of the file name: layer_3, layer_3_attention, layer_all."""
        return f"layer_{self.layer}" + ("" if self.site == "ffn" else f"_{self.site}")

    @property
    def text(self) -> str:
        """As in titles: layer 3, layer 3 (attention experts), all layers."""
        layer = "all layers" if self.layer == "all" else f"layer {self.layer}"
        return layer + ("" if self.site == "ffn" else f" ({self.site} experts)")


@dataclass(frozen=True)
class Drawing:
    """A figure and the function that gives it other ranges: the ink is drawn once, saved for auto and full."""

    figure: Figure
    apply: Callable[[Limits, str], None]


class Experiment(ABC):
    """Base of the figures of one model. Subclasses fill `pages` and draw one page.

    `parts` names the panels an overview repeats for each layer; `cell` is their size in inches.
    """

    parts: tuple[str, ...] = ("",)
    cell = (0.68, 0.68)
    columns = 8
    overview_title = ""
    overview_label: str | None = None  # label of the overview's colour bar

    def __init__(self, model: str, corpus: str | None, tables: dict[str, pl.DataFrame]):
        self.model, self.corpus = model, corpus
        self.pages: list[Page] = self.read(tables)
        self._full: dict[bool, Limits] = {}

    # What subclasses define ------------------------------------------------------------------
    @abstractmethod
    def read(self, tables: dict[str, pl.DataFrame]) -> list[Page]:
        """Pages from the tables, in the order they are listed."""

    @abstractmethod
    def limits(self, page: Page, whole: bool) -> Limits:
        """Ranges this page needs, by name; `whole` when they are to hold for the whole model."""

    @abstractmethod
    def draw(self, page: Page) -> Drawing:
        """The figure of one page; its ranges are set by `Drawing.apply(limits, "auto" or "full")`."""

    @abstractmethod
    def caption(self, page: Page, which: str) -> str:
        """One plain sentence: model, layer, corpus, what is drawn, unit, chance level."""

    @abstractmethod
    def mini(self, axes, page: Page, part: int, limits: Limits):
        """One panel of the overview, without ticks; returns the mappable of a heat map or None."""

    # What they share -------------------------------------------------------------------------
    def ranges(self, page: Page, which: str) -> Limits:
        """auto: the range of this page; full: the common range of all pages that compare with it."""
        if which == "auto":
            return {key: widen(*value) for key, value in self.limits(page, False).items()}
        summed = page.layer == "all"  # sums over layers compare with each other only
        if summed not in self._full:
            peers = [self.limits(p, True) for p in self.pages if (p.layer == "all") == summed]
            self._full[summed] = {key: widen(*union([peer[key] for peer in peers])) for key in peers[0]}
        return self._full[summed]

    def title(self, page: Page | None = None) -> str:
        """First line of a figure: model · corpus · layer."""
        parts = [self.model, self.corpus, page.text if page else None]
        return " · ".join(part for part in parts if part)

    @property
    def place(self) -> str:
        """As in captions: 'of demo-mixtral on the corpus prose'."""
        return f"of {self.model}" + (f" on the corpus {self.corpus}" if self.corpus else "")

    def overview(self) -> Figure:
        """All layers in small multiples with one common range; for a model without experts a sentence."""
        if not self.pages:
            return sentence(
                self.title() or self.model,
                f"{self.model} has no experts in any layer (a dense model): there is nothing to draw.",
            )
        pages = [page for page in self.pages if page.layer != "all"]
        limits = self.overview_limits(pages)
        columns = min(self.columns, len(pages))
        blocks = math.ceil(len(pages) / columns)
        width, height = self.cell
        grow = min(1.7, (WIDTH - 0.8) / (columns * (width + 0.06))) if len(pages) < self.columns else 1.0
        width, height = width * max(grow, 1.0), height * max(grow, 1.0)
        left = 0.55 if any(self.parts) else 0.15
        gap, head, tail = 0.06, 0.55, 0.55 if self.overview_label else 0.15
        block = len(self.parts) * (height + gap) + 0.22
        figure = new_figure(max(WIDTH, left + columns * (width + gap) + 0.1), head + blocks * block + tail)
        heading(figure, self.title(), self.overview_title)
        mappable = None
        for i, page in enumerate(pages):
            top, x = head + i // columns * block, left + i % columns * (width + gap)
            for part, name in enumerate(self.parts):
                axes = add_axes(figure, x, top + 0.15 + part * (height + gap), width, height)
                mappable = self.mini(axes, page, part, limits) or mappable
                bare(axes)
                if part == 0:
                    site = "" if page.site == "ffn" else " att."
                    axes.set_title(f"{page.layer}{site}", fontsize=7, pad=2)
                if i % columns == 0 and name:
                    axes.set_ylabel(name, fontsize=7, rotation=0, ha="right", va="center")
        if self.overview_label and mappable is not None:
            bar = add_axes(figure, left, head + blocks * block + 0.08, 2.6, 0.09)
            figure.colorbar(mappable, cax=bar, orientation="horizontal", label=self.overview_label)
        return figure

    def overview_limits(self, pages: list[Page]) -> Limits:
        """Common range of the overview: the full one."""
        return self.ranges(pages[0], "full")


def sentence(title: str, text: str) -> Figure:
    """A figure that says something in words."""
    figure = new_figure(WIDTH, 1.2)
    heading(figure, title, "")
    figure.text(0.5, 0.4, text, ha="center", va="center", fontsize=9, wrap=True)
    return figure


def off_diagonal(matrix: np.ndarray) -> np.ndarray:
    """Values of (..., M, M) without the diagonals, flat."""
    return matrix[..., ~np.eye(matrix.shape[-1], dtype=bool)]
