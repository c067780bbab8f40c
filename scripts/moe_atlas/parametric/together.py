"""Every statistic of a layer's weights in one visit, so that the weights of a model are read once."""

from dataclasses import dataclass, field

import polars as pl

from moe_atlas import tables
from moe_atlas.architectures.bank import FFN, ExpertBank
from moe_atlas.parametric.chosen import EVERYTHING, Share
from moe_atlas.parametric.gather import NAMES, gathered
from moe_atlas.parametric.matching import neuron_matching
from moe_atlas.parametric.outliers import OutlierRule
from moe_atlas.parametric.projection import DEFAULT_RULE, project_experts
from moe_atlas.parametric.similarity import weight_similarity


@dataclass
class WeightStatistics:
    """Tables similarity, matching, projection and explained_variance, layer by layer.

    matched_layers: layers whose neurons are matched; max_pairs: pairs of experts there (0: all); pairs: which share of
    those; max_neurons: neurons kept as points (0: all); rule: which experts are outliers. The other three tables have
    rows in the first share of the pairs only.
    """

    model: str
    matched_layers: list[int]
    max_pairs: int = 0
    max_neurons: int = 2048
    rule: OutlierRule = DEFAULT_RULE
    pairs: Share = EVERYTHING
    _parts: dict[str, list[pl.DataFrame]] = field(init=False)

    def __post_init__(self) -> None:
        self._parts = {name: [tables.empty(name)] for name in NAMES}

    def needed(self, layers: list[int]) -> list[int]:
        """Those of the layers with experts that have to be read."""
        return [layer for layer in layers if self.pairs.share == 1 or layer in self.matched_layers]

    def add(self, layer: int, bank: ExpertBank, reference: FFN | None) -> None:
        """Measure one layer; reference: the FFN of the dense model there."""
        fixed = {"model": self.model, "layer": layer, "reference": reference}
        if layer in self.matched_layers:
            matched = neuron_matching(bank, **fixed, max_pairs=self.max_pairs, share=self.pairs)
            self._parts["matching"].append(matched)
        if self.pairs.share > 1:
            return
        self._parts["similarity"].append(weight_similarity(bank, **fixed))
        points, ratios = project_experts(bank, **fixed, max_neurons=self.max_neurons, rule=self.rule)
        self._parts["projection"].append(points)
        self._parts["explained_variance"].append(ratios)

    def tables(self) -> dict[str, pl.DataFrame]:
        """The four tables of all layers so far, by name."""
        return {name: gathered(parts) for name, parts in self._parts.items()}
