"""Heat maps of neuron matching: what an optimal order of the neurons adds to chance."""

import polars as pl

from moe_atlas.plotting.arrays import label_order, pages_of, square
from moe_atlas.plotting.base import Limits, Page
from moe_atlas.plotting.maps import PairMaps
from moe_atlas.plotting.style import span, union, widen

_MATRICES = ("up", "act", "down", "joint")


class NeuronMatching(PairMaps):
    """Up, act, down and joint of the table `matching`, over all layers that were matched.

    Measure "excess": a row of panels a matrix, the cosine before and after matching and its excess over chance, in one
    colour range; the overview shows the excess. Measure "tau": one panel a matrix.
    """

    parts = _MATRICES
    diagonal_note = ""  # no expert is matched with itself
    measured = {
        "excess": (
            "cosine",
            "Cosine before and after matching the neurons, and after minus that of independent experts of the same "
            "norms (0 is chance)",
            "Cosine after matching the neurons, minus that of independent experts of the same norms: 0 is chance",
            {"cosine_before": ", before", "cosine_after": ", after", "excess": ", above chance"},
        ),
        "tau": (
            "Kendall's tau",
            "Kendall's tau of the order that matches best: 1 the order in the files, 0 a random one",
            "Kendall's tau of the order that matches best: 1 the order in the files, 0 a random one",
            {"tau": ""},
        ),
    }

    def __init__(self, model, corpus, tables, measure: str = "excess"):
        self.quantity, self.subtitle, overview, self.columns_shown = self.measured[measure]
        self.overview_title = f"{overview} (layer on top)"
        self.overview_label = {"excess": "cosine above chance"}.get(measure, self.quantity)
        self.across = len(self.columns_shown) if measure == "excess" else len(_MATRICES)
        super().__init__(model, corpus, tables)

    def read(self, tables):
        frame = tables["matching"].with_columns(excess=pl.col("cosine_after") - pl.col("null_after_mean"))
        pages = []
        for (layer,), part in pages_of(frame, ("layer",)).items():
            labels = label_order(set(part["a"]) | set(part["b"]))
            by_matrix = {name: part.filter(pl.col("matrix") == name) for name in _MATRICES}
            panels = [
                (name + suffix, *square(rows, column, labels))
                for name, rows in by_matrix.items()
                for column, suffix in self.columns_shown.items()
            ]
            pages.append(Page(layer, "ffn", {"panels": panels}))
        return pages

    def mini(self, axes, page: Page, part: int, limits: Limits):
        return super().mini(axes, page, (part + 1) * len(self.columns_shown) - 1, limits)

    def overview_limits(self, pages: list[Page]) -> Limits:
        """One range for all layers of what the overview shows: the last panel of each row."""
        shown = [matrix for page in pages for _, _, matrix in page.data["panels"]]
        step = len(self.columns_shown)
        return {"colour": widen(*union([span(matrix) for matrix in shown[step - 1 :: step]]))}

    def caption_range(self, which: str) -> str:
        return f"the colours span {'this layer' if which == 'auto' else 'all matched layers of the model'}"

    def caption(self, page: Page, which: str) -> str:
        return (
            f"{self.subtitle}; pairs of experts in {page.text} {self.place}, each matrix matched by itself and, as "
            f"joint, the three together; white pairs were not matched or have other widths; {self.caption_range(which)}"
            f"{self.extras(page)}."
        )
