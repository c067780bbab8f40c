"""Scatter of router similarity against weight similarity, with the fitted line and its statistics."""

import numpy as np
import polars as pl

from moe_atlas.plotting.arrays import pages_of
from moe_atlas.plotting.base import Drawing, Experiment, Limits, Page
from moe_atlas.plotting.style import COLOURS, WIDTH, add_axes, heading, new_figure, span

_MATRICES = ("up", "act", "down")


class RouterRegression(Experiment):
    """One panel per matrix; a dot is a pair of routed experts."""

    parts = _MATRICES
    overview_title = (
        "Router similarity (vertical) against weight similarity (horizontal); r in each panel, layer on top"
    )

    def read(self, tables):
        rows = tables["similarity"].filter(pl.col("a") != pl.col("b"))
        rows = rows.filter(pl.col("a").str.contains(r"^\d+$") & pl.col("b").str.contains(r"^\d+$"))
        router = rows.filter((pl.col("matrix") == "router") & (pl.col("level") == "matrix"))
        weights = rows.filter(pl.col("level") == "neuron_mean")
        pairs = weights.join(router.select("layer", "a", "b", pl.col("cosine").alias("router")), on=["layer", "a", "b"])
        pairs = pages_of(pairs, ("layer", "matrix"))
        fits = {(row["layer"], row["matrix"]): row for row in tables["regression"].iter_rows(named=True)}
        pages = []
        for layer in sorted({layer for layer, _ in fits}):
            panels = {}
            for matrix in _MATRICES:
                if (layer, matrix) in pairs and (layer, matrix) in fits:
                    part = pairs[layer, matrix]
                    panels[matrix] = (part["cosine"].to_numpy(), part["router"].to_numpy(), fits[layer, matrix])
            if len(panels) == 3:
                pages.append(Page(layer, "ffn", {"panels": panels}))
        return pages

    def limits(self, page: Page, whole: bool) -> Limits:
        panels = page.data["panels"]
        limits = {matrix: _padded(panels[matrix][0]) for matrix in _MATRICES}
        limits["router"] = _padded(np.concatenate([y for _, y, _ in panels.values()]))
        return limits

    def draw(self, page: Page) -> Drawing:
        left, gap, head, size = 0.55, 0.22, 1.05, 1.85
        figure = new_figure(WIDTH, head + size + 0.5)
        pairs = page.data["panels"]["up"][2]["n_pairs"]
        heading(
            figure,
            self.title(page),
            f"Router similarity against mean-neuron similarity of {pairs:,} pairs of experts (cosines); chance r is 0",
        )
        panels = {}
        for i, matrix in enumerate(_MATRICES):
            x, y, fit = page.data["panels"][matrix]
            axes = panels[matrix] = add_axes(figure, left + i * (size + gap), head, size, size)
            axes.plot(x, y, linestyle="none", marker="o", markersize=_dot(len(x)), markeredgewidth=0, alpha=0.6)
            _fitted(axes, x, fit, 1.2)
            axes.set_title(f"{matrix}\n{_interval(fit)}\nMantel p {_p(fit['p_mantel'])}", fontsize=8)
            axes.set_xlabel(f"{matrix}: cosine of mean neurons")
            axes.locator_params(nbins=5)
            if i == 0:
                axes.set_ylabel("router rows: cosine")
            else:
                axes.tick_params(labelleft=False)

        def apply(limits: Limits, which: str) -> None:
            for matrix, axes in panels.items():
                axes.set(xlim=limits[matrix], ylim=limits["router"])

        return Drawing(figure, apply)

    def mini(self, axes, page: Page, part: int, limits: Limits):
        x, y, fit = page.data["panels"][_MATRICES[part]]
        axes.plot(x, y, linestyle="none", marker="o", markersize=1.2, markeredgewidth=0, alpha=0.5)
        _fitted(axes, x, fit, 0.8)
        axes.set(xlim=limits[_MATRICES[part]], ylim=limits["router"])
        axes.text(0.97, 0.03, _number(fit["r"]), transform=axes.transAxes, ha="right", va="bottom", fontsize=7)

    def caption(self, page: Page, which: str) -> str:
        fits = [page.data["panels"][matrix][2] for matrix in _MATRICES]
        values = ", ".join(f"{m} {_interval(f)}" for m, f in zip(_MATRICES, fits, strict=True))
        scale = "axes span this layer" if which == "auto" else "axes are the same for all layers"
        return (
            f"Cosine of router rows against cosine of mean neurons for {fits[0]['n_pairs']:,} pairs of routed experts "
            f"in {page.text} {self.place}, with the least-squares line and Pearson's r with its 95 % interval "
            f"({values}); chance is r = 0, {scale}."
        )


def _fitted(axes, x: np.ndarray, fit: dict, width: float) -> None:
    """The least-squares line over the range of x; there is none where the regression is undefined."""
    if fit["slope"] is not None:
        ends = np.array(span(x))
        axes.plot(ends, fit["intercept"] + fit["slope"] * ends, color=COLOURS[1], linewidth=width)


def _padded(values: np.ndarray) -> tuple[float, float]:
    low, high = span(values)
    room = 0.06 * (high - low) or 0.01
    return low - room, high + room


def _dot(n: int) -> float:
    """Marker size in points: smaller when there are many pairs."""
    return 4.0 if n <= 120 else 2.5 if n <= 1000 else 1.5


def _number(value: float | None) -> str:
    return "undefined" if value is None or not np.isfinite(value) else f"{value:.2f}".replace("-", "−")


def _interval(fit: dict) -> str:
    return f"r = {_number(fit['r'])} [{_number(fit['r_low'])}, {_number(fit['r_high'])}]"


def _p(value: float | None) -> str:
    if value is None or not np.isfinite(value):
        return "undefined"
    return "< 0.001" if value < 0.001 else f"= {value:.3f}"
