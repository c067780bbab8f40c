"""One pass of a text through a dense model, one layer in memory at a time, that keeps what its FFNs' neurons did."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from transformers.pytorch_utils import Conv1D

from moe_atlas.emoe.correlation import Moments
from moe_atlas.emoe.ffns import DenseFFN, dense_ffns
from moe_atlas.emoe.mechanism import Split, SplitSums, splits
from moe_atlas.emoe.split import gate_vectors
from moe_atlas.errors import AtlasError
from moe_atlas.probe import Batch
from moe_atlas.stream import LayerStream
from moe_atlas.text_index import TextIndex

Grid = Mapping[int, Sequence[int]]  # number of experts N -> numbers of chosen experts k


@dataclass
class LayerSums:
    """What was kept of one layer: |r| of its neurons (F, F) and the sums of each split."""

    correlation: np.ndarray
    sums: list[SplitSums]


class LayerSplits:
    """The splits of each layer's neurons, made once when the layer is first in memory, for all texts."""

    def __init__(self, grid: Grid, seeds: int):
        self.grid, self.seeds = grid, seeds
        self._of: dict[int, list[Split]] = {}

    def of(self, ffn: DenseFFN) -> list[Split]:
        """The splits of one FFN whose weights are in memory."""
        if ffn.layer not in self._of:
            keys = ffn.keys
            self._of[ffn.layer] = [split for experts in self.grid for split in splits(keys, experts, self.seeds)]
        return self._of[ffn.layer]

    def labels(self, layer: int, rule: str, experts: int, seed: int) -> np.ndarray:
        """Labels (F,) of one of the splits of a layer that was seen."""
        return next(
            split.labels
            for split in self._of[layer]
            if (split.rule, split.experts, split.seed) == (rule, experts, seed)
        )


def ffns_of(stream: LayerStream) -> list[DenseFFN]:
    """The dense FFN of each decoder layer. AtlasError where a layer has none."""
    ffns = dense_ffns(stream.model)
    if len(ffns) != len(stream):
        raise AtlasError(
            f"{stream.checkpoint.directory}: {len(ffns)} of {len(stream)} layers have one dense FFN; "
            "name a dense model for the mechanism test."
        )
    return ffns


def observe(
    stream: LayerStream,
    batches: Sequence[Batch],
    index: TextIndex,
    layers: Sequence[int],
    made: LayerSplits,
    on_layer: Callable[[], None] = lambda: None,
) -> Iterator[tuple[int, LayerSums]]:
    """(layer, what its neurons did on a text), for one of these layers after the other.

    The first token of each sequence is left out. batches: of the text that `index` describes (probe.make_batches). What
    is kept of one layer is given away before the next is read, so that one matrix of correlations is in memory.
    """
    ffns = ffns_of(stream)
    stream.begin([batch.ids for batch in batches])
    for number in range(max(layers) + 1):
        with stream.layer(number):
            if number in layers:
                yield number, _observe(stream, ffns[number], batches, index, made)
            else:
                for batch in range(len(batches)):
                    stream.step(batch)
        on_layer()


def _value_norms(ffn: DenseFFN) -> torch.Tensor:
    """Length of each neuron's value, its column of the second matrix, (F,) float32."""
    weight = ffn.last.weight.float()
    return weight.norm(dim=1 if isinstance(ffn.last, Conv1D) else 0)


def _observe(
    stream: LayerStream, ffn: DenseFFN, batches: Sequence[Batch], index: TextIndex, made: LayerSplits
) -> LayerSums:
    seen: dict[str, torch.Tensor] = {}

    def keep(name: str):
        return lambda _module, arguments: seen.__setitem__(name, arguments[0].flatten(0, -2))

    keys, value_norms = ffn.keys.float(), _value_norms(ffn)
    moments = Moments(len(keys))
    gates = [gate_vectors(keys, split.labels, split.experts) for split in made.of(ffn)]
    sums = [
        SplitSums(split, made.grid[split.experts], index.blocks, seed=number)
        for number, split in enumerate(made.of(ffn))
    ]
    hooks = [
        ffn.first.register_forward_pre_hook(keep("inputs")),
        ffn.last.register_forward_pre_hook(keep("activations")),
    ]
    try:
        for number, batch in enumerate(batches):
            stream.step(number)
            counted = index.position[batch.rows] > 0
            places, blocks = batch.tokens[counted], index.block[batch.rows[counted]]
            inputs, activations = seen["inputs"][places], seen["activations"][places]
            moments.add(activations)
            for one, gate in zip(sums, gates, strict=True):
                one.add(inputs, activations, blocks, gate, value_norms)
    finally:
        for hook in hooks:
            hook.remove()
    return LayerSums(moments.correlation(), sums)
