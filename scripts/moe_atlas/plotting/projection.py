"""Experts and their neurons on the principal components of a layer."""

import matplotlib
import numpy as np
import polars as pl
from matplotlib.colors import BoundaryNorm

from moe_atlas.plotting.arrays import label_order, numbered, pages_of
from moe_atlas.plotting.base import Drawing, Experiment, Limits, Page
from moe_atlas.plotting.style import COLOURS, WIDTH, add_axes, heading, new_figure, span

_MATRICES = ("up", "act", "down")
_SCORES = ("pc1", "pc2", "pc3")
_NAMED = 16  # experts whose numbers all stand beside their points; of more, only those of outliers
_FAR = 8  # and of so many others: the farthest from the centre
_LEFT, _GAP, _SIZE = 0.62, 0.2, 1.83  # inches: the panels of the three matrices


class _Projection(Experiment):
    """What both levels share: one range for all components and matrices of a page, a panel a matrix."""

    parts = _MATRICES
    level: str
    axes_shown: int  # components that are drawn

    def read(self, tables):
        points = tables["projection"].filter(pl.col("level") == self.level)
        ratios = tables["explained_variance"].filter(pl.col("level") == self.level)
        shares = pages_of(ratios, ("layer", "matrix"))
        pages = []
        for (layer,), part in pages_of(points, ("layer",)).items():
            labels = label_order(set(part["expert"]))
            panels = {}
            for matrix in _MATRICES:
                rows = part.filter(pl.col("matrix") == matrix)
                panels[matrix] = {
                    "scores": rows.select(_SCORES).to_numpy().astype(np.float64),
                    "experts": numbered(rows["expert"], labels),
                    "outliers": rows["outlier"].to_numpy(),
                    "null_outlier": rows["null_outlier"].max() if len(rows) else None,
                    "shares": _by_component(shares.get((layer, matrix))),
                }
            pages.append(Page(layer, "ffn", {"labels": labels, "panels": panels}))
        return pages

    def limits(self, page: Page, whole: bool) -> Limits:
        scores = np.concatenate([panel["scores"][:, : self.axes_shown] for panel in page.data["panels"].values()])
        low, high = span(scores)
        room = 0.09 * (high - low) or 1.0
        return {"score": (low - room, high + room)}

    def caption(self, page: Page, which: str) -> str:
        scale = "axes span this layer" if which == "auto" else "axes are the same for all layers"
        shares = ", ".join(
            f"{matrix} {_percent(*panel['shares'][0])}"
            for matrix, panel in page.data["panels"].items()
            if panel["shares"]
        )
        return (
            f"{self.what(page)} in {page.text} {self.place}{self.extras(page)}; each coordinate is standardised over "
            "the points, scores have no unit; share of the variance on the first component, and of independent "
            f"weights: {shares or 'undefined'}; {scale}."
        )

    def extras(self, page: Page) -> str:
        """What else a caption says, after what is drawn and of which model."""
        return ""


