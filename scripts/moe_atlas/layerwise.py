"""Go through the weights of a checkpoint, one layer in memory at a time, beside those of its dense reference."""

import contextlib
import itertools
from collections.abc import Iterator, Sequence

from moe_atlas.architectures.bank import FFN, ExpertBank
from moe_atlas.architectures.view import dense_view, expert_bank
from moe_atlas.checkpoints import Checkpoint
from moe_atlas.stream import LayerStream


def each_layer(
    checkpoint: Checkpoint, reference: Checkpoint | None, layers: Sequence[int]
) -> Iterator[tuple[int, ExpertBank, FFN | None]]:
    """Layer index, its FFN experts, and the dense reference's FFN of the same layer, in the checkpoints' precision.

    The weights are there until the next layer is asked for, which is read meanwhile.
    """
    stream, dense = LayerStream(checkpoint), LayerStream(reference) if reference is not None else None
    for index, following in itertools.pairwise([*layers, len(stream)]):
        paired = dense is not None and index < len(dense)
        dense_layer = dense.layer(index, following) if paired else contextlib.nullcontext()
        with stream.layer(index, following) as layer, dense_layer as other:
            yield index, expert_bank(layer), dense_view(other)
