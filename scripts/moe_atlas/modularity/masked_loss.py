"""How much worse a dense language model gets when each token keeps only the neurons of some experts.

All arms go through the model together, one layer in memory at a time, so that the checkpoint is read once whatever
their number. Up to its first masked layer an arm is the dense model, whose hidden states it takes over.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional

from moe_atlas.emoe.ffns import dense_ffns
from moe_atlas.emoe.mask import ExpertMask
from moe_atlas.probe import Batch
from moe_atlas.stream import LayerStream

# gate of mechanism.GATES -> score and choose of an ExpertMask
_MASKS = {
    "avg-k": ("gate", "top"),
    "oracle": ("magnitude", "top"),
    "random": ("gate", "random"),
    "not-top-k": ("gate", "rest"),
    "bottom-k": ("gate", "bottom"),
}


@dataclass(frozen=True)
class Arm:
    """One way to mask a model: k of N experts of a split, chosen by a gate of mechanism.GATES, in these layers."""

    layers: tuple[int, ...]
    experts: int
    k: int
    rule: str
    seed: int
    gate: str


LabelsOf = Callable[[int, Arm], np.ndarray]


def masked_losses(
    stream: LayerStream,
    batches: Sequence[Batch],
    blocks: torch.Tensor,
    arms: Sequence[Arm],
    labels: LabelsOf,
    on_layer: Callable[[], None] = lambda: None,
) -> tuple[np.ndarray, np.ndarray]:
    """Sums of the loss of the next token, in nats, for the dense model and each arm: (1 + A, B), and tokens (B,).

    blocks: (T,) int64, the block of documents of each token of the text, 0 to B - 1. labels: of the neurons of a layer,
    (F,), for an arm. Every token but the first of a sequence is predicted.
    """
    count = len(batches)
    stream.begin([batch.ids for _ in range(1 + len(arms)) for batch in batches])
    for index in range(len(stream)):
        with stream.layer(index):
            for number in range(count):
                before = stream.state(number)
                stream.step(number)
                for place, arm in enumerate(arms, start=1):
                    if index == arm.layers[0]:
                        stream.set_state(place * count + number, before)
            for place, arm in enumerate(arms, start=1):
                if index >= arm.layers[0]:
                    _step(stream, index, range(place * count, (place + 1) * count), arm, labels)
        on_layer()
    sums = np.zeros((1 + len(arms), int(blocks.max()) + 1))
    tokens = np.zeros(sums.shape[1])
    for number, batch in enumerate(batches):
        rows, width = torch.full((batch.ids.numel(),), -1), batch.ids.shape[1]
        rows[batch.tokens] = batch.rows
        following = rows.view(-1, width)[:, 1:].flatten()
        real = following >= 0
        places = blocks[following[real]].numpy()
        tokens += np.bincount(places, minlength=len(tokens))
        for arm in range(1 + len(arms)):
            logits = stream.logits(arm * count + number)[:, :-1].flatten(0, 1).cpu()[real]
            losses = functional.cross_entropy(logits.float(), batch.ids[:, 1:].flatten()[real], reduction="none")
            sums[arm] += np.bincount(places, weights=losses.double().numpy(), minlength=len(tokens))
    return sums, tokens


def _step(stream: LayerStream, index: int, batches: Sequence[int], arm: Arm, labels: LabelsOf) -> None:
    mask = None
    if index in arm.layers:
        score, choose = _MASKS[arm.gate]
        seed = arm.seed * len(stream) + index
        mask = ExpertMask(
            dense_ffns(stream.model)[index], labels(index, arm), arm.k, score=score, choose=choose, seed=seed
        )
        mask.install()
    try:
        for batch in batches:
            stream.step(batch)
    finally:
        if mask is not None:
            mask.remove()