class MatrixProjection(_Projection):
    """A point is one expert's whole matrix, by the first two components; DBSCAN's outliers have a ring."""

    level, axes_shown = "matrix", 2
    overview_title = "Experts' matrices on their first two principal components; a ring: outlier, x: F; layer on top"

    def draw(self, page: Page) -> Drawing:
        head = 1.0
        figure = new_figure(WIDTH, head + _SIZE + 0.5)
        heading(figure, self.title(page), self.subtitle(page))
        drawn = []
        for i, matrix in enumerate(_MATRICES):
            panel = page.data["panels"][matrix]
            axes = _flat_axes(figure, i, head, panel)
            self._points(axes, page, panel, 4.0)
            named = _named(panel, page.data["labels"])
            for j in named:
                axes.annotate(
                    page.data["labels"][panel["experts"][j]],
                    panel["scores"][j, :2],
                    (3, 3),
                    textcoords="offset points",
                    fontsize=7,
                    annotation_clip=True,
                )
            drawn.append(axes)

        def apply(limits: Limits, which: str) -> None:
            for axes in drawn:
                axes.set(xlim=limits["score"], ylim=limits["score"])

        return Drawing(figure, apply)

    def subtitle(self, page: Page) -> str:
        text = "Each point is one expert's matrix; PC1's share of the variance, and that of independent experts"
        chance = page.data["panels"]["up"]["null_outlier"]
        if chance is not None:
            text += f"; a ring marks DBSCAN's outliers (of independent experts {100 * chance:.0f} % are)"
        return text + ("; x: F" if "F" in page.data["labels"] else "")

    def what(self, page: Page) -> str:
        return f"Flattened matrices of the {_count(page)} routed experts on their first two principal components"

    def extras(self, page: Page) -> str:
        text = ""
        for matrix, panel in page.data["panels"].items():
            if panel["null_outlier"] is not None:
                found = np.flatnonzero(panel["outliers"].astype(bool))
                named = " ".join(page.data["labels"][panel["experts"][j]] for j in found) or "none"
                chance = 100 * panel["null_outlier"]
                text += f"; outliers of {matrix}: {named} (of independent experts {chance:.0f} % are)"
        return text

    def mini(self, axes, page: Page, part: int, limits: Limits):
        self._points(axes, page, page.data["panels"][_MATRICES[part]], 2.0)
        axes.set(xlim=limits["score"], ylim=limits["score"])

    def _points(self, axes, page: Page, panel: dict, size: float) -> None:
        x, y = panel["scores"][:, 0], panel["scores"][:, 1]
        dense = np.array(page.data["labels"])[panel["experts"]] == "F"
        axes.plot(x[~dense], y[~dense], "o", markersize=size, markeredgewidth=0, color=COLOURS[0])
        axes.plot(x[dense], y[dense], "x", markersize=size + 1, color=COLOURS[6])
        if panel["null_outlier"] is not None:
            apart = panel["outliers"].astype(bool)
            axes.plot(x[apart], y[apart], "o", markersize=size + 3, markerfacecolor="none", color=COLOURS[1])


class NeuronProjection(_Projection):
    """A point is one neuron, coloured by its expert, by two and by three components."""

    level, axes_shown = "neuron", 3
    overview_title = "Neurons on the first two principal components of their layer, coloured by expert; layer on top"
    overview_label = "expert"

    def draw(self, page: Page) -> Drawing:
        head, deep = 1.0, 2.05
        figure = new_figure(WIDTH, head + _SIZE + 0.45 + deep + 0.6)
        heading(figure, self.title(page), self.subtitle(page))
        flat, solid, mappable = [], [], None
        for i, matrix in enumerate(_MATRICES):
            panel = page.data["panels"][matrix]
            left = _LEFT + i * (_SIZE + _GAP)
            axes = _flat_axes(figure, i, head, panel)
            mappable = self._points(axes, page, panel, 2) or mappable
            flat.append(axes)
            axes = add_axes(figure, left - 0.17, head + _SIZE + 0.4, deep, deep, projection="3d")
            self._points(axes, page, panel, 3)
            axes.set_xlabel("PC1", labelpad=-14)
            axes.set_ylabel("PC2", labelpad=-14)
            axes.set_zlabel("PC3", labelpad=-14)
            axes.set(xticklabels=[], yticklabels=[], zticklabels=[])
            axes.set_box_aspect(None, zoom=0.88)
            axes.patch.set_visible(False)  # it would cover the labels of its neighbour
            for axis in (axes.xaxis, axes.yaxis, axes.zaxis):
                axis.pane.set_facecolor("white")
                axis._axinfo["grid"].update(linewidth=0.3, color="0.8")
            solid.append(axes)
        if mappable is not None:
            bar = add_axes(figure, _LEFT, head + _SIZE + 0.45 + deep + 0.12, 2.6, 0.09)
            _expert_bar(figure, mappable, bar, _count(page))

        def apply(limits: Limits, which: str) -> None:
            for axes in flat:
                axes.set(xlim=limits["score"], ylim=limits["score"])
            for axes in solid:
                axes.set(xlim=limits["score"], ylim=limits["score"], zlim=limits["score"])

        return Drawing(figure, apply)

    def subtitle(self, page: Page) -> str:
        shown = len(page.data["panels"]["up"]["scores"])
        text = f"Each point is a neuron ({shown:,} of the layer, evenly spaced), coloured by its expert"
        text += "; x: of F" if "F" in page.data["labels"] else ""
        return f"{text}; PC1's share of the variance, and that of independent neurons"

    def what(self, page: Page) -> str:
        shown = len(page.data["panels"]["up"]["scores"])
        return (
            f"{shown:,} neurons of the {_count(page)} routed experts, evenly spaced over all, on the first three "
            "principal components of all of them"
        )

    def mini(self, axes, page: Page, part: int, limits: Limits):
        mappable = self._points(axes, page, page.data["panels"][_MATRICES[part]], 2, 1.0)
        axes.set(xlim=limits["score"], ylim=limits["score"])
        return mappable

    def _points(self, axes, page: Page, panel: dict, components: int, size: float = 3.0):
        experts = _count(page)
        scores, routed = panel["scores"][:, :components], panel["experts"] < experts
        edges = BoundaryNorm(np.arange(experts + 1) - 0.5, max(experts, 256)) if experts > 1 else None
        style = {"s": size, "linewidths": 0, "alpha": 0.7, "cmap": matplotlib.colormaps["viridis"], "norm": edges}
        # A picture in a pdf: thousands of points as paths make files that no reader opens at once.
        drawn = axes.scatter(*scores[routed].T, c=panel["experts"][routed], rasterized=True, **style)
        if not routed.all():
            axes.scatter(*scores[~routed].T, marker="x", s=size + 3, color=COLOURS[6], linewidths=0.5, rasterized=True)
        return drawn if experts > 1 else None


