"""Which splits, numbers of chosen experts and layers the mechanism test compares."""

import re
from collections.abc import Mapping, Sequence

from moe_atlas.emoe.mechanism import GATES
from moe_atlas.emoe.split import RULES
from moe_atlas.errors import AtlasError
from moe_atlas.modularity.masked_loss import Arm

_GROUP = re.compile(r"(\d+):(\d+(?:,\d+)*)")


def read_grid(text: str) -> dict[int, list[int]]:
    """`16:4,8 32:8` -> {16: [4, 8], 32: [8]}: experts N and numbers k of chosen ones. AtlasError for another text."""
    grid: dict[int, list[int]] = {}
    for group in text.split():
        match = _GROUP.fullmatch(group)
        experts, chosen = (int(match[1]), [int(k) for k in match[2].split(",")]) if match else (0, [])
        if not chosen or experts in grid or not all(1 <= k <= experts for k in chosen):
            raise AtlasError(
                f"grid {text!r}: {group!r} is no number of experts with numbers of chosen ones; write N:k,k with k "
                "from 1 to N, such as 16:4,8."
            )
        grid[experts] = list(dict.fromkeys(chosen))
    if not grid:
        raise AtlasError("grid: there are no experts; write N:k,k, such as 16:4,8.")
    return grid


def default_layers(count: int) -> list[int]:
    """Every second layer, the last one among them."""
    return list(range((count - 1) % 2, count, 2))


def loss_arms(grid: Mapping[int, Sequence[int]], layers: Sequence[int], seeds: int) -> list[Arm]:
    """All ways to mask these layers together; and each layer alone, with the first N and k by avg-k and at random.

    Where k = N/2 the experts that are not the top k are the bottom k, which is one arm. Where k = N there is one gate.
    """
    arms = []
    first = next(iter(grid))
    for experts, ks in grid.items():
        for k in ks:
            gates = [gate for gate in GATES if gate != "not-top-k" or 2 * k != experts]
            gates = gates[:1] if k == experts else gates
            for rule in RULES:
                for seed in range(1 if rule == "contiguous" else seeds):
                    arms += [Arm(tuple(layers), experts, k, rule, seed, gate) for gate in gates]
                    if len(layers) > 1 and (experts, k) == (first, grid[first][0]):
                        arms += [
                            Arm((layer,), experts, k, rule, seed, gate)
                            for layer in layers
                            for gate in gates
                            if gate in ("avg-k", "random")
                        ]
    return arms
