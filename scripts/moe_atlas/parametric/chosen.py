"""Which pairs of experts and which layers are looked at, and how a list is dealt to several jobs."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from moe_atlas.errors import AtlasError

Item = TypeVar("Item")


@dataclass(frozen=True)
class Share:
    """One of `shares` contiguous shares of a list, counted from 1; some are empty where there are more than items."""

    share: int = 1
    shares: int = 1

    def of(self, items: Sequence[Item]) -> Sequence[Item]:
        """The items of this share. Those of all shares, in their order, are all items."""
        first, last = (len(items) * number // self.shares for number in (self.share - 1, self.share))
        return items[first:last]


EVERYTHING = Share()


def chosen_pairs(labels: list[str], most: int) -> list[tuple[str, str]]:
    """All pairs of labels, a before b, without the diagonal; `most` of them where there are more. most 0 keeps all.

    Half of them at most are pairs with F and SE, evenly spaced. Those of routed experts are taken by distance, with the
    neighbour first, so that every expert has about as many pairs as any other.
    """
    pairs = list(itertools.combinations(labels, 2))
    if not most or len(pairs) <= most:
        return pairs
    special = [pair for pair in pairs if not pair[1].isdigit()]
    routed = [label for label in labels if label.isdigit()]
    ring = [
        (routed[min(i, j)], routed[max(i, j)])
        for distance in range(1, len(routed) // 2 + 1)
        for i in range(len(routed) // (1 + (2 * distance == len(routed))))
        for j in [(i + distance) % len(routed)]
    ]
    # Either kind may use what the other leaves.
    count = min(len(special), max(most // 2, most - len(ring)))
    spaced = [special[index] for index in np.linspace(0, len(special) - 1, count).round().astype(int)] if count else []
    kept = set(spaced) | set(ring[: most - count])
    return [pair for pair in pairs if pair in kept]


def chosen_layers(layers: list[int], wanted: str, most: int) -> list[int]:
    """The layers that are matched: those named in `wanted` (comma-separated), else at most `most`, evenly spaced.

    layers: those with experts. Raises AtlasError when another one is named.
    """
    if wanted:
        named = {int(layer) for layer in wanted.split(",")}
        unknown = sorted(named - set(layers))
        if unknown:
            raise AtlasError(
                f"matching_layers {wanted}: layer {unknown[0]} has no experts to match; those that have are "
                f"{', '.join(map(str, layers)) or 'none'}."
            )
        return [layer for layer in layers if layer in named]
    if not most or len(layers) <= most:
        return layers
    return [layers[index] for index in np.linspace(0, len(layers) - 1, most).round().astype(int)]