def _flat_axes(figure, column: int, head: float, panel: dict):
    """Axes of the first two components, titled by matrix and the first one's share."""
    axes = add_axes(figure, _LEFT + column * (_SIZE + _GAP), head, _SIZE, _SIZE)
    axes.set_title(f"{_MATRICES[column]}\n{_axis_share(panel, 0)}", fontsize=8)
    axes.set_xlabel("PC1")
    axes.locator_params(nbins=5)
    if column == 0:
        axes.set_ylabel("PC2")
    else:
        axes.tick_params(labelleft=False)
    return axes


def _expert_bar(figure, mappable, axes, experts: int) -> None:
    step = max(1, experts // 8)
    figure.colorbar(mappable, cax=axes, orientation="horizontal", label="expert", ticks=np.arange(0, experts, step))


def _count(page: Page) -> int:
    """Routed experts of a page."""
    return sum(label.isdigit() for label in page.data["labels"])


def _by_component(frame: pl.DataFrame | None) -> list[tuple[float | None, float]]:
    """(share, share of independent weights) for each component, the first one first."""
    if frame is None:
        return []
    return list(frame.sort("component").select("ratio", "null_ratio").iter_rows())


def _percent(ratio: float | None, null: float) -> str:
    return f"{'undefined' if ratio is None else f'{100 * ratio:.1f} %'} ({100 * null:.1f} %)"


def _axis_share(panel: dict, component: int) -> str:
    shares = panel["shares"]
    return f"PC{component + 1} {_percent(*shares[component])}" if component < len(shares) else "no component"


def _named(panel: dict, labels: list[str]) -> list[int]:
    """Points whose label is written: all of few, else F, outliers where they are few, and those farthest out."""
    scores = panel["scores"][:, :2]
    if len(scores) <= _NAMED:
        return [j for j in range(len(scores)) if np.isfinite(scores[j]).all()]
    named = set(np.argsort(-np.hypot(*scores.T), kind="stable")[:_FAR].tolist())
    if panel["null_outlier"] is not None and panel["outliers"].astype(bool).sum() <= _NAMED:
        named |= set(np.flatnonzero(panel["outliers"].astype(bool)).tolist())
    return sorted(named | {j for j in range(len(scores)) if labels[panel["experts"][j]] == "F"})
