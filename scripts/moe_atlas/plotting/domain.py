"""How differently experts are used on two texts: divergence of their loads by layer."""

import numpy as np
import polars as pl
from matplotlib.figure import Figure

from moe_atlas.plotting.base import Drawing, Experiment, Limits, Page, sentence
from moe_atlas.plotting.specialization import SITES, legend, lines, set_limits
from moe_atlas.plotting.style import WIDTH, add_axes, heading, new_figure, span, union

_COLUMNS = ("value", "chance", "low", "high", "random_router")
_MOST_PAIRS = 6
_ACROSS = 3


class Domain(Experiment):
    """Jensen-Shannon divergence of the loads of two long corpora against the layers, a panel for each pair."""

    def read(self, tables):
        frame = tables["domain"]
        pages = []
        for site in SITES:
            rows = frame.filter(pl.col("site") == site)
            if rows.is_empty():
                continue
            pairs = rows.filter(pl.col("measure") == "js_divergence")
            panels = {}
            for (first, second), part in pairs.partition_by(
                "corpus", "other", as_dict=True, maintain_order=True
            ).items():
                part = part.sort("layer")
                panels[f"{first} and {second}"] = {name: part[name].to_numpy() for name in ("layer", *_COLUMNS)}
            pages.append(Page("all", site, {"panels": panels}))
        return pages

    def limits(self, page: Page, whole: bool) -> Limits:
        ranges = [span(panel[column]) for panel in page.data["panels"].values() for column in _COLUMNS]
        return {"bits": union([(0.0, 0.0), *ranges])}

    def _figure(self, pages: list[Page], title: str) -> tuple[Figure, dict]:
        names = list(dict.fromkeys(name for page in pages for name in page.data["panels"]))
        if not names:
            return sentence(title, "There are no two long corpora to compare: add one to the corpora sheet."), {}
        shown = names[:_MOST_PAIRS]
        left, gap, head, height, between = 0.55, 0.5, 0.8, 1.3, 0.45
        width = (WIDTH - left - 0.12 - gap * (_ACROSS - 1)) / _ACROSS
        down = -(-len(shown) // _ACROSS)
        figure = new_figure(WIDTH, head + down * (height + between) + 0.4)
        cut = f" (first {len(shown)} of {len(names)} pairs)" if len(names) > len(shown) else ""
        heading(figure, title, f"Divergence of the loads on two corpora, bits{cut}; 0 equal, 1 without a common expert")
        axes_of = {}
        for number, name in enumerate(shown):
            row, column = divmod(number, _ACROSS)
            axes = add_axes(figure, left + column * (width + gap), head + row * (height + between), width, height)
            axes_of[name] = axes
            axes.set_title(name)
            for page in pages:
                lines(axes, page.data["panels"][name], SITES[page.site])
            layers = np.concatenate([page.data["panels"][name]["layer"] for page in pages])
            axes.set_xlim(layers.min() - 0.4, layers.max() + 0.4)
            axes.xaxis.get_major_locator().set_params(integer=True, nbins=6)
            axes.yaxis.get_major_locator().set_params(nbins=5)
            axes.set_xlabel("layer")
        axes_of[shown[0]].set_ylabel("bits")
        legend(figure, [page.site for page in pages])
        return figure, axes_of

    def draw(self, page: Page) -> Drawing:
        figure, axes_of = self._figure([page], self.title(page))

        def apply(limits: Limits, which: str) -> None:
            set_limits(axes_of, dict.fromkeys(axes_of, limits["bits"]))

        return Drawing(figure, apply)

    def overview(self) -> Figure:
        """All layers are in one figure already."""
        if not self.pages:
            return super().overview()
        figure, axes_of = self._figure(self.pages, self.title())
        set_limits(axes_of, dict.fromkeys(axes_of, self.ranges(self.pages[0], "full")["bits"]))
        return figure

    def mini(self, axes, page: Page, part: int, limits: Limits):
        """No panel by layer: the overview is one figure."""

    def caption(self, page: Page, which: str) -> str:
        scale = "this figure's range" if which == "auto" else "one range for all sites of the model"
        return (
            f"Jensen-Shannon divergence in bits of the experts' loads on two corpora by layer ({page.text}) "
            f"{self.place} with 95 % intervals over documents, beside its mean when documents are dealt out to the two "
            f"corpora at random (dashed) and the divergence of a random router on the same inputs (crosses); {scale}."
        )
